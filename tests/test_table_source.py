"""A user's table as blocks: what Python's csv module and dictionaries read of the same files, in the shapes of logs that people have."""

import csv
import gzip
import io
import json
import random
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import xxhash

from data_loaders import table_text
from data_loaders.schema import DEFAULT_MISSING, CategoricalColumn, DenseColumn, LabelColumn, Schema, SplitBy
from data_loaders.table_files import default_folder, find_files, part_names
from data_loaders.table_source import TableSource, table_names
from dlrm_xla.specs import UserError

MISSING = 1 << 63


def hashed(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode())


def integer(text: str) -> int:
    return int(float(text)) % 2**64 if "." in text else int(text) % 2**64


def source_of(path, *categorical, label="click", dense=(), **others) -> TableSource:
    """categorical: (column, type, separator ...)"""
    columns = tuple(CategoricalColumn(*column) for column in categorical)
    label = label if isinstance(label, LabelColumn) else LabelColumn(label)
    schema = Schema(label, columns, tuple(map(DenseColumn, dense)), path="schema.yaml", **others)
    return TableSource(find_files(str(path)), schema)


def rows_of(source: TableSource, start=None) -> list[tuple]:
    """(label, [dense ...], [key or [keys] ...], when, part) of each row."""
    rows = []
    for block, mark in source.blocks(start, progress=False):
        columns = []
        for keys, lengths in zip(block.keys, block.lengths, strict=True):
            ends = None if lengths is None else np.cumsum(lengths)
            columns.append(keys.tolist() if lengths is None else [part.tolist() for part in np.split(keys, ends[:-1])])
        when = block.when.tolist() if block.when is not None else [None] * block.num_rows
        for n in range(block.num_rows):
            dense = [None if np.isnan(value) else float(value) for value in block.dense[n]]
            rows.append((float(block.labels[n]), dense, [column[n] for column in columns], when[n], block.part))
        assert mark.rows == len(rows) + (start.rows if start else 0)
    return rows


