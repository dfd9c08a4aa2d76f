"""What each of several ranks reads: for every source the part that rank_part cuts from the single rank's batch, and of the files no more than
that; and ranks that open the same raw files at once."""


import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL
from rank_sources import CRITEO, DRAWN, TABLES, WORLDS, assert_same, batches_of, companions, config_of, facts, opened, write_like_upstream

from data_loaders import mlperf_bin
from data_loaders.criteo_split import CriteoSplit
from data_loaders.part import Part
from data_loaders.table_batches import TableSplit
from dlrm_xla import flags
from dlrm_xla.batch import Batch, rank_part
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle


@pytest.mark.parametrize("name", [*DRAWN, *CRITEO, *TABLES])
def test_each_rank_has_its_part_of_each_batch(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    companions(monkeypatch, name)
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
