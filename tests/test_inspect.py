"""A profile and a schema for tables of the shapes of well-known logs; figures against Python's csv module and Counter."""

import csv
import gzip
import io
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as parquet
import pytest

from data_loaders import inspect, table_sample
from data_loaders.build import Options, build
from data_loaders.schema import CategoricalColumn, DenseColumn, LabelColumn, Schema, SplitBy
from data_loaders.table_kinds import bags_of, kind_of, shape_of, times_of
from data_loaders.table_profile import fit_zipf, gee
from data_loaders.table_sample import take_sample
from data_loaders.table_source import TableSource
from dlrm_xla.specs import UserError
from tests.oracles import log_shapes

ROWS = 2000


@pytest.fixture
def run(tmp_path, capsys):
    """run(file, *flags) -> (schema, figures, stdout); the schema was written, and is read with no change."""

    def inspected(file, *flags: str) -> tuple[Schema, dict, str]:
        schema, figures = tmp_path / f"{len(list(tmp_path.iterdir()))}.yaml", tmp_path / "figures.json"
        code = inspect.main([str(file), f"--schema={schema}", f"--json={figures}", *flags])
        captured = capsys.readouterr()
        assert (code, captured.err) == (0, "")
        return Schema.read(schema), json.loads(figures.read_text()), captured.out

    return inspected


