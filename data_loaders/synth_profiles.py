"""What data_loaders.synth writes in the size of real data: published cardinalities, Zipf popularity, planted effects, in memory that does not
depend on how many ids there are.

An id is (column, rank); rank 0 is the most popular. Everything about it is computed from these numbers where it is needed: how often it is
drawn (Zipf.draw), what it adds to the logit (effects), how it is spelled (hashes). The only tables are 4,096 normal quantiles and 65,536
groups of four hexadecimal digits.
"""

from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np

from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from dlrm_xla.specs import UserError

# Distinct ids of the columns as upstream's preprocessing counts them in the whole real files, the empty cell included
KAGGLE_CARDINALITIES = (
    1460, 583, 10131227, 2202608, 305, 24, 12517, 633, 3, 93145, 5683, 8351593, 3194, 27, 14992, 5461306, 10, 5652, 2173, 4, 7046547, 18, 15,
    286181, 105, 142572,
)  # fmt: skip
TERABYTE_CARDINALITIES = (
    227605432, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 130229467, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14, 292775614, 40790948,
    187188510, 590152, 12973, 108, 36,
)  # fmt: skip
MAX_CARDINALITY = 2**32 - 1  # an id is a 32-bit number other than 0
ID_EFFECT, COUNT_EFFECT = 0.4, 0.25  # standard deviations, in units of the logit
MISSING_ID = 2  # in columns of more than 100 ids, the id of this rank is written as nothing
MISSING_FROM = 100
CHUNK_ROWS = 1 << 15  # the unit of random numbers: changing it changes the files


@dataclass(frozen=True)
class Profile:
    """
    exponent    of Zipf's law, probability ~ (rank + 1) ** -exponent; 0: all ids of a column are equally popular
    half_rank   at this rank an id's effect has half the standard deviation of the first one's; 0: all effects are alike
    days        of the data set that the file is read as; the test half lies in the last one
    day_files   one file for each day, <out>_0 and so on
    """

    name: str
    cardinalities: tuple[int, ...]
    exponent: float
    half_rank: int
    click_rate: float
    days: int
    day_files: bool = False


PROFILES = {
    "criteo-kaggle": Profile("criteo-kaggle", KAGGLE_CARDINALITIES, 1.02, 20, 0.25, 7),
    "criteo-terabyte": Profile("criteo-terabyte", TERABYTE_CARDINALITIES, 1.02, 20, 0.033, 24, day_files=True),
    "uniform": Profile("uniform", (100_000,) * NUM_SPARSE, 0.0, 0, 0.25, 7),
}


def profile(name: str, cardinality: int | None) -> Profile:
    """cardinality: ids in each column of the uniform profile."""
    chosen = PROFILES[name]
    if cardinality is None:
        return chosen
    if name != "uniform":
        raise UserError(f"--cardinality={cardinality}: is for --profile=uniform; the columns of {name} have their published sizes")
    if not 1 <= cardinality <= MAX_CARDINALITY:
        raise UserError(f"--cardinality={cardinality}: must be from 1 to {MAX_CARDINALITY}, as ids are 32-bit hashes")
    return replace(chosen, cardinalities=(cardinality,) * NUM_SPARSE)


class ProfileGenerator:
    """The planted model of one seed, and rows drawn from it chunk by chunk; a chunk depends on profile, seed and its number only."""

    chunk_rows = CHUNK_ROWS

    def __init__(self, chosen: Profile, seed: int):
        rng = np.random.default_rng([seed, 0])
        self.profile, self.seed = chosen, seed
        self.count_effect = COUNT_EFFECT * rng.standard_normal(NUM_DENSE)
        self.count_scale = rng.uniform(0.5, 3.5, NUM_DENSE)  # mean of log(count)
        self.missing = rng.uniform(0, 0.4, NUM_DENSE)
        self.popularity = [Zipf(cardinality, chosen.exponent) for cardinality in chosen.cardinalities]
        self.intercept = 0.0
        self.intercept = intercept(np.concatenate([self.rows(chunk)[2] for chunk in (-1, -2, -3, -4)]), chosen.click_rate)

    def rows(self, chunk: int) -> tuple[np.ndarray, np.ma.MaskedArray, np.ndarray]:
        """Chunk number `chunk`: ranks of ids [26, n] int64, counts [n, 13] int32 (masked = missing), logits [n] float64; n = CHUNK_ROWS."""
        rng = np.random.default_rng([self.seed, chunk + 10])
        ranks = np.empty((NUM_SPARSE, CHUNK_ROWS), dtype=np.int64)
        logits = np.full(CHUNK_ROWS, self.intercept)
        for column, popularity in enumerate(self.popularity):
            popularity.draw(rng, ranks[column])
            logits += effects(self.seed, column, ranks[column], self.profile.half_rank)
        values = np.floor(np.exp(rng.normal(self.count_scale, 1.2, (CHUNK_ROWS, NUM_DENSE)))).astype(np.int32)
        values[:, 1] -= 2  # as in the real files, the second count can be negative
        counts = np.ma.masked_array(values, rng.random((CHUNK_ROWS, NUM_DENSE)) < self.missing)
        logits += (np.log1p(np.maximum(counts.filled(0), 0)) - self.count_scale) @ self.count_effect
        return ranks, counts, logits

    def labels(self, chunk: int, logits: np.ndarray) -> np.ndarray:
        """[n] int32, drawn from the true probability."""
        draws = np.random.default_rng([self.seed, chunk + 10, 1]).random(len(logits))
        return (draws < 1 / (1 + np.exp(-logits))).astype(np.int32)

    def missing_ids(self, column: int) -> bool:
        return self.profile.cardinalities[column] > MISSING_FROM


