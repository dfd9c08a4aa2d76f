"""Saves of several ranks that are damaged, and ranks that cannot write: one line, and nothing is lost."""

import errno
import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from saves import assert_same, copied, made, save, the_save

from dlrm_xla import checkpoint_file, shards
from dlrm_xla.specs import UserError


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
