"""--memory-map: the order of the rows against upstream's shuffle restated naively, the batches against the arrays, the memory that is used."""

import os
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, ROOT, SMALL

from data_loaders import criteo_npz, reorder
from data_loaders.criteo import open_criteo
from data_loaders.criteo_map import map_npz
from data_loaders.criteo_npz import write_npz
from data_loaders.preprocess import preprocess
from data_loaders.reorder import OrderKey, draw_order, order_file, stored_order
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle
from tests.oracles.reorder import reordered

TEXT = oracle.make_text(500)
MODEL = [flag for flag in CRITEO_MODEL if not flag.startswith("--mini-batch-size")]


@pytest.fixture
def raw(tmp_path):
    path = tmp_path / "train.txt"
    path.write_bytes(TEXT)
    return path


def open_it(raw, processed="", *, rng=None, lines=None, **fields):
    flags = {
        "data_set": "kaggle", "raw_data_file": str(raw), "processed_data_file": str(processed), "data_randomize": "total", "max_ind_range": -1,
        "sub_sample_rate": 0.0, "batch_size": 64, "test_batch_size": 16, "drop_last": False, "num_batches": 0, "seed": 123,
        "rng": rng or np.random.RandomState(0), "preprocess_rng": np.random.RandomState(123), "progress": False,
        "print_line": (lines if lines is not None else []).append, "memory_map": True,
    }  # fmt: skip
    return open_criteo(**(flags | fields))


def open_like_upstream(raw, **fields):
    """The data, and the next draw of the run's stream, which shows how much was drawn."""
    rng = np.random.RandomState(123)
    data = open_it(raw, rng=rng, preprocess_rng=rng, upstream_compat=True, **fields)
    return data, rng.randint(2**31)


def rows_of(split) -> list[list[int]]:
    """[label, 26 ids] of every row in the order of the batches."""
    return [
        [int(label), *ids]
        for batch in split.batches()
        for label, ids in zip(batch.labels[: batch.num_valid, 0].tolist(), batch.ids[: batch.num_valid].tolist(), strict=True)
    ]


def rows_wanted(order, wanted) -> list[list[int]]:
    return [[wanted["y"][row], *wanted["X_cat"][row]] for row in order]


def upstreams_stream(sub_sample_rate) -> np.random.RandomState:
    """The stream of seed 123 after the sub-sampling of TEXT."""
    rng = np.random.RandomState(123)
    rng.uniform(size=500 if sub_sample_rate else 0)
    return rng


SIZES = [[9] * 24, [40, 3, 1, 90, 2, 60, 5, 0, 33, 1, 11, 7],
    [72, 72, 72, 71, 71, 71, 71], [300, 1, 40, 0, 200, 7, 30], [5, 5, 5, 5, 5, 300, 1], [0, 0, 90, 0, 0, 0, 3], [1] * 7]


