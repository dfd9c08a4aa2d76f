"""Numbered Criteo rows to one .npz, which upstream can read too (data_loaders.criteo_npz); the vocabularies are arrays of their own in it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_loaders.blocks import Source
from data_loaders.criteo_npz import Meta, RawFingerprint, write_npz
from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from data_loaders.spilled import IDS, IdReader, Numbered
from data_loaders.vocabulary import NPZ_SHARED, npz_member
from dlrm_xla.specs import UserError

_ROWS_AT_ONCE = 4096


def check_npz(source: Source, out: Path) -> None:
    """Raises UserError where the source's rows do not fit the format."""
    criteo = source.number_type == "int32" and len(source.dense) == NUM_DENSE and len(source.categorical) == NUM_SPARSE
    if not criteo or any(column.multi_hot or column.key_bits != 32 for column in source.categorical):
        raise UserError(f"--processed-data-file={out}: an .npz holds Criteo's columns only; name a folder, without .npz at its end")


def meta_of(flags: dict, days: int, raws: list[RawFingerprint], raw_rows: int) -> Meta:
    """flags: as Manifest.flags."""
    older = flags["vocabulary"]
    return Meta(
        max_ind_range=flags["max_ind_range"],
        sub_sample_rate=flags["sub_sample_rate"],
        days=days,
        raw=raws[0],
        raw_rows=raw_rows,
        raws=tuple(raws) if len(raws) > 1 else (),
        min_frequency=flags["min_frequency"],
        vocabulary=RawFingerprint(**older) if older else None,
    )


def write_criteo_npz(file, numbered: Numbered, meta: Meta, bar: tqdm) -> None:
    """bar: goes on by the rows of all, twice."""
    meta = replace(meta, draws=numbered.spilled.source.describe().get("draws", ""))
    segments = numbered.spilled.segments
    n = sum(segment.rows for segment in segments)
    counts = np.array([entry.rows for entry in numbered.vocabularies], np.int32)

    def one(array: np.ndarray) -> tuple[tuple[int, ...], Iterator[np.ndarray]]:
        return array.shape, iter([array])

    def dense() -> Iterator[np.ndarray]:
        for segment in segments:
            yield segment.dense(np.int32, NUM_DENSE)
            bar.update(segment.rows)

    arrays = {
        "X_cat": ((n, NUM_SPARSE), _ids(numbered, bar)),
        "X_int": ((n, NUM_DENSE), dense()),
        "y": ((n,), (segment.labels(np.int32) for segment in segments)),
        "counts": one(counts),
        "total_per_file": one(np.array(numbered.split.part_rows, np.int64)),
        "meta": one(np.array(meta.to_json())),
        NPZ_SHARED: one(np.array(numbered.vocabularies[0].shared)),
    }
    for column, entry in enumerate(numbered.vocabularies):
        arrays[npz_member(column)] = ((entry.rows,), numbered.vocabulary(column)[0])
    write_npz(file, arrays)


def _ids(numbered: Numbered, bar: tqdm) -> Iterator[np.ndarray]:
    """[some rows, 26] int32, until all rows have come."""
    reader = IdReader(numbered.spilled.folder / IDS, numbered.ids_at())
    try:
        for segment in numbered.spilled.segments:
            columns = [reader.next(column, segment.rows) for column in range(NUM_SPARSE)]
            for start in range(0, segment.rows, _ROWS_AT_ONCE):
                rows = slice(start, start + _ROWS_AT_ONCE)
                yield np.stack([column[rows] for column in columns], axis=1)
            bar.update(segment.rows)
    finally:
        reader.close()
