"""A checkpoint with smaller tables from a trained one: python -m compression convert --load-model m.pt --method svd:rank=4 --save-model c.pt

The result is a checkpoint that run_dlrm.py --load-model reads, to test it or to train on. Reads ours, upstream's and the 2020 TPU port's files.
Layers, other tables, progress and flags stay as they are. Adagrad's sums of what is new start at the mean of the old table's: with sums of zero
the first steps would be as large as the learning rate. One table is in memory at a time; the others stay in the file until they are copied.
"""

import argparse
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from compression.choose import asked_methods, choose, parse_wish
from compression.convert_report import Row, json_of, lines
from compression.method import PLAIN, Choice, Making
from compression.registry import METHODS, num_bytes
from compression.stored import StoredTable, stored_tables
from compression.training_data import check_data_flags, training_counts
from data_loaders.command import ended
from dlrm_xla.checkpoint import kept, optimizer_name, table_parameters
from dlrm_xla.checkpoint_file import Checkpoint, alone, check_writable, read, write
from dlrm_xla.config import MethodConfig
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable

PIECE = 1 << 16  # ids whose vectors are compared at a time
THRESHOLD = 200  # of --compress-threshold, as in run_dlrm.py


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status (data_loaders.command)."""
    parser = argparse.ArgumentParser(
        prog="python -m compression convert",
        description="A checkpoint with smaller tables from a trained one, for run_dlrm.py --load-model.",
        epilog="Further flags name the training data as for run_dlrm.py (--raw-data-file, --processed-data-file, --data-set, --max-ind-range and "
        "so on), to count lookups; without them it is the data set that the checkpoint names, read only where a method goes by the counts.",
        allow_abbrev=False,
    )

    def option(name: str, help: str, metavar: str = "FILE", **more) -> None:
        parser.add_argument(name, help=help, metavar=metavar, **more)

    option("--load-model", "the trained checkpoint; it stays as it is", type=Path)
    option("--save-model", "the new checkpoint", type=Path)
    option("--method", "how, as svd:rank=4; python -m compression list", "METHOD", default="")
    option("--compress-to", "all plain tables together: 10x smaller, or a size as 5MB; sets the method's knob", "SIZE", default="")
    option("--compress-threshold", f"for tables with more rows than this (default {THRESHOLD})", "N", type=int, default=THRESHOLD)
    option("--compress-config", "YAML: a method for each table", default="")
    option("--json", "write the report here too", type=Path)
    option("--numpy-rand-seed", "seed of everything random (default 123)", "N", type=int, default=123)
    parser.add_argument("--force", action="store_true", help="replace --save-model where it exists")
    args, data_flags = parser.parse_known_args(argv)
    return ended(lambda: _run(args, data_flags))


def _run(args: argparse.Namespace, data_flags: list[str]) -> None:
    _check(args, data_flags)
    loaded = read(args.load_model, mapped=True)
    stored = stored_tables(loaded)
    counts = _counts(args, loaded, stored, data_flags)
    choices = _choices(args, loaded, stored, counts)
    optimizer = _Optimizer(loaded)
    _check_optimizer(loaded, choices)
    rng = np.random.RandomState(args.numpy_rand_seed)
    done, rows = {}, []
    with tqdm(total=sum(t.spec.num_embeddings for t, c in zip(stored, choices, strict=True) if c != PLAIN), desc="converting", unit=" rows",
              unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:  # fmt: skip
        for index, (table, choice) in enumerate(zip(stored, choices, strict=True)):
            if choice != PLAIN:
                weight = loaded.weights[table.names[0]]
                making = Making(rng, None if counts is None else counts[index])
                done[table.name], row = convert_table(table.spec, choice, weight, making, optimizer)
                rows.append(row)
                bar.update(table.spec.num_embeddings)
    write(put_together(loaded, args.save_model, stored, choices, done, optimizer))
    others = [(table, sum(size_of(loaded.weights[name]) for name in table.names)) for table in stored if table.name not in done]
    print("\n".join(lines(rows, [(table.name, table.choice, held) for table, held in others])))
    print(f"written to {args.save_model} ({args.save_model.stat().st_size:,} bytes)")
    if args.json:
        figures = {"load_model": str(args.load_model), "save_model": str(args.save_model), **json_of(rows, sum(held for _, held in others))}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _check(args: argparse.Namespace, data_flags: list[str]) -> None:
    """Everything that can be wrong before the checkpoint is read."""
    for flag, value in (("--load-model", args.load_model), ("--save-model", args.save_model)):
        if value is None:
            raise UserError(f"{flag}=FILE is needed; python -m compression convert --help shows the flags")
    check_data_flags(data_flags)
    if not args.method and not args.compress_config:
        raise UserError("--method or --compress-config is needed, as --method=svd:rank=4; python -m compression list shows the methods")
    if args.compress_threshold < 0:
        raise UserError(f"--compress-threshold={args.compress_threshold}: must be at least 0")
    if not 0 <= args.numpy_rand_seed < 2**32:
        raise UserError(f"--numpy-rand-seed={args.numpy_rand_seed}: must be at least 0 and below 2^32")
    _named(args, lambda: parse_wish(_method_config(args)))
    save, load = args.save_model, args.load_model
    if save.exists() and load.exists() and os.path.samefile(save, load):
        raise UserError(f"--save-model={save}: is the file of --load-model, which stays as it is; name another")
    if save.is_file() and not args.force:
        raise UserError(f"--save-model={save}: exists; name another file, or add --force")
    check_writable(save)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json={args.json}: the folder {args.json.parent} does not exist; make it, or choose another place")


def _method_config(args: argparse.Namespace) -> MethodConfig:
    return MethodConfig(
        "compress", args.compress_threshold, "mult", 4, 0.3, False, args.method, args.compress_config, args.compress_to
    )  # fmt: skip


def _named(args: argparse.Namespace, work):
    """run_dlrm.py's --compress is --method here, in messages too."""
    try:
        return work()
    except UserError as error:
        raise UserError(str(error).replace(f"--compress={args.method}", f"--method={args.method}")) from None


