"""How rows of numbers lie in a buffer: one after the other, or several to a line of 128 lanes as a TPU's memory has them.

A layout is invisible above `RowStore`: it says what buffer holds V rows of `width` numbers, reads rows from it and adds to rows of it in place.

On TPU a float32 buffer is cut into tiles of 8 x 128 numbers, and a row shorter than 128 either fills up a line of 128 (8 times the memory at
width 16) or lies across as many lines as it has numbers. Packed, a row is a part of one aligned line of 512 bytes and the buffer has no
padding: one lookup reads one line and picks its lanes. docs/tpu.md shows what the TPU compiler makes of both.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dlrm_xla.ops.rows import AddRows, add_rows_index, count_up

LANES = 128  # numbers in a line of a TPU's memory tile


Fields = dict[str, int]  # name -> numbers a row; 0: one number, and the field is a vector


@dataclass(frozen=True)
class Region:
    """Where a field lies: from line `start` of a buffer on, `width` numbers a row."""

    buffer: str
    start: int
    width: int


class Layout(Protocol):
    """
    name         "rows" | "packed"
    index_dtype  of row numbers
    ragged       shapes may depend on the data there: bags without their padding, each row once (ops/bags.py)
    sorts        duplicates are found by sorting rows, not with a scratch of V numbers
    add_rows     in-place addition to rows of any matrix, with row numbers of that type
    """

    name: str
    index_dtype: torch.dtype
    ragged: bool
    sorts: bool
    add_rows: AddRows

    def regions(self, num_rows: int, fields: Fields) -> tuple[dict[str, tuple[int, ...]], dict[str, Region]]:
        """The shape of each buffer that holds V rows of the fields, by name, and where each field lies."""

    def gather(self, buffer: Tensor, region: Region, rows: Tensor) -> Tensor:
        """rows [K] -> [K, width], or [K] of a vector."""

    def add(self, buffer: Tensor, region: Region, rows: Tensor, values: Tensor) -> None:
        """The field += values [K, width] or [K] at rows [K], in place, duplicates included."""

    def as_rows(self, buffer: Tensor, region: Region, num_rows: int) -> Tensor:
        """[num_rows, width] or [num_rows]: a view of a buffer in the host's memory."""

    def to_host(self, buffer: Tensor) -> Tensor:
        """A buffer whole in the host's memory; itself where it lies there."""

    def from_host(self, buffer: Tensor, values: Tensor) -> None:
        """The buffer becomes values [like the buffer], in place."""


class _WholeBuffers:
    """A buffer is one tensor on one device."""

    def to_host(self, buffer: Tensor) -> Tensor:
        return buffer.cpu()

    def from_host(self, buffer: Tensor, values: Tensor) -> None:
        buffer.copy_(values)


class RowsLayout(_WholeBuffers):
    """Row after row: a buffer [V, width] or [V] for each field.

    add_rows: how this device adds to rows in place (ops/rows.py);  ragged: as in Layout
    """

    name = "rows"
    index_dtype = torch.int64
    sorts = False

    def __init__(self, add_rows: AddRows, ragged: bool):
        self.add_rows, self.ragged = add_rows, ragged

    def regions(self, num_rows: int, fields: Fields) -> tuple[dict[str, tuple[int, ...]], dict[str, Region]]:
        shapes = {name: (num_rows, width) if width else (num_rows,) for name, width in fields.items()}
        return shapes, {name: Region(name, 0, width) for name, width in fields.items()}

    def gather(self, buffer: Tensor, region: Region, rows: Tensor) -> Tensor:
        return buffer.index_select(0, rows)

    def add(self, buffer: Tensor, region: Region, rows: Tensor, values: Tensor) -> None:
        self.add_rows(buffer, rows, values)

    def as_rows(self, buffer: Tensor, region: Region, num_rows: int) -> Tensor:
        return buffer


