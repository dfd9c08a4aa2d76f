"""A column's vocabulary: which key has which id, and how often it was seen. Made here, or taken from an older result, with its keys' ids.

Vocabularies of unfinished work lie one after the other in the file vocabulary.bin: keys, then counts, of each column.
"""

import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from data_loaders.blocks import Categorical
from data_loaders.criteo_npz import DAMAGE, Meta, RawFingerprint, cause, read_small
from data_loaders.criteo_text import NUM_SPARSE
from data_loaders.manifest import CHUNK_BYTES, NAME, Manifest, vocabulary_files
from data_loaders.numbering import PIECE, RUNS_BYTES_PER_ID, Keys, RankedBitmap, Runs, TooLittleMemory, bitmap_bytes, encode
from data_loaders.spill import crc32, write_all, write_at
from dlrm_xla.specs import UserError


@dataclass(frozen=True)
class Vocabulary:
    """Of one column, in vocabulary.bin. rows: N, ids; shared: id 0 stands for rare and unknown keys; keys_at, counts_at: places in the file."""

    rows: int
    shared: bool
    keys_at: int
    counts_at: int
    end: int


def stored(file: IO[bytes], dtype: type, at: int, count: int, piece: int = PIECE) -> Iterator[np.ndarray]:
    """`count` numbers that lie in a file from byte `at` on, some at a time. Another position of the file does not matter."""
    size = np.dtype(dtype).itemsize
    for first in range(0, count, piece):
        data = os.pread(file.fileno(), min(piece, count - first) * size, at + first * size)
        yield np.frombuffer(data, dtype)


def count_ids(pieces: Callable[[], Iterator[np.ndarray]], num_ids: int, memory: int, out: IO[bytes]) -> None:
    """Writes how often each id comes, [num_ids] int64. Where `memory` bytes do not hold that, the ids are read more than once."""
    span = max(memory // 10, 1 << 16)
    for first in range(0, num_ids, span):
        counts = np.zeros(min(span, num_ids - first), np.int64)
        for ids in pieces():
            if num_ids > span:
                ids = ids[(ids >= first) & (ids < first + len(counts))] - np.int32(first)
            np.add.at(counts, ids, 1)  # 2 ns an id where bincount, which fills all num_ids numbers for every piece, is quadratic
        write_all(out, counts)


def share_rare(
    ids_file: IO[bytes],
    ids_at: int,
    total: int,
    keys: tuple[IO[bytes], type],
    counts: IO[bytes],
    num_ids: int,
    least: int,
    memory: int,
    out: IO[bytes],
) -> int:
    """Ids seen fewer than `least` times become id 0, the others are numbered from 1 in the same order; ids_file is rewritten in place.

    keys, counts: files of num_ids numbers each. Appends the new keys (a placeholder 0 first) and counts to `out`; returns the new number of ids.
    """
    if 4 * num_ids + 8_000_000 > memory:
        raise TooLittleMemory(4 * num_ids + 8_000_000, memory)
    keys_file, dtype = keys
    new_id, next_id, rare = np.zeros(num_ids, np.int32), 1, 0
    for number, seen in enumerate(stored(counts, np.int64, 0, num_ids)):
        kept = np.flatnonzero(seen >= least)
        new_id[number * PIECE + kept] = np.arange(next_id, next_id + len(kept), dtype=np.int32)
        next_id += len(kept)
        rare += int(seen.sum() - seen[kept].sum())
    for number, ids in enumerate(stored(ids_file, np.int32, ids_at, total)):
        write_at(ids_file.fileno(), new_id[ids], ids_at + number * PIECE * 4)
    for file, kind, first in ((keys_file, dtype, 0), (counts, np.int64, rare)):
        write_all(out, np.array([first], kind))
        for number, values in enumerate(stored(file, kind, 0, num_ids)):
            write_all(out, values[new_id[number * PIECE : number * PIECE + len(values)] > 0])
    return next_id


# ---- an older result's --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OldColumn:
    """read() gives the keys in id order, [rows]."""

    rows: int
    shared: bool
    key_bits: int
    modulo: int
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class OldVocabularies:
    """Those of a result: an arrays folder or an npz. fingerprint: of its manifest or of the npz."""

    path: Path
    fingerprint: RawFingerprint
    columns: dict[str, OldColumn]

    @classmethod
    def of(cls, path: Path) -> "OldVocabularies":
        """Raises UserError where there is none."""
        folder = path.is_dir()
        try:
            fingerprint = RawFingerprint.of(path / NAME if folder else path)
            columns = _of_arrays(path) if folder else _of_npz(path)
        except OSError as error:
            raise UserError(f"--vocabulary={path}: cannot read it: {error.strerror or error}; {_WAY_OUT}") from None
        except UserError:
            raise
        except DAMAGE as error:
            raise UserError(f"--vocabulary={path}: damaged, or not a result with vocabularies ({cause(error)}); {_WAY_OUT}") from None
        return cls(path, fingerprint, columns)

    def column(self, wanted: Categorical) -> OldColumn:
        """Raises UserError where it has no such column."""
        found = self.columns.get(wanted.name)
        if found is None:
            names = ", ".join(list(self.columns)[:30])
            raise UserError(f"--vocabulary={self.path}: has no column {wanted.name}; its columns are {names}")
        for what, old, now in (("keys of {} bits", found.key_bits, wanted.key_bits), ("max_ind_range {}", found.modulo, wanted.modulo)):
            if old != now:
                raise UserError(
                    f"--vocabulary={self.path}: column {wanted.name} has {what.format(old)} there and {what.format(now)} here; make them the same"
                )
        return found


NPZ_SHARED = "vocabulary_shared"  # the array of an npz of ours that says whether id 0 of every column is shared
_WAY_OUT = "name an arrays folder or a processed .npz that this version made"


def _of_arrays(folder: Path) -> dict[str, OldColumn]:
    manifest = Manifest.from_json((folder / NAME).read_text())
    return {
        table.name: OldColumn(
            table.rows, table.shared, table.key_bits, table.modulo, lambda table=table: _keys_of_arrays(folder, manifest, table.name, table.key_bits)
        )
        for table in manifest.tables
    }


def _keys_of_arrays(folder: Path, manifest: Manifest, column: str, key_bits: int) -> np.ndarray:
    name = vocabulary_files(column)[0]
    try:
        data = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"--vocabulary={folder}: cannot read {name}: {error.strerror}; {_WAY_OUT}") from None
    view, entry = memoryview(data), manifest.files[name]
    if len(data) != entry.bytes or tuple(crc32(view[at : at + CHUNK_BYTES]) for at in range(0, len(data), CHUNK_BYTES)) != entry.crc32:
        raise UserError(f"--vocabulary={folder}: {name} is damaged; {_WAY_OUT}")
    return np.frombuffer(data, f"<u{key_bits // 8}")


