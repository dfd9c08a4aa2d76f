"""The data set that a configuration asks for: all of it, or what one of several ranks reads of each batch.

Several ranks map the rows of files instead of loading them, so that a host holds them once, in what the system keeps of the files. The first
rank of each host makes what has to be made (`wait`); then all of them open it alike, so that their streams have drawn the same numbers.
"""

import contextlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_loaders.part import WHOLE, Part
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


def open_dataset(
    config: Config,
    rng: np.random.RandomState,
    print_line: Callable[[str], None],
    rank: int = 0,
    world: int = 1,
    local_rank: int | None = None,
    wait: Callable[[], None] | None = None,
) -> Dataset:
    """
    rng         the run's stream: the permutation of the rows comes from it, before the weights do; the same on all ranks, before and after
    print_line  gets upstream's lines
    rank, world where world is above 1, both halves give this rank's part of each batch (dlrm_xla.batch.rank_part), and read no more than that;
                their num_rows, num_batches and batch_size are those of all ranks together, and .whole() gives whole batches
    local_rank  number among the ranks of this host, which may have files of its own; None: rank
    wait        returns when all ranks have called it, however long preprocessing takes; called once, and only where the data lies in files.
                Before it local rank 0 makes what is not there. None: nobody else opens the same data now
    With --upstream-compat several ranks draw what upstream's later runs draw; its first one, which makes the files, draws more.
    """
    part = Part(rank, world)
    if world > 1 and wait is not None and config.data.from_files:
        if (rank if local_rank is None else local_rank) == 0:
            make_files(config, rng, part)
        wait()
    say = note if rank == 0 else unsaid
    if config.data.source == "table":
        return open_table_files(config, rng, say, part)
    if config.data.from_files:
        return open_criteo_files(config, rng, print_line, say, part)
    return open_random(config, rng, say, part)


def note(line: str) -> None:
    """What a user should know and upstream does not print."""
    print(line, file=sys.stderr, flush=True)


def unsaid(line: str) -> None:
    """What another rank says, or the other half."""


def make_files(config: Config, rng: np.random.RandomState, part: Part) -> None:
    """Opens the data set and drops it, for what that leaves on the disk: processed rows, orders, binary files, bags, stamps of checked files.

    Draws from a copy of the stream. Where another host's rank is at it, in a folder that both see, it is left to that one. Rows that cannot be
    mapped are there already.
    """
    from data_loaders.criteo_map import CannotBeMapped
    from data_loaders.spill import Busy

    own = np.random.RandomState()
    own.set_state(rng.get_state())
    with contextlib.suppress(Busy, CannotBeMapped):
        if config.data.source == "table":
            open_table_files(config, own, unsaid, part)
        else:
            _open_criteo(config, own, unsaid, unsaid, part, map_rows=True)


def open_table_files(config: Config, rng: np.random.RandomState, say: Callable[[str], None], part: Part = WHOLE) -> Dataset:
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
        progress=_progress(part),
        print_line=say,
        map_rows=part.world > 1,
        part=part,
    )


def _progress(part: Part) -> bool:
    """Whether this rank shows bars."""
    return part.rank == 0 and sys.stderr.isatty()


def open_criteo_files(
    config: Config, rng: np.random.RandomState, print_line: Callable[[str], None], say: Callable[[str], None], part: Part
) -> Dataset:
    """Several ranks map the rows; where the file cannot be mapped, and that was not asked for, each loads all of them."""
    from data_loaders.criteo_map import CannotBeMapped

    data, several = config.data, part.world > 1
    try:
        return _open_criteo(config, rng, print_line, say, part, map_rows=several)
    except CannotBeMapped as error:
        if not several or data.memory_map or data.bin_loader:
            raise
        say(
            f"{str(error).partition(';')[0]}; so each of the {part.world} ranks loads all of its rows, 160 bytes each; "
            "python -m data_loaders.convert --to npz makes a file that they share"
        )
    return _open_criteo(config, rng, print_line, say, part, map_rows=False)


def _open_criteo(
    config: Config, rng: np.random.RandomState, print_line: Callable[[str], None], say: Callable[[str], None], part: Part, *, map_rows: bool
) -> Dataset:
    """Raises CannotBeMapped before anything is drawn from rng."""
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
        progress=_progress(part),
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
        note=say,
        map_rows=map_rows,
        part=part,
    )
    if not data.multi_hot_sizes:
        return opened
    from data_loaders.multi_hot import MultiHotSplit, MultiHotTables

    tables = MultiHotTables.make(
        data.multi_hot_sizes,
        opened.table_rows,
        data.multi_hot_distribution,
        Path(data.processed_data_file or data.raw_data_file).absolute().parent,
        data.preprocess_bytes // (MULTI_HOT_IN_MEMORY * part.world),
        _progress(part),
    )
    halves = {half: MultiHotSplit(getattr(opened, half), tables) for half in ("train", "test")}
    return replace(opened, hotness=tables.hotness, **halves)


def open_random(config: Config, rng: np.random.RandomState, say: Callable[[str], None] = note, part: Part = WHOLE) -> Dataset:
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

    if not config.upstream_compat:
        test_spec = replace(spec, batch_size=data.test_batch_size)
        seed = config.train.seed
        train = RandomSplit(spec, np.random.RandomState(seed), say, part)
        test = RandomSplit(test_spec, np.random.RandomState(seed), unsaid, part)  # of the same trace files
    elif data.num_workers:
        train, test = (WorkerRandomSplit(spec, data.num_workers, warn, part) for warn in (say, unsaid))
    else:
        train, test = RandomSplit(spec, rng, say, part), RandomSplit(spec, rng, unsaid, part)
    return RandomDataset(spec.table_rows, spec.hotness, spec.num_dense, train, test)