def _check_optimizer(loaded: Checkpoint, choices: list[Choice]) -> None:
    trained = optimizer_name(loaded.optimizer) if loaded.optimizer else ""
    for method in (METHODS[choice.method] for choice in choices if choice != PLAIN):
        if trained and method.optimizers and trained not in method.optimizers:
            use = " or ".join(method.optimizers)
            raise UserError(f"--load-model={loaded.path}: was trained with --optimizer={trained}, and {method.name} goes with {use} only")


def _choices(args: argparse.Namespace, loaded: Checkpoint, stored: list[StoredTable], counts: list[np.ndarray] | None) -> list[Choice]:
    """What each table is converted by; PLAIN for those that stay as they are. UserError where none is left to convert."""
    plain = [index for index, table in enumerate(stored) if table.choice == PLAIN]
    for table in stored:
        if table.choice is None:
            raise UserError(
                f"--load-model={loaded.path}: table {table.name} is compressed ({', '.join(table.names)}) and the file does not say how; load it "
                "with run_dlrm.py --load-model and its --qr-* or --md-* flags, and save it again"
            )
    if not plain:
        raise UserError(f"--load-model={loaded.path}: all its tables are compressed already; convert the checkpoint that they were made from")
    if len(plain) < len(stored):
        done = ", ".join(table.name for table in stored if table.choice != PLAIN)
        print(f"note: compressed already, and left as they are: {done}", file=sys.stderr)
    if len(plain) < len(stored) and args.compress_config:
        raise UserError(
            f"--compress-config={args.compress_config}: names tables by number, and some of this checkpoint are compressed already; use --method "
            "and --compress-threshold"
        )
    specs = [stored[index].spec for index in plain]
    known = None if counts is None else [counts[index] for index in plain]
    chosen = dict(zip(plain, _named(args, lambda: choose(specs, _method_config(args), known)), strict=True))
    for choice in chosen.values():
        if choice != PLAIN and METHODS[choice.method].convert is None:
            names = ", ".join(sorted(name for name, method in METHODS.items() if method.convert is not None))
            raise UserError(f"{choice.method}: cannot be made from a trained table; methods that can are {names}")
    if all(choice == PLAIN for choice in chosen.values()):
        largest = max(spec.num_embeddings for spec in specs)
        raise UserError(
            f"no table is converted: the largest plain one has {largest:,} rows and --compress-threshold is {args.compress_threshold}; lower it, "
            "ask for a smaller --compress-to, or convert the checkpoint that the compressed tables were made from"
        )
    return [chosen.get(index, PLAIN) for index in range(len(stored))]


