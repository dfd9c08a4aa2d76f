"""Random batches with upstream's stream of draws, number for number, but without its Python loop over samples.

Upstream draws from NumPy's global generator; here the generator is an object that the caller passes, so that two splits can share one
(as upstream's do) or not. A fixed bag has exactly as many ids as asked for (`keep_duplicates`), where upstream drops repeated ids;
the draws are the same. Values are equal to upstream's on one condition of NumPy's: its legacy streams never change.
"""

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import isfinite

import numpy as np
import torch

from data_loaders.part import WHOLE, Part
from data_loaders.trace import TraceDistribution, read_trace, trace_path, walk_stack
from dlrm_xla.batch import Batch, pad_rows, slot_starts
from dlrm_xla.specs import UserError

MAX_ROWS = 2**31 - 1  # ids travel as int32, whose largest value marks an empty place here


@dataclass(frozen=True)
class RandomDataSpec:
    """What to draw. The flag behind each field stands beside it.

    table_rows              [T] rows of each table                                        --arch-embedding-size
    num_dense               columns of dense features                                     --arch-mlp-bot, first number
    batch_size              rows in a batch; the last one of data_size may have fewer      --mini-batch-size
    num_batches             > 0: batches in an epoch, all full; 0: data_size decides       --num-batches
    data_size               rows in an epoch                                              --data-size
    num_indices_per_lookup  L, ids in a bag: exactly (fixed) or at most, 1..min(rows, L)   --num-indices-per-lookup
    fixed                   see above                                                     --num-indices-per-lookup-fixed
    distribution            "uniform", "gaussian" (--rand-data-dist) or "trace" (--data-generation=synthetic)
    rand_min, rand_max      gaussian: ids are clipped to this range                       --rand-data-min, --rand-data-max
    rand_mu, rand_sigma     gaussian; mu -1 stands for the middle of the range            --rand-data-mu, --rand-data-sigma
    trace_file              file per table, the letter j standing for its number          --data-trace-file
    trace_padding           no new ids once all distances can be drawn                    --data-trace-enable-padding
    round_targets           labels 0 or 1 instead of anything between                     --round-targets
    seed                    every epoch starts from it                                    --numpy-rand-seed
    keep_duplicates         a fixed bag keeps its L ids as drawn; False: upstream, sorted and without repeats
    replace_every_j         j is replaced in the whole trace path, as upstream does, not only in the file's name
    """

    table_rows: tuple[int, ...]
    num_dense: int
    batch_size: int
    num_batches: int = 0
    data_size: int = 1
    num_indices_per_lookup: int = 10
    fixed: bool = False
    distribution: str = "uniform"
    rand_min: float = 0.0
    rand_max: float = 1.0
    rand_mu: float = -1.0
    rand_sigma: float = 1.0
    trace_file: str = "./input/dist_emb_j.log"
    trace_padding: bool = False
    round_targets: bool = False
    seed: int = 123
    keep_duplicates: bool = True
    replace_every_j: bool = False

    def __post_init__(self):
        def require(holds: bool, flag: str, value: object, rule: str) -> None:
            if not holds:
                raise UserError(f"{flag} is {value}; {rule}")

        for rows in self.table_rows:
            require(1 <= rows <= MAX_ROWS, "--arch-embedding-size", rows, f"a table has 1 to {MAX_ROWS} rows")
        require(self.batch_size >= 1, "--mini-batch-size", self.batch_size, "it must be at least 1")
        require(self.num_batches >= 0, "--num-batches", self.num_batches, "it must be 0 (--data-size decides) or more")
        require(self.num_batches > 0 or self.data_size >= 1, "--data-size", self.data_size, "it must be at least 1")
        lookups = self.num_indices_per_lookup
        require(lookups >= 1, "--num-indices-per-lookup", lookups, "it must be at least 1")
        require(self.distribution in DISTRIBUTIONS, "--rand-data-dist", self.distribution, "it must be uniform or gaussian")
        require(0 <= self.seed < 2**32, "--numpy-rand-seed", self.seed, "it must lie in 0..2**32-1")
        if self.distribution == "gaussian":
            numbers = (("min", self.rand_min), ("max", self.rand_max), ("mu", self.rand_mu), ("sigma", self.rand_sigma))
            for name, value in numbers:
                require(isfinite(value), f"--rand-data-{name}", value, "it must be a finite number")
            require(self.rand_min <= self.rand_max, "--rand-data-min", self.rand_min, f"it must not be above --rand-data-max={self.rand_max}")
            require(self.rand_sigma >= 0, "--rand-data-sigma", self.rand_sigma, "it must not be negative")

    @property
    def hotness(self) -> tuple[int, ...]:
        """[T] slots of each table."""
        return tuple(self.num_indices_per_lookup if self.fixed else min(rows, self.num_indices_per_lookup) for rows in self.table_rows)

    @property
    def bags_are_full(self) -> bool:
        """Whether every bag of every batch fills its slots, so that a batch needs no weights."""
        return (self.fixed and self.keep_duplicates) or max(self.hotness, default=1) == 1

    @property
    def mu(self) -> float:
        """Mean of the gaussian."""
        return (self.rand_max + self.rand_min) / 2.0 if self.rand_mu == -1 else self.rand_mu


