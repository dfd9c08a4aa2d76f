"""Double hashing: W_1[h_1(i)] + W_2[h_2(i)], or the two side by side. Two ids share a vector only where both hashes agree. "double_hash".

Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems", RecSys 2020, arXiv:2007.14523.
Differs from the paper: all ids are hashed twice; own rows for the frequent ones are the method hot_cold. With rows >= N an id is its own row.
Starting values: uniform; a vector's numbers have the standard deviation 1/sqrt(3N) of a plain table's.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.compositional import fit_sum, starting_bound
from compression.fitting import WEIGHTED, converted, fit_rows, float64_of, id_weights
from compression.hashes import Hashes
from compression.hashing import ROWS, shared_rows
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part


class DoubleHashTable(EmbeddingTable):
    """Two parts of num_rows rows. operation "sum": of D numbers each; "concat": of D / 2."""

    pools_before_combine = True  # sums and pieces are linear

    def __init__(self, spec: TableSpec, num_rows: int, operation: str, rng: np.random.RandomState):
        width = spec.embedding_dim // 2 if operation == "concat" else spec.embedding_dim
        bound = starting_bound(spec.num_embeddings, 2, "concat" if operation == "concat" else "add")
        fill = partial(fill_uniform, rng=rng, bound=bound)
        super().__init__(spec, {"weight_0": Part(num_rows, width, fill), "weight_1": Part(num_rows, width, fill)})
        self.num_rows, self.operation = num_rows, operation
        self.hashes = Hashes(2, rng) if num_rows < spec.num_embeddings else None

    def row_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        if self.hashes is None:
            return ids, ids
        return self.hashes.row(ids, 0, self.num_rows), self.hashes.row(ids, 1, self.num_rows)

    def combine(self, rows: tuple[Tensor, Tensor], ids: Tensor | None) -> Tensor:
        return torch.cat(rows, dim=-1) if self.operation == "concat" else rows[0] + rows[1]


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    rows = shared_rows(spec, knobs)
    dim = spec.embedding_dim if knobs["combine"] == "concat" else 2 * spec.embedding_dim
    return 4 * rows * dim + 16 * (rows < spec.num_embeddings)


def _check(spec: TableSpec, knobs: dict) -> None:
    if knobs["combine"] == "concat" and spec.embedding_dim % 2:
        raise UserError(
            f"double_hash:combine=concat: table {spec.name} has vectors of {spec.embedding_dim}, which has no half; valid: combine=sum"
        )


def _create(spec: TableSpec, knobs: dict, making: Making) -> DoubleHashTable:
    return DoubleHashTable(spec, shared_rows(spec, knobs), knobs["combine"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """Least squares: for sums by going round the two parts, for halves the mean of each."""
    table, weights = _create(spec, knobs, making), id_weights("double_hash", spec, knobs, making)
    rows = table.row_ids(torch.arange(spec.num_embeddings))
    if table.operation == "concat":
        half = spec.embedding_dim // 2
        pieces = (weight[:, :half], weight[:, half:])
        values = [fit_rows(row, table.num_rows, float64_of(piece), weights) for row, piece in zip(rows, pieces, strict=True)]
    else:
        values = fit_sum(weight, rows, (table.num_rows, table.num_rows), weights)
    return converted(table, {"weight_0": values[0], "weight_1": values[1]}, weight, making)


METHOD = Method(
    name="double_hash",
    title="double hashing: the sum of two hashed rows, or both side by side",
    paper="Zhang et al., Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems, RecSys 2020, arXiv:2007.14523",
    knobs=(ROWS, Knob("combine", str, "sum", "how two rows become a vector", choices=("sum", "concat")), WEIGHTED),
    bytes_formula="8 rows D; concat 4 rows D",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"rows": spec.num_embeddings},
    check=_check,
    weighted=True,
)
