"""Small unsigned integers for each row of a table (codes, pointers), packed into 32-bit words without gaps.

N rows of c codes of b bits take N c b / 8 bytes, rounded up to lines of 128 words. Both c and b are written as sums of powers of two: a *field*
is k neighbouring codes by p of their bits, both powers of two, and lies apart from the other fields. 4 codes of 13 bits are fields of 4 x 8,
4 x 4 and 4 x 1 bits. So a field of a row is a power of two of bits: it starts in no odd place, never lies across two words (or, longer than a
word, across two lines), and reading it takes shifts and masks alone. Numbers with more than three ones in binary are rounded up to the next
with three (15 bits to 16, 15 codes to 16): every further field is one more gather, for less than a seventh of the bytes.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.layouts import LANES
from dlrm_xla.ops.rows import count_up

MOST_FIELDS = 3  # of one number's powers of two
LONGEST = 128  # codes of a field: at 32 bits, a line
BLOCK = 1 << 16  # rows packed or unpacked at a time on the host


@dataclass(frozen=True)
class Field:
    """Bits [shift, shift + bits) of codes [first, first + codes): from word `start` of the buffer on."""

    first: int
    codes: int
    shift: int
    bits: int
    start: int

    @property
    def row_bits(self) -> int:
        return self.codes * self.bits

    @property
    def words(self) -> int:
        """A row's; 1 where several rows share a word."""
        return max(self.row_bits // 32, 1)

    @property
    def sharing(self) -> int:
        """Rows in a word; 1 where a row has one or several to itself."""
        return max(32 // self.row_bits, 1)


class PackedIntegers(nn.Module):
    """num_rows x num_codes integers in [0, 2^bits), bits at most 31. Buffer `words`, int32 [lines, 128], persistent; zeros until written.

    kind  "codes" | "pointers", for the ledger
    """

    def __init__(self, num_rows: int, num_codes: int, bits: int, kind: str = "codes"):
        super().__init__()
        self.num_rows, self.num_codes, self.bits, self.kind = num_rows, num_codes, bits, kind
        self.fields = _fields(num_rows, num_codes, bits)
        self.register_buffer("words", torch.zeros(packed_bytes(num_rows, num_codes, bits) // (4 * LANES), LANES, dtype=torch.int32))

    def read(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., c] int32.

        int64 ids (rows layout) gather exactly the words of a row. int32 ids (packed layout, a TPU's) gather aligned lines of 128 words and pick
        the lanes: there a view of the buffer in narrower rows would be a copy of all of it. On a CPU picking lanes takes 7 to 30 times as long.
        """
        return self.read_from(self.words, ids)

    def write(self, first_row: int, codes: np.ndarray) -> None:
        """codes [n, c], integers, into rows [first_row, first_row + n)."""
        self.write_all([(first_row, codes)])

    def write_all(self, pieces: Iterable[tuple[int, np.ndarray]]) -> None:
        """Several pieces as in `write`; the buffer goes to the host and back once, after the last of them. Nothing is visible before that."""
        host = self.words.cpu()
        host = host.clone() if host is self.words else host
        flat = host.numpy().reshape(-1).view(np.uint32)
        for first_row, codes in pieces:
            if first_row < 0 or first_row + len(codes) > self.num_rows or codes.shape[1:] != (self.num_codes,):
                raise ValueError(f"codes {codes.shape} from row {first_row} on do not lie in [{self.num_rows}, {self.num_codes}]")
            if codes.size and not 0 <= codes.min() <= codes.max() < 1 << self.bits:
                raise ValueError(f"codes from {codes.min()} to {codes.max()} do not lie in {self.bits} bits")
            for start in range(0, len(codes), BLOCK):
                for field in self.fields:
                    _write_field(flat, field, first_row + start, codes[start : start + BLOCK, field.first : field.first + field.codes])
        self.words.copy_(host)

    def read_from(self, words: Tensor, ids: Tensor) -> Tensor:
        """The same from a copy of the buffer, in the host's memory perhaps."""
        rows = ids.reshape(-1)
        columns: dict[int, Tensor] = {}  # first code of a field -> [K, codes], the sum over its bits
        for field in self.fields:
            part = _unpack(_gather(words, field, rows), field, rows)
            part = torch.bitwise_left_shift(part, field.shift) if field.shift else part
            columns[field.first] = columns[field.first] + part if field.first in columns else part
        codes = next(iter(columns.values())) if len(columns) == 1 else torch.cat([columns[first] for first in sorted(columns)], 1)
        return codes[:, : self.num_codes].reshape(*ids.shape, self.num_codes)


def packed_bytes(num_rows: int, num_codes: int, bits: int) -> int:
    """Of the buffer: the fields' words, in whole lines of 512 bytes."""
    fields = _fields(num_rows, num_codes, bits)
    words = fields[-1].start + _field_words(num_rows, fields[-1].row_bits)
    return -(-words // LANES) * LANES * 4


def _fields(num_rows: int, num_codes: int, bits: int) -> list[Field]:
    """Longest rows first, so that each field starts at a multiple of its words: those before it are multiples of longer powers of two."""
    if not 1 <= bits <= 31:
        raise ValueError(f"codes of {bits} bits; they have 1 to 31")
    pieces, first = [], 0
    for codes in _powers(num_codes, LONGEST):
        shift = 0
        for width in reversed(_powers(bits, 32)):
            pieces.append((codes * width, first, codes, shift, width))
            shift += width
        first += codes
    fields, start = [], 0
    for row_bits, first, codes, shift, width in sorted(pieces, key=lambda piece: (-piece[0], piece[1], piece[3])):
        fields.append(Field(first, codes, shift, width, start))
        start += _field_words(num_rows, row_bits)
    return fields


def _powers(number: int, most: int) -> list[int]:
    """Powers of two in falling order, none above `most`: their sum is `number`, or the next that takes at most MOST_FIELDS below `most`."""
    whole, rest = divmod(number, most)
    while rest.bit_count() > MOST_FIELDS:
        rest += rest & -rest
    return [most] * whole + [1 << bit for bit in reversed(range(rest.bit_length())) if rest >> bit & 1]


def _field_words(num_rows: int, row_bits: int) -> int:
    return -(-num_rows * row_bits // 32)


def _gather(words: Tensor, field: Field, rows: Tensor) -> Tensor:
    """rows [K] -> the words of the field that hold them, [K, words]."""
    count = field.words
    at = torch.bitwise_right_shift(rows, field.sharing.bit_length() - 1) + field.start // count  # in units of `count` words
    if rows.dtype == torch.int64 or count == LANES:
        return words.view(-1, count).index_select(0, at)
    slots = LANES // count
    lines = words.index_select(0, torch.bitwise_right_shift(at, slots.bit_length() - 1)).view(-1, slots, count)
    slot = torch.bitwise_and(at, slots - 1)
    mine = slot[:, None, None] == count_up(slots, rows.dtype, rows.device)[None, :, None]
    return torch.where(mine, lines, 0).sum(1, dtype=torch.int32)


def _unpack(words: Tensor, field: Field, rows: Tensor) -> Tensor:
    """[K, words] -> the field's bits of each code, [K, codes] int32. Shifts of int32 repeat the sign; the mask takes that away."""
    if field.bits == 32:
        return words
    if field.sharing > 1:
        place = torch.bitwise_and(rows, field.sharing - 1).to(torch.int32) * field.row_bits
        words = torch.bitwise_right_shift(words, place[:, None])
    per_word = min(field.codes, 32 // field.bits)
    if per_word > 1:
        shifts = count_up(per_word, torch.int32, rows.device) * field.bits
        words = torch.bitwise_right_shift(words[:, :, None], shifts).reshape(-1, field.codes)
    return torch.bitwise_and(words, (1 << field.bits) - 1)


def _write_field(flat: np.ndarray, field: Field, first_row: int, codes: np.ndarray) -> None:
    """flat: all words, uint32; codes [n, <= field.codes], whole: the field's bits of them are written. Rows that share a word with them stay."""
    values = np.zeros((len(codes), field.codes), np.uint32)
    values[:, : codes.shape[1]] = (codes.astype(np.uint32) >> np.uint32(field.shift)) & np.uint32((1 << field.bits) - 1)
    before = first_row % field.sharing
    after = -(first_row + len(codes)) % field.sharing
    at = field.start + (first_row - before) // field.sharing * field.words
    count = (before + len(codes) + after) // field.sharing * field.words
    per_word = 32 // field.bits
    shifts = (np.arange(per_word) * field.bits).astype(np.uint32)
    numbers = np.pad(values, ((before, after), (0, 0))).reshape(count, per_word)
    mine = np.pad(np.full(values.shape, (1 << field.bits) - 1, np.uint32), ((before, after), (0, 0))).reshape(count, per_word)
    words, mask = ((part << shifts).sum(1, dtype=np.uint32) for part in (numbers, mine))
    flat[at : at + count] = flat[at : at + count] & ~mask | words
