"""Criteo's raw text as a source of blocks (data_loaders.blocks): Kaggle's one file, or Terabyte's day_0 .. day_23, plain or gzip.

Days are upstream's: Kaggle's are seven equal cuts of the raw rows, Terabyte's are the files. Sub-sampling is upstream's too: one uniform number for
every raw row in order, and a row with label 0 goes where it is below the rate. A run that is taken up again skips the numbers of the rows before.
"""

import hashlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_loaders.blocks import Block, Categorical, Dense, Mark, SplitRule
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE, Rows, blocks_from, parse_block
from dlrm_xla.specs import UserError

KAGGLE_DAYS, TERABYTE_DAYS = 7, 24
_DRAWS_AT_ONCE = 1 << 20


class CriteoSource:
    """data_loaders.blocks.Source of Criteo's text: 13 counts, negative ones as 0, and 26 columns of 32-bit keys."""

    number_type = "int32"
    dense = tuple(Dense(name) for name in COLUMNS[1 : 1 + NUM_DENSE])

    def __init__(self, kind: str, files: tuple[Path, ...], days: int, max_ind_range: int, sub_sample_rate: float, rng: np.random.RandomState | None):
        """kind: "kaggle" | "terabyte"; rng is copied, and needed where sub_sample_rate > 0. See also kaggle() and terabyte()."""
        self.files, self.part_names = files, tuple(f"day_{day}" for day in range(days))
        self.split = SplitRule("last_day", cuts=0 if kind == "terabyte" else days)
        modulo = max_ind_range if 0 < max_ind_range < 2**32 else 0
        self.categorical = tuple(Categorical(name, modulo=modulo) for name in COLUMNS[1 + NUM_DENSE :])
        self._kind, self._rate, self._rng_state = kind, sub_sample_rate, rng.get_state(legacy=True) if sub_sample_rate > 0 else None
        self._flags = {"max_ind_range": max_ind_range, "sub_sample_rate": sub_sample_rate}

    @classmethod
    def kaggle(
        cls, raw: Path, *, max_ind_range: int, sub_sample_rate: float, days: int = KAGGLE_DAYS, rng: np.random.RandomState | None
    ) -> "CriteoSource":
        return cls("kaggle", (raw,), days, max_ind_range, sub_sample_rate, rng)

    @classmethod
    def terabyte(
        cls, prefix: Path, *, max_ind_range: int, sub_sample_rate: float, days: int = TERABYTE_DAYS, rng: np.random.RandomState | None
    ) -> "CriteoSource":
        """prefix DIR/day: DIR/day_0 .. DIR/day_23. Raises UserError where one is missing."""
        return cls("terabyte", day_files(prefix, days), days, max_ind_range, sub_sample_rate, rng)

    def describe(self) -> dict:
        """The state of the random numbers belongs to it: other numbers keep other rows."""
        draws = {"draws": draws_of(self._rng_state)} if self._rng_state is not None else {}
        return {"source": self._kind, **draws, "flags": dict(self._flags)}

    def blocks(self, start: Mark | None, *, progress: bool) -> Iterator[tuple[Block, Mark]]:
        """About 4,300 rows each, parsed two at a time. Raises the UserError of the first bad line."""
        mark = start or Mark(0, 0, 1, 0)
        draws = self._draws(mark.rows + mark.left_out)
        for file, behind, rows in self._parsed(mark, progress):
            raw_row, when = mark.rows + mark.left_out, None
            if draws is not None:
                keep = np.flatnonzero((rows.labels != 0) | (draws.uniform(low=0.0, high=1.0, size=len(rows.labels)) >= self._rate))
                when = raw_row + keep if self.split.cuts else None
                rows, left_out = Rows(rows.labels[keep], rows.counts[keep], np.ascontiguousarray(rows.hashes[:, keep])), len(rows.labels) - len(keep)
            else:
                left_out = 0
            n = len(rows.labels)
            mark = Mark(file, *behind, mark.rows + n, mark.left_out + left_out)
            part = 0 if self.split.cuts else file
            yield Block(rows.labels, rows.counts, list(rows.hashes), [None] * NUM_SPARSE, part, when), mark
        if mark.rows == 0:
            raise UserError(f"{self.files[0]}: --data-sub-sample-rate={self._rate} leaves no row")

    def _draws(self, skip: int) -> np.random.RandomState | None:
        """The sub-sampling's stream behind its first `skip` numbers."""
        if self._rng_state is None:
            return None
        rng = np.random.RandomState()
        rng.set_state(self._rng_state)
        skip_draws(rng, skip)
        return rng

    def _parsed(self, start: Mark, progress: bool) -> Iterator[tuple[int, tuple[int, int], Rows]]:
        """(file, (byte, line) behind it, rows) of each block. A damaged file is an error when the blocks before have been seen to be good."""
        with ThreadPoolExecutor(2) as pool:
            ahead: deque[tuple[int, int, int, Future]] = deque()
            blocks, damage = self._texts(start, progress), None
            while True:
                try:
                    file, line, byte, block = next(blocks)
                except StopIteration:
                    break
                except UserError as error:
                    damage = error
                    break
                ahead.append((file, byte, line, pool.submit(_parse, block, line, self.files[file])))
                if len(ahead) > 3:
                    yield _result(*ahead.popleft())
            while ahead:
                yield _result(*ahead.popleft())
            if damage:
                raise damage

    def _texts(self, start: Mark, progress: bool) -> Iterator[tuple[int, int, int, bytes]]:
        """(file, number of the first line, byte behind the last one, whole lines)."""
        sizes = [_size(path) for path in self.files]
        done = sum(sizes[: start.file])
        with tqdm(total=sum(sizes), initial=done, unit="B", unit_scale=True, desc="Reading", disable=not progress) as bar:
            for file in range(start.file, len(self.files)):
                bar.set_postfix_str(self.files[file].name)
                byte, line = (start.byte, start.line) if file == start.file else (0, 1)
                for block, first_line in blocks_from(self.files[file], byte, line, bar):
                    byte += len(block)
                    yield file, first_line, byte, block


