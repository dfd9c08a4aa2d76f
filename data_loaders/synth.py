"""Generated files in Criteo's format whose best possible AUC is known: python -m data_loaders.synth --out train.txt --rows 400000

A row's click probability is the sigmoid of a sum of effects: one of each id (ids are Zipf-distributed; the effect shrinks with the id's
rank, for nobody can learn an id that was seen twice) and one of each count (linear in log(1 + count); missing and negative act as 0, as
they do after preprocessing). So nothing is hidden from a model that reads the processed columns, and the Bayes AUC is that of the true
probability. It is printed and written to <out>.bayes.json, over all rows and over the test half (first half, rounded up, of the last day).
Real Criteo columns differ: interactions, drift from day to day, one id that fills half of a column. Upstream has no such generator.

--profile small (the default): columns of up to 2,000 ids, so that 400,000 rows can teach them. criteo-kaggle and criteo-terabyte: as many
ids as the published data sets have (data_loaders.synth_profiles); the latter writes <out>_0 to <out>_23. uniform: columns of 100,000 ids that
are equally popular. What is written depends on profile, rows and seed, not on the number of threads. (Between machines, the last bit of pow and
exp may differ, and with it a few ids.)
"""

import argparse
import contextlib
import gzip
import json
import os
import sys
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as csv
from isal import igzip
from tqdm import tqdm

from data_loaders import synth_profiles
from data_loaders.command import ended
from data_loaders.criteo_npz import atomic_write
from data_loaders.criteo_source import KAGGLE_DAYS
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.split import split_days
from data_loaders.synth_profiles import COUNT_EFFECT, ID_EFFECT, MISSING_ID, ProfileGenerator, hex_digits, intercept, scramble
from dlrm_xla.specs import UserError

# Distinct ids of each column: the real file's mixture of small and large, scaled so that 400,000 rows can teach them
CARDINALITIES = (
    150, 125, 2000, 1250, 37, 12, 1000, 75, 3, 1500, 750, 2000, 500, 26, 1000, 1500, 10, 625, 300, 4, 2000, 13, 14, 1250, 55, 1000,
)  # fmt: skip
ZIPF_EXPONENT = 1.1
HALF_RANK = 20  # at this rank an id's effect has half the standard deviation of the first one's
CLICK_RATE = 0.25
_CHUNK_ROWS = 100_000  # the unit of random numbers: changing it changes the file
_WAY_OUT = "name another place with --out=PATH"


class Generator:
    """The planted model of one seed: effects of ids and counts, drawn once, and rows drawn from it chunk by chunk."""

    def __init__(self, seed: int):
        self.chunk_rows = _CHUNK_ROWS
        rng = np.random.default_rng([seed, 0])
        self.seed = seed
        self.popularity, self.effects, self.spelling = [], [], []
        for column, cardinality in enumerate(CARDINALITIES):
            ranks = np.arange(cardinality)
            weights = (ranks + 1.0) ** -ZIPF_EXPONENT
            self.popularity.append(np.cumsum(weights / weights.sum()))
            self.effects.append(ID_EFFECT * rng.standard_normal(cardinality) / (1 + ranks / HALF_RANK))
            names = [f"{value:08x}" for value in scramble((column << 24) + ranks + 1)]
            if cardinality > 100:
                names[MISSING_ID] = None
            self.spelling.append(pa.array(names, pa.string()))
        self.count_effect = COUNT_EFFECT * rng.standard_normal(NUM_DENSE)
        self.count_scale = rng.uniform(0.5, 3.5, NUM_DENSE)  # mean of log(count)
        self.missing = rng.uniform(0, 0.4, NUM_DENSE)
        self.intercept = 0.0
        self.intercept = intercept(self.rows(-1)[2], CLICK_RATE)

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

    def spelled(self, ranks: np.ndarray, n: int) -> list[pa.Array]:
        """The id columns of the first n rows."""
        return [spelling.take(pa.array(ranks[:n, i])) for i, spelling in enumerate(self.spelling)]


