"""The checkpoint of a run on several ranks: a folder, in which each rank has written what it holds.

    PATH/save-12-epoch-0-batch-400/rank-00001-of-00004.pt   row ranges of tables and of their optimizer's state, with check sums
                                   index.pt                 a checkpoint_file.py without numbers: shapes, progress, flags; the files' sizes

A save goes into a folder of its own and counts once its index is there, which rank 0 writes when every rank's file is on the disk. Older folders go
after that, so whenever ranks are killed the newest index is that of a whole save; what lies beside it is removed by the next one. Readers map the
files and copy the row ranges that they want, whatever ranks or layout wrote them.

torch.distributed.checkpoint (torch 2.9) would need a process group, which ranks of torch_xla do not have, or planners of our own that turn stores
into chunks; it loads its metadata with pickle, which runs what is in the file; it has no check sums and overwrites the checkpoint before.
"""

import errno
import os
import re
import secrets
import shutil
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dlrm_xla import checkpoint_file
from dlrm_xla.checkpoint_file import MARK, SAVE, Checkpoint, alone, content_of, load, put
from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

INDEX = "index.pt"
PROBE = ".probe-"
SUM_BYTES = 1 << 20  # under one check sum: what a reader reads beyond its rows, at most, on either side


@dataclass(frozen=True)
class Writers:
    """gather(numbers): three small integers of each rank, to every rank: [world][3]. Raises where a rank is gone."""

    rank: int
    world: int
    gather: Callable[[list[int]], list[list[int]]]


def writers_of(backend) -> Writers:
    collectives = backend.collectives

    def gather(numbers: list[int]) -> list[list[int]]:
        if collectives.world == 1:
            return [numbers]
        return collectives.all_gather(torch.tensor([numbers], dtype=torch.int32).to(backend.device)).tolist()

    return Writers(collectives.rank, collectives.world, gather)


@dataclass(frozen=True)
class Piece:
    """Rows [first, first + n) of a parameter or kept buffer (`key` empty) or of what the optimizer keeps for it: values [n, ...], or a 0-D tensor."""

    name: str
    key: str
    first: int
    values: Tensor


def check_writable(path: Path, ranks: Writers) -> None:
    """UserError, on all ranks, where a checkpoint could not be written there; one rank writes a file, or goes on with a folder."""
    if ranks.world == 1 and not checkpoint_file.has_saves(path):
        checkpoint_file.check_writable(path)
        return

    def probe() -> tuple[int, int]:
        if ranks.rank == 0:
            _refuse(path, ranks.world)
            path.mkdir(exist_ok=True)
            (path / MARK).touch()
            (path / f"{PROBE}{stamp}").touch()
        return stamp, 0

    def look() -> None:
        os.stat(path / f"{PROBE}{stamp}")
        mine = path / f"{PROBE}{stamp}-{ranks.rank}"
        mine.touch()
        mine.unlink()

    stamp = secrets.randbits(31)
    stamp, _ = _together(ranks, path, probe)
    _together(ranks, path, look)
    if ranks.rank == 0:
        _tidy(path, newest(path))


def _refuse(path: Path, world: int) -> None:
    if not path.parent.is_dir():
        raise UserError(f"--save-model={path}: the folder {path.parent} does not exist; make it, or choose another place")
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"--save-model={path}: is a file, and a run on {world} ranks writes a folder; choose another place")
    others = [entry.name for entry in path.glob("*") if not entry.name.startswith((".", SAVE))]
    if others:
        raise UserError(f"--save-model={path}: is a folder that holds other things, as {others[0]}; choose another place")


def _together(ranks: Writers, path: Path, action: Callable[[], tuple[int, int] | None]) -> tuple[int, int]:
    """Does it on every rank and waits for all; gives what it gave on rank 0. UserError on all ranks where it failed on one."""
    refused, code, given = None, 0, None
    try:
        given = action()
    except UserError as error:
        refused, code = error, -1
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        code = getattr(error, "errno", None) or getattr(error.__context__, "errno", None) or errno.EIO
    said = ranks.gather([code, *(given or (0, 0))])
    if refused is not None:
        raise refused
    for rank, (failed, *_) in enumerate(said):
        if failed:
            reason = os.strerror(failed) if failed > 0 else "see its own message"
            if failed == errno.ENOENT:
                reason += "; all hosts must share the folder"
            raise UserError(f"--save-model={path}: rank {rank} cannot write there ({reason}); free some space or choose another place")
    return said[0][1], said[0][2]


