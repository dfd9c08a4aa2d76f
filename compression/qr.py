"""Quotient-remainder embedding: an id's vector is made of row id // c of one table and row id mod c of another.

Shi et al., "Compositional Embeddings Using Complementary Partitions for Memory-Efficient Recommendation Systems", KDD 2020, arXiv:1909.02107.
Differs from upstream, unless `upstream_compat`: rows are combined for each id and then pooled (upstream pools each side first, which for
"mult" is another function of the bag), the quotient is an integer division (upstream's goes through float32), and the starting range is
symmetric (upstream's is U(sqrt(1/n), 1)).
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from compression.method import Knob, Making, Method
from dlrm_xla.ops.integers import quotient
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part


class QRTable(EmbeddingTable):
    """operation "mult" | "add": parts of D numbers; "concat": parts of D / 2.

    collisions  c: rows of the remainder table; the quotient table has ceil(N / c).
    Draws from torch's stream: the quotient table, then the remainder table.
    """

    def __init__(self, spec: TableSpec, operation: str, collisions: int, upstream_compat: bool):
        dim = spec.embedding_dim // 2 if operation == "concat" else spec.embedding_dim
        low, high = starting_range(spec.num_embeddings, operation, upstream_compat)

        def fill(rows: Tensor) -> None:
            rows.copy_(nn.init.uniform_(torch.empty(rows.shape), low, high))  # a view with gaps would be drawn in another order

        quotients = math.ceil(spec.num_embeddings / collisions)
        super().__init__(spec, {"weight_q": Part(quotients, dim, fill), "weight_r": Part(collisions, dim, fill)})
        self.operation, self.collisions, self.pools_before_combine = operation, collisions, upstream_compat
        self.through_float = upstream_compat

    def row_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.through_float:
            return (ids / self.collisions).long(), torch.remainder(ids, self.collisions)
        return quotient(ids, self.collisions), torch.fmod(ids, self.collisions)

    def combine(self, rows: tuple[Tensor, Tensor], ids: Tensor | None) -> Tensor:
        quotient, remainder = rows
        if self.operation == "concat":
            return torch.cat([quotient, remainder], dim=-1)
        return quotient + remainder if self.operation == "add" else quotient * remainder


def starting_range(num_embeddings: int, operation: str, upstream_compat: bool) -> tuple[float, float]:
    """Uniform bounds for both parts, such that a combined vector starts with a plain table's standard deviation, 1 / sqrt(3 n)."""
    if upstream_compat:
        return float(np.sqrt(1 / num_embeddings)), 1.0
    bound = {"mult": (3 / num_embeddings) ** 0.25, "add": math.sqrt(0.5 / num_embeddings), "concat": math.sqrt(1 / num_embeddings)}[operation]
    return -bound, bound


def _check(spec: TableSpec, knobs: dict) -> None:
    if knobs["operation"] == "concat" and spec.embedding_dim % 2:
        raise UserError(f"qr:operation=concat: table {spec.name} has vectors of {spec.embedding_dim}, which has no half; use mult or add")
    if knobs["collisions"] > spec.num_embeddings:
        raise UserError(f"qr:collisions={knobs['collisions']}: table {spec.name} has {spec.num_embeddings} rows; use at most that")


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    width = spec.embedding_dim // 2 if knobs["operation"] == "concat" else spec.embedding_dim
    return 4 * width * (math.ceil(spec.num_embeddings / knobs["collisions"]) + knobs["collisions"])


def _create(spec: TableSpec, knobs: dict, making: Making) -> EmbeddingTable:
    return QRTable(spec, knobs["operation"], knobs["collisions"], making.upstream_compat)


METHOD = Method(
    name="qr",
    title="quotient and remainder of the id, a row of each (upstream's --qr-flag)",
    paper="Shi et al., Compositional Embeddings Using Complementary Partitions, KDD 2020, arXiv:1909.02107",
    knobs=(
        Knob("operation", str, "mult", "how the two rows become one vector", choices=("mult", "add", "concat")),
        Knob("collisions", int, 4, "rows of the remainder table", least=1),
    ),
    bytes_formula="4 D (ceil(N / collisions) + collisions); concat: half",
    num_bytes=_num_bytes,
    create=_create,
    sized_by="collisions",
    sized_most=lambda spec, knobs: max(1, math.isqrt(spec.num_embeddings)),
    check=_check,
)
