"""MLPerf DLRMv2's multi-hot Criteo: each id becomes a bag, itself and ids that a table of random numbers holds for it (--multi-hot-sizes).

The numbers are the reference's (facebookresearch/dlrm, torchrec_dlrm/multi_hot.py): one stream of NumPy's RandomState(0), table after table,
row after row; so the same id always brings the same companions, in training and in test. Two things are done otherwise. The reference draws a
whole table at once, in 64 bits, and writes out all rows as bags (4 TB for Terabyte); here tables are drawn in pieces of bounded size, which
gives the same numbers, kept as int32 without the id itself, and a bag is put together when its batch is read. And tables larger than a limit
lie in one file beside the processed data, which later runs map instead of drawing again.

pareto: the reference turns numbers of up to 1e63 into int32, which C leaves open; on x86 all that do not fit become -2 ** 31, and so they do
here, on every machine.
"""

import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_loaders.criteo_npz import atomic_write
from data_loaders.prefetch import Jobs
from dlrm_xla.batch import Batch, Split, slot_starts
from dlrm_xla.specs import UserError, size_text

DISTRIBUTIONS = ("uniform", "pareto")
PARETO_SHAPE = 0.25
_FORMAT = 1
_PIECE = 1 << 22  # numbers drawn at once: 32 MiB


class MultiHotTables:
    """For each table t, [rows, hotness[t] - 1] int32: the ids that stand beside an id in its bag. Make it with `make`."""

    def __init__(self, table_rows: tuple[int, ...], hotness: tuple[int, ...], tables: list[np.ndarray], *, checked: bool):
        """checked: the numbers are known to lie below table_rows; otherwise each batch is looked at (a mapped file may change)."""
        self.hotness = hotness
        self._starts = slot_starts(hotness)
        self._tables, self._checked = tables, checked
        self._largest = np.repeat(np.array(table_rows, dtype=np.int64) - 1, hotness).astype(np.uint32)

    @classmethod
    def make(
        cls,
        sizes: tuple[int, ...],
        table_rows: tuple[int, ...],
        distribution: str,
        folder: Path,
        limit_bytes: int,
        progress: bool,
        min_table_size: int = 0,
    ) -> "MultiHotTables":
        """
        sizes           [T] ids in a bag of each table, the row's own one included
        table_rows      [T] rows of each table, as the model has them (after --max-ind-range)
        distribution    "uniform" | "pareto"
        folder          where the file is kept if the tables take more than limit_bytes
        min_table_size  tables of fewer rows keep single ids (the reference's first version had this; 0: no such rule)
        Raises UserError for sizes that do not fit, and where the file cannot be written.
        """
        hotness = _hotness(sizes, table_rows, distribution, min_table_size)
        shapes = [(rows, hot - 1) for rows, hot in zip(table_rows, hotness, strict=True)]
        num_bytes = 4 * sum(rows * more for rows, more in shapes)
        if num_bytes <= limit_bytes:
            tables = [np.empty(shape, dtype=np.int32) for shape in shapes]
            flat = [table.reshape(-1) for table in tables]
            places = [0] * len(flat)
            with _bar(num_bytes, "Making bags", progress) as bar:
                for table, numbers in draw(shapes, distribution):
                    flat[table][places[table] : places[table] + len(numbers)] = numbers
                    places[table] += len(numbers)
                    bar.update(numbers.nbytes)
            return cls(table_rows, hotness, tables, checked=True)
        key = {"format": _FORMAT, "distribution": distribution, "shapes": [list(shape) for shape in shapes]}
        name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:12]
        path = folder / f"multi_hot_{distribution}_{name}.bin"
        if not _is_whole(path, key, num_bytes, progress):
            _write(path, key, shapes, distribution, num_bytes, progress)
        return cls(table_rows, hotness, _map(path, shapes), checked=False)

    def bags(self, ids: np.ndarray) -> np.ndarray:
        """ids [n, T] int32 to [n, sum of hotness] int32: table after table, each id first and then its companions."""
        out = np.empty((len(ids), int(self._starts[-1])), dtype=np.int32)
        for t, table in enumerate(self._tables):
            first, end = self._starts[t], self._starts[t + 1]
            out[:, first] = ids[:, t]
            if end - first > 1:
                out[:, first + 1 : end] = table.take(ids[:, t], axis=0)
        if not self._checked and (out.view(np.uint32) > self._largest).any():
            raise UserError("the file of multi-hot tables holds an id that is out of range: it has changed; delete multi_hot_*.bin and *.json")
        return out


