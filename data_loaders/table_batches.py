"""Rows of an arrays folder of a user's table as mini-batches: dense columns, single ids and bags."""

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from data_loaders.arrays import Arrays
from data_loaders.manifest import Manifest, bag_files
from data_loaders.part import WHOLE, Part
from data_loaders.prefetch import Jobs
from dlrm_xla.batch import Batch, pad_rows, slot_starts


def full_bags(manifest: Manifest) -> bool:
    """Whether every bag of every row fills its slots, so that no batch needs weights."""
    bags = [table for table in manifest.tables if table.multi_hot]
    return all(manifest.files[bag_files(table.name)[1]].bytes == 4 * manifest.rows * table.hotness for table in bags)


class TableSplit:
    """Rows order[0], order[1], ... of the arrays (order None: rows `first` to `first + num_rows - 1` as they lie), as batches."""

    def __init__(
        self, arrays: Arrays, order: Any, *, first: int = 0, num_rows: int, batch_size: int, drop_last: bool = False, num_batches: int = 0,
        part: Part = WHOLE,
    ):  # fmt: skip
        """order: [num_rows] int64 tensor, or what stands for it; num_batches above 0 caps an epoch's batches; part: which rows of each batch are
        read and given, num_rows and batch_size are those of all ranks together."""
        self.num_rows = num_rows
        self.batch_size = min(batch_size, num_rows)
        whole, rest = divmod(num_rows, self.batch_size)
        available = whole if drop_last or rest == 0 else whole + 1
        self.num_batches = min(num_batches, available) if num_batches > 0 else available
        self._arrays, self._order, self._first, self._part = arrays, order, first, part
        tables = arrays.manifest.tables
        starts = slot_starts([table.hotness for table in tables])
        self._num_slots = int(starts[-1])
        self._one_hot = [int(start) for start, table in zip(starts, tables, strict=False) if not table.multi_hot]  # slots, in rows.bin's order
        self._bags = [(arrays.bags[table.name], int(start)) for start, table in zip(starts, tables, strict=False) if table.multi_hot]
        self._full = full_bags(arrays.manifest)

    def whole(self) -> "TableSplit":
        """The same split with all rows of each batch, whatever this rank's part is."""
        other = copy.copy(self)
        other._part = WHOLE
        return other

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """One epoch from batch number `start`; every epoch has the same order, as Criteo's."""
        return Jobs(self.batch, range(start, self.num_batches))

    def batch(self, number: int) -> Batch:
        """Batch `number` of the epoch; padded rows at the end of the last one."""
        begin = number * self.batch_size
        cut = self._part.cut(begin, min(begin + self.batch_size, self.num_rows), self.batch_size)
        begin, end = cut.begin, cut.end
        if self._order is None:
            numbers = None
            rows = self._arrays.rows[self._first + begin : self._first + end]
        else:
            numbers = self._order[begin:end]
            rows = self._arrays.rows
            if isinstance(rows, torch.Tensor):  # by NumPy: torch would start a team of threads beside the step's (data_loaders.criteo_split)
                rows = torch.from_numpy(rows.numpy().take(numbers.numpy(), axis=0))  # [n, W] int32
            else:
                rows = rows.index_select(0, numbers)
        num_dense = len(self._arrays.manifest.dense)
        floats = rows[:, : 1 + num_dense].contiguous().view(torch.float32)  # label | dense
        dense = floats[:, 1:].contiguous() if num_dense else torch.zeros(end - begin, 1)
        ids, weights = self._slots(rows, np.arange(self._first + begin, self._first + end) if numbers is None else numbers.numpy())
        return pad_rows(Batch(dense, ids, weights, floats[:, :1].contiguous(), end - begin, cut.total_valid), cut.size)

    def _slots(self, rows: torch.Tensor, numbers: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(ids [n, S] int32, weights [n, S] or None) of some rows, of which `numbers` [n] says where they lie."""
        single = rows[:, 1 + len(self._arrays.manifest.dense) :]
        if not self._bags:
            return single.contiguous(), None
        n, width = len(numbers), self._num_slots
        ids = np.zeros((n, width), dtype=np.int32)
        weights = None if self._full else np.zeros((n, width), dtype=np.float32)
        ids[:, self._one_hot] = single.numpy()
        if weights is not None:
            weights[:, self._one_hot] = 1
        row_starts = np.arange(n) * width
        for bags, start in self._bags:
            lengths, of_bags = bags.take(numbers)
            before = np.cumsum(lengths, dtype=np.int64) - lengths
            slots = np.arange(len(of_bags)) + np.repeat(row_starts + start - before, lengths)
            ids.reshape(-1)[slots] = of_bags
            if weights is not None:
                weights.reshape(-1)[slots] = 1
        return torch.from_numpy(ids), None if weights is None else torch.from_numpy(weights)
