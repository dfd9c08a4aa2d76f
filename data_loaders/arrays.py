"""An arrays folder (data_loaders.manifest) opened: everything in it is checked, then rows are read into memory or mapped.

Sizes are checked at every open. Read into memory, every byte is compared with its checksum and every value with its range. Mapped, the checksums
are compared once and a stamp, verified.json, spares the next open; values are compared batch by batch, for what is mapped can change.
"""

import json
import mmap
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from data_loaders.criteo_npz import DAMAGE, atomic_write, cause
from data_loaders.manifest import CHUNK_BYTES, NAME, ROWS, STAMP, Manifest, Table, bag_files, vocabulary_files
from data_loaders.spill import crc32
from dlrm_xla.specs import UserError

_PIECE_BYTES = 1 << 20
_ONE, _INFINITE = 0x3F800000, 0x7F800000  # bits of 1.0 and of infinity as float32


@dataclass
class Arrays:
    """rows: [n, W] int32 = label | dense | one-hot ids, a tensor, or a MappedRows that stands for it ([a:b], index_select(0, rows), len).
    number_type float32: label and dense words are the bits of float32. bags: for each multi-hot column, by name."""

    manifest: Manifest
    rows: "torch.Tensor | MappedRows"
    bags: "dict[str, Bags]"


def is_arrays(path: Path) -> bool:
    """Whether the folder has a manifest."""
    return (path / NAME).is_file()


def way_out(folder: Path) -> str:
    """What to do about a folder that is of no use."""
    return f"delete the folder {folder.name} to have it made again, or name another --processed-data-file"


def read_manifest(folder: Path) -> Manifest:
    """Raises UserError where there is none, or none that this version reads."""
    try:
        manifest = Manifest.from_json((folder / NAME).read_text(encoding="utf-8"))
        _check_manifest(manifest)
        return manifest
    except OSError as error:
        raise UserError(f"--processed-data-file={folder}: cannot read its {NAME}: {error.strerror or error}; {way_out(folder)}") from None
    except (*DAMAGE, AttributeError) as error:
        raise UserError(f"{folder / NAME}: damaged, or of another version ({cause(error)}); {way_out(folder)}") from None


