"""The file of a checkpoint, in upstream's format: reading it, and writing it whole or not at all.

Differs from upstream: nothing but tensors, numbers and text is ever unpickled (upstream's own files hold a NumPy number, which is let
through by name), the file is written beside and put in place, and the key "dlrm_xla" holds what an exact resume needs beyond upstream's keys.
A run on several ranks writes a folder (shards.py), whose index is such a file too: the numbers of its tensors lie in other files.
"""

import errno
import glob
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

# upstream's test_acc is a NumPy float64; old and new NumPy call its constructor by different names
_NUMPY_NUMBERS = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]
SAVE = "save-"  # how the folders of shards.py begin
MARK = ".saves"  # in such a folder, before its first save too
_REQUIRED = ("state_dict", "iter", "epoch", "nepochs", "nbatches", "nbatches_test", "train_loss", "total_loss", "test_acc")


@dataclass
class Progress:
    """Where a run stands and what it has reached.

    epoch, batch          batches done: `batch` of epoch `epoch`, both counted from 0
    updates               steps of the learning rate's course
    loss_sum, loss_rows   of the mean loss that the next log line will print
    """

    epoch: int = 0
    batch: int = 0
    num_epochs: int = 0
    num_batches: int = 0
    num_test_batches: int = 0
    train_loss: float = 0.0
    test_accuracy: float = 0.0
    test_auc: float | None = None
    best_accuracy: float = 0.0
    best_auc: float = 0.0
    updates: int = 0
    loss_sum: float = 0.0
    loss_rows: float = 0.0


@dataclass
class Checkpoint:
    """A file that was read. `exact`: it is ours and holds everything an exact resume needs; `learning_rate`: of the next update.

    Of a folder the tensors are on "meta", shapes only, and `shards` has their numbers; `copy` takes them from where they are.
    """

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict | None
    progress: Progress
    exact: bool
    learning_rate: float | None = None
    flags: dict = field(default_factory=dict)
    # of each table the method that made it, its knobs, ids ("rows") and length of a vector ("dim"); None: a file that does not say
    tables: list[dict] | None = None
    shards: "Rows | None" = None

    def copy(self, name: str, key: str, found: Tensor, first: int, into: Tensor) -> None:
        """Rows [first, first + n) of `found` into `into` [n, ...]; a 0-D tensor as it is. UserError where they are damaged.

        found: weights[name], where `key` is empty, or what the optimizer calls `key` of that parameter
        """
        if found.is_meta and self.shards is not None:
            self.shards.copy(name, key, first, into)
        else:
            into.copy_(found[first : first + into.shape[0]] if found.dim() else found)


class Rows(Protocol):
    """Where the numbers of a folder's tensors are."""

    def copy(self, name: str, key: str, first: int, into: Tensor) -> None:
        """As Checkpoint.copy."""


def check_writable(path: Path) -> None:
    """UserError where a checkpoint could not be written there; better at the start than after an hour."""
    beside = _beside(path)
    try:
        if path.is_dir():
            raise UserError(f"--save-model={path}: is a folder; name a file in it")
        if not path.parent.is_dir():
            raise UserError(f"--save-model={path}: the folder {path.parent} does not exist; make it, or choose another place")
        if path.exists() and not path.is_file():
            raise UserError(f"--save-model={path}: is no ordinary file and would be replaced by one; choose another place")
        open(beside, "wb").close()
        beside.unlink()
        _remove_stale(path)
    except OSError as error:
        raise UserError(f"--save-model={path}: cannot write in {path.parent} ({error.strerror}); choose another place") from None


def _beside(path: Path) -> Path:
    """Where a file is written before it is put in its place."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_stale(path: Path) -> None:
    """Removes what a run that was killed while it wrote has left beside: files whose process is no more."""
    for stale in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = stale.name.split(".")[-2]
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            stale.unlink(missing_ok=True)
        except (ValueError, OSError, OverflowError):  # not ours, or alive
            continue


def write(checkpoint: Checkpoint) -> None:
    """The file `checkpoint.path`, with upstream's keys and ours, whole or not at all. Every tensor is to be `alone`."""
    path = checkpoint.path
    try:
        put(path, content_of(checkpoint))
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--save-model={path}: cannot be written ({reason}); free some space or choose another place") from None


