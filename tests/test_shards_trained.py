"""Trained models in folders of checkpoints: saved by W ranks, loaded by W' with another plan, exported, trained on."""

from pathlib import Path

import numpy as np
import pytest
import torch
from rank_models import DRAWING, batches_of, config_of, everywhere, specs_of, spread, whole_state
from ranks import run_ranks
from saves import equal
from test_methods import LAYOUTS

import run_dlrm
from dlrm_xla import checkpoint, checkpoint_file, export_checkpoint, shards
from dlrm_xla.batch import rank_part
from dlrm_xla.checkpoint_file import Progress
from dlrm_xla.config import Config
from dlrm_xla.train import NotFiniteLoss

PROGRESS = Progress(epoch=1, batch=4, num_epochs=3, num_batches=9, updates=4, loss_sum=2.5, loss_rows=48.0, test_auc=0.5)
CASES = [
    ("", "sgd"), ("", "adagrad"), ("", "rwsadagrad"), ("qr:collisions=4", "adagrad"), ("tt:rank=4", "rwsadagrad"), ("lpt", "rwsadagrad"),
    ("lpt", "sgd"), ("double_hash:rows=20", "sgd"), ("cce:rows=8", "rwsadagrad"),
]  # fmt: skip


def build(backend, config: Config, seed: int, plan_of=None, to_load: bool = False):
    with DRAWING:
        torch.manual_seed(seed)
        return run_dlrm.build(config, specs_of(1), np.random.RandomState(seed), backend, plan_of=plan_of, to_load=to_load)


def train(trainer, batches) -> None:
    collectives = trainer.backend.collectives
    for index, batch in enumerate(batches):
        part = rank_part(batch, collectives.rank, collectives.world)
        trainer.step(trainer.backend.to_device(part), index, last_of_epoch=False)


def trained_and_saved(path: Path, config: Config, world: int, plan_of=None, layout: str = "rows", seed: int = 5) -> list:
    def work(backend):
        trainer = build(backend, config, seed, plan_of)
        train(trainer, batches_of(specs_of(1), 4))
        checkpoint.save(path, trainer, PROGRESS, {"optimizer": config.train.optimizer})
        return trainer

    return run_ranks(world, work, LAYOUTS[layout])


def resumed(path: Path, config: Config, world: int, plan_of=None, layout: str = "rows") -> list:
    def work(backend):
        trainer = build(backend, config, 99, plan_of, to_load=True)
        assert checkpoint.resume(trainer, shards.read(path), config) == PROGRESS
        assert trainer.updates == 4
        return trainer

    return run_ranks(world, work, LAYOUTS[layout])


def assert_bitwise(trainers: list, others: list) -> None:
    one, other = whole_state(trainers), whole_state(others)
    assert one.keys() == other.keys()
    for name, values in one.items():
        assert torch.equal(values, other[name]), name
    for (name, buffer), (_, same) in zip(checkpoint.kept(trainers[0].tables), checkpoint.kept(others[-1].tables), strict=True):
        assert torch.equal(buffer, same), name


@pytest.mark.parametrize("method, rule", CASES)
def test_saved_by_some_and_loaded_by_others(tmp_path, method, rule):
    """Bit for bit: tables, optimizer's state, what tables keep, the layers; in another layout too; from the exported file as well."""
    config = config_of(method, rule)
    for world in (2, 3):
        path, out, one = tmp_path / f"model{world}", tmp_path / f"out{world}.pt", tmp_path / f"one{world}.pt"
        trainers = trained_and_saved(path, config, world, spread(world, seed=world), seed=world)
        for readers in (1, 2, 4):
            layout = "packed" if readers == 2 else "rows"
            again = resumed(path, config, readers, spread(readers, seed=10 + readers) if readers > 1 else None, layout)
            assert_bitwise(trainers, again)
            if readers == 1:
                checkpoint.save(one, again[0], PROGRESS, {"optimizer": rule})
        export_checkpoint.export(path, out)
        assert equal(torch.load(out, weights_only=True), torch.load(one, weights_only=True))
        for readers in (1, 3):
            assert_bitwise(trainers, resumed(out, config, readers, spread(readers, seed=20) if readers > 1 else None))


