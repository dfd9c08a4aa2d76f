"""Checkpoints of a trainer, both ways, with upstream's parameter names and optimizer state: upstream's --load-model reads ours, we read its.

The file itself is checkpoint_file.py's; on several ranks it is a folder, shards.py's.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dlrm_xla import shards
from dlrm_xla.checkpoint_file import Checkpoint, Progress, alone, has_saves, write
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.sharding import EVERYWHERE
from dlrm_xla.shards import Piece, Writers, writers_of
from dlrm_xla.specs import UserError
from dlrm_xla.train import NotFiniteLoss, Trainer

_TORCH_GROUPS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


SUFFIXES = ("", "_scale")  # of what stores keep of a part (`saved` of them)
Parameters = list[tuple[str, Tensor, dict[str, Tensor]]]  # upstream's name, value, optimizer state


def save(path: Path, trainer: Trainer, progress: Progress, flags: dict) -> None:
    """Writes the file, or the folder of several ranks, whole or not at all: an earlier one stays until the new one is on the disk, and where a
    number is not finite. All ranks call it; all return, or all raise."""
    ranks, parts = writers_of(trainer.backend), parameters(trainer)
    _check_finite(ranks, parts, progress)
    buffers = [(name, buffer.cpu()) for name, buffer in kept(trainer.tables)]
    if ranks.world == 1 and not has_saves(path):
        write(_checkpoint(path, trainer, parts, buffers, progress, flags))
        return
    ranges = _ranges(trainer.tables)
    whole = [
        (name, _whole(name, weight, ranges), {key: _whole(name, value, ranges) for key, value in state.items()}) for name, weight, state in parts
    ]
    shapes = [(name, buffer.to("meta")) for name, buffer in buffers]
    order = [name for group in _groups(trainer, parts) for name in group]
    shards.write(_checkpoint(path, trainer, whole, shapes, progress, flags), order, pieces(trainer, parts, buffers, ranks.rank), ranks)


def _check_finite(ranks: Writers, parts: Parameters, progress: Progress) -> None:
    """NotFiniteLoss on every rank where one holds such a number: the loss looks finite until the next batch uses what an update has ruined."""

    def finite(weight: Tensor, state: dict[str, Tensor]) -> bool:
        return all(limit.isfinite() for values in (weight, *state.values()) if values.nelement() for limit in torch.aminmax(values))

    bad = next((index for index, (_, weight, state) in enumerate(parts) if not finite(weight, state)), len(parts))
    first = min(found for found, _, _ in ranks.gather([bad, 0, 0]))
    if first < len(parts):
        raise NotFiniteLoss(progress.batch, f"after batch {{batch}} a number in {parts[first][0]}")


def _checkpoint(path: Path, trainer: Trainer, parts: Parameters, buffers: list[tuple[str, Tensor]], progress: Progress, flags: dict) -> Checkpoint:
    """What the file holds of these tensors."""
    state_dict = {name: alone(weight) for name, weight, _ in parts} | {name: alone(buffer) for name, buffer in buffers}
    tables = None
    if any(table.made_by for table in trainer.tables.tables):
        made_by = [asdict(table.made_by) if table.made_by else {"method": "plain", "knobs": {}} for table in trainer.tables.tables]
        specs = [table.spec for table in trainer.tables.tables]
        tables = [{**one, "rows": spec.num_embeddings, "dim": spec.embedding_dim} for one, spec in zip(made_by, specs, strict=True)]
    return Checkpoint(path, state_dict, _optimizer_state(trainer, parts), progress, exact=True, flags=flags, tables=tables)


def _ranges(tables: EmbeddingCollection) -> dict[str, tuple[int, int, int]]:
    """Of each part's tensors the first row that is here, the rows of all ranks together, and the rank that writes them (-1: any that has some)."""
    where = tables.plan.where if tables.plan is not None else None
    ranges = {}
    for number, segment in enumerate(segment for segments in tables.segments for segment in segments):
        writer = 0 if where is None or where[number] == EVERYWHERE else -1
        for suffix in SUFFIXES:
            ranges[segment.name + suffix] = segment.first, segment.total, writer
    return ranges


def _whole(name: str, values: Tensor, ranges: dict) -> Tensor:
    """The shape of all rows of a tensor, on "meta"."""
    rows = values.shape[:1] if name not in ranges else ranges[name][1:2]
    return torch.empty((*rows, *values.shape[1:]), dtype=values.dtype, device="meta")


