"""The Terabyte set against naive restatements of upstream: ids, halves, orders, batches under MLPerf; and upstream's recorded loss on it."""

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import criteo_lines

from data_loaders.criteo import open_criteo
from data_loaders.criteo_split import CriteoSplit, upstreams_last_batch
from dlrm_xla.specs import UserError
from tests.oracles import criteo as kaggle_oracle
from tests.oracles import terabyte as oracle
from tests.oracles.reorder import reordered

SIZES = [10 + 3 * (day % 4) for day in range(24)]
DAYS = oracle.make_days(SIZES)
RECORDED = json.loads((Path(__file__).parent / "recorded" / "upstream_losses.json").read_text())["terabyte_mlperf_npz_loader"]


@pytest.fixture
def prefix(tmp_path):
    """DIR/day of the day files."""
    (tmp_path / "T").mkdir()
    oracle.write_days(tmp_path / "T" / "day", DAYS)
    return tmp_path / "T" / "day"


def open_it(raw, processed="", *, rng=None, lines=None, **fields):
    flags = {
        "data_set": "terabyte", "raw_data_file": str(raw), "processed_data_file": str(processed), "data_randomize": "total", "max_ind_range": -1,
        "sub_sample_rate": 0.0, "batch_size": 16, "test_batch_size": 4, "drop_last": False, "num_batches": 0, "seed": 123,
        "rng": rng or np.random.RandomState(123), "preprocess_rng": np.random.RandomState(123), "progress": False,
        "print_line": (lines if lines is not None else []).append, "memory_bytes": 2 * 10**9,
    }  # fmt: skip
    return open_criteo(**(flags | fields))


def refusal(*args, **fields) -> str:
    with pytest.raises(UserError) as caught:
        open_it(*args, **fields)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def rows_of(split) -> list[list[int]]:
    """[label, 26 ids] of every row in the order of the batches."""
    return [
        [int(label), *ids]
        for batch in split.batches()
        for label, ids in zip(batch.labels[: batch.num_valid, 0].tolist(), batch.ids[: batch.num_valid].tolist(), strict=True)
    ]


def rows_wanted(order, wanted) -> list[list[int]]:
    return [[wanted["y"][row], *wanted["X_cat"][row]] for row in order]


