"""Some thousand rows of a table of any size, taken from all over it where its format allows that.

Plain text: read whole up to WHOLE_BYTES, else from PLACES places spread over the files; each begins anew at the first line end behind which
rows have the right number of columns, so that a line end within quotes is not taken for a row's. gzip: the beginning only, for what lies behind
can be had only by unpacking what is before. Parquet: the beginning of some row groups. Memory and time do not grow with the files.
"""

import csv
import gzip
import io
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as arrow_csv
import pyarrow.parquet as parquet
from isal import igzip, isal_zlib

from data_loaders.sniff import Dialect, sniff
from data_loaders.sniff_text import NoRows
from data_loaders.table_files import same_columns
from data_loaders.table_text import TextFormat, row_ends
from dlrm_xla.specs import UserError

WHOLE_BYTES = 32 << 20
PLACES, PLACE_BYTES = 32, 1 << 16  # and the least that is read at each
MOST_BYTES = 96 << 20  # of text, at most, over all places
NOT_UTF8 = "binary, not UTF-8"
_TRIES = 200  # line ends tried at a place
_READ_ERRORS = (EOFError, OSError, zlib.error, isal_zlib.error)


@dataclass
class Sample:
    """Rows of a table.

    columns     of strings, or lists of strings (Parquet); null where Parquet has none
    native      the columns' types in Parquet, "" of text; NOT_UTF8 of bytes that are none
    total_rows  of all files: counted where `exact`, else estimated from the bytes that the sample's rows take
    complete    the sample is all there is
    how         where the rows come from, in words
    skipped     rows that have another number of columns; not in the sample
    damage      of the gzip data, "" where none was met
    """

    files: tuple[Path, ...]
    dialect: Dialect
    columns: list[pa.Array]
    native: list[str]
    num_rows: int
    total_rows: int
    exact: bool
    complete: bool
    num_bytes: int
    how: str
    skipped: int = 0
    damage: str = ""


def take_sample(files: tuple[Path, ...], rows: int) -> Sample:
    """About `rows` rows, spread over the files. UserErrors as sniff's, and where files differ in kind or in their columns."""
    files, found = _with_rows(files)
    first = next(iter(found))
    dialect = found[first]
    sizes = [_size(path) for path in files]
    for path in found:
        _compare(first, dialect, path, found[path])
    if dialect.format == "parquet":
        return _sample_parquet(files, dialect, sizes, rows)
    try:
        return _sample_text(files, dialect, sizes, found, rows)
    except _NotUtf8:
        return _sample_text(files, replace(dialect, encoding="latin-1"), sizes, found, rows)


def _with_rows(files: tuple[Path, ...]) -> tuple[tuple[Path, ...], dict[Path, Dialect]]:
    """(files, the dialects of those that are looked into). Shards without rows are taken out, as reading passes over them."""
    found, empty, refusal = {}, set(), None
    for k in _spread(len(files), PLACES):
        try:
            found[files[k]] = sniff(files[k])
        except NoRows as error:
            empty.add(files[k])
            refusal = refusal or error
    if not found:
        raise refusal
    return tuple(path for path in files if path not in empty), found


class _NotUtf8(Exception):
    """Somewhere behind the beginning that sniff saw."""


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None


def _spread(n: int, most: int) -> list[int]:
    """At most `most` of the numbers below n, the first and the last among them."""
    return list(range(n)) if n <= most else sorted({round(k * (n - 1) / (most - 1)) for k in range(most)})


def _compare(first: Path, dialect: Dialect, path: Path, other: Dialect) -> None:
    if other.format != dialect.format:
        raise UserError(f"{path} is {other.format}, {first} {dialect.format}; files of one table must be of one format, so name those that are")
    if same_columns(other.columns, dialect.columns) or (dialect.header and not other.header and len(other.columns) == len(dialect.columns)):
        return
    if len(other.columns) != len(dialect.columns):
        difference = f"{len(other.columns)} columns, {first} {len(dialect.columns)}"
    else:
        mine, its = next(pair for pair in zip(dialect.columns, other.columns, strict=True) if pair[0] != pair[1])
        difference = f"a column {its!r} where {first} has {mine!r}"
    raise UserError(f"{path} has {difference}; files of one table must have the same columns, so name those that do")