def draws_of(rng_state: tuple) -> str:
    """Stands for the numbers that RandomState.get_state(legacy=True) goes on to: its SHA-256."""
    name, words, *rest = rng_state
    return hashlib.sha256(words.tobytes() + repr((name, *rest)).encode()).hexdigest()


def day_files(prefix: Path, days: int) -> tuple[Path, ...]:
    """The raw files of Terabyte's days, each plain or, with .gz at its end, gzip. Raises UserError naming the first one that is missing."""
    files = []
    for day in range(days):
        plain = prefix.with_name(f"{prefix.name}_{day}")
        zipped = plain.with_name(f"{plain.name}.gz")
        if plain.exists() and zipped.exists():
            raise UserError(f"--raw-data-file={prefix}: {plain} is there twice, plain and as {zipped.name}; remove one of them")
        found = next((path for path in (plain, zipped) if path.exists()), None)
        if found is None:
            raise UserError(
                f"--raw-data-file={prefix}: {plain} is missing, and so is {plain.name}.gz; Terabyte is {days} files, "
                f"{prefix.name}_0 to {prefix.name}_{days - 1}, plain or .gz"
            )
        files.append(found)
    return tuple(files)


def skip_draws(rng: np.random.RandomState, count: int) -> None:
    """Draws `count` uniform numbers for nothing: the stream then stands where a run stands that has seen as many raw rows."""
    for first in range(0, count, _DRAWS_AT_ONCE):
        rng.uniform(low=0.0, high=1.0, size=min(_DRAWS_AT_ONCE, count - first))


def _parse(block: bytes, first_line: int, path: Path) -> Rows:
    rows = parse_block(block, first_line, path)
    np.maximum(rows.counts, 0, out=rows.counts)
    return rows


def _result(file: int, byte: int, line: int, job: Future) -> tuple[int, tuple[int, int], Rows]:
    rows = job.result()
    return file, (byte, line + len(rows.labels)), rows


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None