class MultiHotSplit:
    """A split whose batches hold one id per table, with bags instead (dlrm_xla.batch.Split). ids [B, T] become [B, sum of hotness]; no bag has
    padding, so weights stay None; padded rows stay 0."""

    def __init__(self, split: Split, tables: MultiHotTables):
        self._split, self._tables = split, tables
        self.num_rows, self.num_batches, self.batch_size = split.num_rows, split.num_batches, split.batch_size

    def whole(self) -> "MultiHotSplit":
        """The same split with all rows of each batch, whatever this rank's part is."""
        return MultiHotSplit(self._split.whole(), self._tables)

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """epoch: where the split beneath shuffles its batches, which epoch's order is meant."""
        batches = self._split.batches(start, epoch)
        return batches.then(self._expand) if isinstance(batches, Jobs) else map(self._expand, batches)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the epoch, where the split beneath can tell it."""
        return self._expand(self._split.batch(number))

    def _expand(self, batch: Batch) -> Batch:
        if batch.weights is not None or batch.ids.shape[1] != len(self._tables.hotness):
            raise ValueError("multi-hot tables need batches with one id for each table")
        ids = self._tables.bags(batch.ids.numpy())
        ids[batch.num_valid :] = 0
        return replace(batch, ids=torch.from_numpy(ids))


def draw(shapes: list[tuple[int, int]], distribution: str) -> Iterator[tuple[int, np.ndarray]]:
    """(table, its next numbers [m] int32), table after table, row after row, each below the table's rows; at most _PIECE at once.

    RandomState makes each number of an array from the stream by itself, so arrays drawn one after the other are those of one long draw.
    """
    rng = np.random.RandomState(0)
    for table, (rows, more) in enumerate(shapes):
        left = rows * more
        while left > 0:
            n = min(left, _PIECE)
            left -= n
            if distribution == "uniform":
                yield table, rng.randint(0, rows, size=n).astype(np.int32)
            else:
                values = rng.pareto(PARETO_SHAPE, size=n)
                values[values >= 2.0**31] = -(2.0**31)
                yield table, values.astype(np.int32) % np.int32(rows)


def _hotness(sizes, table_rows, distribution: str, min_table_size: int) -> tuple[int, ...]:
    text = ",".join(map(str, sizes))
    if len(sizes) != len(table_rows):
        raise UserError(f"--multi-hot-sizes={text}: {len(sizes)} sizes for {len(table_rows)} tables; give one for each")
    if min(sizes) < 1:
        raise UserError(f"--multi-hot-sizes={text}: {min(sizes)} is not a size; a bag holds at least 1 id, its row's own")
    if distribution not in DISTRIBUTIONS:
        raise UserError(f"--multi-hot-distribution={distribution} is unknown; choose one of {', '.join(DISTRIBUTIONS)}")
    return tuple(size if rows >= min_table_size else 1 for size, rows in zip(sizes, table_rows, strict=True))


def _bar(num_bytes: int, text: str, progress: bool) -> tqdm:
    return tqdm(total=num_bytes, unit="B", unit_scale=True, desc=text, disable=not progress)


def _write(path: Path, key: dict, shapes: list[tuple[int, int]], distribution: str, num_bytes: int, progress: bool) -> None:
    way_out = f"the tables of --multi-hot-sizes take {size_text(num_bytes)} there; make room, or fold ids with a smaller --max-ind-range"
    crc = 0
    with atomic_write(path, way_out) as file, _bar(num_bytes, f"Writing {path.name}", progress) as bar:
        for _, numbers in draw(shapes, distribution):
            data = numbers.astype("<i4", copy=False).view(np.uint8)
            crc = zlib.crc32(data, crc)
            file.write(data)
            bar.update(len(data))
    _stamp(path, key, crc, way_out)


def _note(path: Path) -> Path:
    return path.with_suffix(".json")


def _stamp(path: Path, key: dict, crc: int, way_out: str) -> None:
    """Writes down what the file holds and which file it is, so that the next run need not read all of it."""
    with atomic_write(_note(path), way_out) as file:
        file.write((json.dumps({"key": key, "crc32": crc, "file": _identity(path)}, indent=1) + "\n").encode())


def _identity(path: Path) -> list[int]:
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino]


def _is_whole(path: Path, key: dict, num_bytes: int, progress: bool) -> bool:
    """Whether the file is there and holds what was written. One that was copied or touched is read once. False: it has to be made anew."""
    try:
        note = json.loads(_note(path).read_text())
        identity = _identity(path)
        if note["key"] != key or identity[0] != num_bytes:
            return False
        if note["file"] == identity:
            return True
        crc = 0
        with open(path, "rb") as file, _bar(num_bytes, f"Checking {path.name}", progress) as bar:
            while data := file.read(1 << 24):
                crc = zlib.crc32(data, crc)
                bar.update(len(data))
        if crc != note["crc32"]:
            return False
    except (OSError, ValueError, KeyError, TypeError):
        return False
    if os.access(path.parent, os.W_OK):
        _stamp(path, key, crc, "make room there")
    return True


def _map(path: Path, shapes: list[tuple[int, int]]) -> list[np.ndarray]:
    """The tables in the file, as memory that belongs to it: what is not used can be dropped again."""
    try:
        with open(path, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be mapped ({error}); delete it to have it made again") from None
    memory.madvise(mmap.MADV_RANDOM)  # rows are read one by one: reading ahead would bring pages that nobody asked for
    tables, place = [], 0
    for rows, more in shapes:
        tables.append(np.frombuffer(memory, "<i4", rows * more, place).reshape(rows, more))
        place += 4 * rows * more
    return tables
