"""How often training looks each id of a table up: what hot rows, caches and weighted errors go by."""

import sys
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from tqdm import tqdm

from dlrm_xla.batch import slot_starts
from dlrm_xla.specs import TableSpec


class Batches(Protocol):
    num_batches: int

    def batches(self, start: int = 0, epoch: int = 0): ...


def count_ids(split: Batches, specs: Sequence[TableSpec]) -> list[np.ndarray]:
    """One pass over a split: for each table [N] float64, lookups of each id in an epoch. Padded rows and slots do not count."""
    counts = [np.zeros(spec.num_embeddings) for spec in specs]
    starts = slot_starts([spec.hotness for spec in specs])
    with tqdm(split.batches(), total=split.num_batches, desc="counting ids", unit=" batches", disable=not sys.stderr.isatty(), leave=False) as bar:
        for batch in bar:
            ids = batch.ids[: batch.num_valid].numpy()
            filled = None if batch.weights is None else batch.weights[: batch.num_valid].numpy() != 0
            for table, count in enumerate(counts):
                slots = slice(starts[table], starts[table + 1])
                seen = ids[:, slots].reshape(-1) if filled is None else ids[:, slots][filled[:, slots]]
                found, times = np.unique(seen, return_counts=True)
                count[found] += times
    return counts
