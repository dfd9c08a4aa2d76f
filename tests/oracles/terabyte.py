"""The Terabyte set's 24 day files, its processed arrays and upstream's loader under MLPerf restated row by row; imports none of our code."""

from pathlib import Path

import numpy as np

from tests.oracles.criteo import make_text, read_text


def make_days(sizes: list[int], seed: int = 0) -> list[bytes]:
    """The text of each day."""
    lines = make_text(sum(sizes), seed).splitlines(keepends=True)
    ends = np.cumsum(sizes)
    return [b"".join(lines[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def write_days(prefix: Path, days: list[bytes]) -> None:
    for number, text in enumerate(days):
        prefix.with_name(f"{prefix.name}_{number}").write_bytes(text)


def process_days(days: list[bytes], max_ind_range: int = -1, sub_sample_rate: float = 0.0, seed: int = 0) -> dict[str, list]:
    """X_cat, X_int, y, counts, total_per_file, by a loop over days and rows."""
    rng, dictionaries = np.random.RandomState(seed), [{} for _ in range(26)]
    x_cat, x_int, y, total_per_file = [], [], [], []
    for text in days:
        rows = read_text(text)
        draws = rng.uniform(0, 1, size=len(rows)) if sub_sample_rate else [1.0] * len(rows)
        kept = [row for row, draw in zip(rows, draws, strict=True) if row[0] == 1 or not draw < sub_sample_rate]
        total_per_file.append(len(kept))
        for label, counts, hashes in kept:
            y.append(label)
            x_int.append([max(count, 0) for count in counts])
            keys = [h % max_ind_range if max_ind_range > 0 else h for h in hashes]
            x_cat.append([ids.setdefault(key, len(ids)) for ids, key in zip(dictionaries, keys, strict=True)])
    return {"X_cat": x_cat, "X_int": x_int, "y": y, "counts": [len(ids) for ids in dictionaries], "total_per_file": total_per_file}


def save_upstreams(folder: Path, arrays: dict[str, list], *, mappable: bool = False) -> Path:
    """terabyte_processed.npz and day_day_count.npz as upstream writes them; mappable: int32 and not compressed, so that it can be mapped."""
    np.savez_compressed(folder / "day_day_count.npz", total_per_file=np.array(arrays["total_per_file"]))
    path = folder / "terabyte_processed.npz"
    rest = {name: np.array(arrays[name], dtype=np.int32) for name in ("X_int", "y", "counts")}
    if mappable:
        np.savez(path, X_cat=np.array(arrays["X_cat"], dtype=np.int32), **rest)
    else:
        np.savez_compressed(path, X_cat=np.asfortranarray(arrays["X_cat"], dtype=np.float64), **rest)
    return path


def loader_batches(days: list[int], batch_size: int) -> list[int]:
    """Rows of each batch that upstream's loader under MLPerf gives; ValueError where it fails."""
    sizes, kept = [], None
    for rows in days:
        start = 0
        while start < rows - batch_size:
            missing = batch_size - (kept or 0)
            taken = len(range(rows)[start : start + missing])
            if (kept or 0) + taken != batch_size:
                raise ValueError("should not happen")
            sizes.append(batch_size)
            kept, start = None, start + missing
        if start != rows:
            kept = (kept or 0) + rows - start
    return [*sizes, kept]
