"""A generated file in Criteo Kaggle's format whose best possible AUC is known: python -m data_loaders.synth --out train.txt --rows 400000

A row's click probability is the sigmoid of a sum of effects: one of each id (ids are Zipf-distributed; the effect shrinks with the id's
rank, for nobody can learn an id that was seen twice) and one of each count (linear in log(1 + count); missing and negative act as 0, as
they do after preprocessing). So nothing is hidden from a model that reads the processed columns, and the Bayes AUC is that of the true
probability. It is printed and written to <out>.bayes.json, over all rows and over the test half (first half, rounded up, of the last
seventh). Real Criteo columns differ: millions of ids, interactions, drift from day to day. Upstream has no such generator.
"""

import argparse
import contextlib
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
from tqdm import tqdm

from data_loaders.criteo_npz import atomic_write
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.preprocess import DAYS, split_days
from dlrm_xla.specs import UserError

# Distinct ids of each column: the real file's mixture of small and large, scaled so that 400,000 rows can teach them
CARDINALITIES = (
    150,
    125,
    2000,
    1250,
    37,
    12,
    1000,
    75,
    3,
    1500,
    750,
    2000,
    500,
    26,
    1000,
    1500,
    10,
    625,
    300,
    4,
    2000,
    13,
    14,
    1250,
    55,
    1000,
)
ZIPF_EXPONENT = 1.1
HALF_RANK = 20  # at this rank an id's effect has half the standard deviation of the first one's
ID_EFFECT, COUNT_EFFECT = 0.4, 0.25  # standard deviations, in units of the logit
CLICK_RATE = 0.25
MISSING_ID = 2  # in columns of more than 100 ids, the id of this rank is written as nothing
_CHUNK_ROWS = 100_000  # the unit of random numbers: changing it changes the file


class Generator:
    """The planted model of one seed: effects of ids and counts, drawn once, and rows drawn from it chunk by chunk."""

    def __init__(self, seed: int):
        rng = np.random.default_rng([seed, 0])
        self.seed = seed
        self.popularity, self.effects, self.spelling = [], [], []
        for column, cardinality in enumerate(CARDINALITIES):
            ranks = np.arange(cardinality)
            weights = (ranks + 1.0) ** -ZIPF_EXPONENT
            self.popularity.append(np.cumsum(weights / weights.sum()))
            self.effects.append(ID_EFFECT * rng.standard_normal(cardinality) / (1 + ranks / HALF_RANK))
            names = [f"{value:08x}" for value in _scramble((column << 24) + ranks + 1)]
            if cardinality > 100:
                names[MISSING_ID] = None
            self.spelling.append(pa.array(names, pa.string()))
        self.count_effect = COUNT_EFFECT * rng.standard_normal(NUM_DENSE)
        self.count_scale = rng.uniform(0.5, 3.5, NUM_DENSE)  # mean of log(count)
        self.missing = rng.uniform(0, 0.4, NUM_DENSE)
        self.intercept = 0.0
        self.intercept = _intercept(self.rows(-1)[2])

    def rows(self, chunk: int) -> tuple[np.ndarray, np.ma.MaskedArray, np.ndarray]:
        """Chunk number `chunk`: ranks of ids [n, 26], counts [n, 13] (masked = missing), logits [n] float64; n = 100,000."""
        rng = np.random.default_rng([self.seed, chunk + 2])
        ranks = np.empty((_CHUNK_ROWS, NUM_SPARSE), dtype=np.int64)
        logits = np.full(_CHUNK_ROWS, self.intercept)
        for column, (popularity, effects) in enumerate(zip(self.popularity, self.effects, strict=True)):
            drawn = np.searchsorted(popularity, rng.random(_CHUNK_ROWS), side="right")
            ranks[:, column] = np.minimum(drawn, len(effects) - 1)
            logits += effects[ranks[:, column]]
        values = np.floor(np.exp(rng.normal(self.count_scale, 1.2, (_CHUNK_ROWS, NUM_DENSE)))).astype(np.int32)
        values[:, 1] -= 2  # as in the real file, the second count can be negative
        counts = np.ma.masked_array(values, rng.random((_CHUNK_ROWS, NUM_DENSE)) < self.missing)
        seen = np.maximum(counts.filled(0), 0)
        logits += (np.log1p(seen) - self.count_scale) @ self.count_effect
        return ranks, counts, logits

    def labels(self, chunk: int, logits: np.ndarray) -> np.ndarray:
        """[n] int32, drawn from the true probability."""
        draws = np.random.default_rng([self.seed, chunk + 2, 1]).random(len(logits))
        return (draws < 1 / (1 + np.exp(-logits))).astype(np.int32)