class Zipf:
    """Ranks 0 .. n - 1 with probability proportional to (rank + 1) ** -exponent, exactly, with nothing stored but four numbers.

    Rejection-inversion (Hoermann and Derflinger 1996, "Rejection-inversion to generate variates from monotone discrete distributions"):
    a number under the integral of x ** -exponent is turned into x, x is rounded to a rank, and the few that lie above the rank's own bar are
    drawn again. In float64 a rank's probability is right to 1e-6 of itself at n = 3e8.
    """

    def __init__(self, n: int, exponent: float):
        if exponent == 1 or exponent < 0:
            raise ValueError(f"exponent is {exponent}; it must be 0 or above and not 1")
        self.n, self.exponent = n, exponent
        self._low, self._high = self._integral(1.5) - 1, self._integral(n + 0.5)
        self._sure = 2 - self._inverse(self._integral(2.5) - 2.0**-exponent)  # this close below its rank, x lies under the bar

    def draw(self, rng: np.random.Generator, out: np.ndarray) -> None:
        """Fills out [m] int64."""
        if self.exponent == 0:
            out[:] = rng.integers(0, self.n, len(out))
            return
        missing = slice(None)
        while True:
            area = rng.random(len(out[missing]))
            area *= self._high - self._low
            area += self._low
            x = self._inverse(area)
            ranks = np.clip(np.rint(x), 1, self.n)
            out[missing] = ranks - 1
            doubtful = np.flatnonzero(ranks - x > self._sure)
            bar = ranks[doubtful]
            again = doubtful[area[doubtful] < self._integral(bar + 0.5) - bar**-self.exponent]
            if not len(again):
                return
            missing = again if isinstance(missing, slice) else missing[again]

    def _integral(self, x):
        """Of x ** -exponent, from 1."""
        return (x ** (1 - self.exponent) - 1) / (1 - self.exponent)

    def _inverse(self, area):
        return (1 + area * (1 - self.exponent)) ** (1 / (1 - self.exponent))


def effects(seed: int, column: int, ranks: np.ndarray, half_rank: int) -> np.ndarray:
    """[n] float64: what each id adds to the logit, one of 4,096 normal quantiles picked by a hash of (seed, column, rank)."""
    start = np.uint64(_mix64(np.array([_mix64(np.array([seed], dtype=np.uint64))[0] + np.uint64(column)]))[0])
    h = _mix64(ranks.astype(np.uint64) + start)
    values = _QUANTILES[h >> np.uint64(52)]
    return values / (1 + ranks / half_rank) if half_rank else values


def hashes(column: int, ranks: np.ndarray) -> np.ndarray:
    """[n] uint32: distinct for distinct ranks below 2**32 - 1, and never 0, which an empty cell stands for."""
    factor = np.uint64(0x9E3779B1 + 2 * column)  # odd: a one-to-one map of 32-bit numbers, another one in every column
    return scramble((ranks.astype(np.uint64) + np.uint64(1)) * factor & _MASK32).astype(np.uint32)


def hex_digits(numbers: np.ndarray) -> np.ndarray:
    """[n] uint32 to [8 n] bytes, eight lower-case digits each."""
    halves = np.empty((len(numbers), 2), dtype=np.uint32)
    halves[:, 0] = _FOUR_DIGITS[numbers >> np.uint32(16)]
    halves[:, 1] = _FOUR_DIGITS[numbers & np.uint32(0xFFFF)]
    return halves.view(np.uint8).reshape(-1)


def scramble(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one map of 32-bit numbers that keeps only 0 in place (the finalizer of MurmurHash3), so that ids look like hashes. [n] uint64."""
    h = numbers.astype(np.uint64)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & _MASK32
    return h


def intercept(logits: np.ndarray, click_rate: float) -> float:
    """The constant that makes the mean probability click_rate, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(logits + middle)))).mean() < click_rate:
            low = middle
        else:
            high = middle
    return low


def _mix64(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one map of 64-bit numbers whose result has no visible pattern (the finalizer of SplitMix64). [n] uint64."""
    h = numbers + np.uint64(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = (h ^ (h >> np.uint64(shift))) * np.uint64(factor)
    return h ^ (h >> np.uint64(31))


_MASK32 = np.uint64(0xFFFFFFFF)
_QUANTILES = ID_EFFECT * np.array([NormalDist().inv_cdf((k + 0.5) / 4096) for k in range(4096)])
_FOUR_DIGITS = np.frombuffer("".join(f"{k:04x}" for k in range(1 << 16)).encode(), dtype=np.uint32)
