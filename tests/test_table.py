"""A user's table from its files to batches and to training: ids, bags, splits, orders, what an older folder was made from, and the command line."""

import csv
import gzip
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from conftest import criteo_lines

from data_loaders.table import TableDataset, open_table
from dlrm_xla.batch import to_bags
from dlrm_xla.specs import UserError

MODEL = (
    "--data-generation=dataset", "--data-set=table", "--arch-sparse-feature-size=8", "--arch-mlp-bot=9-16-8", "--arch-mlp-top=16-1",
    "--loss-function=bce", "--round-targets=True", "--learning-rate=0.1", "--mini-batch-size=32",
)  # fmt: skip
SCHEMA = """\
label: {column: rating, positive: ">= 4"}
dense:
  - {column: price, transform: log}
  - {column: age}
categorical:
  - {column: user, type: integer}
  - {column: genres, type: string, separator: "|"}
  - {column: site, type: hex}
split: {by: time, column: ts, test: 0.2}
"""


def made_up(num_rows: int, seed: int = 0) -> list[dict]:
    rnd, genres = random.Random(seed), ["Action", "Drama", "Comedy", "Noir"]
    return [
        {
            "user": str(rnd.randrange(-3, 20)), "genres": "|".join(rnd.sample(genres, rnd.randrange(4))), "site": f"{rnd.randrange(9) * 7919:x}",
            "price": rnd.choice(["", "0.5", "12", "-3"]), "age": str(rnd.randrange(80)), "rating": str(rnd.randrange(1, 6)), "ts": str(n // 3),
        }
        for n in range(num_rows)
    ]  # fmt: skip


def write(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt", newline="") if path.suffix == ".gz" else open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


def numbered(rows: list[dict], column: str) -> dict[str, int]:
    """Ids in order of first appearance, a dictionary as upstream has one."""
    ids: dict[str, int] = {}
    for row in rows:
        for value in row[column].split("|") if column == "genres" else [row[column]]:
            if value or column != "genres":
                ids.setdefault(value, len(ids))
    return ids


def expected(rows: list[dict], of_all: list[dict]) -> list[tuple]:
    """(label, dense, ids of each table) of rows."""
    user, genres, site = (numbered(of_all, column) for column in ("user", "genres", "site"))

    def log(cell: str) -> float:
        return float(np.log1p(np.float32(max(float(cell), 0)))) if cell else 0.0

    return [
        (
            float(int(row["rating"]) >= 4), [log(row["price"]), float(row["age"])],
            [[user[row["user"]]], [genres[genre] for genre in row["genres"].split("|") if genre], [site[row["site"]]]],
        )
        for row in rows
    ]  # fmt: skip


def rows_of(split, hotness) -> list[tuple]:
    rows = []
    for batch in split.batches():
        offsets, indices = to_bags(batch, hotness)
        bags = [[part.tolist() for part in np.split(index.numpy(), offset[1:].numpy())] for offset, index in zip(offsets, indices, strict=True)]
        for n in range(batch.num_valid):
            rows.append((float(batch.labels[n, 0]), batch.dense[n].tolist(), [table[n] for table in bags]))
        assert batch.size == split.batch_size and not batch.ids[batch.num_valid :].any()
    return rows


def same(found: list[tuple], wanted: list[tuple]) -> None:
    assert [row[::2] for row in found] == [row[::2] for row in wanted]
    np.testing.assert_allclose([row[1] for row in found], [row[1] for row in wanted], rtol=1e-6)


@pytest.fixture
def table(tmp_path):
    """table(raw, schema, **flags) -> the data set; lines printed are in table.lines."""

    def of(raw, schema: str = SCHEMA, **flags) -> TableDataset:
        path = tmp_path / "schema.yaml"
        path.write_text(schema)
        of.lines = []
        given = {
            "processed_data_file": "", "data_randomize": "none", "max_ind_range": -1, "batch_size": 32, "test_batch_size": 50, "drop_last": False,
            "num_batches": 0, "memory_map": False, "memory_bytes": 4 * 10**9, "min_frequency": 0, "vocabulary": "",
            "rng": np.random.RandomState(123), "seed": 123, "progress": False,
        }  # fmt: skip
        return open_table(schema_file=str(path), raw_data_file=str(raw), print_line=of.lines.append, **{**given, **flags})

    return of


@pytest.mark.parametrize("memory_map", [False, True])
def test_rows_and_bags_of_both_halves(tmp_path, table, memory_map):
    rows = made_up(300)
    data = table(write(tmp_path / "a.csv", rows), memory_map=memory_map)
    assert data.table_rows == (23, 4, 9) and data.hotness == (1, 3, 1) and data.num_dense == 2 and data.bayes_auc is None
    assert (data.train.num_rows, data.train.num_batches, data.test.num_rows, data.test.batch_size) == (240, 8, 60, 50)
    same(rows_of(data.train, data.hotness), expected(rows[:240], rows))
    same(rows_of(data.test, data.hotness), expected(rows[240:], rows))
    assert (tmp_path / "a.csv.processed" / "manifest.json").is_file()
    assert "Table of 300 rows, 240 for training, 60 for testing; label 1: " in "\n".join(table.lines)


def test_parquet_gives_the_same_batches(tmp_path, table):
    rows = made_up(200)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    columns |= {"user": [int(cell) for cell in columns["user"]], "genres": [[part for part in cell.split("|") if part] for cell in columns["genres"]]}
    columns |= {"price": [float(cell) if cell else None for cell in columns["price"]], "ts": [int(cell) for cell in columns["ts"]]}
    parquet.write_table(pa.table(columns), tmp_path / "a.parquet", row_group_size=64)
    first, second = table(tmp_path / "a.parquet"), table(write(tmp_path / "a.csv", rows))
    assert rows_of(first.train, first.hotness) == rows_of(second.train, second.hotness)
    assert rows_of(first.test, first.hotness) == rows_of(second.test, second.hotness)


def test_rows_out_of_order_are_split_by_time(tmp_path, table):
    rows = made_up(300)
    random.Random(5).shuffle(rows)
    data = table(write(tmp_path / "a.csv", rows))
    late = [int(row["ts"]) >= 80 for row in rows]
    test = [row for row, is_late in zip(rows, late, strict=True) if is_late]
    assert len(test) == 60
    same(rows_of(data.test, data.hotness), expected(test, rows))
    same(rows_of(data.train, data.hotness), expected([row for row in rows if row not in test], rows))


def test_split_by_fraction_and_by_file(tmp_path, table):
    rows = made_up(300)
    for name, some in (("a.csv", rows[:100]), ("b.csv.gz", rows[100:150]), ("c.csv", rows[150:])):
        write(tmp_path / "d" / name, some)
    split = "split: {by: time, column: ts, test: 0.2}"
    data = table(tmp_path / "d", SCHEMA.replace(split, "split: {by: fraction, test: 0.1}"))
    same(rows_of(data.test, data.hotness), expected(rows[270:], rows))
    data = table(tmp_path / "d", SCHEMA.replace(split, "split: {by: file, test: [b.csv.gz]}"), processed_data_file=str(tmp_path / "other"))
    same(rows_of(data.test, data.hotness), expected(rows[100:150], rows))
    train = rows_of(data.train, data.hotness)
    same(train, expected(rows[:100] + rows[150:], rows))
    # within files
    shuffled = table(tmp_path / "d", SCHEMA.replace(split, "split: {by: file, test: [b.csv.gz]}"),
                     processed_data_file=str(tmp_path / "other"), data_randomize="day")  # fmt: skip
    found = rows_of(shuffled.train, data.hotness)
    order = [*np.random.RandomState(123).permutation(np.arange(100))]
    assert found[:100] == [train[n] for n in order] and sorted(map(str, found[100:])) == sorted(map(str, train[100:]))


def test_total_is_one_permutation_of_the_runs_stream(tmp_path, table):
    rows = made_up(300)
    path, rng = write(tmp_path / "a.csv", rows), np.random.RandomState(7)
    plain = table(path)
    data = table(path, data_randomize="total", rng=rng)
    train = rows_of(plain.train, plain.hotness)
    twin = np.random.RandomState(7)
    assert rows_of(data.train, data.hotness) == [train[n] for n in twin.permutation(240)]
    twin.permutation(240)  # as Criteo's test half draws it
    assert rng.randint(1 << 30) == twin.randint(1 << 30)
    mapped = table(path, data_randomize="total", memory_map=True)
    assert sorted(map(str, rows_of(mapped.train, mapped.hotness))) == sorted(map(str, train))


def test_a_split_by_time_has_no_files_to_shuffle_within(tmp_path, table):
    rows = made_up(100)
    write(tmp_path / "d" / "a.csv", rows[:50])
    write(tmp_path / "d" / "b.csv", rows[50:])
    with pytest.raises(UserError, match="--data-randomize=day: a split by time"):
        table(tmp_path / "d", data_randomize="day")


def test_bags_that_always_fill_their_slots_need_no_weights(tmp_path, table):
    rows = [{**row, "genres": "Action|Drama"} for row in made_up(100)]
    data = table(write(tmp_path / "a.csv", rows))
    assert next(data.train.batches()).weights is None and data.hotness == (1, 2, 1)
    assert next(table(write(tmp_path / "b.csv", made_up(100))).train.batches()).weights is not None


def test_without_dense_columns_there_is_one_of_zeros(tmp_path, table):
    schema = SCHEMA.replace("dense:\n  - {column: price, transform: log}\n  - {column: age}\n", "")
    data = table(write(tmp_path / "a.csv", made_up(100)), schema)
    batch = next(data.train.batches())
    assert data.num_dense == 1 and batch.dense.shape == (32, 1) and not batch.dense.any()


def test_standardized_over_the_training_rows(tmp_path, table):
    rows = made_up(300)
    data = table(write(tmp_path / "a.csv", rows), SCHEMA.replace("{column: age}", "{column: age, transform: standardize}"))
    ages = np.array([float(row["age"]) for row in rows])
    wanted = (ages - ages[:240].mean()) / ages[:240].std()
    found = [row[1][1] for half in (data.train, data.test) for row in rows_of(half, data.hotness)]
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def test_rare_ids_share_one(tmp_path, table):
    rows = made_up(300)
    data = table(write(tmp_path / "a.csv", rows), min_frequency=12)
    seen = [row["user"] for row in rows]
    often = [user for user in dict.fromkeys(seen) if seen.count(user) >= 12]
    found = [row[2][0][0] for half in (data.train, data.test) for row in rows_of(half, data.hotness)]
    assert found == [often.index(user) + 1 if user in often else 0 for user in seen] and data.table_rows[0] == len(often) + 1


def test_missing_single_values_have_an_id_of_their_own(tmp_path, table):
    rows = [{**row, "user": "" if n % 4 == 0 else row["user"], "site": "NA" if n % 5 == 0 else row["site"]} for n, row in enumerate(made_up(100))]
    data = table(write(tmp_path / "a.csv", rows))
    ids = [row[2][0][0] for half in (data.train, data.test) for row in rows_of(half, data.hotness)]
    assert set(ids[::4]) == {0} and 0 not in {number for n, number in enumerate(ids) if n % 4}
    assert any("user: " in line and ", 25 cells missing" in line for line in table.lines)
    assert any("site: " in line and ", 20 cells missing" in line for line in table.lines)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"schema": SCHEMA.replace("log", "none")}, "made with another schema than .*dense: differ.*; delete it or choose another"),
        ({"max_ind_range": 5}, "made with another --max-ind-range than 5"),
        ({"min_frequency": 2}, "made with --min-frequency=0, but 2 is asked for"),
        ({"rows": made_up(99)}, "made from another raw file .*bytes then"),
        ({"rows": [{**row, "age": row["age"][::-1]} for row in made_up(100)]}, "same size, other content"),
        ({"raw": ""}, None),
    ],
)
def test_an_older_folder(tmp_path, table, changed, message):
    path = write(tmp_path / "a.csv", made_up(100))
    before = table(path)
    if "rows" in changed:
        write(path, changed.pop("rows"))
    flags = {"raw": path, "processed_data_file": str(tmp_path / "a.csv.processed"), **changed}
    if message is None:
        path.unlink()
        assert rows_of(table(**{**flags, "raw": path}).test, before.hotness) == rows_of(before.test, before.hotness)
        assert any("no such file" in line and "is used as it is" in line for line in table.lines)
        again = table(**flags)
        assert rows_of(again.train, again.hotness) == rows_of(before.train, before.hotness)
        return
    with pytest.raises(UserError, match=message):
        table(**flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"processed_data_file": "a.npz"}, "--processed-data-file=a.npz: the arrays of a table are a folder"),
        ({"raw": "", "processed_data_file": "none"}, "--processed-data-file=none: no arrays there; to make them"),
        ({"schema": SCHEMA.replace("{by: time, column: ts, test: 0.2}", "{by: time, column: ts, start: 999}")}, "none of 100 rows for testing"),
        ({"schema": SCHEMA.replace("test: 0.2", "start: 999")}, r"schema.yaml: line 9: split: .* \(the column is written as 0\)$"),
        ({"schema": SCHEMA.replace("{by: time, column: ts, test: 0.2}", "{by: fraction, test: 0.001}")}, "schema.yaml: line 9: split: "),
        ({"schema": SCHEMA.replace("{by: time, column: ts, test: 0.2}", "{by: fraction, test: 0.001}")}, "none of 100 rows for testing"),
    ],
)
def test_refusals(tmp_path, table, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        table(**{"raw": write(tmp_path / "a.csv", made_up(100)), **flags})


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_cell_that_a_vocabulary_lacks_is_shown(tmp_path, table, kind):
    """Its key alone is a hash."""
    older, rows = made_up(100), made_up(100)
    rows[70]["genres"] = "Drama|Western"
    table(write(tmp_path / "a.csv", older))
    if kind == "parquet":
        path = tmp_path / "b.parquet"
        parquet.write_table(pa.table({name: [row[name] for row in rows] for name in rows[0]}), path)
    else:
        path = write(tmp_path / "b.csv", rows)
    where = "line 72" if kind == "csv" else "row 71"
    with pytest.raises(UserError, match=rf"^{path}: {where}, column 'genres': 'Drama\|Western': --vocabulary=.*: column genres: key "):
        table(path, vocabulary=str(tmp_path / "a.csv.processed"))


@pytest.mark.parametrize(("positive", "missing"), [(">= 9", 1), (">= 0", 0)])
@pytest.mark.parametrize("memory_map", [False, True])
def test_one_label_only_is_warned_of(tmp_path, table, positive, missing, memory_map):
    table(write(tmp_path / "a.csv", made_up(100)), SCHEMA.replace(">= 4", positive), memory_map=memory_map)
    warnings = [line for line in table.lines if line.startswith("warning: ")]
    about = f"warning: {tmp_path}/schema.yaml: line 1: label 'rating': no row's label is {missing} of the"
    assert [line.split(" rows")[0] for line in warnings] == [f"{about} 81 training", f"{about} 19 test"]
    table(write(tmp_path / "b.csv", made_up(100)))
    assert not any(line.startswith("warning") for line in table.lines)


def test_a_folder_with_other_things_is_left_alone(tmp_path, table):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="mine"):
        table(write(tmp_path / "a.csv", made_up(50)), processed_data_file=str(tmp_path / "mine"))
    assert (tmp_path / "mine" / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_training_from_the_command_line(cli, tmp_path, device):
    write(tmp_path / "a.csv", made_up(300))
    (tmp_path / "s.yaml").write_text(SCHEMA)
    flags = (*MODEL, "--schema=s.yaml", "--raw-data-file=a.csv", "--nepochs=2", "--print-freq=4", "--test-freq=8")
    first = cli(*flags, device=device)
    assert first.code == 0, first.err
    assert len(first.losses) == 4 and np.isfinite(first.losses).all() and "Testing at" in first.out
    again = cli(*flags, "--memory-map", "--data-randomize=none", device=device)
    assert again.code == 0, again.err


def test_criteos_text_as_a_table(cli, tmp_path):
    """Its own format is one more table without a header."""
    (tmp_path / "train.txt").write_text("".join(f"{line}\n" for line in criteo_lines(300)))
    columns = [f"  - {{column: c{14 + n}, type: hex}}" for n in range(26)]
    dense = [f"  - {{column: c{1 + n}, transform: log}}" for n in range(13)]
    lines = ["format: tsv", "header: false", "label: {column: c0}", "dense:", *dense, "categorical:", *columns]
    (tmp_path / "s.yaml").write_text("\n".join(lines))
    done = cli(*MODEL, "--schema=s.yaml", "--raw-data-file=train.txt", "--print-freq=4")
    assert done.code == 0, done.err
    assert len(done.losses) == 3


@pytest.mark.parametrize(
    ("row", "message"),
    [("1,x,0,1,1,5,1", "a.csv: line 102, column 'user'"), ("1,x", "a.csv: line 102: 2 columns; a row has 7 columns (user, genres, site")],
)
def test_bad_rows_end_in_one_line(cli, tmp_path, row, message):
    path = write(tmp_path / "a.csv", made_up(100))
    path.write_text(path.read_text() + row.replace("1,x,", "u1,x,") + "\n")
    (tmp_path / "s.yaml").write_text(SCHEMA)
    assert message in cli(*MODEL, "--schema=s.yaml", "--raw-data-file=a.csv").error
