"""The hash trick: W[h(i)], ids that share a row share a vector. "hash".

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv:0902.2206.
Differs from the paper: a row is looked up for each id instead of a sum over features, and there is no sign hash, as is usual for embeddings
(ids of one row share what they learn; a sign would turn some into opposites). With rows >= N an id is its own row.
Starting values: U(-sqrt(1/N), sqrt(1/N)), a plain table's, whose standard deviation is 1/sqrt(3N).

Below, what other methods of hashed rows share: sums over the ids of a row, and how far a converted table is from the trained one.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.hashes import Hashes
from compression.method import Converted, Knob, Making, Method
from compression.optimal import importance
from dlrm_xla.embeddings import EmbeddingTable, Part
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError

CHUNK = 1 << 17  # ids at a time, so that float64 needs no second copy of a large table

ROWS = Knob("rows", int, None, "rows that ids share; without it a tenth of the table's", least=1)
WEIGHTED = Knob("weighted", bool, False, "in a conversion an id counts as often as training looks it up")


class HashTable(EmbeddingTable):
    """num_rows rows; function "hash" (seeded) or "mod" (id mod num_rows)."""

    pools_before_combine = True

    def __init__(self, spec: TableSpec, num_rows: int, function: str, rng: np.random.RandomState):
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(1 / spec.num_embeddings))
        super().__init__(spec, {"weight": Part(num_rows, spec.embedding_dim, fill)})
        self.num_rows = num_rows
        self.hashes = Hashes(1, rng) if function == "hash" and num_rows < spec.num_embeddings else None

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        if self.num_rows >= self.spec.num_embeddings:
            return (ids,)
        return (torch.fmod(ids, self.num_rows) if self.hashes is None else self.hashes.row(ids, 0, self.num_rows),)

    def combine(self, rows: tuple[Tensor], ids: Tensor | None) -> Tensor:
        return rows[0]


def shared_rows(spec: TableSpec, knobs: dict) -> int:
    """The knob `rows`, at most N."""
    return min(knobs["rows"] or max(1, spec.num_embeddings // 10), spec.num_embeddings)


def id_weights(method: str, spec: TableSpec, knobs: dict, making: Making) -> np.ndarray | None:
    """[N] positive float64: how much each id counts in a conversion; None: all the same."""
    if not knobs["weighted"]:
        return None
    if making.counts is None:
        raise UserError(
            f"{method}:weighted=true: table {spec.name}: how often its ids are looked up is not known; give the training data too, or weighted=false"
        )
    return importance(making.counts)


def chunks(num_ids: int):
    return (slice(start, min(start + CHUNK, num_ids)) for start in range(0, num_ids, CHUNK))


def fit_rows(
    rows: Tensor, num_rows: int, wanted: Callable[[slice], Tensor], weights: np.ndarray | None, factor: Callable[[slice], Tensor] | None = None
) -> Tensor:
    """[num_rows, d] float32: for each row r the least-squares a of wanted_i ~ a x factor_i over the ids i of that row, number by number.

    rows [N] int64 of each id;  wanted, factor: ids -> [n, d] or [n, 1] float64, factor None for 1: then a is the weighted mean
    """
    products = squares = None
    for ids in chunks(len(rows)):
        values = wanted(ids)
        if products is None:
            products = torch.zeros(num_rows, values.shape[1], dtype=torch.float64)
            squares = torch.zeros_like(products)
        scale = torch.ones(1, 1, dtype=torch.float64) if factor is None else factor(ids)
        counts = scale if weights is None else scale * torch.from_numpy(weights[ids, None])
        products.index_add_(0, rows[ids], values * counts)
        squares.index_add_(0, rows[ids], (counts * scale).expand_as(values).contiguous())
    return torch.where(squares > 0, products / squares.clamp(min=1e-300), 0.0).float()


def converted(table: EmbeddingTable, values: dict[str, Tensor], weight: np.ndarray, making: Making) -> Converted:
    """The table with those rows instead of starting values, and its distance from `weight` [N, D]: Frobenius norms, |approximation - W| / |W|."""
    table.parts = {name: replace(part, fill=partial(_write, values=values[name])) for name, part in table.parts.items()}
    sums, weights = np.zeros((2, 2)), importance(making.counts)  # plain and weighted; of the difference and of the table
    for ids in chunks(len(weight)):
        numbers, exact = torch.arange(ids.start, ids.stop), torch.from_numpy(weight[ids]).double()
        rows = tuple(values[name][row].reshape(len(numbers), -1) for name, row in zip(values, table.row_ids(numbers), strict=True))
        with torch.no_grad():
            difference = table.combine(rows, numbers).double() - exact
        squares = torch.stack([difference.square().sum(1), exact.square().sum(1)]).numpy()
        sums[0] += squares.sum(1)
        if weights is not None:
            sums[1] += squares @ weights[ids]
    facts = {"relative_error": math.sqrt(sums[0, 0] / max(sums[0, 1], 1e-300))}
    if weights is not None:
        facts["relative_error_weighted"] = math.sqrt(sums[1, 0] / max(sums[1, 1], 1e-300))
    return Converted(table, facts)


def _write(rows: Tensor, values: Tensor) -> None:
    rows.copy_(values)


def float64_of(weight: np.ndarray) -> Callable[[slice], Tensor]:
    return lambda ids: torch.from_numpy(weight[ids]).double()


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    rows = shared_rows(spec, knobs)
    return 4 * rows * spec.embedding_dim + 8 * (knobs["function"] == "hash" and rows < spec.num_embeddings)


def _create(spec: TableSpec, knobs: dict, making: Making) -> HashTable:
    return HashTable(spec, shared_rows(spec, knobs), knobs["function"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """A row becomes the mean of its ids' vectors, the optimum for these hashes."""
    table = _create(spec, knobs, making)
    (rows,) = table.row_ids(torch.arange(spec.num_embeddings))
    return converted(table, {"weight": fit_rows(rows, table.num_rows, float64_of(weight), id_weights("hash", spec, knobs, making))}, weight, making)


METHOD = Method(
    name="hash",
    title="hash trick: ids share the rows of a smaller table",
    paper="Weinberger et al., Feature Hashing for Large Scale Multitask Learning, ICML 2009, arXiv:0902.2206",
    knobs=(ROWS, Knob("function", str, "hash", "seeded hash, or id mod rows", choices=("hash", "mod")), WEIGHTED),
    bytes_formula="4 rows D",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"rows": spec.num_embeddings},
    weighted=True,
)
