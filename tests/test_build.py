"""build() of columns of every kind against loops over rows; that neither blocks, segments nor memory change a byte; older vocabularies; refusals."""

import gzip
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_loaders import arrays_writer, criteo_text, number_stage, numbering, read_stage, spill
from data_loaders.arrays import open_arrays
from data_loaders.blocks import Categorical, Dense, SplitRule
from data_loaders.build import Options, build
from data_loaders.manifest import vocabulary_files
from data_loaders.preprocess import preprocess
from dlrm_xla.specs import UserError
from tests.made_source import expected, make_source
from tests.oracles import criteo as oracle

MEMORY = 4 * 10**9
SPLITS = {
    "fraction": SplitRule("fraction", test=0.29),
    "parts": SplitRule("parts", parts=(0, 2)),
    "time": SplitRule("time", test=0.3),
    "start": SplitRule("time", start=17),
}


def times(n: int) -> list[int]:
    """Few and many different ones, negative and large."""
    choose = random.Random(n)
    return [choose.choice([-(2**63), -1, 0, 5, 17, 18, 2**40 + 1, 2**40, 2**63 - 1]) for _ in range(n)]


def source_for(folder, split: str, n: int = 100, floats: bool = True, **fields):
    folder.mkdir(exist_ok=True)
    return make_source(folder, n, 7, floats=floats, split=SPLITS[split], when=times(n), **fields)


def make(source, out, **options):
    return build(source, out, Options(**{"memory_bytes": MEMORY} | options), progress=False)


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.name != "verified.json"}


def check(arrays, source, wanted, folder):
    """Every value of an opened folder."""
    manifest, n = arrays.manifest, len(source.labels)
    assert (manifest.rows, manifest.num_train, manifest.num_test) == (n, wanted["num_train"], wanted["num_test"])
    assert [(part.name, part.rows) for part in manifest.parts] == list(zip(source.part_names, source.part_rows, strict=True))
    rows = arrays.rows[0:n].numpy()
    order, place = wanted["order"], 1
    assert rows[:, 0].view(source.labels.dtype).tolist() == source.labels[order].tolist()
    for column in range(len(source.dense)):
        values = source.dense_values[order, column]
        if source.number_type == "float32":
            values = transformed(values, source.dense[column].transform, wanted["num_train"])
            np.testing.assert_allclose(rows[:, place].view(np.float32), values, rtol=1e-6)
        else:
            assert rows[:, place].tolist() == values.tolist()
        place += 1
    for spec, table, column in zip(source.categorical, manifest.tables, wanted["columns"], strict=True):
        assert (table.name, table.rows, table.multi_hot) == (spec.name, len(column["keys"]), spec.multi_hot)
        if spec.multi_hot:
            lengths, ids = arrays.bags[spec.name].take(np.arange(n))
            assert np.split(ids, np.cumsum(lengths)[:-1])[5].tolist() == column["bags"][5]
            assert (lengths.tolist(), ids.tolist()) == ([len(bag) for bag in column["bags"]], [i for bag in column["bags"] for i in bag])
            assert table.hotness == max(len(bag) for bag in column["bags"])
            some = np.array([n - 1, 0, 3, 3])
            assert arrays.bags[spec.name].take(some)[1].tolist() == [i for row in some for i in column["bags"][row]]
        else:
            assert rows[:, place].tolist() == [bag[0] for bag in column["bags"]]
            place += 1
        keys, counts = (folder / name for name in vocabulary_files(spec.name))
        assert np.fromfile(keys, f"<u{spec.key_bits // 8}").tolist() == column["keys"]
        assert np.fromfile(counts, np.int64).tolist() == column["counts"]


def transformed(values, transform: str, num_train: int):
    values = values.astype(np.float64)
    if transform == "log":
        values = np.log(1 + np.maximum(values, 0))
    if transform == "standardize":
        seen = [value for value in values[:num_train] if value == value]
        mean = sum(seen) / len(seen)
        values = (values - mean) / (sum((value - mean) ** 2 for value in seen) / len(seen)) ** 0.5
    return np.where(np.isnan(values), 0, values)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("min_frequency", [0, 1, 3])
