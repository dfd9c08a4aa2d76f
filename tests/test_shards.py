"""Folders of checkpoints (dlrm_xla/shards.py) at the level of files: written by W ranks, read by W', damaged. Writers are threads here."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from saves import Hub, assert_same, checkpoint_of, copied, equal, made, save, the_save

from dlrm_xla import checkpoint_file, export_checkpoint, shards
from dlrm_xla.checkpoint_file import Checkpoint, Progress
from dlrm_xla.shards import Piece
from dlrm_xla.specs import UserError


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path, monkeypatch, world):
    monkeypatch.setattr(shards, "SUM_BYTES", 64)  # several sums for each piece
    state, path = made(1), tmp_path / "model"
    assert save(path, state, world) == [None] * world
    loaded = shards.read(path)
    assert loaded.exact and loaded.progress == checkpoint_of(path, state, 3, meta=False).progress and loaded.learning_rate == 0.1
    assert {name: tuple(value.shape) for name, value in loaded.weights.items()} == {n: tuple(v.shape) for (n, k), v in state.items() if not k}
    for readers in (1, 2, 3, 4):
        for rank in range(readers):
            assert_same(copied(shards.read(path), rank, readers), state, rank, readers)
    checkpoint_file.write(checkpoint_of(tmp_path / "one.pt", state, 3, meta=False))
    for rank in range(world):  # a file as well
        assert_same(copied(shards.read(tmp_path / "one.pt"), rank, world), state, rank, world)
    assert export_checkpoint.main([str(path), str(tmp_path / "out.pt")]) == 0
    assert equal(torch.load(tmp_path / "out.pt", weights_only=True), torch.load(tmp_path / "one.pt", weights_only=True))
    assert len((tmp_path / "out.pt").read_bytes()) == len((tmp_path / "one.pt").read_bytes())


def test_only_the_rows_that_are_wanted_are_read(tmp_path):
    """The pages of the file that have come into memory, and damage elsewhere that goes unnoticed."""
    rows, width, path = 1 << 16, 128, tmp_path / "model"  # 32 MB
    values = torch.arange(rows * width, dtype=torch.float32).view(rows, width)
    progress, names = Progress(), ["emb_l.0.weight"]
    whole = Checkpoint(path, {names[0]: values.to("meta")}, None, progress, exact=True)
    shards.write(whole, names, [Piece(names[0], "", 0, values)], Hub(1).ranks(0))
    file = next(path.glob("*/rank-*"))
    loaded, into = shards.read(path), torch.empty(2048, width)
    loaded.copy(names[0], "", loaded.weights[names[0]], 5000, into)
    assert torch.equal(into, values[5000:7048])
    if sys.platform == "linux":
        assert resident(file) <= 6 << 20  # 1 MB is wanted, which lies under three sums; pages come in groups
    at = file.read_bytes().index(values[60_000].numpy().tobytes())
    with open(file, "r+b") as opened:
        opened.seek(at)
        opened.write(b"\xff")
    again = shards.read(path)
    again.copy(names[0], "", again.weights[names[0]], 5000, into)
    with pytest.raises(UserError, match="its check sums are wrong; copy the folder again") as error:
        again.copy(names[0], "", again.weights[names[0]], 59_000, into)
    assert str(error.value).startswith(f"--load-model={file}: ")


def resident(file: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            inside = line.endswith(str(file))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_saves_at_one_position_and_of_earlier_runs(tmp_path):
    """What was written last counts, whatever its position; one save is there at a time, and other files in the folder are left alone."""
    path = tmp_path / "model"
    for seed, (batch, world) in enumerate([(3, 2), (3, 2), (9, 3), (1, 4), (1, 1)]):
        save(path, made(seed), world, batch)
        assert the_save(path).name == f"save-{seed + 1}-epoch-1-batch-{batch}"
        assert len(list(the_save(path).iterdir())) == world + 1
        loaded = shards.read(path)
        assert_same(copied(loaded), made(seed))
        assert loaded.progress.batch == batch
    shutil.copytree(the_save(path), tmp_path / "kept")  # one save by itself
    save(path, made(9), 2)
    assert_same(copied(shards.read(tmp_path / "kept")), made(4))
    assert_same(copied(shards.read(the_save(path))), made(9))


def test_a_save_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    path, read = tmp_path / "model", shards._read
    save(path, made(1), 2)

    def slow(path, folder):
        if folder.name.startswith("save-1-"):
            save(path, made(2), 2)
        return read(path, folder)

    monkeypatch.setattr(shards, "_read", slow)
    assert_same(copied(shards.read(path)), made(2))


# before the run


def checked(path: Path, world: int) -> list[str | None]:
    return [error and str(error) for error in Hub(world).run(lambda ranks: shards.check_writable(path, ranks))]


def test_where_a_folder_can_be_written(tmp_path):
    path = tmp_path / "model"
    assert checked(path, 3) == [None] * 3 and [entry.name for entry in path.iterdir()] == [".saves"]
    with pytest.raises(UserError, match="holds no whole checkpoint; the run that wrote it ended before"):  # killed before its first
        shards.read(path)
    assert checked(path, 2) == [None] * 2 and checked(path, 1) == [None]  # starts again there, on one rank too
    save(path, made(1), 2)
    shutil.copytree(the_save(path), path / "save-7-epoch-0-batch-1")
    (path / "save-7-epoch-0-batch-1" / "index.pt").unlink()  # a killed run's
    (path / ".probe-12-1").touch()
    (path / ".DS_Store").touch()
    assert checked(path, 4) == [None] * 4
    assert sorted(entry.name for entry in path.iterdir()) == [".DS_Store", ".saves", "save-1-epoch-1-batch-3"]
    assert checked(path, 1) == [None]  # a single rank goes on with it
    assert_same(copied(shards.read(path)), made(1))


def test_where_it_cannot(tmp_path):
    (tmp_path / "file.pt").touch()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    for path, says in (("file.pt", "is a file, and a run on 2 ranks writes a folder"), ("mine", "holds other things, as thesis.tex"),
                       ("none/model", "does not exist"), ("/proc/model", "cannot write there")):  # fmt: skip
        first, second = checked(tmp_path / path, 2)
        assert first.startswith(f"--save-model={tmp_path / path}: ") and says in first and second.startswith(f"--save-model={tmp_path / path}: ")
    assert "is a folder; name a file in it" in checked(tmp_path / "empty", 1)[0]
    assert sorted(entry.name for entry in tmp_path.rglob("*")) == ["empty", "file.pt", "mine", "thesis.tex"]


def test_hosts_that_do_not_share_the_folder(tmp_path):
    places = [tmp_path / "host0", tmp_path / "host1"]
    for place in places:
        place.mkdir()
    errors = Hub(2).run(lambda ranks: shards.check_writable(places[ranks.rank] / "model", ranks))
    assert all("rank 1 cannot write there (No such file or directory; all hosts must share the folder)" in str(error) for error in errors)


# other readers


def test_readers_of_one_file_name_the_way_out(tmp_path, capsys):
    path = tmp_path / "model"
    save(path, made(1), 2)
    with pytest.raises(UserError, match=f"is a folder; of a run .* make one file: python -m dlrm_xla.export_checkpoint {path} OUT.pt"):
        checkpoint_file.read(path)
    with pytest.raises(UserError, match="is the index of a folder; --load-model wants the folder itself"):
        checkpoint_file.read(next(path.glob("*/index.pt")))
    with pytest.raises(UserError, match="Is a directory"):
        shards.read(tmp_path)
    with pytest.raises(UserError, match="No such file"):
        shards.read(tmp_path / "none")
    (tmp_path / "out.pt").write_text("kept")
    next(path.glob("*/rank-00001*")).unlink()
    assert export_checkpoint.main([str(path), str(tmp_path / "out.pt")]) == 2
    line = capsys.readouterr().err
    assert line.startswith(f"error: {path}") and "the file is missing" in line and line.count("\n") == 1
    assert (tmp_path / "out.pt").read_text() == "kept"
    checkpoint_file.write(checkpoint_of(tmp_path / "one.pt", made(1), 3, meta=False))
    assert export_checkpoint.main([str(tmp_path / "one.pt"), str(tmp_path / "out.pt")]) == 2
    assert "is one file already" in capsys.readouterr().err
