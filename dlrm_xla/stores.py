"""Rows of numbers that are read and updated in place: the unit of storage, of row updates and of byte counting.

A store is not an autograd parameter. Rows are gathered, made leaves, and their gradients are handed back: no [V, d] gradient ever exists.

What a rule keeps for every weight lies behind the weight in the same row (`record`): a lookup fetches both, an update writes both in one
addition. Apart, XLA copies both tables in every step (of three forms tried, none kept it in place); together, it is also a quarter
faster in eager PyTorch. One number a row (`scalars`) and the scratch for duplicates have buffers of their own.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlrm_xla.layouts import Layout
from dlrm_xla.ops.bags import Bags, add_row_grads, bag_sum, chunk_rows, distinct_row_grads, pack
from dlrm_xla.ops.rows import sum_duplicates, sum_sorted
from dlrm_xla.specs import UserError


def check_rows(num_rows: int, width: int, layout: Layout) -> None:
    """UserError for more rows than the layout can number."""
    most = torch.iinfo(layout.index_dtype).max
    if num_rows > most:
        raise UserError(
            f"--table-layout={layout.name}: the tables of width {width} have {num_rows} rows together and rows are numbered up to {most}; "
            "make them smaller (--max-ind-range, --compress)" + ("" if layout.name == "rows" else ", or take --table-layout=rows")
        )


class Window:
    """Rows [first, first + n) of a matrix [total, width] that a `fill` believes to write whole: what falls outside is drawn and forgotten.

    It stands for a tensor as far as fills go: shape, slices of rows, writing into them in place.
    """

    def __init__(self, rows: Tensor, first: int, total: int, offset: int = 0):
        """rows [n, width]; offset: of this window's row 0 in the matrix."""
        self.rows, self.first, self.offset = rows, first, offset
        self.shape = torch.Size((total, rows.shape[1]))

    def __getitem__(self, piece: slice) -> "Window":
        start, stop, _ = piece.indices(self.shape[0])
        return Window(self.rows, self.first, max(stop - start, 0), self.offset + start)

    def __len__(self) -> int:
        return self.shape[0]

    def copy_(self, values: Tensor) -> "Window":
        begin, end = max(self.offset, self.first), min(self.offset + self.shape[0], self.first + self.rows.shape[0])
        if begin < end:
            self.rows[begin - self.first : end - self.first].copy_(values.expand(self.shape)[begin - self.offset : end - self.offset])
        return self


class FieldStore(nn.Module):
    """What stores of rows share: fields in buffers, as a layout has them. Subclasses set num_rows, layout, regions and buffer_names."""

    def add_scalar(self, name: str, rows: Tensor, values: Tensor) -> Tensor:
        """Add values [K] to the scalar `name` of rows [K]; returns it afterwards, [K]."""
        self._add(name, rows, values)
        return self._gather(name, rows)

    def _gather(self, field: str, rows: Tensor) -> Tensor:
        region = self.regions[field]
        return self.layout.gather(getattr(self, region.buffer), region, rows)

    def _add(self, field: str, rows: Tensor, values: Tensor) -> None:
        region = self.regions[field]
        self.layout.add(getattr(self, region.buffer), region, rows, values)

    def on_host(self) -> dict[str, Tensor]:
        """Buffer name -> that buffer in the host's memory; on a CPU the buffers themselves. For `fields` and `load`."""
        return {name: self.layout.to_host(getattr(self, name)) for name in self.buffer_names}

    @torch.no_grad()
    def load(self, buffers: dict[str, Tensor]) -> None:
        """Send what was written into on_host() back to the device."""
        for name, value in buffers.items():
            if getattr(self, name) is not value:
                self.layout.from_host(getattr(self, name), value)


