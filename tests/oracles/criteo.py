"""Criteo's text, its processed arrays and its batches restated one row at a time with Python's own dictionaries; imports none of our code."""

import math

import numpy as np

VOCABULARY = [3, 5, 7, 10, 20, 50] * 4 + [11, 400]
DECIMAL, HEXADECIMAL = "0123456789", "0123456789abcdefABCDEF"


class BadLine(Exception):
    """args[0] is the number of the first line that is not a row."""


def make_text(num_rows: int, seed: int = 0) -> bytes:
    """Rows with missing cells, negative counts and few ids; the same bytes on every machine."""
    rng = np.random.default_rng(seed)
    lines = []
    for _ in range(num_rows):
        label = str(int(rng.random() < 0.3))
        counts = ["" if rng.random() < 0.2 else str(int(rng.integers(-3, 3000))) for _ in range(13)]
        ids = ["" if rng.random() < 0.1 else f"{int(rng.integers(size)) * 2654435761 % 2**32:08x}" for size in VOCABULARY]
        lines.append("\t".join([label, *counts, *ids]) + "\n")
    return "".join(lines).encode()


def read_text(text: bytes) -> list[tuple[int, list[int], list[int]]]:
    """(label, 13 counts, 26 hashes) of each line, or BadLine. An empty cell is 0; the label may not be empty."""
    lines = text.decode("latin-1").split("\n")
    if lines[-1] == "":
        lines = lines[:-1]
    rows = []
    for number, line in enumerate(lines, 1):
        if line.endswith("\r"):
            line = line[:-1]
        cells = line.split("\t")
        if len(cells) != 40 or cells[0] == "":
            raise BadLine(number)
        label, *counts = [_whole_number(cell, number) for cell in cells[:14]]
        if label not in (0, 1):
            raise BadLine(number)
        rows.append((label, counts, [_hash(cell, number) for cell in cells[14:]]))
    return rows


def _whole_number(cell: str, number: int) -> int:
    digits = cell[1:] if cell[:1] == "-" else cell
    if cell == "":
        return 0
    if digits == "" or any(c not in DECIMAL for c in digits) or not -(2**31) <= int(cell) < 2**31:
        raise BadLine(number)
    return int(cell)


def _hash(cell: str, number: int) -> int:
    if cell == "":
        return 0
    digits = cell[2:] if cell[:2] in ("0x", "0X") else cell
    if not 1 <= len(digits) <= 8 or any(c not in HEXADECIMAL for c in digits):
        raise BadLine(number)
    return int(digits, 16)


def process(text: bytes, max_ind_range: int = -1, sub_sample_rate: float = 0.0, seed: int = 0, days: int = 7) -> dict[str, np.ndarray]:
    """X_cat, X_int, y, counts, total_per_file, by a loop over days and rows."""
    rows, rng = read_text(text), np.random.RandomState(seed)
    sizes = [len(rows) // days + (day < len(rows) % days) for day in range(days)]
    dictionaries = [{} for _ in range(26)]
    x_cat, x_int, y, total_per_file = [], [], [], []
    for size in sizes:
        day, rows = rows[:size], rows[size:]
        draws = rng.uniform(0, 1, size=size) if sub_sample_rate else [1.0] * size
        kept = [row for row, draw in zip(day, draws, strict=True) if row[0] == 1 or not draw < sub_sample_rate]
        total_per_file.append(len(kept))
        for label, counts, hashes in kept:
            y.append(label)
            x_int.append([max(count, 0) for count in counts])
            keys = [h % max_ind_range if max_ind_range > 0 else h for h in hashes]
            x_cat.append([ids.setdefault(key, len(ids)) for ids, key in zip(dictionaries, keys, strict=True)])
    counts = [len(ids) for ids in dictionaries]
    return {"X_cat": x_cat, "X_int": x_int, "y": y, "counts": counts, "total_per_file": total_per_file}


def halves(total_per_file: list[int], randomize: str, rng: np.random.RandomState) -> tuple[list[int], list[int]]:
    """Row numbers of the train and of the test half, in their order."""
    offsets = np.concatenate([[0], np.cumsum(total_per_file)])
    days = [np.arange(a, b) for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    if randomize == "day":
        days[:-1] = [rng.permutation(day) for day in days[:-1]]
    train = np.concatenate(days[:-1])
    if randomize == "total":
        train = rng.permutation(train)
    return train.tolist(), days[-1][: math.ceil(len(days[-1]) / 2)].tolist()
