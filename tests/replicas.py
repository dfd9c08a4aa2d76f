"""The training and the test step of W ranks as torch_xla traces them in W replicas on one machine, without running them.

    python replicas.py FOLDER NUMBER ...       traces those of CASES in four replicas that xmp.spawn starts

On a TPU xmp.spawn starts a process for each chip; on XLA's CPU backend with CPU_NUM_DEVICES it starts a thread for each device, which would wait for
each other forever if they ran a collective (torch_xla 2.9). So nothing is run here: each replica writes down its program and the values that
the program would be given. replicas_execute.py runs them.
"""

import os
import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402
import torch  # noqa: E402

MOST = 4  # replicas that there are
FEW = 5  # fewer than the ranks' parts of a batch together: some have no row that counts
WIDTH, SIZES = 8, (50, 7, 1000, 301, 23)
HERE, EVERYWHERE, SPLIT = 0, -1, -2
ONE_TRACES = threading.Lock()  # XlaTracer sees the tensors of all threads
ALL_DONE = threading.Barrier(MOST)


@dataclass(frozen=True)
class Case:
    """
    where    of each part of each table its rank, EVERYWHERE or SPLIT
    methods  of each table
    bags     "one": one id for each table; "fixed": three; "padded": one to three
    """

    name: str
    world: int
    where: tuple[int, ...]
    optimizer: str = "sgd"
    bags: str = "one"
    layout: str = "rows"
    methods: tuple[str, ...] = ("plain",) * len(SIZES)
    sizes: tuple[int, ...] = SIZES
    batch: int = 12
    steps: int = 4


MIXED = (0, EVERYWHERE, 1, SPLIT, 2)
HASHED = ("plain", "plain", "double_hash", "double_hash", "plain")
TT = ("plain", "plain", "tt:rank=2", "tt:rank=2", "plain")
QR = ("plain", "plain", "qr", "qr", "plain")
CASES = (
    Case("plain", 4, MIXED),
    Case("uneven, padded bags", 4, (3, EVERYWHERE, 0, SPLIT, 0), "rwsadagrad", "padded"),
    Case("some copies, gathered", 4, (0, EVERYWHERE, EVERYWHERE, 1, 3), "rwsadagrad", "padded"),
    Case("packed", 4, MIXED, "rwsadagrad", "padded", "packed"),
    Case("adagrad, packed", 2, (0, EVERYWHERE, 1, SPLIT, 0), "adagrad", "fixed", "packed"),
    Case("all copies, gathered", 4, (EVERYWHERE,) * 5, "rwsadagrad", "one"),
    Case("all split", 4, (SPLIT,) * 5, "rwsadagrad", "padded"),
    Case("one rank has all", 3, (1,) * 5, "sgd", "fixed"),
    Case("quotient and remainder", 4, (0, EVERYWHERE, 1, EVERYWHERE, 2, 3, SPLIT), "rwsadagrad", "padded", methods=QR),
    Case("hashed, gathered", 3, (0, 1, 2, 0, SPLIT, EVERYWHERE, 1), "rwsadagrad", "one", methods=HASHED),
    Case("tensor trains", 2, (1, EVERYWHERE, SPLIT), "sgd", "padded", methods=TT),
)  # fmt: skip


def config_of(case: Case):
    from dlrm_xla import flags
    from dlrm_xla.config import Config

    most = 1 if case.bags == "one" else 3
    sizes = "-".join(map(str, case.sizes))
    return Config.from_args(
        flags.parse(
            [
                f"--arch-sparse-feature-size={WIDTH}", f"--arch-embedding-size={sizes}", f"--arch-mlp-bot=5-8-{WIDTH}", "--arch-mlp-top=9-1",
                f"--mini-batch-size={case.batch}", f"--num-batches={case.steps}", f"--num-indices-per-lookup={most}",
                f"--num-indices-per-lookup-fixed={case.bags != 'padded'}", f"--optimizer={case.optimizer}", f"--table-layout={case.layout}",
                f"--learning-rate={0.3 if case.optimizer == 'sgd' else 0.03}", "--data-size=1000",
            ]
        )
    )  # fmt: skip


def made(case: Case, backend, collectives=None):
    """A trainer as run_dlrm.py makes it, and the whole batches, the last one with FEW rows that count. On a backend of one rank it has all tables."""
    import run_dlrm
    from compression.choose import parse_asked
    from data_loaders.open import open_dataset
    from dlrm_xla.batch import Batch, pad_rows
    from dlrm_xla.sharding import Plan

    config, rng = config_of(case), np.random.RandomState(5)
    torch.manual_seed(5)
    data = open_dataset(config, rng, lambda line: None)
    config = config.with_num_dense(data.num_dense)
    choices = [parse_asked(name).choice() for name in case.methods]
    backend.collectives = collectives or backend.collectives
    trainer = run_dlrm.build(
        config, run_dlrm.table_specs(config, data), rng, backend, choices=choices,
        plan_of=lambda parts: Plan(case.world, case.batch, tuple(parts), case.where),
    )  # fmt: skip
    *batches, last = data.train.batches()
    rows = slice(FEW)
    few = Batch(last.dense[rows], last.ids[rows], None if last.weights is None else last.weights[rows], last.labels[rows], FEW)
    return trainer, [*batches, pad_rows(few, case.batch)]


