"""A schema file read strictly: what is unknown, of the wrong kind, named twice or contradictory is one line with file, line and way out.

YAML is taken as text throughout (NO stays NO, 007 stays 007); each entry says what it needs to be.
"""

import difflib
import re
from collections.abc import Callable
from pathlib import Path

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from data_loaders.schema import (
    DEFAULT_MISSING,
    ENCODINGS,
    FORMATS,
    SPLITS,
    TRANSFORMS,
    TYPES,
    CategoricalColumn,
    DenseColumn,
    LabelColumn,
    Schema,
    SplitBy,
)
from dlrm_xla.specs import MAX_INT32, UserError

_LARGEST_FILE = 4 << 20
_ESCAPE = re.compile(r"\\(t|x[0-9a-fA-F]{2})")
_NUMBER = r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
POSITIVE = re.compile(rf"(>=|<=|==|>|<)\s*({_NUMBER})", re.ASCII)
_KEYS = ("format", "delimiter", "header", "quote", "encoding", "columns", "missing", "label", "dense", "categorical", "split")


def read_schema(path: Path) -> Schema:
    """Raises UserError."""
    reader = _Reader(path)
    root = reader.root()
    top = reader.entries(root, "the schema", _KEYS, required=("label", "categorical"))
    schema = Schema(
        label=_label(reader, top["label"]),
        categorical=tuple(_categorical(reader, node) for node in reader.items(top["categorical"], "categorical")),
        dense=tuple(_dense(reader, node) for node in reader.items(top["dense"], "dense")) if "dense" in top else (),
        split=_split(reader, top["split"]) if "split" in top else SplitBy(),
        format=reader.optional(top, "format", lambda node: reader.choice(node, "format", FORMATS)),
        delimiter=reader.optional(top, "delimiter", lambda node: _delimiter(reader, node)),
        header=reader.optional(top, "header", lambda node: reader.boolean(node, "header")),
        quote=reader.optional(top, "quote", lambda node: _quote(reader, node)),
        encoding=reader.optional(top, "encoding", lambda node: reader.choice(node, "encoding", ENCODINGS)),
        columns=tuple(reader.text(node, "a column's name") for node in reader.items(top["columns"], "columns")) if "columns" in top else (),
        missing=tuple(reader.text(node, "missing", empty=True) for node in reader.items(top["missing"], "missing", none=True))
        if "missing" in top
        else DEFAULT_MISSING,
        path=str(path),
    )
    _check_together(reader, top, schema)
    return schema


def _label(reader: "_Reader", node: Node) -> LabelColumn:
    entries = reader.entries(node, "label", ("column", "positive"), required=("column",), example="{column: click}")
    positive = entries.get("positive")
    value = None
    if isinstance(positive, SequenceNode):
        value = tuple(reader.text(item, "positive", empty=True) for item in reader.items(positive, "positive"))
    elif positive is not None:
        text = reader.text(positive, "positive").strip()
        if text[0] not in "<>=!":
            value = (text,)
        elif POSITIVE.fullmatch(text):
            value = text
        else:
            reader.fail(positive, f"positive: {text!r} is no rule; write \">= 4\" (or >, <=, <, ==), or a list of the values that count as 1")
    return LabelColumn(reader.text(entries["column"], "column"), value, reader.line(node))


def _dense(reader: "_Reader", node: Node) -> DenseColumn:
    entries = reader.entries(node, "a dense column", ("column", "transform"), required=("column",), example="- {column: price, transform: log}")
    transform = reader.choice(entries["transform"], "transform", TRANSFORMS) if "transform" in entries else "none"
    return DenseColumn(reader.text(entries["column"], "column"), transform, reader.line(node))


def _categorical(reader: "_Reader", node: Node) -> CategoricalColumn:
    known = ("column", "type", "separator", "max_hot", "max_ind_range")
    entries = reader.entries(node, "a categorical column", known, required=("column", "type"), example="- {column: user, type: integer}")
    separator = reader.optional(entries, "separator", lambda separator: _separator(reader, separator))
    return CategoricalColumn(
        reader.text(entries["column"], "column"),
        reader.choice(entries["type"], "type", TYPES),
        separator,
        *(reader.optional(entries, key, lambda number, key=key: reader.whole(number, key)) or 0 for key in ("max_hot", "max_ind_range")),
        reader.line(node),
    )


