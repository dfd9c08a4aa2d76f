"""MLPerf's binary files: bytes against upstream's layout restated, shuffled batches against torch's own loader, files that are refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, ROOT
from torch.utils.data import DataLoader, RandomSampler

from data_loaders import mlperf_bin
from data_loaders.criteo import open_criteo
from data_loaders.mlperf_bin import bin_file, bin_stem
from data_loaders.preprocess import preprocess
from dlrm_xla.specs import UserError
from tests.oracles import terabyte as oracle
from tests.oracles.reorder import reordered

SIZES = [10 + 3 * (day % 4) for day in range(24)]
NUM_TRAIN, LAST = sum(SIZES[:-1]), SIZES[-1]
WANTED = oracle.process_days(oracle.make_days(SIZES))
MODEL = [flag for flag in CRITEO_MODEL if not flag.startswith("--mini-batch-size")]


@pytest.fixture
def processed(tmp_path):
    """Upstream's terabyte_processed.npz, which needs no raw files."""
    return oracle.save_upstreams(tmp_path, WANTED, mappable=True)


def open_it(processed, *, lines=None, notes=None, **fields):
    flags = {
        "data_set": "terabyte", "raw_data_file": str(processed.with_name("day")), "processed_data_file": str(processed),
        "data_randomize": "total", "max_ind_range": -1,
        "sub_sample_rate": 0.0, "batch_size": 16, "test_batch_size": 4, "drop_last": False, "num_batches": 0, "seed": 123,
        "rng": np.random.RandomState(123), "preprocess_rng": np.random.RandomState(123), "progress": False,
        "print_line": (lines if lines is not None else []).append, "note": (notes if notes is not None else []).append, "memory_map": True,
        "mlperf": True, "bin_loader": True,
    }  # fmt: skip
    return open_criteo(**(flags | fields))


def refusal(processed, **fields) -> str:
    with pytest.raises(UserError) as caught:
        data = open_it(processed, **fields)
        for split in (data.train, data.test):
            list(split.batches())
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of_files(folder, name="terabyte_processed"):
    """The three files, [n, 40] each, by upstream's own way of reading them."""
    return {split: np.frombuffer((folder / f"{name}_{split}.bin").read_bytes(), dtype=np.int32).reshape(-1, 40) for split in mlperf_bin.SPLITS}