def refused(path, *categorical, **others) -> str:
    with pytest.raises(UserError) as error:
        rows_of(source_of(path, *categorical, **others))
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks, and rows across their ends, of files of a few kB."""
    monkeypatch.setattr(table_text.text_blocks, "__defaults__", (0, 1, 1000))


# ---- the shapes of logs that people have --------------------------------------------------------------------------------------------


def avazu(num_rows: int, seed: int = 0) -> list[dict]:
    rnd = random.Random(seed)
    return [
        {
            "id": str(rnd.getrandbits(63)), "click": str(int(rnd.random() < 0.2)), "hour": str(14102100 + n // 20),
            "C1": str(rnd.choice([1005, 1002])), "site_id": f"{rnd.getrandbits(32):08x}",
            "device_ip": rnd.choice(["", f"{rnd.getrandbits(20):x}", "NA"]), "C21": str(rnd.choice([-1, 79])),
        }
        for n in range(num_rows)
    ]  # fmt: skip


def write_csv(path, rows: list[dict], header: bool = True, **dialect):
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), **{"lineterminator": "\n", **dialect})
    if header:
        writer.writeheader()
    writer.writerows(rows)
    data = text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize(("name", "dialect"), [("a.csv", {}), ("a.csv.gz", {}), ("a.txt", {"lineterminator": "\r\n", "delimiter": "\t"})])
def test_clicks_with_hexadecimal_ids(tmp_path, name, dialect):
    rows = avazu(300)
    source = source_of(
        write_csv(tmp_path / name, rows, **dialect), ("id", "integer"), ("site_id", "hex"), ("device_ip", "hex"), ("C21", "integer"),
        dense=["C1"], split=SplitBy("time", 0.1, "hour"),
    )  # fmt: skip
    assert [column.key_bits for column in source.categorical] == [64, 32, 32, 64]
    assert rows_of(source) == [
        (
            float(row["click"]), [float(row["C1"])],
            [
                int(row["id"]), int(row["site_id"], 16), 2**32 - 1 if row["device_ip"] in ("", "NA") else int(row["device_ip"], 16),
                int(row["C21"]) % 2**64,
            ],
            int(row["hour"]), 0,
        )
        for row in rows
    ]  # fmt: skip


def movies(num_rows: int) -> list[dict]:
    rnd, genres = random.Random(1), ["Action", "Sci-Fi", "Film-Noir", "Drama", "Été"]
    return [
        {
            "userId": str(rnd.randrange(50)), "title": rnd.choice(['Heat, "The" (1995)', "Up", "Two\nlines", ""]),
            "genres": "|".join(rnd.sample(genres, rnd.randrange(4))), "rating": rnd.choice(["0.5", "3.5", "4.0", "5"]),
            "timestamp": str(9 * 10**8 + n),
        }
        for n in range(num_rows)
    ]  # fmt: skip


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "utf-8-sig"])
def test_ratings_with_lists_and_quoted_titles(tmp_path, encoding):
    rows = movies(300)
    path = write_csv(tmp_path / "ratings.csv", rows)
    path.write_bytes(path.read_text(encoding="utf-8").encode(encoding))
    source = source_of(
        path, ("userId", "integer"), ("title", "string"), ("genres", "string", "|", 2),
        label=LabelColumn("rating", ">= 4"), split=SplitBy("time", 0.1, "timestamp"),
    )  # fmt: skip
    assert [column.multi_hot for column in source.categorical] == [False, False, True]
    assert rows_of(source) == [
        (
            float(float(row["rating"]) >= 4), [],
            [
                int(row["userId"]), hashed(row["title"]) if row["title"] else MISSING,
                [hashed(genre) for genre in row["genres"].split("|")[:2] if genre],
            ],
            int(row["timestamp"]), 0,
        )
        for row in rows
    ]  # fmt: skip


def test_behaviours_without_a_header(tmp_path):
    rnd = random.Random(2)
    rows = [[str(rnd.randrange(9)), str(rnd.randrange(10**6)), rnd.choice(["pv", "buy", "cart", "fav"]), str(1511544070 + n)] for n in range(200)]
    path = tmp_path / "UserBehavior.csv"
    path.write_text("".join(f"{','.join(row)}\n" for row in rows))
    expected = [(float(row[2] in ("buy", "cart")), [], [int(row[0]), int(row[1])], None, 0) for row in rows]
    label = LabelColumn("behaviour", ("buy", "cart"))
    named = source_of(path, ("user", "integer"), ("item", "integer"), label=label, columns=("user", "item", "behaviour", "ts"))
    numbered = source_of(path, ("c0", "integer"), ("c1", "integer"), label=LabelColumn("c2", ("buy", "cart")), header=False)
    assert rows_of(named) == rows_of(numbered) == expected


@pytest.mark.parametrize("delimiter", ["\x01", "|", ";", "\t"])
def test_other_delimiters(tmp_path, delimiter):
    rows = avazu(100)
    source = source_of(write_csv(tmp_path / "part-0", rows, delimiter=delimiter), ("id", "integer"), ("site_id", "string"), delimiter=delimiter)
    assert [row[2] for row in rows_of(source)] == [[int(row["id"]), hashed(row["site_id"])] for row in rows]


def test_cells_of_json_and_quotes_within_cells(tmp_path):
    cells = ['{"a": 1, "b": "x, y"}', 'say ""hi""', 'two\n\nlines, "quoted"\r\n', "", '"', ',"', 'a,"b']
    rows = [{"click": str(n % 2), "payload": cells[n % len(cells)], "item": str(n)} for n in range(200)]
    path = write_csv(tmp_path / "a.csv", rows)
    expected = [[hashed(row["payload"]) if row["payload"] else MISSING, int(row["item"])] for row in rows]
    assert [row[2] for row in rows_of(source_of(path, ("payload", "string"), ("item", "integer")))] == expected


def test_quotes_in_cells_that_are_not_quoted(tmp_path):
    lines = [f'{n % 2},5" disk {n},"a,{n}"' if n % 3 else f'{n % 2},plain,"two\n""lines"""' for n in range(200)]
    (tmp_path / "a.csv").write_text("click,what,note\n" + "".join(f"{line}\n" for line in lines))
    expected = [[hashed(f'5" disk {n}'), hashed(f"a,{n}")] if n % 3 else [hashed("plain"), hashed('two\n"lines"')] for n in range(200)]
    assert [row[2] for row in rows_of(source_of(tmp_path / "a.csv", ("what", "string"), ("note", "string"), quote='"'))] == expected