def _counts(args, loaded: Checkpoint, stored: list[StoredTable], data_flags: list[str]) -> list[np.ndarray] | None:
    """How often each id is looked up, where a method wants to know or data is named; None otherwise."""
    asked = [one.choice() for one in asked_methods(_method_config(args))]
    want = [choice for choice in asked if METHODS[choice.method].uses_counts(choice.knobs) or choice.knobs.get("weighted")]
    if not want and not data_flags:
        return None
    specs = [table.spec for table in stored]
    return training_counts(loaded, data_flags, specs, want[0].text() if want else " ".join(data_flags))


class _Optimizer:
    """A checkpoint's optimizer state by the names of what is trained.

    names  of everything trained, in the order of upstream's dlrm.parameters(): all of state_dict up to the last layer's; codes and so on follow
    """

    def __init__(self, loaded: Checkpoint):
        names = list(loaded.weights)
        layers = [index for index, name in enumerate(names) if not name.startswith(("emb_l.", "int8_clock."))]
        self.names = names[: layers[-1] + 1] if layers else names
        self.content = loaded.optimizer
        self.rule = RULES[optimizer_name(loaded.optimizer) if loaded.optimizer is not None else "sgd"]()
        self.groups: list[list[str]] = []
        self.states: dict[str, dict] = {}
        if self.content is None:
            return
        sizes = [len(group["params"]) for group in self.content["param_groups"]]
        ordered = self.names
        if sum(sizes) != len(ordered):  # --debug-mode of upstream's leaves learned pooling weights out
            ordered = [name for name in ordered if not name.startswith("v_W_l.")]
        if sum(sizes) != len(ordered):
            raise UserError(
                f"--load-model={loaded.path}: its optimizer's state is of {sum(sizes)} parameters, and it holds {len(ordered)}; is it one of "
                "DLRM?"
            )
        self.states = {name: self.content["state"][at] for at, name in enumerate(ordered) if at in self.content["state"]}
        ends = np.cumsum(sizes)
        self.groups = [ordered[end - size : end] for size, end in zip(sizes, ends, strict=True)]

    def mean_sum(self, name: str) -> float:
        """The mean of Adagrad's sums of a table."""
        sums = [value for key, value in self.states.get(name, {}).items() if key in ("sum", "momentum")]
        return float(sums[0].mean(dtype=torch.float64)) if sums else 0.0

    def with_new(self, new: dict[str, dict[str, dict]]) -> dict | None:
        """The state as a file has it; new: name of a table's rows -> what is trained instead of them -> its state."""
        if self.content is None:
            return None
        states, groups, position = {}, [], 0
        for names, group in zip(self.groups, self.content["param_groups"], strict=True):
            first = position
            for name in names:
                for state in new[name].values() if name in new else [self.states.get(name)]:
                    if state:
                        states[position] = {key: alone(value) if isinstance(value, Tensor) else value for key, value in state.items()}
                    position += 1
            groups.append({**group, "params": list(range(first, position))})
        return {**self.content, "state": states, "param_groups": groups}


@dataclass(frozen=True)
class ConvertedTensors:
    """Of one table: what is trained, by name, the state of each, and what is kept beside."""

    trained: dict[str, Tensor]
    states: dict[str, dict]
    kept: dict[str, Tensor]


