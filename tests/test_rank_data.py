"""What each of several ranks reads: for every source the part that rank_part cuts from the single rank's batch, and of the files no more than
that; and ranks that open the same raw files at once."""

import threading
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL

from data_loaders import criteo, mlperf_bin, table
from data_loaders.criteo_split import CriteoSplit
from data_loaders.open import open_dataset
from data_loaders.part import Part
from data_loaders.spill import locked_folder, parts_folder
from data_loaders.table_batches import TableSplit
from dlrm_xla import flags
from dlrm_xla.batch import Batch, rank_part
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle
from tests.oracles import terabyte
from tests.test_table import SCHEMA, made_up, write

WORLDS = (1, 2, 3, 4)
FULL_BAGS = SCHEMA.replace('separator: "|"}', 'separator: "|", max_hot: 1}')
COLUMNS = 'label: {column: rating, positive: ">= 4"}\ncategorical: [{column: user, type: integer}, {column: site, type: hex}]\n'
SINGLE = COLUMNS + SCHEMA[SCHEMA.index("split") :]
BINS = ("--data-set=terabyte", "--processed-data-file=terabyte.npz", "--mlperf-logging", "--mlperf-bin-loader", "--memory-map")
RANDOM = ("--arch-sparse-feature-size=8", "--arch-embedding-size=50-20-100", "--arch-mlp-bot=3-8", "--arch-mlp-top=8-1", "--data-size=75")
DRAWN = {
    "bags": ("--num-indices-per-lookup=5",),
    "full bags": ("--num-indices-per-lookup=4", "--num-indices-per-lookup-fixed=True"),
    "batches": ("--num-batches=3", "--num-indices-per-lookup=1"),
    "drop the last": ("--drop-last",),
    "gaussian": ("--rand-data-dist=gaussian", "--rand-data-max=19", "--rand-data-sigma=5"),
    "traces": ("--data-generation=synthetic", "--data-trace-file=trace_j.log"),
    "a shared stream": ("--upstream-compat",),
    "workers": ("--upstream-compat", "--num-workers=2"),
}
CRITEO = {
    "kaggle": (),
    "kaggle by days": ("--data-randomize=day",),
    "kaggle as it lies": ("--data-randomize=none", "--drop-last", "--data-sub-sample-rate=0.3"),
    "kaggle mapped": ("--memory-map", "--num-batches=4"),
    "kaggle arrays": ("--processed-data-file=arrays", "--max-ind-range=20"),
    "kaggle folded": ("--processed-data-file=upstream.npz", "--max-ind-range=20", "--upstream-compat"),
    "kaggle in one batch": ("--test-mini-batch-size=5000",),
    "multi-hot": (f"--multi-hot-sizes={','.join(['3', '1'] * 13)}",),
    "multi-hot in a file": (f"--multi-hot-sizes={','.join(['3', '1'] * 13)}", "--multi-hot-distribution=pareto", "--preprocess-memory=2GB"),
    "terabyte": ("--data-set=terabyte",),
    "terabyte with a pile": ("--data-set=terabyte", "--memory-map", "--mlperf-logging", "--upstream-compat"),
    "bins": (*BINS, "--mlperf-bin-shuffle"),
    "bins of upstream's": (*BINS, "--mlperf-bin-shuffle", "--upstream-compat", "--drop-last"),
    "multi-hot bins": (*BINS, "--multi-hot-sizes=mlperf"),
}
TABLES = {
    "table": (SCHEMA, ()),
    "table mapped": (SCHEMA, ("--memory-map", "--drop-last")),
    "table of full bags": (FULL_BAGS, ("--data-randomize=none", "--num-batches=3")),
    "table of single ids": (SINGLE, ("--test-mini-batch-size=1000",)),
}


