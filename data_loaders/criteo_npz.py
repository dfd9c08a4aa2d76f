"""The processed file: one .npz of int32 arrays that upstream can read too, and upstream's own, read without holding anything twice.

Ours has what upstream's has (X_cat, X_int, y, counts; X_cat int32 instead of float64) and total_per_file and `meta`, a JSON text: format
version, the flags it was made with, and the raw file's name, size and SHA-256 of its first and last MiB as stored (compressed, if it is).
So a file made with other flags or from another raw file is refused; upstream uses it silently. It is not compressed:
measured, a row costs 0.3 us of CPU to write, 2.0 at deflate's fastest level and 9.4 at its default one.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import stat
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from tqdm import tqdm

from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from dlrm_xla.specs import UserError

FORMAT_VERSION = 1
# What zipfile and NumPy raise on bytes that are not an .npz, or no longer one
DAMAGE = (
    zipfile.BadZipFile, zlib.error, struct.error, tokenize.TokenError, SyntaxError, EOFError, ValueError, KeyError, TypeError, RuntimeError,
    OverflowError, MemoryError,
)  # fmt: skip
_EDGE_BYTES = 1 << 20
_CHUNK_ROWS = 1 << 16
_OPTIONAL = ("raws", "min_frequency", "vocabulary", "draws")  # fields of Meta


@dataclass(frozen=True)
class RawFingerprint:
    """Which raw file: name for the reader, bytes and the edges' SHA-256 (of the file as stored) for the check."""

    name: str
    size: int
    head_sha256: str
    tail_sha256: str

    @classmethod
    def of(cls, path: Path) -> "RawFingerprint":
        """Reads at most 2 MiB. Raises OSError, also for a pipe, which can be read once only."""
        if stat.S_ISFIFO(os.stat(path).st_mode):
            raise OSError(errno.ESPIPE, "it is a pipe, and a raw file is read twice; write it to a file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(_EDGE_BYTES)
            file.seek(max(0, size - _EDGE_BYTES))
            tail = file.read(_EDGE_BYTES)
        return cls(path.name, size, hashlib.sha256(head).hexdigest(), hashlib.sha256(tail).hexdigest())

    def same_file(self, other: "RawFingerprint") -> bool:
        """The name may differ: a file that was moved is still the same."""
        return (self.size, self.head_sha256, self.tail_sha256) == (other.size, other.head_sha256, other.tail_sha256)


@dataclass(frozen=True)
class Meta:
    """What a processed file was made from and with.

    raw            the raw file (Terabyte: day 0's)
    raw_rows       rows of the raw files, the ones that sub-sampling left out included
    raws           Terabyte: the files of all days, in their order
    min_frequency  ids seen less often share id 0; 0: every id has one of its own
    vocabulary     the older result (npz, or its manifest) whose vocabularies numbered the ids
    draws          SHA-256 of the random state that the sub-sampling started from; "": there was none, or (earlier versions) it was not noted
    """

    max_ind_range: int
    sub_sample_rate: float
    days: int
    raw: RawFingerprint
    raw_rows: int = 0
    format: int = FORMAT_VERSION
    raws: tuple[RawFingerprint, ...] = ()
    min_frequency: int = 0
    vocabulary: RawFingerprint | None = None
    draws: str = ""

    def to_json(self) -> str:
        """JSON on one line. What was not asked for is left out, so that a file made without it is the one that earlier versions made."""
        fields = asdict(self)
        return json.dumps({name: value for name, value in fields.items() if name not in _OPTIONAL or value})

    @classmethod
    def from_json(cls, text: str) -> "Meta":
        """Raises ValueError, KeyError or TypeError where it is not ours."""
        fields = json.loads(text)
        if fields["format"] != FORMAT_VERSION:
            raise ValueError(f"format {fields['format']}, while this version reads format {FORMAT_VERSION}")
        older = fields.get("vocabulary")
        made = {"raw": RawFingerprint(**fields["raw"]), "raws": tuple(RawFingerprint(**raw) for raw in fields.get("raws", ()))}
        return cls(**{**fields, **made, "vocabulary": RawFingerprint(**older) if older else None})

    def same_rows(self, other: "Meta") -> bool:
        """Whether both were made from the same files with the same flags. Names of files may differ: moved ones are still the same."""
        draws = self.draws if other.draws else ""  # unknown: nothing speaks against it
        return replace(_nameless(self), draws=draws) == replace(_nameless(other), draws=other.draws if self.draws else "")


def _nameless(meta: Meta) -> Meta:
    older = replace(meta.vocabulary, name="") if meta.vocabulary else None
    return replace(meta, raw=replace(meta.raw, name=""), raws=tuple(replace(raw, name="") for raw in meta.raws), vocabulary=older)


@dataclass
class Processed:
    """A processed file.

    packed          [n, 40] int32 = y | 13 counts | 26 ids, in memory; or criteo_map.MappedRows, which stands for it
    counts          [26] distinct ids
    total_per_file  [7], Terabyte [24], rows of each day, or None
    meta            None where the file is upstream's
    """

    packed: Any
    counts: np.ndarray
    total_per_file: np.ndarray | None
    meta: Meta | None


# ---- writing ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path, way_out: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is whole. It is written beside, as .<name>.<process>.<random>.tmp, under a lock,
    so that what an interrupted run left is told from what another run is still writing, and removed. The random part is for processes of
    one number, in two containers that share a disk. An OSError becomes a UserError that ends in way_out.
    """
    temporary = None
    try:
        _remove_stale(path)
        file, temporary = _open_locked(path)
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}; {way_out}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _open_locked(path: Path) -> tuple[IO[bytes], Path]:
    """A new file beside `path`, which is nobody else's, locked; and its name. Raises OSError."""
    while True:
        temporary = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
        file = open(temporary, "xb")
        with contextlib.suppress(OSError):  # a file system without locks: only the cleaning up is lost
            fcntl.flock(file, fcntl.LOCK_EX)  # waits, at most for another run that cleans up and takes it for stale
        if temporary.exists():
            return file, temporary
        file.close()  # that run has removed it


def _remove_stale(path: Path) -> None:
    """Removes unfinished files of earlier runs: those whose lock nobody holds."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError), open(stale, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            stale.unlink()


def write_npz(file: IO[bytes], arrays: dict[str, tuple[tuple[int, ...], Iterator[np.ndarray]]]) -> None:
    """An uncompressed .npz; each array is (shape, its rows in pieces), so that it need not exist as a whole. Same values, same bytes."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, (shape, pieces) in arrays.items():
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as member:
                header_written = False
                for piece in pieces:
                    if not header_written:
                        header = {"descr": np.lib.format.dtype_to_descr(piece.dtype), "fortran_order": False, "shape": shape}
                        np.lib.format.write_array_header_1_0(member, header)
                        header_written = True
                    member.write(np.ascontiguousarray(piece).reshape(-1).view(np.uint8))


# ---- reading ----------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What goes wrong while a processed file is read becomes one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--processed-data-file={path}: cannot read it: {error.strerror or error}") from None
    except UserError:
        raise
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory ({cause(error)}); add --memory-map") from None
    except DAMAGE as error:
        raise UserError(f"{path}: damaged, or not a processed Criteo file ({cause(error)}); {way_out(path)}") from None


def check_once(path: Path, file: IO[bytes], archive: zipfile.ZipFile, *, progress: bool = False) -> None:
    """Reads every member to its end, which compares the checksums, unless a stamp beside the file, <name>.verified.json, says that this was done
    with the very same file (size, time of change, inode). Raises one of DAMAGE."""
    found = os.fstat(file.fileno())
    stamp, note = [found.st_size, found.st_mtime_ns, found.st_ino], path.with_name(f"{path.name}.verified.json")
    with contextlib.suppress(OSError, ValueError):
        if json.loads(note.read_bytes()) == stamp:
            return
    with tqdm(total=found.st_size, unit="B", unit_scale=True, desc=f"Checking {path.name}", disable=not progress) as bar:
        _read_to_the_end(archive, bar)
    with contextlib.suppress(UserError), atomic_write(note, "") as written:  # a folder that cannot be written
        written.write(json.dumps(stamp).encode())


def _read_to_the_end(archive: zipfile.ZipFile, bar: tqdm) -> None:
    for name in archive.namelist():
        with archive.open(name) as member:
            while piece := member.read(1 << 20):
                bar.update(len(piece))


def read_npz(path: Path) -> Processed:
    """A processed file of ours or of upstream, its values checked. Raises UserError where it is damaged or something else."""
    with reading(path), open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        return _read(archive, path)


def read_array(path: Path, name: str) -> np.ndarray:
    """One array of an .npz. Raises OSError or one of DAMAGE. (np.load leaves a damaged file open when it is given its name.)"""
    with open(path, "rb") as file, np.load(file, allow_pickle=False) as data:
        return data[name]


def _read(archive: zipfile.ZipFile, path: Path) -> Processed:
    counts = read_counts(archive, path)
    with archive.open("y.npy") as member:
        shape = read_header(member)[0]
    if len(shape) != 1 or shape[0] < 1:
        raise UserError(f"{path}: y has shape {shape}, not [rows]; {way_out(path)}")
    n = shape[0]
    if n > archive.getinfo("y.npy").file_size:  # before memory is asked for
        raise ValueError("y is shorter than its header says")
    packed = np.empty((n, 1 + NUM_DENSE + NUM_SPARSE), dtype=np.int32)
    first = 0
    for name, width in (("y", 1), ("X_int", NUM_DENSE), ("X_cat", NUM_SPARSE)):
        limits = counts if name == "X_cat" else np.full(width, 2 if name == "y" else 2**31)
        _read_into(archive, name, packed[:, first : first + width], limits.astype(np.int64), path)
        first += width
    return Processed(packed, counts, *read_rest(archive))


def read_counts(archive: zipfile.ZipFile, path: Path) -> np.ndarray:
    """[26] int64. Raises KeyError where one of the arrays is missing, UserError where the counts are not counts."""
    members = _members(archive)
    for name in ("X_cat", "X_int", "y", "counts"):
        if name not in members:
            raise KeyError(name)
    counts = read_small(archive, "counts")
    if counts.shape != (NUM_SPARSE,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise UserError(f"{path}: counts is not {NUM_SPARSE} whole numbers above 0; {way_out(path)}")
    return counts.astype(np.int64)


def read_rest(archive: zipfile.ZipFile) -> tuple[np.ndarray | None, Meta | None]:
    """total_per_file and meta, which upstream's file lacks. Raises one of DAMAGE."""
    members = _members(archive)
    total = read_small(archive, "total_per_file") if "total_per_file" in members else None
    meta = Meta.from_json(str(read_small(archive, "meta"))) if "meta" in members else None
    return total, meta


def _members(archive: zipfile.ZipFile) -> set[str]:
    return {name.removesuffix(".npy") for name in archive.namelist()}


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether it is stored column after column, type."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)


def read_small(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """One array, as a copy."""
    with archive.open(f"{name}.npy") as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _read_into(archive: zipfile.ZipFile, name: str, out: np.ndarray, limits: np.ndarray, path: Path) -> None:
    """Array `name` to out [n, width] int32, in pieces; a column's values must be whole numbers from 0 to its limit - 1."""
    with archive.open(f"{name}.npy") as member:
        shape, by_column, dtype = read_header(member)
        if shape != (out.shape if name != "y" else out.shape[:1]) or dtype.kind not in "iuf":
            raise UserError(f"{path}: {name} is {dtype} {list(shape)}, not whole numbers {list(out.shape)}; {way_out(path)}")
        # upstream's X_cat is stored column after column
        for first in range(out.shape[1] if by_column else 1):
            columns = slice(first, first + 1) if by_column else slice(None)
            for start in range(0, len(out), _CHUNK_ROWS):
                piece = out[start : start + _CHUNK_ROWS, columns]
                _read_piece(member, dtype, piece, limits[columns], (name, path, start, first))
        if member.read(1):  # reading to the end also checks the checksum
            raise ValueError(f"{name} is longer than its header says")


def _read_piece(member: IO[bytes], dtype: np.dtype, piece: np.ndarray, limits: np.ndarray, where: tuple[str, Path, int, int]) -> None:
    """The next numbers to piece [rows, columns]. where: name of the array, of the file, number of the first row, of the first column."""
    name, path, first_row, first_column = where
    values = np.frombuffer(member.read(piece.size * dtype.itemsize), dtype=dtype, count=piece.size).reshape(piece.shape)
    good = (values >= 0) & (values < limits)
    if dtype.kind == "f":
        good &= values == np.floor(values)
    if not good.all():
        bad = tuple(int(place) for place in np.argwhere(~good)[0])
        rule = {"y": "0 or 1", "X_int": "from 0", "X_cat": "from 0 to its column's count - 1"}[name]
        raise UserError(
            f"{path}: {name} holds a value that is not a whole number {rule} (row {first_row + bad[0]}, column {first_column + bad[1]}: "
            f"{values[bad]:g}, count {limits[bad[1]]}); {way_out(path)}"
        )
    piece[:] = values


def cause(error: BaseException) -> str:
    """What an exception says, on one line."""
    text = f"no array {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
    return " ".join(text.split())[:200]


def way_out(path: Path) -> str:
    """What to do about a processed file that is of no use."""
    return f"delete {path.name} to have it made again, or name another --processed-data-file"