def pieces(trainer: Trainer, parts: Parameters, buffers: list[tuple[str, Tensor]], rank: int) -> list[Piece]:
    """What this rank writes: its own rows, and rank 0 what all have."""
    ranges, found = _ranges(trainer.tables), []
    for name, weight, state in parts:
        first, _, writer = ranges.get(name, (0, 0, 0))
        if writer in (rank, -1):
            found += [Piece(name, key, first, values) for key, values in {"": weight, **state}.items() if values.shape[0]]
    return found + [Piece(name, "", 0, buffer) for name, buffer in buffers if rank == 0]


def parameters(trainer: Trainer, buffers: list[dict[str, Tensor]] | None = None) -> Parameters:
    """(upstream's name, value, optimizer state) of everything trained, in the order of upstream's dlrm.parameters(), on the CPU.

    On the CPU the tensors are views: writing to them writes to the model. Of rows that are spread over ranks it gives those that are here.
    buffers: of each store, as RowStore.on_host() gives them, for a caller that sends them back.
    """
    states = {id(parameter): state for parameter, state in zip(trainer.dense.parameters, trainer.dense.state, strict=True)}
    listed = table_parameters(trainer.tables, lambda parameter: states.get(id(parameter), {}), buffers)
    others = [(f"v_W_l.{index}", weights) for index, weights in enumerate(trainer.tables.v_W_l if trainer.tables.v_W_l is not None else ())]
    return listed + [_dense(name, parameter, states.get(id(parameter), {})) for name, parameter in [*others, *trainer.model.named_parameters()]]


def table_parameters(
    tables: EmbeddingCollection, dense_state: Callable[[Tensor], dict[str, Tensor]], buffers: list[dict[str, Tensor]] | None = None
) -> Parameters:
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
    buffers_kept, ranges = kept(trainer.tables), _ranges(trainer.tables)
    shapes = {name: tuple(_whole(name, weight, ranges).shape) for name, weight, _ in parts}
    check_shapes(checkpoint, shapes | {name: tuple(buffer.shape) for name, buffer in buffers_kept})
    states = _matched_states(trainer, checkpoint, parts, ranges) if with_optimizer and not reset_row_state else None
    for index, (name, weight, state) in enumerate(parts):
        first = ranges[name][0] if name in ranges else 0
        checkpoint.copy(name, "", checkpoint.weights[name], first, weight)
        for key, value in state.items() if states is not None else ():
            if key in states[index]:
                checkpoint.copy(name, key, states[index][key], first, value)
            else:
                value.zero_()
    for name, buffer in buffers_kept:
        checkpoint.copy(name, "", checkpoint.weights[name], 0, buffer)
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


def _groups(trainer: Trainer, parts: Parameters) -> list[list[str]]:
    """Names of what each group of the optimizer trains. In debug mode upstream's has three, for tables, bottom and top MLP, and leaves learned
    pooling weights out."""
    names = [name for name, _, _ in parts]
    if trainer.config.upstream_compat and trainer.config.output.debug:
        return [[name for name in names if name.startswith(prefix)] for prefix in ("emb_l.", "bot_l.", "top_l.")]
    return [names]


def _optimizer_state(trainer: Trainer, parts: Parameters) -> dict:
    """What torch's optimizer over dlrm.parameters(), or upstream's RWSAdagrad, would save."""
    rule, rate = trainer.rule.name, trainer.next_rate()
    groups = _groups(trainer, parts)
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


def _matched_states(trainer: Trainer, checkpoint: Checkpoint, parts: Parameters, ranges: dict) -> list[dict[str, Tensor]]:
    """For each parameter its Adagrad sums in the checkpoint, where it has them. UserError for another optimizer's."""
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
    matched: list[dict[str, Tensor]] = [{} for _ in parts]
    for position, index in enumerate(order):
        name, _, wanted = parts[index]
        for key, value in wanted.items():
            found = saved.get(position, {}).get(key)
            if found is None:
                continue
            here = tuple(_whole(name, value, ranges).shape)
            if found.shape != here:
                raise UserError(f"{prefix}: the optimizer's {key} of {name} is {tuple(found.shape)} in the checkpoint and {here} here")
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