def config_of(folder: Path, name: str, batch_size: int) -> Config:
    """The configuration of a source, whose files are made in the folder."""
    sizes = (f"--mini-batch-size={batch_size}",)
    if name in DRAWN:
        (folder / "trace_0.log").write_text("7, 90, 3, 15\n0, 1, 2, 4\n0.4, 0.6, 0.75, 1.0\n")
        for number in (1, 2):
            (folder / f"trace_{number}.log").write_text((folder / "trace_0.log").read_text())
        return Config.from_args(flags.parse([*RANDOM, *DRAWN[name], *sizes]))
    if name in TABLES:
        schema, more = TABLES[name]
        (folder / "schema.yaml").write_text(schema)
        rows = made_up(173)
        if name == "table of full bags":
            rows = [row | {"genres": row["genres"] or "none"} for row in rows]
        write(folder / "a.csv", rows)
        model = [flag for flag in CRITEO_MODEL if not flag.startswith("--mini-batch-size")]
        data = ("--data-set=table", "--schema=schema.yaml", "--raw-data-file=a.csv")
        return Config.from_args(flags.parse([*model, *data, *more, *sizes]))
    more = CRITEO[name]
    if "--data-set=terabyte" in more:
        raw = folder / "day"
        terabyte.write_days(raw, terabyte.make_days([10 + 3 * (day % 4) for day in range(24)]))
    else:
        raw = folder / "train.txt"
        raw.write_bytes(oracle.make_text(300))
        if "--processed-data-file=upstream.npz" in more and not (folder / "upstream.npz").exists():
            write_like_upstream(folder / "upstream.npz", compressed=False)
    return Config.from_args(flags.parse([*CRITEO_MODEL, f"--raw-data-file={raw.name}", *more, *sizes]))


def write_like_upstream(path: Path, compressed: bool) -> None:
    """What upstream writes of 300 rows of Criteo's text, or the same so that it can be mapped."""
    arrays = oracle.process(oracle.make_text(300), -1)
    arrays = {name: np.array(arrays[name], dtype=np.int32) for name in ("X_cat", "X_int", "y", "counts")}
    (np.savez_compressed if compressed else np.savez)(path, **arrays)


def opened(config: Config, *ranks, **more):
    """The data set, and the stream that it was opened with."""
    torch.manual_seed(5)
    rng = np.random.RandomState(123)
    return open_dataset(config, rng, lambda line: None, *ranks, **more), rng


def batches_of(data, rng) -> tuple[list[Batch], int]:
    """Two epochs of training with a test after each, and the stream's next number, which shows how much was drawn."""
    batches = []
    for epoch in range(2):
        batches += [*data.train.batches(epoch=epoch), *data.test.batches()]
    return batches, rng.randint(2**31)


def assert_same(got: Batch, wanted: Batch) -> None:
    for field in fields(Batch):
        one, other = getattr(got, field.name), getattr(wanted, field.name)
        if isinstance(other, torch.Tensor):
            assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other), field.name
        else:
            assert type(one) is type(other) and one == other, field.name


def facts(data) -> list:
    halves = [(half.num_rows, half.num_batches, half.batch_size) for half in (data.train, data.test)]
    return [data.table_rows, data.hotness, data.num_dense, data.bayes_auc, *halves]