def content_of(checkpoint: Checkpoint) -> dict:
    """What a file holds, with upstream's keys and ours."""
    progress = checkpoint.progress
    content = {
        "nepochs": progress.num_epochs,
        "nbatches": progress.num_batches,
        "nbatches_test": progress.num_test_batches,
        "state_dict": checkpoint.weights,
        "test_acc": progress.test_accuracy,
        "test_auc": progress.test_auc if progress.test_auc is not None else 0.0,
        "epoch": progress.epoch,
        "iter": progress.batch,
        "train_loss": progress.train_loss,
        "total_loss": 0.0,
        "opt_state_dict": checkpoint.optimizer,
        "dlrm_xla": {"version": 1, "progress": asdict(progress), "flags": checkpoint.flags},
    }
    if checkpoint.tables is not None:
        content["dlrm_xla"]["tables"] = checkpoint.tables
    if not checkpoint.exact:
        content["dlrm_xla"]["exact"] = False
    return content


def put(path: Path, content: dict) -> None:
    """The file, on the disk, whole or not at all. OSError, or RuntimeError of torch's writer, where that fails; nothing is left then."""
    beside = _beside(path)
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError):
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise


def alone(part: Tensor) -> Tensor:
    """The same numbers as a tensor of their own: torch.save writes all the memory that a view is cut from. Only a view with gaps is copied."""
    if part.is_meta:
        return part
    return torch.from_numpy(part.numpy()) if part.is_contiguous() and part.nelement() else part.clone()


def read(path: Path, mapped: bool = False) -> Checkpoint:
    """Reads ours, upstream's, or the TPU port's file. UserError where it cannot be read or lacks something.

    mapped: tensors stay in the file until they are looked at (not in files of torch before 1.6, which cannot be mapped).
    """
    flag = f"--load-model={path}"
    if has_saves(path):
        raise UserError(f"{flag}: is a folder; of a run on several ranks make one file: python -m dlrm_xla.export_checkpoint {path} OUT.pt")
    content = load(path, flag, mapped)
    if isinstance(content.get("dlrm_xla"), dict) and "shards" in content["dlrm_xla"]:
        raise UserError(f"{flag}: is the index of a folder; --load-model wants the folder itself: {path.parent}")
    return checkpoint_of(path, content, flag)


def has_saves(path: Path) -> bool:
    """Is it the folder of a run on several ranks, with or without a save in it?"""
    return os.path.isdir(path) and ((path / MARK).exists() or any(path.glob(f"{SAVE}[0-9]*-epoch-*")))


def load(path: Path, flag: str, mapped: bool, check_numbers: bool = True) -> dict:
    """What torch.save has written, a dict of tensors, numbers and text. UserError, which begins with `flag`, for anything else.

    check_numbers: check the sums of mapped tensors too, which reads all of the file
    """
    try:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            mapped = mapped and zipfile.is_zipfile(path)
            if mapped:  # a map is not checked otherwise
                _check_sums(path, check_numbers)
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError as error:
        # a file that is cut off can send torch to a place before its beginning
        if error.errno == errno.EINVAL:
            raise UserError(f"{flag}: not a readable checkpoint; is it complete?") from None
        raise UserError(f"{flag}: cannot be read ({error.strerror or error})") from None
    except Exception as error:  # the unpickler meets anything in a damaged file; whatever it says, the file is not a checkpoint
        reason = (str(error).split("WeightsUnpickler error:")[-1].strip() or type(error).__name__).splitlines()[0][:120]
        signs = ("Unsupported global", "Unsupported class", "unsupported GLOBAL", "unrecognized function", "whose module", "is blocked")
        if any(sign in str(error) for sign in signs):
            raise UserError(f"{flag}: holds more than tensors and numbers, so it is not loaded; save it again with plain values") from None
        raise UserError(f"{flag}: not a readable checkpoint; is it complete? ({reason})") from None
    if not isinstance(content, dict):
        raise UserError(f"{flag}: holds a {type(content).__name__}, not a checkpoint of DLRM")
    return content