def open_arrays(folder: Path, mapped: bool, *, progress: bool = False) -> Arrays:
    """The folder's rows and bags, checked: sizes always; checksums and values now where they are read into memory; mapped: checksums once,
    then a stamp (verified.json) spares the next open, and values batch by batch. Raises UserError (one line with the way out) for every damage."""
    manifest = read_manifest(folder)
    try:
        found = {name: os.stat(folder / name) for name in manifest.files}
        for name, entry in manifest.files.items():
            if found[name].st_size != entry.bytes:
                raise UserError(f"{folder / name}: {found[name].st_size} bytes, not the {entry.bytes} that were written; {way_out(folder)}")
        load = [] if mapped else [ROWS, *(name for table in manifest.tables if table.multi_hot for name in bag_files(table.name))]
        stamp = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ino, list(manifest.files[name].crc32)] for name, stat in found.items()}
        verified = _read_stamp(folder)
        unknown = [name for name in manifest.files if name not in load and verified.get(name) != stamp[name]]
        total = sum(manifest.files[name].bytes for name in [*unknown, *load])
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"Checking {folder.name}", disable=not progress) as bar:
            for name in unknown:
                for _ in _checked_chunks(folder, name, manifest, bar):
                    pass
            memory = {name: _load(folder, name, manifest, bar) for name in load}
        if unknown:
            _write_stamp(folder, stamp if mapped else {name: stamp[name] for name in stamp if name not in load or verified.get(name) == stamp[name]})
        return _mapped(folder, manifest) if mapped else _in_memory(folder, manifest, memory)
    except OSError as error:
        name = Path(error.filename).name if error.filename else folder.name
        raise UserError(f"--processed-data-file={folder}: cannot read {name}: {error.strerror or error}; {way_out(folder)}") from None


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError where it contradicts itself."""
    n, files = manifest.rows, manifest.files
    if manifest.number_type not in ("int32", "float32"):
        raise ValueError(f"number_type {manifest.number_type!r}")
    if not (0 < manifest.num_train + manifest.num_test <= n and manifest.num_train >= 0 and manifest.num_test >= 0):
        raise ValueError(f"{manifest.num_train} rows for training and {manifest.num_test} for testing of {n}")
    if sum(part.rows for part in manifest.parts) != n:
        raise ValueError(f"its parts do not have {n} rows")
    sizes = {ROWS: 4 * n * manifest.width}
    for table in manifest.tables:
        if not 1 <= table.rows < 2**31 or table.key_bits not in (32, 64) or table.hotness < 1:
            raise ValueError(f"table {table.name}: {table.rows} rows, keys of {table.key_bits} bits, hotness {table.hotness}")
        keys, counts = vocabulary_files(table.name)
        sizes |= {keys: table.rows * table.key_bits // 8, counts: 8 * table.rows}
        if table.multi_hot:
            offsets, ids = bag_files(table.name)
            sizes |= {offsets: 8 * (n + 1), ids: files[ids].bytes // 4 * 4}
    if set(sizes) != set(files):
        raise ValueError(f"it lists the wrong files: {', '.join(sorted(set(sizes) ^ set(files)))}")
    for name, size in sizes.items():
        if files[name].bytes != size or len(files[name].crc32) != -(-size // CHUNK_BYTES):
            raise ValueError(f"{name} does not fit: {files[name].bytes} bytes for {size}, {len(files[name].crc32)} checksums")


# ---- checksums --------------------------------------------------------------------------------------------------------------------


def _checked_chunks(folder: Path, name: str, manifest: Manifest, bar: tqdm, out: np.ndarray | None = None) -> Iterator[int]:
    """Reads a file and compares it; gives its length so far after each chunk. out: bytes to read it into."""
    entry, buffer, at = manifest.files[name], np.empty(_PIECE_BYTES, np.uint8), 0
    with open(folder / name, "rb", buffering=0) as file:
        for wanted in entry.crc32:
            end, found = min(at + CHUNK_BYTES, entry.bytes), 0
            first = at
            while at < end:
                piece = buffer[: min(_PIECE_BYTES, end - at)] if out is None else out[at : min(at + _PIECE_BYTES, end)]
                got = file.readinto(piece)
                if not got:
                    raise UserError(f"{folder / name}: is being cut off while it is read; {way_out(folder)}")
                found, at = crc32(piece[:got], found), at + got
                bar.update(got)
            if found != wanted:
                raise UserError(f"{folder / name}: damaged between bytes {first} and {end}: its checksum is wrong; {way_out(folder)}")
            yield at


def _load(folder: Path, name: str, manifest: Manifest, bar: tqdm) -> np.ndarray:
    """A file's bytes."""
    try:
        data = np.empty(manifest.files[name].bytes, np.uint8)
    except MemoryError:
        raise UserError(f"{folder / name}: {manifest.files[name].bytes} bytes do not fit into memory; use --memory-map") from None
    for _ in _checked_chunks(folder, name, manifest, bar, data):
        pass
    return data


def _read_stamp(folder: Path) -> dict:
    try:
        stamp = json.loads((folder / STAMP).read_bytes())
        return stamp if isinstance(stamp, dict) else {}
    except (OSError, ValueError):
        return {}


def _write_stamp(folder: Path, stamp: dict) -> None:
    try:
        with atomic_write(folder / STAMP, "") as file:
            file.write(json.dumps(stamp).encode())
    except UserError:  # a folder that cannot be written: it is read again the next time
        print(f"{folder}: cannot keep that its checksums are right; every open reads all of it", file=sys.stderr)


# ---- rows -------------------------------------------------------------------------------------------------------------------------


class _Ranges:
    """What the words of a row may be."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._folder, self._manifest = folder, manifest
        self._floats = manifest.number_type == "float32"
        ids = [table.rows - 1 for table in manifest.one_hot]
        dense = [2**32 - 1 if self._floats else 2**31 - 1] * len(manifest.dense)
        self._largest = np.array([_ONE if self._floats else 1, *dense, *ids], np.uint32)  # a negative number is a large one here

    def check(self, rows: np.ndarray) -> None:
        """rows [m, W] int32. UserError where a label is not 0 or 1, a count negative, a number not finite, or an id beyond its table."""
        words = rows.view(np.uint32)
        bad = words > self._largest
        if self._floats:
            numbers = slice(1, 1 + len(self._manifest.dense))
            bad[:, numbers] |= (words[:, numbers] & np.uint32(_INFINITE)) == _INFINITE
            bad[:, 0] |= (words[:, 0] != 0) & (words[:, 0] != _ONE)
        if bad.any():
            row, place = (int(found) for found in np.argwhere(bad)[0])
            names = ["label", *(column.name for column in self._manifest.dense), *(table.name for table in self._manifest.one_hot)]
            raise UserError(
                f"{self._folder / ROWS}: holds a label, a number or an id that is out of range ({names[place]}: {rows[row, place]}); "
                f"{way_out(self._folder)}"
            )


class MappedRows:
    """Stands for the tensor [n, W] int32: [first:end] and index_select(0, rows) are copies of that tensor's, checked."""

    def __init__(self, folder: Path, manifest: Manifest):
        self._ranges = _Ranges(folder, manifest)
        # single rows are read without what lies around them, see criteo_map.MappedInts
        self._by_slice, self._by_row = (
            _map(folder / ROWS, np.int32, advice).reshape(manifest.rows, manifest.width) for advice in (mmap.MADV_NORMAL, mmap.MADV_RANDOM)
        )

    def __len__(self) -> int:
        return len(self._by_slice)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._checked(self._by_slice[rows].copy())

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        return self._checked(self._by_row.take(rows.numpy(), axis=0))

    def _checked(self, rows: np.ndarray) -> torch.Tensor:
        self._ranges.check(rows)
        return torch.from_numpy(rows)


