"""Every registered method in a checkpoint: bit for bit what was saved, on the CPU and on XLA, in as many bytes as the ledger says."""

import numpy as np
import pytest
import torch
from test_methods import NAMES, counts_of, knobs_of, make_table, method_of

import run_dlrm
from compression import registry
from compression.ledger import ledger
from compression.method import Choice, Making
from compression.registry import recorded
from data_loaders.open import open_dataset
from dlrm_xla import backends, checkpoint, checkpoint_file, flags
from dlrm_xla.config import Config

ROWS, DIM = 97, 16
FLAGS = (
    f"--arch-sparse-feature-size={DIM}", f"--arch-embedding-size={ROWS}-5", f"--arch-mlp-bot=5-{DIM}", "--arch-mlp-top=9-1", "--mini-batch-size=8",
    "--num-batches=6", "--num-indices-per-lookup=3", "--optimizer=rwsadagrad", "--loss-function=bce", "--round-targets",
)  # fmt: skip


def trainer_of(name: str, backend, seed: int, to_load: bool = False, choices=None):
    """A trainer of two tables, the first by the method, and its batches."""
    config = Config.from_args(flags.parse([*FLAGS]))
    rng = np.random.RandomState(seed)
    data = open_dataset(config, rng, lambda line: None)
    specs = run_dlrm.table_specs(config, data)
    torch.manual_seed(seed)
    choices = choices or [Choice(method_of(name).name, knobs_of(name, specs[0])), Choice()]
    counts = None if to_load else [counts_of(ROWS), counts_of(5)]
    if method_of(name).create is None and not to_load:  # with the codes and rows of a trained table
        made = [make_table(name, specs[0], seed), registry.create_table(specs[1], choices[1], Making(rng))]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(registry, "create_tables", lambda *args, **more: made)
            return run_dlrm.build(config, specs, rng, backend, choices=choices), list(data.train.batches())
    return run_dlrm.build(config, specs, rng, backend, choices=choices, counts=counts, to_load=to_load), list(data.train.batches())


def train(trainer, batches) -> None:
    for index, batch in enumerate(batches):
        trainer.observe(batch)
        trainer.step(trainer.backend.to_device(batch), index, last_of_epoch=False)


def everything(trainer) -> dict[str, torch.Tensor]:
    values = {}
    for name, weight, state in checkpoint.parameters(trainer):
        values |= {name: weight.clone(), **{f"{name}:{key}": value.clone() for key, value in state.items()}}
    return values | {name: buffer.cpu().clone() for name, buffer in checkpoint.kept(trainer.tables)}


@pytest.mark.parametrize("name", NAMES)
def test_saved_and_loaded_bit_for_bit(name, backend, tmp_path):
    trainer, batches = trainer_of(name, backend, seed=1)
    train(trainer, batches[:2])
    trainer.reorganize(0)
    train(trainer, batches[2:3])
    path = tmp_path / "model.pt"
    checkpoint.save(path, trainer, checkpoint_file.Progress(batch=3, updates=3), {})
    saved = everything(trainer)

    loaded = checkpoint_file.read(path)
    choices = recorded(loaded.tables)
    assert choices == [table.made_by or Choice() for table in trainer.tables.tables]
    again, _ = trainer_of(name, backend, seed=2, to_load=True, choices=choices)
    checkpoint.resume(again, loaded, again.config)
    found = everything(again)
    assert found.keys() == saved.keys()
    for key, value in saved.items():
        assert value.dtype == found[key].dtype and torch.equal(value, found[key]), key
    for one in (trainer, again):
        train(one, batches[3:5])
        one.reorganize(1)
        train(one, batches[5:])
    for (key, value), other in zip(everything(trainer).items(), everything(again).values(), strict=True):
        assert torch.equal(value, other), f"{key} after three more steps"


@pytest.mark.parametrize("name", NAMES)
def test_bytes_on_disk_are_the_ledgers(name, tmp_path):
    trainer, _ = trainer_of(name, backends.make("cpu"), seed=1)
    path = tmp_path / "model.pt"
    checkpoint.save(path, trainer, checkpoint_file.Progress(), {})
    weights = torch.load(path, weights_only=True)["state_dict"]
    book = ledger(trainer.tables, lambda parameter: {}, tiles=False)
    for entry in book.entries:
        of_table = [value for key, value in weights.items() if key.startswith(f"{entry.table}.")]
        assert sum(value.nelement() * value.element_size() for value in of_table) == entry.stored
        assert sum(value.untyped_storage().nbytes() for value in of_table) == entry.stored, "a view would take along what it is cut from"
    assert book.stored == sum(entry.stored for entry in book.entries) <= path.stat().st_size


@pytest.mark.parametrize("name", NAMES)
def test_a_table_of_another_size_is_refused(name, tmp_path, capsys, monkeypatch):
    trainer, _ = trainer_of(name, backends.make("cpu"), seed=1)
    path = tmp_path / "model.pt"
    checkpoint.save(path, trainer, checkpoint_file.Progress(), {})
    content = torch.load(path, weights_only=True)
    lost = next(key for key in content["state_dict"] if key.startswith("emb_l.0."))
    content["state_dict"][lost] = content["state_dict"][lost][:-1].clone()
    torch.save(content, path)
    monkeypatch.chdir(tmp_path)
    assert run_dlrm.main([*FLAGS, f"--load-model={path}", "--inference-only", "--device=cpu"]) == 2
    assert lost in capsys.readouterr().err