def _split(reader: "_Reader", node: Node) -> SplitBy:
    example = "{by: time, column: ts, test: 0.1}"
    entries = reader.entries(node, "split", ("by", "column", "test", "start"), required=("by",), example=example)
    by, line = reader.choice(entries["by"], "by", SPLITS), reader.line(node)
    for key in ("column", "start"):
        if key in entries and by != "time":
            reader.fail(entries[key], f"{key}: is for by: time, not for by: {by}; leave it out")
    if by == "file":
        if "test" not in entries:
            reader.fail(node, "split by file needs test: [names of the files for testing]")
        return SplitBy("file", 0.0, files=tuple(reader.text(item, "test") for item in reader.items(entries["test"], "test")), line=line)
    if by == "time" and "column" not in entries:
        reader.fail(node, f"split by time needs a column, as {example}")
    if "start" in entries and "test" in entries:
        reader.fail(entries["start"], "start: and test: both say where testing begins; leave one of them out")
    start = reader.optional(entries, "start", lambda value: reader.text(value, "start"))
    test = reader.fraction(entries["test"], "test") if "test" in entries else 0.1 if start is None else 0.0
    return SplitBy(by, test, reader.optional(entries, "column", lambda value: reader.text(value, "column")), start, line=line)


def _delimiter(reader: "_Reader", node: Node) -> str:
    text = _unescape(reader.text(node, "delimiter"))
    if len(text) != 1 or not text.isascii() or text in "\0\r\n\"":
        reader.fail(node, f"delimiter: {text!r} is not one ASCII character; as \",\" or \"\\t\" or \"|\" or \"\\x01\"")
    return text


def _separator(reader: "_Reader", node: Node) -> str:
    text = _unescape(reader.text(node, "separator"))
    if "\n" in text or "\r" in text:
        reader.fail(node, "separator: a line end cannot stand between the values of a cell; as \"|\" or \",\" or \" \"")
    return text


def _unescape(text: str) -> str:
    """A tab or another control character that was written \\t or \\x01 without the double quotes in which YAML knows them."""
    return _ESCAPE.sub(lambda found: "\t" if found[1] == "t" else chr(int(found[1][1:], 16)), text)


def _quote(reader: "_Reader", node: Node) -> str:
    text = reader.text(node, "quote")
    if text == "none":
        return ""
    if len(text) != 1 or not text.isascii() or text.isalnum() or text in "\0\r\n":
        reader.fail(node, f"quote: {text!r} is not one ASCII character; as '\"', or none where cells are not quoted")
    return text


def _check_together(reader: "_Reader", top: dict[str, Node], schema: Schema) -> None:
    """Rules between entries."""
    if schema.columns and schema.header:
        reader.fail(top["columns"], "columns: is for files without a header; leave it or header: true out")
    twice = _first_twice(schema.columns)
    if twice is not None:
        reader.fail(top["columns"], f"columns: {twice!r} is there twice; a name must be there once")
    if schema.format == "tsv" and schema.delimiter not in (None, "\t"):
        reader.fail(top["delimiter"], f"delimiter: {schema.delimiter!r}, but format: tsv has tabs; write format: csv")
    if schema.delimiter is not None and schema.delimiter == schema.quote:
        reader.fail(top["quote"], f"quote: {schema.quote!r} is the delimiter too; they must differ")
    for key in ("delimiter", "header", "quote", "encoding", "columns"):
        if schema.format == "parquet" and key in top:
            reader.fail(top[key], f"{key}: is for text, not for Parquet; leave it out")
    if not schema.categorical:
        reader.fail(top["categorical"], "categorical: no column; DLRM needs at least one, which becomes a table of embeddings")
    for section, columns in (("dense", schema.dense), ("categorical", schema.categorical)):
        seen = {}
        for column in columns:
            if column.column == schema.label.column:
                reader.fail_at(column.line, f"column {column.column!r} is the label (line {schema.label.line}); leave it out here")
            if column.column in seen:
                reader.fail_at(column.line, f"column {column.column!r} is in {section}: already (line {seen[column.column]}); name it once")
            seen[column.column] = column.line
    for column in schema.categorical:
        if column.max_hot and column.separator is None and schema.format not in (None, "parquet"):
            reader.fail_at(column.line, f"column {column.column!r}: max_hot is for bags; add the separator that stands between a cell's values")


def _first_twice(names: tuple[str, ...]) -> str | None:
    return next((name for place, name in enumerate(names) if name in names[:place]), None)