class RowStore(FieldStore):
    """V rows of d float32 numbers and their optimizer's state, in one layout.

    Fields: "data", the records [V, d x len(rule.record)], the weights of a row and then its state for every weight; and a vector [V] for each of
    rule.scalars. The layout says which buffers hold them. scratch: [V] int32, any content, where duplicates are found with its help.
    device: "cpu", or "meta": shapes only.
    """

    reads_bags = True

    def __init__(self, num_rows: int, width: int, rule, layout: Layout, device: str = "cpu"):
        super().__init__()
        check_rows(num_rows, width, layout)
        self.num_rows, self.width, self.rule, self.layout = num_rows, width, rule, layout
        self.record_width = width * len(rule.record)
        shapes, self.regions = layout.regions(num_rows, {"data": self.record_width, **dict.fromkeys(rule.scalars, 0)})
        self.buffer_names = tuple(shapes)
        for name, shape in shapes.items():
            # zeros come from the system page by page as they are first written, so an unwritten half costs nothing
            self.register_buffer(name, torch.zeros(shape, device=device))
        if rule.sums_duplicates and not layout.ragged and not layout.sorts:
            self.register_buffer("scratch", torch.zeros(num_rows, dtype=torch.int32, device=device))

    def read(self, rows: Tensor) -> Tensor:
        """rows [K] of layout.index_dtype -> records [K, record_width]; the first `width` numbers are the weights."""
        return self._gather("data", rows)

    def weights(self, records: Tensor) -> Tensor:
        """[K, record_width] -> [K, d]."""
        return records if self.record_width == self.width else records[:, : self.width]

    def state(self, records: Tensor, name: str) -> Tensor:
        """[K, record_width] -> [K, d] of the state called `name`, as it was when the records were read."""
        first = self.rule.record.index(name) * self.width
        return records[:, first : first + self.width]

    @torch.no_grad()
    def update(self, rows: Tensor, records: Tensor, grads: Tensor, neg_lr: Tensor) -> None:
        """Apply the rule to rows [K] with gradients [K, d], in place; a row may stand there many times; a zero gradient changes nothing.

        records  [K, record_width] as read for this update; no other update came in between
        neg_lr   minus the learning rate, a 0-D tensor
        """
        if self.rule.sums_duplicates and self.layout.ragged:
            self.update_bags(pack(rows[:, None], None), grads, neg_lr)
            return
        if self.rule.sums_duplicates and self.layout.sorts:
            rows, records, grads = sum_sorted(rows, records, grads)
        elif self.rule.sums_duplicates:
            grads = sum_duplicates(rows, grads, self.scratch, self.layout.add_rows)
        self.rule.update_rows(self, rows, records, grads, neg_lr)

    def bag_sum(self, bags: Bags) -> Tensor:
        """[M, d]: the weighted sums of the bags' rows. Only where layout.ragged.

        Whole records are summed: over a view of their weights embedding_bag leaves its fast path and takes 24 times as long.
        """
        return self.weights(bag_sum(self.data, bags))

    @torch.no_grad()
    def update_bags(self, bags: Bags, grads: Tensor, neg_lr: Tensor) -> None:
        """The same update from the gradients [M, d] of bag_sum(bags). Only where layout.ragged."""
        chunk = chunk_rows(self.record_width)
        if not self.rule.sums_duplicates:
            add_row_grads(self.data, bags, grads * neg_lr, self.layout.add_rows, chunk)
            return
        for rows, totals in distinct_row_grads(bags, grads, self.num_rows, chunk):
            self.rule.update_rows(self, rows, self.read(rows), totals, neg_lr)

    def add(self, rows: Tensor, *parts: Tensor) -> None:
        """Add to the records of rows [K]: one [K, d] for each name of the rule's record."""
        self._add("data", rows, parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def state_buffers(self) -> tuple[str, ...]:
        """Buffers that no lookup needs."""
        return tuple(name for name, _ in self.named_buffers() if name != "data")

    def numbers(self, buffer: str) -> tuple[int, int]:
        """How many weights, and how many other numbers, a buffer holds; what it has beyond them is padding."""
        if buffer == "scratch":
            return 0, self.num_rows
        weights = self.num_rows * self.width if buffer == "data" else 0
        return weights, sum(self.num_rows * max(region.width, 1) for region in self.regions.values() if region.buffer == buffer) - weights

    def fields(self, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
        """Views of on_host() by name: "weight" [V, d], each state of the record [V, d], each scalar [V]."""
        whole = {name: self.layout.as_rows(buffers[region.buffer], region, self.num_rows) for name, region in self.regions.items()}
        records = whole.pop("data")
        return {name: records[:, i * self.width : (i + 1) * self.width] for i, name in enumerate(self.rule.record)} | whole

    def fill(self, start: int, num_rows: int, fill: Callable[[Tensor], None], first: int, total: int) -> None:
        """Starting values of rows [start, start + num_rows), rows first, ... of `total`, written by `fill` into a view of them. While the store is in
        the host's memory."""
        rows = self.weight()[start : start + num_rows]
        fill(rows if num_rows == total else Window(rows, first, total))

    @staticmethod
    def row_bytes(width: int, rule) -> int:
        """Of one row with its optimizer's state."""
        return 4 * (width * len(rule.record) + len(rule.scalars))

    def saved(self, fields: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """What a checkpoint keeps of some rows beside the optimizer's state, by what it appends to the part's name: views of `fields`."""
        return {"": fields["weight"][rows]}

    def weight(self) -> Tensor:
        """[V, d] float32 in the host's memory; on a CPU a view."""
        return self.fields(self.on_host())["weight"]