def wanted_rows(randomize="total", seed=123) -> dict[str, list]:
    order = reordered(SIZES, randomize, np.random.RandomState(seed))
    rows = [[WANTED["y"][row], *WANTED["X_int"][row], *WANTED["X_cat"][row]] for row in order]
    middle = NUM_TRAIN + -(-LAST // 2)
    return {"train": rows[:NUM_TRAIN], "test": rows[NUM_TRAIN:middle], "val": rows[middle:]}


def ids_of(split, **start):
    return [batch.ids[: batch.num_valid].tolist() for batch in split.batches(**start)]


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
def test_bytes_are_upstreams(processed, randomize):
    lines = []
    data = open_it(processed, lines=lines, data_randomize=randomize)
    wanted = wanted_rows(randomize)
    for split, rows in rows_of_files(processed.parent).items():
        assert rows.tolist() == wanted[split]
    assert [row for batch in ids_of(data.train) for row in batch] == [row[14:] for row in wanted["train"]]
    assert [row for batch in ids_of(data.test) for row in batch] == [row[14:] for row in wanted["test"]]
    assert {batch.size for batch in data.train.batches()} == {16} and data.train.num_rows == NUM_TRAIN
    with np.load(processed.with_name("day_fea_count.npz")) as counts:
        assert counts["counts"].tolist() == list(data.table_rows) == WANTED["counts"]
    stem = processed.with_name("terabyte_processed")
    told = [f"data file: {stem}_train.bin number of batches: {-(-NUM_TRAIN // 16)}", f"data file: {stem}_test.bin number of batches: 3"]
    assert lines[-2:] == told and lines[-3] == "Sparse features= 26, Dense features= 13"
    processed.unlink()  # the files are enough
    lines.clear()
    assert ids_of(open_it(processed, lines=lines, data_randomize=randomize).train) == ids_of(data.train) and lines == told


def test_a_large_set_is_written_in_pieces(processed, monkeypatch):
    monkeypatch.setattr(mlperf_bin, "_CHUNK", 7)
    open_it(processed)
    assert {split: rows.tolist() for split, rows in rows_of_files(processed.parent).items()} == wanted_rows()


def test_ids_are_folded_as_upstream_does(processed):
    open_it(processed)
    mlperf_bin.sidecar_file(processed.with_name("terabyte_processed")).unlink()  # as if upstream had made the files
    data = open_it(processed, max_ind_range=7)
    assert data.table_rows == tuple(min(count, 7) for count in WANTED["counts"])
    assert [row for batch in ids_of(data.train) for row in batch] == [[i % 7 for i in row[14:]] for row in wanted_rows()["train"]]


@pytest.mark.parametrize("drop_last, num_batches, expected", [(False, 0, -(-NUM_TRAIN // 16)), (True, 0, NUM_TRAIN // 16), (False, 5, 5)])
def test_shuffled_batches(processed, drop_last, num_batches, expected):
    in_order = ids_of(open_it(processed, drop_last=drop_last).train)
    flags = {"bin_shuffle": True, "drop_last": drop_last, "num_batches": num_batches}
    train = open_it(processed, **flags).train
    epochs = [ids_of(train, epoch=epoch) for epoch in range(3)]
    for epoch, batches in enumerate(epochs):
        assert len(batches) == train.num_batches == expected
        assert all(batch in in_order for batch in batches) and len({str(batch) for batch in batches}) == expected
        assert ids_of(open_it(processed, **flags).train, epoch=epoch, start=2) == batches[2:]  # a run that goes on
    assert len({str(batches) for batches in [in_order, *epochs]}) == 4
    assert ids_of(open_it(processed, **flags, seed=7).train) != epochs[0]


@pytest.mark.parametrize("shuffle", [True, False])
def test_compatible_order_is_that_of_torchs_loader(processed, shuffle):
    """Three epochs with a pass over the test half after each: the same orders, and the same state of torch's stream."""
    order = open_it(processed, bin_shuffle=shuffle, upstream_compat=True)
    numbers, num_test = list(range(order.train.num_batches)), order.test.num_batches
    torch.manual_seed(5)
    train = DataLoader(numbers, batch_size=None, sampler=RandomSampler(numbers) if shuffle else None)
    test = DataLoader(list(range(num_test)), batch_size=None)
    wanted = [(list(train), list(test))[0] for _ in range(3)]
    state = torch.get_rng_state()
    in_order = ids_of(open_it(processed).train)
    torch.manual_seed(5)
    found = []
    for epoch in range(3):
        found.append([in_order.index(batch) for batch in ids_of(order.train, epoch=epoch)])
        ids_of(order.test)
    assert found == wanted and torch.equal(torch.get_rng_state(), state)


def test_other_flags_are_refused(processed):
    open_it(processed)
    sidecar = processed.with_name("terabyte_processed_bins.json")
    assert refusal(processed, max_ind_range=20).startswith(f"{sidecar}: the files were made with --max-ind-range=0, but 20 is asked for; delete")
    assert "--data-randomize=total, but day is asked for" in refusal(processed, data_randomize="day")
    assert "--data-sub-sample-rate=0.0, but 0.5" in refusal(processed, sub_sample_rate=0.5)
    sidecar.write_text("{")
    assert f"{sidecar}: damaged" in refusal(processed)


def files_of_days(folder, seed=0) -> Path:
    """DIR/day of 24 raw files."""
    folder.mkdir(exist_ok=True)
    oracle.write_days(folder / "day", oracle.make_days(SIZES, seed))
    return folder / "day"


def test_bins_of_other_raw_files_are_refused(tmp_path):
    prefix = files_of_days(tmp_path / "T")
    place = prefix.with_name("day_processed")
    ids = ids_of(open_it(place).train)
    day, sidecar = prefix.with_name("day_3"), prefix.with_name("day_processed_bins.json")
    whole = day.read_bytes()
    day.write_bytes(whole[:-1] + b" ")
    assert refusal(place).startswith(f"{sidecar}: made from another raw file (day_3) than {day}, of --raw-data-file={prefix} (same size")
    day.unlink()
    assert ids_of(open_it(place).train) == ids  # what is there is what they were made from


def test_bins_of_another_vocabulary_are_refused(tmp_path):
    prefix = files_of_days(tmp_path / "T")
    place, sidecar = prefix.with_name("day_processed"), prefix.with_name("day_processed_bins.json")
    for name, seed in (("a", 5), ("b", 6)):
        flags = {"max_ind_range": -1, "sub_sample_rate": 0.0, "rng": None, "progress": False, "min_frequency": 1}
        preprocess(files_of_days(tmp_path / name, seed), tmp_path / name / "voc", **flags, data_set="terabyte")
    without = ids_of(open_it(place).train)
    assert refusal(place, vocabulary=str(tmp_path / "a" / "voc")).startswith(f"{sidecar}: made without --vocabulary, which is asked for; delete")
    other = prefix.with_name("with_a")
    ids = ids_of(open_it(other, vocabulary=str(tmp_path / "a" / "voc")).train)
    assert ids_of(open_it(other, vocabulary=str(tmp_path / "a" / "voc")).train) == ids != without
    assert "with_a_bins.json: made with another --vocabulary" in refusal(other, vocabulary=str(tmp_path / "b" / "voc"))
    assert "with_a_bins.json: made with --vocabulary, which is not asked for" in refusal(other)


def test_bins_of_another_seeds_sample_are_refused(tmp_path):
    place = files_of_days(tmp_path / "T").with_name("day_processed")
    open_it(place, sub_sample_rate=0.5)
    open_it(place, sub_sample_rate=0.5)
    said = refusal(place, sub_sample_rate=0.5, seed=7, preprocess_rng=np.random.RandomState(7))
    assert "day_processed_bins.json: its rows were sampled with another --numpy-rand-seed" in said


def test_a_vocabulary_and_upstreams_file(processed):
    open_it(processed)
    assert "is of a file of upstream's, which knows no --vocabulary" in refusal(processed, vocabulary="x.npz")


@pytest.mark.parametrize("kind", ["ours", "upstreams"])
def test_bins_are_completed_from_one_source(tmp_path, kind):
    """One of them is missing, as after a kill; the processed set was replaced by one with the same numbers of rows and ids."""
    prefix = files_of_days(tmp_path / "T")
    if kind == "upstreams":
        place = oracle.save_upstreams(tmp_path / "T", WANTED, mappable=True)
    else:
        place = prefix.with_name("day_processed")
    open_it(place)
    val = bin_file(bin_stem(place), "val")
    whole = val.read_bytes()
    val.unlink()
    open_it(place)
    assert val.read_bytes() == whole
    val.unlink()
    if kind == "upstreams":
        oracle.save_upstreams(tmp_path / "T", WANTED | {"y": [1 - label for label in WANTED["y"]]}, mappable=True)
    else:
        day = prefix.with_name("day_23")
        day.write_bytes(bytes([day.read_bytes()[0] ^ 1]) + day.read_bytes()[1:])  # a label
        shutil.rmtree(place)
        flags = {"max_ind_range": -1, "sub_sample_rate": 0.0, "rng": None, "progress": False}
        preprocess(prefix, place, **flags, data_set="terabyte")
        for file in prefix.parent.glob("day_?"):
            file.unlink()
        day.unlink()
    said = refusal(place)
    assert f"{bin_stem(place)}_bins.json: is of other rows than those that its files are to be made from" in said and not val.exists()


def test_files_of_an_earlier_version(processed):
    """Whose sidecar does not say what they were made from."""
    ids = ids_of(open_it(processed).train)
    sidecar = processed.with_name("terabyte_processed_bins.json")
    fields = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({name: fields[name] for name in ("made_with", "counts", "rows")} | {"format": 1}))
    assert "is of format 1, this version's is 2" in refusal(processed)
    sidecar.unlink()
    assert ids_of(open_it(processed).train) == ids


@pytest.mark.parametrize("ours", [True, False])
def test_cut_files(processed, ours):
    open_it(processed)
    if not ours:
        mlperf_bin.sidecar_file(processed.with_name("terabyte_processed")).unlink()
    path = processed.with_name("terabyte_processed_train.bin")
    whole = path.read_bytes()
    for cut in (0, 1, 159, 161, len(whole) - 1):
        path.write_bytes(whole[:cut])
        said = refusal(processed)
        assert str(path) in said and f"{cut} bytes" in said and "delete" in said
    path.write_bytes(whole[:-160])
    if ours:
        assert f"not the {NUM_TRAIN} rows of 160 that were written" in refusal(processed)
    path.unlink()
    if not ours:
        assert "but not all of terabyte_processed_train.bin, terabyte_processed_test.bin" in refusal(processed)


def test_wrong_counts(processed):
    open_it(processed)
    counts_file = processed.with_name("day_fea_count.npz")
    few = np.array(WANTED["counts"]) - 30 * np.eye(1, 26, 25, dtype=int)[0]
    np.savez(counts_file, counts=few)
    assert f"{counts_file}: its counts are not those that terabyte_processed_bins.json has" in refusal(processed)
    mlperf_bin.sidecar_file(processed.with_name("terabyte_processed")).unlink()
    said = refusal(processed)
    assert re.search(rf"_(train|test)\.bin: row \d+ holds C26 \d+, at most {few[25] - 1} by {counts_file}", said)
    np.savez(counts_file, counts=few[:25])
    assert "counts is not 26 whole numbers" in refusal(processed)
    counts_file.write_bytes(b"PK")
    assert f"{counts_file}: cannot read the number of ids" in refusal(processed)


def test_where_counts_come_from(processed):
    open_it(processed)
    counts_file = processed.with_name("day_fea_count.npz")
    counts_file.unlink()
    notes = []
    assert list(open_it(processed, notes=notes).table_rows) == WANTED["counts"] and not notes
    mlperf_bin.sidecar_file(processed.with_name("terabyte_processed")).unlink()
    assert list(open_it(processed, notes=notes).table_rows) == WANTED["counts"]
    assert len(notes) == 1 and f"{counts_file}: not there" in notes[0]


def test_counts_of_other_data_in_the_way(processed):
    np.savez(processed.with_name("day_fea_count.npz"), counts=np.array(WANTED["counts"]) + 1)
    assert "holds the counts of other data" in refusal(processed)
    assert not list(processed.parent.glob("*.bin"))


def test_a_value_out_of_range(processed):
    open_it(processed)
    path = processed.with_name("terabyte_processed_train.bin")
    rows = rows_of_files(processed.parent)["train"].copy()
    for column, value in ((0, 2), (5, -1), (14, WANTED["counts"][0]), (39, -1)):
        changed = rows.copy()
        changed[37, column] = value
        path.write_bytes(changed.tobytes())
        assert re.search(rf"row 37 holds \S+ {value}, at most", refusal(processed))


KILLED = """
import os, sys
sys.path[:0] = [{root!r}]
from data_loaders import mlperf_bin
from tests import test_mlperf_bin
from pathlib import Path
whole, calls = mlperf_bin.reordered, []

def dies(source, first, end):
    calls.append(first)
    yield from whole(source, first, end) if len(calls) <= {files} else ()
    if len(calls) > {files}:
        yield next(whole(source, first, end))[:1]
        os.kill(os.getpid(), 9)

mlperf_bin.reordered = dies
test_mlperf_bin.open_it(Path({processed!r}))
"""


@pytest.mark.parametrize("files", [0, 1, 2])
def test_killed_while_writing(processed, files):
    """After so many whole files: the next run makes the rest, and the bytes are those of a run that was left alone."""
    code = KILLED.format(root=str(ROOT), files=files, processed=str(processed))
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"})
    assert done.returncode == -9, done.stderr
    there = sorted(path.name for path in processed.parent.glob("*.bin"))
    assert len(there) == files
    before = {name: (processed.with_name(name).stat().st_ino) for name in there}
    open_it(processed)
    assert {split: rows.tolist() for split, rows in rows_of_files(processed.parent).items()} == wanted_rows()
    assert {name: (processed.with_name(name).stat().st_ino) for name in there} == before
    assert not list(processed.parent.glob(".*.tmp"))


def test_a_resumed_shuffled_run_goes_on_as_if_undisturbed(cli, processed):
    """Three epochs of batches in another order each; stopped in the second."""
    flags = [
        *MODEL, "--data-set=terabyte", f"--raw-data-file={processed.with_name('day')}", f"--processed-data-file={processed}", "--memory-map",
        "--mlperf-logging", "--mlperf-bin-loader", "--mlperf-bin-shuffle", "--mini-batch-size=64", "--save-model=m.pt", "--save-every=4",
    ]  # fmt: skip
    whole = cli(*flags, "--nepochs=3")
    batches = -(-NUM_TRAIN // 64)
    assert len(whole.losses) == 3 * batches, whole.err
    assert cli(*flags, "--nepochs=1").losses == whole.losses[:batches]
    assert cli(*flags, "--nepochs=3", "--load-model=m.pt").losses == whole.losses[batches:]
    plain = cli(*[flag for flag in flags if flag != "--mlperf-bin-shuffle"], "--nepochs=1")
    assert sorted(plain.losses) != sorted(whole.losses[:batches])
