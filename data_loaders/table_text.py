"""A delimited text file in blocks of whole rows, plain or gzip, quoted cells with line ends included, from any row on.

Where a row ends is found for a block at a time: without a quote character at every line end; with them, at the line ends outside quotes,
where a quote opens a cell only at its beginning and is doubled inside (RFC 4180, and Python's csv module).
"""

import contextlib
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from isal import igzip, isal_zlib

from dlrm_xla.specs import UserError

BLOCK_BYTES = 1 << 20
MAX_ROW_BYTES = 64 << 20
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class TextFormat:
    """delimiter: one byte; quote: one byte, or b"" where cells are not quoted; encoding: "utf-8" | "latin-1"."""

    delimiter: bytes
    quote: bytes
    encoding: str


@dataclass(frozen=True)
class TextBlock:
    """Whole rows. byte, line: where they begin in the (decompressed) file, lines counted from 1; end_byte, end_line: where the next row does;
    stored: bytes of the file, as stored, that were read so far."""

    data: bytes
    byte: int
    line: int
    end_byte: int
    end_line: int
    stored: int


def text_blocks(path: Path, text: TextFormat, byte: int = 0, line: int = 1, block_bytes: int = BLOCK_BYTES) -> Iterator[TextBlock]:
    """Blocks of up to block_bytes (more where a single row is longer) from the row that begins at `byte`, line `line`. The same blocks whether
    reading began there or before. Empty lines at the end are dropped, a byte order mark at the beginning too.

    Raises UserError for a file that cannot be read, damaged gzip data, a quote that is never closed, and a row without an end.
    """
    with contextlib.ExitStack() as stack:
        source = _open(stack, path)
        _skip(source, path, byte)
        rest, wanted, ended = b"", block_bytes, False
        while not ended:
            more = _read(source, wanted - len(rest), path, line)
            ended = len(more) < wanted - len(rest)
            rest += more
            if byte == 0 and rest.startswith(UTF8_MARK):
                rest, byte = rest[len(UTF8_MARK) :], len(UTF8_MARK)
            if b"\0" in more or (line == 1 and rest.startswith((b"\xff\xfe", b"\xfe\xff"))):
                at = line + rest[: max(rest.find(b"\0"), 0)].count(b"\n")
                raise UserError(f"{path}: line {at}: NUL bytes or a UTF-16 mark: this is not plain text; save it as UTF-8")
            if ended:
                rest = rest.rstrip(b"\r\n")
                rest += b"\n" if rest else b""
            ends, open_at = row_ends(rest, text)
            if ended and open_at is not None:
                at = line + rest.count(b"\n", 0, open_at)
                raise UserError(f"{path}: line {at}: a quote is opened and never closed; close it, or write quote: none if there are none")
            end = int(ends[-1]) + 1 if len(ends) else 0
            end = _without_blank_lines(rest, end)
            if not end and not ended:
                wanted = len(rest) + block_bytes
                if wanted > MAX_ROW_BYTES:
                    what = "a quote that is never closed?" if open_at is not None else "is this a table?"
                    raise UserError(f"{path}: line {line}: a row without an end within {MAX_ROW_BYTES >> 20} MiB; {what}")
                continue
            if end:
                data = rest[:end]
                following = line + data.count(b"\n")
                yield TextBlock(data, byte, line, byte + end, following, source.stored())
                rest, byte, line, wanted = rest[end:], byte + end, following, block_bytes


def row_ends(data: bytes, text: TextFormat) -> tuple[np.ndarray, int | None]:
    """([rows] places of the line ends that end a row, that of a quote which `data` ends inside of, or None). `data` begins with a row."""
    array = np.frombuffer(data, dtype=np.uint8)
    lines = np.flatnonzero(array == 10)
    if not text.quote or text.quote not in data:
        return lines, None
    quotes = np.flatnonzero(array == text.quote[0])
    # In order: first, third ... quote each at the beginning of a cell, or right behind the one before (a doubled quote is closed and opened)
    opening = quotes[::2]
    before = array[opening - 1]  # of a quote at position 0 the last byte, which is not looked at
    good = (before == text.delimiter[0]) | (before == 10) | (before == text.quote[0]) | (opening == 0)
    if good.all():
        outside = np.searchsorted(quotes, lines) % 2 == 0
        return lines[outside], int(_opened(quotes)) if len(quotes) % 2 else None
    return _row_ends_exactly(data, lines, text)


