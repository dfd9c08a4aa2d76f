"""A batch in static shapes, and what a data set is to the training loop.

Upstream hands each table an (offsets, indices) pair whose lengths change from batch to batch; XLA would compile a new program for each.
Here a table owns H slots in every row, a bag fills the first of them, and the rest are id 0 with weight 0. Rows are padded the same way:
the last batch of a split has as many rows as the others, and `num_valid` says how many of them count.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.specs import UserError


@dataclass(frozen=True)
class Batch:
    """One mini-batch.

    dense      [B, num_dense] float32
    ids        [B, S] int32, table after table, each with its H slots; 0 in padded slots and padded rows
    weights    [B, S] float32, 1 for an id of a bag and 0 for padding; None where every slot of every valid row holds an id
    labels     [B, 1] float32; 0 in padded rows
    num_valid  rows that count, 1..B; they come first. 0..B of a rank's part of a batch
    total_valid  rows that count in the whole batch, of which this is one rank's part; None where it is the whole
    """

    dense: Tensor
    ids: Tensor
    weights: Tensor | None
    labels: Tensor
    num_valid: int
    total_valid: int | None = None

    @property
    def size(self) -> int:
        return self.ids.shape[0]

    @property
    def num_counted(self) -> int:
        """Rows that the mean loss is over, on all ranks together."""
        return self.num_valid if self.total_valid is None else self.total_valid

    def valid_mask(self) -> Tensor:
        """[B, 1] float32: 1 where the row counts."""
        mask = torch.zeros(self.size, 1)
        mask[: self.num_valid] = 1
        return mask

    def pack(self) -> tuple[Tensor, Tensor]:
        """Two tensors for one transfer each: floats [B, num_dense + 2 (+ S)] = dense | label | valid (| weights), and the int32 ids [B, S].

        valid: `num_counted` where the row counts and minus that where it does not: one column says both.
        """
        columns = [self.dense, self.labels, (2 * self.valid_mask() - 1) * self.num_counted]
        if self.weights is not None:
            columns.append(self.weights)
        return torch.cat(columns, dim=1), self.ids


class Split(Protocol):
    """The train or the test half of a data set.

    num_rows      rows in one epoch
    num_batches   batches in one epoch
    batch_size    B of every batch, the padded last one included
    """

    num_rows: int
    num_batches: int
    batch_size: int

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """One epoch from batch number `start` (0 = the beginning): the batches that a full epoch would give from there on.

        epoch: its number, from 0, for a split whose order changes from epoch to epoch.
        """


class Dataset(Protocol):
    """table_rows [T] rows of each table; hotness [T]; num_dense columns of dense features; bayes_auc where the data's maker knows it."""

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    num_dense: int
    bayes_auc: float | None
    train: Split
    test: Split


def slot_starts(hotness: Sequence[int]) -> np.ndarray:
    """[T + 1]: table t owns the slots starts[t] to starts[t + 1] - 1."""
    return np.concatenate([[0], np.cumsum(hotness)]).astype(np.int64)


def from_bags(dense: Tensor, lengths: Sequence[np.ndarray], indices: Sequence[np.ndarray], labels: Tensor, hotness: Sequence[int]) -> Batch:
    """Bags to slots.

    dense    [n, num_dense] float32, labels [n, 1] float32
    lengths  T arrays [n]: ids in each bag;  indices: T arrays [sum of lengths], bag after bag
    hotness  [T] slots of each table. A longer bag is a UserError: nothing is cut off.
    """
    num_rows, starts = dense.shape[0], slot_starts(hotness)
    ids = np.zeros((num_rows, starts[-1]), dtype=np.int32)
    weights = np.zeros((num_rows, starts[-1]), dtype=np.float32)
    for table, (length, index) in enumerate(zip(lengths, indices, strict=True)):
        longest = int(length.max(initial=0))
        if longest > hotness[table]:
            raise UserError(f"table {table}: a bag holds {longest} ids but only {hotness[table]} slots; raise --num-indices-per-lookup to {longest}")
        rows = np.repeat(np.arange(num_rows), length)
        first = np.cumsum(length) - length
        slots = starts[table] + np.arange(len(index)) - np.repeat(first, length)
        ids[rows, slots] = index
        weights[rows, slots] = 1
    return Batch(dense, torch.from_numpy(ids), torch.from_numpy(weights), labels, num_rows)


def to_bags(batch: Batch, hotness: Sequence[int]) -> tuple[list[Tensor], list[Tensor]]:
    """The valid rows as upstream sees them: T offsets [n] int64 and T indices [sum of lengths] int64."""
    starts, n = slot_starts(hotness), batch.num_valid
    offsets, indices = [], []
    for table in range(len(hotness)):
        slots = slice(int(starts[table]), int(starts[table + 1]))
        ids = batch.ids[:n, slots].long()
        filled = torch.ones_like(ids, dtype=torch.bool) if batch.weights is None else batch.weights[:n, slots] > 0
        lengths = filled.sum(1)
        offsets.append(torch.cumsum(lengths, 0) - lengths)
        indices.append(ids[filled])
    return offsets, indices


def pad_rows(batch: Batch, size: int) -> Batch:
    """The batch with `size` rows: padded ones are zero everywhere and do not count."""
    missing = size - batch.size
    if missing == 0:
        return batch

    def pad(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.cat([values, values.new_zeros(missing, values.shape[1])])

    return replace(batch, dense=pad(batch.dense), ids=pad(batch.ids), weights=pad(batch.weights), labels=pad(batch.labels))


def rank_part(batch: Batch, rank: int, world: int) -> Batch:
    """Rows [rank x b, (rank + 1) x b) of a whole batch, b = ceil(B / world): what one of `world` ranks trains on."""
    share = -(-batch.size // world)
    whole, rows = pad_rows(batch, share * world), slice(rank * share, (rank + 1) * share)
    return Batch(
        dense=whole.dense[rows],
        ids=whole.ids[rows],
        weights=None if whole.weights is None else whole.weights[rows],
        labels=whole.labels[rows],
        num_valid=min(max(batch.num_valid - rank * share, 0), share),
        total_valid=batch.num_counted,
    )