class _Reader:
    """The nodes of a file, and the complaints about them."""

    def __init__(self, path: Path):
        self._path = path

    def root(self) -> Node:
        flag = f"--schema={self._path}"
        try:
            with open(self._path, "rb") as file:
                data = file.read(_LARGEST_FILE + 1)
        except OSError as error:
            raise UserError(f"{flag}: cannot read it: {error.strerror}; python -m data_loaders.inspect FILE proposes one") from None
        if len(data) > _LARGEST_FILE:
            raise UserError(f"{flag}: more than {_LARGEST_FILE >> 20} MiB; a schema describes the columns, the data go to --raw-data-file")
        try:
            node = yaml.compose(data.decode("utf-8-sig"), Loader=yaml.SafeLoader)
        except UnicodeDecodeError:
            raise UserError(f"{flag}: not UTF-8 text; a schema is a YAML file") from None
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.fail_at(mark.line + 1 if mark else 1, f"not YAML: {' '.join((error.problem or str(error)).split())[:200]}")
        except (yaml.YAMLError, RecursionError) as error:
            raise UserError(f"{flag}: not YAML: {' '.join(str(error).split())[:200]}") from None
        if node is None:
            raise UserError(f"{flag}: the file is empty; python -m data_loaders.inspect FILE proposes a schema")
        return node

    def line(self, node: Node) -> int:
        return node.start_mark.line + 1

    def fail(self, node: Node, message: str):
        self.fail_at(self.line(node), message)

    def fail_at(self, line: int, message: str):
        raise UserError(f"{self._path}: line {line}: {message}")

    def entries(self, node: Node, what: str, known: tuple[str, ...], *, required: tuple[str, ...], example: str = "") -> dict[str, Node]:
        """The mapping's values by key; every key known, none twice."""
        if not isinstance(node, MappingNode):
            self.fail(node, f"{what} must have keys and values ({', '.join(known)}){example and f', as {example}'}")
        found = {}
        for key_node, value in node.value:
            key = key_node.value if isinstance(key_node, ScalarNode) else "?"
            if key not in known:
                near = difflib.get_close_matches(key.lower(), known, 1, 0.6)
                hint = f"did you mean {near[0]}?" if near else f"it knows {', '.join(known)}"
                self.fail(key_node, f"{what}: unknown key {_show(key)}; {hint}")
            if key in found:
                self.fail(key_node, f"{what}: {key} is there twice (also line {self.line(found[key])}); leave one out")
            found[key] = value
        for key in required:
            if key not in found:
                self.fail(node, f"{what} lacks {key}:{example and f', as {example}'}")
        return found

    def optional(self, entries: dict[str, Node], key: str, read: Callable[[Node], object]):
        return read(entries[key]) if key in entries else None

    def items(self, node: Node, what: str, none: bool = False) -> list[Node]:
        """none: the list may be empty."""
        if not isinstance(node, SequenceNode):
            self.fail(node, f"{what}: must be a list, as [a, b], or with a dash before each entry")
        if not node.value and not none and what != "categorical":
            self.fail(node, f"{what}: the list is empty; fill it or leave it out")
        return node.value

    def text(self, node: Node, what: str, empty: bool = False) -> str:
        if not isinstance(node, ScalarNode):
            self.fail(node, f"{what}: must be a single text")
        if not node.value and not empty:
            self.fail(node, f"{what}: nothing behind it; give it a value or leave it out")
        return node.value

    def choice(self, node: Node, what: str, choices: tuple[str, ...]) -> str:
        value = self.text(node, what)
        if value not in choices:
            near = difflib.get_close_matches(value.lower(), choices, 1, 0.5)
            self.fail(node, f"{what}: {_show(value)} is unknown; choose {' or '.join(choices)}{near and f' (did you mean {near[0]}?)' or ''}")
        return value

    def boolean(self, node: Node, what: str) -> bool:
        value = self.text(node, what)
        if value.lower() not in ("true", "false"):
            self.fail(node, f"{what}: {_show(value)} is neither true nor false")
        return value.lower() == "true"

    def whole(self, node: Node, what: str) -> int:
        value = self.text(node, what)
        if not re.fullmatch(r"\d{1,18}", value, re.ASCII) or int(value) > MAX_INT32:
            self.fail(node, f"{what}: {_show(value)} is not a whole number from 0 (no limit) to {MAX_INT32}")
        return int(value)

    def fraction(self, node: Node, what: str) -> float:
        value = self.text(node, what)
        if not re.fullmatch(_NUMBER, value, re.ASCII) or not 0 < float(value) < 1:
            self.fail(node, f"{what}: {_show(value)} is not a share of the rows, above 0 and below 1, as 0.1")
        return float(value)


def _show(value: str) -> str:
    """In quotes, ASCII, at most 60 characters."""
    return ascii(value[:60]) + ("..." if len(value) > 60 else "")