def _opened(quotes: np.ndarray) -> int:
    """Of an odd number of quotes: where the cell that the last one is in begins, before all its doubled quotes."""
    place = len(quotes) - 1
    while place >= 2 and quotes[place] == quotes[place - 1] + 1:
        place -= 2
    return quotes[place]


def _row_ends_exactly(data: bytes, lines: np.ndarray, text: TextFormat) -> tuple[np.ndarray, int | None]:
    """With quotes inside cells that are not quoted: one cell after the other."""
    quote, delimiter = re.escape(text.quote), re.escape(text.delimiter)
    not_quote = b"[^" + quote + b"]*"
    cell = re.compile(
        quote + b"(?<![^" + delimiter + rb"\n]" + quote + b")" + not_quote + b"(?:" + quote + quote + not_quote + b")*(?:(" + quote + rb")|\Z)"
    )
    starts, ends, open_at = [], [], None
    for found in cell.finditer(data):
        starts.append(found.start())
        ends.append(found.end())
        open_at = None if found[1] else found.start()
    before = np.searchsorted(np.array(starts, dtype=np.int64), lines) - 1
    inside = (before >= 0) & (lines < np.array(ends + [0], dtype=np.int64)[before])
    return lines[~inside], open_at


def row_line(block: TextBlock, row: int, text: TextFormat) -> int:
    """The line on which a row of the block begins."""
    if row == 0:
        return block.line
    return block.line + block.data.count(b"\n", 0, int(row_ends(block.data, text)[0][row - 1]) + 1)


def _without_blank_lines(data: bytes, end: int) -> int:
    """The end of the last row in data[:end] that is not an empty line: those may be the file's last ones, which are dropped."""
    if data[:end].endswith((b"\n\n", b"\n\r\n")):
        kept = len(data[:end].rstrip(b"\r\n"))
        return data.find(b"\n", kept) + 1 if kept else 0
    return 0 if data[:end] in (b"\n", b"\r\n") else end


class _Stored:
    """A file that is read from the front, decompressed where it is gzip (told by content)."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.zipped = file.peek(2)[:2] == b"\x1f\x8b"
        # igzip takes a third of the time of the standard library's zlib
        self._text = igzip.IGzipFile(fileobj=file) if self.zipped else file

    def read(self, size: int) -> bytes:
        return self._text.read(size)

    def seek(self, byte: int) -> None:
        self._text.seek(byte)

    def stored(self) -> int:
        return self._file.tell()


def _open(stack: contextlib.ExitStack, path: Path) -> _Stored:
    try:
        return _Stored(stack.enter_context(open(path, "rb")))
    except OSError as error:
        raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None


def _skip(source: _Stored, path: Path, byte: int) -> None:
    if not byte:
        return
    if not source.zipped:
        source.seek(byte)
        return
    while byte:
        skipped = len(_read(source, min(byte, BLOCK_BYTES), path, 1))
        if not skipped:
            raise UserError(f"{path}: is shorter than it was when reading it began; start again without the unfinished work beside the output")
        byte -= skipped


def _read(source: _Stored, size: int, path: Path, line: int) -> bytes:
    """Fewer than size bytes at the end only. Raises UserError for damage."""
    try:
        return source.read(size)
    except EOFError:
        raise UserError(f"{path}: after line {line}: the file ends before the end of its gzip data: it is cut off; fetch it again") from None
    except (OSError, zlib.error, isal_zlib.error) as error:
        what = "the gzip data are damaged" if source.zipped else "cannot read it"
        raise UserError(f"{path}: after line {line}: {what}: {' '.join(str(error).split())}; fetch it again") from None
