"""Hash embeddings: a weighted sum of k rows that an id's hashes choose, with weights that training learns. "hash_embeddings".

    e(i) = sum over k of p[i, k] W[h_k(i)]

Svenstrup, Hansen, Winther, "Hash Embeddings for Efficient Word Representations", NIPS 2017, arXiv:1709.03933, equation 1.
Differs from the paper: the importance weights are not appended to the vector; an id has weights of its own where importance_rows >= N, and shares
them by a hash otherwise. Differs from common code: p starts at random signs (U(-1, 1)), so that ids with equal rows start apart.
Starting values: the rows uniform, so that a vector's numbers have the standard deviation 1/sqrt(3N) of a plain table's.
"""

import math
from functools import partial

import numpy as np
from torch import Tensor

from compression.hashes import Hashes
from compression.hashing import ROWS, shared_rows
from compression.method import Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable, Part


class HashEmbeddingsTable(EmbeddingTable):
    """num_rows rows of D, and importance_rows rows of `count` weights; an id reads `count` of the first and one of the second."""

    def __init__(self, spec: TableSpec, num_rows: int, count: int, importance_rows: int, rng: np.random.RandomState):
        # var e = count x var p x var W, and var p = 1/3
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(3 / (count * spec.num_embeddings)))
        weights = Part(importance_rows, count, partial(fill_uniform, rng=rng, bound=1.0))
        super().__init__(spec, {"weight": Part(num_rows, spec.embedding_dim, fill), "importance": weights})
        self.num_rows, self.importance_rows, self.count = num_rows, importance_rows, count
        self.hashes = Hashes(count, rng)
        self.importance_hash = Hashes(1, rng) if importance_rows < spec.num_embeddings else None

    def row_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        importance = ids if self.importance_hash is None else self.importance_hash.row(ids, 0, self.importance_rows)
        return self.hashes.rows_all(ids, self.num_rows), importance

    def combine(self, rows: tuple[Tensor, Tensor], ids: Tensor | None) -> Tensor:
        vectors, weights = rows
        return (vectors.unflatten(-1, (self.count, self.spec.embedding_dim)) * weights[..., None]).sum(-2)


def _importance_rows(spec: TableSpec, knobs: dict) -> int:
    return min(knobs["importance_rows"] or spec.num_embeddings, spec.num_embeddings)


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    importance, count = _importance_rows(spec, knobs), knobs["hashes"]
    return 4 * (shared_rows(spec, knobs) * spec.embedding_dim + importance * count) + 8 * (count + (importance < spec.num_embeddings))


def _create(spec: TableSpec, knobs: dict, making: Making) -> HashEmbeddingsTable:
    return HashEmbeddingsTable(spec, shared_rows(spec, knobs), knobs["hashes"], _importance_rows(spec, knobs), making.rng)


METHOD = Method(
    name="hash_embeddings",
    title="hash embeddings: a learned weighted sum of k hashed rows",
    paper="Svenstrup et al., Hash Embeddings for Efficient Word Representations, NIPS 2017, arXiv:1709.03933",
    knobs=(
        ROWS,
        Knob("hashes", int, 2, "k, rows that make a vector", least=1, most=8),
        Knob("importance_rows", int, None, "rows of weights; without it one for each id", least=1),
    ),
    bytes_formula="4 (rows D + importance_rows k)",
    num_bytes=_num_bytes,
    create=_create,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
)
