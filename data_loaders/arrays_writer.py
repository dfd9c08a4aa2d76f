"""Numbered rows to an arrays folder (data_loaders.manifest): row blocks in place, each at its final offset, the manifest last.

The work can be taken up again after any segment: `save` records how many are on the disk for good.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_loaders.criteo_npz import RawFingerprint
from data_loaders.manifest import CHUNK_BYTES, NAME, ROWS, DenseColumn, File, Manifest, Part, Table, bag_files, vocabulary_files
from data_loaders.spill import Segment, crc32, remove, write_all, write_at, write_whole
from data_loaders.spilled import IDS, IdReader, Numbered
from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

SAVE_BYTES = 1 << 30  # so much is written, at most, between two records of what is done
_ROWS_AT_ONCE = 4096  # a row's 40 words are gathered from 40 places: 0.6 MB stay in the cache meanwhile
_READ_BYTES = 1 << 20


def write_arrays(
    folder: Path,
    numbered: Numbered,
    facts: dict[str, Any],
    raws: list[RawFingerprint],
    done: dict[str, Any] | None,
    save: Callable[[dict], None],
    bar: tqdm,
) -> None:
    """Fills the folder. facts: fields of the manifest that the rows do not tell (raw_rows, source, flags); done: what save got last, or None."""
    if done is None:
        remove(folder)  # bytes of rows that have changed since would stay behind shorter files
    folder.mkdir(exist_ok=True)
    source = numbered.spilled.source
    if done is None:
        done = {"segments": 0, "moments": _moments(numbered) if any(column.transform == "standardize" for column in source.dense) else []}
        save(done)
    moments = iter(done["moments"])
    dense = [
        DenseColumn(column.name, column.transform, *(next(moments) if column.transform == "standardize" else ())) for column in source.dense
    ]
    writer = _RowWriter(folder, numbered, tuple(dense), done["segments"])
    try:
        written = 0
        for number in range(done["segments"], len(numbered.spilled.segments)):
            written += writer.write(numbered.spilled.segments[number])
            bar.update(numbered.spilled.segments[number].rows)
            if written >= SAVE_BYTES:
                writer.sync()
                save(done | {"segments": number + 1})
                written = 0
        writer.sync()
    finally:
        writer.close()
    done = done | {"segments": len(numbered.spilled.segments)}
    save(done)
    _write_vocabularies(folder, numbered)
    manifest = _manifest(numbered, tuple(dense), facts, raws)
    names = [ROWS]
    for table in manifest.tables:
        names += [*(bag_files(table.name) if table.multi_hot else ()), *vocabulary_files(table.name)]
    for stray in set(os.listdir(folder)) - set(names):
        os.unlink(folder / stray)
    files = _checksums(folder, names, done, save, bar.disable)
    sync_folder(folder)
    write_whole(folder / NAME, [replace(manifest, files=files).to_json().encode()])


def _checksums(folder: Path, names: list[str], done: dict[str, Any], save: Callable[[dict], None], quiet: bool) -> dict[str, File]:
    """Of all files. What is done is saved with every SAVE_BYTES: the rows of the Terabyte set are 700 GB to read."""
    files, sums = {}, dict(done.get("sums", {}))
    with tqdm(
        total=sum((folder / name).stat().st_size for name in names), desc="Checksums", unit="B", unit_scale=True, unit_divisor=1000, disable=quiet
    ) as bar:
        for name in names:

            def count(found: list[int], name: str = name) -> None:
                bar.update(CHUNK_BYTES)
                if len(found) * CHUNK_BYTES % SAVE_BYTES == 0:
                    sums[name] = found
                    save(done | {"sums": sums})

            files[name] = checksums(folder / name, sums.get(name, []), count)
    return files


def checksums(path: Path, known: Sequence[int] = (), whole_chunk: Callable[[list[int]], None] = lambda sums: None) -> File:
    """A file's size and the CRC-32 of each of its chunks. known: those of its first chunks, which are not read. Raises OSError."""
    sums, size = list(known), len(known) * CHUNK_BYTES
    buffer = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as file:
        file.seek(size)
        while got := file.readinto(buffer[: CHUNK_BYTES - size % CHUNK_BYTES]):
            if size % CHUNK_BYTES == 0:
                sums.append(0)
            sums[-1] = crc32(buffer[:got], sums[-1])
            size += got
            if size % CHUNK_BYTES == 0:
                whole_chunk(sums)
    return File(size, tuple(sums))