def write(checkpoint: Checkpoint, order: list[str], pieces: list[Piece], ranks: Writers) -> None:
    """A save under `checkpoint.path`; the one before it stays until it is whole. All ranks return, or all raise UserError.

    checkpoint  with tensors on "meta" where their numbers are in pieces; rank 0's counts
    order       names of what the optimizer's state is of, by its position there
    pieces      that this rank writes; all ranks together write every row of every tensor once
    """
    path = checkpoint.path

    def begin() -> tuple[int, int]:
        if ranks.rank:
            return 0, 0
        path.mkdir(exist_ok=True)
        number = 1 + max((_number(save) for save in _saves(path)), default=0)
        _tidy(path, newest(path))
        return number, secrets.randbits(31)

    def write_pieces() -> None:
        folder.mkdir(exist_ok=True)
        listed = []
        for piece in pieces:
            values = alone(piece.values)
            listed.append({"name": piece.name, "key": piece.key, "first": piece.first, "values": values, "sums": _sums(values)})
        put(folder / _file(ranks.rank, ranks.world), {"version": 1, "stamp": stamp, "rank": ranks.rank, "world": ranks.world, "pieces": listed})

    def write_index() -> None:
        if ranks.rank == 0:
            content, names = content_of(checkpoint), [_file(rank, ranks.world) for rank in range(ranks.world)]
            files = [{"name": name, "bytes": (folder / name).stat().st_size} for name in names]
            content["dlrm_xla"]["shards"] = {"version": 1, "stamp": stamp, "files": files, "order": order}
            sync_folder(path)  # the folder itself, before its index makes it count
            put(folder / INDEX, content)

    number, stamp = _together(ranks, path, begin)
    folder = path / f"{SAVE}{number}-epoch-{checkpoint.progress.epoch}-batch-{checkpoint.progress.batch}"
    try:
        _together(ranks, path, write_pieces)
        _together(ranks, path, write_index)
    except UserError:
        if ranks.rank == 0:  # a full disk wants its space back
            shutil.rmtree(folder, ignore_errors=True)
        raise
    if ranks.rank == 0:
        _tidy(path, folder)


def _file(rank: int, world: int) -> str:
    return f"rank-{rank + 1:05}-of-{world:05}.pt"


def _number(save: Path) -> int:
    return int(re.match(rf"{SAVE}(\d+)", save.name)[1])


def _saves(path: Path) -> list[Path]:
    """The folders of saves, whole or not, the newest last."""
    return sorted((save for save in path.glob(f"{SAVE}*") if re.match(rf"{SAVE}\d{{1,18}}-epoch-", save.name)), key=_number)


def newest(path: Path) -> Path | None:
    """The newest whole save in a folder; None where there is none."""
    return next((save for save in reversed(_saves(path)) if (save / INDEX).is_file()), None)


def _tidy(path: Path, keep: Path | None) -> None:
    """Removes all saves but one, and what a killed run has left. What cannot be removed is left to the next time."""
    with suppress(OSError):
        for probe in path.glob(f"{PROBE}*"):
            probe.unlink(missing_ok=True)
    for save in _saves(path):
        if save != keep:
            with suppress(OSError):
                (save / INDEX).unlink(missing_ok=True)  # first: without it no one takes it for whole
            shutil.rmtree(save, ignore_errors=True)


def _sums(values: Tensor) -> list[int]:
    return [zlib.crc32(_bytes(values, *span)) for span in _spans(values)]


