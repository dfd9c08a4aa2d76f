"""A data_loaders.blocks.Source of arrays that are at hand, and what a result of it must be, by loops over rows and Python's dictionaries."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loaders.blocks import Block, Categorical, Dense, Mark, SplitRule


@dataclass
class MadeSource:
    """labels [n], dense [n, D]; keys: for each column a list of n bags (multi-hot) or n keys. part_rows: rows of each file."""

    files: tuple[Path, ...]
    labels: np.ndarray
    dense_values: np.ndarray
    keys: list[list]
    part_rows: list[int]
    categorical: tuple[Categorical, ...]
    dense: tuple[Dense, ...]
    split: SplitRule
    when: list[int] | None = None
    block_rows: int = 7

    @property
    def number_type(self) -> str:
        return "float32" if self.labels.dtype == np.float32 else "int32"

    @property
    def part_names(self) -> tuple[str, ...]:
        return tuple(path.name for path in self.files)

    def describe(self) -> dict:
        return {"source": "made", "flags": {"schema": "x"}}

    def blocks(self, start, *, progress):
        mark = start or Mark(0, 0, 1, 0)
        ends = np.cumsum(self.part_rows)
        for file in range(mark.file, len(self.files)):
            first = mark.rows
            while first < ends[file]:
                end = min(first + self.block_rows, int(ends[file]))
                mark = Mark(file, 100 * end, 1 + end, end)
                yield self._block(slice(first, end), file), mark
                first = end

    def _block(self, rows: slice, part: int) -> Block:
        keys, lengths = [], []
        for spec, column in zip(self.categorical, self.keys, strict=True):
            kind = np.uint32 if spec.key_bits == 32 else np.uint64
            bags = column[rows]
            lengths.append(np.array([len(bag) for bag in bags], np.int32) if spec.multi_hot else None)
            keys.append(np.array([key for bag in bags for key in bag] if spec.multi_hot else bags, kind))
        when = None if self.when is None else np.array(self.when[rows], np.int64)
        return Block(self.labels[rows], self.dense_values[rows], keys, lengths, part, when)


def make_source(folder: Path, n: int, seed: int, *, floats: bool, split: SplitRule, when=None, distinct=12, **fields) -> MadeSource:
    """Columns of every kind: one-hot of 32 and 64 bits, folded, multi-hot, multi-hot with a limit. Three files."""
    rng = np.random.default_rng(seed)
    kind = np.float32 if floats else np.int32
    dense = rng.normal(3, 20, (n, 3)).astype(kind) if floats else rng.integers(0, 1000, (n, 3)).astype(kind)
    if floats:
        dense[rng.random((n, 3)) < 0.2] = np.nan
    cut = sorted(rng.integers(0, n + 1, 2).tolist())
    files = tuple(folder / f"part{i}.x" for i in range(3))
    for number, path in enumerate(files):
        path.write_bytes(b"raw %d" % number)

    def single(bits: int) -> list[int]:
        values = [0, 2**bits - 1, *(int(value) for value in rng.integers(0, 2**bits, distinct, dtype=np.uint64))]
        return [values[at] for at in np.minimum(rng.geometric(0.2, n) - 1, len(values) - 1)]

    def bags(bits: int) -> list[list[int]]:
        flat = single(bits)
        return [[flat[at] for at in rng.integers(0, n, rng.integers(0, 5))] for _ in range(n)]

    categorical = (
        Categorical("a"), Categorical("b c/d", key_bits=64), Categorical("folded", modulo=5), Categorical("many", multi_hot=True),
        Categorical("some", key_bits=64, multi_hot=True, max_hot=2), Categorical("last"),
    )  # fmt: skip
    keys = [single(32), single(64), single(32), bags(32), bags(64), single(32)]
    return MadeSource(
        files, rng.integers(0, 2, n).astype(kind), dense, keys, [cut[0], cut[1] - cut[0], n - cut[1]], categorical,
        (Dense("x"), Dense("y", "log" if floats else "none"), Dense("z", "standardize" if floats else "none")), split, when, **fields,
    )  # fmt: skip


def expected(source: MadeSource, min_frequency: int = 0) -> dict:
    """order of the rows, num_train, num_test, and for each column its bags of ids in that order, keys and counts."""
    n = len(source.labels)
    test = _test_rows(source, n)
    order = [row for row in range(n) if row not in test] + [row for row in range(n) if row in test]
    columns = []
    for spec, column in zip(source.categorical, source.keys, strict=True):
        bags = [(list(bag)[: spec.max_hot] if spec.max_hot else list(bag)) if spec.multi_hot else [bag] for bag in column]
        bags = [[key % spec.modulo if spec.modulo else key for key in bag] for bag in bags]
        columns.append(number(bags, order, min_frequency))
    return {"order": order, "num_train": n - len(test), "num_test": len(test), "columns": columns}


def number(bags: list[list[int]], order: list[int], min_frequency: int) -> dict:
    """Ids in order of first appearance, by a dictionary; bags in the new order."""
    seen = {}
    for bag in bags:
        for key in bag:
            seen[key] = seen.get(key, 0) + 1
    if min_frequency:
        kept = [key for key in seen if seen[key] >= min_frequency]
        keys, counts = [0, *kept], [sum(seen.values()) - sum(seen[key] for key in kept), *(seen[key] for key in kept)]
        ids = {key: 0 for key in seen} | {key: place for place, key in enumerate(kept, 1)}
    else:
        keys, counts, ids = list(seen), list(seen.values()), {key: place for place, key in enumerate(seen)}
    return {"bags": [[ids[key] for key in bags[row]] for row in order], "keys": keys, "counts": counts}


def _test_rows(source: MadeSource, n: int) -> set[int]:
    rule = source.split
    most = math.floor(n * rule.test + 1e-9)
    if rule.by == "fraction":
        return set(range(n - most, n))
    if rule.by == "parts":
        part_of = [part for part, rows in enumerate(source.part_rows) for _ in range(rows)]
        return {row for row in range(n) if part_of[row] in rule.parts}
    fits = [moment for moment in set(source.when) if sum(when >= moment for when in source.when) <= most]
    moment = rule.start if rule.start is not None else min(fits, default=None)
    return {row for row in range(n) if moment is not None and source.when[row] >= moment}
