"""manifest.json of an arrays folder: what the folder was made from and with, its columns, and every file's size and checksums."""

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from data_loaders.criteo_npz import DAMAGE

FORMAT = 1
NAME = "manifest.json"
STAMP = "verified.json"  # of checksums that have been compared (data_loaders.arrays)
ROWS = "rows.bin"
CHUNK_BYTES = 64 << 20  # of each checksum


@dataclass(frozen=True)
class Part:
    """A day or a file. rows: in the result; raw: the RawFingerprint of its file, as a dictionary (name, size, head_sha256, tail_sha256)."""

    name: str
    rows: int
    raw: dict[str, Any]


@dataclass(frozen=True)
class DenseColumn:
    """transform: none | log | standardize. mean, std: of the training rows, for standardize; else 0 and 1."""

    name: str
    transform: str = "none"
    mean: float = 0.0
    std: float = 1.0


@dataclass(frozen=True)
class Table:
    """A categorical column. rows: ids are 0 .. rows - 1; hotness: most ids in one bag (1 unless multi_hot); shared: id 0 stands for all rare and
    unknown keys; key_bits: 32 | 64; modulo: keys were folded by it, 0: not."""

    name: str
    rows: int
    multi_hot: bool = False
    hotness: int = 1
    key_bits: int = 32
    modulo: int = 0
    shared: bool = False


@dataclass(frozen=True)
class File:
    """size in bytes, and the CRC-32 of each CHUNK_BYTES of it (the last one shorter)."""

    bytes: int
    crc32: tuple[int, ...]


@dataclass(frozen=True)
class Manifest:
    """See the module. Rows [0, num_train) of rows.bin are for training, [num_train, num_train + num_test) for tests; Criteo's last half day is
    neither. flags: Source.describe()["flags"], and min_frequency and vocabulary (RawFingerprint of the older result's manifest or npz, or None).
    """

    number_type: str  # "int32" | "float32": label and dense words of rows.bin
    rows: int
    raw_rows: int
    num_train: int
    num_test: int
    parts: tuple[Part, ...]
    dense: tuple[DenseColumn, ...]
    tables: tuple[Table, ...]
    source: dict[str, Any]
    flags: dict[str, Any]
    files: dict[str, File]
    format: int = FORMAT

    @property
    def one_hot(self) -> tuple[Table, ...]:
        """The tables whose ids lie in rows.bin, in its order."""
        return tuple(table for table in self.tables if not table.multi_hot)

    @property
    def width(self) -> int:
        """W, words of a row: label, dense, one-hot ids."""
        return 1 + len(self.dense) + len(self.one_hot)

    def to_json(self) -> str:
        fields = asdict(self)
        return json.dumps({"crc32": checksum_of(fields), **fields}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Manifest":
        """Raises ValueError, KeyError or TypeError where it is not ours."""
        fields = json.loads(text)
        checksum = fields.pop("crc32")
        if fields["format"] != FORMAT:
            raise ValueError(f"format {fields['format']}, while this version reads format {FORMAT}")
        if checksum != checksum_of(fields):
            raise ValueError("its checksum does not fit: it was changed")
        lists = {"parts": Part, "dense": DenseColumn, "tables": Table}
        made = {name: tuple(kind(**entry) for entry in fields[name]) for name, kind in lists.items()}
        files = {name: File(entry["bytes"], tuple(entry["crc32"])) for name, entry in fields["files"].items()}
        return cls(**{**fields, **made, "files": files})


def is_only_arrays(path: Path) -> bool:
    """Whether a folder is an arrays folder, whole or damaged in its files, and holds nothing else: only such a folder is ever replaced."""
    try:
        manifest = Manifest.from_json((path / NAME).read_text(encoding="utf-8"))
        return set(os.listdir(path)) <= {NAME, STAMP, *manifest.files}
    except (OSError, AttributeError, *DAMAGE):
        return False


def checksum_of(fields: dict[str, Any]) -> int:
    """Of the manifest's own fields, whatever the blanks between them."""
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def bag_files(column: str) -> tuple[str, str]:
    """Names of a multi-hot column's files: offsets [n + 1] int64, ids [total] int32."""
    name = quote(column, safe="")  # a column may be called anything
    return f"bags_{name}.offsets.bin", f"bags_{name}.ids.bin"


def vocabulary_files(column: str) -> tuple[str, str]:
    """Names of a column's files: keys [N] uint32 or uint64 in id order, counts [N] int64: how often each was seen."""
    name = quote(column, safe="")
    return f"vocabulary_{name}.keys.bin", f"vocabulary_{name}.counts.bin"
