"""Multi-hot Criteo: the reference's bags, number for number, in memory and from a file; what happens to that file; refused flags."""

import os
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from data_loaders import multi_hot
from data_loaders.criteo import CriteoSplit
from data_loaders.multi_hot import MultiHotSplit, MultiHotTables
from dlrm_xla.batch import Batch
from dlrm_xla.rules import MLPERF_MULTI_HOT
from dlrm_xla.specs import UserError

ROWS = (1000, 7, 1, 40, 300_000, 2)
SIZES = (3, 1, 2, 100, 8, 5)


def reference_tables(rows, sizes, distribution):
    """The whole tables as MLPerf's reference makes them, in its order of draws: [N, size] with the id itself first."""
    rng = np.random.RandomState(0)
    tables = []
    for n, size in zip(rows, sizes, strict=True):
        if distribution == "uniform":
            more = rng.randint(0, n, size=(n, size - 1))
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # numbers beyond int32: on x86 they become the lowest one
                values = rng.pareto(a=0.25, size=(n, size - 1))
            wrapped = np.where(values < 2**31, np.floor(np.minimum(values, 2**31)), -(2**31)).astype(np.int64)
            more = wrapped % n
        tables.append(np.concatenate([np.arange(n)[:, None], more], axis=1))
    return tables


def some_ids(n=500, seed=3):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(0, rows, n) for rows in ROWS], axis=1).astype(np.int32)


def make(folder, distribution="uniform", limit=1 << 40, sizes=SIZES, rows=ROWS, **more):
    return MultiHotTables.make(sizes, rows, distribution, folder, limit, progress=False, **more)


@pytest.mark.parametrize("distribution", multi_hot.DISTRIBUTIONS)
@pytest.mark.parametrize("limit", [1 << 40, 0])
@pytest.mark.parametrize("piece", [1 << 22, 1000, 7])
def test_bags_of_the_reference(tmp_path, monkeypatch, distribution, limit, piece):
    """In memory and mapped, whatever the size of the pieces that are drawn."""
    rows, sizes = (ROWS, SIZES) if piece > 7 else (ROWS[:4], SIZES[:4])
    monkeypatch.setattr(multi_hot, "_PIECE", piece)
    tables = make(tmp_path, distribution, limit, sizes, rows)
    assert tables.hotness == sizes
    ids = some_ids()[:, : len(rows)]
    expected = np.concatenate([table[ids[:, t]] for t, table in enumerate(reference_tables(rows, sizes, distribution))], axis=1)
    found = tables.bags(ids)
    assert found.dtype == np.int32 and np.array_equal(found, expected)
    assert sorted(path.suffix for path in tmp_path.iterdir()) == ([] if limit else [".bin", ".json"])


def test_numbers_that_the_reference_printed(tmp_path):
    """Recorded from the reference's class itself (torchrec_dlrm/multi_hot.py): tables of 1,000, 7 and 5,000 rows with bags of 4, 3 and 5."""
    recorded = {
        "uniform": [
            [0, 684, 559, 629, 0, 5, 0, 0, 568, 58, 3089, 391],
            [999, 107, 149, 590, 6, 5, 0, 4999, 2473, 4319, 3083, 356],
            [123, 146, 273, 221, 3, 2, 3, 777, 2213, 1674, 4928, 515],
        ],
        "pareto": [
            [0, 23, 150, 39, 0, 0, 3, 0, 3, 0, 15, 4596],
            [999, 3, 826, 118, 6, 3, 1, 4999, 425, 0, 4143, 0],
            [123, 107, 121, 3, 3, 3, 0, 777, 1, 50, 2469, 417],
        ],
    }
    for distribution, expected in recorded.items():
        tables = make(tmp_path, distribution, sizes=(4, 3, 5), rows=(1000, 7, 5000))
        found = tables.bags(np.array([[0, 0, 0], [999, 6, 4999], [123, 3, 777]], dtype=np.int32))
        assert found.tolist() == expected


def test_min_table_size(tmp_path):
    """Small tables keep single ids, and draw nothing."""
    tables = make(tmp_path, min_table_size=40)
    assert tables.hotness == (3, 1, 1, 100, 8, 1)
    ids = some_ids()
    expected = reference_tables(ROWS, tables.hotness, "uniform")
    assert np.array_equal(tables.bags(ids), np.concatenate([table[ids[:, t]] for t, table in enumerate(expected)], axis=1))


def test_pareto_is_skewed(tmp_path):
    bags = {name: make(tmp_path, name).bags(some_ids())[:, -13:-5] for name in multi_hot.DISTRIBUTIONS}  # the table of 300,000
    shares = {name: (found[:, 1:] < 10).mean() for name, found in bags.items()}
    assert shares["pareto"] > 0.3 and shares["uniform"] < 0.01


# ---- the split --------------------------------------------------------------------------------------------------------------------


def packed_rows(n=50):
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 9, (n, 40)).astype(np.int32)
    packed[:, 0] %= 2
    return torch.from_numpy(packed)


