"""The first stage of data_loaders.build: blocks of a source become segments on the disk, from the last whole one on."""

import contextlib
import ctypes
import math
import resource
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from data_loaders.blocks import Block, Categorical, Source
from data_loaders.spill import Segment, write_segment
from dlrm_xla.specs import UserError

SEGMENT_ROWS = 245_000  # with the rest of a block below 250,000, see numbering.PIECE
SEGMENT_BYTES = 40_000_000
MIN_FREE = 150_000_000  # bytes that reading, and writing the result, take at least
_RESERVE = 60_000_000  # of the budget, for what lies beside the large arrays


class _HasMemory(Protocol):
    memory_bytes: int
    memory_flag: str


def resident_bytes() -> int:
    """Memory that the process holds now."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:  # macOS has no /proc; the peak, in bytes there, is never below it
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def free_bytes(options: _HasMemory) -> int:
    """What the budget leaves for a stage's large arrays."""
    pa.default_memory_pool().release_unused()
    with contextlib.suppress(OSError, AttributeError):  # glibc; it keeps some 100 MB of freed arrays otherwise
        ctypes.CDLL(None).malloc_trim(0)
    return options.memory_bytes - resident_bytes() - _RESERVE


def enough(options: _HasMemory, missing: int, what: str) -> UserError:
    """The error of a budget that is too small by `missing` bytes; the process may hold a little more or less the next time."""
    least = math.ceil((options.memory_bytes + missing) * 1.05 / 1e6)
    return UserError(f"{options.memory_flag}={options.memory_bytes} bytes is too little for {what}: {least}MB is enough")


def read_rows(source: Source, folder: Path, segments: list[Segment], memory: int, progress: bool) -> list[Segment]:
    """All segments of the source; those given are there already. Raises UserError of the source, OSError of the disk."""
    segments = list(segments)
    last = segments[-1].mark if segments else None
    segment_bytes = min(SEGMENT_BYTES, memory // 6)
    with ThreadPoolExecutor(1) as writer:
        waiting: Future | None = None
        blocks: list[Block] = []
        rows = size = number = 0
        number, mark = len(segments), last

        def flush() -> Future:
            nonlocal blocks, rows, size, number
            if waiting is not None:
                segments.append(waiting.result())  # at most two segments are in memory
            job = writer.submit(write_segment, folder, number, blocks, mark)
            blocks, rows, size, number = [], 0, 0, number + 1
            return job

        for block, behind in source.blocks(last, progress=progress):
            if blocks and behind.file > mark.file and size > segment_bytes // 8:
                waiting = flush()  # where one file changes, what was read of the others can still be used
            block = _prepared(block, source.categorical)
            blocks.append(block)
            rows, size, mark = rows + block.num_rows, size + _bytes(block), behind
            if rows >= SEGMENT_ROWS or size >= segment_bytes:
                waiting = flush()
        if blocks:
            waiting = flush()
        if waiting is not None:
            segments.append(waiting.result())
    if sum(segment.rows for segment in segments) == 0:
        raise UserError(f"{source.files[0]}: no row is left; name a raw file that has rows")
    return segments


def _bytes(block: Block) -> int:
    arrays = [block.labels, block.dense, *block.keys, *(lengths for lengths in block.lengths if lengths is not None)]
    return sum(array.nbytes for array in arrays) + (block.when.nbytes if block.when is not None else 0)


def _prepared(block: Block, columns: tuple[Categorical, ...]) -> Block:
    """Keys folded and bags cut, as the columns say."""
    for place, column in enumerate(columns):
        lengths, keys = block.lengths[place], block.keys[place]
        if column.max_hot and lengths is not None and len(lengths) and int(lengths.max()) > column.max_hot:
            first = np.repeat(np.cumsum(lengths) - lengths, lengths)
            keys = keys[np.arange(len(keys)) - first < column.max_hot]
            block.lengths[place] = np.minimum(lengths, np.int32(column.max_hot))
        if 0 < column.modulo < 2**column.key_bits:
            keys = keys % keys.dtype.type(column.modulo)
        block.keys[place] = keys
    return block
