"""What a training step costs does not grow with the tables: no operator makes, and no compiled program copies, anything of a table's size."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compression.registry import create_tables
from data_loaders.open import open_dataset
from dlrm_xla import backends, flags
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import packed_lines
from dlrm_xla.models.dlrm import DLRM
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec
from dlrm_xla.train import Trainer

ROWS = 50_021  # far above anything that a step of 8 samples has a right to: its largest tensor has 1,250 elements
MODEL = (
    "--arch-sparse-feature-size=4", f"--arch-embedding-size={ROWS}-{ROWS + 2}-7", "--arch-mlp-bot=5-8-4", "--arch-mlp-top=9-1", "--mini-batch-size=8",
    "--num-batches=3", "--num-indices-per-lookup=3",
)  # fmt: skip


def make_trainer(device: str, optimizer: str, *more: str) -> tuple[Trainer, list]:
    """A trainer, and its batches."""
    config = Config.from_args(flags.parse([*MODEL, f"--device={device}", f"--optimizer={optimizer}", *more]))
    backend, rng = backends.make(device), np.random.RandomState(1)
    data = open_dataset(config, rng, lambda line: None)
    specs = [TableSpec(f"emb_l.{i}", rows, 4, hotness) for i, (rows, hotness) in enumerate(zip(data.table_rows, data.hotness, strict=True))]
    created = create_tables(specs, config.method, rng, False, False)
    tables = backend.place(EmbeddingCollection(created, None, RULES[config.train.optimizer](), backend.layout(config.table_layout)))
    model = backend.place(DLRM(config.model, len(specs), 0.0, rng))
    return Trainer(config, model, tables, backend), list(data.train.batches())


class LargeTensors(TorchDispatchMode):
    """Collects the operators that make a tensor of `limit` elements or more in memory of its own. Views and in-place results are not made."""

    def __init__(self, limit: int):
        super().__init__()
        self.limit, self.found = limit, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.numel() >= self.limit and leaf.untyped_storage().data_ptr() not in known:
                self.found.append(f"{func}: {tuple(leaf.shape)}")
        return result


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
@pytest.mark.parametrize("method", [(), ("--qr-flag", "--qr-threshold=10", "--qr-collisions=2")])
def test_no_operator_makes_a_tensor_as_long_as_a_table(optimizer, method):
    trainer, batches = make_trainer("cpu", optimizer, *method)
    assert max(store.num_rows for store in trainer.tables.stores) > ROWS // 2
    with LargeTensors(limit=ROWS // 4) as seen:
        for index, batch in enumerate(batches):
            trainer.step(trainer.backend.to_device(batch), index, last_of_epoch=False)
    assert seen.found == []


def test_a_dense_gradient_would_be_seen():
    """The check above, shown what it must find."""
    table = torch.zeros(ROWS, 4, requires_grad=True)
    with LargeTensors(limit=ROWS // 4) as seen:
        torch.nn.functional.embedding(torch.tensor([1, 2]), table).sum().backward()
        table.detach().mul_(2)
        table.detach() * 2
    assert len([name for name in seen.found if "embedding" in name]) >= 1
    assert len([name for name in seen.found if "mul.Tensor" in name]) == 1
    assert not any("mul_" in name for name in seen.found)


STEP_ON_XLA = """
import sys
sys.path[:0] = [{root!r}, {tests!r}]
from test_cost import make_trainer
trainer, batches = make_trainer("xla", sys.argv[1], "--table-layout=" + sys.argv[2])
for index in range(2):
    trainer.step(trainer.backend.to_device(batches[index]), index, last_of_epoch=False)
trainer.backend.wait()
"""
# in-place updates, and what merely names a value or wraps others: a fusion's and a call's instructions stand in the text too
FREE = {"parameter", "scatter", "fusion", "call", "get-tuple-element", "tuple", "bitcast"}


def large_instructions(program: str, limit: int) -> set[str]:
    """Names of the instructions of an HLO text that make `limit` elements or more: "copy", "convert", "broadcast", "scatter", ..."""
    found = re.findall(r"= \w+\[([0-9,]+)\]\S* ([a-z-]+)\(", program)
    return {name for dims, name in found if np.prod([int(dim) for dim in dims.split(",")], dtype=np.int64) >= limit}


def step_program(optimizer: str, layout: str, folder: Path) -> str:
    """The optimized HLO text of the training step, from a process of its own: XLA reads its flags once."""
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={folder} --xla_dump_hlo_as_text", "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    code = STEP_ON_XLA.format(root=str(tests.parent), tests=str(tests))
    subprocess.run([sys.executable, "-c", code, optimizer, layout], env=environment, check=True, capture_output=True, text=True)
    programs = [path.read_text() for path in folder.glob("*cpu_after_optimizations.txt")]
    return max(programs, key=len)  # the other one, where there is one, sets the optimizer's state to zero


@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad", "adagrad"])
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_the_compiled_step_copies_no_table(optimizer, layout, tmp_path):
    """Tables and their state are donated to the program and updated in place; nothing else has their size."""
    pytest.importorskip("torch_xla")
    program = step_program(optimizer, layout, tmp_path)
    header, entry = program.splitlines()[0], program[program.index("\nENTRY ") :]
    size, expected = 2 * ROWS + 9, {"sgd": 1, "rwsadagrad": 3, "adagrad": 2}[optimizer]  # weights with their sums, momentum, scratch
    if layout == "packed":  # all in one buffer
        fields = {"sgd": (4,), "rwsadagrad": (4, 0), "adagrad": (8,)}[optimizer]
        size, expected = sum(packed_lines(size, width) for width in fields), 1
    tables = re.findall(rf"= \w+\[{size}[,\]]\S* parameter\((\d+)\)", entry)
    assert len(tables) == expected
    donated = set(re.findall(r"\((\d+), \{\}, may-alias\)", header))
    assert set(tables) <= donated
    assert large_instructions(program, limit=ROWS // 4) - FREE == set()


def test_a_copy_would_be_seen():
    """The reading of HLO, shown what it must find."""
    text = "%p3.15 = f32[100051,4]{1,0} parameter(3)\n  %copy.23 = f32[100051,4]{1,0} copy(%p3.15)\n  ROOT %a = f32[8]{0} add(%b, %c)\n"
    assert large_instructions(text, limit=ROWS // 4) == {"parameter", "copy"}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("flags", [("--optimizer=sgd", "--save-model=m.pt", "--save-every=2"), ("--optimizer=adagrad",), ("--optimizer=rwsadagrad",)])
def test_a_run_needs_its_tables_once(cli_process, flags):
    """Peak memory of a run on the CPU, saving included where nothing lies in between the weights, within 1.15 times tables and state + 1 GB."""
    rows, width = 4_000_000, 64
    state = {"sgd": 0, "adagrad": rows * width * 4, "rwsadagrad": rows * 4}[flags[0].split("=")[1]]
    # kB, of this process alone: ru_maxrss begins at the peak of the process that started it, here a test worker
    peak = "import atexit, sys; atexit.register(lambda: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0], file=sys.stderr))"
    outcome = cli_process(
        f"--arch-sparse-feature-size={width}", f"--arch-embedding-size={rows}-7", f"--arch-mlp-bot=5-{width}", "--arch-mlp-top=4-1",
        "--mini-batch-size=8", "--num-batches=2", *flags, before=peak,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    tables = rows * width * 4
    assert tables < int(outcome.err.splitlines()[-1]) * 1024 <= 1.15 * (tables + state) + 1e9