@pytest.mark.parametrize("floats", [True, False])
@pytest.mark.parametrize("split", SPLITS)
def test_equals_loops(tmp_path, split, floats, min_frequency, mapped):
    source = source_for(tmp_path / "raw", split, floats=floats)
    built = make(source, tmp_path / "out", min_frequency=min_frequency)
    arrays, wanted = open_arrays(tmp_path / "out", mapped), expected(source, min_frequency)
    check(arrays, source, wanted, tmp_path / "out")
    assert built.table_rows == tuple(len(column["keys"]) for column in wanted["columns"])
    assert {table.shared for table in arrays.manifest.tables} == {min_frequency > 0}
    assert arrays.manifest.flags == {"schema": "x", "min_frequency": min_frequency, "vocabulary": None}
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["out", "raw"]


@pytest.mark.parametrize("split", SPLITS)
def test_nothing_but_the_rows_decides_the_bytes(tmp_path, split, monkeypatch):
    """Blocks, segments, pieces of columns, and the memory, which here means runs instead of one hash table."""
    n = 300
    make(source_for(tmp_path / "raw", split, n), tmp_path / "one")
    wanted = contents(tmp_path / "one")
    monkeypatch.setattr(read_stage, "SEGMENT_ROWS", 40)
    monkeypatch.setattr(number_stage, "SAVE_SECONDS", -1)
    for number, block_rows in enumerate((1, 33, 1000)):
        make(source_for(tmp_path / "raw", split, n, block_rows=block_rows), tmp_path / f"blocks{number}")
        assert contents(tmp_path / f"blocks{number}") == wanted
    for name, need in (("runs", 10**14), ("whole", 0)):
        monkeypatch.setattr(numbering, "whole_bytes", lambda total, key_bytes, need=need: need)
        make(source_for(tmp_path / "raw", split, n), tmp_path / name)  # the budget counts what the test process holds: 4 GB
        assert contents(tmp_path / name) == wanted


def test_no_dense_columns_two_rows_and_bags_that_are_all_empty(tmp_path):
    """A column without any key still is a table of one row, which nothing reads."""
    source = source_for(tmp_path / "raw", "fraction", 2)
    source.dense, source.dense_values, source.split = (), np.empty((2, 0), np.float32), SplitRule("fraction", test=0.5)
    source.keys[3] = [[], []]
    make(source, tmp_path / "out")
    for mapped in (True, False):
        arrays = open_arrays(tmp_path / "out", mapped)
        assert arrays.manifest.width == 1 + 4 and arrays.rows[0:2].shape == (2, 5)
        lengths, ids = arrays.bags["many"].take(np.array([1, 0]))
        assert lengths.tolist() == [0, 0] and len(ids) == 0 and arrays.manifest.tables[3].rows == 1


def test_standardize_of_a_column_without_values_or_of_equal_ones(tmp_path):
    source = source_for(tmp_path / "raw", "fraction", 50)
    source.dense = (Dense("x", "standardize"), Dense("y", "standardize"), Dense("z", "log"))
    source.dense_values[:, 0], source.dense_values[:, 1] = np.nan, 5
    make(source, tmp_path / "out")
    arrays = open_arrays(tmp_path / "out", False)
    assert [(column.mean, column.std) for column in arrays.manifest.dense] == [(0, 1), (5, 1), (0, 1)]
    assert (arrays.rows[:, 1:3] == 0).all()


def test_an_infinite_value_is_refused(tmp_path):
    source = source_for(tmp_path / "raw", "fraction", 50)
    source.dense_values[3, 0] = np.inf
    with pytest.raises(UserError, match="column x: a value is infinite"):
        make(source, tmp_path / "out")


def test_a_split_that_leaves_nothing_is_refused(tmp_path):
    for rule in (SplitRule("fraction", test=0.001), SplitRule("parts", parts=(0, 1, 2)), SplitRule("time", start=2**63 - 1)):
        source = source_for(tmp_path / "raw", "fraction", 50)
        source.split, source.when = rule, [3] * 50
        with pytest.raises(UserError, match="which leaves none of 50 rows for .*; change the schema's split"):
            make(source, tmp_path / "out")
    source.split, source.when = SplitRule("time", test=0.5), [3] * 50  # all at once: half of them cannot be later than the others
    with pytest.raises(UserError, match="none of 50 rows for testing"):
        make(source, tmp_path / "out")