def test_without_quotes_a_quote_is_a_character(tmp_path):
    (tmp_path / "a.tsv").write_text('click\tquery\n' + '1\t"open\n0\tb"\n' * 50)
    source = source_of(tmp_path / "a.tsv", ("query", "string"), quote="", format="tsv")
    assert [row[2] for row in rows_of(source)] == [[hashed('"open')], [hashed('b"')]] * 50


def test_lists_in_brackets(tmp_path):
    cells = {"[1, 2, 3]": [1, 2, 3], "[]": [], "": [], "[7]": [7], "4,5": [4, 5], "['8', '9']": [8, 9], "[1, None, 2]": [1, 2]}
    rows = [{"click": "1", "items": cell} for cell in cells]
    source = source_of(write_csv(tmp_path / "a.csv", rows), ("items", "integer", ","), missing=("", "None"))
    assert [row[2][0] for row in rows_of(source)] == list(cells.values())


# ---- Parquet ------------------------------------------------------------------------------------------------------------------------


def test_parquet_gives_what_csv_gives(tmp_path):
    rows = movies(300)
    for n, row in enumerate(rows):
        row |= {"price": "" if n % 7 == 0 else f"{n / 8}", "clicked": str(n % 3 == 0), "shop": "" if n % 5 == 0 else f"{n % 4}.0"}
        row |= {"at": datetime.fromtimestamp(int(row["timestamp"]), UTC).strftime("%Y-%m-%d %H:%M:%S")}
    table = pa.table(
        {
            "userId": pa.array([int(row["userId"]) for row in rows], pa.uint32()),
            "title": pa.array([row["title"] or None for row in rows]).dictionary_encode(),
            "genres": [[genre for genre in row["genres"].split("|") if genre] for row in rows],
            "price": [float(row["price"]) if row["price"] else float("nan") for row in rows],
            "clicked": [row["clicked"] == "True" for row in rows],
            "shop": pa.array([float(row["shop"]) if row["shop"] else None for row in rows], pa.float32()),
            "at": pa.array([datetime.fromtimestamp(int(row["timestamp"]), UTC) for row in rows], pa.timestamp("us", "UTC")),
        }
    )
    (tmp_path / "parquet").mkdir()
    parquet.write_table(table.slice(0, 170), tmp_path / "parquet" / "part-2.parquet", row_group_size=50)
    parquet.write_table(table.slice(170), tmp_path / "parquet" / "part-10.parquet", row_group_size=50)
    (tmp_path / "parquet" / "_SUCCESS").write_text("")
    columns = ("userId", "integer"), ("title", "string"), ("genres", "string", "|"), ("shop", "integer")
    others = {"label": "clicked", "dense": ["price"], "split": SplitBy("time", 0.1, "at")}
    from_parquet = rows_of(source_of(tmp_path / "parquet", *columns, **others))
    from_csv = rows_of(source_of(write_csv(tmp_path / "a.csv", rows), *columns, **others))
    assert [row[:4] for row in from_parquet] == [row[:4] for row in from_csv]
    assert [row[4] for row in from_parquet] == [0] * 170 + [1] * 130
    assert [row[3] for row in from_csv] == [int(row["timestamp"]) * 10**9 for row in rows]


def test_parquet_lists_are_bags_without_a_separator(tmp_path):
    lists = [[1, 2, 3], [], None, [4, None], [5]]
    parquet.write_table(pa.table({"click": [0, 1, 0, 1, 1], "items": pa.array(lists, pa.large_list(pa.int16()))}), tmp_path / "a.parquet")
    source = source_of(tmp_path / "a.parquet", ("items", "integer", None, 2))
    assert source.categorical[0].multi_hot and source.categorical[0].max_hot == 2
    assert [row[2][0] for row in rows_of(source)] == [[1, 2], [], [], [4], [5]]


def test_parquet_files_of_types_that_pandas_mixes(tmp_path):
    tables = (
        {"click": [True, False], "x": pa.array([1, 2], pa.int32()), "tags": pa.array([["a"], None]), "d": [1.0, 2.0]},
        {"click": [1, 0], "x": pa.array([3.0, None]), "tags": pa.nulls(2), "d": pa.nulls(2)},
    )
    for number, columns in enumerate(tables):
        parquet.write_table(pa.table(columns), tmp_path / f"{number}.parquet")
    rows = rows_of(source_of(tmp_path, ("x", "integer"), ("tags", "string"), dense=["d"]))
    assert [row[:3] for row in rows] == [
        (1.0, [1.0], [1, [hashed("a")]]), (0.0, [2.0], [2, []]), (1.0, [None], [3, []]), (0.0, [None], [MISSING, []]),
    ]  # fmt: skip
    assert "1.parquet: column 'x' is double, but is int32 in" in refused(tmp_path, ("x", "string"))
    backwards = source_of(f"{tmp_path}/1.parquet,{tmp_path}/0.parquet", ("tags", "string"), dense=["d"])
    assert [row[1:3] for row in rows_of(backwards)] == [([None], [[]]), ([None], [[]]), ([1.0], [[hashed("a")]]), ([2.0], [[]])]


