"""Files that several ranks make and open together: one rank makes them, and what is wrong is said once."""

import threading

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL
from rank_sources import (
    TABLES,
    assert_same,
    companions,
    config_of,
    facts,
    opened,
)

from data_loaders import criteo, table
from data_loaders.open import open_dataset
from data_loaders.spill import locked_folder, parts_folder
from dlrm_xla import flags
from dlrm_xla.batch import rank_part
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle


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
    companions(monkeypatch, name)
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
    assert len(list(tmp_path.glob("multi_hot_*.bin"))) == (name == "multi-hot in a file")
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