class LargeGenerator(ProfileGenerator):
    """A profile's rows as columns of text."""

    def spelled(self, ranks: np.ndarray, n: int) -> list[pa.Array]:
        """The id columns of the first n rows."""
        return [self._spelled(column, ranks[column, :n]) for column in range(NUM_SPARSE)]

    def _spelled(self, column: int, ranks: np.ndarray) -> pa.Array:
        text = pa.py_buffer(hex_digits(synth_profiles.hashes(column, ranks)))
        ends = pa.py_buffer(np.arange(0, 8 * len(ranks) + 1, 8, dtype=np.int32))
        present = None
        if self.missing_ids(column):
            present = pa.py_buffer(np.packbits(ranks != MISSING_ID, bitorder="little"))
        return pa.Array.from_buffers(pa.string(), len(ranks), [present, ends, text])


@dataclass
class Piece:
    """Consecutive rows of one chunk that belong into one file."""

    file: int
    text: pa.Buffer | bytes
    labels: np.ndarray
    logits: np.ndarray


def pieces(generator, rows_of_files: np.ndarray, threads: int, *, gzip_members: bool) -> Iterator[Piece]:
    """All rows, in order; made by `threads` threads, of which each makes whole chunks. gzip_members: each piece's text is one."""
    ends = np.cumsum(rows_of_files)
    size, total = generator.chunk_rows, int(ends[-1])

    def make(chunk: int) -> list[Piece]:
        first, last = chunk * size, min((chunk + 1) * size, total)
        ranks, counts, logits = generator.rows(chunk)
        labels = generator.labels(chunk, logits)
        n = last - first
        columns = [pa.array(labels[:n])]
        columns += [pa.array(counts.data[:n, i], mask=counts.mask[:n, i]) for i in range(NUM_DENSE)]
        table = pa.table(columns + generator.spelled(ranks, n), names=COLUMNS)
        made = []
        while first < last:
            file = int(np.searchsorted(ends, first, side="right"))
            end = min(last, int(ends[file]))
            rows = slice(first - chunk * size, end - chunk * size)
            text = _text(table.slice(rows.start, end - first))
            made.append(Piece(file, igzip.compress(text, compresslevel=1, mtime=0) if gzip_members else text, labels[rows], logits[rows]))
            first = end
        return made

    with ThreadPoolExecutor(threads) as pool:
        ahead = deque()
        try:
            for chunk in range(-(-total // size)):
                ahead.append(pool.submit(make, chunk))
                if len(ahead) > threads + 1:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for waiting in ahead:
                waiting.cancel()


def _text(table: pa.Table) -> pa.Buffer:
    sink = pa.BufferOutputStream()
    csv.write_csv(table, sink, write_options=csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none"))
    return sink.getvalue()


def write_file(out: Path, rows: int, seed: int, *, progress: bool, threads: int = 1) -> dict:
    """The small profile: writes `out` (gzip where the name ends in .gz) and <out>.bayes.json; returns what the latter holds."""
    _check_rows(rows, KAGGLE_DAYS)
    return _write(Generator(seed), [out], np.array([rows]), out, KAGGLE_DAYS, seed, {}, progress, threads)


def write_profile(chosen: synth_profiles.Profile, out: Path, rows: int, seed: int, *, zipped: bool = False, progress: bool, threads: int) -> dict:
    """Any other: `out`, or <out>_0, <out>_1, ... (with .gz where zipped) for a profile with a file for each day; and <out>.bayes.json."""
    _check_rows(rows, chosen.days)
    files, rows_of_files = [out], np.array([rows])
    if chosen.day_files:
        ending, other = (".gz", "") if zipped else ("", ".gz")
        files = [out.parent / f"{out.name}_{day}{ending}" for day in range(chosen.days)]
        rows_of_files = split_days(rows, chosen.days)
        for day in range(chosen.days):
            twin = out.parent / f"{out.name}_{day}{other}"
            if twin.exists():
                raise UserError(f"--out={out}: {twin} exists, and day {day} would be there twice; delete it, or {_WAY_OUT}")
        with contextlib.suppress(OSError):  # whatever stops the writing half-way: it must not speak of a mixture of old and new days
            _sidecar(out).unlink(missing_ok=True)
    more = {"profile": chosen.name}
    if chosen.name == "uniform":
        more["cardinality"] = chosen.cardinalities[0]
    return _write(LargeGenerator(chosen, seed), files, rows_of_files, out, chosen.days, seed, more, progress, threads)


def _check_rows(rows: int, days: int) -> None:
    if rows < 2 * days:
        raise UserError(f"--rows={rows} is too few: it needs at least {2 * days}, two for each of {days} days")


def _write(
    generator, files: list[Path], rows_of_files: np.ndarray, out: Path, days: int, seed: int, more: dict, progress: bool, threads: int
) -> dict:
    rows = int(rows_of_files.sum())
    last_day = int(split_days(rows, days)[-1])
    first_test, end_test = rows - last_day, rows - last_day // 2
    everything, test = AucMeter(), AucMeter()
    members = len(files) > 1 and files[0].suffix == ".gz"
    done = ones = 0
    with contextlib.ExitStack() as stack:
        made = stack.enter_context(contextlib.closing(pieces(generator, rows_of_files, threads, gzip_members=members)))
        bar = stack.enter_context(tqdm(total=rows, unit="row", unit_scale=True, desc=out.name, disable=not progress))
        piece = None
        for number, path in enumerate(files):
            with _open(path, zipped=not members and path.suffix == ".gz") as file:
                piece = piece or next(made)
                while piece is not None and piece.file == number:
                    file.write(piece.text)
                    n = len(piece.labels)
                    everything.add(piece.labels, piece.logits)
                    inside = slice(max(first_test - done, 0), max(end_test - done, 0))
                    test.add(piece.labels[inside], piece.logits[inside])
                    done, ones = done + n, ones + int(piece.labels.sum())
                    bar.update(n)
                    piece = next(made, None)
    facts = {
        "rows": rows,
        "seed": seed,
        "click_rate": ones / rows,
        "bayes_auc": everything.auc()[0],
        "bayes_auc_test": test.auc()[0],
        "raw_bytes": sum(path.stat().st_size for path in files),
        **more,
    }
    error = max(everything.auc()[1], test.auc()[1])
    if error > 0:
        facts["bayes_auc_error"] = error
    with atomic_write(_sidecar(out), _WAY_OUT) as file:
        file.write((json.dumps(facts, indent=1) + "\n").encode())
    return facts


def _sidecar(out: Path) -> Path:
    return out.parent / f"{out.name}.bayes.json"


@contextlib.contextmanager
def _open(path: Path, *, zipped: bool):
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(atomic_write(path, _WAY_OUT))
        if zipped:
            file = stack.enter_context(gzip.GzipFile(filename="", mode="wb", fileobj=file, compresslevel=1, mtime=0))
        yield file


class AucMeter:
    """The AUC of rows that come in pieces, in bounded memory: exact up to EXACT_ROWS rows, from then on of logits rounded to BINS bins."""

    EXACT_ROWS = 1 << 22
    BINS = 1 << 20
    LIMIT = 32.0  # logits lie well within

    def __init__(self):
        self._kept: list[tuple[np.ndarray, np.ndarray]] = []
        self._rows = 0
        self._counts: np.ndarray | None = None  # [2, BINS] rows of label 0 and 1

    def add(self, labels: np.ndarray, logits: np.ndarray) -> None:
        self._rows += len(labels)
        if self._counts is None:
            self._kept.append((labels.astype(np.int8), logits.copy()))
            if self._rows <= self.EXACT_ROWS:
                return
            self._counts = np.zeros((2, self.BINS), dtype=np.int64)
            kept, self._kept = self._kept, []
        else:
            kept = [(labels, logits)]
        for some_labels, some_logits in kept:
            bins = ((some_logits + self.LIMIT) * (self.BINS / (2 * self.LIMIT))).clip(0, self.BINS - 1).astype(np.int64)
            for label in (0, 1):
                self._counts[label] += np.bincount(bins[some_labels == label], minlength=self.BINS)

    def auc(self) -> tuple[float, float]:
        """The AUC and how far at most the exact one is from it."""
        if self._counts is None:
            labels, logits = (np.concatenate(parts) for parts in zip(*self._kept, strict=True))
            return auc(labels, logits), 0.0
        zeros, ones = self._counts.astype(np.float64)
        pairs = zeros.sum() * ones.sum()
        if not pairs:
            return float("nan"), 0.0
        ties = float((zeros * ones).sum()) / 2
        below = np.cumsum(zeros) - zeros
        return float(((ones * below).sum() + ties) / pairs), ties / float(pairs)




def auc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Area under the ROC curve: the share of (1, 0) pairs in the right order, a tie counting half; nan where one label is absent."""
    _, place, ties = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(ties) - (ties - 1) / 2)[place]
    ones = int(labels.sum())
    zeros = len(labels) - ones
    return float((mean_rank[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * zeros)) if ones and zeros else float("nan")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status (data_loaders.command)."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.synth", description="Write files in Criteo's format with a planted signal.")
    parser.add_argument("--out", type=Path, required=True, help="file to write, gzip where it ends in .gz; criteo-terabyte: DIR/day")
    parser.add_argument("--profile", choices=["small", *synth_profiles.PROFILES], default="small")
    parser.add_argument("--rows", type=int, default=400_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cardinality", type=int, help="ids in each column of --profile=uniform (100000)")
    parser.add_argument("--gzip", action="store_true", help="criteo-terabyte: DIR/day_0.gz ...")
    parser.add_argument("--threads", type=int, default=min(os.cpu_count() or 1, 8), help="they do not change what is written")
    args = parser.parse_args(argv)
    return ended(lambda: _run(args))


def _run(args) -> None:
    facts = _write_as_asked(args)
    error = f", to {facts['bayes_auc_error']:.1e}" if "bayes_auc_error" in facts else ""
    print(
        f"{args.out}: {facts['rows']:,} rows, {facts['raw_bytes']:,} bytes, click rate {facts['click_rate']:.4f}, "
        f"Bayes AUC {facts['bayes_auc']:.4f} (test half {facts['bayes_auc_test']:.4f}{error})"
    )


def _write_as_asked(args) -> dict:
    if args.seed < 0:
        raise UserError(f"--seed={args.seed} is negative; it must be 0 or above")
    if not 1 <= args.threads <= 256:
        raise UserError(f"--threads={args.threads} must be from 1 to 256")
    if args.gzip and args.profile != "criteo-terabyte":
        raise UserError(f"--gzip: is for the day files of --profile=criteo-terabyte; with --profile={args.profile} let --out end in .gz")
    progress = sys.stderr.isatty()
    if args.profile == "small":
        if args.cardinality is not None:
            raise UserError(f"--cardinality={args.cardinality}: is for --profile=uniform; leave it out with --profile=small")
        return write_file(args.out, args.rows, args.seed, progress=progress, threads=args.threads)
    chosen = synth_profiles.profile(args.profile, args.cardinality)
    if chosen.day_files and args.out.suffix == ".gz":
        raise UserError(f"--out={args.out}: for --profile={args.profile} it is a prefix, as DIR/day; add --gzip for gzip")
    return write_profile(chosen, args.out, args.rows, args.seed, zipped=args.gzip, progress=progress, threads=args.threads)


if __name__ == "__main__":
    sys.exit(main())