@pytest.mark.parametrize(
    ("values", "kind", "message"),
    [
        (pa.array([{"a": 1}] * 3), "string", "schema.yaml: line 0: column 'x' is struct<a: int64>"),
        (pa.array([[[1]]] * 3), "integer", "nested values are not read"),
        (pa.array([1.0, 2.5, 3.0]), "integer", "row 2, column 'x': '2.5' is not a whole number"),
        (pa.array([1, 2**63, 3], pa.uint64()), "integer", "row 2, column 'x': '9223372036854775808' is not a whole number"),
        (pa.array([1, 2, 3]), "hex", "row 1, column 'x': '1' is not a hexadecimal id"),
        (pa.array([b"a", b"\xff", b"c"]), "string", "row 2, column 'x': '\\xff' is not UTF-8"),
    ],
)
def test_parquet_refusals(tmp_path, values, kind, message):
    parquet.write_table(pa.table({"click": [0, 1, 0], "x": values}), tmp_path / "a.parquet")
    assert message in refused(tmp_path / "a.parquet", ("x", kind))


def test_damaged_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"click": [0, 1] * 5000, "x": list(range(10000))}), path, compression="zstd")
    data = path.read_bytes()
    for damaged in (data[:-100], data[:100] + bytes(200) + data[300:], data[:4]):
        path.write_bytes(damaged)
        assert str(path) in refused(path, ("x", "integer"))


# ---- values -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "cells"),
    [
        ("integer", {"12": 12, "12.0": 12, "-3": 2**64 - 3, "+4": 4, " 5 ": 5, "007": 7, "": MISSING, "NA": MISSING, f"{2**63 - 1}": 2**63 - 1}),
        ("hex", {"ff": 255, "0xFF": 255, "00000001": 1, " a ": 10, "": 2**32 - 1}),
        ("string", {"ff": hashed("ff"), " ff": hashed(" ff"), "é": hashed("é"), "": MISSING, "NAN": hashed("NAN")}),
    ],
)
def test_keys(tmp_path, kind, cells):
    path = write_csv(tmp_path / "a.csv", [{"click": "0", "x": cell} for cell in cells])
    assert [row[2][0] for row in rows_of(source_of(path, ("x", kind)))] == list(cells.values())


@pytest.mark.parametrize(
    ("column", "cell", "message"),
    [
        ("i", "12.5", "'12.5' is not a whole number of 64 bits, signed; use type: string"),
        ("i", "1000fbbc", "use type: hex (or string)"),
        ("i", "9666858637632736584", "signed; use type: string"),
        ("i", "9223372036854775808", "is not a whole number of 64 bits"),
        ("i", "-9223372036854775808", "stands for missing cells; add it to missing:"),
        ("i", "x" * 100, f"'{'x' * 60}'... is not a whole number"),
        ("h", "123456789", "is not a hexadecimal id of 1 to 8 digits"),
        ("h", "fg", "'fg' is not a hexadecimal id"),
        ("h", "ffffffff", "stands for missing cells"),
        ("d", "1,234.5", "'1,234.5' is not a number; write 1234.5 or 1.2e3, without thousands separators or units"),
        ("d", "12%", "'12%' is not a number"),
        ("d", "inf", "'inf' is not a finite number; add it to missing:"),
        ("d", "-nan", "is not a finite number"),
        ("d", "1e39", "'1e39' does not fit float32"),
        ("click", "2", "'2' is not 0, 1, true or false; say what counts as 1 with positive:"),
        ("click", "", "'' is missing; a row needs a label"),
        ("t", "yesterday", "'yesterday' is not a number, as this column's first time is"),
        ("t", "", "is missing; a row needs a time"),
    ],
)
@pytest.mark.parametrize("quoted", [False, True])
def test_a_wrong_cell_is_named_with_its_line(tmp_path, column, cell, message, quoted):
    rows = [{"click": "1", "i": "1", "h": "1", "d": "1", "t": "1", "note": f"a\n{n}" if quoted else "b"} for n in range(200)]
    rows[150][column] = cell
    path = write_csv(tmp_path / "a.csv", rows)
    line = 2 + 150 * (1 + quoted)
    found = refused(path, ("i", "integer"), ("h", "hex"), ("note", "string"), dense=["d"], split=SplitBy("time", 0.1, "t"))
    assert found.startswith(f"{path}: line {line}, column {column!r}: ") and message in found


