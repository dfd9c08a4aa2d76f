"""A processed file read where it lies on the disk (--memory-map): a batch is gathered through a memory map, so memory does not grow with rows.

Upstream's --memory-map loads one day's compressed file at a time, a seventh of the data (1.4 GB of arrays for Kaggle), and must read in
order. Here every row can be reached at any time, and what the operating system keeps of the file it can drop again. Shapes, types and sizes are
checked at each start, checksums at the first one (a stamp beside the file spares the others), values batch by batch.
"""

import mmap
import zipfile
from pathlib import Path
from typing import IO

import numpy as np
import torch

from data_loaders.arrays import open_arrays
from data_loaders.criteo_npz import (
    Meta,
    Processed,
    RawFingerprint,
    cause,
    check_once,
    read_counts,
    read_header,
    read_npz,
    read_rest,
    reading,
    way_out,
)  # fmt: skip
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.manifest import Manifest
from dlrm_xla.specs import UserError

_INT32 = np.dtype("<i4")
_LOCAL_HEADER = 30  # bytes before a zip member's name, of which the last four are the lengths of the name and of what follows it


class CannotBeMapped(UserError):
    """The file is whole, but stored in a way that no memory map can read: compressed, as upstream's are, or numbers of another type."""


class MappedInts:
    """An integer array [n, width] of an open .npz, in memory that belongs to the file. [first:end] and take(rows) give copies [.., width].

    As bytes, because NumPy would first copy the whole of an array that does not lie at a multiple of four.
    """

    def __init__(self, file: IO[bytes], archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], dtype: np.dtype = _INT32):
        """Raises ValueError where the array has another shape or type, or cannot be mapped as it is stored."""
        start = _start_of_array(file, archive, name, shape, dtype)
        self._dtype = dtype
        self._width = int(np.prod(shape[1:], dtype=np.int64))
        self._by_slice, self._by_row = (self._map(file, start, shape[0], advice) for advice in (mmap.MADV_NORMAL, mmap.MADV_RANDOM))

    def _map(self, file: IO[bytes], start: int, num_rows: int, advice: int) -> np.ndarray:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        # for single rows: a file that fits into memory is warm sooner without (measured: 30 us a page with, until it has been read once), but
        # of one that does not, every row would bring 128 KiB with it, every time
        memory.madvise(advice)
        row_bytes = self._width * self._dtype.itemsize
        return np.frombuffer(memory, np.uint8, num_rows * row_bytes, start).reshape(num_rows, row_bytes)

    def __len__(self) -> int:
        return len(self._by_slice)

    def __getitem__(self, rows: slice) -> np.ndarray:
        return self._by_slice[rows].copy().view(self._dtype)

    def take(self, rows: np.ndarray) -> np.ndarray:
        """rows [m] whole numbers from 0; IndexError beyond the end."""
        return self._by_row.take(rows, axis=0).view(self._dtype)


class MappedRows:
    """Stands for the packed tensor [n, 40] int32 = label | 13 counts | 26 ids: [first:end] and index_select(0, rows) are that tensor's."""

    def __init__(self, path: Path, arrays: tuple[MappedInts, MappedInts, MappedInts], counts: np.ndarray):
        """arrays: y, X_int, X_cat; counts [26] ids of each column."""
        self._path, self._arrays = path, arrays
        largest = np.concatenate([[1], np.full(NUM_DENSE, 2**31 - 1), counts - 1])
        self._largest = largest.astype(np.uint32)

    def __len__(self) -> int:
        return len(self._arrays[0])

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return self._checked([array[rows] for array in self._arrays])

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        index = rows.numpy()
        return self._checked([array.take(index) for array in self._arrays])

    def _checked(self, columns: list[np.ndarray]) -> torch.Tensor:
        packed = np.concatenate(columns, axis=1)
        bad = packed.view(np.uint32) > self._largest  # a negative number is a large one here
        if bad.any():
            row, column = (int(place) for place in np.argwhere(bad)[0])
            what = f"{COLUMNS[column]} {packed[row, column]}, at most {self._largest[column]}"
            raise UserError(f"{self._path}: holds a label, a count or an id that is out of range ({what}); {way_out(self._path)}")
        return torch.from_numpy(packed)


