"""A block of a text file to the cells of the columns that are needed, missing ones null.

pyarrow cuts an ordinary block. What it refuses, and where it finds another number of rows than there are line ends outside quotes, goes
through Python's csv module row by row, which gives the same cells or names the line that is wrong: no row is ever lost.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as arrow_csv

from data_loaders.table_text import MAX_ROW_BYTES, TextBlock, TextFormat, row_ends, text_blocks
from dlrm_xla.specs import UserError


def read_cells(
    block: TextBlock, path: Path, text: TextFormat, columns: Sequence[str], wanted: Sequence[int], missing: Sequence[str]
) -> list[pa.Array]:
    """Arrays of texts, one for each number of a column in `wanted`. columns: names of all. Raises UserError with file and line."""
    data = _as_utf8(block, path, text)
    ends, _ = row_ends(data, text)
    blank = data.startswith((b"\n", b"\r\n")) or b"\n\n" in data or b"\n\r\n" in data  # pyarrow takes an empty line for a row of missing cells
    if not blank:
        cells = _fast(data, text, len(columns), wanted, missing)
        if cells is not None and len(cells[0]) == len(ends):
            return cells
    return _carefully(data, block, path, text, columns, wanted, missing)


def first_row(path: Path, text: TextFormat) -> tuple[list[str], int, int] | None:
    """(cells of a file's first row, byte and line where the second begins); None where the file has none."""
    block = next(text_blocks(path, text, block_bytes=1 << 16), None)
    if block is None:
        return None
    ends, _ = row_ends(block.data, text)
    end = int(ends[0]) + 1
    row = _as_utf8(TextBlock(block.data[:end], block.byte, block.line, 0, 0, 0), path, text)
    cells = next(_rows(row, path, block.line, text), None)
    if cells is None:
        raise UserError(f"{path}: line {block.line} is empty; a table begins with its header or its first row")
    return cells[1], block.byte + end, block.line + block.data.count(b"\n", 0, end)


def _as_utf8(block: TextBlock, path: Path, text: TextFormat) -> bytes:
    data = block.data
    if data.isascii():
        return data
    if text.encoding == "latin-1":
        return data.decode("latin-1").encode()
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = block.line + data.count(b"\n", 0, error.start)
        around = ascii(data[max(0, error.start - 12) : error.start + 12])[1:]
        raise UserError(f"{path}: line {line}: not UTF-8 (byte {data[error.start]:#04x} in {around}); is it encoding: latin-1?") from None
    return data


def _fast(data: bytes, text: TextFormat, num_columns: int, wanted: Sequence[int], missing: Sequence[str]) -> list[pa.Array] | None:
    names = [str(number) for number in range(num_columns)]  # whatever the file calls them, these differ
    include = [names[number] for number in wanted]
    quote = text.quote.decode() if text.quote and text.quote in data else False
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(data),
            read_options=arrow_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(data) + 1),
            parse_options=arrow_csv.ParseOptions(
                delimiter=text.delimiter.decode(), quote_char=quote, newlines_in_values=bool(quote), ignore_empty_lines=False
            ),
            convert_options=arrow_csv.ConvertOptions(
                include_columns=include,
                column_types=dict.fromkeys(include, pa.string()),
                null_values=list(missing),
                strings_can_be_null=True,
                check_utf8=False,
            ),
        )
    except pa.ArrowInvalid:
        return None
    return [column.combine_chunks() if column.num_chunks != 1 else column.chunk(0) for column in table.columns]


def _carefully(
    data: bytes, block: TextBlock, path: Path, text: TextFormat, columns: Sequence[str], wanted: Sequence[int], missing: Sequence[str]
) -> list[pa.Array]:
    nothing, found = frozenset(missing), [[] for _ in wanted]
    for line, cells in _rows(data, path, block.line, text):
        if len(cells) != len(columns):
            what = "the line is empty" if not cells else f"{len(cells)} columns"
            names = ", ".join(columns[:8]) + (", ..." if len(columns) > 8 else "")
            raise UserError(f"{path}: line {line}: {what}; a row has {len(columns)} columns ({names}) separated by {text.delimiter.decode()!r}")
        for column, number in zip(found, wanted, strict=True):
            column.append(None if cells[number] in nothing else cells[number])
    return [pa.array(column, pa.string()) for column in found]


def _rows(data: bytes, path: Path, line: int, text: TextFormat) -> Iterator[tuple[int, list[str]]]:
    """(line on which it begins, cells) of each row, by the csv module."""
    quoting = {"quotechar": text.quote.decode()} if text.quote else {"quoting": csv.QUOTE_NONE}
    lines = (piece + "\n" for piece in data.decode("utf-8").removesuffix("\n").split("\n"))
    csv.field_size_limit(MAX_ROW_BYTES)  # pyarrow has no limit of its own
    reader = csv.reader(lines, delimiter=text.delimiter.decode(), **quoting)
    while True:
        at = line + reader.line_num
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            what = str(error)
            if "new-line character" in what:
                what = "a carriage return within the line; end lines with \\n or \\r\\n, and quote cells that hold line ends"
            raise UserError(f"{path}: line {at}: {what}") from None
        yield at, cells