def error(capsys, *argv: str) -> str:
    assert inspect.main([str(argument) for argument in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def oracle_rows(path, delimiter=",", header=True, quoting=csv.QUOTE_MINIMAL) -> tuple[list[str], list[list[str]]]:
    """(names, rows) by Python's csv module."""
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = list(csv.reader(io.StringIO(data.decode(), newline=""), delimiter=delimiter, quoting=quoting))
    return (rows[0], rows[1:]) if header else ([f"c{i}" for i in range(len(rows[0]))], rows)


C, D = CategoricalColumn, DenseColumn
# shape -> label, its rule, dense, categorical, split, left out
EXPECTED = {
    "avazu": (
        LabelColumn("click"), [],
        [C(name, "integer") for name in ("C1", "banner_pos")]
        + [C(name, "hex") for name in ("site_id", "app_id", "device_id", "device_ip")]
        + [C(name, "integer") for name in ("device_type", "C14", "C15", "C16")],
        SplitBy("time", 0.1, "hour"), ["id"],
    ),
    "movielens": (
        LabelColumn("rating", ">= 4"), [], [C("userId", "integer"), C("movieId", "integer"), C("title"), C("genres", "string", "|")],
        SplitBy("time", 0.1, "timestamp"), [],
    ),
    "taobao": (LabelColumn("c3", ("buy",)), [], [C(name, "integer") for name in ("c0", "c1", "c2")], SplitBy("time", 0.1, "c4"), []),
    "alibaba": (
        LabelColumn("clk"), [], [C("user", "integer"), C("adgroup_id", "integer"), C("pid")], SplitBy("time", 0.1, "time_stamp"), ["nonclk"],
    ),
    "reviews": (
        LabelColumn("stars", ">= 4"), [D("useful", "log")], [C("user_id"), C("business_id")], SplitBy("time", 0.1, "date"), ["review_id", "text"],
    ),
    "outbrain": (
        LabelColumn("clicked"), [], [C("display_id", "integer"), C("ad_id", "integer"), C("uuid"), C("platform", "integer"), C("geo_location")],
        SplitBy("time", 0.1, "timestamp"), [],
    ),
    "web": (
        LabelColumn("converted", ("yes",)), [D("visits", "log"), D("price", "log")],
        [C("ip"), C("user_agent"), C("is_mobile"), C("tags", "string", " "), C("history", "integer", ","), C("shops", "integer", ",")],
        SplitBy("time", 0.1, "ts"), ["c0", "datacenter"],
    ),
    "millis": (LabelColumn("c0"), [D("c4", "standardize")], [C("c3", "integer")], SplitBy("time", 0.1, "c1"), ["c2"]),
    "unlabelled": (LabelColumn("???"), [], [C("genres", "string", "|")], SplitBy("fraction", 0.1), ["movieId", "title"]),
    "arrow": (
        LabelColumn("label"), [D("age_years", "standardize")], [C("user_id", "integer"), C("history", "integer"), C("country")],
        SplitBy("time", 0.1, "event_time"), ["geo", "embedding"],
    ),
    "criteo": (
        LabelColumn("label"), [D(f"I{i + 1}", "log") for i in range(13)], [C(f"C{i + 1}", "hex") for i in range(26)], SplitBy("fraction", 0.1), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", log_shapes.ALL, ids=lambda shape: shape.__name__)
def test_shapes(shape, run, tmp_path):
    """What is proposed, and that the table's reader takes all of it unchanged."""
    path = shape(tmp_path, ROWS)
    schema, figures, out = run(path)
    label, dense, categorical, split, left_out = EXPECTED[shape.__name__]
    assert schema.label == label
    assert list(schema.dense) == dense
    assert list(schema.categorical) == categorical
    assert schema.split == split
    assert [name for name, column in figures["columns"].items() if column["role"] == "left out"] == left_out
    assert (figures["rows"], figures["rows_exact"], figures["sample_rows"]) == (ROWS, True, ROWS)
    assert max(map(len, out.splitlines())) <= 160
    assert f"--arch-mlp-bot={max(1, len(dense))}-" in out and "--data-set=table" in out
    if label.column == "???":
        assert "no column looks like one" in out and "once the label is named" in out
        return
    built = build(TableSource((path,), schema), tmp_path / "built", Options(), progress=False)
    assert built.rows == ROWS and len(built.table_rows) == len(categorical)
    blocks = [block for block, _ in TableSource((path,), schema).blocks(None, progress=False)]
    assert sum(block.num_rows for block in blocks) == ROWS
    labels = np.concatenate([block.labels for block in blocks])
    assert labels.mean() == pytest.approx(figures["label"]["ctr"], abs=1e-6) and 0 < labels.mean() < 1
    for i, column in enumerate(schema.categorical):
        figure = figures["columns"][column.column]
        if figure["kind"] != "bag":
            distinct = len(np.unique(np.concatenate([block.keys[i] for block in blocks])))
            assert built.table_rows[i] == distinct == figure["distinct"] + (figure["missing"] > 0)
        elif column.separator or shape.__name__ == "arrow":
            lengths = np.concatenate([block.lengths[i] for block in blocks])
            assert [lengths.min(), lengths.max()] == [figure["lengths"][0], figure["lengths"][3]]
            assert len(np.unique(np.concatenate([block.keys[i] for block in blocks]))) == figure["distinct"]


@pytest.mark.parametrize(
    ("shape", "reading"),
    [
        ("avazu", {}), ("movielens", {}), ("reviews", {}), ("outbrain", {}), ("taobao", {"header": False}),
        ("criteo", {"delimiter": "\t", "header": False, "quoting": csv.QUOTE_NONE}),
    ],
)  # fmt: skip
def test_figures(shape, reading, run, tmp_path):
    """Missing, distinct, top values, least, median and largest numbers against csv and Counter."""
    path = getattr(log_shapes, shape)(tmp_path, ROWS)
    _, figures, _ = run(path)
    names, rows = oracle_rows(path, **reading)
    for i, (name, figure) in enumerate(zip(names, figures["columns"].values(), strict=True)):
        assert name in figures["columns"] or shape == "criteo"
        cells = [row[i] for row in rows]
        present = [cell for cell in cells if cell not in ("", "\\N")]
        assert figure["missing"] == len(cells) - len(present)
        if figure["kind"] == "bag":
            continue
        counts = Counter(present)
        assert figure["distinct"] == figure["distinct_total"] == len(counts)
        assert figure["top"]["share"] == pytest.approx(counts.most_common(1)[0][1] / len(present))
        assert counts[figure["top"]["value"]] == counts.most_common(1)[0][1]
        if figure["kind"] in ("integer", "float"):
            numbers = sorted(map(float, present))
            assert figure["numbers"] == [numbers[0], numbers[(len(numbers) - 1) // 2], numbers[-1]]
        top = sorted(counts.values(), reverse=True)[: max(1, len(counts) // 100)]
        assert figure["top_percent"] == pytest.approx(sum(top) / len(present))


# ---- samples of large files


@pytest.fixture
def small_limits(monkeypatch):
    """Files above 20 kB are not read whole; places of at least 4 kB."""
    monkeypatch.setattr(table_sample, "WHOLE_BYTES", 20_000)
    monkeypatch.setattr(table_sample, "PLACE_BYTES", 1 << 12)


@pytest.mark.parametrize("shape", ["avazu", "reviews", "taobao", "web", "criteo"])
def test_places(shape, small_limits, tmp_path):
    """Every row of the sample is a row of the file, although places begin anywhere, within quotes too; they are spread over it."""
    path = getattr(log_shapes, shape)(tmp_path, 3000 if shape == "web" else 6000)
    tabs = shape in ("web", "criteo")
    _, rows = oracle_rows(path, "\t" if tabs else ",", shape not in ("taobao", "criteo"), csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL)
    number = {tuple(row): k for k, row in enumerate(rows)}
    sample = take_sample((path,), 600)
    assert not sample.complete and not sample.exact and 200 <= sample.num_rows <= 600
    taken = list(zip(*(column.to_pylist() for column in sample.columns), strict=True))
    assert set(taken) <= set(number), "a row that is none"
    places = np.array([number[row] for row in taken])
    assert len(np.unique(places * 10 // len(rows))) == 10, "every tenth of the file is looked into"
    assert sample.total_rows == pytest.approx(len(rows), rel=0.05) and sample.skipped == 0


def test_gzip_is_sampled_at_its_beginning(small_limits, tmp_path, monkeypatch, run):
    monkeypatch.setattr(table_sample, "MOST_BYTES", 1 << 18)
    path = log_shapes.write(tmp_path / "x.csv.gz", [(i % 2, i * 7919 % 10007, i) for i in range(60_000)], ["click", "user", "k"], zipped=True)
    schema, figures, out = run(path, "--rows=3000")
    assert figures["sample_rows"] == 3000 and not figures["rows_exact"] and figures["rows"] > 10_000
    assert "only the beginning" in out and "estimated" in out and schema.label.column == "click"


def test_several_files(run, tmp_path, capsys, small_limits):
    folder = tmp_path / "days"
    folder.mkdir()
    for k in range(3):
        log_shapes.write(folder / f"part-{k}.csv", [(i % 3 == 0, i % 50, k) for i in range(1500)], ["label", "user_id", "day_of_file"])
    (folder / "_SUCCESS").write_text("")
    schema, figures, out = run(folder)
    assert len(figures["files"]) == 3 and figures["rows"] == pytest.approx(4500, rel=0.05) and schema.label.column == "label"
    assert figures["columns"]["day_of_file"]["distinct"] == 3
    assert run(folder / "*.csv")[0] == schema
    both = f"{folder / 'part-0.csv'},{folder / 'part-2.csv'}"
    assert run(both)[1]["columns"]["day_of_file"]["distinct"] == 2
    log_shapes.write(folder / "part-3.csv", [(0, 1, 2)] * 30, ["label", "user", "day_of_file"])
    assert "'user'" in error(capsys, folder) and "part-3.csv" in error(capsys, folder)
    log_shapes.write(folder / "part-3.csv", [(0, 1)] * 30, ["label", "user_id"])
    assert "2 columns" in error(capsys, folder)


def test_files_without_rows_and_in_another_order(run, tmp_path, capsys):
    """As reading takes them: a shard without rows is passed over, columns are found by name."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, data in {"p0.csv": "", "p1.csv": "click,user,v\n", "p4.csv": "click,user,v\n"}.items():
        (folder / name).write_text(data)
    log_shapes.write(folder / "p2.csv", [(i % 3 == 0, i % 50, f"v{i % 7}") for i in range(300)], ["click", "user", "v"])
    log_shapes.write(folder / "p3.csv", [(f"v{i % 7}", i % 3 == 0, i % 50) for i in range(300)], ["v", "click", "user"])
    schema, figures, out = run(folder)
    assert (figures["rows"], figures["rows_exact"], len(figures["files"])) == (600, True, 2)
    assert [(name, column["distinct"]) for name, column in figures["columns"].items()] == [("click", 2), ("user", 50), ("v", 7)]
    for name in ("p2.csv", "p3.csv"):
        (folder / name).unlink()
    assert "empty" in error(capsys, folder)


def test_parquet_binary(tmp_path, run):
    binary = {"bytes": [bytes([200 + i % 9, 255]) for i in range(100)], "text": [f"v{i % 5}".encode() for i in range(100)]}
    parquet.write_table(pa.table({"click": [i % 2 for i in range(100)], **binary}), tmp_path / "x.parquet")
    schema, figures, out = run(tmp_path / "x.parquet")
    assert [column.column for column in schema.categorical] == ["text"]
    assert "left out  bytes: binary, not UTF-8" in out and "every cell is missing" not in out


def test_a_row_id_of_which_some_are_there_twice(tmp_path, run):
    rows = draw(3000, lambda r, i: r.integers(2), lambda r, i: f"t{10**6 + i - (i % 60 == 1)}x", lambda r, i: 7 * 10**12 + (i - (i % 60 == 1)) * 7919,
                lambda r, i: f"some words {r.integers(10**5)}", lambda r, i: r.integers(900))  # fmt: skip
    (tmp_path / "x.csv").write_bytes(table(rows, "click,token,trace,words,user"))
    schema, _, out = run(tmp_path / "x.csv")
    assert [column.column for column in schema.categorical] == ["words", "user"]
    assert out.count("a row's own number or name: 2,950 distinct of 3,000") == 2


def test_decimal_commas(tmp_path, run):
    makers = (lambda r, i: r.integers(2), lambda r, i: f"{r.integers(10**4) / 100:.2f}".replace(".", ","), lambda r, i: f"{r.integers(9)}",
              lambda r, i: ",".join(str(r.integers(40)) for _ in range(r.integers(1, 4))), lambda r, i: f"1.{r.integers(100, 999)},5")  # fmt: skip
    (tmp_path / "x.csv").write_text("click;price;user;pages;total\n" + "".join(";".join(map(str, row)) + "\n" for row in draw(400, *makers)))
    schema, _, out = run(tmp_path / "x.csv")
    assert [(column.column, column.separator) for column in schema.categorical] == [("user", None), ("pages", ",")] and not schema.dense
    assert out.count("numbers with a decimal comma, as ") == 2 and "write 1234.5" in out


def test_large_integers_in_full(tmp_path, run):
    rows = draw(300, lambda r, i: r.integers(2), lambda r, i: 20141021093000123 + i // 2, lambda r, i: r.integers(9))
    (tmp_path / "x.csv").write_bytes(table(rows, "click,timestamp,user"))
    schema, figures, out = run(tmp_path / "x.csv")
    assert schema.split.column == "timestamp" and "as 20141021093000272" in out and "e+16" not in out
    assert figures["columns"]["timestamp"]["numbers"] == [20141021093000123, 20141021093000197, 20141021093000272]


def test_hive_bags(tmp_path, run):
    tags = draw(300, lambda r, i: "\x02".join(str(r.integers(40)) for _ in range(r.integers(1, 4))))
    rows = [(i % 2, tag, i % 9) for i, (tag,) in enumerate(tags)]
    (tmp_path / "part-0").write_text("click\x01tags\x01user\n" + "".join("\x01".join(map(str, row)) + "\n" for row in rows))
    schema, _, _ = run(tmp_path / "part-0")
    assert schema.delimiter == "\x01" and schema.categorical[0] == CategoricalColumn("tags", "integer", "\x02")


def test_parquet_row_groups(tmp_path, run):
    table = pa.table({"click": [i % 4 == 0 for i in range(50_000)], "user": [i // 100 for i in range(50_000)]})
    parquet.write_table(table, tmp_path / "x.parquet", row_group_size=1000)
    _, figures, out = run(tmp_path / "x.parquet", "--rows=2000")
    assert figures["rows"] == 50_000 and figures["rows_exact"] and figures["sample_rows"] == 2000
    assert figures["columns"]["user"]["numbers"][0] == 0 and figures["columns"]["user"]["numbers"][2] >= 490
    assert "row groups" in out


def test_latin1_behind_the_beginning(tmp_path, run):
    text = "ville,click\n" + "Paris,0\nParis,1\n" * 30_000 + "Orléans,1\n" * 50
    (tmp_path / "x.csv").write_bytes(text.encode("latin-1"))
    schema, figures, _ = run(tmp_path / "x.csv", "--rows=100000")
    assert schema.encoding == "latin-1" and figures["columns"]["ville"]["distinct"] == 2


def test_estimates():
    """GEE within its bound; exponents of drawn Zipf popularity found again."""
    rng = np.random.default_rng(0)
    cells = rng.integers(0, 30_000, 200_000)
    sample = rng.choice(cells, 5000, replace=False)
    truth, counts = len(np.unique(cells)), np.unique(sample, return_counts=True)[1]
    bound = (len(cells) / len(sample)) ** 0.5
    assert truth / bound <= gee(counts, len(sample), len(cells)) <= truth * bound
    assert gee(counts, len(sample), len(sample)) == len(counts)
    for exponent in (0.7, 1.0, 1.4):
        weights = (np.arange(5000) + 1.0) ** -exponent
        counts = np.sort(rng.multinomial(200_000, weights / weights.sum()))[::-1]
        assert fit_zipf(counts)[0] == pytest.approx(exponent, abs=0.07)
    assert fit_zipf(np.full(100, 50))[0] == pytest.approx(0, abs=1e-9)


# ---- rules


def table(rows: list, header: str) -> bytes:
    return (header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)).encode()


def draw(n: int, *makers) -> list:
    rng = np.random.default_rng(3)
    return [tuple(make(rng, i) for make in makers) for i in range(n)]


@pytest.mark.parametrize(
    ("header", "makers", "column", "positive"),
    [
        ("x,target", (lambda r, i: r.integers(9), lambda r, i: r.integers(2)), "target", None),
        ("a,is_click,y", (lambda r, i: r.integers(9), lambda r, i: r.integers(2), lambda r, i: r.integers(2)), "is_click", None),
        ("u,a,b", (lambda r, i: r.integers(9), lambda r, i: r.integers(9), lambda r, i: r.integers(2)), "b", None),
        ("u,label", (lambda r, i: r.integers(9), lambda r, i: (-1, 1)[r.integers(2)]), "label", ">= 1"),
        ("u,label", (lambda r, i: r.integers(9), lambda r, i: ("True", "False")[r.integers(2)]), "label", None),
        ("u,event_type", (lambda r, i: r.integers(9), lambda r, i: ("view", "cart", "purchase")[r.integers(3)]), "event_type", ("purchase",)),
        ("u,event", (lambda r, i: r.integers(9), lambda r, i: ("impression", "click")[r.integers(2)]), "event", ("click",)),
        ("u,behavior_type", (lambda r, i: r.integers(9), lambda r, i: r.integers(1, 5)), "behavior_type", ">= 4"),
        ("u,clicks", (lambda r, i: r.integers(9), lambda r, i: r.poisson(0.3)), "clicks", ">= 1"),
        ("u,overall", (lambda r, i: r.integers(9), lambda r, i: r.integers(1, 11)), "overall", ">= 8"),
        ("u,label", (lambda r, i: r.integers(9), lambda r, i: ("p", "q", "r")[r.integers(3)]), "???", None),
        ("u,v", (lambda r, i: r.integers(9), lambda r, i: r.integers(9)), "???", None),
    ],
)  # fmt: skip
def test_labels(header, makers, column, positive, tmp_path, run):
    (tmp_path / "x.csv").write_bytes(table(draw(300, *makers), header))
    schema, figures, _ = run(tmp_path / "x.csv")
    assert (schema.label.column, schema.label.positive) == (column, positive)
    if column != "???":
        blocks = [block for block, _ in TableSource((tmp_path / "x.csv",), schema).blocks(None, progress=False)]
        assert np.concatenate([block.labels for block in blocks]).mean() == pytest.approx(figures["label"]["ctr"], abs=1e-6)


def test_a_rating_without_a_name(tmp_path, run):
    """As Amazon's ratings only files and MovieLens' u.data are: user, item, rating, time."""
    rows = draw(500, lambda r, i: r.integers(90), lambda r, i: r.integers(40), lambda r, i: r.integers(1, 6), lambda r, i: 874724710 + 997 * i)
    (tmp_path / "u.data").write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))
    schema, _, _ = run(tmp_path / "u.data")
    assert (schema.label, schema.split) == (LabelColumn("c2", ">= 4"), SplitBy("time", 0.1, "c3"))


def test_label_flag(tmp_path, run, capsys):
    path = tmp_path / "x.csv"
    path.write_bytes(table(draw(300, lambda r, i: r.integers(2), lambda r, i: r.integers(2), lambda r, i: f"v{r.integers(3)}"), "click,bought,v"))
    assert run(path, "--label=bought")[0].label.column == "bought"
    assert "click, bought, v" in error(capsys, path, "--label=boght")
    assert "positive" in error(capsys, path, "--label=v")


def test_numbers_that_hardly_come_twice_are_measures(tmp_path, run):
    """Without a name that says id, and in no order; a user's numbers stay ids."""
    rows = draw(1000, lambda r, i: r.integers(2), lambda r, i: r.integers(10**4), lambda r, i: r.integers(10**4), lambda r, i: r.integers(50))
    (tmp_path / "x.csv").write_bytes(table(rows, "click,x3,user,k"))
    schema, _, _ = run(tmp_path / "x.csv")
    assert schema.dense == (DenseColumn("x3", "standardize"),) and [column.column for column in schema.categorical] == ["user", "k"]


def test_leaks(tmp_path, run):
    """Copies, opposites, nearly copies, a column that is there only for ones, and an order that says all; not what is merely useful."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(3000):
        y, score = int(rng.random() < 0.2), rng.random()
        near = y if rng.random() > 0.001 else 1 - y
        useful = y if rng.random() > 0.1 else 1 - y
        rows.append((y, 1 - y, "won" if near else "lost", f"{rng.random():.9f}" if y else "", f"{score + y:.6f}", useful, rng.integers(50)))
    (tmp_path / "x.csv").write_bytes(table(rows, "click,no_click,near,paid_at_price,rank_score,useful,user"))
    schema, figures, out = run(tmp_path / "x.csv")
    assert set(figures["leaks"]) == {"no_click", "near", "paid_at_price", "rank_score"}
    assert {column.column for column in (*schema.dense, *schema.categorical)} == {"useful", "user"}
    assert out.count("gives the label away") == 4


def test_columns_that_are_left_out_or_odd(tmp_path, run):
    rows = draw(
        400, lambda r, i: r.integers(2), lambda r, i: "", lambda r, i: "x", lambda r, i: i + 5, lambda r, i: f"{r.integers(90):05d}",
        lambda r, i: f"{r.integers(9)}{r.integers(10):0{r.integers(1, 4)}d}".lstrip("1"), lambda r, i: "oops" if i == 7 else r.integers(60),
        lambda r, i: "?" if i % 9 == 0 else f"{r.normal():.6f}", lambda r, i: "" if i % 5 else f"{r.integers(500)}.0",
        lambda r, i: f"{1 + i % 28:02d}/03/2020",
    )  # fmt: skip
    (tmp_path / "x.csv").write_bytes(table(rows, "click,nothing,same,row,zip,mixed,odd,temperature,item_id,day"))
    schema, figures, out = run(tmp_path / "x.csv")
    roles = {name: column["role"] for name, column in figures["columns"].items()}
    assert [name for name, role in roles.items() if role == "left out"] == ["nothing", "same", "row", "day"]
    assert "?" in schema.missing and DenseColumn("temperature", "standardize") in schema.dense
    types = {column.column: column.type for column in schema.categorical}
    assert types == {"zip": "integer", "mixed": "string", "odd": "string", "item_id": "integer"}
    assert "odd: numbers but for 1 cells, as 'oops'" in out
    assert sum(block.num_rows for block, _ in TableSource((tmp_path / "x.csv",), schema).blocks(None, progress=False)) == 400


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["1", "-2"], "integer"), (["1.5", "2", "1e3"], "float"), (["68fd1e64", "05db9164"], "hex"), (["0x1f", "0xA"], "hex"),
        (["12345678901234567890"], "code"), (["007", "12"], "code"), (["True", "false"], "bool"), (["2020-01-02", "2020-01-02 03:04:05"], "time"),
        (["1", "x"], "string"), (["68fd1e64", "05db91645"], "string"), ([], "empty"), (["beef", "cafe"], "string"),
    ],
)  # fmt: skip
def test_kinds(values, kind):
    assert kind_of(pa.array(values, pa.string())) == kind


@pytest.mark.parametrize(
    ("name", "values", "unit"),
    [
        ("hour", ["14102100", "14103023"], "YYMMDDHH"), ("d", [f"202001{d:02d}" for d in range(1, 29)], "YYYYMMDD"),
        ("ts", ["1400000000", "1500000000"], "seconds"), ("event_time", ["1400000000000", "1400000001000"], "milliseconds"),
        ("c4", [str(1511544070 + 977 * i) for i in range(300)], "seconds"), ("user", ["1400000000", "1500000000"], None), ("hour", ["0", "23"], None),
        ("price", ["14102100", "99999999"], None), ("timestamp", [str(61 + 7 * i) for i in range(200)], "numbers"),
    ],
)  # fmt: skip
def test_times(name, values, unit):
    found = times_of(name, "integer", pa.array(values))
    assert (found and found.unit) == unit


def test_bags():
    rng = np.random.default_rng(0)

    def cells(separator: str, vocabulary: list, most: int, brackets: str = "") -> pa.Array:
        texts = {separator.join(rng.choice(vocabulary, rng.integers(1, most + 1))) for _ in range(500)}
        return pa.array([f"[{text}]" if brackets else text for text in sorted(texts)])

    tags = [f"tag{i}" for i in range(40)]
    for separator in ("|", ",", ";", " ", "^"):
        assert bags_of(cells(separator, tags, 5), 500).separator == separator
    assert bags_of(cells(", ", tags, 5, "[]"), 500) == bags_of(cells(",", tags, 4, "[]"), 500)
    names = pa.array([f"{a}, {b}" for a in ("Doe", "Roe", "Poe") for b in ("Ann", "Bob", "Cid")])
    titles = pa.array([f"The {a} of {b}" for a in ("Lord", "King", "End") for b in ("Rome", "Time", "Men")])
    agents = pa.array(log_shapes.AGENTS)
    for none in (names, titles, agents, pa.array(["US>CA>803", "GB>H9"] * 5), pa.array([f"site{i}" for i in range(50)])):
        assert bags_of(pc.unique(none), 500) is None
    assert shape_of(agents) == "user agents"


# ---- the command line


def test_output_without_a_file_is_a_schema(tmp_path, capsys):
    path = log_shapes.movielens(tmp_path, 500)
    assert inspect.main([str(path)]) == 0
    (tmp_path / "out.yaml").write_text(capsys.readouterr().out)
    assert Schema.read(tmp_path / "out.yaml").label == LabelColumn("rating", ">= 4")


def test_every_line_of_the_schema_says_why(tmp_path, run):
    schema, _, _ = run(log_shapes.web(tmp_path, 500))
    lines = Path(schema.path).read_text().splitlines()
    about = [line for line in lines if line.startswith(("label:", "  - ", "split:"))]
    assert len(about) == 2 + len(schema.dense) + len(schema.categorical) and all("  # " in line for line in about)


def test_criteo_is_told_its_own_reader(tmp_path, run):
    assert "--data-set=kaggle --raw-data-file" in " ".join(run(log_shapes.criteo(tmp_path, 300))[2].replace("\\", "").split())
    day = log_shapes.criteo(tmp_path, 300, "day_0")
    assert f"--data-set=terabyte --raw-data-file={tmp_path / 'day'} " in " ".join(run(day)[2].replace("\\", "").split())


def test_errors(tmp_path, capsys):
    path = log_shapes.movielens(tmp_path, 100)
    kept = tmp_path / "kept.yaml"
    kept.write_text("mine")
    assert "exists" in error(capsys, path, f"--schema={kept}") and kept.read_text() == "mine"
    assert "no such file" in error(capsys, tmp_path / "absent.csv")
    assert "--rows=1" in error(capsys, path, "--rows=1")
    assert "cannot write" in error(capsys, path, f"--schema={tmp_path / 'no' / 'x.yaml'}").lower()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1" + bytes(50))
    assert "Parquet" in error(capsys, tmp_path / "bad.parquet")


def test_no_categorical_column(tmp_path, capsys):
    (tmp_path / "x.csv").write_text("click,price\n" + "".join(f"{i % 2},{i * 7919 % 1009 / 10}\n" for i in range(500)))
    assert inspect.main([str(tmp_path / "x.csv"), f"--schema={tmp_path / 'x.yaml'}"]) == 0
    assert "DLRM needs one" in capsys.readouterr().out
    with pytest.raises(UserError, match="at least one"):
        Schema.read(tmp_path / "x.yaml")


def test_damage_is_said(tmp_path, run):
    path = log_shapes.outbrain(tmp_path, 5000)
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cut off" in run(path)[2]


def test_ragged_rows_are_counted(tmp_path, run):
    rows = "click,user\n" + "1,5\n0,6\n0,5\n" * 400 + "1\n1,2,3\n"
    (tmp_path / "x.csv").write_text(rows)
    _, figures, out = run(tmp_path / "x.csv")
    assert figures["skipped_rows"] == 2 and "another number of columns" in out


def test_real_rows(real_criteo, run):
    schema, figures, out = run(real_criteo)
    assert figures["rows"] == pytest.approx(137_139, rel=0.05) and [column.type for column in schema.categorical] == ["hex"] * 26
    assert [column.column for column in schema.dense] == [f"I{i + 1}" for i in range(13)] and "--data-set=kaggle" in out
