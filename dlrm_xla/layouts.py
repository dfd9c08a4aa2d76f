"""How rows of numbers lie in a buffer: one after the other, or several to a line of 128 lanes as a TPU's memory has them.

A layout is invisible above `RowStore`: it says what buffer holds V rows of `width` numbers, reads rows from it and adds to rows of it in place.

On TPU a float32 buffer is cut into tiles of 8 x 128 numbers, and a row shorter than 128 either fills up a line of 128 (8 times the memory at
width 16) or lies across as many lines as it has numbers. Packed, a row is a part of one aligned line of 512 bytes and the buffer has no
padding: one lookup reads one line and picks its lanes. docs/tpu.md shows what the TPU compiler makes of both.
"""

from typing import Protocol

import torch
from torch import Tensor

from dlrm_xla.ops.rows import AddRows, add_rows_index, count_up

LANES = 128  # numbers in a line of a TPU's memory tile


class Layout(Protocol):
    """
    name         "rows" | "packed"
    index_dtype  of row numbers
    ragged       shapes may depend on the data there: bags without their padding, each row once (ops/bags.py)
    add_rows     in-place addition to rows of any buffer, with row numbers of that type
    """

    name: str
    index_dtype: torch.dtype
    ragged: bool
    add_rows: AddRows

    def shape(self, num_rows: int, width: int) -> tuple[int, ...]:
        """Of the buffer that holds [num_rows, width]; width 0: one number a row."""

    def gather(self, buffer: Tensor, rows: Tensor, width: int) -> Tensor:
        """rows [K] -> [K, width], or [K] where width is 0."""

    def add(self, buffer: Tensor, rows: Tensor, values: Tensor) -> None:
        """buffer += values [K, width] or [K] at rows [K], in place, duplicates included."""

    def as_rows(self, buffer: Tensor, num_rows: int, width: int) -> Tensor:
        """[num_rows, width] or [num_rows]: a view of a buffer in the host's memory."""


class RowsLayout:
    """Row after row, [V, width]. add_rows: how this device adds to rows in place (ops/rows.py); ragged: as in Layout."""

    name = "rows"
    index_dtype = torch.int64

    def __init__(self, add_rows: AddRows, ragged: bool):
        self.add_rows, self.ragged = add_rows, ragged

    def shape(self, num_rows: int, width: int) -> tuple[int, ...]:
        return (num_rows, width) if width else (num_rows,)

    def gather(self, buffer: Tensor, rows: Tensor, width: int) -> Tensor:
        return buffer.index_select(0, rows)

    def add(self, buffer: Tensor, rows: Tensor, values: Tensor) -> None:
        self.add_rows(buffer, rows, values)

    def as_rows(self, buffer: Tensor, num_rows: int, width: int) -> Tensor:
        return buffer


class PackedLayout:
    """Lines of 128 lanes, [lines, 128]: 128 / stride rows share a line, or a row longer than 128 takes several.

    stride is the width rounded up to a divisor of 128, or to a multiple of it: for widths 1, 2, 4, ..., 128, 256, 384 nothing is padded but the
    last line. Reading picks a row's lanes by a mask, which is exact whatever its neighbours hold (a NaN beside it included); adding adds
    zero to the neighbours. Row numbers are int32: TPUs compute with 64-bit integers in pairs.
    """

    name = "packed"
    index_dtype = torch.int32
    ragged = False
    add_rows = staticmethod(add_rows_index)

    def shape(self, num_rows: int, width: int) -> tuple[int, ...]:
        stride = lane_stride(width)
        return (-(-num_rows * stride // LANES), LANES)

    def gather(self, buffer: Tensor, rows: Tensor, width: int) -> Tensor:
        stride = lane_stride(width)
        if stride >= LANES:
            return buffer.index_select(0, self._lines(rows, stride)).view(rows.shape[0], stride)[:, :width]
        line, mine = self._place(rows, stride)
        slots = buffer.index_select(0, line).view(-1, LANES // stride, stride)
        values = torch.where(mine, slots, 0.0).sum(1)  # [K, stride]
        return values[:, :width] if width else values.squeeze(1)

    def add(self, buffer: Tensor, rows: Tensor, values: Tensor) -> None:
        width = values.shape[1] if values.dim() == 2 else 0
        stride = lane_stride(width)
        values = values.view(-1, max(width, 1))
        if stride > width > 0:
            values = torch.nn.functional.pad(values, (0, stride - width))
        if stride >= LANES:
            self.add_rows(buffer, self._lines(rows, stride), values.reshape(-1, LANES))
            return
        line, mine = self._place(rows, stride)
        self.add_rows(buffer, line, torch.where(mine, values[:, None, :], 0.0).view(-1, LANES))

    def as_rows(self, buffer: Tensor, num_rows: int, width: int) -> Tensor:
        rows = buffer.view(-1, lane_stride(width))[:num_rows]
        return rows[:, :width] if width else rows.squeeze(1)

    def _place(self, rows: Tensor, stride: int) -> tuple[Tensor, Tensor]:
        """Line of each row [K], and which of the line's slots is its own [K, 128 / stride, 1]. Shifts: a division checks signs."""
        slots = LANES // stride
        slot = torch.bitwise_and(rows, slots - 1)
        mine = slot[:, None, None] == count_up(slots, rows.dtype, rows.device)[None, :, None]
        return torch.bitwise_right_shift(rows, slots.bit_length() - 1), mine

    def _lines(self, rows: Tensor, stride: int) -> Tensor:
        """All lines of rows of `stride` lanes, [K * stride / 128]."""
        lines = stride // LANES
        if lines == 1:
            return rows
        return (rows[:, None] * lines + count_up(lines, rows.dtype, rows.device)).view(-1)


def lane_stride(width: int) -> int:
    """Lanes between two rows of a packed buffer: the smallest divisor of 128 that holds `width` numbers, or multiple of 128."""
    if width > LANES:
        return -(-width // LANES) * LANES
    return 1 << (max(width, 1) - 1).bit_length()
