"""Criteo's raw text to arrays, block by block: label, 13 counts, 26 hexadecimal ids, separated by tabs, nothing between two tabs = missing.

Upstream splits each line in Python (54 us of CPU per row). Here pyarrow cuts a block into columns, and the ids, eight ASCII digits in one
64-bit word, become numbers a column at a time. A block that holds anything out of the ordinary goes through a careful reader, line by line,
which either gives its rows or names the line, the column and the value that are wrong: no row is ever dropped.
Accepted as upstream does: CRLF line ends, a last line without its end, upper-case ids, ids of fewer than eight digits, "0x" before an id.
Refused though upstream takes it: a label other than 0 and 1 (an empty one included); blanks, plus signs, underscores that int() allows.
"""

import contextlib
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
from isal import igzip, isal_zlib
from tqdm import tqdm

from dlrm_xla.specs import UserError

NUM_DENSE, NUM_SPARSE = 13, 26
COLUMNS = ["label", *(f"I{i + 1}" for i in range(NUM_DENSE)), *(f"C{i + 1}" for i in range(NUM_SPARSE))]  # Criteo's own names
BLOCK_BYTES = 1 << 20  # about 4,300 rows: what one block needs stays in the cache
_ORDINARY = b"0123456789abcdefABCDEF\t\n\r-"
_LABEL = re.compile(rb"-?0+|0*1")
_COUNT = re.compile(rb"-?[0-9]+")
_HEX = re.compile(rb"(?:0[xX])?([0-9a-fA-F]{1,8})")
_EIGHT_ZEROS = int.from_bytes(b"00000000", "little")
_INT32_MAX = 2**31 - 1


@dataclass
class Rows:
    """Some consecutive rows: labels [n] int32, counts [n, 13] int32 (missing = 0, negative as written), hashes [26, n] uint32 (missing = 0)."""

    labels: np.ndarray
    counts: np.ndarray
    hashes: np.ndarray


def blocks_from(path: Path, byte: int, line: int, bar: tqdm) -> Iterator[tuple[bytes, int]]:
    """(whole lines, number of the first one) of a raw file, plain or gzip (told by content), about BLOCK_BYTES each, in order; its last line may
    lack its end. From byte `byte` of the text (decompressed) on, where line number `line` begins. bar: goes on by the file's stored bytes."""
    with contextlib.ExitStack() as stack:
        try:
            stored = stack.enter_context(open(path, "rb"))
            zipped = stored.peek(2)[:2] == b"\x1f\x8b"
        except OSError as error:
            raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None
        # igzip: 0.35 us a row where the standard library's zlib takes 1.0
        text = igzip.IGzipFile(fileobj=stored) if zipped else stored
        skip, base = byte, bar.n
        if not zipped:
            skip, base = 0, bar.n - stored.seek(byte)
        rest, error, ended, taken = b"", None, False, 0
        while not ended:
            piece, error = _read_piece(text)
            if isinstance(text, igzip.IGzipFile):
                taken += len(piece)
                if error is not None:  # igzip gives nothing of a damaged stretch; zlib gives all that is before the damage
                    text, error = stack.enter_context(gzip.GzipFile(path)), None
                    text.seek(taken)
                    continue
            ended = error is not None or not piece
            bar.update(base + stored.tell() - bar.n)
            rest += piece[skip:]
            skip = max(0, skip - len(piece))
            end = rest.rfind(b"\n") + 1
            if end:
                yield rest[:end], line
                line += rest.count(b"\n", 0, end)
                rest = rest[end:]
            elif b"\0" in rest or len(rest) > 2 * BLOCK_BYTES:
                raise UserError(f"{path}: line {line}: {_not_text(rest)}")
        if error:
            cause = "ends before the end of its gzip data: it is cut off" if isinstance(error, EOFError) else f"is damaged: {error}"
            raise UserError(f"{path}: line {line}: the file {cause}; fetch it again")
        if rest:
            yield rest, line
        elif line == 1:
            raise UserError(f"{path}: the file is empty; it needs lines of {len(COLUMNS)} columns separated by tabs")