def test_dense_numbers(tmp_path):
    cells = {"1.5": 1.5, "1e3": 1000.0, "+2": 2.0, " 3 ": 3.0, "-.5": -0.5, "": None, "nan": None, "1e-50": 0.0}
    path = write_csv(tmp_path / "a.csv", [{"click": "0", "x": "1", "d": cell} for cell in cells])
    assert [row[1][0] for row in rows_of(source_of(path, ("x", "hex"), dense=["d"]))] == list(cells.values())


@pytest.mark.parametrize(
    ("positive", "ones"),
    [
        (None, {"1", "1.0", "true", "True"}),
        (">= 1", {"1", "1.0", "4", "4.0"}), ("> 1", {"4", "4.0"}), ("<= 0", {"0", "-1", "0.0"}), ("< 0", {"-1"}), ("== 4", {"4", "4.0"}),
        (("4",), {"4", "4.0"}), (("4", "x"), {"4"}),
    ],
)  # fmt: skip
def test_labels(tmp_path, positive, ones):
    cells = ["0", "1", "1.0", "0.0"] + (["true", "False", "True"] if positive is None else ["4", "4.0", "-1"])
    path = write_csv(tmp_path / "a.csv", [{"click": cell, "x": "1"} for cell in cells])
    assert [row[0] for row in rows_of(source_of(path, ("x", "hex"), label=LabelColumn("click", positive)))] == [float(cell in ones) for cell in cells]


@pytest.mark.parametrize(
    "times",
    [
        ["3", "20", "100", "100.5"],
        ["-2.5", "-1", "0.25", "1e3"],
        ["2014-10-21", "2014-10-21 09:30", "2014-10-21T09:30:00.5", "2014-10-22"],
        ["2014-10-21T09:30:00Z", "2014-10-21T09:30:01+00:00", "2014-10-21T11:30:02+02:00", "2014-10-21T09:30:03"],
    ],
)
def test_times_keep_their_order(tmp_path, times):
    path = write_csv(tmp_path / "a.csv", [{"click": "0", "x": "1", "t": time} for time in times])
    when = [row[3] for row in rows_of(source_of(path, ("x", "hex"), split=SplitBy("time", 0.1, "t")))]
    assert when == sorted(when) and len(set(when[:3])) == 3
    for start, time in zip(when, times, strict=True):
        assert source_of(path, ("x", "hex"), split=SplitBy("time", 0.0, "t", start=time)).split.start == start


# ---- files --------------------------------------------------------------------------------------------------------------------------