def write_file(out: Path, rows: int, seed: int, *, progress: bool) -> dict:
    """Writes `out` (gzip where the name ends in .gz) and <out>.bayes.json; returns what the latter holds. The text depends on rows and seed only."""
    if rows < 2 * DAYS:
        raise UserError(f"--rows={rows} is too few: it needs at least {2 * DAYS}, two for each of {DAYS} days")
    generator = Generator(seed)
    all_labels, all_logits = [], []
    way_out = "name another place with --out=PATH"
    with contextlib.ExitStack() as stack:
        text = stack.enter_context(atomic_write(out, way_out))
        if out.suffix == ".gz":
            text = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=text, compresslevel=1, mtime=0))
        bar = stack.enter_context(tqdm(total=rows, unit="row", unit_scale=True, desc=out.name, disable=not progress))
        for chunk in range(-(-rows // _CHUNK_ROWS)):
            ranks, counts, logits = generator.rows(chunk)
            n = min(_CHUNK_ROWS, rows - chunk * _CHUNK_ROWS)
            labels = generator.labels(chunk, logits)
            all_labels.append(labels[:n])
            all_logits.append(logits[:n])
            columns = [pa.array(labels[:n])]
            columns += [pa.array(counts.data[:n, i], mask=counts.mask[:n, i]) for i in range(NUM_DENSE)]
            columns += [spelling.take(pa.array(ranks[:n, i])) for i, spelling in enumerate(generator.spelling)]
            csv.write_csv(
                pa.table(columns, names=COLUMNS),
                text,
                write_options=csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none"),
            )
            bar.update(n)
    labels, logits = np.concatenate(all_labels), np.concatenate(all_logits)
    days = split_days(rows, DAYS)
    test = slice(rows - int(days[-1]), rows - int(days[-1]) // 2)
    facts = {
        "rows": rows,
        "seed": seed,
        "click_rate": float(labels.mean()),
        "bayes_auc": auc(labels, logits),
        "bayes_auc_test": auc(labels[test], logits[test]),
        "raw_bytes": out.stat().st_size,
    }
    with atomic_write(out.parent / f"{out.name}.bayes.json", way_out) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
    return facts


def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of (1, 0) pairs in the right order, a tie counting half; nan where one label is absent."""
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(ties) - (ties - 1) / 2)[place]
    ones = int(labels.sum())
    zeros = len(labels) - ones
    return float((mean_rank[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros)) if ones and zeros else float("nan")


def _intercept(logits: np.ndarray) -> float:
    """The constant that makes the mean probability CLICK_RATE, by bisection."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if (1 / (1 + np.exp(-(logits + middle)))).mean() < CLICK_RATE:
            low = middle
        else:
            high = middle
    return low


def _scramble(numbers: np.ndarray) -> np.ndarray:
    """A one-to-one map of 32-bit numbers that keeps only 0 in place (the finalizer of MurmurHash3), so that ids look like hashes."""
    h = numbers.astype(np.uint64)
    mask = np.uint64(0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) & mask
    return h


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 after one line on stderr."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.synth", description="Write a Criteo-format file with a planted signal.")
    parser.add_argument("--out", type=Path, required=True, help="file to write; gzip where it ends in .gz")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    try:
        if args.seed < 0:
            raise UserError(f"--seed={args.seed} is negative; it must be 0 or above")
        facts = write_file(args.out, args.rows, args.seed, progress=sys.stderr.isatty())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{args.out}: {facts['rows']:,} rows, {facts['raw_bytes']:,} bytes, click rate {facts['click_rate']:.4f}, "
        f"Bayes AUC {facts['bayes_auc']:.4f} (test half {facts['bayes_auc_test']:.4f})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