def _manifest(numbered: Numbered, dense: tuple[DenseColumn, ...], facts: dict[str, Any], raws: list[RawFingerprint]) -> Manifest:
    source, split = numbered.spilled.source, numbered.split
    raw_of_part = raws if len(raws) == len(source.part_names) else raws[:1] * len(source.part_names)
    parts = tuple(Part(name, rows, vars(raw)) for name, rows, raw in zip(source.part_names, split.part_rows, raw_of_part, strict=True))
    tables = tuple(
        Table(column.name, entry.rows, column.multi_hot, hotness, column.key_bits, column.modulo, entry.shared)
        for column, entry, hotness in zip(numbered.columns, numbered.vocabularies, numbered.hotness, strict=True)
    )
    counts = (sum(split.part_rows), facts["raw_rows"], split.num_train, split.num_test)
    return Manifest(source.number_type, *counts, parts, dense, tables, facts["source"], facts["flags"], {})


def _write_vocabularies(folder: Path, numbered: Numbered) -> None:
    for column, spec in enumerate(numbered.columns):
        for name, pieces in zip(vocabulary_files(spec.name), numbered.vocabulary(column), strict=True):
            with open(folder / name, "wb", buffering=0) as file:
                for piece in pieces:
                    write_all(file, piece)
                os.fsync(file.fileno())


class _Region:
    """A stretch of a file that is filled from its beginning to its end."""

    def __init__(self, number: int, at: int):
        self._number, self.at = number, at

    def write(self, data: np.ndarray) -> None:
        self.at = write_at(self._number, np.ascontiguousarray(data).reshape(-1), self.at)


