"""Ids of a column in order of first appearance, in bounded memory whatever the number of keys.

A column that fits goes through one pyarrow hash table. A larger one is read in pieces: pyarrow finds a piece's distinct keys, and only those meet
what is known so far, which is sorted runs (12 or 16 bytes a key, twice that while they are merged) or, for 32-bit keys, a bitmap of all 2^32 keys:
512 MiB whatever the number of keys. The bitmap says only which keys are new; a second pass finds the id of a key by its rank among
the set bits (134 MB of counts) in a table of 4 bytes an id. Measured on keys that are all distinct, pyarrow's table takes up to 16 bytes
(32-bit keys; else 24) for each of 4^k slots, at most half of them in use, and a quarter of that again while it grows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_loaders.spill import write_all
from dlrm_xla.specs import MAX_INT32

PIECE = 250_000  # keys; just below 2^18, where pyarrow's hash table grows from 8 to 33 MB
RUNS_BYTES_PER_ID = {4: 32, 8: 44}  # by a key's bytes: keys and ids, a second copy while runs are merged, and the order of the merge
_BLOCK_BITS = 256  # of the bitmap: ranks are counted up to each such block, and inside it up to each word


class TooLittleMemory(Exception):
    """args: bytes that are enough, besides what the process already holds, and the bytes that there were."""


class TooManyIds(Exception):
    """args[0]: how many; they travel as int32."""


@dataclass(frozen=True)
class Keys:
    """A column's keys on the disk. pieces(first) gives them from key number `first` on, which is where a piece of pieces(0) begins."""

    total: int
    dtype: type
    bound: int  # all keys are below it
    pieces: Callable[[int], Iterator[np.ndarray]]


def whole_bytes(total: int, key_bytes: int) -> int:
    """Upper bound of what number_ids takes for a column of `total` distinct keys, as one hash table."""
    slots = 32
    while slots <= 2 * total:
        slots *= 4
    return (2 * key_bytes + 8) * total + (16 if key_bytes == 4 else 24) * slots * 5 // 4


def bitmap_bytes(bound: int, num_ids: int) -> int:
    """What RankedBitmap takes for keys below `bound`, and for a piece."""
    return bound // 8 + bound // _BLOCK_BITS * 4 + bound // 64 + 4 * num_ids + 24_000_000


def enough_bytes(keys: Keys) -> int:
    """Memory with which a column can be numbered whatever its keys are."""
    size = np.dtype(keys.dtype).itemsize
    ways = [whole_bytes(keys.total, size), RUNS_BYTES_PER_ID[size] * keys.total]
    if size == 4:
        ways.append(bitmap_bytes(keys.bound, min(keys.total, keys.bound)))
    return min(ways)


def number_ids(keys: Keys, memory: int, ids_file: IO[bytes], keys_file: IO[bytes], keys_at: int = 0) -> int:
    """Writes the id of every key, [total] int32, to ids_file where it stands, and the distinct keys in id order to keys_file; returns their
    number.

    memory: bytes, besides what the process holds. Both files are unbuffered; keys_file stands, and ends, at byte keys_at.
    Raises TooLittleMemory, TooManyIds.
    """
    if whole_bytes(keys.total, np.dtype(keys.dtype).itemsize) <= memory:
        return _number_whole(keys, ids_file, keys_file)
    return _number_by_pieces(keys, memory, ids_file, keys_file, keys_at)


