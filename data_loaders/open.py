"""The data set that a configuration asks for."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from data_loaders.random_data import RandomDataSpec, RandomSplit, WorkerRandomSplit
from dlrm_xla.batch import Dataset, Split
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError


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
    """rng is the run's stream: the permutation of the rows comes from it, before the weights do.

    Random data has streams of its own, so that neither a test pass nor a look at the data changes what is trained on; with
    --upstream-compat it shares the run's.
    """
    data = config.data
    if data.source == "kaggle":
        from data_loaders.criteo import open_criteo  # pyarrow

        return open_criteo(
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
        )
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

    def warn(message: str) -> None:
        print(message, file=sys.stderr)

    def said_already(message: str) -> None:
        """The test half reads the same trace files."""

    if not config.upstream_compat:
        test_spec = replace(spec, batch_size=data.test_batch_size)
        seed = config.train.seed
        train = RandomSplit(spec, np.random.RandomState(seed), warn)
        test = RandomSplit(test_spec, np.random.RandomState(seed), said_already)
    elif data.num_workers:
        train, test = (WorkerRandomSplit(spec, data.num_workers, say) for say in (warn, said_already))
    else:
        train, test = RandomSplit(spec, rng, warn), RandomSplit(spec, rng, said_already)
    return RandomDataset(spec.table_rows, spec.hotness, spec.num_dense, train, test)