@pytest.mark.parametrize("randomize", ["total", "day"])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("chunk", [1 << 20, 7])  # rows at a time
def test_order_and_draws_equal_naive(tmp_path, monkeypatch, sizes, randomize, chunk):
    monkeypatch.setattr(reorder, "_CHUNK", chunk)
    for seed in range(5):
        rng, naive = np.random.RandomState(seed), np.random.RandomState(seed)
        days = list(draw_order(tuple(sizes), randomize, rng, tmp_path))
        assert [len(day) for day in days] == sizes[:-1]
        wanted = reordered(sizes, randomize, naive)
        assert np.concatenate(days).tolist() == wanted[: sum(sizes[:-1])]
        assert rng.randint(2**31) == naive.randint(2**31)
        assert sorted(wanted) == list(range(sum(sizes)))


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("sub_sample_rate, max_ind_range", [(0.0, -1), (0.4, 20)])
@pytest.mark.parametrize("batch_size, test_batch_size", [(64, 16), (1, 1), (10_000, 10_000)])
def test_batches_equal_naive(raw, randomize, sub_sample_rate, max_ind_range, batch_size, test_batch_size):
    sizes = {"batch_size": batch_size, "test_batch_size": test_batch_size}
    flags = {"data_randomize": randomize, "sub_sample_rate": sub_sample_rate, "max_ind_range": max_ind_range, **sizes}
    wanted = oracle.process(TEXT, max_ind_range, sub_sample_rate, seed=123)
    days = wanted["total_per_file"]
    order = reordered(days, randomize, upstreams_stream(sub_sample_rate))
    for _ in range(2):  # from the raw file, then from what the first time left
        data = open_it(raw, **flags)
        assert data.table_rows == tuple(wanted["counts"])
        assert rows_of(data.train) == rows_wanted(order[: sum(days[:-1])], wanted)
        assert rows_of(data.test) == rows_wanted(order[sum(days[:-1]) :][: -(-days[-1] // 2)], wanted)
    kept = open_it(raw, **flags, memory_map=False)
    for split in ("train", "test") if randomize == "none" else ("test",):  # bit for bit what is read into memory
        for mapped, in_memory in zip(getattr(data, split).batches(), getattr(kept, split).batches(), strict=True):
            assert all(torch.equal(getattr(mapped, name), getattr(in_memory, name)) for name in ("dense", "ids", "labels"))
    assert order_file(raw.parent / "kaggleAdDisplayChallenge_processed.npz").exists() == (randomize != "none")


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("sub_sample_rate", [0.0, 0.4])
def test_compatible_first_run_draws_from_the_runs_stream(raw, randomize, sub_sample_rate):
    flags = {"data_randomize": randomize, "sub_sample_rate": sub_sample_rate}
    naive = upstreams_stream(sub_sample_rate)
    wanted = oracle.process(TEXT, -1, sub_sample_rate, seed=123)
    order = reordered(wanted["total_per_file"], randomize, naive)
    first, drawn = open_like_upstream(raw, **flags)
    assert drawn == naive.randint(2**31)
    second, drawn_again = open_like_upstream(raw, **flags)
    assert drawn_again == np.random.RandomState(123).randint(2**31)
    assert rows_of(first.train) == rows_of(second.train) == rows_wanted(order[: len(rows_of(first.train))], wanted)


def test_default_never_draws_from_the_runs_stream(raw):
    for _ in range(2):
        rng = np.random.RandomState(9)
        open_it(raw, rng=rng, sub_sample_rate=0.3)
        assert rng.randint(2**31) == np.random.RandomState(9).randint(2**31)


def test_default_order_depends_on_the_flags_only(raw, tmp_path):
    """Not on what was run in the folder before: upstream reuses whatever order it finds."""

    def order(**fields):
        return rows_of(open_it(raw, tmp_path / "p.npz", sub_sample_rate=0.4, **fields).train)

    flags = {"processed": tmp_path / "p.npz", "sub_sample_rate": 0.4}
    open_it(raw, **flags, memory_map=False)
    compatible, _ = open_like_upstream(raw, **flags)  # without the sub-sampling, which the first run did, the order is another
    path = order_file(tmp_path / "p.npz")
    total = order()
    assert total != rows_of(compatible.train)
    assert total == rows_of(open_like_upstream(raw, **flags | {"processed": tmp_path / "anew.npz"})[0].train)
    left = path.stat().st_ino, path.stat().st_mtime_ns
    assert order() == total and (path.stat().st_ino, path.stat().st_mtime_ns) == left  # read, not drawn again
    assert len({str(rows) for rows in (total, order(seed=7), order(data_randomize="day"), order(data_randomize="none"))}) == 4
    assert order() == total
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole.replace(whole[200:232], bytes(32)), whole.replace(b'"total"', b'"other"')):
        path.write_bytes(damaged)
        assert order() == total
    path.unlink()
    assert order() == total


def test_a_stored_order_is_checked_to_its_end(tmp_path):
    path, key = tmp_path / "order.npz", OrderKey(1, "total", (2000,) * 7)

    def order():
        found, drawn = stored_order(path, key, None, made_now=False, sampled_rows=0)
        return found[0 : len(found)].tolist(), drawn

    wanted, drawn = order()
    assert drawn and wanted == reordered([2000] * 7, "total", np.random.RandomState(1))[:12_000]
    assert order() == (wanted, False)
    damaged = bytearray(path.read_bytes())
    damaged[30_000] ^= 1
    path.write_bytes(damaged)
    assert order() == (wanted, True)


def test_a_stored_order_is_read_to_its_end_once(tmp_path, monkeypatch):
    """Then its stamp says that it is the file that was checked."""
    path, key, whole = tmp_path / "order.npz", OrderKey(1, "total", (2000,) * 7), []
    monkeypatch.setattr(criteo_npz, "_read_to_the_end", lambda *args, check=criteo_npz._read_to_the_end: (whole.append(1), check(*args)))

    def order():
        found, drawn = stored_order(path, key, None, made_now=False, sampled_rows=0)
        return found[0 : len(found)].tolist(), drawn, len(whole)

    wanted = order()[0]
    assert (order(), order()) == ((wanted, False, 1), (wanted, False, 1))
    path.write_bytes(path.read_bytes())
    assert (order(), order()) == ((wanted, False, 2), (wanted, False, 2))
    (tmp_path / "order.npz.verified.json").write_text("damaged")
    assert order() == (wanted, False, 3)


def test_a_flipped_byte_is_noticed_though_its_value_is_possible(tmp_path):
    """The checksums of a mapped file are compared once; a stamp of another file is not trusted."""
    raw, path = tmp_path / "train.txt", tmp_path / "out.npz"
    raw.write_bytes(oracle.make_text(300))
    preprocess(raw, path, max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False)
    map_npz(path)
    assert (tmp_path / "out.npz.verified.json").exists()
    map_npz(path)
    with zipfile.ZipFile(path) as archive:
        at = archive.getinfo("y.npy").header_offset + 400
    damaged = bytearray(path.read_bytes())
    damaged[at - at % 4] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(UserError, match="damaged, or not a processed Criteo file .Bad CRC-32"):
        map_npz(path)


def test_another_run_writes_its_order_at_the_same_moment(tmp_path, monkeypatch):
    """Each has its own, whoever is the last."""
    path, keys = tmp_path / "order.npz", [OrderKey(seed, "total", (50,) * 7) for seed in (1, 2)]
    replace, others = os.replace, []

    def replaced(temporary, name):
        replace(temporary, name)
        if not others:
            others.append(None)
            others.append(stored_order(path, keys[1], None, made_now=False, sampled_rows=0)[0])

    monkeypatch.setattr(os, "replace", replaced)
    found, drawn = stored_order(path, keys[0], None, made_now=False, sampled_rows=0)
    assert drawn
    for order, seed in ((found, 1), (others[1], 2)):
        assert order[0 : len(order)].tolist() == reordered([50] * 7, "total", np.random.RandomState(seed))[:300]


def test_a_new_processed_file_gets_a_new_order(raw):
    """Upstream's first run draws both; a processed file that was deleted makes the next run a first one."""
    open_like_upstream(raw)
    (raw.parent / "kaggleAdDisplayChallenge_processed.npz").unlink()
    naive = np.random.RandomState(123)
    reordered([72, 72, 72, 71, 71, 71, 71], "total", naive)
    assert open_like_upstream(raw)[1] == naive.randint(2**31)


def test_a_run_keeps_its_order_while_another_draws(raw):
    data = open_it(raw)
    before = rows_of(data.train)
    open_it(raw, seed=7)
    assert rows_of(data.train) == before != rows_of(open_it(raw, seed=7).train)


@pytest.mark.parametrize("processed", ["", "p.npz"])
@pytest.mark.parametrize("randomize", ["total", "day", "none"])
def test_lines_of_upstream(raw, tmp_path, processed, randomize):
    processed = tmp_path / processed if processed else ""
    features = "Sparse features= 26, Dense features= 13"
    for first in (f"Reading raw data={raw}", f"Reading pre-processed data={processed}"):
        lines = []
        open_it(raw, processed, lines=lines, data_randomize=randomize)
        assert lines == [first, features, f"Reading pre-processed data={processed}", features]


def refusal(*args, **fields) -> str:
    with pytest.raises(UserError) as caught:
        open_it(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def arrays_of(text=TEXT) -> dict[str, np.ndarray]:
    return {name: np.array(oracle.process(text)[name], dtype=np.int32) for name in ("X_cat", "X_int", "y", "counts")}


UNFIT = {
    "compressed": (lambda path, a: np.savez_compressed(path, **a), "y is compressed, as upstream's files are"),
    "float64": (lambda path, a: np.savez(path, **a | {"X_cat": a["X_cat"].astype(float)}), "X_cat is <f8 [500, 26], not <i4 [500, 26]"),
    "by column": (lambda path, a: np.savez(path, **a | {"X_cat": np.asfortranarray(a["X_cat"])}), "[500, 26], column after column, not <i4"),
    "big-endian": (lambda path, a: np.savez(path, **a | {"X_int": a["X_int"].astype(">i4")}), "X_int is >i4 [500, 13], not <i4"),
    "other shape": (lambda path, a: np.savez(path, **a | {"X_int": a["X_int"][:, 1:]}), "X_int is <i4 [500, 12], not <i4 [500, 13]"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_file_that_cannot_be_mapped(raw, tmp_path, case):
    write, words = UNFIT[case]
    path = tmp_path / "p.npz"
    write(path, arrays_of())
    said = refusal(raw, path)
    assert said.startswith(f"{path}: cannot be memory-mapped: ") and words in said
    assert said.endswith("; delete p.npz to have it made again, or name another --processed-data-file, or leave --memory-map out")


def test_an_uncompressed_file_of_another_maker(raw, tmp_path):
    """Its arrays lie anywhere, so the numbers need not lie at multiples of four."""
    np.savez(tmp_path / "p.npz", **arrays_of())
    open_it(raw, tmp_path / "q.npz")
    ours, theirs = open_it(raw, tmp_path / "q.npz"), open_it(raw, tmp_path / "p.npz")
    assert rows_of(ours.train) == rows_of(theirs.train) and rows_of(ours.test) == rows_of(theirs.test)


@pytest.mark.parametrize("name, at, value", [("X_cat", (3, 0), 3), ("X_cat", (3, 25), -1), ("X_int", (3, 4), -1), ("y", 3, 2), ("y", 3, -1)])
def test_a_value_out_of_range_is_refused_when_it_is_read(cli, raw, tmp_path, name, at, value):
    arrays = arrays_of()
    arrays[name][at] = value
    np.savez(tmp_path / "p.npz", **arrays)
    outcome = cli(*MODEL, "--mini-batch-size=64", "--memory-map", f"--processed-data-file={tmp_path / 'p.npz'}")
    assert "p.npz: holds a label, a count or an id that is out of range (" in outcome.error
    column = "label" if name == "y" else f"{'C' if name == 'X_cat' else 'I'}{at[1] + 1}"
    assert f"({column} {value}, at most " in outcome.error and "; delete p.npz to have it made again" in outcome.error


def test_damaged_file(raw, tmp_path):
    """Cut off anywhere, or with bytes changed: refused in one line, or rows with values that the tables have."""
    path = tmp_path / "p.npz"
    counts = open_it(raw, path).table_rows
    whole, chance = path.read_bytes(), random.Random(0)
    for number in range(120):
        damaged = bytearray(whole)
        at = chance.randrange(len(whole)) if number % 2 else chance.choice([chance.randrange(400), len(whole) - 1 - chance.randrange(1200)])
        if number % 4 == 0:
            del damaged[at:]
        else:
            damaged[at] ^= 1 << chance.randrange(8)
        path.unlink()  # a mapped file is replaced, never written over
        path.write_bytes(damaged)
        try:
            data = map_npz(path)
            rows = data.packed[0 : len(data.packed)]
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert rows.shape == (500, 40) and rows.min() >= 0 and (rows[:, 14:].numpy() < data.counts).all()
            assert (data.counts == counts).all()


def test_an_order_that_cannot_be_written(raw, tmp_path):
    open_it(raw)
    order = order_file(tmp_path / "kaggleAdDisplayChallenge_processed.npz")
    order.unlink()
    order.mkdir()
    assert refusal(raw).startswith(f"cannot write {order}: ") and "--data-randomize=none" in refusal(raw)
    open_it(raw, data_randomize="none")


MEASURE = """
import re, sys
import numpy as np
from data_loaders.criteo import open_criteo

def anonymous():  # KiB of this process that belong to no file
    with open("/proc/self/status") as status:
        return int(re.search(r"^RssAnon:\\s+(\\d+) kB", status.read(), re.M)[1])

def epoch(memory_map, randomize, num_batches):
    before = anonymous()
    rng = np.random.RandomState(1)
    data = open_criteo(
        data_set="kaggle", raw_data_file="", processed_data_file=sys.argv[1], data_randomize=randomize, max_ind_range=-1, sub_sample_rate=0.0,
        batch_size=4096, test_batch_size=4096, drop_last=False, num_batches=num_batches, rng=rng, preprocess_rng=rng, progress=False,
        print_line=lambda line: None, memory_map=memory_map, seed=1,
    )
    rows = sum(batch.num_valid for batch in data.train.batches())
    return rows, anonymous() - before

epoch(True, "total", 2)  # draws the order
for memory_map, randomize in ((True, "total"), (True, "none"), (False, "none")):
    print(*epoch(memory_map, randomize, 0))
"""


def test_memory_does_not_grow_with_the_rows(tmp_path):
    """64 MB of rows: read into memory they are there, mapped they are not, after a whole epoch either."""
    rows = 400_000
    shapes = {"X_cat": (rows, 26), "X_int": (rows, 13), "y": (rows,)}
    arrays = {name: (shape, iter([np.ones(shape, np.int32)])) for name, shape in shapes.items()}
    with open(tmp_path / "p.npz", "wb") as file:
        write_npz(file, arrays | {"counts": ((26,), iter([np.full(26, 5, np.int32)]))})
    done = subprocess.run([sys.executable, "-c", MEASURE, str(tmp_path / "p.npz")], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (epoch, mapped), (same_epoch, in_order), (_, in_memory) = (map(int, line.split()) for line in done.stdout.splitlines())
    assert epoch == same_epoch == 342_858
    assert mapped < 8_000 and in_order < 8_000 and in_memory > 56_000, done.stdout


def test_random_data_has_no_file_to_map(cli):
    assert cli(*SMALL, "--memory-map").losses == cli(*SMALL).losses
