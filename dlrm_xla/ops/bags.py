"""Pooling bags straight from a matrix, and the gradients of its rows piece by piece: the [N, d] rows of a batch are never laid out.

For devices that allow shapes that depend on the data (eager PyTorch; XLA would compile a program for every number of ids). 256 x 8 bags of 100
rows, 8M rows of 64, one core: gathering all rows as an autograd leaf, pooling and adding their gradients takes 115 ms, this 29 ms; with 1 to 3
ids in the 100 slots 85 ms and 1.2 ms.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from dlrm_xla.ops.rows import AddRows

# Of gradients at once, for each thread: they stay in its L2 cache and malloc reuses the block. 204,800 rows of 64 on one core: 22.5 ms with 1 MB,
# 23.9 with 256 KB, 49 in one piece, 52 MB of fresh pages.
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Bags:
    """M bags of rows of one matrix, bag after bag, padded slots left out; N rows in all.

    rows     [N] int64
    bag_of   [N] int64, ascending: the bag that a row stands in
    starts   [M + 1] int64: bag m is rows[starts[m] : starts[m + 1]], possibly empty
    weights  [N] float or None (all ones); may require a gradient
    """

    rows: Tensor
    bag_of: Tensor
    starts: Tensor
    weights: Tensor | None

    @property
    def num_bags(self) -> int:
        return self.starts.shape[0] - 1


def pack(rows: Tensor, filled: Tensor | None, weights: Tensor | None = None) -> Bags:
    """Slots to bags.

    rows     [M, H] int64
    filled   [M, H] of any type, nonzero where a slot holds a row; None: every slot does
    weights  [M, H] float or None (all ones)
    """
    num_bags, hotness = rows.shape
    rows = rows.reshape(-1)
    bag_of = torch.arange(num_bags, device=rows.device)[:, None].expand(num_bags, hotness).reshape(-1)
    weights = None if weights is None else weights.reshape(-1)
    if filled is None:
        return Bags(rows, bag_of, torch.arange(num_bags + 1, device=rows.device) * hotness, weights)
    kept = filled.reshape(-1).nonzero().squeeze(1)
    starts = _starts((filled != 0).sum(1))
    return Bags(rows.index_select(0, kept), bag_of.index_select(0, kept), starts, None if weights is None else weights.index_select(0, kept))


def join(parts: Sequence[Bags]) -> Bags:
    """The bags of all parts in order. Where some have weights, those of the others are ones."""
    if len(parts) == 1:
        return parts[0]
    bag_of, starts = [], [parts[0].starts[:1]]
    bags = rows = 0
    for part in parts:
        bag_of.append(part.bag_of + bags)
        starts.append(part.starts[1:] + rows)
        bags, rows = bags + part.num_bags, rows + part.rows.shape[0]
    weights = None
    if any(part.weights is not None for part in parts):
        weights = torch.cat([torch.ones(part.rows.shape, device=part.rows.device) if part.weights is None else part.weights for part in parts])
    return Bags(torch.cat([part.rows for part in parts]), torch.cat(bag_of), torch.cat(starts), weights)


def bag_sum(matrix: Tensor, bags: Bags) -> Tensor:
    """matrix [V, d], no gradient of its own -> [M, d], the weighted sum of each bag's rows; zero for an empty bag.

    Differentiable in `bags.weights` only.
    """
    return embedding_bag(bags.rows, matrix, bags.starts, mode="sum", per_sample_weights=bags.weights, include_last_offset=True)


@torch.no_grad()
def add_row_grads(matrix: Tensor, bags: Bags, grads: Tensor, add_rows: AddRows, chunk: int | None) -> None:
    """matrix [V, d] += the gradients of its rows, in place. For a linear rule: hand in the gradients of the sums times minus the learning rate.

    grads  [M, d], the gradient of `bag_sum`
    chunk  rows added at once, `chunk_rows(d)` where a cache is to hold them; None: all
    """
    for rows, values in row_grads(bags, grads, chunk):
        if chunk is not None:
            read_ahead(matrix, rows)
        add_rows(matrix, rows, values)


@torch.no_grad()
def row_grads(bags: Bags, grads: Tensor, chunk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """The gradients of the rows of all bags in order: pieces (rows [n] int64, their gradients [n, d]). A row comes as often as it stands in bags."""
    if bags.rows.shape[0] == 0:
        return
    step = chunk or bags.rows.shape[0]
    weights = [None] * -(-bags.rows.shape[0] // step) if bags.weights is None else bags.weights.split(step)
    for rows, bag_of, weight in zip(bags.rows.split(step), bags.bag_of.split(step), weights, strict=True):
        values = grads.index_select(0, bag_of)
        yield rows, values if weight is None else values.mul_(weight[:, None])


@torch.no_grad()
def distinct_row_grads(bags: Bags, grads: Tensor, num_rows: int, chunk: int | None) -> Iterator[tuple[Tensor, Tensor]]:
    """For a rule that is not linear: pieces (rows [u] int64, sums [u, d] of their gradients); each distinct row comes once, in rising order.

    Also a sum over bags: after a sort by row, the bags where a row stands are its bag, and `grads` is the matrix.

    grads     [M, d], the gradient of `bag_sum`
    num_rows  V of the matrix
    chunk     distinct rows in a piece; None: all in one
    """
    if bags.rows.shape[0] == 0:
        return
    order, distinct, starts = _by_row(bags, num_rows)
    bag_of = bags.bag_of.index_select(0, order)
    weights = None if bags.weights is None else bags.weights.index_select(0, order)
    total = distinct.shape[0]
    step = min(chunk or total, total)
    first_places = [*starts[:total:step].tolist(), bag_of.shape[0]]
    for piece, first in enumerate(range(0, total, step)):
        here, last = slice(first_places[piece], first_places[piece + 1]), min(first + step, total)
        sums = embedding_bag(
            bag_of[here], grads, starts[first : last + 1] - first_places[piece], mode="sum",
            per_sample_weights=None if weights is None else weights[here], include_last_offset=True,
        )  # fmt: skip
        yield distinct[first:last], sums


def chunk_rows(width: int) -> int:
    """How many rows of `width` float32 numbers the cores' caches hold at once: CHUNK_BYTES for each thread."""
    return max(1, torch.get_num_threads() * CHUNK_BYTES // (4 * width))


def read_ahead(matrix: Tensor, rows: Tensor) -> None:
    """Brings rows into the cache: embedding_bag prefetches, adding to rows does not. 204,800 rows of 64, one core: 29.0 ms without, 20.8 with."""
    embedding_bag(rows, matrix, torch.arange(0, rows.shape[0], 64, device=rows.device), mode="sum")


def _by_row(bags: Bags, num_rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """order [N] int64 that sorts the rows and keeps equal ones in place, distinct rows [U] int64, starts [U + 1] of each among the sorted."""
    rows = bags.rows.int() if num_rows <= torch.iinfo(torch.int32).max else bags.rows  # 204,800 rows: 1.4 ms as int32, 2.5 as int64
    ordered, order = torch.sort(rows, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    return order, distinct.long(), _starts(counts)


def _starts(counts: Tensor) -> Tensor:
    """[n] -> [n + 1]: the running sum before each, and the total."""
    starts = counts.new_zeros(counts.shape[0] + 1)
    torch.cumsum(counts, 0, out=starts[1:])
    return starts
