"""Checkpoints in upstream's format, both ways: one file with upstream's keys and parameter names, readable by upstream's --load-model.

Differs from upstream: nothing but tensors, numbers and text is ever unpickled (upstream's own files hold a NumPy number, which is let
through by name), the file is written beside and put in place, and the key "dlrm_xla" holds what an exact resume needs beyond upstream's keys.
"""

import errno
import glob
import os
import zipfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.specs import UserError
from dlrm_xla.train import NotFiniteLoss, Trainer

# upstream's test_acc is a NumPy float64; old and new NumPy call its constructor by different names
_NUMPY_NUMBERS = [
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    (np._core.multiarray.scalar, "numpy._core.multiarray.scalar"),
    np.dtype,
    np.dtypes.Float64DType,
    np.dtypes.Float32DType,
    np.dtypes.Int64DType,
]
_REQUIRED = ("state_dict", "iter", "epoch", "nepochs", "nbatches", "nbatches_test", "train_loss", "total_loss", "test_acc")
_TORCH_GROUPS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


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
    """A file that was read. `exact`: it is ours and holds everything an exact resume needs; `learning_rate`: of the next update."""

    path: Path
    weights: dict[str, Tensor]
    optimizer: dict | None
    progress: Progress
    exact: bool
    learning_rate: float | None = None
    flags: dict = field(default_factory=dict)
    # of each table the method that made it, its knobs, ids ("rows") and length of a vector ("dim"); None: a file that does not say
    tables: list[dict] | None = None


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


def save(path: Path, trainer: Trainer, progress: Progress, flags: dict) -> None:
    """Writes the file whole or not at all: an earlier one stays until the new one is on the disk, and where a number is not finite."""
    parts = parameters(trainer)
    for name, weight, state in parts:
        # the loss looks finite until the next batch uses what an update has ruined
        if not all(limit.isfinite() for values in (weight, *state.values()) for limit in torch.aminmax(values)):
            raise NotFiniteLoss(progress.batch, f"after batch {{batch}} a number in {name}")
    state_dict = {name: alone(weight) for name, weight, _ in parts} | {name: alone(buffer.cpu()) for name, buffer in kept(trainer.tables)}
    tables = None
    if any(table.made_by for table in trainer.tables.tables):
        made_by = [asdict(table.made_by) if table.made_by else {"method": "plain", "knobs": {}} for table in trainer.tables.tables]
        specs = [table.spec for table in trainer.tables.tables]
        tables = [{**one, "rows": spec.num_embeddings, "dim": spec.embedding_dim} for one, spec in zip(made_by, specs, strict=True)]
    write(Checkpoint(path, state_dict, _optimizer_state(trainer, parts), progress, exact=True, flags=flags, tables=tables))