# ---- text


def _sample_text(files: tuple[Path, ...], dialect: Dialect, sizes: list[int], found: dict[Path, Dialect], rows: int) -> Sample:
    """found: the dialects of the files that are looked into."""
    chosen = [k for k, path in enumerate(files) if path in found]
    zipped = {k: _is_gzip(files[k]) for k in chosen}
    dialect = replace(dialect, gzip=zipped[chosen[0]])
    whole = sum(sizes) <= WHOLE_BYTES and len(chosen) == len(files)
    pieces: list[_Piece] = []
    if not any(zipped.values()) and not whole:
        how = _places(files, dialect, sizes, found, chosen, rows, pieces)
    else:
        each = MOST_BYTES // len(chosen) if not whole or any(zipped.values()) else WHOLE_BYTES
        wanted = -(-rows // len(chosen))
        for k in chosen:
            pieces.append(_beginning(files[k], dialect, found[files[k]], sizes[k], each, 0 if whole and not zipped[k] else wanted))
        how = "the whole file" if len(files) == 1 else f"all {len(files)} files"
        if not all(piece.ended for piece in pieces):
            how = "the beginning of the file" if len(files) == 1 else f"the beginnings of {len(chosen)} of {len(files)} files"
            how += " (gzip: only the beginning can be had without unpacking the rest)" if any(zipped.values()) else ""
    tables = [piece.table for piece in pieces if piece.table.num_rows]
    if not tables:
        raise UserError(f"{files[0]}: no row of {len(dialect.columns)} columns was found where the file was looked into")
    exact = len(chosen) == len(files) and all(piece.ended for piece in pieces)
    counted = sum(table.num_rows for table in tables)
    total = counted if exact else max(counted, round(sum(sizes) * counted / max(1, sum(piece.stored for piece in pieces))))
    table = pa.concat_tables(tables)
    if table.num_rows > rows:
        kept = np.sort(np.random.default_rng(0).choice(table.num_rows, rows, replace=False))
        if exact:
            how = f"rows drawn at random from {how}"
        table = table.take(pa.array(kept))
    columns = [pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], pa.string()) for column in table.columns]
    skipped = sum(piece.skipped for piece in pieces)
    complete = exact and table.num_rows == total
    damage = next((f"{files[k]}: {piece.damage}" for k, piece in zip(chosen, pieces, strict=False) if piece.damage), "")
    return Sample(files, dialect, columns, [""] * len(columns), table.num_rows, total, exact, complete, sum(sizes), how, skipped, damage)


@dataclass
class _Piece:
    """Rows of one place. stored: bytes in the file that they take; ended: there is nothing before and behind them in the file; damage: what
    stopped the reading."""

    table: pa.Table
    skipped: int
    stored: int
    ended: bool
    damage: str = ""


