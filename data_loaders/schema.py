"""What the columns of a user's table are (--schema=FILE.yaml): label, dense, categorical, and how rows are split for testing.

The file is read strictly (data_loaders.schema_yaml): what is misspelt, missing or contradictory is one line with its line number.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

FORMATS = ("csv", "tsv", "parquet")
TYPES = ("integer", "hex", "string")
TRANSFORMS = ("none", "log", "standardize")
ENCODINGS = ("utf-8", "latin-1")
SPLITS = ("time", "fraction", "file")
DEFAULT_MISSING = ("", "NA", "NaN", "nan", "NULL", "null", "\\N")
_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_./-]*")
_NOT_PLAIN = {"true", "false", "yes", "no", "on", "off", "null", "y", "n"}  # words that YAML does not read as text


@dataclass(frozen=True)
class LabelColumn:
    """positive: None (cells are 0, 1, true or false), a rule ">= 4", or the values that count as 1. line: in the schema file, for messages."""

    column: str
    positive: str | tuple[str, ...] | None = None
    line: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class DenseColumn:
    """transform: one of TRANSFORMS."""

    column: str
    transform: str = "none"
    line: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class CategoricalColumn:
    """type: one of TYPES. separator: the column is multi-hot, and this stands between the values of a cell. max_hot: a bag's first ones are
    kept; 0: all. max_ind_range: above 0, keys are taken modulo this."""

    column: str
    type: str = "string"
    separator: str | None = None
    max_hot: int = 0
    max_ind_range: int = 0
    line: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class SplitBy:
    """Which rows are for testing.

    by "time"      the last `test` (a fraction) by `column`, or those at or after `start` (as the column has it)
    by "fraction"  the last `test` of all rows
    by "file"      the files whose names, or patterns of them, are in `files`
    """

    by: str = "fraction"
    test: float = 0.1
    column: str | None = None
    start: str | None = None
    files: tuple[str, ...] = ()
    line: int = field(default=0, compare=False, repr=False)


@dataclass(frozen=True)
class Schema:
    """format, delimiter, header, quote ("" where cells are not quoted) and encoding are None where the file leaves them to be found out.
    columns: names, for files without a header. path: where it was read from."""

    label: LabelColumn
    categorical: tuple[CategoricalColumn, ...]
    dense: tuple[DenseColumn, ...] = ()
    split: SplitBy = SplitBy()
    format: str | None = None
    delimiter: str | None = None
    header: bool | None = None
    quote: str | None = None
    encoding: str | None = None
    columns: tuple[str, ...] = ()
    missing: tuple[str, ...] = DEFAULT_MISSING
    path: str = field(default="", compare=False, repr=False)

    @classmethod
    def read(cls, path: str | Path) -> "Schema":
        """Raises UserError with the file, the line and the way out."""
        from data_loaders.schema_yaml import read_schema

        return read_schema(Path(path))

    def used_columns(self) -> dict[str, int]:
        """The columns that are needed of the data, each with its line in the schema file, in the order label, dense, categorical, time."""
        used = {self.label.column: self.label.line}
        for column in (*self.dense, *self.categorical):
            used.setdefault(column.column, column.line)
        if self.split.column is not None:
            used.setdefault(self.split.column, self.split.line)
        return used

    def canonical(self) -> dict:
        """What is stated, JSON-able: the same for two files that say the same, however they are written."""
        values = asdict(self)
        del values["path"]
        for part in (values["label"], values["split"], *values["dense"], *values["categorical"]):
            del part["line"]
        return json.loads(json.dumps(values))

    def fingerprint(self) -> str:
        """SHA-256 of it, 64 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.canonical(), sort_keys=True).encode()).hexdigest()

    def to_yaml(self, comments: Mapping[str, str] | None = None) -> str:
        """A file that `read` gives this schema back from. comments: by column; they are put behind its line."""
        notes = comments or {}
        lines = []
        for key in ("format", "delimiter", "header", "quote", "encoding"):
            value = getattr(self, key)
            if value is not None:
                lines.append(f"{key}: {'none' if (key, value) == ('quote', '') else _scalar(value)}")
        if self.columns:
            lines.append(f"columns: {_sequence(self.columns)}")
        lines.append(f"missing: {_sequence(self.missing, quoted=True)}")
        positive = self.label.positive
        label = {"column": self.label.column, "positive": list(positive) if isinstance(positive, tuple) else positive}
        lines.append(f"label: {_mapping(label)}{_note(notes, self.label.column)}")
        for section, columns in (("dense", self.dense), ("categorical", self.categorical)):
            if columns:
                lines.append(f"{section}:")
            for column in columns:
                values = {key: value for key, value in asdict(column).items() if key != "line" and value not in (None, 0)}
                lines.append(f"  - {_mapping(values)}{_note(notes, column.column)}")
        lines.append(f"split: {_mapping(self._split_values())}")
        return "\n".join(lines) + "\n"

    def _split_values(self) -> dict:
        split = self.split
        values = {"by": split.by, "column": split.column, "start": split.start}
        values["test"] = list(split.files) if split.by == "file" else None if split.start is not None else split.test
        return values


def _scalar(value, quoted: bool = False) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)
    if not quoted and _PLAIN.fullmatch(value) and value.lower() not in _NOT_PLAIN:
        return value
    # JSON's escapes are YAML's too; what is beyond ASCII is left readable
    return json.dumps(value, ensure_ascii=any(not character.isprintable() for character in value))


def _sequence(values, quoted: bool = False) -> str:
    return "[" + ", ".join(_scalar(value, quoted) for value in values) + "]"


def _mapping(values: Mapping) -> str:
    """Flow style, entries that are None left out."""
    texts = (f"{key}: {_sequence(value) if isinstance(value, list) else _scalar(value)}" for key, value in values.items() if value is not None)
    return "{" + ", ".join(texts) + "}"


def _note(notes: Mapping[str, str], column: str) -> str:
    return f"  # {' '.join(notes[column].split())}" if notes.get(column) else ""