class Bags:
    """The bags of a multi-hot column; what take gives is checked where `checked` says that nobody has done it before."""

    def __init__(self, folder: Path, table: Table, offsets: np.ndarray, ids: np.ndarray, *, checked: bool):
        """offsets [n + 1] int64, ids [total] int32; of one that is mapped, any part may be wrong."""
        self._folder, self._table, self._offsets, self._ids, self._checked = folder, table, offsets, ids, checked
        if not checked:
            for start in range(0, len(offsets), _PIECE_BYTES):
                self._check_offsets(offsets[start : start + _PIECE_BYTES], offsets[start + 1 : start + 1 + _PIECE_BYTES])
            if offsets[0] != 0 or offsets[-1] != len(ids):
                self._refuse(f"bags end at {offsets[-1]} of {len(ids)} ids")
            for start in range(0, len(ids), _PIECE_BYTES):
                self._check_ids(ids[start : start + _PIECE_BYTES])

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """rows [m] int64 -> lengths [m] int32, ids [sum of lengths] int32, bag after bag."""
        begins, ends = self._offsets[rows], self._offsets[rows + 1]
        if self._checked:
            self._check_offsets(begins, ends)
        lengths = ends - begins
        first = np.cumsum(lengths) - lengths
        ids = self._ids[np.arange(int(lengths.sum())) + np.repeat(begins - first, lengths)]
        if self._checked:
            self._check_ids(ids)
        return lengths.astype(np.int32), ids

    def _check_offsets(self, begins: np.ndarray, ends: np.ndarray) -> None:
        lengths = ends - begins[: len(ends)]
        if len(lengths) and not (0 <= lengths.min() and lengths.max() <= self._table.hotness and begins.min() >= 0 and ends.max() <= len(self._ids)):
            self._refuse(f"a bag is not of 0 to {self._table.hotness} ids")

    def _check_ids(self, ids: np.ndarray) -> None:
        if len(ids) and int(ids.view(np.uint32).max()) >= self._table.rows:
            self._refuse(f"an id is not from 0 to {self._table.rows - 1}")

    def _refuse(self, what: str) -> None:
        raise UserError(f"{self._folder}: bags of {self._table.name} are damaged ({what}); {way_out(self._folder)}")


def _map(path: Path, dtype: type, advice: int) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    with open(path, "rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    memory.madvise(advice)
    return np.frombuffer(memory, dtype)


def _mapped(folder: Path, manifest: Manifest) -> Arrays:
    bags = {}
    for table in manifest.tables:
        if table.multi_hot:
            offsets, ids = bag_files(table.name)
            arrays = (_map(folder / offsets, np.int64, mmap.MADV_RANDOM), _map(folder / ids, np.int32, mmap.MADV_RANDOM))
            bags[table.name] = Bags(folder, table, *arrays, checked=True)
    return Arrays(manifest, MappedRows(folder, manifest), bags)


def _in_memory(folder: Path, manifest: Manifest, memory: dict[str, np.ndarray]) -> Arrays:
    rows, ranges, bags = memory[ROWS].view(np.int32).reshape(manifest.rows, manifest.width), _Ranges(folder, manifest), {}
    at_once = max(1, _PIECE_BYTES // (4 * manifest.width))
    for start in range(0, len(rows), at_once):
        ranges.check(rows[start : start + at_once])
    for table in manifest.tables:
        if table.multi_hot:
            offsets, ids = bag_files(table.name)
            bags[table.name] = Bags(folder, table, memory[offsets].view(np.int64), memory[ids].view(np.int32), checked=False)
    return Arrays(manifest, torch.from_numpy(rows), bags)
