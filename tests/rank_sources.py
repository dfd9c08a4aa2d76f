"""Every source of data at a tiny size, for tests of what several ranks read."""

from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from conftest import CRITEO_MODEL

from data_loaders.open import open_dataset
from dlrm_xla import flags
from dlrm_xla.batch import Batch
from dlrm_xla.config import Config
from tests.oracles import criteo as oracle
from tests.oracles import terabyte
from tests.test_table import SCHEMA, made_up, write

WORLDS = (1, 2, 3, 4)
FULL_BAGS = SCHEMA.replace('separator: "|"}', 'separator: "|", max_hot: 1}')
COLUMNS = 'label: {column: rating, positive: ">= 4"}\ncategorical: [{column: user, type: integer}, {column: site, type: hex}]\n'
SINGLE = COLUMNS + SCHEMA[SCHEMA.index("split") :]
BINS = ("--data-set=terabyte", "--processed-data-file=terabyte.npz", "--mlperf-logging", "--mlperf-bin-loader", "--memory-map")
RANDOM = ("--arch-sparse-feature-size=8", "--arch-embedding-size=50-20-100", "--arch-mlp-bot=3-8", "--arch-mlp-top=8-1", "--data-size=75")
DRAWN = {
    "bags": ("--num-indices-per-lookup=5",),
    "full bags": ("--num-indices-per-lookup=4", "--num-indices-per-lookup-fixed=True"),
    "batches": ("--num-batches=3", "--num-indices-per-lookup=1"),
    "drop the last": ("--drop-last",),
    "gaussian": ("--rand-data-dist=gaussian", "--rand-data-max=19", "--rand-data-sigma=5"),
    "traces": ("--data-generation=synthetic", "--data-trace-file=trace_j.log"),
    "a shared stream": ("--upstream-compat",),
    "workers": ("--upstream-compat", "--num-workers=2"),
}
CRITEO = {
    "kaggle": (),
    "kaggle by days": ("--data-randomize=day",),
    "kaggle as it lies": ("--data-randomize=none", "--drop-last", "--data-sub-sample-rate=0.3"),
    "kaggle mapped": ("--memory-map", "--num-batches=4"),
    "kaggle arrays": ("--processed-data-file=arrays", "--max-ind-range=20"),
    "kaggle folded": ("--processed-data-file=upstream.npz", "--max-ind-range=20", "--upstream-compat"),
    "kaggle in one batch": ("--test-mini-batch-size=5000",),
    "multi-hot": (f"--multi-hot-sizes={','.join(['3', '1'] * 13)}",),
    "multi-hot in a file": (f"--multi-hot-sizes={','.join(['3', '1'] * 13)}", "--multi-hot-distribution=pareto"),
    "terabyte": ("--data-set=terabyte",),
    "terabyte with a pile": ("--data-set=terabyte", "--memory-map", "--mlperf-logging", "--upstream-compat"),
    "bins": (*BINS, "--mlperf-bin-shuffle"),
    "bins of upstream's": (*BINS, "--mlperf-bin-shuffle", "--upstream-compat", "--drop-last"),
    "multi-hot bins": (*BINS, "--multi-hot-sizes=mlperf"),
}
TABLES = {
    "table": (SCHEMA, ()),
    "table mapped": (SCHEMA, ("--memory-map", "--drop-last")),
    "table of full bags": (FULL_BAGS, ("--data-randomize=none", "--num-batches=3")),
    "table of single ids": (SINGLE, ("--test-mini-batch-size=1000",)),
}


def companions(monkeypatch, name: str) -> None:
    """Tables of bags lie in a file where the case's name says so, however small they are."""
    if name == "multi-hot in a file":
        monkeypatch.setattr("data_loaders.open.MULTI_HOT_IN_MEMORY", 1 << 60)


def config_of(folder: Path, name: str, batch_size: int) -> Config:
    """The configuration of a source, whose files are made in the folder."""
    sizes = (f"--mini-batch-size={batch_size}",)
    if name in DRAWN:
        (folder / "trace_0.log").write_text("7, 90, 3, 15\n0, 1, 2, 4\n0.4, 0.6, 0.75, 1.0\n")
        for number in (1, 2):
            (folder / f"trace_{number}.log").write_text((folder / "trace_0.log").read_text())
        return Config.from_args(flags.parse([*RANDOM, *DRAWN[name], *sizes]))
    if name in TABLES:
        schema, more = TABLES[name]
        (folder / "schema.yaml").write_text(schema)
        rows = made_up(173)
        if name == "table of full bags":
            rows = [row | {"genres": row["genres"] or "none"} for row in rows]
        write(folder / "a.csv", rows)
        model = [flag for flag in CRITEO_MODEL if not flag.startswith("--mini-batch-size")]
        data = ("--data-set=table", "--schema=schema.yaml", "--raw-data-file=a.csv")
        return Config.from_args(flags.parse([*model, *data, *more, *sizes]))
    more = CRITEO[name]
    if "--data-set=terabyte" in more:
        raw = folder / "day"
        terabyte.write_days(raw, terabyte.make_days([10 + 3 * (day % 4) for day in range(24)]))
    else:
        raw = folder / "train.txt"
        raw.write_bytes(oracle.make_text(300))
        if "--processed-data-file=upstream.npz" in more and not (folder / "upstream.npz").exists():
            write_like_upstream(folder / "upstream.npz", compressed=False)
    return Config.from_args(flags.parse([*CRITEO_MODEL, f"--raw-data-file={raw.name}", *more, *sizes]))


def write_like_upstream(path: Path, compressed: bool) -> None:
    """What upstream writes of 300 rows of Criteo's text, or the same so that it can be mapped."""
    arrays = oracle.process(oracle.make_text(300), -1)
    arrays = {name: np.array(arrays[name], dtype=np.int32) for name in ("X_cat", "X_int", "y", "counts")}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def opened(config: Config, *ranks, **more):
    """The data set, and the stream that it was opened with."""
    torch.manual_seed(5)
    rng = np.random.RandomState(123)
    return open_dataset(config, rng, lambda line: None, *ranks, **more), rng


def batches_of(data, rng) -> tuple[list[Batch], int]:
    """Two epochs of training with a test after each, and the stream's next number, which shows how much was drawn."""
    batches = []
    for epoch in range(2):
        batches += [*data.train.batches(epoch=epoch), *data.test.batches()]
    return batches, rng.randint(2**31)


def assert_same(got: Batch, wanted: Batch) -> None:
    for field in fields(Batch):
        one, other = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other), field.name
        else:
            assert type(one) is type(other) and one == other, field.name


def facts(data) -> list:
    halves = [(half.num_rows, half.num_batches, half.batch_size) for half in (data.train, data.test)]
    return [data.table_rows, data.hotness, data.num_dense, data.bayes_auc, *halves]