def test_split(tmp_path):
    """Batches keep their dense columns, labels and sizes; padded rows are zero; an epoch can start anywhere."""
    inner = CriteoSplit(packed_rows(), None, num_rows=50, batch_size=16)
    tables = make(tmp_path, sizes=MLPERF_MULTI_HOT, rows=(9,) * 26)
    split = MultiHotSplit(inner, tables)
    assert (split.num_rows, split.num_batches, split.batch_size) == (50, 4, 16)
    expected = reference_tables((9,) * 26, MLPERF_MULTI_HOT, "uniform")
    batches = list(split.batches())
    for got, plain in zip(batches, inner.batches(), strict=True):
        assert got.ids.shape == (16, 214) and got.ids.dtype == torch.int32 and got.weights is None and got.num_valid == plain.num_valid
        assert torch.equal(got.dense, plain.dense) and torch.equal(got.labels, plain.labels)
        n = got.num_valid
        bags = [table[plain.ids[:n, t].numpy()] for t, table in enumerate(expected)]
        assert np.array_equal(got.ids[:n].numpy(), np.concatenate(bags, axis=1)) and not got.ids[n:].any()
    assert batches[-1].num_valid == 2
    (last,) = split.batches(3)
    assert torch.equal(last.ids, batches[3].ids) and torch.equal(split.batch(1).ids, batches[1].ids)


def test_split_of_bags_is_refused(tmp_path):
    @dataclass
    class Bags:
        num_rows = num_batches = batch_size = 1

        def batches(self, start=0, epoch=0):
            yield Batch(torch.zeros(1, 1), torch.zeros(1, 6, dtype=torch.int32), torch.ones(1, 6), torch.zeros(1, 1), 1)

    with pytest.raises(ValueError, match="one id for each table"):
        next(MultiHotSplit(Bags(), make(tmp_path)).batches())


# ---- the file ---------------------------------------------------------------------------------------------------------------------


def file_of(folder):
    (path,) = folder.glob("*.bin")
    return path


def test_file_is_used_again(tmp_path, monkeypatch):
    """Without drawing, and without reading it through while it is the one that was written; one that was copied is read through once."""
    expected = make(tmp_path, limit=0).bags(some_ids())
    sums = []
    whole_sum = multi_hot.zlib.crc32
    monkeypatch.setattr(multi_hot.zlib, "crc32", lambda *args: sums.append(1) or whole_sum(*args))
    monkeypatch.setattr(multi_hot, "draw", None)
    for touched, some in ((False, False), (True, True), (False, False)):
        if touched:
            os.utime(file_of(tmp_path), (1, 1))
        sums.clear()
        assert np.array_equal(make(tmp_path, limit=0).bags(some_ids()), expected)
        assert bool(sums) == some


@pytest.mark.parametrize("damage", ["cut", "flipped", "note gone", "note damaged", "note of another key"])
def test_damaged_file_is_made_again(tmp_path, damage):
    expected = make(tmp_path, limit=0).bags(some_ids())
    path = file_of(tmp_path)
    good, note = path.read_bytes(), path.with_suffix(".json")
    if damage == "cut":
        path.write_bytes(good[:-4])
    elif damage == "flipped":
        path.write_bytes(good[:5000] + bytes([good[5000] ^ 1]) + good[5001:])
    elif damage == "note gone":
        note.unlink()
    elif damage == "note damaged":
        note.write_text("{")
    else:
        note.write_text(note.read_text().replace("uniform", "pareto"))
    assert np.array_equal(make(tmp_path, limit=0).bags(some_ids()), expected)
    assert path.read_bytes() == good and len(list(tmp_path.iterdir())) == 2


def test_flags_have_files_of_their_own(tmp_path):
    for distribution in multi_hot.DISTRIBUTIONS:
        for rows in (ROWS, (*ROWS[:-1], 3)):
            make(tmp_path, distribution, 0, rows=rows)
    assert len(list(tmp_path.glob("*.bin"))) == 4


def test_interrupted_writing_leaves_nothing(tmp_path, monkeypatch):
    def fail(shapes, distribution):
        yield 0, np.zeros(10, dtype=np.int32)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(multi_hot, "draw", fail)
    with pytest.raises(UserError, match="No space left on device; the tables of --multi-hot-sizes take 8.42 MB there; make room"):
        make(tmp_path, limit=0)
    assert list(tmp_path.iterdir()) == []


def test_a_changed_mapped_file_is_noticed(tmp_path):
    tables = make(tmp_path, limit=0)
    with open(file_of(tmp_path), "r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(UserError, match="out of range: it has changed; delete"):
        tables.bags(np.zeros((1, 6), dtype=np.int32))


@pytest.mark.parametrize(
    "sizes, distribution, words",
    [
        ((3, 2), "uniform", "--multi-hot-sizes=3,2: 2 sizes for 6 tables; give one for each"),
        ((3, 2, 1, 0, 1, 1), "uniform", "--multi-hot-sizes=3,2,1,0,1,1: 0 is not a size; a bag holds at least 1 id"),
        (SIZES, "normal", "--multi-hot-distribution=normal is unknown; choose one of uniform, pareto"),
    ],
)
def test_refused(tmp_path, sizes, distribution, words):
    with pytest.raises(UserError) as error:
        make(tmp_path, distribution, sizes=sizes)
    assert str(error.value).startswith(words)