# ---- older vocabularies -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["runs", "bitmap"])
@pytest.mark.parametrize("min_frequency", [1, 2])
def test_an_older_vocabulary(tmp_path, min_frequency, way, monkeypatch):
    """New rows get the old ids, unknown keys share id 0; one more result on top of that gives the same ids again."""
    if way == "bitmap" and min_frequency == 1:
        pytest.skip("2^32 bits are laid out for each column: once is enough")
    old = source_for(tmp_path / "raw", "fraction", 200)
    make(old, tmp_path / "old", min_frequency=min_frequency)
    new = make_source(tmp_path / "raw", 150, 8, floats=True, split=SPLITS["fraction"], distinct=30)
    new.keys[0][:50] = old.keys[0][:50]
    if way == "bitmap":
        monkeypatch.setattr("data_loaders.vocabulary.RUNS_BYTES_PER_ID", {4: 10**14, 8: 44})
    make(new, tmp_path / "new", vocabulary=tmp_path / "old")
    make(new, tmp_path / "newer", vocabulary=tmp_path / "new")
    arrays, wanted = open_arrays(tmp_path / "new", False), expected(old, min_frequency)
    ids_of_new, place = expected(new), 4
    for spec, column, fresh in zip(new.categorical, wanted["columns"], ids_of_new["columns"], strict=True):
        known = {key: place for place, key in enumerate(column["keys"]) if place}
        bags = [[known.get(fresh["keys"][i], 0) for i in bag] for bag in fresh["bags"]]
        if spec.multi_hot:
            assert arrays.bags[spec.name].take(np.arange(150))[1].tolist() == [i for bag in bags for i in bag]
        else:
            assert arrays.rows[:, place].tolist() == [bag[0] for bag in bags]
            place += 1
    assert (tmp_path / "newer" / "rows.bin").read_bytes() == (tmp_path / "new" / "rows.bin").read_bytes()
    assert arrays.manifest.flags["vocabulary"]["size"] == (tmp_path / "old" / "manifest.json").stat().st_size


def test_keys_that_a_vocabulary_lacks(tmp_path):
    old = source_for(tmp_path / "raw", "fraction", 100)
    make(old, tmp_path / "old")
    make(old, tmp_path / "same", vocabulary=tmp_path / "old")
    assert (tmp_path / "same" / "rows.bin").read_bytes() == (tmp_path / "old" / "rows.bin").read_bytes()
    old.keys[1][40] = 0xABCDEF
    (tmp_path / "raw" / "part1.x").write_bytes(b"changed")
    with pytest.raises(UserError) as caught:
        make(old, tmp_path / "new", vocabulary=tmp_path / "old")
    assert str(caught.value) == (
        f"--vocabulary={tmp_path / 'old'}: column b c/d: key 11259375 (hexadecimal 0000000000abcdef) is not in it; make the vocabulary with "
        "--min-frequency=1 to have unknown keys share one id"
    )