def write(checkpoint: Checkpoint) -> None:
    """The file `checkpoint.path`, with upstream's keys and ours, whole or not at all. Every tensor is to be `alone`."""
    path, progress = checkpoint.path, checkpoint.progress
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
    beside = _beside(path)
    try:
        with open(beside, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into a RuntimeError
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--save-model={path}: cannot be written ({reason}); free some space or choose another place") from None


def alone(part: Tensor) -> Tensor:
    """The same numbers as a tensor of their own: torch.save writes all the memory that a view is cut from. Only a view with gaps is copied."""
    return torch.from_numpy(part.numpy()) if part.is_contiguous() and part.nelement() else part.clone()


def read(path: Path, mapped: bool = False) -> Checkpoint:
    """Reads ours, upstream's, or the TPU port's file. UserError where it cannot be read or lacks something.

    mapped: tensors stay in the file until they are looked at (not in files of torch before 1.6, which cannot be mapped).
    """
    flag = f"--load-model={path}"
    try:
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            mapped = mapped and zipfile.is_zipfile(path)
            if mapped and zipfile.ZipFile(path).testzip():  # a map is not checked otherwise
                raise ValueError("its check sums are wrong")
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


def parameters(trainer: Trainer, buffers: list[dict[str, Tensor]] | None = None) -> list[tuple[str, Tensor, dict[str, Tensor]]]:
    """(upstream's name, value, optimizer state) of everything trained, in the order of upstream's dlrm.parameters(), on the CPU.

    On the CPU the tensors are views: writing to them writes to the model.
    buffers: of each store, as RowStore.on_host() gives them, for a caller that sends them back.
    """
    states = {id(parameter): state for parameter, state in zip(trainer.dense.parameters, trainer.dense.state, strict=True)}
    listed = table_parameters(trainer.tables, lambda parameter: states.get(id(parameter), {}), buffers)
    others = [(f"v_W_l.{index}", weights) for index, weights in enumerate(trainer.tables.v_W_l if trainer.tables.v_W_l is not None else ())]
    return listed + [_dense(name, parameter, states.get(id(parameter), {})) for name, parameter in [*others, *trainer.model.named_parameters()]]


def table_parameters(
    tables: EmbeddingCollection, dense_state: Callable[[Tensor], dict[str, Tensor]], buffers: list[dict[str, Tensor]] | None = None
) -> list[tuple[str, Tensor, dict[str, Tensor]]]:
    """`parameters` of the tables alone. dense_state: what the optimizer keeps for a dense parameter."""
    if buffers is None:
        buffers = [store.on_host() for store in tables.stores]
    stores, listed = [store.fields(of_store) for store, of_store in zip(tables.stores, buffers, strict=True)], []
    for table, segments in zip(tables.tables, tables.segments, strict=True):
        for segment in segments:
            rows = slice(segment.start, segment.start + segment.num_rows)
            whole, store = stores[segment.store], tables.stores[segment.store]
            state = {key: whole[key][rows] for key in (*store.rule.record[1:], *store.rule.scalars)}
            for suffix, values in store.saved(whole, rows).items():
                listed.append((segment.name + suffix, values, {} if suffix else state))
        listed += [_dense(f"{table.spec.name}.{name}", parameter, dense_state(parameter)) for name, parameter in table.named_parameters()]
    return listed


def _dense(name: str, parameter: Tensor, state: dict[str, Tensor]) -> tuple[str, Tensor, dict[str, Tensor]]:
    return name, parameter.detach().cpu(), {key: value.cpu() for key, value in state.items()}


def kept(tables: EmbeddingCollection) -> list[tuple[str, Tensor]]:
    """(name, the buffer itself) of what tables keep and do not train: codes, pointers, seeds of hashes; and the clocks of int8 stores."""
    found = [(f"{table.spec.name}.{name}", buffer) for table in tables.tables for name, buffer in _persistent(table)]
    return found + [(f"int8_clock.{store.width}", store.clock) for store in tables.stores if hasattr(store, "clock")]


def _persistent(table) -> list[tuple[str, Tensor]]:
    trained = {name for name, _ in table.named_parameters()}
    return [(name, buffer) for name, buffer in table.state_dict(keep_vars=True).items() if name not in trained]


@torch.no_grad()
def restore(trainer: Trainer, checkpoint: Checkpoint, with_optimizer: bool, reset_row_state: bool = False) -> None:
    """Puts a checkpoint's weights, and its optimizer's state if asked, into the trainer's model.

    Everything is checked before anything is changed; a mismatch is a UserError that names the table or layer, the flag and both values.
    reset_row_state: leave all Adagrad sums at zero, as upstream's rwsadagrad does on resuming.
    """
    device = trainer.backend.device
    buffers = [store.on_host() for store in trainer.tables.stores]
    parts = parameters(trainer, buffers)
    buffers_kept = kept(trainer.tables)
    check_shapes(checkpoint, {name: tuple(value.shape) for name, value in [*((name, weight) for name, weight, _ in parts), *buffers_kept]})
    states = _matched_states(trainer, checkpoint, parts) if with_optimizer and not reset_row_state else None
    for index, (name, weight, state) in enumerate(parts):
        weight.copy_(checkpoint.weights[name])
        for key, value in state.items() if states is not None else ():
            value.copy_(states[index][key])
    for name, buffer in buffers_kept:
        buffer.copy_(checkpoint.weights[name])
    if device.type == "cpu":
        return
    # `parts` were copies: send them back whole, store by store
    values = {name: (weight, state) for name, weight, state in parts}
    for store, of_store in zip(trainer.tables.stores, buffers, strict=True):
        store.load(of_store)
    named = {id(parameter): name for name, parameter in _dense_names(trainer)}
    for parameter, state in zip(trainer.dense.parameters, trainer.dense.state, strict=True):
        for key, value in state.items():
            value.copy_(values[named[id(parameter)]][1][key])
    for name, parameter in _dense_names(trainer):
        parameter.copy_(values[name][0])
    trainer.backend.end_step()


def _dense_names(trainer: Trainer):
    for table in trainer.tables.tables:
        for name, parameter in table.named_parameters():
            yield f"{table.spec.name}.{name}", parameter
    for index, parameter in enumerate(trainer.tables.v_W_l if trainer.tables.v_W_l is not None else ()):
        yield f"v_W_l.{index}", parameter
    yield from trainer.model.named_parameters()


def check_shapes(checkpoint: Checkpoint, wanted: dict[str, tuple[int, ...]]) -> None:
    """UserError at the first parameter that the checkpoint lacks, has too much, or has in another shape."""
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.weights.items()}
    prefix = f"--load-model={checkpoint.path}"
    here, there = (len({name.split(".")[1] for name in names if name.startswith("emb_l.")}) for names in (wanted, found))
    if here != there:
        what = f"the number of tables is {there} in the checkpoint and {here} here"
        raise UserError(f"{prefix}: {what}; --arch-embedding-size or the data set must be as it was trained")
    for name in [*wanted, *found]:
        here, there = wanted.get(name), found.get(name)
        if here != there:
            raise UserError(f"{prefix}: {_explain(name, here, there)}")


