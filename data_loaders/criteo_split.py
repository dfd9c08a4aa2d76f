"""Criteo's rows as mini-batches."""

import copy
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from data_loaders.part import WHOLE, Part
from data_loaders.prefetch import Jobs
from dlrm_xla.batch import Batch
from dlrm_xla.specs import UserError

_LOGS = 1 << 20  # of Kaggle's real counts, 4 in 100,000 are larger


def log_counts(counts: np.ndarray, out: np.ndarray) -> None:
    """log(count + 1) in float32 of whole numbers from 0. Looked up: 17 ns a row where torch.log, whose numbers these are (NumPy's differ in the
    last bit), takes 15 ns, or, with a team of threads on busy cores, 1,000."""
    np.take(_table_of_logs(), counts, out=out, mode="clip")
    if counts.max(initial=0) >= _LOGS:
        large = counts >= _LOGS
        out[large] = torch.log(torch.from_numpy(counts[large]).to(torch.float32) + 1).numpy()


@functools.cache
def _table_of_logs() -> np.ndarray:
    return torch.log(torch.arange(_LOGS, dtype=torch.int32).to(torch.float32) + 1).numpy()


class PackedRows(Protocol):
    """[n, 40] int32 = label | 13 counts | 26 ids: a tensor, or what stands for one that lies in a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice) -> Tensor: ...

    def index_select(self, dim: int, rows: Tensor) -> Tensor: ...


class CriteoSplit:
    """Rows order[0], order[1], ... of the packed rows (order None: rows `first` to `first + num_rows - 1` as they lie), as batches."""

    def __init__(
        self,
        packed: PackedRows,
        order: "Tensor | MappedOrder | None",  # noqa: F821  (data_loaders.reorder)
        *,
        first: int = 0,
        num_rows: int,
        batch_size: int,
        max_ind_range: int = -1,
        drop_last: bool = False,
        num_batches: int = 0,
        last_batch: int | None = None,
        batch_order: Callable[[int, int], Sequence[int]] | None = None,
        part: Part = WHOLE,
    ):
        """order          [num_rows] int64
        num_batches    above 0: caps an epoch's batches
        last_batch     number of the batch that takes all rows that are left, however many (upstream's loader under MLPerf)
        batch_order    (number of batches, epoch) -> their order in that epoch; None: 0, 1, ...
        part           which rows of each batch are read and given; num_rows and batch_size are those of all ranks together
        """
        self.num_rows = num_rows
        self.batch_size = min(batch_size, num_rows)
        whole, rest = divmod(num_rows, self.batch_size)
        self._available = whole if drop_last or rest == 0 else whole + 1
        self.num_batches = min(num_batches, self._available) if num_batches > 0 else self._available
        self._packed, self._order, self._first, self._max_ind_range = packed, order, first, max_ind_range
        self._last_batch, self._batch_order, self._part = last_batch, batch_order, part

    def whole(self) -> "CriteoSplit":
        """The same split with all rows of each batch, whatever this rank's part is."""
        other = copy.copy(self)
        other._part = WHOLE
        return other

    def batches(self, start: int = 0, epoch: int = 0) -> Iterator[Batch]:
        """One epoch from batch number `start`. Every epoch has the same order, as upstream's, unless batches are shuffled: then `epoch`,
        counted from 0, decides."""
        order = range(self._available) if self._batch_order is None else self._batch_order(self._available, epoch)
        end = self.num_batches if self._last_batch is None else min(self.num_batches, self._last_batch + 1)
        return Jobs(self.batch, (int(order[number]) for number in range(start, end)))

    def batch(self, number: int) -> Batch:
        """Batch `number` of the rows: dense = log(count + 1) in float32, no weights, padded rows at the end of the last one.

        NumPy instead of torch: an operator of torch on many numbers starts a team of threads of its own beside the training step's. While the
        step keeps all cores busy that costs ten times the work itself.
        """
        begin = number * self.batch_size
        end = self.num_rows if number == self._last_batch else min(begin + self.batch_size, self.num_rows)
        cut = self._part.cut(begin, end, max(self.batch_size, end - begin))
        begin, end, size = cut.begin, cut.end, cut.size
        if self._order is None:
            rows = self._packed[self._first + begin : self._first + end].numpy()
        elif isinstance(self._packed, Tensor):
            rows = self._packed.numpy().take(self._order[begin:end].numpy(), axis=0)  # [n, 40]
        else:
            rows = self._packed.index_select(0, self._order[begin:end]).numpy()
        n = end - begin
        new = np.empty if n == size else np.zeros
        labels, dense, ids = new((size, 1), np.float32), new((size, NUM_DENSE), np.float32), new((size, NUM_SPARSE), np.int32)
        labels[:n] = rows[:, :1]
        log_counts(rows[:, 1 : 1 + NUM_DENSE], out=dense[:n])
        ids[:n] = rows[:, 1 + NUM_DENSE :]
        if self._max_ind_range > 0:
            ids %= np.int32(self._max_ind_range)
        return Batch(torch.from_numpy(dense), torch.from_numpy(ids), None, torch.from_numpy(labels), n, cut.total_valid)


@dataclass
class CriteoDataset:
    """Both halves, and what the model needs to know of the columns (dlrm_xla.batch.Dataset)."""

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    num_dense: int
    bayes_auc: float | None
    train: CriteoSplit
    test: CriteoSplit


def upstreams_last_batch(days: Sequence[int], batch_size: int) -> int:
    """Number of the last batch that upstream's loader under MLPerf gives, which takes all rows that are left.

    days: rows of each train day. That loader cuts a batch from a day only while the day has more than a batch left, and keeps the rest for the
    next day; rests of days of at most a batch pile up. After such a pile of more than a batch, a longer day ends it with an error.
    """
    given, kept = 0, 0
    for rows in days:
        if rows > batch_size:
            if kept > batch_size:
                raise UserError(
                    f"--upstream-compat: upstream's loader under --mlperf-logging fails on these days (a day of {rows} rows after {kept} of "
                    f"days shorter than --mini-batch-size={batch_size}); leave --upstream-compat out, or make the batches smaller"
                )
            taken = batch_size - kept
            more = max(0, -(-(rows - batch_size - taken) // batch_size))
            given, kept, rows = given + 1 + more, 0, rows - taken - more * batch_size
        kept += rows
    return given
