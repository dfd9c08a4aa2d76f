"""Folders of checkpoints (dlrm_xla/shards.py) at the level of files: written by W ranks, read by W', damaged. Writers are threads here."""

import errno
import os
import resource
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from dlrm_xla import checkpoint_file, export_checkpoint, shards
from dlrm_xla.checkpoint_file import Checkpoint, Progress
from dlrm_xla.shards import Piece, Writers
from dlrm_xla.specs import UserError

SPLIT, LAST, ALL = "split", "last", "all"
# name and key -> (shape, type, which ranks hold it)
TENSORS = {
    ("emb_l.0.weight", ""): ((37, 8), torch.float32, SPLIT),
    ("emb_l.0.weight", "sum"): ((37, 8), torch.float32, SPLIT),
    ("emb_l.1.weight", ""): ((11, 8), torch.int8, LAST),
    ("emb_l.1.weight", "momentum"): ((11,), torch.float32, LAST),
    ("emb_l.1.weight_scale", ""): ((11,), torch.float32, LAST),
    ("emb_l.2.weight", ""): ((2, 8), torch.float32, SPLIT),  # fewer rows than ranks
    ("emb_l.3.weight", ""): ((5, 8), torch.float32, ALL),
    ("bot_l.0.weight", ""): ((4, 3), torch.float32, ALL),
    ("bot_l.0.weight", "sum"): ((4, 3), torch.float32, ALL),
    ("emb_l.3.codes", ""): ((6,), torch.int64, ALL),
    ("int8_clock.8", ""): ((), torch.int32, ALL),
}
ORDER = ["emb_l.0.weight", "emb_l.1.weight", "emb_l.1.weight_scale", "emb_l.2.weight", "emb_l.3.weight", "bot_l.0.weight"]
State = dict[tuple[str, str], torch.Tensor]


def made(seed: int) -> State:
    torch.manual_seed(seed)
    return {at: (torch.randn(shape) * 50).to(dtype) for at, (shape, dtype, _) in TENSORS.items()}


