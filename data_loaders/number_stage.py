"""The second stage of data_loaders.build: ids and vocabulary of each column, one column after the other, from the last finished one on."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import IO, Protocol

import numpy as np
from tqdm import tqdm

from data_loaders.numbering import TooLittleMemory, TooManyIds, number_ids
from data_loaders.read_stage import enough, free_bytes
from data_loaders.spill import write_all
from data_loaders.spilled import IDS, VOCABULARY, Numbered, Spilled
from data_loaders.split import Split
from data_loaders.vocabulary import OldVocabularies, Vocabulary, count_ids, encode_with, share_rare, stored
from dlrm_xla.specs import UserError

SAVE_SECONDS = 2  # columns that took less are recorded together


class _Options(Protocol):
    memory_bytes: int
    memory_flag: str
    min_frequency: int


def number_columns(
    spilled: Spilled, split: Split, options: _Options, old: OldVocabularies | None, done: list, save: Callable[[list], None], progress: bool
) -> Numbered:
    """done: the columns that save got last. Raises UserError for too little memory and for keys that an older vocabulary lacks; OSError."""
    entries = list(done)
    columns, totals = spilled.source.categorical, spilled.num_keys()
    files = [open(spilled.folder / name, "r+b" if (spilled.folder / name).exists() else "w+b", buffering=0) for name in (IDS, VOCABULARY)]
    ids_file, vocabulary_file = files
    try:
        first = sum(totals[: len(entries)])
        with tqdm(total=sum(totals), initial=first, desc="Numbering ids", unit="id", unit_scale=True, disable=not progress) as bar:
            saved = time.monotonic()
            for column in range(len(entries), len(columns)):
                bar.set_postfix_str(columns[column].name)
                vocabulary_file.seek(entries[-1]["end"] if entries else 0)
                vocabulary_file.truncate()
                ids_at = 4 * sum(totals[:column])
                ids_file.seek(ids_at)
                try:
                    entry = _Column(spilled, column, totals[column], ids_at, bar).number(ids_file, vocabulary_file, options, old)
                except TooLittleMemory as error:
                    what = f"column {columns[column].name}"
                    raise enough(options, error.args[0] - error.args[1], what) from None
                except TooManyIds as error:
                    raise UserError(f"column {columns[column].name}: {error.args[0]} ids; the most is 2147483647: give it a max_ind_range") from None
                entries.append(asdict(entry) | {"hotness": _hotness(spilled, column)})
                if time.monotonic() - saved > SAVE_SECONDS or column == len(columns) - 1:
                    for file in files:
                        os.fsync(file.fileno())
                    save(entries)
                    saved = time.monotonic()
    finally:
        for file in files:
            file.close()
    vocabularies = [Vocabulary(**{name: value for name, value in entry.items() if name != "hotness"}) for entry in entries]
    return Numbered(spilled, vocabularies, [entry["hotness"] for entry in entries], split)


def _hotness(spilled: Spilled, column: int) -> int:
    """Most keys in a row; at least 1."""
    if not spilled.source.categorical[column].multi_hot:
        return 1
    return max(1, *(int(segment.lengths(column).max(initial=0)) for segment in spilled.segments))


class _Column:
    """One column while it is numbered."""

    def __init__(self, spilled: Spilled, column: int, total: int, ids_at: int, bar: tqdm):
        self.spilled, self.column, self.total, self.ids_at, self.bar = spilled, column, total, ids_at, bar
        self.spec, self.kind = spilled.source.categorical[column], spilled.key_type(column)

    def number(self, ids_file: IO[bytes], vocabulary_file: IO[bytes], options: _Options, old: OldVocabularies | None) -> Vocabulary:
        """Ids to ids_file, where it stands; keys and counts to vocabulary_file, where it stands."""
        read = 0  # a column that does not fit is read twice: the bar shows the first time

        def progress(count: int) -> None:
            nonlocal read
            self.bar.update(min(count, self.total - read))
            read += min(count, self.total - read)

        keys, at = self.spilled.keys(self.column, progress), vocabulary_file.tell()
        shared = options.min_frequency > 0
        if old is not None:
            former = old.column(self.spec)
            known = encode_with(keys, self.spec.name, former, old.path, free_bytes(options), ids_file)
            write_all(vocabulary_file, known)
            rows, shared = len(known), former.shared
            del known
        elif shared:
            rows = self._number_frequent(keys, ids_file, vocabulary_file, options)
        else:
            rows = number_ids(keys, free_bytes(options), ids_file, vocabulary_file, at)
        if rows == 0:  # bags that are all empty: a table needs a row
            write_all(vocabulary_file, np.zeros(1, self.kind))
            rows = 1
        counts_at = at + rows * np.dtype(self.kind).itemsize
        if old is not None or not shared:
            vocabulary_file.seek(counts_at)
            count_ids(self._ids(ids_file), rows, free_bytes(options), vocabulary_file)
        return Vocabulary(rows, shared, at, counts_at, counts_at + 8 * rows)

    def _number_frequent(self, keys, ids_file: IO[bytes], vocabulary_file: IO[bytes], options: _Options) -> int:
        """With a shared id for rare keys: numbered, counted, and numbered again."""
        with _scratch(self.spilled.folder / "keys.tmp") as keys_file, _scratch(self.spilled.folder / "counts.tmp") as counts_file:
            num_ids = number_ids(keys, free_bytes(options), ids_file, keys_file, 0)
            count_ids(self._ids(ids_file), num_ids, free_bytes(options), counts_file)
            least, memory = options.min_frequency, free_bytes(options)
            stored_keys = (keys_file, self.kind)
            return share_rare(ids_file, self.ids_at, self.total, stored_keys, counts_file, num_ids, least, memory, vocabulary_file)

    def _ids(self, ids_file: IO[bytes]) -> Callable[[], Iterator[np.ndarray]]:
        return lambda: stored(ids_file, np.int32, self.ids_at, self.total)


class _scratch:
    """A file of this run alone."""

    def __init__(self, path: Path):
        self._path = path

    def __enter__(self) -> IO[bytes]:
        self._file = open(self._path, "w+b", buffering=0)
        return self._file

    def __exit__(self, *error) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)