def _read_piece(text: io.BufferedIOBase) -> tuple[bytes, Exception | None]:
    """The next BLOCK_BYTES, fewer at the end; and what stopped the reading before: cut-off or damaged gzip data, or the disk."""
    pieces, missing = [], BLOCK_BYTES
    while missing > 0:
        try:
            piece = text.read1(missing)  # read() would lose what it got before the error
        except (EOFError, OSError, zlib.error, isal_zlib.error) as error:
            return b"".join(pieces), error
        if not piece:
            break
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces), None


def parse_block(block: bytes, first_line: int, path: Path) -> Rows:
    """Rows of a block of whole lines; first_line and path are for the message of a UserError."""
    num_lines = block.count(b"\n") + (not block.endswith(b"\n"))
    if not block.translate(None, _ORDINARY):
        for id_type in (pa.binary(8), pa.string()):
            rows = _parse_fast(block, id_type)
            if rows is not None and len(rows.labels) == num_lines:  # more where a lone carriage return ends a line for pyarrow
                return rows
    return _parse_carefully(block, first_line, path)


def _parse_fast(block: bytes, id_type: pa.DataType) -> Rows | None:
    """Rows of an ordinary block, or None where pyarrow or a check finds something else. id_type: 8 bytes exactly, or text of up to 8."""
    number_columns, id_columns = COLUMNS[: 1 + NUM_DENSE], COLUMNS[1 + NUM_DENSE :]
    types = dict.fromkeys(number_columns, pa.int32()) | dict.fromkeys(id_columns, id_type)
    try:
        table = csv.read_csv(
            pa.BufferReader(block),
            read_options=csv.ReadOptions(column_names=COLUMNS, use_threads=False, block_size=len(block) + 1),
            parse_options=csv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=csv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True, check_utf8=False),
        )
    except pa.ArrowInvalid:
        return None
    columns = [column.combine_chunks() for column in table.columns]
    labels = columns[0]
    if labels.null_count:
        return None
    labels = _values(labels, "<i4", 0)
    if ((labels != 0) & (labels != 1)).any():
        return None
    n = len(labels)
    counts = np.empty((n, NUM_DENSE), dtype=np.int32)
    for i, column in enumerate(columns[1 : 1 + NUM_DENSE]):
        counts[:, i] = _values(column, "<i4", 0)
    hashes = np.empty((NUM_SPARSE, n), dtype=np.uint32)
    for i, column in enumerate(columns[1 + NUM_DENSE :]):
        words = _words(column)
        if words is None or not _hex_to_int(words, hashes[i]):
            return None
    return Rows(labels.copy(), counts, hashes)


def _words(column: pa.Array) -> np.ndarray | None:
    """[n] uint64, the eight characters of each id, missing = "00000000"; None where one is longer than eight."""
    if column.type == pa.string():
        column = pc.utf8_lpad(pc.coalesce(column, "0"), 8, "0")
        if pc.max(pc.binary_length(column)).as_py() > 8:
            return None
        return np.frombuffer(column.buffers()[2], dtype="<u8", count=len(column))
    return _values(column, "<u8", _EIGHT_ZEROS)


def _values(column: pa.Array, dtype: str, missing: int) -> np.ndarray:
    """[n], missing ones filled in. (pyarrow's own to_numpy() and scalar() import pandas where it is installed: 0.15 s.)"""
    validity, data = column.buffers()
    values = np.frombuffer(data, dtype=dtype, count=len(column))
    if not column.null_count:
        return values
    valid = np.unpackbits(np.frombuffer(validity, dtype=np.uint8), count=len(column), bitorder="little").view(np.bool_)
    return np.where(valid, values, np.array(missing, dtype=dtype))


