"""Adding to rows of a matrix in place, duplicates included, at a cost that depends on the rows touched.

Eager PyTorch and XLA want different operators: on 53,248 rows of 16 over two cores `scatter_add_` with an expanded index takes 1.1 ms and
`index_add_` 3.7 ms in eager mode (it sorts once and adds in parallel), while XLA lowers the expanded index element by element (3 to 4 times
slower than `index_add_`). A backend picks its own.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

AddRows = Callable[[Tensor, Tensor, Tensor], None]


def add_rows_scatter(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """target [V, d] or [V] += values [K, d] or [K] at rows [K] int64, in place."""
    index = rows if values.dim() == 1 else rows[:, None].expand_as(values)
    target.scatter_add_(0, index, values)


def add_rows_index(target: Tensor, rows: Tensor, values: Tensor) -> None:
    """The same by index_add_; rows may be int32."""
    target.index_add_(0, rows, values)


@functools.lru_cache(maxsize=64)
def count_up(stop: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[0, 1, ..., stop - 1], made on the host and kept on the device: torch.arange on XLA is written into the program as a literal, number by
    number and anew for every step. At 53,248 rows that took 8 of the 9.9 ms of finding duplicates."""
    return torch.arange(stop, dtype=dtype).to(device)


def sum_duplicates(rows: Tensor, grads: Tensor, scratch: Tensor, add_rows: AddRows) -> Tensor:
    """[K, d]: for each distinct row, the sum of its gradients at one of its places and zero at the others.

    rows     [K] int64 or int32
    scratch  [V] int32, any content: which place of a row wins is written here and read back, so nothing is sorted, every shape is
             static and the buffer never needs clearing. Whichever place wins, the sum is the same.
    """
    scratch.index_copy_(0, rows.long(), count_up(rows.shape[0], torch.int32, rows.device))
    winner = scratch.index_select(0, rows).to(rows.dtype)
    total = torch.zeros_like(grads)
    add_rows(total, winner, grads)
    return total


def sum_sorted(rows: Tensor, records: Tensor, grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same by a sort, with static shapes too and no scratch: (rows [K], their records [K, r], sums [K, d]).

    The distinct rows come first, in rising order; behind them one of the rows is repeated with sums of zero.
    rows [K] int32
    """
    ordered, order = torch.sort(rows)
    order = order.to(torch.int32)  # torch_xla 2.9 aborts where the second result of a sort is an index itself
    changes = (ordered[1:] != ordered[:-1]).to(torch.int32)
    place = torch.nn.functional.pad(changes.cumsum(0, dtype=torch.int32), (1, 0))  # [K] of each sorted row among the distinct ones
    total = torch.zeros_like(grads).index_add_(0, place, grads.index_select(0, order))
    chosen = torch.zeros_like(order).index_copy_(0, place.long(), order)  # any place of the row will do
    return rows.index_select(0, chosen), records.index_select(0, chosen), total