def range_of(at, rank: int, world: int) -> tuple[int, int]:
    """Rows that a rank holds."""
    shape, _, where = TENSORS[at]
    rows = shape[0] if shape else 1
    share = -(-rows // world)
    if where == SPLIT:
        return min(rank * share, rows), min((rank + 1) * share, rows)
    return (0, rows) if where == ALL or rank == world - 1 else (0, 0)


def pieces_of(state: State, rank: int, world: int) -> list[Piece]:
    found = []
    for at, values in state.items():
        first, last = range_of(at, rank, world)
        if first < last and (TENSORS[at][2] != ALL or rank == 0):
            found.append(Piece(*at, first, values[first:last] if values.dim() else values))
    return found


def checkpoint_of(path: Path, state: State, batch: int, meta: bool) -> Checkpoint:
    def shown(values):
        return values.to("meta") if meta else values

    states = {
        at: {"step": torch.tensor(7.0), **{key: shown(state[name, key]) for other, key in state if other == name and key}}
        for at, name in enumerate(ORDER)
    }
    optimizer = {"state": states, "param_groups": [{"lr": 0.1, "params": list(range(len(ORDER)))}]}
    weights = {name: shown(values) for (name, key), values in state.items() if not key}
    progress = Progress(epoch=1, batch=batch, num_batches=9, num_epochs=2, updates=batch + 9, loss_sum=1.25, loss_rows=32.0)
    tables = [{"method": "plain", "knobs": {}, "rows": 5, "dim": 8}]
    return Checkpoint(path, weights, optimizer, progress, exact=True, flags={"learning_rate": 0.1}, tables=tables)


class Hub:
    """Writers that are threads."""

    def __init__(self, world: int):
        self.world, self.said, self.barrier = world, [None] * world, threading.Barrier(world, timeout=60)

    def ranks(self, rank: int) -> Writers:
        def gather(numbers):
            assert len(numbers) == 3
            self.said[rank] = numbers
            self.barrier.wait()
            said = list(self.said)
            self.barrier.wait()
            return said

        return Writers(rank, self.world, gather)

    def run(self, action) -> list:
        """action(ranks) on every rank: what it gave, or the UserError that it raised."""
        results = [None] * self.world

        def work(rank):
            try:
                results[rank] = action(self.ranks(rank))
            except UserError as error:
                results[rank] = error
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def save(path: Path, state: State, world: int, batch: int = 3) -> list:
    return Hub(world).run(
        lambda ranks: shards.write(checkpoint_of(path, state, batch, meta=True), ORDER, pieces_of(state, ranks.rank, world), ranks)
    )


def copied(loaded: Checkpoint, rank: int = 0, world: int = 1) -> State:
    """What one of `world` ranks takes from it."""
    states = {(name, key): value for at, name in enumerate(ORDER) for key, value in loaded.optimizer["state"][at].items() if key != "step"}
    found = {}
    for at, values in {**{(name, ""): values for name, values in loaded.weights.items()}, **states}.items():
        first, last = range_of(at, rank, world)
        into = torch.empty((last - first, *values.shape[1:]) if values.dim() else (), dtype=values.dtype)
        loaded.copy(*at, values, first, into)
        found[at] = into
    return found


def assert_same(found: State, state: State, rank: int = 0, world: int = 1) -> None:
    assert found.keys() == state.keys()
    for at, values in state.items():
        first, last = range_of(at, rank, world)
        assert torch.equal(found[at], values[first:last] if values.dim() else values), at


def the_save(path: Path) -> Path:
    [one] = path.glob("save-*")
    return one


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


def equal(one, other) -> bool:
    """Values, types and the order of keys."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other


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


def damage(kind: str, path: Path) -> str:
    """Damages a folder that two ranks wrote; returns the name of what an error is to name."""
    file, index = next(path.glob("*/rank-00002*")), next(path.glob("*/index.pt"))
    if kind == "missing":
        file.unlink()
    elif kind.startswith("cut"):
        file.write_bytes(file.read_bytes()[: {"cut to nothing": 0, "cut": 100, "cut at its end": -1}[kind]])
    elif kind == "same length, cut":
        file.write_bytes(file.read_bytes()[:-400] + bytes(400))
    elif kind == "of another save":
        save(path.parent / "other", made(2), 2)
        shutil.copy(next((path.parent / "other").glob(f"*/{file.name}")), file)
    elif kind == "of another rank":
        shutil.copy(file.with_name("rank-00001-of-00002.pt"), file)
        return "rank-0000"
    elif kind == "a list":
        checkpoint_file.put(file, [1] * 5)
        return edit_index(index, lambda content: content["dlrm_xla"]["shards"]["files"][1].update(bytes=file.stat().st_size)) or file.name
    elif kind == "text":
        file.write_bytes(b"x" * file.stat().st_size)
    elif kind == "index cut":
        index.write_bytes(index.read_bytes()[:-30])
        return index.name
    elif kind == "index without files":
        edit_index(index, lambda content: content["dlrm_xla"]["shards"]["files"].pop())
        return path.name
    elif kind == "index of something else":
        edit_index(index, lambda content: content["dlrm_xla"]["shards"].pop("order"))
        return index.name
    elif kind == "index that names a file elsewhere":
        edit_index(index, lambda content: content["dlrm_xla"]["shards"]["files"][0].update(name="../x.pt"))
        return index.name
    else:
        index.unlink()
        return path.name
    return file.name


def edit_index(index: Path, edit) -> None:
    content = torch.load(index, weights_only=True)
    edit(content)
    checkpoint_file.put(index, content)


@pytest.mark.parametrize(
    "kind",
    [
        "missing", "cut to nothing", "cut", "cut at its end", "same length, cut", "of another save", "of another rank", "a list", "text",
        "index cut", "index without files", "index of something else", "index that names a file elsewhere", "no index",
    ],
)  # fmt: skip
def test_a_damaged_folder_is_one_line_that_names_the_file(tmp_path, kind):
    path = tmp_path / "model"
    save(path, made(1), 2)
    named = damage(kind, path)
    with pytest.raises(UserError) as error:
        copied(shards.read(path))
    line = str(error.value)
    assert line.startswith("--load-model=") and named in line and "\n" not in line and line.count("--load-model") == 1
    assert any(way in line for way in ("copy the folder again", "is it complete?", "not the index", "ended before")), line


def test_wrong_bytes_anywhere_are_refused_or_change_nothing(tmp_path):
    path = tmp_path / "model"
    save(path, made(1), 2)
    refused, file = 0, next(path.glob("*/rank-00001*"))
    content = file.read_bytes()
    for position in range(0, len(content), 61):
        flipped = bytearray(content)
        flipped[position] ^= 0x41
        file.write_bytes(flipped)
        try:
            assert_same(copied(shards.read(path)), made(1))
        except UserError as error:
            refused += 1
            assert str(error).startswith(f"--load-model={file}: ") and "\n" not in str(error)
    assert refused > 10


def test_code_in_a_rank_file_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    path = tmp_path / "model"
    save(path, made(1), 2)
    file, index = next(path.glob("*/rank-00001*")), next(path.glob("*/index.pt"))
    torch.save({"stamp": Evil()}, file)
    edit_index(index, lambda content: content["dlrm_xla"]["shards"]["files"][0].update(bytes=file.stat().st_size))
    with pytest.raises(UserError, match="holds more than tensors and numbers"):
        shards.read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("code, says", [(errno.ENOSPC, "No space left on device"), (errno.ENOENT, "all hosts must share")])
def test_a_rank_that_cannot_write(tmp_path, monkeypatch, victim, code, says):
    """All ranks say so, the save before stays, and nothing is left of the new one."""
    path, put = tmp_path / "model", checkpoint_file.put
    save(path, made(1), 2)

    def full(file, content):
        if file.name.startswith(f"rank-{victim + 1:05}"):
            raise OSError(code, os.strerror(code))
        put(file, content)

    monkeypatch.setattr(shards, "put", full)
    errors = save(path, made(2), 3)
    assert len({str(error) for error in errors}) == 1 and f"--save-model={path}: rank {victim} " in str(errors[0]) and says in str(errors[0])
    assert the_save(path).name.startswith("save-1-")
    assert_same(copied(shards.read(path)), made(1))


def test_a_full_disk_while_torch_writes(tmp_path):
    """torch's writer keeps the reason to itself."""
    path, soft_and_hard = tmp_path / "model", resource.getrlimit(resource.RLIMIT_FSIZE)
    save(path, made(1), 2)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, soft_and_hard[1]))
    try:
        errors = save(path, made(2), 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, soft_and_hard)
        signal.signal(signal.SIGXFSZ, handler)
    assert str(errors[1]).startswith(f"--save-model={path}: rank 0 cannot write there (File too large); free some space")
    assert the_save(path).name.startswith("save-1-")
    assert_same(copied(shards.read(path)), made(1))


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