def convert_table(spec: TableSpec, choice: Choice, weight: Tensor, making: Making, optimizer: _Optimizer) -> tuple[ConvertedTensors, Row]:
    """weight [N, D]. UserError where it holds numbers that are not finite."""
    if not all(limit.isfinite() for limit in torch.aminmax(weight)):
        raise UserError(f"table {spec.name} holds numbers that are not finite, so it is not converted; take an earlier checkpoint")
    array = weight.to(torch.float32).numpy()
    made = METHODS[choice.method].convert(spec, choice.knobs, array, making)
    made.table.made_by = choice
    collection = EmbeddingCollection([made.table], None, optimizer.rule, RowsLayout(add_rows_scatter, ragged=False))
    errors = measured_errors(collection, array, making.counts)
    row = Row(spec, choice, num_bytes(spec, PLAIN), num_bytes(spec, choice), {**made.facts, **errors})
    return _tensors(collection, made.table, optimizer), row


def measured_errors(collection: EmbeddingCollection, weight: np.ndarray, counts: np.ndarray | None) -> dict[str, float]:
    """|approximation - W| / |W| in Frobenius norms, from the vectors as a lookup would give them; "_weighted": ids count as often as looked up."""
    sums = np.zeros((2, 2))  # of the difference and of the table; plain and weighted
    for first in range(0, len(weight), PIECE):
        exact = weight[first : first + PIECE].astype(np.float64)
        vectors = collection.materialize(0, torch.arange(first, first + len(exact))).numpy()
        squares = np.stack([((vectors - exact) ** 2).sum(1), (exact**2).sum(1)])
        sums[:, 0] += squares.sum(1)
        if counts is not None:
            sums[:, 1] += squares @ counts[first : first + PIECE]
    names = ("relative_error",) if counts is None else ("relative_error", "relative_error_weighted")
    return {name: float(np.sqrt(sums[0, i] / max(sums[1, i], 1e-300))) for i, name in enumerate(names)}


def _tensors(collection: EmbeddingCollection, table: EmbeddingTable, optimizer: _Optimizer) -> ConvertedTensors:
    old, rule = f"{table.spec.name}.weight", optimizer.rule
    mean, before = optimizer.mean_sum(old), optimizer.states.get(old, {})
    listed = table_parameters(collection, lambda parameter: {name: torch.empty_like(parameter) for name in rule.dense_state})
    # every tensor has a step, as in what run_dlrm.py writes; the scales of int8 rows have nothing else
    step = {"step": before["step"]} if "step" in before else {}
    states = {name: step | {key: torch.full(of_rule.shape, mean) for key, of_rule in state.items()} for name, _, state in listed}
    return ConvertedTensors({name: alone(value) for name, value, _ in listed}, states, {name: alone(value) for name, value in kept(collection)})


def put_together(
    loaded: Checkpoint, path: Path, stored: list[StoredTable], choices: list[Choice], done: dict[str, ConvertedTensors], optimizer: _Optimizer
) -> Checkpoint:
    """The checkpoint with the converted tables (by name in `done`) in place of the plain ones."""
    new = {table.names[0]: done[table.name] for table in stored if table.name in done}
    weights: dict[str, Tensor] = {}
    for name in optimizer.names:
        weights |= new[name].trained if name in new else {name: alone(loaded.weights[name])}
    for tensors in new.values():
        weights |= {name: value for name, value in tensors.kept.items() if name not in loaded.weights}  # a clock that runs already goes on
    weights |= {name: alone(value) for name, value in loaded.weights.items() if name not in optimizer.names}
    made_by = [table.choice if choice == PLAIN else choice for table, choice in zip(stored, choices, strict=True)]
    sizes = [{"rows": table.spec.num_embeddings, "dim": table.spec.embedding_dim} if table.spec else {} for table in stored]
    tables = [{"method": choice.method, "knobs": choice.knobs, **size} for choice, size in zip(made_by, sizes, strict=True)]
    state = optimizer.with_new({name: tensors.states for name, tensors in new.items()})
    return replace(loaded, path=path, weights=weights, optimizer=state, tables=tables)


def size_of(tensor: Tensor) -> int:
    return tensor.nelement() * tensor.element_size()
