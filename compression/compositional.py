"""k-way compositional embedding: an id is written as k digits, and its vector is made of one row for each digit. "compositional".

    e(i) = W_1[d_1] op ... op W_k[d_k],    i = d_1 + m_1 (d_2 + m_2 (d_3 + ...)),    op: product, sum or concatenation

Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems", KDD 2020, arXiv:1909.02107,
section 3.1 (4), the generalized quotient-remainder partitions. Two ids differ in at least one digit, so no two share all rows.
Differs from the paper: the radices m_j are chosen here, all about N^(1/k), or the first by the knob `rows`. Differs from its reference code,
which has k = 2 only: rows are combined for each id and then pooled, and starting values are symmetric.
Starting values: uniform, so wide that a vector's numbers have the standard deviation 1/sqrt(3N) of a plain table's.
"""

import math
from functools import partial, reduce

import numpy as np
import torch
from torch import Tensor

from compression.fitting import WEIGHTED, converted, fit_rows, id_weights
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.ops.integers import quotient
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

SWEEPS = 12  # over the parts in a conversion


class CompositionalTable(EmbeddingTable):
    """radices: rows of each part. operation "mult" | "add": parts of D numbers; "concat": of D / k."""

    def __init__(self, spec: TableSpec, radices: list[int], operation: str, rng: np.random.RandomState):
        width = spec.embedding_dim // len(radices) if operation == "concat" else spec.embedding_dim
        fill = partial(fill_uniform, rng=rng, bound=starting_bound(spec.num_embeddings, len(radices), operation))
        super().__init__(spec, {f"weight_{index}": Part(rows, width, fill) for index, rows in enumerate(radices)})
        self.radices, self.operation = tuple(radices), operation
        self.pools_before_combine = operation != "mult"  # sums and pieces are linear

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        digits = []
        for radix in self.radices[:-1]:
            digits.append(torch.fmod(ids, radix))
            ids = quotient(ids, radix)
        return (*digits, ids)

    def combine(self, rows: tuple[Tensor, ...], ids: Tensor | None) -> Tensor:
        if self.operation == "concat":
            return torch.cat(rows, dim=-1)
        return reduce(torch.add if self.operation == "add" else torch.mul, rows)


def starting_bound(num_embeddings: int, parts: int, operation: str) -> float:
    """b of U(-b, b) for every part: a sum's variances add up, a product's multiply."""
    variance = 1 / (3 * num_embeddings)
    return math.sqrt(3 * {"mult": variance ** (1 / parts), "add": variance / parts, "concat": variance}[operation])


def choose_radices(num_ids: int, parts: int, rows: int | None) -> list[int]:
    """Rows of each part, product at least N, about equal; the first is at least `rows`."""
    radices, left = [], num_ids
    for powers in range(parts, 0, -1):
        radix = _root(left, powers)
        if not radices and rows:
            radix = max(radix, min(rows, num_ids))
        radices.append(radix)
        left = -(-left // radix)
    return radices


def _root(number: int, power: int) -> int:
    """The smallest r with r^power >= number."""
    root = round(number ** (1 / power))
    while (root - 1) ** power >= number:
        root -= 1
    while root**power < number:
        root += 1
    return root


def fit_sum(weight: np.ndarray, rows: tuple[Tensor, ...], sizes: tuple[int, ...], weights: np.ndarray | None) -> list[Tensor]:
    """Rows of each part whose sums come close to weight [N, D]: least squares by going round the parts (backfitting), the largest first."""
    values = [torch.zeros(size, weight.shape[1]) for size in sizes]
    for _ in range(SWEEPS if min(sizes) > 1 else 1):
        for part in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            others = [(values[other], rows[other]) for other in range(len(sizes)) if other != part]

            def rest(ids: slice, others=others) -> Tensor:
                return torch.from_numpy(weight[ids]).double() - sum(value[row[ids]].double() for value, row in others)

            values[part] = fit_rows(rows[part], sizes[part], rest, weights)
    return values


def fit_product(weight: np.ndarray, rows: tuple[Tensor, ...], sizes: tuple[int, ...], weights: np.ndarray | None) -> list[Tensor]:
    """The same for products, number by number. Not linear: it ends in a local optimum."""
    values = [torch.ones(size, weight.shape[1]) for size in sizes]
    for _ in range(SWEEPS if min(sizes) > 1 else 1):
        for part in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            others = [(values[other], rows[other]) for other in range(len(sizes)) if other != part]

            def factor(ids: slice, others=others) -> Tensor:
                return reduce(torch.mul, [value[row[ids]].double() for value, row in others], torch.ones(1, 1, dtype=torch.float64))

            values[part] = fit_rows(rows[part], sizes[part], lambda ids: torch.from_numpy(weight[ids]).double(), weights, factor)
    return values


def _radices(spec: TableSpec, knobs: dict) -> list[int]:
    return choose_radices(spec.num_embeddings, knobs["partitions"], knobs["rows"])


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    width = spec.embedding_dim // knobs["partitions"] if knobs["operation"] == "concat" else spec.embedding_dim
    return 4 * width * sum(_radices(spec, knobs))


def _check(spec: TableSpec, knobs: dict) -> None:
    dim, parts = spec.embedding_dim, knobs["partitions"]
    if knobs["operation"] == "concat" and dim % parts:
        valid = ", ".join(str(count) for count in range(2, 9) if dim % count == 0) or "none"
        raise UserError(
            f"compositional:partitions={parts}: table {spec.name} has vectors of {dim}, which concat cannot make of {parts} equal pieces; "
            f"valid with operation=concat: {valid}"
        )


def _create(spec: TableSpec, knobs: dict, making: Making) -> CompositionalTable:
    return CompositionalTable(spec, _radices(spec, knobs), knobs["operation"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    table, weights = _create(spec, knobs, making), id_weights("compositional", spec, knobs, making)
    rows = table.row_ids(torch.arange(spec.num_embeddings))
    if table.operation == "concat":
        pieces = np.split(weight, len(rows), axis=1)
        values = [
            fit_rows(row, size, lambda ids, piece=piece: torch.from_numpy(piece[ids]).double(), weights)
            for row, size, piece in zip(rows, table.radices, pieces, strict=True)
        ]
    else:
        values = (fit_sum if table.operation == "add" else fit_product)(weight, rows, table.radices, weights)
    return converted(table, dict(zip(table.parts, values, strict=True)), weight, making)


METHOD = Method(
    name="compositional",
    title="k-way compositional embedding: a row for each digit of an id",
    paper="Shi et al., Compositional Embeddings Using Complementary Partitions, KDD 2020, arXiv:1909.02107",
    knobs=(
        Knob("partitions", int, 3, "k, digits of an id", least=2, most=8),
        Knob("operation", str, "mult", "how rows become a vector", choices=("mult", "add", "concat")),
        Knob("rows", int, None, "rows of the first part, at least N^(1/k); without it all parts have about N^(1/k)", least=1),
        WEIGHTED,
    ),
    bytes_formula="4 D (m_1 + ... + m_k), m_1 ... m_k >= N; concat: of that 1/k",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"rows": spec.num_embeddings, "operation": "add"},
    check=_check,
    weighted=True,
)
