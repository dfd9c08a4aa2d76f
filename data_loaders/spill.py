"""What unfinished work leaves on the disk: the folder <out>.parts, with rows as segments and a record of what is whole.

Everything appears under its name only when it is whole: written as NAME.tmp, fsync, rename, fsync of the folder. So what a kill -9, or a power
cut, leaves is either whole or ends in .tmp.

A segment is one file: sections one after the other (labels, dense, when, then lengths and keys of each column), a footer in JSON (rows, parts, the
mark behind it, place, size and CRC-32 of every section), and eight bytes: size and CRC-32 of the footer.
"""

import contextlib
import fcntl
import json
import os
import shutil
import struct
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from data_loaders.blocks import Block, Mark
from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

_TRAILER = struct.Struct("<II")
_DENSE, _WHEN, _COLUMNS = 1, 2, 3  # numbers of the sections; labels are section 0
STATE = "state.json"


def crc32(data, value: int = 0) -> int:
    """CRC-32, of 9 GB a second where zlib's does 2."""
    return isal_zlib.crc32(data, value)


# ---- files that are whole or not there ------------------------------------------------------------------------------------------


def write_whole(path: Path, pieces: Iterable[Any]) -> None:
    """A file of these bytes, whole or not there."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb", buffering=0) as file:
        for piece in pieces:
            write_all(file, piece)
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def write_all(file, piece: Any) -> None:
    """All bytes of a piece; an unbuffered file may take only some of them at a time."""
    rest = memoryview(piece).cast("B") if len(piece) else memoryview(b"")
    while len(rest):
        rest = rest[file.write(rest) :]


def write_at(number: int, data: Any, at: int) -> int:
    """All bytes of data into an open file from byte `at` on; returns where they end. A call may write only some of them."""
    rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while len(rest):
        done = os.pwrite(number, rest, at)
        at, rest = at + done, rest[done:]
    return at


def remove(path: Path) -> None:
    """A file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# ---- the folder -----------------------------------------------------------------------------------------------------------------


def parts_folder(out: Path) -> Path:
    """Where unfinished work on `out` lies."""
    return out.with_name(f"{out.name}.parts")


class Busy(UserError):
    """Another process is making the same thing."""


@contextlib.contextmanager
def locked_folder(folder: Path, what: str) -> Iterator[None]:
    """The folder, made where it is missing, for this process alone. Raises Busy where another one has it; OSError."""
    number = _lock(folder, what)
    try:
        yield
    finally:
        os.close(number)


def _lock(folder: Path, what: str) -> int:
    while True:
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
        number = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(number)
            raise Busy(f"{what}: another run is making it (in {folder}); wait for that run, or name another place") from None
        except OSError:  # a file system without locks
            return number
        with contextlib.suppress(OSError):
            if os.path.samestat(os.stat(folder), os.fstat(number)):
                return number
        os.close(number)  # removed by the run that held it, between our opening and our lock


def read_json(path: Path) -> Any:
    """None where the file is missing or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def write_json(path: Path, content: Any) -> None:
    write_whole(path, [json.dumps(content).encode()])


# ---- segments -------------------------------------------------------------------------------------------------------------------


@dataclass
class Segment:
    """Consecutive rows on the disk. parts: [(part, rows)] in order; mark: behind it; sections [S, 3] int64: place, bytes, CRC-32."""

    path: Path
    rows: int
    parts: list[tuple[int, int]]
    mark: Mark
    sections: np.ndarray

    def labels(self, dtype: type) -> np.ndarray:
        """[rows]"""
        return self._read(0, dtype)

    def dense(self, dtype: type, width: int) -> np.ndarray:
        """[rows, width]; a segment may have no row, where sub-sampling left all of its rows out."""
        return self._read(_DENSE, dtype).reshape(self.rows, width)

    def when(self) -> np.ndarray:
        """[rows] int64, or [0] where there is none."""
        return self._read(_WHEN, np.int64)

    def lengths(self, column: int) -> np.ndarray:
        """[rows] int32 of a multi-hot column, else [0]."""
        return self._read(_COLUMNS + 2 * column, np.int32)

    def keys(self, column: int, dtype: type) -> np.ndarray:
        return self._read(_COLUMNS + 2 * column + 1, dtype)

    def num_keys(self, column: int, dtype: type) -> int:
        return int(self.sections[_COLUMNS + 2 * column + 1, 1]) // np.dtype(dtype).itemsize

    def _read(self, number: int, dtype: type) -> np.ndarray:
        place, size, checksum = (int(value) for value in self.sections[number])
        array = np.empty(size // np.dtype(dtype).itemsize, dtype)
        if size:
            with open(self.path, "rb", buffering=0) as file:
                file.seek(place)
                view = memoryview(array).cast("B")
                if file.readinto(view) != size or crc32(view) != checksum:
                    raise UserError(f"{self.path}: damaged on the disk; delete the folder {self.path.parent.name} and run again")
        return array


def segment_path(folder: Path, number: int) -> Path:
    return folder / f"segment_{number:06}.bin"


def write_segment(folder: Path, number: int, blocks: list[Block], mark: Mark) -> Segment:
    """Writes the rows of some blocks as segment `number`. Raises OSError."""
    sections, pieces, place = [], [], 0
    for arrays in _sections(blocks):
        size, checksum = 0, 0
        for array in arrays:
            if array.size:
                data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
                pieces.append(data)
                size, checksum = size + len(data), crc32(data, checksum)
        sections.append((place, size, checksum))
        place += size
    parts: list[tuple[int, int]] = []
    for block in blocks:
        if parts and parts[-1][0] == block.part:
            parts[-1] = (block.part, parts[-1][1] + block.num_rows)
        else:
            parts.append((block.part, block.num_rows))
    rows = sum(block.num_rows for block in blocks)
    footer = json.dumps({"rows": rows, "parts": parts, "mark": asdict(mark), "sections": sections}).encode()
    path = segment_path(folder, number)
    write_whole(path, [*pieces, footer, _TRAILER.pack(len(footer), crc32(footer))])
    return Segment(path, rows, parts, mark, np.array(sections, np.int64))


def _sections(blocks: list[Block]) -> Iterator[list[np.ndarray]]:
    yield [block.labels for block in blocks]
    yield [block.dense for block in blocks]
    yield [block.when for block in blocks if block.when is not None]
    for column in range(len(blocks[0].keys)):
        yield [block.lengths[column] for block in blocks if block.lengths[column] is not None]
        yield [block.keys[column] for block in blocks]


def read_segments(folder: Path) -> list[Segment]:
    """The whole segments of a folder, from the first one to the last before one that is missing or damaged."""
    segments: list[Segment] = []
    while (segment := _read_footer(segment_path(folder, len(segments)))) is not None:
        segments.append(segment)
    return segments


def _read_footer(path: Path) -> Segment | None:
    try:
        with open(path, "rb") as file:
            file.seek(-_TRAILER.size, os.SEEK_END)
            size, checksum = _TRAILER.unpack(file.read())
            start = file.seek(-_TRAILER.size - size, os.SEEK_END)
            footer = file.read(size)
        if crc32(footer) != checksum:
            return None
        fields = json.loads(footer)
        sections = np.array(fields["sections"], np.int64)
        if int(sections[-1, 0] + sections[-1, 1]) != start:
            return None
        return Segment(path, fields["rows"], [tuple(part) for part in fields["parts"]], Mark(**fields["mark"]), sections)
    except (OSError, ValueError, KeyError, TypeError, IndexError, struct.error):
        return None