def _spans(values: Tensor) -> list[tuple[int, int]]:
    """Rows [first, last) under each check sum; a 0-D tensor has one row."""
    rows, share = _rows(values), max(1, SUM_BYTES * _rows(values) // max(values.nbytes, 1))
    return [(first, min(first + share, rows)) for first in range(0, rows, share)]


def _rows(values: Tensor) -> int:
    return values.shape[0] if values.dim() else 1


def _bytes(values: Tensor, first: int, last: int):
    return (values[first:last] if values.dim() else values).reshape(-1).view(torch.uint8).numpy()


def read(path: Path) -> Checkpoint:
    """A folder's newest whole save (or one of its saves, named), or a file, mapped. UserError where it is damaged.

    Every rank reads: of a folder shapes, of a file all once, to check its sums. Checkpoint.copy brings the rows that a rank wants.
    """
    one = os.path.isfile(path / INDEX)
    if not one and not checkpoint_file.has_saves(path):
        return checkpoint_file.read(path, mapped=True)
    save = path if one else newest(path)
    if save is None:
        raise UserError(f"--load-model={path}: holds no whole checkpoint; the run that wrote it ended before its first was complete")
    try:
        return _read(path, save)
    except UserError:
        if one or newest(path) == save:
            raise
        return read(path)  # a run has just put a newer one in its place


def identity(loaded: Checkpoint) -> str:
    """What two ranks that have read the same save agree on, and two that have read different ones do not."""
    if loaded.shards is not None:
        return f"stamp {loaded.shards.stamp}"
    if zipfile.is_zipfile(loaded.path):
        with zipfile.ZipFile(loaded.path) as file:
            return f"check sum {zlib.crc32(repr([(part.filename, part.CRC) for part in file.infolist()]).encode()):08x}"
    return f"{os.path.getsize(loaded.path)} bytes"


def _read(path: Path, save: Path) -> Checkpoint:
    flag = f"--load-model={save / INDEX}"
    content = load(save / INDEX, flag, mapped=False)
    loaded = checkpoint_file.checkpoint_of(path, content, flag)
    try:
        shards = content["dlrm_xla"]["shards"]
        files = [(str(file["name"]), int(file["bytes"])) for file in shards["files"]]
        order, stamp = [str(name) for name in shards["order"]], shards["stamp"]
        wanted = {(name, ""): tensor for name, tensor in loaded.weights.items()}
        for at, state in ((loaded.optimizer or {}).get("state", {})).items():
            wanted |= {(order[at], key): value for key, value in state.items() if isinstance(value, Tensor) and value.is_meta}
        if shards["version"] != 1 or any(Path(name).name != name for name, _ in files):
            raise ValueError("its version or its files are not known")
    except (TypeError, KeyError, ValueError, IndexError) as error:
        raise UserError(f"{flag}: is not the index of a checkpoint ({type(error).__name__}: {str(error)[:120]})") from None
    return replace(loaded, shards=Shards(save, files, stamp, wanted, order))


@dataclass(frozen=True)
class _Stored:
    """Rows of a tensor from `first` on, in a mapped file."""

    first: int
    values: Tensor
    sums: list[int]
    file: Path

    def rows(self, first: int, last: int) -> Tensor:
        """Of its own, from 0. UserError where a check sum over one of them is wrong."""
        for (begin, end), wanted in zip(_spans(self.values), self.sums, strict=True):
            if begin < last and first < end and zlib.crc32(_bytes(self.values, begin, end)) != wanted:
                raise _damaged(self.file, "its check sums are wrong")
        return self.values[first:last] if self.values.dim() else self.values


class Shards:
    """The rank files of a save. UserError where one is missing, damaged or of another save, or where they lack rows.

    wanted  the tensors that they hold together, by name and key, on "meta"
    order   names of what the optimizer's state is of, by its position there
    """

    def __init__(self, save: Path, files: list[tuple[str, int]], stamp: int, wanted: dict[tuple[str, str], Tensor], order: list[str]):
        self.order, self.stamp = order, stamp
        self.stored: dict[tuple[str, str], list[_Stored]] = {key: [] for key in wanted}
        for name, num_bytes in files:
            self._open(save / name, num_bytes, stamp)
        for (name, key), tensor in wanted.items():
            pieces, next_row = sorted(self.stored[name, key], key=lambda piece: piece.first), 0
            for piece in pieces:
                fits = piece.values.dtype == tensor.dtype and piece.values.shape[1:] == tensor.shape[1:] and piece.values.dim() == tensor.dim()
                if piece.first != next_row or not fits:
                    raise _damaged(piece.file, f"its rows of {name} do not follow those of the others")
                next_row += _rows(piece.values)
            if next_row != _rows(tensor):
                raise _damaged(save, f"its files hold {next_row} of the {_rows(tensor)} rows of {name}")
            self.stored[name, key] = pieces

    def _open(self, file: Path, num_bytes: int, stamp: int) -> None:
        if not file.is_file():
            raise _damaged(file, "the file is missing")
        if file.stat().st_size != num_bytes:
            raise _damaged(file, f"it has {file.stat().st_size:,} bytes and should have {num_bytes:,}")
        try:
            content = load(file, "", mapped=True, check_numbers=False)
            if content["stamp"] != stamp:
                raise ValueError("it is of another checkpoint")
            for piece in content["pieces"]:
                stored = _Stored(int(piece["first"]), piece["values"], piece["sums"], file)
                if len(stored.sums) != len(_spans(stored.values)):
                    raise ValueError("check sums are missing")
                self.stored[piece["name"], piece["key"]].append(stored)
        except (UserError, TypeError, KeyError, ValueError, AttributeError) as error:
            raise _damaged(file, str(error).removeprefix(": ") or type(error).__name__) from None

    def copy(self, name: str, key: str, first: int, into: Tensor) -> None:
        """Rows [first, first + n) into `into` [n, ...]: reads nothing else, but for what shares a check sum with them."""
        last = first + _rows(into)
        for piece in self.stored[name, key]:
            begin, end = max(first, piece.first), min(last, piece.first + _rows(piece.values))
            if begin < end:
                rows = piece.rows(begin - piece.first, end - piece.first)
                (into if rows.shape == into.shape else into[begin - first : end - first]).copy_(rows)


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"--load-model={file}: {what}; copy the folder again from where the run wrote it, or load another checkpoint")