class RandomSplit:
    """A Split (dlrm_xla.batch) of random rows. Each epoch reseeds `rng` with the spec's seed and so repeats the same data.

    A batch is drawn when it is asked for and no earlier: upstream's train and test splits share one generator, and a test pass moves it.
    warn    called once per table whose trace file names ids outside the table
    part    which rows of each batch are given. All are drawn on every rank, so that the stream moves as it does on one
    """

    def __init__(
        self, spec: RandomDataSpec, rng: np.random.RandomState, warn: Callable[[str], object] = warnings.warn, part: Part = WHOLE
    ):
        self.spec, self.rng, self._part = spec, rng, part
        self.batch_size = spec.batch_size
        self.num_batches = spec.num_batches or -(-spec.data_size // spec.batch_size)
        self.num_rows = spec.num_batches * spec.batch_size or spec.data_size
        self._traces = open_traces(spec, warn) if spec.distribution == "trace" else ()

    def whole(self) -> "RandomSplit":
        """The same split, its stream too, with all rows of each batch, whatever this rank's part is."""
        other = copy.copy(self)
        other._part = WHOLE
        return other

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """One epoch, all are the same, from batch `start`; the batches before it are drawn and dropped, for the stream has no shortcut."""
        for index in range(self.num_batches):
            if index == 0:
                self.rng.seed(self.spec.seed)
            batch = self.draw(index, self.rng)
            if index >= start:
                yield self._part.of(batch)

    def draw(self, index: int, rng: np.random.RandomState) -> Batch:
        """Batch number `index`, whole, from the state that `rng` is in."""
        num_rows = min(self.batch_size, self.num_rows - index * self.batch_size)
        return pad_rows(draw_batch(self.spec, rng, num_rows, self._traces), self.batch_size)


class WorkerRandomSplit(RandomSplit):
    """What upstream's random loader gives with --num-workers=W > 0.

    Batch i comes from worker i mod W. Each worker has a generator of its own, seeded anew by every iterator from torch's global generator;
    only the worker of batch 0 then reseeds with the spec's seed, so the others' batches differ from epoch to epoch.
    """

    def __init__(self, spec: RandomDataSpec, num_workers: int, warn: Callable[[str], object] = warnings.warn, part: Part = WHOLE):
        if num_workers < 1:
            raise UserError(f"--num-workers is {num_workers}; batches drawn by workers need at least 1")
        super().__init__(spec, np.random.RandomState(spec.seed), warn, part)
        self.num_workers = num_workers

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """One epoch from batch `start`. Takes one number from torch's global generator at the call, as making a DataLoader's iterator does."""
        base_seed = int(torch.empty((), dtype=torch.int64).random_().item())
        return self._epoch([np.random.RandomState(worker_seed(base_seed, worker)) for worker in range(self.num_workers)], start)

    def _epoch(self, workers: list[np.random.RandomState], start: int) -> Iterator[Batch]:
        for index in range(self.num_batches):
            rng = workers[index % self.num_workers]
            if index == 0:
                rng.seed(self.spec.seed)
            batch = self.draw(index, rng)
            if index >= start:
                yield self._part.of(batch)


def worker_seed(base_seed: int, worker: int) -> np.ndarray:
    """[4] uint32: the NumPy seed that a torch DataLoader gives to worker number `worker`, which is NumPy's own SeedSequence."""
    return np.random.SeedSequence([worker, base_seed & 0xFFFFFFFF, base_seed >> 32, 0]).generate_state(4)


def open_traces(spec: RandomDataSpec, warn: Callable[[str], object]) -> tuple[TraceDistribution, ...]:
    """[T] the trace distribution of each table."""
    traces = []
    for table, rows in enumerate(spec.table_rows):
        path = trace_path(spec.trace_file, table, spec.replace_every_j)
        traces.append(read_trace(path))
        largest = int(traces[-1].lines.max())
        if largest >= rows:
            warn(f"table {table}: {path} names ids up to {largest}, but the table has {rows} rows; ids are taken modulo {rows}")
    return tuple(traces)


def draw_batch(spec: RandomDataSpec, rng: np.random.RandomState, num_rows: int, traces: tuple[TraceDistribution, ...]) -> Batch:
    """`num_rows` rows, unpadded. Leaves `rng` where drawing one number at a time in upstream's order would.

    Order: dense features row by row; then table by table, bag by bag, the bag's size (unless fixed) and its ids; then the labels.
    """
    if spec.fixed:
        dense, bags, labels = _draw_fixed(spec, rng, num_rows)
    elif spec.distribution == "gaussian":
        dense, bags, labels = _draw_varying_gaussian(spec, rng, num_rows)
    else:
        dense, bags, labels = _draw_varying(spec, rng, num_rows)

    starts = slot_starts(spec.hotness)
    ids = np.zeros((num_rows, starts[-1]), dtype=np.int32)
    weights = None if spec.bags_are_full else np.zeros((num_rows, starts[-1]), dtype=np.float32)
    for table, (draws, length) in enumerate(bags):
        slots = slice(starts[table], starts[table + 1])
        values = _to_values(spec, table, draws, traces)
        if weights is not None:
            empty = _drop_repeats(values, length)
            weights[:, slots] = 1 if empty is None else ~empty
            if empty is not None:
                values[empty] = 0
        if spec.distribution == "gaussian":
            values = _checked_gaussian_ids(spec, table, values)
        elif spec.distribution == "trace":
            values %= spec.table_rows[table]
        ids[:, slots] = values
    labels = labels.astype(np.float32).reshape(num_rows, 1)
    return Batch(
        dense=torch.from_numpy(dense.astype(np.float32).reshape(num_rows, spec.num_dense)),
        ids=torch.from_numpy(ids),
        weights=None if weights is None else torch.from_numpy(weights),
        labels=torch.from_numpy(np.rint(labels) if spec.round_targets else labels),
        num_valid=num_rows,
    )


# What a _draw function returns: dense [n * num_dense]; for each table the draws of its ids [n, H], arbitrary after a bag's end,
# with the sizes of its bags [n] (one number where they are all the same); labels [n].
Draws = tuple[np.ndarray, Iterable[tuple[np.ndarray, np.ndarray | int]], np.ndarray]


def _draw_fixed(spec: RandomDataSpec, rng: np.random.RandomState, num_rows: int) -> Draws:
    """Every count is known: one block."""
    num_tables, lookups = len(spec.table_rows), spec.num_indices_per_lookup
    num_dense, num_ids = num_rows * spec.num_dense, num_tables * num_rows * lookups
    if spec.distribution == "gaussian":
        dense, ids, labels = rng.random_sample(num_dense), rng.normal(spec.mu, spec.rand_sigma, num_ids), rng.random_sample(num_rows)
    else:
        dense, ids, labels = np.split(rng.random_sample(num_dense + num_ids + num_rows), [num_dense, num_dense + num_ids])
    return dense, ((draws, lookups) for draws in ids.reshape(num_tables, num_rows, lookups)), labels


def _draw_varying(spec: RandomDataSpec, rng: np.random.RandomState, num_rows: int) -> Draws:
    """Bag sizes come from the stream of the ids, so where a bag starts depends on the sizes before it: a walk from bag to bag.

    The stream is drawn in blocks that are surely needed (a bag takes at least two numbers), so that nothing has to be put back.
    """
    blocks, block, block_start, drawn = [], memoryview(b""), 0, 0
    position = num_rows * spec.num_dense  # of the next bag in the batch's stream
    owed = num_rows * (2 * len(spec.table_rows) + 1)  # fewest numbers that the rest of the batch takes from there on
    starts = []
    for most in map(int, spec.hotness):
        if most == 1:  # a size, which is 1 whatever its draw, and an id
            starts.append(position + 2 * np.arange(num_rows))
            position += 2 * num_rows
            owed -= 2 * num_rows
            continue
        table_starts = []
        for _ in range(num_rows):
            if position >= drawn:
                blocks.append(rng.random_sample(position + owed - drawn))
                block, block_start, drawn = memoryview(blocks[-1]), drawn, position + owed
            table_starts.append(position)
            # Python's round and NumPy's agree: half to even.
            position += 1 + (round(block[position - block_start] * most) or 1)
            owed -= 2
        starts.append(np.array(table_starts))
    blocks.append(rng.random_sample(position + owed - drawn))
    stream = np.concatenate(blocks)

    def bags():
        for start, most in zip(starts, spec.hotness, strict=True):
            length = np.maximum(np.rint(stream[start] * most), 1).astype(np.int64)
            yield np.take(stream, start[:, None] + np.arange(1, most + 1), mode="clip"), length

    return stream[: num_rows * spec.num_dense], bags(), stream[-num_rows:]


def _draw_varying_gaussian(spec: RandomDataSpec, rng: np.random.RandomState, num_rows: int) -> Draws:
    """A bag's size is a uniform draw between normal ones, and a normal draw takes a varying share of the stream: one bag at a time."""
    uniform, normal, mu, sigma = rng.random_sample, rng.normal, spec.mu, spec.rand_sigma
    dense = uniform(num_rows * spec.num_dense)
    tables = []
    for most in map(int, spec.hotness):
        drawn = [normal(mu, sigma, round(uniform() * most) or 1) for _ in range(num_rows)]
        length = np.fromiter(map(len, drawn), dtype=np.int64, count=num_rows)
        draws = np.zeros((num_rows, most))
        draws[np.arange(most) < length[:, None]] = np.concatenate(drawn)
        tables.append((draws, length))
    return dense, tables, uniform(num_rows)


def _to_values(spec: RandomDataSpec, table: int, draws: np.ndarray, traces: tuple[TraceDistribution, ...]) -> np.ndarray:
    """[n, H] draws (overwritten) to what upstream drops repeats from: int32 ids, clipped float64 not yet cut to ids, or int64 ids of the trace."""
    if spec.distribution == "uniform":
        draws *= spec.table_rows[table] - 1
        return np.rint(draws, out=draws).astype(np.int32)
    if spec.distribution == "gaussian":
        return np.clip(draws, spec.rand_min, spec.rand_max, out=draws)
    return walk_stack(traces[table], draws, spec.trace_padding)


def _drop_repeats(values: np.ndarray, length: np.ndarray | int) -> np.ndarray | None:
    """Sort the bags [n, H] in place, each value once and in the first places. Returns [n, H] bool, the places left empty; None if none are.

    An empty place holds a value above all others, so that sorting moves it to the end of its bag.
    """
    nothing = np.iinfo(values.dtype).max if values.dtype.kind == "i" else np.inf
    varying = isinstance(length, np.ndarray)
    if varying:
        np.copyto(values, nothing, where=np.arange(values.shape[1]) >= length[:, None])
    values.sort(axis=1)
    repeated = values[:, 1:] == values[:, :-1]
    if varying:
        repeated &= values[:, 1:] != nothing
    some_repeat = repeated.any()
    if some_repeat:
        np.copyto(values[:, 1:], nothing, where=repeated)
        bags = np.flatnonzero(repeated.any(axis=1))  # few in a large table
        values[bags] = np.sort(values[bags], axis=1)
    return values == nothing if varying or some_repeat else None


def _checked_gaussian_ids(spec: RandomDataSpec, table: int, values: np.ndarray) -> np.ndarray:
    """[n, H] values cut to ids; UserError where one is not a row of the table."""
    ids, rows = values.astype(np.int64), spec.table_rows[table]
    low, high = int(ids.min(initial=0)), int(ids.max(initial=0))
    if high >= rows:
        raise UserError(f"table {table}: gaussian id {high} but the table has {rows} rows; --rand-data-max={spec.rand_max:g} must be below {rows}")
    if low < 0:
        raise UserError(f"table {table}: gaussian id {low} is negative; --rand-data-min={spec.rand_min:g} must be above -1")
    return ids


DISTRIBUTIONS = ("uniform", "gaussian", "trace")