def _check_sums(path: Path, check_numbers: bool) -> None:
    """Raises all sorts of errors where a sum is wrong."""
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if check_numbers or "/data/" not in name:
                with archive.open(name) as record:
                    while record.read(1 << 20):
                        pass


def checkpoint_of(path: Path, content: dict, flag: str) -> Checkpoint:
    """What a file's content says. UserError, which begins with `flag`, where it is no checkpoint."""
    missing = [key for key in _REQUIRED if key not in content]
    if missing:
        raise UserError(f"{flag}: is not a whole checkpoint of DLRM: it lacks {', '.join(missing)}")
    try:
        return _checkpoint(path, content)
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise UserError(f"{flag}: has wrong values where a checkpoint of DLRM has its own ({reason})") from None


def _checkpoint(path: Path, content: dict) -> Checkpoint:
    """Raises all sorts of errors where a value is of the wrong kind."""
    weights, optimizer, ours = content["state_dict"], content.get("opt_state_dict") or None, content.get("dlrm_xla")
    if not all(isinstance(name, str) and isinstance(weight, Tensor) for name, weight in weights.items()):
        raise TypeError("state_dict is not names and tensors")
    if optimizer is not None:
        states = [state.values() for state in optimizer["state"].values()]
        if not all(isinstance(value, Tensor | float | int | None) for state in states for value in state):
            raise TypeError("opt_state_dict holds something else than numbers")
        [len(group["params"]) for group in optimizer["param_groups"]]
    progress = _upstream_progress(content) if ours is None else Progress(**ours["progress"])
    if min(progress.epoch, progress.batch, progress.updates) < 0:
        raise ValueError(f"it stands at epoch {progress.epoch}, batch {progress.batch}")
    return Checkpoint(
        path=path,
        weights={name.replace(".embtable.weight", ".weight"): tensor for name, tensor in weights.items()},
        optimizer=optimizer,
        progress=progress,
        exact=ours is not None and bool(ours.get("exact", True)),
        learning_rate=_group_rate(optimizer),
        flags=ours["flags"] if ours else {},
        tables=_tables(ours.get("tables")) if ours else None,
    )


def _tables(found) -> list[dict] | None:
    """What a file says of its tables. Raises TypeError or KeyError where that is something else."""
    if found is None:
        return None
    sizes = ("rows", "dim")  # not in files of the first version
    return [{"method": str(one["method"]), "knobs": dict(one["knobs"]), **{key: int(one[key]) for key in sizes if key in one}} for one in found]


def _upstream_progress(content: dict) -> Progress:
    accuracy, auc = float(content["test_acc"]), content.get("test_auc")
    return Progress(
        epoch=int(content["epoch"]),
        batch=int(content["iter"]),
        num_epochs=int(content["nepochs"]),
        num_batches=int(content["nbatches"]),
        num_test_batches=int(content["nbatches_test"]),
        train_loss=float(content["train_loss"]),
        test_accuracy=accuracy,
        test_auc=None if auc is None else float(auc),
        best_accuracy=accuracy,
        best_auc=0.0 if auc is None else float(auc),
        # upstream saves no scheduler; without gradient accumulation it has made a step for every batch
        updates=int(content["epoch"]) * int(content["nbatches"]) + int(content["iter"]),
        loss_sum=float(content["total_loss"]),
    )


def _group_rate(optimizer: dict | None) -> float | None:
    try:
        return float(optimizer["param_groups"][0]["lr"])
    except (TypeError, KeyError, IndexError, ValueError):
        return None