def _explain(name: str, here: tuple[int, ...] | None, there: tuple[int, ...] | None) -> str:
    def shape(value: tuple[int, ...] | None) -> str:
        return "none" if value is None else " x ".join(map(str, value))

    if name.startswith("emb_l."):
        table = ".".join(name.split(".")[:2])
        what = f"table {table} ({name}) is {shape(there)} in the checkpoint and {shape(here)} here"
        if here is None or there is None:
            return f"{what}; --qr-flag, --md-flag, --compress and the number of tables must be those it was trained with"
        if here[0] != there[0]:
            return f"{what}; --arch-embedding-size, or --max-ind-range and the data set, must be those it was trained with"
        return f"{what}; --arch-sparse-feature-size must be {there[1]}"
    if name.startswith("v_W_l."):
        return f"the pooling weights {name} are {shape(there)} in the checkpoint and {shape(here)} here; check --weighted-pooling"
    flag = "--arch-mlp-bot" if name.startswith("bot_l") else "--arch-mlp-top (and --arch-interaction-op, --arch-interaction-itself)"
    return f"layer {name} is {shape(there)} in the checkpoint and {shape(here)} here; {flag} must be as it was trained"


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


def _optimizer_state(trainer: Trainer, parts: list) -> dict:
    """What torch's optimizer over dlrm.parameters(), or upstream's RWSAdagrad, would save.

    In debug mode upstream's optimizer has three groups, for tables, bottom and top MLP, and leaves learned pooling weights out.
    """
    rule, rate = trainer.rule.name, trainer.next_rate()
    groups = [[name for name, _, _ in parts]]
    if trainer.config.upstream_compat and trainer.config.output.debug:
        groups = [[name for name in groups[0] if name.startswith(prefix)] for prefix in ("emb_l.", "bot_l.", "top_l.")]
    order = {name: index for index, name in enumerate(name for group in groups for name in group)}
    states = {}
    for index, state in ((order[name], state) for name, _, state in parts if name in order):
        if rule == "adagrad":
            states[index] = {"step": torch.tensor(float(trainer.updates)), **{key: alone(value) for key, value in state.items()}}
        elif rule == "rwsadagrad":
            states[index] = {"step": trainer.updates, **{key: alone(value) for key, value in state.items()}}
    if rule == "rwsadagrad":
        group = {"lr": rate, "lr_decay": 0.0, "eps": 1e-10, "weight_decay": 0.0, "initial_accumulator_value": 0.0}
    else:
        group = _TORCH_GROUPS[rule]([torch.nn.Parameter(torch.zeros(1))], lr=rate).state_dict()["param_groups"][0]
    group["initial_lr"] = trainer.config.train.learning_rate
    return {"state": states, "param_groups": [{**group, "params": [order[name] for name in names]} for names in groups]}


