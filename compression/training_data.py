"""The training data of a checkpoint, opened to count how often each id is looked up."""

import re

import numpy as np

from compression.traffic import count_ids
from data_loaders.open import note, open_dataset
from dlrm_xla import flags
from dlrm_xla.checkpoint_file import Checkpoint
from dlrm_xla.config import Config
from dlrm_xla.specs import TableSpec, UserError

# flags of run_dlrm.py that decide which ids are looked up how often
DATA_FLAGS = (
    "data-generation", "data-set", "raw-data-file", "processed-data-file", "data-randomize", "max-ind-range", "data-sub-sample-rate", "memory-map",
    "mini-batch-size", "num-batches", "drop-last", "schema", "preprocess-memory", "min-frequency", "vocabulary", "multi-hot-sizes",
    "multi-hot-distribution", "mlperf-bin-loader", "numpy-rand-seed", "upstream-compat",
)  # fmt: skip


def check_data_flags(given: list[str]) -> None:
    """UserError for an argument that is none of these flags or its value."""
    for position, text in enumerate(given):
        if text.startswith("--"):
            name = re.split("=", text[2:], maxsplit=1)[0]
            if name not in DATA_FLAGS:
                raise UserError(f"unrecognized argument --{name} (python -m compression convert --help lists them)")
        elif position == 0 or "=" in given[position - 1] or not given[position - 1].startswith("--"):
            raise UserError(f"unrecognized argument {text} (python -m compression convert --help lists them)")


def training_counts(loaded: Checkpoint, given: list[str], specs: list[TableSpec | None], why: str) -> list[np.ndarray]:
    """For each table [N] float64: lookups of each id in an epoch of the data that `given` flags name, or else the checkpoint's own.

    why: what the counts are wanted for, for the message where no data set is named
    """
    stored = [f"--{name}={loaded.flags[name]}" for name in DATA_FLAGS if loaded.flags.get(name) not in (None, "")]
    from_files = any(text.startswith(("--raw-data-file", "--processed-data-file")) for text in given)
    dim = next(spec.embedding_dim for spec in specs if spec is not None)
    # the architecture is not that of the checkpoint: it only has to agree with itself
    shape = [f"--arch-sparse-feature-size={dim}", f"--arch-mlp-bot=13-{dim}", "--arch-mlp-top=1-1", "--device=cpu"]
    parsed = flags.parse([*stored, *(["--data-generation=dataset"] if from_files else []), *given, *shape])
    if parsed.data_generation != "dataset":
        raise UserError(
            f"{why}: goes by how often training looks ids up, and the checkpoint names no data set; give --raw-data-file or --processed-data-file "
            "with the flags that it was trained with"
        )
    config = Config.from_args(parsed)
    data = open_dataset(config, np.random.RandomState(config.train.seed), note)
    rows = [int(count) for count in data.table_rows]
    if len(rows) != len(specs):
        raise UserError(f"the data set has {len(rows)} tables and the checkpoint has {len(specs)}; it must be the one that was trained on")
    for index, (spec, count) in enumerate(zip(specs, rows, strict=True)):
        if spec is not None and spec.num_embeddings != count:
            raise UserError(
                f"table {index} has {count} ids in the data set and {spec.num_embeddings} in the checkpoint; the data and --max-ind-range must be "
                "those it was trained with"
            )
    return count_ids(data.train, [TableSpec(f"emb_l.{i}", count, dim, hot) for i, (count, hot) in enumerate(zip(rows, data.hotness, strict=True))])