def _hex_to_int(words: np.ndarray, out: np.ndarray) -> bool:
    """Eight hexadecimal digits, first character in the lowest byte, to out [n] uint32. False where a character is a minus sign: the
    others that are not digits were ruled out. A digit has bits 4 and 5 set, a letter bit 6; a minus sign (0x2D) neither 4 nor 6."""
    u = np.uint64
    ones = u(0x0101010101010101)
    letters = (words >> u(6)) & ones
    if ((((words >> u(4)) & ones) | letters) != ones).any():
        return False
    value = (words & u(0x0F0F0F0F0F0F0F0F)) + letters * u(9)
    value = ((value << u(4)) | (value >> u(8))) & u(0x00FF00FF00FF00FF)
    value = ((value << u(8)) | (value >> u(16))) & u(0x0000FFFF0000FFFF)
    np.copyto(out, (value << u(16)) | (value >> u(32)), casting="unsafe")  # keeps the low 32 bits
    return True


def _parse_carefully(block: bytes, first_line: int, path: Path) -> Rows:
    """Rows of any block, one line after the other; raises the UserError of the first bad line."""
    lines = block.split(b"\n")
    if not lines[-1]:
        lines.pop()
    labels = np.empty(len(lines), dtype=np.int32)
    counts = np.zeros((len(lines), NUM_DENSE), dtype=np.int32)
    hashes = np.zeros((NUM_SPARSE, len(lines)), dtype=np.uint32)
    for k, line in enumerate(lines):
        cells = line.removesuffix(b"\r").split(b"\t")
        where = f"{path}: line {first_line + k}"
        if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
            raise UserError(f"{where}: {_not_text(line)}")
        if len(cells) != len(COLUMNS):
            found = "the line is blank" if len(cells) == 1 and not cells[0].strip() else f"{len(cells)} columns"
            if b"\r" in line.removesuffix(b"\r"):
                found += " (carriage returns within the line do not end it; save the file with line feeds)"
            raise UserError(f"{where}: {found}; a row has {len(COLUMNS)} columns separated by tabs: label, 13 counts, 26 ids")
        if not _LABEL.fullmatch(cells[0]):
            raise UserError(f"{where}, column 1 (label): {_show(cells[0])} is not 0 or 1")
        labels[k] = cells[0].endswith(b"1")
        for i, cell in enumerate(cells[1 : 1 + NUM_DENSE]):
            if cell:
                counts[k, i] = _count(cell, f"{where}, column {i + 2} (count {COLUMNS[i + 1]})")
        for i, cell in enumerate(cells[1 + NUM_DENSE :]):
            if cell:
                digits = _HEX.fullmatch(cell)
                if not digits:
                    column = i + 2 + NUM_DENSE
                    raise UserError(f"{where}, column {column} (id C{i + 1}): {_show(cell)} is not a hexadecimal id of 1 to 8 digits")
                hashes[i, k] = int(digits[1], 16)
    return Rows(labels, counts, hashes)


def _count(cell: bytes, where: str) -> int:
    if not _COUNT.fullmatch(cell):
        raise UserError(f"{where}: {_show(cell)} is not a whole number")
    value = int(cell) if len(cell) < 4000 else _INT32_MAX + 1
    if not -_INT32_MAX - 1 <= value <= _INT32_MAX:
        raise UserError(f"{where}: {_show(cell)} does not fit 32 bits ({-_INT32_MAX - 1} to {_INT32_MAX})")
    return value


def _show(cell: bytes) -> str:
    """The value as it goes into a message: ASCII, in quotes, at most 40 characters."""
    return ascii(cell[:40].decode("utf-8", "replace")) + ("..." if len(cell) > 40 else "")


def _not_text(line: bytes) -> str:
    if b"\0" in line or line.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "NUL bytes or a UTF-16 mark: this is not plain text; save it as ASCII (or UTF-8 without a mark)"
    if line.startswith(b"\xef\xbb\xbf"):
        return "a UTF-8 byte order mark; save the file without it"
    return f"no line end within {len(line) >> 20} MiB: this is not a Criteo text file"
