"""Rows that have been read and numbered, as the writers of results find them in <out>.parts."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loaders.blocks import Categorical, Source
from data_loaders.numbering import PIECE, Keys
from data_loaders.spill import Segment
from data_loaders.split import Split
from data_loaders.vocabulary import Vocabulary, stored

IDS, VOCABULARY = "ids.bin", "vocabulary.bin"


@dataclass(frozen=True)
class Spilled:
    """ids.bin holds the ids of each column, one column after the other, in the order of the rows."""

    folder: Path
    source: Source
    segments: list[Segment]

    def key_type(self, column: int) -> type:
        return np.uint32 if self.source.categorical[column].key_bits == 32 else np.uint64

    def num_keys(self) -> list[int]:
        """Of each column, over all rows."""
        return [
            sum(segment.num_keys(column, self.key_type(column)) for segment in self.segments) for column in range(len(self.source.categorical))
        ]

    def keys(self, column: int, progress: Callable[[int], None]) -> Keys:
        """A column's keys; progress gets how many have been read."""
        kind = self.key_type(column)

        def pieces(first: int) -> Iterator[np.ndarray]:
            for segment in self.segments:
                here = segment.num_keys(column, kind)
                if first < here:
                    keys = segment.keys(column, kind)
                    for start in range(first, here, PIECE):
                        piece = keys[start : start + PIECE]
                        yield piece
                        progress(len(piece))
                first = max(0, first - here)

        total = sum(segment.num_keys(column, kind) for segment in self.segments)
        modulo = self.source.categorical[column].modulo
        return Keys(total, kind, modulo if 0 < modulo < 2**32 else 2**32, pieces)


@dataclass(frozen=True)
class Numbered:
    """What a result is written from: spilled rows, their ids, the vocabularies, and the split. hotness: most keys of a column in one row."""

    spilled: Spilled
    vocabularies: list[Vocabulary]
    hotness: list[int]
    split: Split

    @property
    def columns(self) -> tuple[Categorical, ...]:
        return self.spilled.source.categorical

    def ids_at(self) -> list[int]:
        """Where each column's ids begin in ids.bin."""
        return [0, *np.cumsum([4 * total for total in self.spilled.num_keys()]).tolist()]

    def vocabulary(self, column: int) -> tuple[Iterator[np.ndarray], Iterator[np.ndarray]]:
        """Keys and counts, in pieces."""
        entry, kind = self.vocabularies[column], self.spilled.key_type(column)

        def pieces(dtype: type, at: int) -> Iterator[np.ndarray]:
            with open(self.spilled.folder / VOCABULARY, "rb") as file:
                yield from stored(file, dtype, at, entry.rows)

        return pieces(kind, entry.keys_at), pieces(np.int64, entry.counts_at)


class IdReader:
    """ids.bin, from some row on, column by column: next(column, count) gives the next `count` ids of a column."""

    def __init__(self, path: Path, starts: list[int]):
        self._number = os.open(path, os.O_RDONLY)
        self._at = list(starts)

    def next(self, column: int, count: int) -> np.ndarray:
        data = os.pread(self._number, 4 * count, self._at[column])
        self._at[column] += 4 * count
        return np.frombuffer(data, np.int32, count)

    def skip(self, column: int, count: int) -> None:
        self._at[column] += 4 * count

    def close(self) -> None:
        os.close(self._number)