def encode(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct keys in order of first appearance, and the number of each key among them [len(keys)] int32."""
    # from_buffers, because pa.array() imports pandas where it is installed: 0.15 s. The system's pool gives back what it gets
    array = pa.Array.from_buffers(pa.from_numpy_dtype(keys.dtype), len(keys), [None, pa.py_buffer(keys)])
    encoded = pc.dictionary_encode(array, memory_pool=pa.system_memory_pool())
    distinct = encoded.dictionary
    numbers = np.frombuffer(encoded.indices.buffers()[1], np.int32, count=len(keys))
    return np.frombuffer(distinct.buffers()[1], keys.dtype, count=len(distinct), offset=distinct.offset * keys.itemsize), numbers


def _number_whole(keys: Keys, ids_file: IO[bytes], keys_file: IO[bytes]) -> int:
    everything, at = np.empty(keys.total, keys.dtype), 0
    for piece in keys.pieces(0):
        everything[at : at + len(piece)] = piece
        at += len(piece)
    if not keys.total:
        return 0
    distinct, ids = encode(everything)
    write_all(ids_file, ids)
    write_all(keys_file, distinct)
    return len(distinct)


def _number_by_pieces(keys: Keys, memory: int, ids_file: IO[bytes], keys_file: IO[bytes], keys_at: int) -> int:
    runs, done, num_ids, limit = Runs(keys.dtype), 0, 0, memory
    bitmap_fits = keys.dtype == np.uint32 and bitmap_bytes(keys.bound, 0) <= memory
    if bitmap_fits and runs.bytes_with(keys.total) > memory:
        limit = min(memory, (memory - bitmap_bytes(keys.bound, 0)) * 4)  # runs at rest, a quarter of their peak, lie beside the bitmap for a while
    for piece in keys.pieces(0):
        if runs.bytes_with(len(piece)) > limit:
            if bitmap_fits:
                return _number_by_bitmap(keys, runs, done, num_ids, memory, ids_file, keys_file, keys_at)
            raise TooLittleMemory(enough_bytes(keys), memory)
        distinct, numbers = encode(piece)
        ids = runs.find(distinct)
        new = np.flatnonzero(ids < 0)
        if len(new):
            ids[new] = np.arange(num_ids, num_ids + len(new), dtype=np.int32)
            runs.add(distinct[new], ids[new])
            write_all(keys_file, distinct[new])
            num_ids += len(new)
        write_all(ids_file, ids[numbers])
        done += len(piece)
    return num_ids


def _number_by_bitmap(
    keys: Keys, runs: "Runs", done: int, num_ids: int, memory: int, ids_file: IO[bytes], keys_file: IO[bytes], keys_at: int
) -> int:
    """Goes on where runs hold the num_ids keys of the first `done` ones."""
    bitmap = RankedBitmap(keys.bound)
    for known, _ in runs.runs:
        for at in range(0, len(known), PIECE):  # marking takes some arrays of the keys' size
            bitmap.mark(known[at : at + PIECE])
    runs.clear()
    for piece in keys.pieces(done):
        distinct, _ = encode(piece)
        new = distinct[~bitmap.holds(distinct)]
        if len(new):
            bitmap.mark(new)
            write_all(keys_file, new)
            num_ids += len(new)
    if num_ids > MAX_INT32:
        raise TooManyIds(num_ids)
    if bitmap_bytes(keys.bound, num_ids) > memory:
        raise TooLittleMemory(min(enough_bytes(keys), bitmap_bytes(keys.bound, num_ids)), memory)
    keys_file.seek(keys_at)
    bitmap.number(_stored(keys_file, keys.dtype), num_ids)
    for piece in keys.pieces(done):
        distinct, numbers = encode(piece)
        write_all(ids_file, bitmap.ids(distinct)[numbers])
    return num_ids


def _stored(file: IO[bytes], dtype: type) -> Iterator[np.ndarray]:
    """The rest of a file, PIECE numbers at a time."""
    while len(data := file.read(PIECE * np.dtype(dtype).itemsize)):
        yield np.frombuffer(data, dtype)


class Runs:
    """Keys and their ids, as sorted runs each at least twice as long as the next: a look-up is a binary search in each of a few runs."""

    def __init__(self, dtype: type):
        self.runs: list[tuple[np.ndarray, np.ndarray]] = []
        self._dtype = np.dtype(dtype)

    def __len__(self) -> int:
        return sum(len(keys) for keys, _ in self.runs)

    def bytes_with(self, more: int) -> int:
        """Peak of what it takes until `more` keys have been added."""
        return RUNS_BYTES_PER_ID[self._dtype.itemsize] * (len(self) + more)

    def add(self, keys: np.ndarray, ids: np.ndarray) -> None:
        """Distinct keys that it lacks, in any order; ids [len(keys)] int32."""
        order = np.argsort(keys)
        self.runs.append((keys[order], ids[order]))
        while len(self.runs) > 1 and len(self.runs[-2][0]) < 2 * len(self.runs[-1][0]):
            self.runs[-2:] = [_merge(*self.runs[-2:])]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[len(keys)] int32: ids, -1 where a key is unknown."""
        if not self.runs:
            return np.full(len(keys), -1, np.int32)
        order = np.argsort(keys)
        asked, found = keys[order], np.full(len(keys), -1, np.int32)
        for known, ids in self.runs:
            at = np.minimum(np.searchsorted(known, asked), len(known) - 1)
            found = np.where(known[at] == asked, ids[at], found)
        unsorted = np.empty_like(found)
        unsorted[order] = found
        return unsorted

    def clear(self) -> None:
        self.runs = []


def _merge(a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Two sorted runs as one."""
    at = np.searchsorted(a[0], b[0]) + np.arange(len(b[0]))  # where b's keys come to lie
    of_a = np.ones(len(a[0]) + len(b[0]), dtype=bool)
    of_a[at] = False
    merged = []
    for first, second in zip(a, b, strict=True):
        both = np.empty(len(of_a), first.dtype)
        both[at] = second
        both[of_a] = first
        merged.append(both)
    return merged[0], merged[1]


class RankedBitmap:
    """One bit for every 32-bit key below `bound`; once all are marked, the id of a key is a table's entry at its rank among the marked ones."""

    def __init__(self, bound: int):
        blocks = -(-bound // _BLOCK_BITS)
        self._words = np.zeros((blocks, _BLOCK_BITS // 64), np.uint64)
        self._bytes = self._words.reshape(-1).view(np.uint8)

    def holds(self, keys: np.ndarray) -> np.ndarray:
        """[len(keys)] bool"""
        return (self._bytes[keys >> np.uint32(3)] >> (keys & np.uint32(7)).astype(np.uint8)) & np.uint8(1) != 0

    def mark(self, keys: np.ndarray) -> None:
        """Distinct keys, none of them marked before: that makes adding what or-ing is, and adding is six times as fast."""
        bits = np.left_shift(np.uint8(1), (keys & np.uint32(7)).astype(np.uint8))
        np.add.at(self._bytes, keys >> np.uint32(3), bits)

    def number(self, keys: Iterator[np.ndarray], num_ids: int) -> None:
        """All marked keys in id order, in pieces. After it, nothing is marked any more."""
        blocks, words = self._words.shape
        self._before_block = np.zeros(blocks, np.uint32)
        self._before_word = np.zeros((blocks, words), np.uint8)  # at most 192, in the block
        total = 0
        for start in range(0, blocks, 1 << 16):
            ones = np.bitwise_count(self._words[start : start + (1 << 16)])
            inside = np.cumsum(ones, axis=1, dtype=np.uint16)
            self._before_word[start : start + len(ones), 1:] = inside[:, :-1]
            ends = np.cumsum(inside[:, -1], dtype=np.int64) + total
            self._before_block[start : start + len(ones)] = ends - inside[:, -1]
            total = int(ends[-1])
        self._before_word = self._before_word.reshape(-1)
        self._ids = np.empty(num_ids, np.int32)
        first = 0
        for piece in keys:
            self._ids[self._rank(piece)] = np.arange(first, first + len(piece), dtype=np.int32)
            first += len(piece)

    def ids(self, keys: np.ndarray) -> np.ndarray:
        """[len(keys)] int32 of marked keys."""
        return self._ids[self._rank(keys)]

    def find(self, keys: np.ndarray) -> np.ndarray:
        """[len(keys)] int32: ids, -1 where a key is not marked."""
        found = np.full(len(keys), -1, np.int32)
        known = keys < self._words.size * 64
        known[known] = self.holds(keys[known])
        found[known] = self.ids(keys[known])
        return found

    def _rank(self, keys: np.ndarray) -> np.ndarray:
        word = keys >> np.uint32(6)
        below = (np.uint64(1) << (keys & np.uint32(63)).astype(np.uint64)) - np.uint64(1)
        ones = np.bitwise_count(self._words.reshape(-1)[word] & below)
        return self._before_block[keys >> np.uint32(8)] + self._before_word[word] + ones
