"""Criteo Kaggle's raw text to one processed .npz, with upstream's ids, counts, day split and sub-sampling.

An id is the rank of its hash (taken modulo max_ind_range first, where that is above 0) in order of first appearance over all days. Upstream
fills 26 Python dictionaries and writes 60 intermediate files; here a column at a time goes through pyarrow's hash table, and one file is
written, atomically: whatever interrupts a run, the next one starts clean. Memory: 160 bytes a row, and one column's hash table.
"""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_loaders.criteo_npz import DAMAGE, Meta, RawFingerprint, atomic_write, read_array, write_npz
from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE, Rows, read_rows
from dlrm_xla.specs import UserError

DAYS = 7
PROCESSED_NAME = "kaggleAdDisplayChallenge_processed.npz"  # upstream's name for it, in the raw file's folder
_OUR_MARK = "made_by_dlrm_xla"


def preprocess(
    raw: Path, out: Path, *, max_ind_range: int, sub_sample_rate: float, days: int = DAYS, rng: np.random.RandomState, progress: bool
) -> None:
    """Writes the processed file `out` of the raw file `raw` (plain or gzip).

    max_ind_range    above 0: ids are hash modulo this
    sub_sample_rate  above 0: a row with label 0 is dropped with this probability; rng.uniform is drawn once per day, for all its rows
    progress         bars on stderr
    Raises UserError for a bad line (with its number), an unreadable raw file, too few rows, or an `out` that cannot be written.
    """
    try:
        fingerprint = RawFingerprint.of(raw)
    except OSError as error:
        raise UserError(f"--raw-data-file={raw}: cannot read it: {error.strerror}") from None
    with atomic_write(
        out, "name another place with --processed-data-file=PATH"
    ) as file:  # first: a long read must not end in "no permission"
        blocks = _read(raw, max_ind_range, progress)
        raw_rows = sum(len(block.labels) for block in blocks)
        total_per_file = split_days(raw_rows, days)
        if sub_sample_rate > 0:
            blocks, total_per_file = _sub_sample(blocks, total_per_file, sub_sample_rate, rng)
        n = int(total_per_file.sum())
        if n == 0:
            raise UserError(f"{raw}: --data-sub-sample-rate={sub_sample_rate} leaves no row")
        counts = _number_ids(blocks, progress)
        meta = Meta(max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, days=days, raw=fingerprint, raw_rows=raw_rows)
        with tqdm(total=2 * len(blocks), desc=f"Writing {out.name}", disable=not progress) as bar:
            arrays = {
                "X_cat": ((n, NUM_SPARSE), _pieces(blocks, lambda block: np.ascontiguousarray(block.hashes.T).view(np.int32), bar)),
                "X_int": ((n, NUM_DENSE), _pieces(blocks, lambda block: np.maximum(block.counts, 0), bar)),
                "y": ((n,), (block.labels for block in blocks)),
                "counts": ((NUM_SPARSE,), iter([counts])),
                "total_per_file": ((days,), iter([total_per_file])),
                "meta": ((), iter([np.array(meta.to_json())])),
            }
            write_npz(file, arrays)
        if out.parent.resolve() == raw.parent.resolve():  # before the file gets its name: there is no processed file without it
            _write_day_count(raw, total_per_file)


def split_days(num_rows: int, days: int) -> np.ndarray:
    """[days] int64: rows of each day, equal but for the remainder, which goes to the first ones."""
    return num_rows // days + (np.arange(days) < num_rows % days)


def day_count_file(raw: Path) -> Path:
    """Where upstream looks for the rows of each day."""
    return raw.parent / (raw.name.split(".")[0] + "_day_count.npz")


def _read(raw: Path, max_ind_range: int, progress: bool) -> list[Rows]:
    blocks = []
    for block in read_rows(raw, progress=progress):
        if 0 < max_ind_range < 2**32:
            block.hashes %= np.uint32(max_ind_range)
        blocks.append(block)
    return blocks


def _sub_sample(blocks: list[Rows], total_per_file: np.ndarray, rate: float, rng: np.random.RandomState) -> tuple[list[Rows], np.ndarray]:
    """Kept rows, and how many of each day."""
    draws = np.concatenate([rng.uniform(low=0.0, high=1.0, size=int(rows)) for rows in total_per_file])
    keep = (np.concatenate([block.labels for block in blocks]) != 0) | (draws >= rate)
    ends = np.cumsum([len(block.labels) for block in blocks])
    kept = [block.keep(mask) for block, mask in zip(blocks, np.split(keep, ends[:-1]), strict=True)]
    kept_per_day = [int(np.count_nonzero(day)) for day in np.split(keep, np.cumsum(total_per_file)[:-1])]
    return [block for block in kept if len(block.labels)], np.array(kept_per_day, dtype=np.int64)


def _number_ids(blocks: list[Rows], progress: bool) -> np.ndarray:
    """Replaces hashes by ids, in place, a column at a time; returns how many ids each column has, [26] int32."""
    counts = np.empty(NUM_SPARSE, dtype=np.int32)
    for column in tqdm(range(NUM_SPARSE), desc="Numbering ids", unit="column", disable=not progress):
        # from_buffers, because pa.array() imports pandas where it is installed: 0.15 s
        hashes = [pa.Array.from_buffers(pa.uint32(), len(b.labels), [None, pa.py_buffer(b.hashes[column])]) for b in blocks]
        encoded = pa.chunked_array(hashes).dictionary_encode()
        for block, chunk in zip(blocks, encoded.chunks, strict=True):
            block.hashes[column] = np.frombuffer(chunk.indices.buffers()[1], dtype="<i4", count=len(chunk))
        counts[column] = len(encoded.chunk(0).dictionary)  # one dictionary for all chunks, in order of first appearance
    return counts


def _pieces(blocks: list[Rows], piece: Callable[[Rows], np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for block in blocks:
        yield piece(block)
        bar.update()


def _write_day_count(raw: Path, total_per_file: np.ndarray) -> None:
    """Upstream reads the rows of each day from a file of its own. Upstream's is left as it is; one of ours is brought up to date."""
    path = day_count_file(raw)
    if path.exists():
        try:
            read_array(path, _OUR_MARK)
        except (OSError, *DAMAGE):
            return
    with atomic_write(path, "name a place outside the raw file's folder with --processed-data-file=PATH") as file:
        np.savez(file, **{"total_per_file": total_per_file, _OUR_MARK: np.array(os.path.basename(raw))})