class _RowWriter:
    """rows.bin and the bags' files, open; each with a stretch for rows that stay in order or are for training, and one for test rows."""

    def __init__(self, folder: Path, numbered: Numbered, dense: tuple[DenseColumn, ...], done: int):
        """done: so many segments are written."""
        self._numbered, self._dense = numbered, dense
        self._one_hot = [column for column, spec in enumerate(numbered.columns) if not spec.multi_hot]
        self._multi_hot = [column for column, spec in enumerate(numbered.columns) if spec.multi_hot]
        self._width = 1 + len(dense) + len(self._one_hot)
        self._numbers: list[int] = []
        split = numbered.split
        self._moves, self._label_type = split.moves_rows, np.float32 if numbered.spilled.source.number_type == "float32" else np.int32
        second = split.num_train if self._moves else 0
        rows_number = self._open(folder / ROWS)
        self._rows = [_Region(rows_number, 0), _Region(rows_number, 4 * self._width * second)]
        self._bags = {}
        train_ids = self._train_ids() if self._multi_hot and self._moves else {}
        for column in self._multi_hot:
            offsets, ids = (self._open(folder / name) for name in bag_files(numbered.columns[column].name))
            _Region(offsets, 0).write(np.zeros(1, np.int64))
            total = train_ids.get(column, 0)
            self._bags[column] = [(_Region(offsets, 8), _Region(ids, 0)), (_Region(offsets, 8 + 8 * second), _Region(ids, 4 * total))]
        self._ids = IdReader(numbered.spilled.folder / IDS, numbered.ids_at())
        for segment in numbered.spilled.segments[:done]:
            self._skip(segment)

    def _open(self, path: Path) -> int:
        self._numbers.append(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        return self._numbers[-1]

    def _train_ids(self) -> dict[int, int]:
        """Ids of training rows in each multi-hot column."""
        totals = dict.fromkeys(self._multi_hot, 0)
        for segment in self._numbered.spilled.segments:
            train = ~self._numbered.split.is_test(segment)
            for column in self._multi_hot:
                totals[column] += int(segment.lengths(column)[train].sum(dtype=np.int64))
        return totals

    def _halves(self, segment: Segment) -> list[np.ndarray | None]:
        """Which rows of the segment go to each stretch; None: all."""
        if not self._moves:
            return [None]
        test = self._numbered.split.is_test(segment)
        return [~test, test]

    def _skip(self, segment: Segment) -> None:
        halves = self._halves(segment)
        for half, mask in enumerate(halves):
            self._rows[half].at += 4 * self._width * (segment.rows if mask is None else int(np.count_nonzero(mask)))
        for column in range(len(self._numbered.columns)):
            lengths = segment.lengths(column) if column in self._bags else None
            self._ids.skip(column, segment.rows if lengths is None else int(lengths.sum(dtype=np.int64)))
            for half, mask in enumerate(halves if lengths is not None else ()):
                kept = lengths if mask is None else lengths[mask]
                offsets, ids = self._bags[column][half]
                offsets.at += 8 * len(kept)
                ids.at += 4 * int(kept.sum(dtype=np.int64))

    def write(self, segment: Segment) -> int:
        """Returns how many bytes that took."""
        halves, words = self._halves(segment), self._words(segment)
        for half, mask in enumerate(halves):
            self._rows[half].write(words if mask is None else words[mask])
        written = words.nbytes
        for column in self._multi_hot:
            lengths = segment.lengths(column)
            ids = self._ids.next(column, int(lengths.sum(dtype=np.int64)))
            for half, mask in enumerate(halves):
                offsets_region, ids_region = self._bags[column][half]
                kept = lengths if mask is None else lengths[mask]
                start = ids_region.at // 4
                ids_region.write(ids if mask is None else ids[np.repeat(mask, lengths)])
                offsets_region.write(start + np.cumsum(kept, dtype=np.int64))
            written += ids.nbytes + 8 * len(lengths)
        return written

    def _words(self, segment: Segment) -> np.ndarray:
        """[rows, W] int32"""
        labels = segment.labels(self._label_type).view(np.int32)
        dense = transform(segment.dense(self._label_type, len(self._dense)), self._dense).view(np.int32) if self._dense else None
        ids = [self._ids.next(column, segment.rows) for column in self._one_hot]
        words, first_id = np.empty((segment.rows, self._width), np.int32), 1 + len(self._dense)
        for start in range(0, segment.rows, _ROWS_AT_ONCE):
            rows = slice(start, start + _ROWS_AT_ONCE)
            words[rows, 0] = labels[rows]
            if dense is not None:
                words[rows, 1:first_id] = dense[rows]
            for place, column in enumerate(ids, first_id):
                words[rows, place] = column[rows]
        return words

    def sync(self) -> None:
        for number in self._numbers:
            os.fsync(number)

    def close(self) -> None:
        for number in self._numbers:
            os.close(number)
        self._ids.close()


def transform(values: np.ndarray, columns: tuple[DenseColumn, ...]) -> np.ndarray:
    """[n, D] as rows.bin has it: int32 as they are; float32 transformed, in double precision, missing (NaN) as 0."""
    if values.dtype == np.int32:
        return values
    out = np.empty_like(values)
    for place, column in enumerate(columns):
        wide = values[:, place].astype(np.float64)
        if column.transform == "log":
            wide = np.log1p(np.maximum(wide, 0))
        elif column.transform == "standardize":
            wide = (wide - column.mean) / column.std
        out[:, place] = np.where(np.isnan(wide), 0, wide)
        if not np.isfinite(out[:, place]).all():
            raise UserError(f"column {column.name}: a value is infinite or too large for 32-bit floating point; mend the raw file")
    return out


def _moments(numbered: Numbered) -> list[tuple[float, float]]:
    """(mean, standard deviation) over the training rows of each column that is standardized, missing ones left out; (0, 1) where nothing is left,
    and deviation 1 where all values are equal. Rows are summed up 65,536 at a time, counted over all rows: how they lie in segments plays no part."""
    places = [place for place, column in enumerate(numbered.spilled.source.dense) if column.transform == "standardize"]
    zeros = np.zeros(len(places))
    count, total = _sums(numbered, places, zeros, 1)
    mean = np.where(count > 0, total / np.maximum(count, 1), 0.0)
    _, squares = _sums(numbered, places, mean, 2)
    deviation = np.sqrt(squares / np.maximum(count, 1))
    deviation[~(deviation > 0)] = 1.0
    return list(zip(mean.tolist(), deviation.tolist(), strict=True))


def _sums(numbered: Numbered, places: list[int], center: np.ndarray, power: int) -> tuple[np.ndarray, np.ndarray]:
    """How many training values each column has, and the sum of (value - center) ** power."""
    count, total, split = np.zeros(len(places)), np.zeros(len(places)), numbered.split
    window, held, seen = 1 << 16, [], 0  # training rows that wait for their window to be full
    for segment in [*numbered.spilled.segments, None]:
        if segment is not None:
            values = segment.dense(np.float32, len(numbered.spilled.source.dense))[:, places]
            values = values[~split.is_test(segment)] if split.moves_rows else values[: max(0, split.num_train - seen)]
            seen += segment.rows
            held.append(values)
        rows = np.concatenate(held)
        cut = len(rows) - len(rows) % window if segment is not None else len(rows)
        for start in range(0, cut, window):
            wide = rows[start : min(start + window, cut)].astype(np.float64) - center
            there = ~np.isnan(wide)
            count += there.sum(axis=0)
            total += (np.where(there, wide, 0) ** power).sum(axis=0)
        held = [rows[cut:]]
    return count, total