def read_processed(path: Path, *, mapped: bool, progress: bool = False) -> Processed:
    """A processed file, or an arrays folder of Criteo's rows; `packed` is a tensor, or mapped. Raises UserError where it is neither."""
    if not path.is_dir():
        if mapped:
            return map_npz(path, progress=progress)
        data = read_npz(path)
        data.packed = torch.from_numpy(data.packed)
        return data
    arrays = open_arrays(path, mapped, progress=progress)
    manifest = arrays.manifest
    if manifest.number_type != "int32" or len(manifest.dense) != NUM_DENSE or len(manifest.one_hot) != NUM_SPARSE or arrays.bags:
        raise UserError(f"{path}: holds {len(manifest.dense)} dense columns and {len(manifest.tables)} tables; Criteo has 13 counts and 26 ids")
    counts, days = np.array([table.rows for table in manifest.tables]), np.array([part.rows for part in manifest.parts])
    return Processed(arrays.rows, counts, days, _meta_of(manifest, path))


def _meta_of(manifest: Manifest, path: Path) -> Meta:
    """What an .npz of the same rows says of itself."""
    try:
        raws = tuple(RawFingerprint(**part.raw) for part in manifest.parts)
        flags, older = manifest.flags, manifest.flags["vocabulary"]
        return Meta(
            max_ind_range=int(flags["max_ind_range"]),
            sub_sample_rate=float(flags["sub_sample_rate"]),
            days=len(raws),
            raw=raws[0],
            raw_rows=manifest.raw_rows,
            raws=raws if any(raw != raws[0] for raw in raws) else (),
            min_frequency=int(flags["min_frequency"]),
            vocabulary=RawFingerprint(**older) if older else None,
            draws=str(manifest.source.get("draws", "")),
        )
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path}: its manifest is not of Criteo's rows ({cause(error)}); {way_out(path)}") from None


def map_npz(path: Path, *, progress: bool = False) -> Processed:
    """The processed file with MappedRows as `packed`; its checksums are compared once. Raises UserError where it is damaged or something else;
    CannotBeMapped."""
    with reading(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        counts = read_counts(archive, path)
        with archive.open("y.npy") as member:
            shape = read_header(member)[0]
        if len(shape) != 1 or shape[0] < 1:
            raise UserError(f"{path}: y has shape {shape}, not [rows]; {way_out(path)}")
        shapes = {"y": shape, "X_int": (*shape, NUM_DENSE), "X_cat": (*shape, NUM_SPARSE)}
        try:
            arrays = tuple(MappedInts(file, archive, name, shape) for name, shape in shapes.items())
        except ValueError as error:
            raise CannotBeMapped(f"{path}: cannot be memory-mapped: {cause(error)}; {way_out(path)}, or leave --memory-map out") from None
        check_once(path, file, archive, progress=progress)
        return Processed(MappedRows(path, arrays, counts), counts, *read_rest(archive))


def _start_of_array(file: IO[bytes], archive: zipfile.ZipFile, name: str, shape: tuple[int, ...], wanted: np.dtype) -> int:
    """Offset in the file of the array's first number."""
    info = archive.getinfo(f"{name}.npy")
    if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed, as upstream's files are")
    with archive.open(info) as member:  # zipfile compares both of the member's headers
        found, by_column, dtype = read_header(member)
        header_bytes = member.tell()
    if found != shape or dtype != wanted or (by_column and len(shape) > 1):
        order = ", column after column" if by_column and len(shape) > 1 else ""
        raise ValueError(f"{name} is {dtype.str} {list(found)}{order}, not {wanted.str} {list(shape)}")
    if info.file_size != header_bytes + int(np.prod(shape, dtype=np.int64)) * wanted.itemsize:
        raise ValueError(f"{name} is not as long as its header says")
    file.seek(info.header_offset)
    local = file.read(_LOCAL_HEADER)
    name_bytes, extra_bytes = (int.from_bytes(local[at : at + 2], "little") for at in (26, 28))
    return info.header_offset + _LOCAL_HEADER + name_bytes + extra_bytes + header_bytes
