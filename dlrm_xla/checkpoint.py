"""Checkpoints of a trainer, both ways, with upstream's parameter names and optimizer state: upstream's --load-model reads ours, we read its.

The file itself is checkpoint_file.py's.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from dlrm_xla.checkpoint_file import Checkpoint, Progress, alone, write
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.specs import UserError
from dlrm_xla.train import NotFiniteLoss, Trainer

_TORCH_GROUPS = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad}


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
