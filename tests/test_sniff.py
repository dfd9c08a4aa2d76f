"""Kind, encoding, delimiter, quote and header of a file, told by its first bytes."""

import bz2
import csv
import gzip
import io
import json
import pickle
import random
import sqlite3
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import criteo_lines
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders.sniff import Dialect, sniff
from data_loaders.sniff_text import NoRows, guess_text
from dlrm_xla.specs import UserError


def sniff_bytes(folder, data: bytes, name: str = "f", **known) -> Dialect:
    path = folder / name
    path.write_bytes(data)
    return sniff(path, **known)


def refusal(folder, data: bytes, name: str = "f") -> str:
    with pytest.raises(UserError) as caught:
        sniff_bytes(folder, data, name)
    assert "\n" not in str(caught.value) and str(folder / name) in str(caught.value)
    return str(caught.value)


# text -> delimiter, quote, header, number of columns
TEXTS = {
    "numbers under names": ("click,user\n0,1\n1,2\n", ",", '"', True, 2),
    "numbers only": ("0,1,5\n1,2,6\n0,3,4\n", ",", '"', False, 3),
    "names of text columns": ("name,city,likes\nbob,paris,tea\nann,rome,tea\nbob,rome,milk\n", ",", '"', True, 3),
    "text columns without names": ("bob,paris,tea\nann,rome,tea\nbob,rome,milk\nbob,paris,tea\n", ",", '"', False, 3),
    "names of no known words": ("foo,bar\n" + "bob,paris\nann,rome\n" * 3, ",", '"', True, 2),
    "an index column as pandas writes it": (",a,b\n0,x,y\n1,x,y\n", ",", '"', True, 3),
    "numbers as names": ("0,1,2,3\n5,x,7,8\n5,6,7,8\n", ",", '"', True, 4),
    "decimal commas": ("1,5;2,5;a\n2,5;3,5;b\n1,0;2,0;c\n", ";", '"', False, 3),
    "semicolons in quotes": ('id,ua\n1,"Mozilla/5.0 (X11; Linux)"\n2,"Mozilla/5.0 (X; Mac, like)"\n', ",", '"', True, 2),
    "a quote that is not one": ('q\tclick\n5" tv\t1\n"unclosed\t0\nok\t1\n', "\t", None, True, 2),
    "line ends in quotes": ('t,click\n"a\nb, c",1\n"x ""y"" z",0\nplain,1\n', ",", '"', True, 2),
    "lists in quotes": ('"[1,2]",5\n"[1,3]",6\n', ",", '"', False, 2),
    "tags within tabs": ("u\ttags\n1\ta,b\n2\tc,d\n", "\t", None, True, 2),
    "bags in Hive": ("1\x01a\x02b\x02c\n2\x01\x02\x03d\n" * 9, "\x01", None, False, 2),
    "Hive": ("1\x01a\x01b\n2\x01c\x01d\n", "\x01", None, False, 3),
    "bars": ("a|b|c\n1|2|3\n1|2|4\n", "|", '"', True, 3),
    "blanks": ("1 2 3\n4 5 6\n", " ", '"', False, 3),
    "Windows line ends": ("a,b\r\n1,2\r\n3,4\r\n", ",", '"', True, 2),
    "times": ("2014-01-01 12:00:00,5\n2014-01-01 12:00:01,6\n", ",", '"', False, 2),
    "hashes": ("68fd1e64,80e26c9b\n05db9164,38a947a1\n", ",", '"', False, 2),
    "blank lines between": ("a,b\n\n1,2\n\n3,4\n", ",", '"', True, 2),
    "no end of the last line": ("a,b\n1,2\n3,4", ",", '"', True, 2),
    "some ragged lines": ("a,b\n" + "1,2\n" * 40 + "1,2,3\n", ",", '"', True, 2),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
@pytest.mark.parametrize("zipped", [False, True])
def test_texts(case, zipped, tmp_path):
    text, delimiter, quote, header, width = TEXTS[case]
    data = gzip.compress(text.encode()) if zipped else text.encode()
    found = sniff_bytes(tmp_path, data)
    assert (found.delimiter, found.quote, found.header, len(found.columns)) == (delimiter, quote, header, width)
    assert found.format == ("tsv" if delimiter == "\t" else "csv") and found.gzip == zipped and found.encoding == "utf-8"
    first = next(csv.reader(io.StringIO(text), delimiter=delimiter))
    assert found.columns == tuple((first[i] or f"c{i}") if header else f"c{i}" for i in range(width))


def test_criteo_has_no_header(tmp_path):
    found = sniff_bytes(tmp_path, "".join(f"{line}\n" for line in criteo_lines(300)).encode())
    assert (found.format, found.header, len(found.columns), found.quote) == ("tsv", False, 40, None)


def test_a_mark_belongs_to_no_column(tmp_path):
    assert sniff_bytes(tmp_path, b"\xef\xbb\xbfuser,click\n1,0\n2,1\n").columns == ("user", "click")


def test_encodings(tmp_path):
    rows = "ville,clic\n" + "Orléans,1\nParis,0\n" * 5
    assert sniff_bytes(tmp_path, rows.encode("latin-1")).encoding == "latin-1"
    assert sniff_bytes(tmp_path, rows.encode("utf-8")).encoding == "utf-8"
    assert sniff_bytes(tmp_path, rows.encode("utf-8"), encoding="latin-1").encoding == "latin-1"
    long = "é,1\n" * 200_000  # the end of what is looked at may cut a character
    for cut in range(4):
        assert sniff_bytes(tmp_path, b"x" * cut + long.encode()).encoding == "utf-8"
    assert "iconv -f UTF-16 " in refusal(tmp_path, rows.encode("utf-16"))
    for name in ("utf-16-le", "utf-16-be"):
        assert f"iconv -f {name.upper()[:6]}{name[-2:].upper()}" in refusal(tmp_path, rows.encode(name))
    assert "iconv" in refusal(tmp_path, rows.encode("utf-32"))


def test_what_is_known_is_taken(tmp_path):
    data = b"a,b;c\n1,2;3\n"
    assert sniff_bytes(tmp_path, data, delimiter=";").columns == ("a,b", "c")
    assert sniff_bytes(tmp_path, b"abc\n1\n2\n", delimiter=",").columns == ("abc",)
    assert sniff_bytes(tmp_path, b'a,b\n"1",2\n', quote="none").quote is None
    assert sniff_bytes(tmp_path, b"a,b\n'1,1',2\n'1,2',3\n", quote="'").columns == ("a", "b")


def test_control_characters_of_bags(tmp_path):
    """They are text where \\x01 is the delimiter, and where a schema says so."""
    data = b"1,a\x02b\n2,\x02c\x02\n" * 50
    assert "control characters" in refusal(tmp_path, data)
    assert sniff_bytes(tmp_path, data, separators="|\x02").delimiter == ","
    assert sniff_bytes(tmp_path, data, delimiter="\x02").delimiter == "\x02"
    assert "control characters" in refusal(tmp_path, b"1\x01a\x1fb\n" * 50)


def test_files_without_rows_can_be_told(tmp_path):
    for data in (b"", b"\n", b"click,user\n", gzip.compress(b"")):
        with pytest.raises(NoRows):
            sniff_bytes(tmp_path, data)


def test_blanks_and_bars_that_are_a_table(tmp_path):
    assert sniff_bytes(tmp_path, b"1 12:30 5\n0 12:31 6\n0 1:05 7\n" * 9).delimiter == " "
    assert sniff_bytes(tmp_path, b"1|hello world|5\n0|hello you|6\n" * 9).delimiter == "|"
    assert sniff_bytes(tmp_path, b"1 | user | 3.5\n0 | user | 4.5\n" * 9).delimiter == "|"


def test_parquet(tmp_path):
    table = pa.table({"user": [1, 2], "click": [0, 1]})
    path = tmp_path / "named.csv"  # told by content
    parquet.write_table(table, path)
    assert sniff(path) == Dialect("parquet", False, "", False, ("user", "click"), None, "utf-8")
    whole = path.read_bytes()
    assert "cannot be read" in refusal(tmp_path, whole[: len(whole) // 2])
    assert "gunzip" in refusal(tmp_path, gzip.compress(whole))
    parquet.write_table(table.slice(0, 0), path)
    with pytest.raises(UserError, match="no rows"):
        sniff(path)


def archive(name: str) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as zipped:
        zipped.writestr(name, "a,b\n1,2\n" * 20)
    return file.getvalue()


def array_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.zeros(3))
    return file.getvalue()


OTHER_KINDS = {
    "unzip": archive("log.csv"), "save the sheet as CSV": archive("xl/workbook.xml"), "bunzip2": bz2.compress(b"a,b\n1,2\n"),
    "zstd -d": b"\x28\xb5\x2f\xfd" + bytes(50), "unxz": b"\xfd7zXZ\0" + bytes(50), "NumPy": array_file(), "pickle": pickle.dumps([1, 2]),
    "JSON": json.dumps({"a": 1, "b": 2}).encode() + b"\n", "JSON;": b'[\n {"a": 1},\n {"a": 2}\n]\n', "XML": b'<?xml version="1.0"?>\n<a/>\n',
    "HTML": b"<!DOCTYPE html>\n<html><body>Not found</body></html>\n", "Arrow": b"ARROW1\0\0" + bytes(80), "ORC": b"ORC" + bytes(80),
    "HDF5": b"\x89HDF\r\n\x1a\n" + bytes(80), "Avro": b"Obj\x01" + bytes(80), "binary": bytes(range(256)) * 20,
    "binary data": random.Random(0).randbytes(5000),
}  # fmt: skip


@pytest.mark.parametrize("words", OTHER_KINDS)
def test_other_kinds_are_refused_with_a_way_out(words, tmp_path):
    assert words in refusal(tmp_path, OTHER_KINDS[words])


def test_a_database_is_refused(tmp_path):
    connection = sqlite3.connect(tmp_path / "x.db")
    connection.execute("create table t (a)")
    connection.commit()
    connection.close()
    assert "SQLite" in refusal(tmp_path, (tmp_path / "x.db").read_bytes())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"), (b"\n\n \n", "blank lines"), (b"a,b,c\n", "no rows"), (b"abc\n1\n2\n", "one column"), (b"a,b,a\n1,2,3\n4,5,6\n", "'a'"),
        (b"1::1193::5\n2::11::4\n", "'::'"), (b"a,b\r1,2\r", "carriage"), (b"my report\na,b,c\n" + b"1,2,3\n" * 30, "line 1 has 1 columns"),
        (b"a,b,c\n1,2\n1,2,3,4\n1\n1,2\n1,2\n1,2\n3,4\n", "equal|same number"), (gzip.compress(b"", mtime=0), "holds nothing"),
        (b"0 236:1 605:1\n1 qid:3 255:0.5 # x\n1 7:1e-3\n", "libsvm"), (b"-1 |u 236 |p price:5\n1 0.5 'tag|u 255 |p price:3\n", "Vowpal"),
        (gzip.compress(b"a,b\n1,2\n", mtime=0)[:12], "damaged or cut off"), (gzip.compress(gzip.compress(b"a,b\n1,2\n", mtime=0), mtime=0), "gunzip"),
    ],
)  # fmt: skip
def test_bad_files(data, words, tmp_path):
    message = refusal(tmp_path, data)
    assert any(word in message for word in words.split("|")), message


def test_no_such_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        sniff(tmp_path / "absent")
    with pytest.raises(UserError, match="folder"):
        sniff(tmp_path)


def test_a_json_like_cell_is_no_json(tmp_path):
    assert sniff_bytes(tmp_path, b"[1];5\n[2];6\n").delimiter == ";"


cell = st.one_of(st.integers(-99, 10**9).map(str), st.sampled_from(["x", "New York", 'say "hi"', "a,b", "two\nlines", "", "ü", "1|2|3"]))


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), cell, cell, st.integers(0, 10**6)), min_size=30, max_size=60), st.sampled_from([",", "\t", ";", "|"]))
def test_what_python_writes_is_read_back(rows, delimiter):
    """Python's csv writer quotes what needs it; names stand above."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["click", "first", "second", "user_id"])
    writer.writerows(rows)
    found = guess_text(text.getvalue(), "f", whole=True)
    assert (found.delimiter, found.header, found.columns) == (delimiter, True, ("click", "first", "second", "user_id"))
    if '"' in text.getvalue():
        assert found.quote == '"'
