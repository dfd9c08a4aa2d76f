"""The data set that a configuration asks for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_loaders.random_data import RandomDataSpec, RandomSplit, WorkerRandomSplit
from dlrm_xla.batch import Dataset, Split
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

MULTI_HOT_IN_MEMORY = 4  # companions' tables of --multi-hot-sizes larger than --preprocess-memory over this lie in a file beside the data


@dataclass
class RandomDataset:
    """Random rows for training, and as many for test (the same ones: both halves start from the same seed, as upstream's do)."""

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    num_dense: int
    train: Split
    test: Split
    bayes_auc: float | None = None


def open_dataset(config: Config, rng: np.random.RandomState, print_line: Callable[[str], None]) -> Dataset:
    """rng is the run's stream: the permutation of the rows comes from it, before the weights do. print_line gets upstream's lines."""
    if config.data.source == "table":
        return open_table_files(config, rng)
    if config.data.from_files:
        return open_criteo_files(config, rng, print_line)
    return open_random(config, rng)


def note(line: str) -> None:
    """What a user should know and upstream does not print."""
    print(line, file=sys.stderr, flush=True)


def open_table_files(config: Config, rng: np.random.RandomState) -> Dataset:
    from data_loaders.table import open_table  # pyarrow

    data = config.data
    return open_table(
        schema_file=data.schema_file,
        raw_data_file=data.raw_data_file,
        processed_data_file=data.processed_data_file,
        data_randomize=data.randomize,
        max_ind_range=data.max_ind_range,
        batch_size=data.batch_size,
        test_batch_size=data.test_batch_size,
        drop_last=data.drop_last,
        num_batches=data.num_batches,
        memory_map=data.memory_map,
        memory_bytes=data.preprocess_bytes,
        min_frequency=data.min_frequency,
        vocabulary=data.vocabulary,
        rng=rng,
        seed=config.train.seed,
        progress=sys.stderr.isatty(),
        print_line=note,
    )


def open_criteo_files(config: Config, rng: np.random.RandomState, print_line: Callable[[str], None]) -> Dataset:
    from data_loaders.criteo import open_criteo  # pyarrow

    data = config.data
    opened = open_criteo(
        data_set=data.source,
        raw_data_file=data.raw_data_file,
        processed_data_file=data.processed_data_file,
        data_randomize=data.randomize,
        max_ind_range=data.max_ind_range,
        sub_sample_rate=data.sub_sample_rate,
        batch_size=data.batch_size,
        test_batch_size=data.test_batch_size,
        drop_last=data.drop_last,
        num_batches=data.num_batches,
        rng=rng,
        # upstream draws the sub-sampling from the run's stream, so its first run differs from its second
        preprocess_rng=rng if config.upstream_compat else np.random.RandomState(config.train.seed),
        progress=sys.stderr.isatty(),
        print_line=print_line,
        upstream_compat=config.upstream_compat,
        memory_map=data.memory_map,
        seed=config.train.seed,
        mlperf=config.output.mlperf,
        bin_loader=data.bin_loader,
        bin_shuffle=data.bin_shuffle,
        memory_bytes=data.preprocess_bytes,
        min_frequency=data.min_frequency,
        vocabulary=data.vocabulary,
        note=note,
    )
    if not data.multi_hot_sizes:
        return opened
    from data_loaders.multi_hot import MultiHotSplit, MultiHotTables

    tables = MultiHotTables.make(
        data.multi_hot_sizes,
        opened.table_rows,
        data.multi_hot_distribution,
        Path(data.processed_data_file or data.raw_data_file).absolute().parent,
        data.preprocess_bytes // MULTI_HOT_IN_MEMORY,
        sys.stderr.isatty(),
    )
    halves = {half: MultiHotSplit(getattr(opened, half), tables) for half in ("train", "test")}
    return replace(opened, hotness=tables.hotness, **halves)


def open_random(config: Config, rng: np.random.RandomState) -> Dataset:
    """Random data has streams of its own, so that neither a test pass nor a look at the data changes what is trained on; with
    --upstream-compat it shares the run's."""
    data = config.data
    data_size = data.data_size
    if data.drop_last and data.num_batches == 0:
        data_size -= data_size % data.batch_size
        if data_size == 0:
            raise UserError(f"--drop-last leaves no batch: --data-size={data.data_size} is less than --mini-batch-size={data.batch_size}")
    spec = RandomDataSpec(
        table_rows=data.table_rows,
        num_dense=config.model.bottom_layers[0],
        batch_size=data.batch_size,
        num_batches=data.num_batches,
        data_size=data_size,
        num_indices_per_lookup=data.num_indices_per_lookup,
        fixed=data.fixed_bags,
        distribution="trace" if data.source == "trace" else data.distribution,
        rand_min=data.rand_min,
        rand_max=data.rand_max,
        rand_mu=data.rand_mu,
        rand_sigma=data.rand_sigma,
        trace_file=data.trace_file,
        trace_padding=data.trace_padding,
        round_targets=data.round_targets,
        seed=config.train.seed,
        keep_duplicates=not config.upstream_compat,
        replace_every_j=config.upstream_compat,
    )

    def said_already(message: str) -> None:
        """The test half reads the same trace files."""

    if not config.upstream_compat:
        test_spec = replace(spec, batch_size=data.test_batch_size)
        seed = config.train.seed
        train = RandomSplit(spec, np.random.RandomState(seed), note)
        test = RandomSplit(test_spec, np.random.RandomState(seed), said_already)
    elif data.num_workers:
        train, test = (WorkerRandomSplit(spec, data.num_workers, say) for say in (note, said_already))
    else:
        train, test = RandomSplit(spec, rng, note), RandomSplit(spec, rng, said_already)
    return RandomDataset(spec.table_rows, spec.hotness, spec.num_dense, train, test)