def test_a_vocabulary_that_does_not_fit(tmp_path):
    old = source_for(tmp_path / "raw", "fraction", 60)
    make(old, tmp_path / "old", min_frequency=1)

    def refused(source, path, **options) -> str:
        with pytest.raises(UserError) as caught:
            make(source, tmp_path / "new", vocabulary=path, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "makes a vocabulary and --vocabulary=" in refused(old, tmp_path / "old", min_frequency=2)
    wide, folded = (Categorical("a", 64), "keys of 32 bits there and keys of 64 bits here"), (Categorical("a", modulo=9), "max_ind_range 0 there")
    for change, words in (wide, folded):
        assert words in refused(replace(old, categorical=(change, *old.categorical[1:])), tmp_path / "old")
    assert "has no column new; its columns are a, " in refused(replace(old, categorical=(Categorical("new"), *old.categorical[1:])), tmp_path / "old")
    assert "cannot read it" in refused(old, tmp_path / "absent")
    (tmp_path / "raw" / "x.npz").write_bytes(b"PK")
    assert "damaged, or not a result" in refused(old, tmp_path / "raw" / "x.npz")
    keys = tmp_path / "old" / vocabulary_files("a")[0]
    keys.write_bytes(keys.read_bytes()[:-4] + b"abcd")
    assert f"{keys.name} is damaged" in refused(old, tmp_path / "old")


def test_the_vocabulary_of_an_npz(tmp_path):
    """Kaggle's npz encodes new rows; into an arrays folder and into an npz, the same ids."""
    for name, text in (("old.txt", oracle.make_text(300)), ("new.txt", oracle.make_text(200, seed=9))):
        (tmp_path / name).write_bytes(text)
    flags = {"max_ind_range": -1, "sub_sample_rate": 0.0, "rng": None, "progress": False}
    preprocess(tmp_path / "old.txt", tmp_path / "old.npz", **flags, min_frequency=2)
    preprocess(tmp_path / "new.txt", tmp_path / "new.npz", **flags, vocabulary=tmp_path / "old.npz")
    preprocess(tmp_path / "new.txt", tmp_path / "new", **flags, vocabulary=tmp_path / "old.npz")
    preprocess(tmp_path / "new.txt", tmp_path / "newer.npz", **flags, vocabulary=tmp_path / "new.npz")
    old, new = oracle.read_text(oracle.make_text(300)), oracle.read_text(oracle.make_text(200, seed=9))
    wanted = np.empty((200, 26), int)
    for column in range(26):
        counts = {}
        for row in old:
            counts[row[2][column]] = counts.get(row[2][column], 0) + 1
        ids = {key: place for place, key in enumerate((key for key in counts if counts[key] >= 2), 1)}
        wanted[:, column] = [ids.get(row[2][column], 0) for row in new]
    for name in ("new.npz", "newer.npz"):
        with np.load(tmp_path / name) as data:
            np.testing.assert_array_equal(data["X_cat"], wanted)
    np.testing.assert_array_equal(open_arrays(tmp_path / "new", False).rows[:, 14:], wanted)


# ---- Criteo -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_kaggle_as_arrays(tmp_path, rate, monkeypatch):
    """The same values as in the npz; the days' cuts are found in rows that sub-sampling thinned out, over several segments."""
    monkeypatch.setattr(read_stage, "SEGMENT_ROWS", 60)
    monkeypatch.setattr("data_loaders.criteo_text.BLOCK_BYTES", 4000)
    text = oracle.make_text(500)
    (tmp_path / "train.txt").write_bytes(text)
    flags = {"max_ind_range": 97, "sub_sample_rate": rate, "progress": False}
    preprocess(tmp_path / "train.txt", tmp_path / "out", **flags, rng=np.random.RandomState(3))
    wanted, arrays = oracle.process(text, 97, rate, seed=3), open_arrays(tmp_path / "out", False)
    rows, manifest = arrays.rows.numpy(), arrays.manifest
    for name, columns in (("y", 0), ("X_int", slice(1, 14)), ("X_cat", slice(14, 40))):
        np.testing.assert_array_equal(rows[:, columns], wanted[name])
    assert [part.rows for part in manifest.parts] == wanted["total_per_file"]
    last = wanted["total_per_file"][-1]
    assert (manifest.num_train, manifest.num_test, manifest.raw_rows) == (sum(wanted["total_per_file"][:-1]), (last + 1) // 2, 500)
    assert [table.rows for table in manifest.tables] == wanted["counts"] and manifest.flags["max_ind_range"] == 97


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_terabyte(tmp_path, rate):
    """24 files of different lengths, some of them gzip: parts are the files, and numbers go through them all."""
    texts = [oracle.make_text(5 + day, seed=day) for day in range(24)]
    for day, text in enumerate(texts):
        (tmp_path / f"day_{day}{'.gz' if day % 3 == 0 else ''}").write_bytes(gzip.compress(text) if day % 3 == 0 else text)
    flags = {"max_ind_range": -1, "sub_sample_rate": rate, "progress": False}
    for out in ("out", "out.npz"):
        preprocess(tmp_path / "day", tmp_path / out, **flags, rng=np.random.RandomState(3), data_set="terabyte")
    rng, rows, kept = np.random.RandomState(3), [], []
    for text in texts:
        day = oracle.read_text(text)
        draws = rng.uniform(size=len(day)) if rate else np.ones(len(day))
        day = [row for row, draw in zip(day, draws, strict=True) if row[0] or draw >= rate]
        rows, kept = rows + day, [*kept, len(day)]
    wanted = oracle.process("".join("\t".join(map(str, [y, *x, *(f"{h:x}" for h in hs)])) + "\n" for y, x, hs in rows).encode())
    arrays = open_arrays(tmp_path / "out", False)
    np.testing.assert_array_equal(arrays.rows[:, 14:], wanted["X_cat"])
    assert [(part.name, part.rows) for part in arrays.manifest.parts] == [(f"day_{day}", count) for day, count in enumerate(kept)]
    assert [part.raw["name"] for part in arrays.manifest.parts][:2] == ["day_0.gz", "day_1"]
    with np.load(tmp_path / "out.npz") as data:
        np.testing.assert_array_equal(data["X_cat"], wanted["X_cat"])
        assert data["total_per_file"].tolist() == kept
        assert len(json.loads(str(data["meta"]))["raws"]) == 24


def test_a_missing_day(tmp_path):
    for day in (0, 1, 3):
        (tmp_path / f"day_{day}").write_bytes(oracle.make_text(5))
    with pytest.raises(UserError, match=r"day_2 is missing, and so is day_2.gz; Terabyte is 24 files, day_0 to day_23, plain or .gz"):
        preprocess(tmp_path / "day", tmp_path / "out", max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False, data_set="terabyte")


# ---- unfinished work ----------------------------------------------------------------------------------------------------------------


class Stop(Exception):
    pass


def read_until(source, out, monkeypatch, segments: int, **options):
    """A run that ends when so many segments are on the disk."""
    whole = spill.write_segment

    def write(folder, number, blocks, mark):
        if number == segments:
            raise Stop
        return whole(folder, number, blocks, mark)

    with monkeypatch.context() as patch:
        patch.setattr(read_stage, "SEGMENT_ROWS", 10)
        patch.setattr(read_stage, "write_segment", write)
        with pytest.raises(Stop):
            make(source, out, **options)


def started_at(source, monkeypatch) -> list:
    """Gets the mark of each later reading."""
    marks, blocks = [], source.blocks
    monkeypatch.setattr(source, "blocks", lambda start, *, progress: (marks.append(start), blocks(start, progress=progress))[1])
    return marks


def test_taken_up_behind_the_last_whole_segment(tmp_path, monkeypatch):
    source, out = source_for(tmp_path / "raw", "fraction", block_rows=5), tmp_path / "out"
    make(source, tmp_path / "undisturbed")
    read_until(source, out, monkeypatch, 4)
    marks = started_at(source, monkeypatch)
    make(source, out, memory_bytes=5 * 10**9)  # the memory is no part of the key
    assert marks[0].rows >= 35
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("change", ["min_frequency", "raw file", "columns", "name"])
def test_other_work_is_not_taken_up(tmp_path, change, monkeypatch):
    source, out = source_for(tmp_path / "raw", "fraction", block_rows=5), tmp_path / "out"
    read_until(source, out, monkeypatch, 4)
    options = {}
    if change == "raw file":
        (tmp_path / "raw" / "part0.x").write_bytes(b"other")
    elif change == "columns":
        source.categorical = (Categorical("renamed"), *source.categorical[1:])
    elif change == "min_frequency":
        options["min_frequency"] = 2
    elif change == "name":
        (tmp_path / "other.parts").mkdir()
        out = tmp_path / "other"
    marks = started_at(source, monkeypatch)
    make(source, out, **options)
    assert marks == [None]
    make(source, tmp_path / "undisturbed", **options)
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_files_before_the_one_that_changed_are_not_read_again(tmp_path, monkeypatch):
    source, out = source_for(tmp_path / "raw", "fraction", block_rows=5), tmp_path / "out"
    source.part_rows = [40, 30, 30]
    monkeypatch.setattr(read_stage, "SEGMENT_BYTES", 8)  # so that a segment ends where a file does
    read_until(source, out, monkeypatch, 18)
    (tmp_path / "raw" / "part2.x").write_bytes(b"other")
    marks = started_at(source, monkeypatch)
    make(source, out)
    assert marks[0].rows == 70


def test_nothing_of_an_older_file_is_left_behind_in_the_result(tmp_path, monkeypatch):
    """Stopped while writing; then the last file is fetched again, shorter."""
    source, out = source_for(tmp_path / "raw", "fraction", block_rows=5), tmp_path / "out"
    source.part_rows = [40, 30, 30]
    monkeypatch.setattr(read_stage, "SEGMENT_BYTES", 8)

    def stop(*args):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(arrays_writer, "_write_vocabularies", stop)
        with pytest.raises(Stop):
            make(source, out)
    (tmp_path / "raw" / "part2.x").write_bytes(b"other")
    source.labels, source.dense_values, source.part_rows = source.labels[:80], source.dense_values[:80], [40, 30, 10]
    source.keys = [column[:80] for column in source.keys]
    make(source, out)
    make(source, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")
    open_arrays(out, False)


@pytest.mark.parametrize("out", ["out", "out.npz"])
def test_a_last_segment_whose_rows_were_all_left_out(tmp_path, out, monkeypatch):
    monkeypatch.setattr(read_stage, "SEGMENT_ROWS", 20)
    monkeypatch.setattr(criteo_text, "BLOCK_BYTES", 4000)
    lines = oracle.make_text(700).split(b"\n")[:-1]
    (tmp_path / "train.txt").write_bytes(b"".join((b"1" if k < 690 else b"0") + line[1:] + b"\n" for k, line in enumerate(lines)))
    rng = np.random.RandomState(1)
    built = preprocess(tmp_path / "train.txt", tmp_path / out, max_ind_range=-1, sub_sample_rate=1.0, rng=rng, progress=False)
    assert built.rows == 690


def test_a_damaged_or_missing_segment_is_read_again(tmp_path, monkeypatch):
    source = source_for(tmp_path / "raw", "fraction", block_rows=5)
    make(source, tmp_path / "undisturbed")
    ways = (lambda path: path.unlink(), lambda path: path.write_bytes(b""), lambda path: path.write_bytes(path.read_bytes()[:-20]))
    for number, spoil in enumerate(ways):
        out = tmp_path / f"out{number}"
        read_until(source, out, monkeypatch, 6)
        spoil(spill.segment_path(spill.parts_folder(out), 2))
        make(source, out)
        assert contents(out) == contents(tmp_path / "undisturbed")


def test_a_flipped_byte_in_a_segment_is_noticed(tmp_path, monkeypatch):
    source, out = source_for(tmp_path / "raw", "fraction", block_rows=5), tmp_path / "out"
    read_until(source, out, monkeypatch, 6)
    path = spill.segment_path(spill.parts_folder(out), 2)
    data = bytearray(path.read_bytes())
    data[10] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"{path}: damaged on the disk; delete the folder out.parts and run again"):
        make(source, out)


# ---- refusals -----------------------------------------------------------------------------------------------------------------------


def test_too_little_memory(tmp_path, monkeypatch):
    """One line with the flag and with what is enough; what was read is kept."""
    source, out = source_for(tmp_path / "raw", "fraction"), tmp_path / "out"
    with pytest.raises(UserError, match=r"^--preprocess-memory=1000000 bytes is too little for reading rows: [0-9]+MB is enough$"):
        make(source, out, memory_bytes=10**6)
    with monkeypatch.context() as patch:
        patch.setattr(number_stage, "free_bytes", lambda options: 1000)
        with pytest.raises(UserError, match=r"is too little for column a: [0-9]+MB is enough$"):
            make(source, out)
    marks = started_at(source, monkeypatch)
    make(source, out)
    assert marks == []


def test_places_that_are_not_replaced(tmp_path):
    source = source_for(tmp_path / "raw", "fraction")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text('{"manifest_version": 3}')
    other = "it is a folder that holds other things"
    make(source, tmp_path / "more")
    (tmp_path / "more" / "thesis.tex").write_bytes(b"")
    for name, words in (("full", other), ("extension", other), ("more", other), ("file", "it is a file"), ("absent/out", "No such file")):
        with pytest.raises(UserError, match=f"cannot write {tmp_path / name}: {words}.*; name another place with --processed-data-file=PATH"):
            make(source, tmp_path / name)
    with pytest.raises(UserError, match="an .npz holds Criteo's columns only"):
        make(source, tmp_path / "out.npz")
    (tmp_path / "empty").mkdir()
    for _ in range(2):  # the second time, an older result
        make(source, tmp_path / "empty")
        open_arrays(tmp_path / "empty", False)


def test_more_ids_than_int32(tmp_path, monkeypatch):
    source = source_for(tmp_path / "raw", "fraction")

    def too_many(*args):
        raise numbering.TooManyIds(2**31)

    monkeypatch.setattr(number_stage, "number_ids", too_many)
    with pytest.raises(UserError, match="column a: 2147483648 ids; the most is 2147483647: give it a max_ind_range"):
        make(source, tmp_path / "out")


def test_preprocessing_needs_no_torch():
    """It would take 0.5 GB of the memory that --preprocess-memory allows."""
    code = "import sys, data_loaders.preprocess; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent.parent).returncode == 0
