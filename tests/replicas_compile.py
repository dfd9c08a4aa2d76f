"""Compiles the training step of models of real size for four TPU chips; what test_replicas.py judges.

    python replicas_compile.py RESULT.pickle MODEL ...

Tables are placeholders and the layers are thin, so that a program is compiled in seconds: what travels and what lies in memory is the tables'.
"""

import pickle
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

import numpy as np  # noqa: E402
import torch  # noqa: E402

import run_dlrm  # noqa: E402
from data_loaders.synth_profiles import KAGGLE_CARDINALITIES, TERABYTE_CARDINALITIES  # noqa: E402
from dlrm_xla import compile_for, flags, tpu_compiler  # noqa: E402
from dlrm_xla.backends import make_tracer  # noqa: E402
from dlrm_xla.batch import Batch, rank_part  # noqa: E402
from dlrm_xla.config import Config  # noqa: E402
from dlrm_xla.rules import MLPERF_MULTI_HOT  # noqa: E402
from dlrm_xla.specs import TableSpec  # noqa: E402

WORLD = 4
FOUR_CHIPS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2")
MLPERF_ROWS = tuple(min(rows, 40_000_000) for rows in TERABYTE_CARDINALITIES)


@dataclass(frozen=True)
class Model:
    topologies: tuple[str, ...]
    sizes: tuple[int, ...]
    bags: tuple[int, ...]
    width: int
    batch: int
    optimizer: str
    bottom: str
    top: str = "64-1"
    sharding: str = "auto"


MODELS = {
    "kaggle, sgd": Model(FOUR_CHIPS, KAGGLE_CARDINALITIES, (1,) * 26, 16, 2048, "sgd", "13-64-16"),
    "kaggle, rwsadagrad": Model(("v5e:2x2",), KAGGLE_CARDINALITIES, (1,) * 26, 16, 2048, "rwsadagrad", "13-64-16"),
    "copies, gathered": Model(("v5e:2x2",), (200_000, 100_000, 50), (2, 2, 2), 16, 256, "sgd", "13-64-16", sharding="data"),
    "dlrm v2, rwsadagrad": Model(("v5p:2x2x1",), MLPERF_ROWS, MLPERF_MULTI_HOT, 128, 4096, "rwsadagrad", "13-64-128"),
}


def trace(model: Model):
    """The first chip's program, and what judges it."""
    config = Config.from_args(
        flags.parse(
            [
                f"--arch-sparse-feature-size={model.width}", f"--arch-embedding-size={'-'.join(map(str, model.sizes))}",
                f"--arch-mlp-bot={model.bottom}", f"--arch-mlp-top={model.top}", f"--mini-batch-size={model.batch}",
                f"--optimizer={model.optimizer}", f"--sharding={model.sharding}", f"--compile-for={model.topologies[0]}",
            ]
        )
    )  # fmt: skip
    tracer = make_tracer(WORLD)
    specs = [TableSpec(f"emb_l.{n}", rows, model.width, bag) for n, (rows, bag) in enumerate(zip(model.sizes, model.bags, strict=True))]
    trainer = run_dlrm.build(config, specs, np.random.RandomState(1), tracer, device="meta", to_load=True)
    ids = torch.zeros(model.batch, sum(model.bags), dtype=torch.int32)
    batch = Batch(torch.rand(model.batch, 13), ids, None, torch.ones(model.batch, 1), model.batch)
    state = compile_for.state_of(trainer)
    sizes = {name: tensor.nelement() * tensor.element_size() for name, tensor in state.items()}
    stores = list(trainer.tables.stores)
    step = compile_for.trace_steps(trainer, tracer, rank_part(batch, 0, WORLD), None)["training step"]
    planned = compile_for.planned_collectives(trainer, model.batch, None)["training step"]
    return step, stores, sizes, planned


if __name__ == "__main__":
    names = sys.argv[2:]
    traced = {name: trace(MODELS[name]) for name in names}
    reports = {}
    for topology in FOUR_CHIPS:
        programs = {name: (traced[name][0].hlo, traced[name][0].donated) for name in names if topology in MODELS[name].topologies}
        if not programs:
            continue
        compiled = tpu_compiler.compile_programs(topology, programs, print, replicas=WORLD)
        for name in programs:
            step, stores, sizes, planned = traced[name]
            usable = compile_for.USABLE_GIB[topology.split(":")[0]]
            reports[name, topology] = compile_for.judge(step, compiled[name], stores, sizes, usable, planned)
            print(name, topology, reports[name, topology], flush=True)
    Path(sys.argv[1]).write_bytes(pickle.dumps(reports))