def orders(days, randomize, memory_map, sampled=0):
    """Rows of both halves as upstream orders them, from a stream of seed 123."""
    rng = np.random.RandomState(123)
    if not memory_map:
        return kaggle_oracle.halves(days, randomize, rng)
    rng.uniform(size=sampled)
    order = reordered(days, randomize, rng)
    return order[: sum(days[:-1])], order[sum(days[:-1]) :][: -(-days[-1] // 2)]


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("max_ind_range, sub_sample_rate", [(-1, 0.0), (20, 0.4)])
@pytest.mark.parametrize("processed", ["", "p.npz", "elsewhere"])
def test_batches_equal_naive(prefix, tmp_path, memory_map, randomize, max_ind_range, sub_sample_rate, processed):
    wanted = oracle.process_days(DAYS, max_ind_range, sub_sample_rate, seed=123)
    train, test = orders(wanted["total_per_file"], randomize, memory_map, sum(SIZES) if sub_sample_rate else 0)
    flags = {"data_randomize": randomize, "max_ind_range": max_ind_range, "sub_sample_rate": sub_sample_rate, "memory_map": memory_map}
    for _ in range(2):  # from the raw files, then from what the first time left
        data = open_it(prefix, tmp_path / processed if processed else "", **flags)
        assert data.table_rows == tuple(wanted["counts"])
        assert rows_of(data.train) == rows_wanted(train, wanted)
        assert rows_of(data.test) == rows_wanted(test, wanted)
    place = tmp_path / processed if processed else prefix.with_name("day_processed")
    assert place.is_file() == (processed == "p.npz") and place.exists()


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("mappable", [False, True])
def test_upstreams_file(tmp_path, randomize, mappable):
    wanted = oracle.process_days(DAYS)
    path = oracle.save_upstreams(tmp_path, wanted, mappable=mappable)
    data = open_it(tmp_path / "day", path, data_randomize=randomize, memory_map=mappable)
    train, test = orders(SIZES, randomize, mappable)
    assert rows_of(data.train) == rows_wanted(train, wanted) and rows_of(data.test) == rows_wanted(test, wanted)
    dense = torch.cat([batch.dense[: batch.num_valid] for batch in data.test.batches()])
    counts = torch.tensor([wanted["X_int"][row] for row in test], dtype=torch.float)
    torch.testing.assert_close(dense, torch.log(counts + 1), rtol=1e-6, atol=1e-6)


def test_upstreams_file_that_cannot_be_used(tmp_path):
    path = oracle.save_upstreams(tmp_path, oracle.process_days(DAYS))
    assert "y is compressed, as upstream's files are" in refusal(tmp_path / "day", path, memory_map=True)
    assert "no --raw-data-file=DIR/day is given" in refusal("", path)
    assert "which knows no --min-frequency; leave --min-frequency=2 out" in refusal(tmp_path / "day", path, min_frequency=2)
    np.savez(tmp_path / "day_day_count.npz", total_per_file=np.array(SIZES[:-1]))
    assert "is not the rows of 24 days" in refusal(tmp_path / "day", path)
    (tmp_path / "day_day_count.npz").write_bytes(b"PK")
    assert "cannot read upstream's rows per day" in refusal(tmp_path / "day", path)
    (tmp_path / "day_day_count.npz").unlink()
    assert f"{tmp_path / 'day_day_count.npz'}: no such file" in refusal(tmp_path / "day", path)


@pytest.mark.parametrize("memory_map", [False, True])
@pytest.mark.parametrize("processed", ["", "p.npz"])
def test_lines_of_upstream(prefix, tmp_path, memory_map, processed):
    processed = tmp_path / processed if processed else ""
    from_raw, ready = f"Reading raw data={prefix}", f"Reading pre-processed data={processed}"
    for first in (True, False):
        lines = []
        open_it(prefix, processed, lines=lines, memory_map=memory_map)
        if memory_map:
            features = "Sparse features= 26, Dense features= 13"
            assert lines == [from_raw if first else ready, features, ready, features]
        else:
            again = ready if processed else from_raw
            assert lines == [
                line
                for half, reading in (("train", from_raw if first else again), ("test", again))
                for line in (
                    reading, "Sparse fea = 26, Dense fea = 13", f"Defined {half} indices...", "Randomized indices across days ...",
                    "Split data according to indices...",
                )
            ]  # fmt: skip


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
def test_draws_of_a_compatible_first_run(prefix, randomize):
    """Sub-sampling and the order from the run's stream; a later run draws nothing."""
    naive = np.random.RandomState(123)
    for size in SIZES:
        naive.uniform(size=size)
    wanted = oracle.process_days(DAYS, -1, 0.4, seed=123)
    order = reordered(wanted["total_per_file"], randomize, naive)
    for draw in (naive.randint(2**31), np.random.RandomState(123).randint(2**31)):
        rng = np.random.RandomState(123)
        flags = {"rng": rng, "preprocess_rng": rng, "sub_sample_rate": 0.4, "data_randomize": randomize}
        data = open_it(prefix, **flags, memory_map=True, upstream_compat=True)
        assert rng.randint(2**31) == draw
        assert rows_of(data.train) == rows_wanted(order[: data.train.num_rows], wanted)


@pytest.mark.parametrize("batch_size", [1, 7, 16, 50, 10_000])
@pytest.mark.parametrize("compat", [False, True])
def test_batches_under_mlperf(prefix, batch_size, compat):
    """Days of 10 to 19 rows: batches of 16 straddle days. Compatible: they pile up as in upstream's loader, or are refused where it fails."""
    sizes = SIZES[:-1]
    flags = {"memory_map": True, "mlperf": True, "batch_size": batch_size, "upstream_compat": compat}
    total = sum(sizes)
    wanted = [min(batch_size, total - begin) for begin in range(0, total, batch_size)]
    if compat:
        try:
            wanted = oracle.loader_batches(sizes, batch_size)
        except ValueError:
            assert "upstream's loader under --mlperf-logging fails on these days" in refusal(prefix, **flags)
            return
    train = open_it(prefix, **flags).train
    assert train.num_batches == -(-total // batch_size)
    batches = list(train.batches())
    assert [batch.num_valid for batch in batches] == wanted
    assert all(batch.size == max(train.batch_size, batch.num_valid) for batch in batches)
    assert rows_of(train) == rows_of(open_it(prefix, **flags | {"batch_size": 64, "mlperf": False}).train)
    assert [batch.num_valid for batch in train.batches(1)] == wanted[1:]


def test_upstreams_loader_restated():
    chance = np.random.default_rng(0)
    for _ in range(2000):
        sizes = chance.integers(0, chance.integers(2, 60), size=chance.integers(1, 8)).tolist()
        batch_size = int(chance.integers(1, 40))
        if sum(sizes) == 0:
            continue
        try:
            wanted = oracle.loader_batches(sizes, batch_size)
        except ValueError:
            with pytest.raises(UserError, match="make the batches smaller"):
                upstreams_last_batch(sizes, batch_size)
            continue
        assert upstreams_last_batch(sizes, batch_size) == len(wanted) - 1
        rows = torch.zeros(sum(sizes), 40, dtype=torch.int32)
        split = CriteoSplit(rows, None, num_rows=len(rows), batch_size=batch_size, last_batch=len(wanted) - 1)
        assert [batch.num_valid for batch in split.batches()] == wanted


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("kind", ["ours", "upstream"])
def test_recorded_loss_of_the_giant_batch(cli, tmp_path, device, kind):
    """Upstream's length says 22 batches of 64; one of 1,402 rows comes."""
    folder = tmp_path / "T"
    folder.mkdir()
    lines = [f"{line}\n".encode() for line in criteo_lines(703 + sum(60 + day % 3 for day in range(24)))[703:]]
    days = [b"".join(lines[sum(60 + d % 3 for d in range(day)) :][: 60 + day % 3]) for day in range(24)]
    flags = [*RECORDED["flags"].split(" (")[0].split(), "--upstream-compat", f"--raw-data-file={folder / 'day'}"]
    if kind == "ours":
        oracle.write_days(folder / "day", days)
        assert cli(*flags, device=device).code == 0  # the recorded run found its data ready
    else:
        flags.append(f"--processed-data-file={oracle.save_upstreams(folder, oracle.process_days(days, 20), mappable=True)}")
        assert cli(*flags, device=device).code == 0
    outcome = cli(*flags, device=device)
    assert outcome.code == 0, outcome.err
    assert "Finished training it 1/22 of epoch 0" in outcome.out
    (loss,) = outcome.losses
    assert abs(loss - RECORDED["losses"][0]) <= (1e-6 if device == "cpu" else 1e-5)
    without = cli(*[flag for flag in flags if flag != "--upstream-compat"], device=device)
    assert len(without.losses) == 22 and "Finished training it 22/22" in without.out


def test_other_flags_and_other_files_are_refused(prefix, tmp_path):
    place = prefix.with_name("day_processed")
    open_it(prefix)
    way_out = "delete it or choose another --processed-data-file"
    assert refusal(prefix, max_ind_range=20) == f"{place}: made with --max-ind-range=-1, but 20 is asked for; {way_out}"
    assert "made with --data-sub-sample-rate=0.0, but 0.1" in refusal(prefix, sub_sample_rate=0.1)
    assert "made with --min-frequency=0, but 2" in refusal(prefix, min_frequency=2)
    assert "made without --vocabulary, which is asked for" in refusal(prefix, vocabulary=str(place))
    prefix.with_name("day_3").unlink()
    open_it(prefix)  # what is there is what it was made from
    (prefix.with_name("day_5")).write_bytes(DAYS[5][:-1] + b" ")
    assert f"made from another raw file (day_5) than {prefix}_5, of --raw-data-file={prefix} (same size" in refusal(prefix)
    other = tmp_path / "K" / "train.txt"
    other.parent.mkdir()
    other.write_bytes(b"".join(DAYS))
    open_it(other, tmp_path / "k.npz", data_set="kaggle")
    assert "made with number of days=7, but 24 is asked for" in refusal(tmp_path / "T" / "none", tmp_path / "k.npz")


def test_zipped_days_and_missing_days(prefix):
    plain = rows_of(open_it(prefix, prefix.with_name("plain.npz")).train)
    for day in (0, 7, 23):
        file = prefix.with_name(f"day_{day}")
        prefix.with_name(f"day_{day}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert rows_of(open_it(prefix, prefix.with_name("zipped.npz")).train) == plain
    prefix.with_name("day_7.gz").unlink()
    assert re.search(r"day_7\b", refusal(prefix, prefix.with_name("again.npz")))


def test_kaggle_in_an_arrays_folder(tmp_path):
    """A --processed-data-file that does not end in .npz names a folder."""
    raw = tmp_path / "train.txt"
    raw.write_bytes(b"".join(DAYS))
    flags = {"data_set": "kaggle", "sub_sample_rate": 0.3}
    for memory_map in (False, True):
        in_folder, in_file = (open_it(raw, tmp_path / name, **flags, memory_map=memory_map) for name in ("folder", "file.npz"))
        assert (tmp_path / "folder" / "manifest.json").is_file() and in_folder.table_rows == in_file.table_rows
        assert rows_of(in_folder.train) == rows_of(in_file.train) and rows_of(in_folder.test) == rows_of(in_file.test)
    assert "made with --data-sub-sample-rate=0.3" in refusal(raw, tmp_path / "folder", data_set="kaggle")
