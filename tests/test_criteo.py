"""Opening Criteo and its batches, against a naive restatement and against what was recorded from upstream; files that must be refused."""

import io
import json
import os
import random
import re
import subprocess
import sys
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

from data_loaders import criteo_npz
from data_loaders.criteo import open_criteo
from data_loaders.criteo_npz import atomic_write, read_npz, write_npz
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle

TEXT = oracle.make_text(500)
# (max_ind_range, sub_sample_rate): from upstream on TEXT after seed 123, randomize total: CRC-32 of the ids of the first 64 train rows [64, 26]
# int32, of their labels, of the test half's ids; and the next np.random.randint(2**31 - 1), which shows how much was drawn
UPSTREAM = {
    (-1, 0.0): (2709471003, 3457680627, 3250928236, 2055255747),
    (20, 0.0): (3659720617, 3457680627, 4159290285, 2055255747),
    (-1, 0.4): (952287434, 3134891392, 1056023100, 511400464),
    (97, 0.4): (3123145631, 3134891392, 3271163910, 511400464),
}


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(TEXT)
    return path


def open_it(raw, processed="", *, seed=123, rng=None, lines=None, **fields):
    rng = rng or np.random.RandomState(seed)
    flags = {
        "data_set": "kaggle", "raw_data_file": str(raw), "processed_data_file": str(processed), "data_randomize": "total", "max_ind_range": -1,
        "sub_sample_rate": 0.0, "batch_size": 64, "test_batch_size": 16, "drop_last": False, "num_batches": 0, "rng": rng, "preprocess_rng": rng,
        "progress": False, "print_line": (lines if lines is not None else []).append,
    }  # fmt: skip
    return open_criteo(**(flags | fields))


