"""The hash trick: W[h(i)], ids that share a row share a vector. "hash".

Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009, arXiv:0902.2206.
Differs from the paper: a row is looked up for each id instead of a sum over features, and there is no sign hash, as is usual for embeddings
(ids of one row share what they learn; a sign would turn some into opposites). With rows >= N an id is its own row.
Starting values: U(-sqrt(1/N), sqrt(1/N)), a plain table's, whose standard deviation is 1/sqrt(3N).
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.fitting import WEIGHTED, converted, fit_rows, float64_of, id_weights
from compression.hashes import Hashes
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable, Part

ROWS = Knob("rows", int, None, "rows that ids share; without it a tenth of the table's", least=1)


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