@pytest.mark.parametrize("method, rule", [("", "adagrad"), ("lpt", "rwsadagrad"), ("tt:rank=4", "rwsadagrad"), ("cce:rows=8", "sgd")])
def test_training_goes_on_as_if_nothing_had_been(tmp_path, method, rule):
    config, more = config_of(method, rule), batches_of(specs_of(1), 4, seed=1)
    plan_of = spread(3, seed=4)
    trainers = trained_and_saved(tmp_path / "model", config, 3, plan_of)

    def go_on(backend):
        trainer = build(backend, config, 98, plan_of, to_load=True)
        checkpoint.resume(trainer, shards.read(tmp_path / "model"), config)
        train(trainer, more)
        return trainer

    def all_at_once(backend):
        trainer = build(backend, config, 5, plan_of)
        train(trainer, [*batches_of(specs_of(1), 4), *more])
        return trainer

    again = run_ranks(3, go_on, LAYOUTS["rows"])
    assert_bitwise(run_ranks(3, all_at_once, LAYOUTS["rows"]), again)
    assert again[0].updates == trainers[0].updates + 4


def test_a_single_rank_goes_on_with_a_folder(tmp_path):
    """And writes one file where there is none."""
    config, path = config_of("", "adagrad"), tmp_path / "model"
    trained_and_saved(path, config, 2, spread(2, seed=1))
    [alone] = resumed(path, config, 1)
    checkpoint.save(path, alone, PROGRESS, {})
    assert [entry.name for entry in path.iterdir()] == ["save-2-epoch-1-batch-4"]
    assert_bitwise([alone], resumed(path, config, 3, spread(3, seed=2)))
    checkpoint.save(tmp_path / "one.pt", alone, PROGRESS, {})
    assert checkpoint_file.read(tmp_path / "one.pt").exact


def test_copies_are_written_once(tmp_path):
    """And row ranges by their owners: the files together are as large as the model."""
    config = config_of("", "adagrad")
    for name, plan_of in (("copies", everywhere(4)), ("spread", spread(4, seed=3))):
        trained_and_saved(tmp_path / name, config, 4, plan_of)
        found: dict[tuple, int] = {}
        for file in (tmp_path / name).glob("*/rank-*"):
            pieces = torch.load(file, weights_only=True)["pieces"]
            assert name == "spread" or bool(pieces) == ("rank-00001" in file.name)
            for piece in pieces:
                at = piece["name"], piece["key"]
                found[at] = found.get(at, 0) + piece["values"].shape[0]
        loaded = checkpoint_file.load(next((tmp_path / name).glob("*/index.pt")), "", mapped=False)["state_dict"]
        assert {at: rows for at, rows in found.items() if not at[1]} == {(one, ""): shape.shape[0] for one, shape in loaded.items()}


@pytest.mark.parametrize("victim", [0, 1, 2])
def test_a_number_that_is_not_finite_on_one_rank(tmp_path, victim):
    """All ranks refuse to save, with the same words; the checkpoint before stays."""
    config, plan_of = config_of("", "rwsadagrad"), spread(3, seed=8)
    trained_and_saved(tmp_path / "model", config, 3, plan_of)
    before = sorted((tmp_path / "model").rglob("*"))

    def work(backend):
        trainer = build(backend, config, 1, plan_of)
        if backend.collectives.rank == victim:
            owned = [s for of_table in trainer.tables.segments for s in of_table if 0 < s.num_rows < s.total]
            trainer.tables.part_rows(owned[0])[0, 0] = float("nan")
        try:
            checkpoint.save(tmp_path / "model", trainer, PROGRESS, {})
        except NotFiniteLoss as error:
            return str(error)
        return None

    said = run_ranks(3, work, LAYOUTS["rows"])
    assert len(set(said)) == 1 and said[0].startswith("after batch 4 a number in emb_l.") and said[0].endswith(".weight is not a finite number")
    assert sorted((tmp_path / "model").rglob("*")) == before


def test_another_model_or_optimizer(tmp_path):
    trained_and_saved(tmp_path / "model", config_of("", "adagrad"), 2, spread(2, seed=1))
    with pytest.raises(checkpoint.UserError, match="was trained with --optimizer=adagrad, and --optimizer=sgd cannot go on"):
        resumed(tmp_path / "model", config_of("", "sgd"), 3, spread(3, seed=1))
    with pytest.raises(checkpoint.UserError, match=r"table emb_l.0 .*--compress and the number of tables must be those"):
        resumed(tmp_path / "model", config_of("qr:collisions=4", "adagrad"), 2, spread(2, seed=1))