def _of_npz(path: Path) -> dict[str, OldColumn]:
    with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
        meta, counts = Meta.from_json(str(read_small(archive, "meta"))), read_small(archive, "counts")
        shared = bool(read_small(archive, NPZ_SHARED))  # KeyError where the file has no vocabularies
    modulo = meta.max_ind_range if 0 < meta.max_ind_range < 2**32 else 0
    return {
        f"C{column + 1}": OldColumn(int(counts[column]), shared, 32, modulo, lambda column=column: _keys_of_npz(path, column))
        for column in range(NUM_SPARSE)
    }


def _keys_of_npz(path: Path, column: int) -> np.ndarray:
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return read_small(archive, npz_member(column)).astype(np.uint32, casting="equiv")
    except (OSError, *DAMAGE) as error:
        raise UserError(f"--vocabulary={path}: damaged ({cause(error)}); {_WAY_OUT}") from None


def npz_member(column: int) -> str:
    """Name of the array of a column's keys in an npz of ours."""
    return f"vocabulary_{column}"


def encode_with(keys: Keys, name: str, old: OldColumn, path: Path, memory: int, ids_file: IO[bytes]) -> np.ndarray:
    """Writes the old ids of all keys to ids_file, [total] int32; returns the old keys. Raises UserError for a key that it lacks and has no shared
    id for, TooLittleMemory."""
    if old.rows * old.key_bits // 8 > memory:
        raise TooLittleMemory(old.rows * (old.key_bits // 8 + RUNS_BYTES_PER_ID[old.key_bits // 8] + 12), memory)
    known = old.read()
    if len(known) != old.rows:
        raise UserError(f"--vocabulary={path}: column {name} has {len(known)} keys for {old.rows} ids: damaged; {_WAY_OUT}")
    find = _finder(known, old.shared, memory - known.nbytes)
    for piece in keys.pieces(0):
        distinct, numbers = encode(piece)
        ids = find(distinct)
        if (ids < 0).any():
            if not old.shared:
                key = int(distinct[np.flatnonzero(ids < 0)[0]])
                raise UserError(
                    f"--vocabulary={path}: column {name}: key {key} (hexadecimal {key:0{old.key_bits // 4}x}) is not in it; make the vocabulary with "
                    "--min-frequency=1 to have unknown keys share one id"
                )
            ids = np.maximum(ids, 0)
        write_all(ids_file, ids[numbers])
    return known


def _finder(known: np.ndarray, shared: bool, memory: int) -> Callable[[np.ndarray], np.ndarray]:
    """A look-up of ids, -1 for unknown keys. The first of `known` is a placeholder where `shared`."""
    first = int(shared)
    sorting = (RUNS_BYTES_PER_ID[known.itemsize] + 12) * len(known)
    if sorting <= memory or known.itemsize == 8:
        if sorting > memory:
            raise TooLittleMemory(sorting, memory)
        runs = Runs(known.dtype)
        if len(known) > first:
            runs.add(known[first:], np.arange(first, len(known), dtype=np.int32))
        return runs.find
    if bitmap_bytes(2**32, len(known)) > memory:
        raise TooLittleMemory(min(sorting, bitmap_bytes(2**32, len(known))), memory)
    bitmap = RankedBitmap(2**32)
    for at in range(first, len(known), PIECE):
        bitmap.mark(known[at : at + PIECE])
    bitmap.number((known[at : at + PIECE] for at in range(first, len(known), PIECE)), len(known) - first)

    def find(keys: np.ndarray) -> np.ndarray:
        ids = bitmap.find(keys)
        return np.where(ids >= 0, ids + np.int32(first), np.int32(-1))

    return find