def optimizer_name(optimizer: dict) -> str:
    """The --optimizer that a state was made by."""
    keys = {key for state in optimizer.get("state", {}).values() for key in state}
    return "rwsadagrad" if "momentum" in keys and "sum" in keys else "adagrad" if "sum" in keys else "sgd"


def _matched_states(trainer: Trainer, checkpoint: Checkpoint, parts: list) -> list[dict[str, Tensor]]:
    """For each parameter its Adagrad sums from the checkpoint; zeros for one that it has none for. UserError for another optimizer's."""
    prefix = f"--load-model={checkpoint.path}"
    if checkpoint.optimizer is None:
        raise UserError(f"{prefix}: has no optimizer's state, so training cannot go on from it; use --inference-only")
    saved, made_by = checkpoint.optimizer.get("state", {}), optimizer_name(checkpoint.optimizer)
    if made_by != trainer.rule.name:
        raise UserError(f"{prefix}: was trained with --optimizer={made_by}, and --optimizer={trainer.rule.name} cannot go on from its state")
    order = list(range(len(parts)))
    if sum(len(group["params"]) for group in checkpoint.optimizer["param_groups"]) != len(parts):
        # upstream's --debug-mode leaves the learned pooling weights out
        order = [index for index in order if not parts[index][0].startswith("v_W_l.")]
    matched: list[dict[str, Tensor]] = [{key: torch.zeros_like(value) for key, value in state.items()} for _, _, state in parts]
    for position, index in enumerate(order):
        name, _, wanted = parts[index]
        for key, value in wanted.items():
            found = saved.get(position, {}).get(key)
            if found is None:
                continue
            if found.shape != value.shape:
                raise UserError(f"{prefix}: the optimizer's {key} of {name} is {tuple(found.shape)} in the checkpoint and {tuple(value.shape)} here")
            matched[index][key] = found
    return matched


def resume(trainer: Trainer, loaded: Checkpoint, config: Config) -> Progress:
    """Puts a checkpoint into the trainer and says where the run goes on; for --inference-only its weights only.

    With --upstream-compat the learning rate's course starts anew (its first update at the saved rate) and rwsadagrad's sums at zero.
    """
    compat = config.upstream_compat
    if config.inference_only:
        restore(trainer, loaded, with_optimizer=False)
        return Progress()
    restore(trainer, loaded, with_optimizer=True, reset_row_state=compat and config.train.optimizer == "rwsadagrad")
    progress = replace(loaded.progress)
    if compat:
        trainer.first_rate = loaded.learning_rate
        progress.loss_sum = progress.loss_rows = 0.0
        progress.best_accuracy, progress.best_auc = progress.test_accuracy, 0.0
    else:
        trainer.updates = progress.updates if loaded.exact else progress.updates // config.train.accumulate
    return progress