def _is_gzip(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(2) == b"\x1f\x8b"
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None


def _beginning(path: Path, dialect: Dialect, its: Dialect, size: int, most_bytes: int, rows: int) -> _Piece:
    """The first rows of a file, plain or gzip: about `rows` of them (0: no limit), of at most most_bytes of text. its: the file's own dialect."""
    text, damage, wanted, ended = b"", None, most_bytes, False
    with open(path, "rb") as stored:
        file = igzip.IGzipFile(fileobj=stored) if _is_gzip(path) else stored
        while len(text) < wanted:
            try:
                piece = file.read1(1 << 20)
            except _READ_ERRORS as error:
                if not isinstance(file, igzip.IGzipFile):
                    damage = error
                    break
                file = gzip.GzipFile(fileobj=stored)  # igzip gives nothing of a damaged stretch; zlib gives all that is before the damage
                stored.seek(0)
                file.seek(len(text))
                continue
            if not piece:
                ended = True
                break
            text += piece
            if rows:  # known once there is text
                wanted = min(most_bytes, int(1.1 * rows * len(text) / max(1, text.count(b"\n"))) + 1)
        taken = min(stored.tell(), size)
    if not text:
        raise UserError(f"{path}: the gzip data is damaged or cut off ({damage}); fetch the file again")
    read = len(text)
    if not ended:
        text = text[: _last_row_end(text, dialect)]
    table, skipped = _parse(text, dialect, its, dialect.header and its.header)
    return _Piece(table, skipped, round(taken * len(text) / read), ended, " ".join(str(damage).split()) if damage else "")


def _places(
    files: tuple[Path, ...], dialect: Dialect, sizes: list[int], found: dict[Path, Dialect], chosen: list[int], rows: int, pieces: list[_Piece]
) -> str:
    """Adds rows from places spread over large plain files to `pieces`; returns where from, in words."""
    first = _read(files[0], 0, 1 << 20)
    row_bytes = max(1, len(first) / max(1, len(_row_ends(first, dialect))))
    each = PLACES // len(chosen) if len(chosen) < PLACES else 1
    length = int(min(MOST_BYTES / (each * len(chosen)), max(PLACE_BYTES, 1.1 * row_bytes * rows / (each * len(chosen)))))
    for k in chosen:
        starts = sorted({int(place) for place in np.linspace(0, max(0, sizes[k] - length), each)})
        for start in starts:
            text = _read(files[k], start, length)
            at_end = start + len(text) >= sizes[k]
            begin = 0 if start == 0 else _first_row(text, dialect)
            if begin is None:
                continue
            text = text[begin:]
            text = text if at_end else text[: _last_row_end(text, dialect)]
            its = found[files[k]]
            table, skipped = _parse(text, dialect, its, start == 0 and dialect.header and its.header)
            pieces.append(_Piece(table, skipped, len(text), start == 0 and at_end))
    which = "the file" if len(files) == 1 else f"{len(chosen)} of {len(files)} files" if len(chosen) < len(files) else f"{len(files)} files"
    return f"{len(pieces)} places spread over {which}"


def _read(path: Path, start: int, length: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None


def _first_row(text: bytes, dialect: Dialect) -> int | None:
    """Where the first whole row begins in a piece from the middle of a file; None where no line end is a row's."""
    begin = text.find(b"\n") + 1
    if not dialect.quote:
        return begin or None
    for _ in range(_TRIES):
        if not begin:
            return None
        lines = io.StringIO(text[begin : begin + (1 << 17)].decode(dialect.encoding, "replace"), newline="")
        widths = []
        try:
            for row in csv.reader(lines, delimiter=dialect.delimiter, quotechar=dialect.quote, strict=True):
                widths.append(len(row))
                if len(widths) == 50:
                    break
        except csv.Error as error:
            widths = [*widths, 0] if "unexpected end" in str(error) else []  # the piece's end may cut a quote
        if len(widths) > 3 and all(width in (len(dialect.columns), 0) for width in widths[:-1]):
            return begin
        begin = text.find(b"\n", begin) + 1
    return None


def _row_ends(text: bytes, dialect: Dialect) -> np.ndarray:
    """Where rows end; text begins with one."""
    return row_ends(text, TextFormat(dialect.delimiter.encode(), (dialect.quote or "").encode(), dialect.encoding))[0]


def _last_row_end(text: bytes, dialect: Dialect) -> int:
    """Behind the last row; 0 where none ends."""
    ends = _row_ends(text, dialect)
    return int(ends[-1]) + 1 if len(ends) else 0


def _parse(text: bytes, dialect: Dialect, its: Dialect, header: bool) -> tuple[pa.Table, int]:
    """(all columns as strings, in the order of dialect.columns, rows left out because they have another number of columns). its: the file's own
    dialect, whose columns may be in another order; header: the first row is one."""
    skipped = 0

    def skip(row: arrow_csv.InvalidRow) -> str:
        nonlocal skipped
        skipped += 1
        return "skip"

    names = [str(i) for i in range(len(dialect.columns))]
    empty = pa.table([pa.array([], pa.string()) for _ in names], names=names)
    if not text.strip():
        return empty, 0
    try:
        table = arrow_csv.read_csv(
            pa.BufferReader(text),
            # as Latin-1 no byte is wrong; UTF-8 is checked below
            arrow_csv.ReadOptions(
                column_names=names, use_threads=False, block_size=len(text) + 16, skip_rows_after_names=int(header), encoding=_arrow_name(dialect)
            ),
            arrow_csv.ParseOptions(
                delimiter=dialect.delimiter,
                quote_char=dialect.quote or False,
                newlines_in_values=bool(dialect.quote),
                ignore_empty_lines=True,
                invalid_row_handler=skip,
            ),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False),
        )
    except pa.ArrowInvalid as error:
        if "UTF8" in str(error) or "UTF-8" in str(error):
            raise _NotUtf8 from None
        return empty, skipped
    if its.header and its.columns != dialect.columns:
        table = table.select([its.columns.index(name) for name in dialect.columns])
        table = table.rename_columns(names)
    return table, skipped


def _arrow_name(dialect: Dialect) -> str:
    return "utf8" if dialect.encoding == "utf-8" else "latin-1"


# ---- Parquet


def _sample_parquet(files: tuple[Path, ...], dialect: Dialect, sizes: list[int], rows: int) -> Sample:
    groups = []  # (file, row group, its rows)
    for path in files:
        try:
            metadata = parquet.read_metadata(path)
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: cannot be read as Parquet: {' '.join(str(error).split())[:200]}; write it again") from None
        groups += [(path, g, metadata.row_group(g).num_rows) for g in range(metadata.num_row_groups) if metadata.row_group(g).num_rows]
    total = sum(group[2] for group in groups)
    chosen = [groups[k] for k in _spread(len(groups), PLACES)]
    batches, taken = [], 0
    for number, (path, group, group_rows) in enumerate(chosen):
        wanted = min(group_rows, max(0, -(-(rows - taken) // (len(chosen) - number))))
        try:
            found = _parquet_rows(path, group, wanted, MOST_BYTES // len(chosen))
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path}: row group {group} cannot be read: {' '.join(str(error).split())[:200]}; write the file again") from None
        batches += found
        taken += sum(batch.num_rows for batch in found)
    table = pa.Table.from_batches(batches) if len({batch.schema for batch in batches}) == 1 else pa.concat_tables(
        [pa.Table.from_batches([batch]) for batch in batches], promote_options="permissive"
    )  # fmt: skip
    columns = [_as_text(column.combine_chunks()) for column in table.columns]
    complete = table.num_rows == total
    how = "the whole file" if complete and len(files) == 1 else f"all {len(files)} files" if complete else ""
    if not complete:
        which = "row group" if len(groups) == 1 else f"{len(chosen)} of {len(groups)} row groups"
        how = f"the beginning of the {which}" if len(groups) == 1 else f"the beginnings of {which}"
    native = [
        NOT_UTF8 if "binary" in str(field.type) and text.null_count > table.column(field.name).null_count else str(field.type)
        for field, text in zip(table.schema, columns, strict=True)
    ]
    return Sample(files, dialect, columns, native, table.num_rows, total, True, complete, sum(sizes), how)


def _parquet_rows(path: Path, group: int, rows: int, most_bytes: int) -> list[pa.RecordBatch]:
    found, taken, size = [], 0, 0
    with parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=min(max(rows, 1), 4096), row_groups=[group], use_threads=False):
            found.append(batch.slice(0, rows - taken))
            taken += found[-1].num_rows
            size += batch.nbytes
            if taken >= rows or size > most_bytes:
                break
    return found


def _as_text(column: pa.Array) -> pa.Array:
    """Of strings or of lists of strings; what is neither number, text, time nor list of them becomes null everywhere."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    try:
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            if pa.types.is_nested(kind.value_type):
                raise pa.ArrowNotImplementedError("lists of lists")
            return column.cast(pa.list_(pa.string()))
        if pa.types.is_nested(kind):
            raise pa.ArrowNotImplementedError("struct, map")
        return column.cast(pa.string()) if not pa.types.is_null(kind) else pa.nulls(len(column), pa.string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return pa.nulls(len(column), pa.string())
