"""Rows as a reader of raw files hands them on, before ids are numbered: what stands between any raw format and data_loaders.build."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np


@dataclass(frozen=True)
class Categorical:
    """A column that becomes a table of embeddings.

    name         for people and file names: letters, digits, _ . -
    key_bits     32: keys are uint32; 64: keys are uint64 (whole numbers as they are, texts by a 64-bit hash)
    multi_hot    a row holds a bag of any length; otherwise exactly one key
    max_hot      multi_hot: only a bag's first max_hot keys are kept; 0: all
    modulo       above 0: a key is taken modulo this before it is numbered (upstream's --max-ind-range)
    """

    name: str
    key_bits: int = 32
    multi_hot: bool = False
    max_hot: int = 0
    modulo: int = 0


@dataclass
class Block:
    """Some consecutive rows.

    labels   [n] int32 or float32, as Source.number_type says
    dense    [n, D] of the same type; missing ones are 0 (float32: NaN)
    keys     one array for each column: [n] uint32 or uint64, or, multi-hot, [sum of lengths], bag after bag
    lengths  one array [n] int32 for each multi-hot column, None for the others
    part     number of the part that the rows belong to; a block does not cross parts
    when     [n] int64, the time of each row in any unit, where rows are split by time; or, with SplitRule.cuts where rows were left out, its
             number among the raw rows, from 0
    """

    labels: np.ndarray
    dense: np.ndarray
    keys: list[np.ndarray]
    lengths: list[np.ndarray | None]
    part: int = 0
    when: np.ndarray | None = None

    @property
    def num_rows(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Mark:
    """A place in the raw files from which reading can go on: everything before it has been handed on.

    file   index in Source.files
    byte   of the text, decompressed, where the next row begins
    line   its number, counted from 1 in the file (Parquet: row number)
    rows   handed on before it, over all files
    left_out   raw rows before it, over all files, that were not handed on (sub-sampling)
    """

    file: int
    byte: int
    line: int
    rows: int
    left_out: int = 0


@dataclass(frozen=True)
class SplitRule:
    """Which rows are for testing; the others are for training. Both keep the order of the files.

    last_day   Criteo: the first half, rounded up, of the last part is for testing, its second half for nothing
    time       the last `test` (a fraction) of the rows by Block.when: those at or after the earliest moment with at most that share of the
               rows at or after it; or those at or after `start`, where that is given
    fraction   the last `test` of all rows
    parts      the parts whose numbers are in `parts`
    cuts above 0: parts are that many equal cuts of the raw rows, the remainder in the first ones, whatever Block.part says (Kaggle's days)
    """

    by: str  # "last_day" | "time" | "fraction" | "parts"
    test: float = 0.0
    start: int | None = None
    parts: tuple[int, ...] = ()
    cuts: int = 0


@dataclass(frozen=True)
class Dense:
    """A dense column. transform, of float32 sources, on the values of the raw file: none; log (of 1 + max(x, 0)); standardize (less the mean,
    over the standard deviation, of the training rows). A missing value is 0 after it."""

    name: str
    transform: str = "none"


class Source(Protocol):
    """Raw files of one data set. Iterating is deterministic: the same rows in the same order, wherever it starts.

    files        in the order in which they are read
    part_names   names of the parts (days, files) that rows are numbered through with, in order
    number_type  "int32" (Criteo's counts, not transformed) or "float32" for labels and dense columns
    split        which rows are for testing
    describe()   what the source is, for the key of unfinished work and for the manifest: JSON-able, the same for the same raw files and flags.
                 Its entry "flags", a dictionary, becomes Manifest.flags. (data_loaders.build adds the files' fingerprints itself.)
    """

    files: tuple[Path, ...]
    part_names: tuple[str, ...]
    number_type: str
    dense: tuple[Dense, ...]
    categorical: tuple[Categorical, ...]
    split: SplitRule

    def describe(self) -> dict: ...

    def blocks(self, start: Mark | None, *, progress: bool) -> Iterator[tuple[Block, Mark]]:
        """Blocks of some thousand rows from `start` (None: the beginning), each with the mark behind it. UserError names file, line and cell."""