def test_a_folder_in_natural_order_without_what_is_not_data(tmp_path):
    folder = tmp_path / "logs"
    folder.mkdir()
    for name in ("part-10.csv", "part-2.csv.gz", "part-1.csv"):
        write_csv(folder / name, [{"click": "0", "x": str(len(name))}])
    for name in ("_SUCCESS", ".part-1.csv.crc", ".DS_Store", "part-1.csv~", "schema.yaml", "old.processed/rows.bin"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not data")
    (folder / "part-0.csv").write_text("click,x\n")
    (folder / "part-3.csv").write_text("")  # an empty one has no rows, not even a header
    (folder / "part-4.csv").write_text("click,x\n")
    source = source_of(folder, ("x", "integer"))
    assert source.part_names == ("part-0.csv", "part-1.csv", "part-2.csv.gz", "part-3.csv", "part-4.csv", "part-10.csv")
    assert [(row[2], row[4]) for row in rows_of(source)] == [([10], 1), ([13], 2), ([11], 5)]
    assert find_files(f"{folder}/part-*.csv*") == source.files
    assert find_files(f"{folder}/part-2.csv.gz,{folder}/part-1.csv") == (folder / "part-2.csv.gz", folder / "part-1.csv")
    assert default_folder(str(folder)) == tmp_path / "logs.processed"
    assert part_names((tmp_path / "a" / "x", tmp_path / "b" / "x", tmp_path / "y")) == ("a/x", "b/x", "y")


@pytest.mark.parametrize(
    ("name", "message"),
    [("none.csv", "no such file"), ("*.csv", "no file matches"), (".", "holds no data file"), ("a,,b", "no such file"), ("", "no data")],
)
def test_files_that_are_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        find_files(name)


def test_a_file_named_twice(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(3))
    with pytest.raises(UserError, match="named twice"):
        find_files(f"{path},{tmp_path}/../{tmp_path.name}/a.csv")


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("click,y\n0,1\n", "b.csv: line 1: column 2 is called 'y' instead of 'x', unlike "),
        ("0,1\n", "b.csv: line 1: column 1 is called '0' instead of 'click'"),
        ("click,x,y\n0,1,2\n", "b.csv: line 1: 3 columns instead of 2"),
    ],
)
def test_files_that_do_not_agree(tmp_path, second, message):
    (tmp_path / "a.csv").write_text("click,x\n0,1\n")
    (tmp_path / "b.csv").write_text(second)
    assert message in refused(tmp_path, ("x", "integer"))


