"""A user's table as blocks of rows (data_loaders.blocks.Source): its files, its schema, and what each column becomes."""

import difflib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
from tqdm import tqdm

from data_loaders import table_values
from data_loaders.blocks import Block, Categorical, Dense, Mark, SplitRule
from data_loaders.schema import Schema
from data_loaders.schema_yaml import POSITIVE
from data_loaders.sniff import Dialect, sniff
from data_loaders.table_files import file_format, header_difference, part_names, same_columns, table_names
from data_loaders.table_parquet import num_rows, parquet_batches, parquet_types
from data_loaders.table_rows import first_row, read_cells
from data_loaders.table_text import TextBlock, TextFormat, row_line, text_blocks
from data_loaders.table_values import BadCell
from dlrm_xla.specs import UserError

_THREADS, _AHEAD = 2, 3
_SEARCHED_ROWS = 5_000_000  # for the cell that an error is about: some seconds


class TableSource:
    """Files of one table, rows as blocks; each file is a part. See data_loaders.blocks.Source for the attributes.

    first_time: of a split by time, how the column writes the first row's.
    Mark.byte and .line are where the next row begins in the decompressed text; Parquet: both the number of the next row in its file, from 0.
    """

    number_type = "float32"

    def __init__(self, files: tuple[Path, ...], schema: Schema, max_ind_range: int = -1):
        """Reads the beginning of every file. max_ind_range: of the columns for which the schema says none (0 and below: no limit).
        Raises UserError where files and schema do not fit."""
        self.files, self.schema = files, schema
        self.part_names = part_names(files)
        self._parquet = file_format(files, schema) == "parquet"
        self._types: dict[str, pa.DataType] = {}
        self._text: TextFormat | None = None
        self._headed: set[Path] = set()  # files whose first row is read as a row and looks like a header
        self.first_time = ""
        if self._parquet:
            self._starts = [(0, 0)] * len(files)
            self._open_parquet()
        else:
            self._open_text()
        self._used = list(self._checked_columns())
        self.dense = tuple(Dense(column.column, column.transform) for column in schema.dense)
        names = table_names(tuple(column.column for column in schema.categorical))
        self.categorical = tuple(
            Categorical(name, 32 if column.type == "hex" else 64, self._is_bag(column), column.max_hot, modulo)
            for name, column, modulo in zip(names, schema.categorical, column_ranges(schema, max_ind_range), strict=True)
        )
        self._missing = pa.array(schema.missing, pa.string())
        self._positive = _positive(schema)
        self._time_kind = self._find_time_kind() if schema.split.by == "time" else None
        self.split = self._split_rule()

    def describe(self) -> dict:
        """The schema and how the text is read; the files' contents are the parts' fingerprints."""
        text = self._text and [self._text.delimiter.decode(), self._text.quote.decode(), self._text.encoding, self._starts[0] != (0, 1)]
        ranges = [column.modulo for column in self.categorical]
        return {
            "source": "table", "schema": self.schema.canonical(), "columns": list(self._columns), "text": text,
            "test_parts": list(self.split.parts), "time": self._time_kind,
            "flags": {"schema": self.schema.fingerprint(), "max_ind_range": ranges},
        }  # fmt: skip

    def blocks(self, start: Mark | None, *, progress: bool) -> Iterator[tuple[Block, Mark]]:
        """See data_loaders.blocks.Source. Two threads make the blocks that come next."""
        rows, empty = start.rows if start else 0, {n for n, column in enumerate(self.categorical) if column.multi_hot and start is None}
        total = sum(map(_size, self.files))
        with ThreadPoolExecutor(_THREADS) as pool, tqdm(total=total, unit="B", unit_scale=True, desc="Reading", disable=not progress) as bar:
            for place, block in _in_order(pool, self._pieces(start)):
                bar.update(max(place.stored - bar.n, 0))
                rows += block.num_rows
                empty = {n for n in empty if not len(block.keys[n])}
                yield block, Mark(place.part, place.byte, place.line, rows)
        if not rows:
            raise UserError(f"{self.files[0]}: no rows; a table needs at least two, one to train on and one to test")
        for n in empty:
            column = self.schema.categorical[n]
            raise UserError(f"{self.schema.path}: line {column.line}: column {column.column!r} has no value in any row; take it out")

    # ---- reading ------------------------------------------------------------------------------------------------------------------

    def _pieces(self, start: Mark | None) -> "Iterator[tuple[_Place, Callable[[], Block]]]":
        """(the place behind the next block, what makes it)."""
        before = 0
        for part, path in enumerate(self.files):
            size = _size(path)
            if start is None or part >= start.file:
                byte, line = self._starts[part] if start is None or part > start.file else (start.byte, start.line)
                if self._parquet:
                    yield from self._parquet_pieces(part, path, line, before, size)
                elif self._starts[part] != (-1, -1):
                    for text in text_blocks(path, self._text, byte, line):
                        yield _Place(part, text.end_byte, text.end_line, before + text.stored), partial(self._text_block, text, part)
            before += size

    def _parquet_pieces(self, part: int, path: Path, row: int, before: int, size: int) -> "Iterator[tuple[_Place, Callable[[], Block]]]":
        total = max(num_rows(path), 1)
        for cells, first, following in parquet_batches(path, self._used, row):
            place = _Place(part, following, following, before + size * following // total)
            yield place, partial(self._parquet_block, cells, first, part)

    def _cells(self, text: TextBlock, part: int, names: list[str]) -> list[pa.Array]:
        columns = self._orders[part]
        return read_cells(text, self.files[part], self._text, columns, [columns.index(name) for name in names], self.schema.missing)

    def _text_block(self, text: TextBlock, part: int) -> Block:
        cells = self._cells(text, part, self._used)
        return self._block(cells, part, lambda row: f"line {row_line(text, row, self._text)}")

    def _parquet_block(self, cells: list[pa.Array], first: int, part: int) -> Block:
        return self._block(cells, part, lambda row: f"row {first + row + 1}")

    def _block(self, arrays: list[pa.Array], part: int, place) -> Block:
        """place: the words for where a row of the block is."""
        cells = dict(zip(self._used, arrays, strict=True))
        schema, path = self.schema, self.files[part]

        def read(column: str, convert, *details):
            try:
                return convert(cells[column], *details)
            except BadCell as bad:
                where = place(bad.row)
                raise UserError(f"{path}: {where}, column {column!r}: {bad.show()} {bad.rule}{self._header_hint(path, where)}") from None

        if self._parquet:
            for name in cells:
                if not table_values.is_list(cells[name].type):
                    cells[name] = read(name, table_values.plain, self._missing)
        labels = read(schema.label.column, table_values.label_values, self._positive)
        numbers = np.empty((len(labels), len(schema.dense)), dtype=np.float32)
        for number, column in enumerate(schema.dense):
            numbers[:, number] = read(column.column, table_values.dense)
        keys, lengths = [], []
        for column, categorical in zip(schema.categorical, self.categorical, strict=True):
            if categorical.multi_hot:
                details = (column.type, column.separator, column.max_hot, self._missing)
                of_bags, bag_lengths = read(column.column, table_values.bags, *details)
                keys.append(of_bags)
                lengths.append(bag_lengths)
            else:
                keys.append(read(column.column, table_values.keys, column.type))
                lengths.append(None)
        when = read(schema.split.column, table_values.times, self._time_kind) if self._time_kind else None
        return Block(labels, numbers, keys, lengths, part, when)

    def find_key(self, number: int, key: int) -> str:
        """File, place and cell of the first row whose key in column `number` this is, in words; "" where it is in none of the first rows."""
        categorical, name, seen = self.categorical[number], self.schema.categorical[number].column, 0
        for place, make in self._pieces(None):
            block = make()
            keys, lengths = block.keys[number], block.lengths[number]
            hits = np.flatnonzero((keys % keys.dtype.type(categorical.modulo) if categorical.modulo else keys) == key)
            if len(hits):
                row = int(hits[0]) if lengths is None else int(np.searchsorted(np.cumsum(lengths), hits[0], side="right"))
                where, cell = self._cell(make, row, name)
                return f"{self.files[place.part]}: {where}, column {name!r}: {ascii(str(cell)[:60])}"
            seen += block.num_rows
            if seen > _SEARCHED_ROWS:
                break
        return ""

    def _cell(self, make: partial, row: int, name: str) -> tuple[str, object]:
        """(place, cell) of a row of a block; make: what made it."""
        if self._parquet:
            cells, first, _ = make.args
            return f"row {first + row + 1}", cells[self._used.index(name)][row].as_py()
        text, part = make.args
        return f"line {row_line(text, row, self._text)}", self._cells(text, part, [name])[0][row].as_py()

    # ---- the files' beginnings ----------------------------------------------------------------------------------------------------

    def _open_parquet(self) -> None:
        first = self.files[0]
        self._types = parquet_types(first)
        self._columns = tuple(self._types)
        for path in self.files[1:]:
            types = parquet_types(path)
            for name in self.schema.used_columns():
                if name in types and pa.types.is_null(self._types.get(name, pa.string())):
                    self._types[name] = types[name]  # the first file has no value there
                as_text = any((column.column, column.type) == (name, "string") for column in self.schema.categorical)
                if name in self._types and not (name in types and table_values.agree(types[name], self._types[name], as_text)):
                    found = f"is {types[name]}" if name in types else "is missing"
                    raise UserError(f"{path}: column {name!r} {found}, but is {self._types[name]} in {first}; the files of one table must agree")

    def _open_text(self) -> None:
        """The dialect and the columns of the first file that is not empty, and where each file's rows begin; (-1, -1): it has none."""
        schema = self.schema
        begun, dialect = self._sniff()
        self._text = TextFormat(dialect.delimiter.encode(), (dialect.quote or "").encode(), dialect.encoding)
        header = schema.header
        self._starts, self._orders, names = [], [], None
        for path in self.files:
            row = first_row(path, self._text)
            if row is None:
                self._starts.append((-1, -1))
                self._orders.append(())
                continue
            cells = [cell.strip() for cell in row[0]]
            if header is None:
                header = not schema.columns and self._is_header(cells, dialect.header)
            self._starts.append(row[1:] if header else (0, 1))
            if not header and dialect.header and tuple(cells) == dialect.columns:
                self._headed.add(path)
            self._orders.append(tuple(name or f"c{number}" for number, name in enumerate(cells)))
            if header and names is not None and not same_columns(cells, names):
                what = header_difference(cells, names)
                raise UserError(f"{path}: line 1: {what}, unlike {begun}; the files of one table must have the same header")
            if names is None:
                names = cells
            if len(cells) != len(names):
                raise UserError(f"{path}: line 1: {len(cells)} columns, but {len(names)} in {begun}; the files of one table must agree")
        if header:
            self._columns = tuple(name or f"c{number}" for number, name in enumerate(names))
            return
        self._columns = schema.columns or tuple(f"c{number}" for number in range(len(names)))
        self._orders = [self._columns] * len(self.files)
        if len(self._columns) != len(names):
            hint = self._delimiter_hint(begun) or "; name them all"
            raise UserError(f"{schema.path}: columns: names {len(self._columns)} columns, but {begun} has {len(names)}{hint}")

    def _sniff(self) -> tuple[Path, Dialect]:
        """The first file that tells how it is to be read, and how: not an empty one, nor one of a header only."""
        schema, refusal = self.schema, None
        delimiter = schema.delimiter or ("\t" if schema.format == "tsv" else "")
        quote = "none" if schema.quote == "" else schema.quote or ""
        separators = "".join(column.separator or "" for column in schema.categorical)
        for path in self.files:
            try:
                if _size(path):
                    return path, sniff(path, delimiter=delimiter, quote=quote, encoding=schema.encoding or "", separators=separators)
            except UserError as error:
                refusal = refusal or error
        raise refusal or UserError(f"{self.files[0]}: the file is empty; a table needs a header or columns:, and rows")

    def _delimiter_hint(self, path: Path) -> str:
        """Where the file looks as if it had another delimiter than the schema says, which one."""
        try:
            found = sniff(path).delimiter if self._text else ""
        except UserError:
            return ""
        return f"; it seems separated by {found!r}: correct delimiter:" if found and found.encode() != self._text.delimiter else ""

    def _header_hint(self, path: Path, where: str = "line 1") -> str:
        if path not in self._headed or where != "line 1":
            return ""
        return f"; the first line looks like a header: write header: true{' in place of columns:' if self.schema.columns else ''}"

    def _is_header(self, cells: list[str], guess: bool) -> bool:
        """Whether a file's first row holds names: the schema's own tell it better than a guess."""
        used = set(self.schema.used_columns())
        if used <= set(cells):
            return True
        return guess and not used <= {f"c{number}" for number in range(len(cells))}

    def _checked_columns(self) -> dict[str, int]:
        used = self.schema.used_columns()
        for name, line in used.items():
            count = self._columns.count(name)
            if count == 1:
                continue
            where = f"{self.schema.path}: line {line}"
            if count:
                raise UserError(f"{where}: {self.files[0]} has {count} columns called {name!r}; rename one there")
            near = difflib.get_close_matches(name, self._columns, 1, 0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            names = ", ".join(self._columns[:30]) + (", ..." if len(self._columns) > 30 else "")
            ending = self._delimiter_hint(self.files[0]) or self._header_hint(self.files[0])
            raise UserError(f"{where}: {self.files[0]} has no column {name!r}; {hint}it has {names}{ending}")
        for name, kind in self._types.items():
            nested = pa.types.is_nested(kind) and not (table_values.is_list(kind) and not pa.types.is_nested(kind.value_type))
            is_bag = any(column.column == name for column in self.schema.categorical)
            if name in used and (nested or (table_values.is_list(kind) and not is_bag)):
                what = "nested values are not read" if nested else "a list can be a categorical column only"
                raise UserError(f"{self.schema.path}: line {used[name]}: column {name!r} is {kind} in {self.files[0]}; {what}")
        for column in self.schema.categorical:
            if column.max_hot and not self._is_bag(column):
                where = f"{self.schema.path}: line {column.line}"
                raise UserError(f"{where}: column {column.column!r}: max_hot is for bags; add the separator that stands between a cell's values")
        return used

    def _is_bag(self, column) -> bool:
        return column.separator is not None or (column.column in self._types and table_values.is_list(self._types[column.column]))

    # ---- the split ----------------------------------------------------------------------------------------------------------------

    def _find_time_kind(self) -> str:
        """Of the first row that there is; later ones must be of the same kind."""
        name = self.schema.split.column
        for part, path in enumerate(self.files):
            if self._parquet:
                cells = next((cells[0] for cells, *_ in parquet_batches(path, [name], 0)), None)
                cells = cells if cells is None else table_values.plain(cells[:1], self._missing)
            else:
                text = None if self._starts[part] == (-1, -1) else next(text_blocks(path, self._text, *self._starts[part], 1 << 16), None)
                cells = text and self._cells(text, part, [name])[0][:1]
            if cells is not None and len(cells):
                try:
                    self.first_time = str(cells[0].as_py())
                    return table_values.time_kind(cells)
                except BadCell as bad:
                    where = f"line {self._starts[part][1]}" if not self._parquet else "row 1"
                    raise UserError(f"{path}: {where}, column {name!r}: {bad.show()} {bad.rule}{self._header_hint(path, where)}") from None
        raise UserError(f"{self.files[0]}: no rows; a table needs at least two, one to train on and one to test")

    def _split_rule(self) -> SplitRule:
        split, where = self.schema.split, f"{self.schema.path}: line {self.schema.split.line}"
        if split.by == "fraction":
            return SplitRule("fraction", split.test)
        if split.by == "time":
            if split.start is None:
                return SplitRule("time", split.test)
            try:
                return SplitRule("time", start=int(table_values.times(pa.array([split.start]), self._time_kind)[0]))
            except BadCell as bad:
                raise UserError(f"{where}: start: {bad.show()} {bad.rule}; write it as the column is written, as {self.first_time}") from None
        parts = set()
        for pattern in split.files:
            found = [
                part
                for part, (path, name) in enumerate(zip(self.files, self.part_names, strict=True))
                if pattern in (path.name, name, str(path)) or fnmatchcase(path.name, pattern) or fnmatchcase(name, pattern)
            ]
            if not found:
                raise UserError(f"{where}: test: no file is called {pattern!r}; there are {', '.join(self.part_names[:20])}")
            parts |= set(found)
        if len(parts) == len(self.files):
            raise UserError(f"{where}: test: names every file, which leaves none to train on")
        return SplitRule("parts", parts=tuple(sorted(parts)))


def column_ranges(schema: Schema, max_ind_range: int) -> list[int]:
    """What keys of each categorical column are taken modulo, 0: not. max_ind_range: where the schema says nothing; 0 and below: no limit."""
    return [column.max_ind_range or max(max_ind_range, 0) for column in schema.categorical]


def _positive(schema: Schema) -> tuple | None:
    """The label's rule as data_loaders.table_values takes it. A list of numbers is compared as numbers: 4 is 4.0."""
    positive = schema.label.positive
    if positive is None:
        return None
    if isinstance(positive, str):
        operator, bound = POSITIVE.fullmatch(positive).groups()
        return operator, float(bound)
    try:
        return "in", tuple(float(value) for value in positive)
    except ValueError:
        return "in", positive


@dataclass(frozen=True)
class _Place:
    """As a Mark has it; stored: bytes of all files, as stored, that were read so far."""

    part: int
    byte: int
    line: int
    stored: int


def _in_order(pool: ThreadPoolExecutor, pieces: Iterator[tuple[_Place, Callable[[], Block]]]) -> Iterator[tuple[_Place, Block]]:
    """Blocks in the pieces' order, some of them made ahead. Damage of a file is raised when the blocks before it have been seen to be good."""
    ahead, damage, more = deque(), None, True
    while more or ahead:
        while more and len(ahead) <= _AHEAD:
            try:
                place, work = next(pieces)
                ahead.append((place, pool.submit(work)))
            except StopIteration:
                more = False
            except UserError as error:
                damage, more = error, False
        if ahead:
            place, future = ahead.popleft()
            yield place, future.result()
    if damage:
        raise damage


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None