class PackedLayout(_WholeBuffers):
    """Lines of 128 lanes: one buffer [lines, 128] for all fields, one field after the other.

    128 / stride rows of a field share a line, or a row longer than 128 takes several. stride is the width rounded up to a divisor of 128, or to a
    multiple of it: for widths 1, 2, 4, ..., 128, 256, 384 nothing is padded but a field's last line. Reading picks a row's lanes by a mask, which
    is exact whatever its neighbours hold (a NaN beside it included); adding adds zero to the neighbours. Row numbers are int32: TPUs compute
    with 64-bit integers in pairs.

    One buffer and no scratch, because the TPU compiler moves a buffer that fits into on-chip memory (128 MB on v5e) there and back in every
    step. With 26M rows of 16 and row-wise Adagrad that was 104 MB a step each way for a momentum, or a scratch, of its own, and the 56 MB of
    temporaries that it displaced; so it is 1.4 MB of temporaries and nothing moved. The compiler sorts row numbers for its own scatters anyway.
    """

    name = "packed"
    index_dtype = torch.int32
    ragged = False
    sorts = True
    add_rows = staticmethod(add_rows_index)

    def regions(self, num_rows: int, fields: Fields) -> tuple[dict[str, tuple[int, ...]], dict[str, Region]]:
        lines, found = 0, {}
        for name, width in fields.items():
            found[name] = Region("data", lines, width)
            lines += packed_lines(num_rows, width)
        return {"data": (lines, LANES)}, found

    def gather(self, buffer: Tensor, region: Region, rows: Tensor) -> Tensor:
        stride = lane_stride(region.width)
        if stride >= LANES:
            return buffer.index_select(0, self._lines(rows, region, stride)).view(rows.shape[0], stride)[:, : region.width]
        line, mine = self._place(rows, region, stride)
        slots = buffer.index_select(0, line).view(-1, LANES // stride, stride)
        values = torch.where(mine, slots, 0).sum(1, dtype=slots.dtype)  # [K, stride]; a field may be of int32
        return values[:, : region.width] if region.width else values.squeeze(1)

    def add(self, buffer: Tensor, region: Region, rows: Tensor, values: Tensor) -> None:
        stride = lane_stride(region.width)
        values = values.view(-1, max(region.width, 1))
        if stride > region.width > 0:
            values = torch.nn.functional.pad(values, (0, stride - region.width))
        if stride >= LANES:
            self.add_rows(buffer, self._lines(rows, region, stride), values.reshape(-1, LANES))
            return
        line, mine = self._place(rows, region, stride)
        self.add_rows(buffer, line, torch.where(mine, values[:, None, :], 0).view(-1, LANES))

    def as_rows(self, buffer: Tensor, region: Region, num_rows: int) -> Tensor:
        lines = buffer[region.start : region.start + packed_lines(num_rows, region.width)]
        rows = lines.view(-1, lane_stride(region.width))[:num_rows]
        return rows[:, : region.width] if region.width else rows.squeeze(1)

    def _place(self, rows: Tensor, region: Region, stride: int) -> tuple[Tensor, Tensor]:
        """Line of each row [K], and which of the line's slots is its own [K, 128 / stride, 1]. Shifts: a division checks signs."""
        slots = LANES // stride
        slot = torch.bitwise_and(rows, slots - 1)
        mine = slot[:, None, None] == count_up(slots, rows.dtype, rows.device)[None, :, None]
        return torch.bitwise_right_shift(rows, slots.bit_length() - 1) + region.start, mine

    def _lines(self, rows: Tensor, region: Region, stride: int) -> Tensor:
        """All lines of rows of `stride` lanes, [K * stride / 128]."""
        lines = stride // LANES
        if lines == 1:
            return rows + region.start
        return (rows[:, None] * lines + (count_up(lines, rows.dtype, rows.device) + region.start)).view(-1)


def lane_stride(width: int) -> int:
    """Lanes between two rows of a packed field: the smallest divisor of 128 that holds `width` numbers, or multiple of 128."""
    if width > LANES:
        return -(-width // LANES) * LANES
    return 1 << (max(width, 1) - 1).bit_length()


def packed_lines(num_rows: int, width: int) -> int:
    """Lines of a packed field."""
    return -(-num_rows * lane_stride(width) // LANES)