def refusal(raw, processed="", **fields) -> str:
    with pytest.raises(UserError) as caught:
        open_it(raw, processed, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_like_upstream(path, text=TEXT, max_ind_range=-1, **changes):
    """What upstream writes: float64 ids, column after column, deflated, nothing about how it was made."""
    arrays = oracle.process(text, max_ind_range)
    arrays = {
        "X_cat": np.asfortranarray(arrays["X_cat"], dtype=np.float64),
        "X_int": np.array(arrays["X_int"], dtype=np.int32),
        "y": np.array(arrays["y"], dtype=np.int32),
        "counts": np.array(arrays["counts"], dtype=np.int32),
    } | changes
    np.savez_compressed(path, **{name: values for name, values in arrays.items() if values is not None})
    return path


@pytest.mark.parametrize("max_ind_range, sub_sample_rate", UPSTREAM)
def test_recorded_from_upstream(raw, max_ind_range, sub_sample_rate):
    rng = np.random.RandomState(123)
    data = open_it(raw, rng=rng, max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, test_batch_size=1000)
    first, test = next(data.train.batches()), next(data.test.batches())
    found = [zlib.crc32(values.numpy().tobytes()) for values in (first.ids, first.labels, test.ids)]
    assert (*found, rng.randint(2**31 - 1)) == UPSTREAM[max_ind_range, sub_sample_rate]


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("batch_size, test_batch_size", [(64, 16), (1, 1), (429, 36), (10_000, 10_000)])
def test_batches_equal_naive(raw, randomize, batch_size, test_batch_size):
    data = open_it(raw, data_randomize=randomize, batch_size=batch_size, test_batch_size=test_batch_size)
    wanted = oracle.process(TEXT)
    assert data.table_rows == tuple(wanted["counts"]) and data.hotness == (1,) * 26 and data.num_dense == 13
    for split, rows in zip((data.train, data.test), oracle.halves(wanted["total_per_file"], randomize, np.random.RandomState(123)), strict=True):
        batches = list(split.batches())
        assert split.num_rows == len(rows) == sum(batch.num_valid for batch in batches)
        assert split.num_batches == len(batches) and {batch.size for batch in batches} == {split.batch_size}
        assert split.batch_size == min(len(rows), batch_size if split is data.train else test_batch_size)
        ids, dense, labels = (torch.cat([getattr(b, name)[: b.num_valid] for b in batches]) for name in ("ids", "dense", "labels"))
        assert ids.dtype == torch.int32 and ids.tolist() == [wanted["X_cat"][row] for row in rows]
        assert torch.equal(labels, torch.tensor([[float(wanted["y"][row])] for row in rows]))
        counts = torch.tensor([wanted["X_int"][row] for row in rows], dtype=torch.float)
        torch.testing.assert_close(dense.double(), torch.log(counts.double() + 1), rtol=1e-6, atol=1e-7)
        for number, batch in enumerate(batches):  # bit for bit upstream's formula on the whole batch
            begin = split.batch_size * number
            batch_counts = counts[begin : begin + batch.num_valid].clone()
            assert torch.equal(batch.dense[: batch.num_valid], torch.log(batch_counts + 1))
            assert batch.weights is None and batch.ids.is_contiguous()
            assert not any(values[batch.num_valid :].any() for values in (batch.ids, batch.dense, batch.labels))


@pytest.mark.parametrize("num_batches, drop_last, expected", [(0, False, 7), (0, True, 6), (3, False, 3), (3, True, 3), (100, False, 7)])
def test_number_of_batches(raw, num_batches, drop_last, expected):
    """429 train rows are 6 batches of 64 and 45 rows; the 36 test rows are 3 of 16 and are never dropped."""
    data = open_it(raw, num_batches=num_batches, drop_last=drop_last)
    assert data.train.num_batches == len(list(data.train.batches())) == expected
    assert data.test.num_batches == len(list(data.test.batches())) == 3


def test_start_of_an_epoch(raw):
    split = open_it(raw).train
    whole, late = list(split.batches()), list(split.batches(5))
    assert len(late) == 2 and all(torch.equal(a.ids, b.ids) and torch.equal(a.dense, b.dense) for a, b in zip(whole[5:], late, strict=True))
    assert list(split.batches(7)) == []


@pytest.mark.parametrize("randomize, draws", [("total", "across days"), ("day", "per day"), ("none", None)])
def test_lines_of_upstream(raw, tmp_path, randomize, draws):
    def half(name, reading):
        lines = [reading, "Sparse fea = 26, Dense fea = 13", f"Defined {name} indices...", "Split data according to indices..."]
        if draws:
            lines.insert(2 if randomize == "day" else 3, f"Randomized indices {draws} ...")
        return lines

    from_raw, ready = f"Reading raw data={raw}", f"Reading pre-processed data={tmp_path / 'p.npz'}"
    for processed, first, second in (("", from_raw, from_raw), (tmp_path / "p.npz", from_raw, ready), (tmp_path / "p.npz", ready, ready)):
        lines = []
        open_it(raw, processed, lines=lines, data_randomize=randomize)
        assert lines == half("train", first) + half("test", second)


def test_where_the_processed_file_lies(raw, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    open_it("train.txt")  # upstream, given no folder, writes to /
    assert (tmp_path / "kaggleAdDisplayChallenge_processed.npz").exists()
    open_it("train.txt", "elsewhere.npz")
    raw.unlink()
    data = open_it("", "elsewhere.npz")  # the processed file is enough
    assert data.train.num_rows == 429 and data.bayes_auc is None
    assert "no such file" in refusal("", "absent.npz") and "no data" in refusal("")
    assert "--raw-data-file=train.txt: cannot read it: No such file" in refusal("train.txt", "absent.npz")


def test_preprocessing_draws_from_its_own_stream(raw, tmp_path):
    first = np.random.RandomState(1)
    open_it(raw, rng=first, preprocess_rng=np.random.RandomState(5), sub_sample_rate=0.5)
    second = np.random.RandomState(1)
    open_it(raw, rng=second, preprocess_rng=np.random.RandomState(5), sub_sample_rate=0.5)  # reads the file
    assert first.randint(2**31) == second.randint(2**31)


@pytest.mark.parametrize("place", ["p.npz", "folder"])
@pytest.mark.parametrize("memory_map", [False, True])
def test_rows_sampled_with_another_seed_are_refused(raw, tmp_path, place, memory_map):
    flags = {"processed": tmp_path / place, "sub_sample_rate": 0.5, "memory_map": memory_map}
    rows = open_it(raw, seed=1, **flags).train.num_rows
    assert open_it(raw, seed=1, **flags).train.num_rows == rows
    said = refusal(raw, seed=2, **flags)
    assert said.startswith(f"{tmp_path / place}: its rows were sampled with another --numpy-rand-seed; give the seed that they were made with, or ")
    assert rows != open_it(raw, seed=2, **flags | {"processed": tmp_path / f"2{place}"}).train.num_rows
    open_it(raw, tmp_path / f"all{place}", seed=1)
    open_it(raw, tmp_path / f"all{place}", seed=2)  # all rows: no number was drawn for them


def test_a_sampled_file_of_an_earlier_version_is_read(raw, tmp_path):
    """Which did not note where its numbers came from."""
    open_it(raw, tmp_path / "p.npz", seed=1, sub_sample_rate=0.5)
    with np.load(tmp_path / "p.npz") as data:
        arrays = {name: data[name] for name in data.files}
    meta = json.loads(str(arrays["meta"]))
    assert len(meta.pop("draws")) == 64
    np.savez(tmp_path / "p.npz", **arrays | {"meta": np.array(json.dumps(meta))})
    open_it(raw, tmp_path / "p.npz", seed=2, sub_sample_rate=0.5)


def test_a_file_larger_than_memory_is_not_called_damaged(raw, tmp_path):
    """Both in memory that the process is not allowed, and where the header of a damaged file asks for more rows than it has bytes."""
    rows = 2_000_000
    shapes = {"X_cat": (rows, 26), "X_int": (rows, 13), "y": (rows,)}
    arrays = {name: (shape, (np.zeros((rows // 20, *shape[1:]), np.int32) for _ in range(20))) for name, shape in shapes.items()}
    with open(tmp_path / "p.npz", "wb") as file:
        write_npz(file, arrays | {"counts": ((26,), iter([np.ones(26, np.int32)]))})
    code = (
        "import resource, sys; from pathlib import Path; from data_loaders.criteo_npz import read_npz\n"
        "held = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (held + 200_000_000,) * 2)\n"
        "read_npz(Path(sys.argv[1]))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.npz")], cwd=ROOT, capture_output=True, text=True)
    assert re.search(r"UserError: \S+/p.npz: does not fit into memory \(.* 305. MiB .*\); add --memory-map$", done.stderr.strip()), done.stderr
    with open(tmp_path / "q.npz", "wb") as file:
        write_npz(file, {"y": ((10**12,), iter([np.zeros(9, np.int32)]))} | {
            name: ((9, width), iter([np.zeros((9, width), np.int32)])) for name, width in (("X_cat", 26), ("X_int", 13))
        } | {"counts": ((26,), iter([np.ones(26, np.int32)]))})  # fmt: skip
    assert "damaged, or not a processed Criteo file (y is shorter than its header says)" in refusal(raw, tmp_path / "q.npz")


def test_two_writers_with_one_process_number(tmp_path, monkeypatch):
    """As in two containers that share a disk: each file is one writer's, the last one's stays."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    path = tmp_path / "x.bin"
    with atomic_write(path, "") as first:
        first.write(b"A" * 1000)
        with atomic_write(path, "") as second:
            second.write(b"B" * 500)
        assert path.read_bytes() == b"B" * 500
        first.write(b"A" * 1000)
    assert path.read_bytes() == b"A" * 2000
    with pytest.raises(KeyError), atomic_write(path, "") as file:
        file.write(b"C")
        raise KeyError
    assert path.read_bytes() == b"A" * 2000 and list(tmp_path.iterdir()) == [path]
    (tmp_path / ".x.bin.7.tmp").write_bytes(b"left by a killed run")
    with atomic_write(path, "") as file:
        assert sorted(tmp_path.iterdir()) == sorted([path, Path(file.name)])


def test_a_file_taken_for_stale_is_begun_again(tmp_path, monkeypatch):
    """Another run cleans up between the opening of a file and its lock."""
    locks, lock = [], criteo_npz.fcntl.flock

    def flock(file, how):
        if not locks:
            Path(file.name).unlink()
        locks.append(how)
        return lock(file, how)

    monkeypatch.setattr(criteo_npz.fcntl, "flock", flock)
    with atomic_write(tmp_path / "x", "") as file:
        file.write(b"whole")
    assert len(locks) == 2 and (tmp_path / "x").read_bytes() == b"whole" and len(list(tmp_path.iterdir())) == 1


def test_refused_flags(raw):
    assert "--data-randomize=days is unknown; choose one of total, day, none" in refusal(raw, data_randomize="days")
    assert "--data-set=table is not Criteo's; choose one of kaggle, terabyte" in refusal(raw, data_set="table")
    assert "--mlperf-bin-loader with --data-set=kaggle: reads binary files of the Terabyte set" in refusal(raw, bin_loader=True)
    assert "--data-sub-sample-rate=1.5" in refusal(raw, sub_sample_rate=1.5)


def test_refused_processed_file(raw, tmp_path):
    processed = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    open_it(raw)
    way_out = "delete it or choose another --processed-data-file"
    assert refusal(raw, max_ind_range=20) == f"{processed}: made with --max-ind-range=-1, but 20 is asked for; {way_out}"
    assert refusal(raw, sub_sample_rate=0.1) == f"{processed}: made with --data-sub-sample-rate=0.0, but 0.1 is asked for; {way_out}"
    assert "made with --max-ind-range" in refusal(raw, max_ind_range=20, upstream_compat=True)
    open_it(raw, max_ind_range=0)  # 0 is no limit either
    moved = raw.rename(tmp_path / "moved.txt")
    open_it(moved)
    moved.write_bytes(TEXT[:-1] + b" ")
    assert "same size, other content" in refusal(moved)
    moved.write_bytes(TEXT + TEXT)
    assert f"made from another raw file (train.txt) than --raw-data-file={moved}" in refusal(moved)


def test_file_of_upstream(raw, tmp_path):
    """The same batches from upstream's file as from ours, with and without its file of rows per day."""
    ours = open_it(raw, tmp_path / "ours.npz")
    (tmp_path / "train_day_count.npz").unlink()
    path = write_like_upstream(tmp_path / "upstream.npz")
    for days in (None, [72, 72, 72, 71, 71, 71, 71], [80, 72, 72, 71, 71, 71, 63]):
        if days:
            np.savez(tmp_path / "train_day_count.npz", total_per_file=np.array(days))
        theirs = open_it(raw, path)
        assert (theirs.test.num_rows == ours.test.num_rows) == (days is None or days[-1] == 71)
        if theirs.test.num_rows == ours.test.num_rows:
            for split in ("train", "test"):
                for a, b in zip(getattr(ours, split).batches(), getattr(theirs, split).batches(), strict=True):
                    assert torch.equal(a.ids, b.ids) and torch.equal(a.dense, b.dense) and torch.equal(a.labels, b.labels)
    np.savez(tmp_path / "train_day_count.npz", total_per_file=np.array([1] * 7))
    assert "is not the rows of 7 days, 500 in all" in refusal(raw, path)
    (tmp_path / "train_day_count.npz").write_bytes(b"PK\x03\x04 not really")
    assert "cannot read upstream's rows per day" in refusal(raw, path)


def test_file_of_upstream_made_without_max_ind_range(raw, tmp_path):
    path = write_like_upstream(tmp_path / "upstream.npz")
    assert "was not made with --max-ind-range=7" in refusal(raw, path, max_ind_range=7)
    data = open_it(raw, path, max_ind_range=7, upstream_compat=True)
    wanted = oracle.process(TEXT)
    assert data.table_rows == tuple(min(count, 7) for count in wanted["counts"])
    ids = torch.cat([batch.ids[: batch.num_valid] for batch in data.test.batches()])
    assert ids.dtype == torch.int32 and ids.tolist() == [[i % 7 for i in row] for row in wanted["X_cat"][429:465]]
    write_like_upstream(path, max_ind_range=7)
    open_it(raw, path, max_ind_range=7)


def changed(name, **at):
    """An upstream array with one value changed."""
    values = np.array(oracle.process(TEXT)[name], dtype=np.float64 if name == "X_cat" else np.int32)
    values[at["index"]] = at["value"]
    return values


DAMAGED = {
    "id out of range": ({"X_cat": changed("X_cat", index=(499, 0), value=3)}, "X_cat holds a value that is not a whole number from 0 to its"),
    "negative id": ({"X_cat": changed("X_cat", index=(0, 25), value=-1)}, "X_cat holds"),
    "half an id": ({"X_cat": changed("X_cat", index=(7, 3), value=0.5)}, "X_cat holds"),
    "id not a number": ({"X_cat": changed("X_cat", index=(7, 3), value=np.nan)}, "X_cat holds"),
    "label 2": ({"y": changed("y", index=3, value=2)}, "y holds a value that is not a whole number 0 or 1"),
    "negative count": ({"X_int": changed("X_int", index=(3, 4), value=-1)}, "X_int holds"),
    "fewer labels": ({"y": np.zeros(499, np.int32)}, "X_int is int32 [500, 13], not whole numbers [499, 13]"),
    "wrong shape": ({"X_int": np.zeros((500, 12), np.int32)}, "X_int is int32 [500, 12]"),
    "text for numbers": ({"y": np.array(["0"] * 500)}, "y is <U1 [500]"),
    "25 counts": ({"counts": np.ones(25, np.int32)}, "counts is not 26 whole numbers"),
    "no rows": ({"y": np.zeros(0, np.int32)}, "y has shape (0,)"),
    "no ids": ({"X_cat": None}, "no array 'X_cat'"),
    "objects": ({"y": np.array([0] * 500, dtype=object)}, "y is object [500]"),
    "meta not JSON": ({"meta": np.array("hello")}, "damaged, or not a processed Criteo file"),
    "meta of another format": ({"meta": np.array('{"format": 99}')}, "format 99, while this version reads format 1"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_wrong_arrays(raw, tmp_path, case):
    changes, words = DAMAGED[case]
    path = write_like_upstream(tmp_path / "p.npz", **changes)
    said = refusal(raw, path)
    assert str(path) in said and words in said and "delete p.npz to have it made again" in said


def test_too_few_rows(tmp_path):
    for rows in (1, 6):
        (tmp_path / f"{rows}.txt").write_bytes(oracle.make_text(rows))
        assert f"{rows} rows are too few" in refusal(tmp_path / f"{rows}.txt", tmp_path / f"{rows}.npz")
    (tmp_path / "7.txt").write_bytes(oracle.make_text(7))
    data = open_it(tmp_path / "7.txt", tmp_path / "7.npz")
    assert (data.train.num_rows, data.test.num_rows) == (6, 1)


@pytest.mark.parametrize("kind", ["ours", "upstream"])
def test_damaged_npz(raw, tmp_path, kind):
    """Cut off anywhere, or with bytes changed: refused in one line, or (an unused byte) the same arrays."""
    path = tmp_path / "p.npz"
    if kind == "ours":
        open_it(raw, path)
    else:
        write_like_upstream(path)
    whole, wanted = path.read_bytes(), read_npz(path)
    rng = random.Random(0)
    for number in range(120):
        damaged = bytearray(whole)
        # every other time near the start or the end, where the headers and the directory are
        at = rng.randrange(len(whole)) if number % 2 else rng.choice([rng.randrange(400), len(whole) - 1 - rng.randrange(1200)])
        if number % 4 == 0:
            del damaged[at:]
        else:
            damaged[at] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # zipfile and NumPy warn of some damage
                found = read_npz(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            np.testing.assert_array_equal(found.packed, wanted.packed)
    for content in (b"", b"PK", b"hello\n", TEXT):
        path.write_bytes(content)
        assert "damaged, or not a processed Criteo file" in refusal(raw, path)
    assert "a folder without manifest.json, so not a processed set" in refusal(raw, tmp_path)


def test_no_pickle_is_loaded(raw, tmp_path):
    """An array of Python objects as counts or meta is refused, not unpickled."""

    class Bomb:
        def __reduce__(self):
            return (exit, (7,))

    path = write_like_upstream(tmp_path / "p.npz", counts=np.array([Bomb()], dtype=object))
    assert "damaged, or not a processed" in refusal(raw, path)


def test_our_file_is_readable_by_name(raw, tmp_path):
    """np.load gives upstream's names, shapes and types, and a meta that says what the file is."""
    open_it(raw, tmp_path / "p.npz", max_ind_range=50)
    with zipfile.ZipFile(tmp_path / "p.npz") as archive:
        assert archive.testzip() is None
    with np.load(io.BytesIO((tmp_path / "p.npz").read_bytes())) as data:
        assert {"X_cat", "X_int", "counts", "meta", "total_per_file", "y"} <= set(data.files)
        meta = json.loads(str(data["meta"]))
    assert meta["raw"]["name"] == "train.txt" and meta["raw"]["size"] == len(TEXT) and meta["max_ind_range"] == 50


def test_bayes_auc(raw, tmp_path):
    sidecar = tmp_path / "train.txt.bayes.json"
    sidecar.write_text(json.dumps({"bayes_auc_test": 0.8, "raw_bytes": len(TEXT)}))
    assert open_it(raw).bayes_auc == 0.8
    assert open_it(raw, tmp_path / "s.npz", sub_sample_rate=0.5).bayes_auc is None
    sidecar.write_text(json.dumps({"bayes_auc_test": 0.8, "raw_bytes": 3}))  # of a file that was here before
    assert open_it(raw).bayes_auc is None
    sidecar.write_text("{")
    assert f"{sidecar}: damaged" in refusal(raw)