def made_for_rank(case: Case, rank: int):
    """One rank's trainer on the CPU, without the others: to be looked at. And the whole batches."""
    from dlrm_xla import backends

    return made(case, backends.make("cpu"), SimpleNamespace(rank=rank, world=case.world))


def trace_replica(index: int, folder: str, cases: list[int]) -> None:
    """One replica's thread: writes CASE.RANK.pt for each case."""
    try:
        for number in cases:
            with ONE_TRACES:
                trace(CASES[number], number, Path(folder))
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others would wait
    ALL_DONE.wait()


def trace(case: Case, number: int, folder: Path) -> None:
    import torch_xla.runtime as xr

    from dlrm_xla import compile_for
    from dlrm_xla.backends.xla import XlaCollectives, XlaTracer
    from dlrm_xla.batch import rank_part

    rank = xr.global_ordinal()
    if rank >= case.world:
        return
    tracer = XlaTracer(None if case.world == MOST else XlaCollectives(rank, case.world))
    assert (tracer.collectives.rank, tracer.collectives.world) == (rank, case.world)
    trainer, batches = made(case, tracer)
    parts = [rank_part(batch, rank, case.world) for batch in batches]
    found = {"sent": [part.pack() for part in parts]}
    for name, step in compile_for.trace_steps(trainer, tracer, parts[0], parts[0], {"meter": lambda: trainer.meter.totals}).items():
        found[name] = {
            "hlo": step.hlo, "parameters": step.parameters, "outputs": step.outputs, "donated": step.donated, "arguments": step.arguments,
        }  # fmt: skip
    torch.save(found, folder / f"{number}.{rank}.pt")


def alone(case: Case) -> tuple[list[float], dict[str, torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    """The same steps on one rank, PyTorch on the CPU: losses, rows of the parts and state of the rows, dense parameters, first predictions."""
    from dlrm_xla import backends, compile_for

    trainer, batches = made(case, backends.make("cpu"))
    with torch.no_grad():
        predictions = trainer.forward(trainer.backend.to_device(batches[0])).clone()
    losses, before = [], (0.0, 0.0)
    for index, batch in enumerate(batches):
        trainer.step(trainer.backend.to_device(batch), index, last_of_epoch=False)
        now = trainer.meter.state()
        losses.append((now[0] - before[0]) / (now[1] - before[1]))
        before = now
    rows = {}
    for segment in (segment for segments in trainer.tables.segments for segment in segments):
        store = trainer.tables.stores[segment.store]
        for name, field in store.fields(store.on_host()).items():
            rows[f"{segment.name}:{name}"] = field[segment.start : segment.start + segment.num_rows].clone()
    dense = {name: value.detach() for name, value in compile_for.state_of(trainer).items() if name.startswith("dense")}
    return losses, rows, dense, predictions


def rows_of_ranks(case: Case, buffers: list[dict[str, torch.Tensor]]) -> tuple[dict[str, torch.Tensor], bool]:
    """The same rows, put together from each rank's buffers by their names in state_of; and whether all copies are equal, bit for bit."""
    whole: dict[str, torch.Tensor] = {}
    equal = True
    for rank, of_rank in enumerate(buffers):
        tables = made_for_rank(case, rank)[0].tables
        for segment in (segment for segments in tables.segments for segment in segments):
            store = tables.stores[segment.store]
            mine = {name: of_rank[key] for key in of_rank for name in store.buffer_names if key.endswith(f":store{segment.store}.{name}")}
            for name, field in store.fields(mine).items():
                rows, key = field[segment.start : segment.start + segment.num_rows], f"{segment.name}:{name}"
                total = whole.setdefault(key, torch.full((segment.total, *rows.shape[1:]), torch.nan))
                before = total[segment.first : segment.first + segment.num_rows]
                equal &= bool((before.isnan() | (before == rows)).all())
                total[segment.first : segment.first + segment.num_rows] = rows
    return whole, equal


if __name__ == "__main__":
    os.environ.update(PJRT_DEVICE="CPU", CPU_NUM_DEVICES=str(MOST))
    import torch_xla.distributed.xla_multiprocessing as xmp

    xmp.spawn(trace_replica, args=(sys.argv[1], [int(number) for number in sys.argv[2:]]))