@pytest.mark.parametrize("name", [*DRAWN, *CRITEO, *TABLES])
def test_each_rank_has_its_part_of_each_batch(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    sizes = [16, 50, 1000]
    if name == "drop the last":
        sizes.remove(1000)  # which leaves no batch
    if name == "terabyte with a pile":
        sizes[0] = 8  # of 16, upstream's loader fails
    for batch_size in sizes:
        config = config_of(tmp_path, name, batch_size)
        opened(config)  # --upstream-compat: the run that makes the files draws more than the later ones
        single, rng = opened(config)
        wanted = batches_of(single, rng)
        for world in WORLDS[1:]:
            assert_parts(config, world, single, *wanted)


def assert_parts(config: Config, world: int, single, wanted: list[Batch], drawn: int) -> None:
    """What the ranks have is what rank_part cuts from the single rank's batches, and together all of it."""
    parts = []
    for rank in range(world):
        data, rng = opened(config, rank, world)
        assert facts(data) == facts(single)
        found, of_rank = batches_of(data, rng)
        parts.append(found)
        assert of_rank == drawn
        for got, whole in zip(found, wanted, strict=True):
            assert_same(got, rank_part(whole, rank, world))
    for pieces, whole in zip(zip(*parts, strict=True), wanted, strict=True):
        ids = torch.cat([piece.ids[: piece.num_valid] for piece in pieces])
        assert torch.equal(ids, whole.ids[: whole.num_valid])
        assert len({piece.size for piece in pieces}) == 1 and len({piece.weights is None for piece in pieces}) == 1


def test_what_the_cases_hold(tmp_path, monkeypatch):
    """The cases above have what they are there for: short last batches, long ones, parts without a row that counts, weights and none."""
    monkeypatch.chdir(tmp_path)

    def last(name: str, batch_size: int, rank: int) -> Batch:
        folder = tmp_path / f"{name} {batch_size}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        return list(opened(config_of(folder, name, batch_size), rank, 4)[0].train.batches())[-1]

    empty = last("kaggle", 16, 3)  # 258 rows, so the last batch has two
    assert (empty.num_valid, empty.total_valid, empty.size) == (0, 2, 4) and not empty.ids.any() and not empty.dense.any()
    piled = last("terabyte with a pile", 50, 0)
    assert piled.size == piled.num_valid == -(-piled.total_valid // 4) and piled.total_valid > 50
    assert last("bags", 16, 1).weights is not None and last("full bags", 16, 1).weights is None
    assert last("table", 16, 1).weights is not None and last("table of full bags", 16, 1).weights is None
    assert (tmp_path / "kaggle 16" / "kaggleAdDisplayChallenge_processed.npz").exists()


@pytest.mark.parametrize("name", ["bags", "workers", "kaggle", "multi-hot bins", "bins", "table"])
def test_going_on_from_a_batch(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, name, 16)
    whole = list(opened(config)[0].train.batches(epoch=1))
    for start in (0, 2, len(whole) - 1, len(whole)):
        for rank in range(3):
            data, _ = opened(config, rank, 3)
            for got, batch in zip(data.train.batches(start, 1), whole[start:], strict=True):
                assert_same(got, rank_part(batch, rank, 3))


@pytest.mark.parametrize("name", ["bags", "workers", "kaggle", "multi-hot bins", "table"])
def test_whole_batches_where_they_are_wanted(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, name, 16)
    wanted = list(opened(config)[0].train.batches())
    data, _ = opened(config, 1, 3)
    for got, batch in zip(data.train.whole().batches(), wanted, strict=True):
        assert_same(got, batch)
    assert next(data.train.batches()).total_valid == 16


# ---- what is read -----------------------------------------------------------------------------------------------------------------


class Recorded:
    """Packed rows that write down which ones they are asked for, one list entry for each time."""

    def __init__(self, rows: torch.Tensor):
        self.rows, self.asked = rows, []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        self.asked.append(list(range(*rows.indices(len(self.rows)))))
        return self.rows[rows]

    def index_select(self, dim: int, rows: torch.Tensor) -> torch.Tensor:
        self.asked.append(rows.tolist())
        return self.rows.index_select(dim, rows)


class RecordedBags:
    """The bags of a column that write down the same."""

    def __init__(self, bags):
        self.bags, self.asked = bags, []

    def take(self, rows: np.ndarray):
        self.asked.append(rows.tolist())
        return self.bags.take(rows)


def assert_read_once(asked: list[list[list[int]]], wanted: list[int], batch_size: int) -> None:
    """asked: of each rank, for each batch. Together all rows, each once, in their order; of no rank more than its share of a batch."""
    share = -(-batch_size // len(asked))
    assert max(len(rows) for of_rank in asked for rows in of_rank) == share
    assert [row for of_batch in zip(*asked, strict=True) for rows in of_batch for row in rows] == wanted


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("num_rows, batch_size", [(50, 16), (51, 10), (3, 8)])
def test_criteo_reads_its_own_rows(world, num_rows, batch_size):
    rows = torch.from_numpy(np.random.default_rng(0).integers(0, 2, (60, 40)).astype(np.int32))
    order = torch.from_numpy(np.random.default_rng(1).permutation(num_rows))
    for first, numbers in ((0, order), (5, None)):
        asked = []
        for rank in range(world):
            packed = Recorded(rows)
            split = CriteoSplit(packed, numbers, first=first, num_rows=num_rows, batch_size=batch_size, part=Part(rank, world))
            assert [batch.total_valid is None for batch in split.batches()] == [world == 1] * split.num_batches
            asked.append(packed.asked)
        assert_read_once(asked, order.tolist() if numbers is not None else list(range(5, 5 + num_rows)), min(batch_size, num_rows))


@pytest.mark.parametrize("world", WORLDS)
def test_tables_read_their_own_rows_and_bags(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "table mapped", 16)
    rows, bags = [], []
    for rank in range(world):
        split: TableSplit = opened(config, rank, world)[0].test
        arrays = split._arrays
        (whole, start), packed = split._bags[0], Recorded(arrays.rows[0 : len(arrays.rows)])
        split._bags, arrays.rows = [(RecordedBags(whole), start)], packed
        list(split.batches())
        rows.append(packed.asked)
        bags.append(split._bags[0][0].asked)
    wanted = list(range(split._first, split._first + split.num_rows))
    assert_read_once(rows, wanted, 16)
    assert_read_once(bags, wanted, 16)


@pytest.mark.parametrize("world", WORLDS)
def test_bins_are_read_in_parts(tmp_path, monkeypatch, world):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "multi-hot bins", 16)
    opened(config)
    read = mlperf_bin.BinRows.__getitem__
    asked = []

    def recorded(self, rows):
        asked[-1].append(list(range(rows.start, rows.stop)))
        return read(self, rows)

    monkeypatch.setattr(mlperf_bin.BinRows, "__getitem__", recorded)
    for rank in range(world):
        asked.append([])
        train = opened(config, rank, world)[0].train
        list(train.batches())
    assert_read_once(asked, list(range(train.num_rows)), 16)


def test_rows_of_several_ranks_stay_in_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("kaggle", "kaggle arrays"):
        config = config_of(tmp_path, name, 16)
        assert isinstance(opened(config)[0].train._packed, torch.Tensor)
        assert not isinstance(opened(config, 1, 2)[0].train._packed, torch.Tensor)
    config = config_of(tmp_path, "table", 16)
    assert isinstance(opened(config)[0].train._arrays.rows, torch.Tensor)
    assert not isinstance(opened(config, 1, 2)[0].train._arrays.rows, torch.Tensor)


def test_a_file_that_cannot_be_mapped_is_loaded_by_each(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.txt").write_bytes(oracle.make_text(300))
    write_like_upstream(tmp_path / "p.npz", compressed=True)
    more = ("--raw-data-file=train.txt", "--processed-data-file=p.npz")
    config = Config.from_args(flags.parse([*CRITEO_MODEL, *more]))
    wanted = batches_of(*opened(config))
    for rank in range(2):
        capsys.readouterr()
        found = batches_of(*opened(config, rank, 2, wait=lambda: None))
        said = capsys.readouterr().err
        assert ("p.npz: cannot be memory-mapped: y is compressed" in said and "each of the 2 ranks loads all of its rows" in said) == (rank == 0)
        assert len(said.splitlines()) == (rank == 0) and found[1] == wanted[1]
        for got, whole in zip(found[0], wanted[0], strict=True):
            assert_same(got, rank_part(whole, rank, 2))
    with pytest.raises(UserError, match="^p.npz: cannot be memory-mapped: .* or leave --memory-map out$"):
        opened(Config.from_args(flags.parse([*CRITEO_MODEL, *more, "--memory-map"])), 1, 2)


# ---- raw files --------------------------------------------------------------------------------------------------------------------


def open_together(config: Config, world: int, hosts: int = 1) -> tuple[list, list[int]]:
    """What each rank gets or raises, each in a thread of its own, and the next numbers of their streams. A rank that fails ends the others."""
    barrier, found, draws = threading.Barrier(world, timeout=30), [None] * world, [None] * world

    def work(rank: int) -> None:
        rng = np.random.RandomState(123)
        try:
            found[rank] = open_dataset(config, rng, lambda line: None, rank, world, rank % (world // hosts), barrier.wait)
            draws[rank] = rng.randint(2**31)
        except (UserError, threading.BrokenBarrierError) as error:
            barrier.abort()
            found[rank] = error

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, draws


def counted(monkeypatch, module, name: str) -> list:
    """The calls of a function from now on."""
    calls, function = [], getattr(module, name)

    def call(*args, **more):
        calls.append(args)
        return function(*args, **more)

    monkeypatch.setattr(module, name, call)
    return calls


@pytest.mark.parametrize("name", ["kaggle", "kaggle as it lies", "terabyte with a pile", "bins", "multi-hot in a file", "table", "table mapped"])
def test_one_rank_makes_the_files(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, name, 50)
    module, function = (table, "build") if name in TABLES else (criteo, "preprocess")
    calls = counted(monkeypatch, module, function)
    found, draws = open_together(config, 4)
    assert len(calls) == 1
    single, rng = opened(config)
    wanted = list(single.train.batches())
    assert draws == [rng.randint(2**31)] * 4 and len(calls) == 1
    torch.manual_seed(5)
    for rank, data in enumerate(found):
        for got, whole in zip(data.train.batches(), wanted, strict=True):
            assert_same(got, rank_part(whole, rank, 4))
    assert not list(tmp_path.glob("*.parts")) and not list(tmp_path.glob("*.tmp"))


def test_draws_of_upstreams_first_run(tmp_path, monkeypatch):
    """That run draws the sub-sampling and the order from the run's stream; ranks that did not make the files would start from other weights."""
    monkeypatch.chdir(tmp_path)
    more = ("--raw-data-file=train.txt", "--data-sub-sample-rate=0.4", "--memory-map", "--upstream-compat")
    (tmp_path / "train.txt").write_bytes(oracle.make_text(300))
    config = Config.from_args(flags.parse([*CRITEO_MODEL, *more]))
    _, draws = open_together(config, 3)
    assert draws == [opened(config)[1].randint(2**31)] * 3


def test_two_hosts_and_one_folder(tmp_path, monkeypatch):
    """Each host's first rank starts to make the files; the one that comes second leaves them to the other. Another run's work is an error."""
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "kaggle", 16)
    out = tmp_path / "kaggleAdDisplayChallenge_processed.npz"
    found, draws = open_together(config, 4, hosts=2)
    assert [facts(data) for data in found] == [facts(found[0])] * 4 and len(set(draws)) == 1
    out.unlink()
    order = []

    def wait() -> None:
        order.append("waited")
        held.__exit__(None, None, None)
        opened(config)

    held = locked_folder(parts_folder(out), str(out))
    held.__enter__()
    data, _ = opened(config, 2, 4, local_rank=0, wait=wait)
    assert order == ["waited"] and data.train.num_batches == found[0].train.num_batches
    out.unlink()
    with locked_folder(parts_folder(out), str(out)), pytest.raises(UserError, match="another run is making it"):
        opened(config, 0, 4, wait=lambda: None)


def test_what_is_wrong_is_said_by_the_rank_that_finds_it(tmp_path, monkeypatch):
    """Bad rows by the one that makes the files, before anyone waits for it; a file that is not there by each."""
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "terabyte", 16)
    text = (tmp_path / "day_5").read_bytes()
    (tmp_path / "day_5").unlink()
    for rank in range(2):
        with pytest.raises(UserError, match="day_5"):
            opened(config, rank, 2)
    found, _ = open_together(config, 3)
    assert [type(error) for error in found] == [UserError, threading.BrokenBarrierError, threading.BrokenBarrierError]
    assert "day_5" in str(found[0])
    (tmp_path / "day_5").write_bytes(text[:-3] + b"xyz\n")
    found, _ = open_together(config, 2)
    assert isinstance(found[0], UserError) and "day_5: line " in str(found[0]) and isinstance(found[1], threading.BrokenBarrierError)
    (tmp_path / "day_5").write_bytes(text)
    found, _ = open_together(config, 2)
    assert facts(found[0]) == facts(found[1])


def test_random_data_waits_for_nobody(tmp_path):
    def wait() -> None:
        raise AssertionError("nothing to wait for")

    opened(config_of(tmp_path, "bags", 16), 1, 2, wait=wait)


def test_only_the_first_rank_says_what_is_found(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, "table", 16)
    opened(config)
    said = {}
    for rank in range(2):
        capsys.readouterr()
        opened(config, rank, 2)
        said[rank] = capsys.readouterr().err
    assert "Table of 173 rows" in said[0] and said[1] == ""
