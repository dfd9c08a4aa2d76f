"""The methods as data, and the one function that builds a model's tables by them."""

import difflib
from functools import partial

import numpy as np

from compression import (
    cce,
    compositional,
    dhe,
    double_hash,
    hash_embeddings,
    hashing,
    hot_cold,
    int8_training,
    low_rank,
    memcom,
    mixed_dim,
    pq,
    qr,
    random_projection,
    robe,
    rowwise,
    svd,
    tt,
)
from compression.method import PLAIN, Choice, Making, Method
from compression.mixed_dim import dimensions
from dlrm_xla.config import MethodConfig
from dlrm_xla.init import fill_table
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, PlainTable

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        compositional.METHOD, dhe.METHOD, double_hash.METHOD, hash_embeddings.METHOD, hashing.METHOD, hot_cold.METHOD, int8_training.METHOD,
        low_rank.METHOD, memcom.METHOD, mixed_dim.METHOD, qr.METHOD, random_projection.METHOD, robe.METHOD, tt.METHOD, tt.SVD_METHOD,
        *svd.METHODS, *rowwise.METHODS, pq.METHOD, cce.METHOD,
    )
}  # fmt: skip


def method_named(name: str) -> Method:
    """UserError, with the names that there are, for another."""
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, n=1)
        meant = f"; do you mean {near[0]}?" if near else ""
        raise UserError(f"{name!r} is no compression method{meant}; there are plain, {', '.join(sorted(METHODS))}")
    return METHODS[name]


def num_bytes(spec: TableSpec, choice: Choice) -> int:
    """Of rows, dense parameters, codes, pointers and seeds; optimizer state apart."""
    if choice.method == "plain":
        return 4 * spec.num_embeddings * spec.embedding_dim
    return METHODS[choice.method].num_bytes(spec, choice.knobs)


def create_table(spec: TableSpec, choice: Choice, making: Making, to_load: bool = False) -> EmbeddingTable:
    """A table with starting values. UserError where the knobs do not go with it, or the method starts from a trained table.

    to_load: the values come from a checkpoint, so a method that needs a trained table will do.
    """
    if choice.method == "plain":
        return PlainTable(spec, partial(fill_table, rng=making.rng, replay_torch=making.replay_torch))
    method = METHODS[choice.method]
    make = method.shell if to_load and method.shell is not None else method.create
    if make is None:
        raise UserError(no_start(method))
    table = make(spec, choice.knobs, making)
    table.made_by = choice
    return table


def no_start(method: Method) -> str:
    """Why a run cannot begin with such a table."""
    others = ", ".join(sorted(name for name, other in METHODS.items() if other.create is not None))
    return (
        f"{method.name} is made from a trained table (python -m compression convert --method {method.name}) and cannot be trained from the start; "
        f"methods that can are {others}"
    )


def create_tables(
    specs: list[TableSpec],
    method: MethodConfig,
    rng: np.random.RandomState,
    replay_torch: bool,
    upstream_compat: bool,
    choices: list[Choice] | None = None,
    counts: list[np.ndarray] | None = None,
    to_load: bool = False,
) -> list[EmbeddingTable]:
    """A table for each spec, in order, drawing from `rng` and from torch's stream as upstream does.

    replay_torch: also make the torch draws that upstream makes and discards (dlrm_xla/init.py).
    choices       of each table; None: by upstream's flags alone (choose.py knows the others)
    counts        of each table how often training looks its ids up, where it is known
    to_load       the values come from a checkpoint
    """
    if choices is None:
        choices = upstream_choices(specs, method)
    tables = []
    for index, (spec, choice) in enumerate(zip(specs, choices, strict=True)):
        making = Making(rng, None if counts is None else counts[index], replay_torch, upstream_compat)
        tables.append(create_table(spec, choice, making, to_load))
    return tables


def upstream_choices(specs: list[TableSpec], method: MethodConfig) -> list[Choice]:
    """By --qr-* or --md-*; plain without them."""
    widths = mixed_dimensions(specs, method) if method.kind == "md" else None
    choices = []
    for index, spec in enumerate(specs):
        if widths is not None:
            choices.append(Choice("md", {"temperature": method.md_temperature, "round_dims": method.md_round_dims, "width": widths[index]}))
        elif method.kind == "qr" and spec.num_embeddings > method.threshold:
            choices.append(Choice("qr", {"operation": method.qr_operation, "collisions": method.qr_collisions}))
        elif method.kind == "qr" and method.qr_operation == "concat":
            raise UserError(
                f"--qr-operation=concat: table {spec.name} has {spec.num_embeddings} rows, not more than --qr-threshold={method.threshold}, "
                f"and would give vectors of half the length; use --qr-threshold={min(s.num_embeddings for s in specs) - 1} or another operation"
            )
        else:
            choices.append(PLAIN)
    return choices


def mixed_dimensions(specs: list[TableSpec], method: MethodConfig) -> list[int]:
    """The width of every table; those at or below the threshold keep the full one."""
    dim = specs[0].embedding_dim
    widths = dimensions([spec.num_embeddings for spec in specs], method.md_temperature, dim, method.md_round_dims)
    widths = [width if spec.num_embeddings > method.threshold else dim for spec, width in zip(specs, widths, strict=True)]
    if max(widths) > dim:
        raise UserError(
            f"--md-round-dims rounds a table's dimension up to {max(widths)}, above --arch-sparse-feature-size={dim}; "
            "make that a power of two, or leave --md-round-dims out"
        )
    return widths


def recorded(tables: list[dict]) -> list[Choice]:
    """The choices that a checkpoint holds. UserError where this version does not know them."""
    choices = []
    for number, table in enumerate(tables):
        if table["method"] == "plain":
            choices.append(PLAIN)
            continue
        method = method_named(table["method"])
        unknown = set(table["knobs"]) ^ {knob.name for knob in method.knobs}
        if unknown:
            names = ", ".join(sorted(unknown))
            raise UserError(f"--load-model: table {number} was made by {table['method']} of another version of dlrm_xla: knobs {names} differ")
        choices.append(Choice(method.name, table["knobs"]))
    return choices