@pytest.mark.parametrize("cell", ["a", '"a,b"', "''"])
def test_files_with_their_columns_in_another_order(tmp_path, cell):
    """Cells are found by name, by pyarrow and by the csv module (a blank line makes that read)."""
    text = {"a.csv": "click,x,note,t\n1,5,N,3\n0,6,N,4\n", "b.csv": "note,t,x,click\nN,5,7,1\nN,6,8,0\n", "c.csv": "t,click,x,note\n7,1,9,N\n"}
    for name, lines in text.items():
        (tmp_path / name).write_text(lines.replace("N", cell))
    note = next(csv.reader([cell]))[0]
    source = source_of(tmp_path, ("note", "string"), ("x", "integer"), split=SplitBy("time", 0.1, "t"))
    wanted = [(float(n % 2 == 0), [], [hashed(note), 5 + n], 3 + n, n // 2) for n in range(5)]
    assert rows_of(source) == wanted
    marks = [mark for _, mark in source.blocks(None, progress=False)]
    assert rows_of(source, marks[0]) == wanted[2:]
    with pytest.raises(UserError, match=r"b.csv: line 3, column 'x': 'NO'"):
        (tmp_path / "b.csv").write_text("note,t,x,click\n,5,7,1\n,6,NO,0\n")
        rows_of(source_of(tmp_path, ("x", "integer")))
    (tmp_path / "b.csv").write_text("note,t,x,x\n,5,7,1\n")
    assert "b.csv: line 1: column 1 is called 'note' instead of 'click'" in refused(tmp_path, ("x", "integer"))


def test_hive_bags(tmp_path):
    (tmp_path / "part").write_text("click\x01tags\n1\x015\x026\n0\x01\n0\x017\n" * 1)
    source = source_of(tmp_path / "part", ("tags", "integer", "\x02"), delimiter="\x01")
    assert [row[2][0] for row in rows_of(source)] == [[5, 6], [], [7]]
    (tmp_path / "part").write_text("click,tags\n" + "1,5\x026\n" * 90)
    assert rows_of(source_of(tmp_path / "part", ("tags", "integer", "\x02")))[0][2] == [[5, 6]]


def test_a_header_that_is_read_as_a_row(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(50))
    ending = "; the first line looks like a header: write header: true"
    found = refused(path, ("c4", "hex"), label="c1", header=False)
    assert "line 1, column 'c1': 'click' is not 0, 1" in found and found.endswith(ending)
    names = tuple(f"n{n}" for n in range(7))
    assert refused(path, ("n4", "hex"), label="n1", columns=names).endswith(f"{ending} in place of columns:")
    assert refused(path, ("site_id", "hex"), header=False).endswith(ending)
    (tmp_path / "b.csv").write_text("x,y\n1,5\n0,6\n" * 9)  # names that come again are no header
    assert "looks like" not in refused(tmp_path / "b.csv", ("c1", "integer"), label="c0", header=False)


def test_a_wrong_delimiter(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(50))
    assert refused(path, ("site_id", "hex"), delimiter=";").endswith("; it seems separated by ',': correct delimiter:")
    assert refused(path, ("b", "hex"), delimiter="|", header=False, columns=("click", "b")).endswith("it seems separated by ',': correct delimiter:")


def test_a_start_that_the_column_does_not_have(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(5))
    found = refused(path, ("site_id", "hex"), split=SplitBy("time", 0.0, "hour", start="2014-10-21"))
    assert "start: '2014-10-21' is not a number" in found and found.endswith("write it as the column is written, as 14102100")


def test_files_for_testing(tmp_path):
    for name in ("a.csv", "b.csv", "c.csv"):
        write_csv(tmp_path / name, [{"click": "0", "x": "1"}])
    assert source_of(tmp_path, ("x", "hex"), split=SplitBy("file", 0.0, files=("[bc].csv",))).split.parts == (1, 2)
    assert "no file is called 'd.csv'; there are a.csv, b.csv, c.csv" in refused(tmp_path, ("x", "hex"), split=SplitBy("file", 0.0, files=("d.csv",)))
    assert "leaves none to train on" in refused(tmp_path, ("x", "hex"), split=SplitBy("file", 0.0, files=("*",)))


def test_a_column_that_is_not_there(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(3))
    assert f"{path} has no column 'site_ids'; did you mean 'site_id'? it has id, click, hour" in refused(path, ("site_ids", "hex"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("click,x\n0,1\n1\n", "line 3: 1 columns; a row has 2 columns (click, x) separated by ','"),
        ("click,x\n0,1\n1,2,3\n", "line 3: 3 columns"),
        ("click,x\n0,1\n\n1,2\n", "line 3: the line is empty"),
        ('click,x\n0,1\n0,"1\n1,2\n', "line 3: a quote is opened and never closed"),
        ("click,x\n0,1\r1,2\n0,3\n", "line 2: a carriage return within the line"),
        ("click,x\n0,1\n0,\0\n", "NUL bytes"),
        ("click,x\n", "no rows"),
        ("\n", "empty"),
    ],
)
def test_bad_text(tmp_path, text, message):
    (tmp_path / "a.csv").write_bytes(text.encode())
    assert message in refused(tmp_path / "a.csv", ("x", "string"), header=True, delimiter=",", quote='"')


def test_a_column_of_empty_bags(tmp_path):
    path = write_csv(tmp_path / "a.csv", [{"click": "0", "x": "", "y": "1"}] * 90)
    assert "schema.yaml: line 0: column 'x' has no value in any row; take it out" in refused(path, ("y", "hex"), ("x", "hex", "|"))


@pytest.mark.parametrize("end", ["", "\n", "\n\n\n", "\r\n", "\r\n\r\n"])
def test_ends_of_a_file(tmp_path, end):
    (tmp_path / "a.csv").write_bytes(b"click,x\n0,1\n1,2" + end.encode())
    assert [row[2] for row in rows_of(source_of(tmp_path / "a.csv", ("x", "integer")))] == [[1], [2]]


def test_text_that_is_not_utf_8(tmp_path):
    data = b"click,x\n" + b"0,\xe9t\xe9\n" * 50
    (tmp_path / "a.csv").write_bytes(data)
    assert "line 2: not UTF-8 (byte 0xe9" in refused(tmp_path / "a.csv", ("x", "string"), encoding="utf-8")
    assert rows_of(source_of(tmp_path / "a.csv", ("x", "string"), encoding="latin-1"))[0][2] == [hashed("été")]


EXACTLY = {"header": True, "delimiter": ",", "quote": '"', "encoding": "utf-8"}


def read_by_python(data: bytes) -> list[tuple]:
    """(click, C1, id, site_id hashed) by the csv module and Python's own numbers; ValueError where something is wrong."""
    lines = [f"{line}\n" for line in data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n").decode("utf-8").split("\n")]
    header, *rows = csv.reader(lines)
    place = {name.strip(): number for number, name in enumerate(header)}
    if any(len(row) != len(header) for row in rows) or len(place) < len(header):
        raise ValueError
    found = []
    for row in rows:
        click, dense, key, site = (row[place[name]] for name in ("click", "C1", "id", "site_id"))
        labels = {"0": 0.0, "1": 1.0, "0.0": 0.0, "1.0": 1.0, "true": 1.0, "false": 0.0}
        dense, key, site = (None if cell in DEFAULT_MISSING else cell for cell in (dense, key, site))
        value = None if dense is None else float(np.float32(float(dense)))
        whole = MISSING if key is None else int(key.strip().removesuffix(".0"), 16 if "x" in key else 10) % 2**64
        found.append((labels[click.strip().lower()], value, whole, MISSING if site is None else hashed(site)))
    return found


def damaged(data: bytes, rnd: random.Random) -> bytes:
    """A variant: bytes flipped, put in, taken out or doubled, lines and cells lost or doubled, cut off."""
    at, kind = rnd.randrange(len(data)), rnd.randrange(8)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << rnd.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rnd.choice([b'"', b",", b"\n", b"\r", b"\0", b"\xff", b"\xc3\xa9", b" ", b"-", b".0", b'""', b"\r\n", b"\n\n"]) + data[at:]
    if kind == 2:
        return data[:at] + data[at + rnd.randrange(1, 60) :]
    if kind == 3:
        return data[:at] + data[at : at + 40] * 2 + data[at + 40 :]
    if kind == 4:
        return data[:at]
    lines = data.split(b"\n")
    number = rnd.randrange(len(lines))
    cells = lines[number].split(b",")
    if kind == 5:
        lines[number : number + 1] = [lines[number]] * rnd.choice([0, 2])
    elif kind == 6:
        lines[number] = b",".join(cells[:-1] if rnd.random() < 0.5 else [*cells, cells[0]])
    else:
        cells[rnd.randrange(len(cells))] = rnd.choice([b"", b"NA", b'"a,b"', b"1e3", b"inf", b"0x1", b"12.0", b"-", b"None", b"\t7 "])
        lines[number] = b",".join(cells)
    return b"\n".join(lines)


@pytest.mark.parametrize("seed", range(4))
def test_damaged_files_end_in_one_line_or_give_the_rows_that_python_reads(tmp_path, seed):
    rnd, path, read = random.Random(seed), tmp_path / "a.csv", 0
    whole = write_csv(path, avazu(60, seed)).read_bytes()
    for _ in range(60):
        path.write_bytes(damaged(whole, rnd))
        try:
            source = source_of(path, ("id", "integer"), ("site_id", "string"), dense=["C1"], **EXACTLY)
            rows = [(label, dense[0], *keys) for label, dense, keys, _, _ in rows_of(source)]
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        assert rows == read_by_python(path.read_bytes())
        read += 1
    assert read > 10


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_cut_off_gzip(tmp_path, cut):
    path = write_csv(tmp_path / "a.csv.gz", avazu(300))
    path.write_bytes(path.read_bytes()[:-cut])
    assert f"{path}: " in refused(path, ("site_id", "hex"))


def test_reading_goes_on_from_any_mark(tmp_path):
    (tmp_path / "t").mkdir()
    write_csv(tmp_path / "t" / "a.csv", movies(90))
    write_csv(tmp_path / "t" / "b.csv.gz", movies(200))
    table = pa.table({"click": [0, 1] * 50000, "x": list(range(100000))})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=70000)
    text = {"label": LabelColumn("rating", ">= 4")}
    for source in (source_of(tmp_path / "t", ("title", "string"), **text), source_of(tmp_path / "a.parquet", ("x", "integer"))):
        whole = list(source.blocks(None, progress=False))
        assert len(whole) > 3
        for n, (_, mark) in enumerate(whole):
            rest = list(source.blocks(mark, progress=False))
            assert [mark for _, mark in rest] == [mark for _, mark in whole[n + 1 :]]
            for (block, _), (other, _) in zip(rest, whole[n + 1 :], strict=True):
                assert (block.keys[0] == other.keys[0]).all() and (block.labels == other.labels).all() and block.part == other.part


def test_describe_is_json_and_the_same_again(tmp_path):
    path = write_csv(tmp_path / "a.csv", avazu(5))
    first, again = (source_of(path, ("site_id", "hex")).describe() for _ in range(2))
    assert json.loads(json.dumps(first)) == again and first["flags"]["schema"] != source_of(path, ("id", "integer")).describe()["flags"]["schema"]


def test_names_of_tables():
    assert table_names(("site id", "site_id", "SITE_ID", "Ünï", "a/b", "ok-1.x")) == ("site_id", "site_id_2", "SITE_ID_3", "_n_", "a_b", "ok-1.x")
