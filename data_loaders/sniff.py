"""What a file of rows is, told by its first bytes rather than by its name: Parquet or text, gzip, encoding, delimiter, quote, header.

A text's dialect (delimiter, quote, header) is guessed from its first HEAD_BYTES by data_loaders.sniff_text. What cannot be read is
recognised and refused with the command that turns it into something that can.
"""

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path

from data_loaders.sniff_text import NoRows, guess_text
from dlrm_xla.specs import UserError

HEAD_BYTES = 1 << 18
UTF8_MARK = b"\xef\xbb\xbf"
_CONTROL = bytes(set(range(32)) - set(b"\t\n\r\x01\x0c"))  # \x01 is Hive's delimiter; NUL is looked for before
_HIVE = b"\x02\x03\x04\x05\x06\x07\x08"  # where \x01 stands between cells, these stand within them

# (first bytes, what it is, way out)
_REFUSED = (
    (b"BZh", "a bzip2 file", "unpack it with bunzip2, or make it gzip"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file", "unpack it with zstd -d, or make it gzip"),
    (b"\xfd7zXZ\0", "an xz file", "unpack it with unxz, or make it gzip"),
    (b"\x04\x22\x4d\x18", "an LZ4 file", "unpack it with lz4 -d, or make it gzip"),
    (b"\xff\x06\0\0sNaPpY", "a Snappy file", "unpack it, or make it gzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", "unpack it with 7z x"),
    (b"Rar!", "a RAR archive", "unpack it with unrar x"),
    (b"\xd0\xcf\x11\xe0", "an old Excel (or other Office) file", "save it as CSV"),
    (b"ORC", "an ORC file", "write it as Parquet (pyarrow.orc.read_table, then pyarrow.parquet.write_table)"),
    (b"Obj\x01", "an Avro file", "write it as Parquet"),
    (b"ARROW1", "an Arrow (Feather) file", "write it as Parquet (pyarrow.feather.read_table, then pyarrow.parquet.write_table)"),
    (b"FEA1", "a Feather file", "write it as Parquet (pyarrow.feather.read_table, then pyarrow.parquet.write_table)"),
    (b"PARE", "an encrypted Parquet file", "write it without encryption"),
    (b"\x93NUMPY", "a NumPy array", "write it as CSV or Parquet"),
    (b"\x89HDF", "an HDF5 file", "write it as CSV or Parquet"),
    (b"SQLite format 3\0", "an SQLite database", "export the table as CSV (sqlite3 -header -csv FILE 'SELECT ...')"),
    (b"%PDF", "a PDF", "name the data file"),
    (b"{\\rtf", "an RTF document", "save it as CSV"),
)  # fmt: skip
_UTF16 = ((b"\xff\xfe\0\0", "UTF-32LE"), (b"\0\0\xfe\xff", "UTF-32BE"), (b"\xff\xfe", "UTF-16LE"), (b"\xfe\xff", "UTF-16BE"))


@dataclass(frozen=True)
class Dialect:
    """How to read a file of rows.

    format      "csv" (any delimiter but a tab), "tsv" or "parquet"
    gzip        the text is compressed (never Parquet, which compresses itself)
    delimiter   one character; "" of Parquet
    header      the first line holds names; of Parquet False
    columns     names: the header's (blanks around them taken off, an empty one called c<its number>), Parquet's, or c0, c1, ...
    quote       '"', or None where quotes are ordinary characters
    encoding    "utf-8" or "latin-1". A UTF-8 file may begin with a byte order mark (EF BB BF), which belongs to no column
    """

    format: str
    gzip: bool
    delimiter: str
    header: bool
    columns: tuple[str, ...]
    quote: str | None
    encoding: str


def sniff(path: Path, *, delimiter: str = "", quote: str = "", encoding: str = "", separators: str = "") -> Dialect:
    """The dialect of `path`. What is known already can be given ("": guess; quote "none": no quotes), and is not judged. separators: control
    characters that a schema names for bags.
    UserErrors: a file that cannot be read, is empty, is of another kind, or whose lines no delimiter cuts into equal numbers of columns;
    NoRows, of these: an empty file, or one of a header only."""
    stored, whole = _read_head(path)
    if stored.startswith(b"PAR1"):
        return Dialect("parquet", False, "", False, _parquet_columns(path), None, "utf-8")
    zipped = stored.startswith(b"\x1f\x8b")
    head = stored
    if zipped:
        head, whole = _unzip_head(path)
        if head.startswith((b"PAR1", b"\x1f\x8b")):
            what = "Parquet" if head.startswith(b"PAR1") else "gzip"
            raise UserError(f"{path}: {what} inside gzip cannot be read; unpack it with gunzip")
    _refuse_other_kinds(path, head)
    text, encoding = _decode(path, head, whole, encoding, delimiter + separators)
    guess = guess_text(text, str(path), whole, delimiter, quote)
    return Dialect(
        "tsv" if guess.delimiter == "\t" else "csv", zipped, guess.delimiter, guess.header, guess.columns, guess.quote, encoding
    )


def _read_head(path: Path) -> tuple[bytes, bool]:
    """(the first HEAD_BYTES, whether that is all)."""
    try:
        with open(path, "rb") as file:
            head = file.read(HEAD_BYTES + 1)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; name one of its files") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    if not head:
        raise NoRows(f"{path}: the file is empty; it needs lines of columns, or Parquet")
    return head[:HEAD_BYTES], len(head) <= HEAD_BYTES


def _unzip_head(path: Path) -> tuple[bytes, bool]:
    """As _read_head, of the text in a gzip file. Damage behind the head is left for the reader to find."""
    pieces, size = [], 0
    try:
        with gzip.open(path) as file:
            while size <= HEAD_BYTES:
                piece = file.read1(HEAD_BYTES + 1 - size)
                if not piece:
                    break
                pieces.append(piece)
                size += len(piece)
    except (EOFError, OSError, zlib.error) as error:
        if b"\n" not in b"".join(pieces):
            raise UserError(f"{path}: the gzip data is damaged or cut off ({error}); fetch the file again") from None
    head = b"".join(pieces)
    if not head:
        raise NoRows(f"{path}: the gzip file holds nothing; it needs lines of columns")
    return head[:HEAD_BYTES], size <= HEAD_BYTES


def _parquet_columns(path: Path) -> tuple[str, ...]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    try:
        metadata = parquet.read_metadata(path)
        columns = tuple(metadata.schema.to_arrow_schema().names)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: begins like Parquet but cannot be read: {' '.join(str(error).split())[:200]}; write it again") from None
    if not metadata.num_rows or not columns:
        raise NoRows(f"{path}: the Parquet file holds no rows; name one that does")
    _refuse_duplicates(path, columns)
    return columns


def _refuse_duplicates(path: Path, columns: tuple[str, ...]) -> None:
    twice = sorted({name for name in columns if columns.count(name) > 1})
    if twice:
        raise UserError(f"{path}: two columns are called {twice[0]!r}; a name must be there once, so rename one")


def _refuse_other_kinds(path: Path, head: bytes) -> None:
    if head.startswith(b"PK\x03\x04"):
        office = next((name for mark, name in ((b"xl/", "Excel"), (b"word/", "Word")) if mark in head), "")
        if office or b"[Content_Types].xml" in head[:200]:
            raise UserError(f"{path}: an {office or 'Office'} workbook; save the sheet as CSV")
        if b".npy" in head[:200]:
            raise UserError(f"{path}: a NumPy .npz archive; a processed file is named with --processed-data-file, a raw file is CSV or Parquet")
        raise UserError(f"{path}: a zip archive; unpack it with unzip and name the file that was in it")
    for mark, what, way_out in _REFUSED:
        if head.startswith(mark):
            raise UserError(f"{path}: {what}; {way_out}")
    if head[257:262] == b"ustar":
        raise UserError(f"{path}: a tar archive; unpack it with tar xf and name the file that was in it")
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        raise UserError(f"{path}: a Python pickle; write it as CSV or Parquet")
    text = head.removeprefix(UTF8_MARK).lstrip()
    if text[:1] in (b"{", b"[") and _is_json(text):
        raise UserError(f"{path}: JSON; write it as CSV or Parquet (pyarrow.json.read_json reads one object a line)")
    if text[:1] == b"<" and text[:200].lower().startswith((b"<?xml", b"<!doctype", b"<html", b"<!--")):
        raise UserError(f"{path}: XML or HTML (a web page saved in place of the data?); write the rows as CSV or Parquet")


def _is_json(text: bytes) -> bool:
    """An object a line, or one document over many lines. A CSV row that begins with a list, as [1,2],5, is neither."""
    first = text.split(b"\n", 1)[0].strip()
    if first in (b"{", b"["):
        return True
    try:
        json.loads(first)
        return True
    except ValueError:  # UnicodeDecodeError included: a document on one line that is longer than the head is no whole JSON either
        return first[1:].lstrip()[:1] in (b'"', b"{") and b'":' in first[:1000]


def _decode(path: Path, head: bytes, whole: bool, encoding: str, named: str) -> tuple[str, str]:
    """(text, encoding). A character that the end of the head cuts is left out. named: characters that a schema expects."""
    for mark, name in _UTF16:
        if head.startswith(mark):
            raise UserError(f"{path}: {name} text; convert it with iconv -f {name[:6]} -t UTF-8")
    if b"\0" in head:
        even, odd = head[:4096:2].count(0), head[1:4096:2].count(0)
        if max(even, odd) > 10 * min(even, odd) and max(even, odd) > len(head[:4096]) / 8:
            raise UserError(f"{path}: UTF-16 text; convert it with iconv -f UTF-16{'BE' if even > odd else 'LE'} -t UTF-8")
        raise UserError(f"{path}: binary data (NUL bytes), of no kind that is known here; write it as CSV or Parquet")
    allowed = named.encode() + (_HIVE if b"\x01" in head and head.count(b"\x01") >= head.count(b"\n") else b"")
    if len(head) - len(head.translate(None, bytes(set(_CONTROL) - set(allowed)))) > len(head) / 200:
        raise UserError(f"{path}: binary data (control characters), of no kind that is known here; write it as CSV or Parquet")
    head = head.removeprefix(UTF8_MARK)
    if encoding != "latin-1":
        for cut in range(1 if whole else 4):
            try:
                return head[: len(head) - cut].decode("utf-8"), "utf-8"
            except UnicodeDecodeError:
                continue
        if encoding == "utf-8":
            return head.decode("utf-8", "replace"), "utf-8"
        if len(head.translate(None, bytes(range(0x80, 0x100)))) < 0.7 * len(head):
            raise UserError(f"{path}: neither UTF-8 nor Latin-1 text (more than 30% of the bytes are above 127); convert it to UTF-8")
    return head.decode("latin-1"), "latin-1"
