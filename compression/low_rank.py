"""Low rank: a table is the product of N rows of `rank` numbers and one projection [rank, D], both trained. "low_rank".

    e = W[i] P,  W [N, rank],  P [rank, D]

Lan et al., "ALBERT: A Lite BERT for Self-supervised Learning of Language Representations", ICLR 2020, arXiv:1909.11942, section 3.1
(factorized embeddings); for recommendation Ginart et al., arXiv:1909.11810, with another rank for each table (mixed_dim.py).
Differs from the papers: P starts with orthonormal rows and W with U(-b, b), b = sqrt(D / (rank N)), where they draw both (Xavier, or
normal). The numbers of the vectors then have the standard deviation of a plain table's, 1 / sqrt(3 N), for any rank and any draw of P; and a
step of SGD on a row moves its vector by P^t P g, the projection of what a plain table would move it by, neither larger nor smaller.
Upstream's MD table is the same product; there the deviation of a vector depends on the width, because Xavier's of P does.

P lies as [rank, D]: vectors are lanes on a TPU, and rank <= D makes it the orientation with the less padding (rank 4, D 16: one tile, not two).
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compression.method import Converted, Knob, Making, Method
from compression.optimal import decompose, facts, importance, relative_errors, slices
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

RANK = Knob("rank", int, None, "numbers that an id keeps; default: a quarter of D", least=1)


class LowRankTable(EmbeddingTable):
    """projection: [rank, D], its starting values. fill: of the rows [N, rank]."""

    # linear: projecting the pooled rows is the same and cheaper
    pools_before_combine = True

    def __init__(self, spec: TableSpec, projection: np.ndarray, fill: Callable[[Tensor], None]):
        super().__init__(spec, {"weight": Part(spec.num_embeddings, len(projection), fill)})
        self.projection = nn.Parameter(torch.from_numpy(projection.astype(np.float32)))

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        return (ids,)

    def combine(self, rows: tuple[Tensor], ids: Tensor | None) -> Tensor:
        return rows[0] @ self.projection


def orthonormal_rows(rng: np.random.RandomState, num_rows: int, width: int) -> np.ndarray:
    """[num_rows, width] float64, num_rows <= width: uniform among all with orthonormal rows (Mezzadri 2007: R's signs must be fixed)."""
    q, r = np.linalg.qr(rng.normal(size=(width, num_rows)))
    return (q * np.where(np.diag(r) < 0, -1.0, 1.0)).T


def starting_bound(spec: TableSpec, rank: int) -> float:
    """b of rows U(-b, b) behind a projection whose squares add up to `rank`: the variance is then b^2 / 3 x rank / D = 1 / (3 N)."""
    return math.sqrt(spec.embedding_dim / (rank * spec.num_embeddings))


def write_products(rows: Tensor, weight: np.ndarray, coefficients: np.ndarray) -> None:
    """rows [N, rank] = weight [N, D] coefficients [D, rank], in place, in float64 a piece at a time."""
    for part in slices(*weight.shape):
        rows[part].copy_(torch.from_numpy(weight[part].astype(np.float64) @ coefficients))


def project(weight: np.ndarray, coefficients: np.ndarray, projection: np.ndarray) -> np.ndarray:
    """weight [n, D] -> [n, D] float32: what a table with rows weight @ coefficients [D, rank] and projection [rank, D] gives for them."""
    rows = (weight.astype(np.float64) @ coefficients).astype(np.float32)
    return rows @ projection.astype(np.float32)


def rank_of(spec: TableSpec, knobs: dict) -> int:
    most = min(spec.num_embeddings, spec.embedding_dim)
    return knobs["rank"] or min(max(1, spec.embedding_dim // 4), most)


def check_rank(method: str, spec: TableSpec, knobs: dict) -> None:
    most = min(spec.num_embeddings, spec.embedding_dim)
    if rank_of(spec, knobs) > most:
        shape = f"{spec.num_embeddings} row{'s' * (spec.num_embeddings > 1)} of {spec.embedding_dim}"
        way_out = f"give {method}:rank={most}{' or less' * (most > 1)}"
        raise UserError(f"{method}:rank={knobs['rank']}: table {spec.name} has {shape}, so its rank is at most {most}; {way_out}")


def num_bytes(spec: TableSpec, knobs: dict) -> int:
    return 4 * rank_of(spec, knobs) * (spec.num_embeddings + spec.embedding_dim)


def most_rank(spec: TableSpec, knobs: dict) -> int:
    return min(spec.num_embeddings, spec.embedding_dim)


def exact_at(spec: TableSpec) -> dict:
    return {"rank": min(spec.num_embeddings, spec.embedding_dim)}


def on_vectors(spec: TableSpec, weight: np.ndarray, vectors: np.ndarray) -> LowRankTable:
    """The table W V V^t: rows W V [N, rank], projection V^t. vectors: V [D, rank], orthonormal columns."""
    return LowRankTable(spec, vectors.T, partial(write_products, weight=weight, coefficients=vectors))


def create(spec: TableSpec, knobs: dict, making: Making) -> LowRankTable:
    rank = rank_of(spec, knobs)
    fill = partial(fill_uniform, rng=making.rng, bound=starting_bound(spec, rank))
    return LowRankTable(spec, orthonormal_rows(making.rng, rank, spec.embedding_dim), fill)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """The optimum of the rank; what it is for the traffic is reported, not minimized (svd.py does)."""
    rank, weights = rank_of(spec, knobs), importance(making.counts)
    exact = decompose(weight, name=spec.name)
    vectors = exact.vectors[:, :rank]
    error, weighted = relative_errors(weight, lambda rows: project(rows, vectors, vectors.T), weights)
    found = facts(error, exact.values, rank)
    if weights is not None:
        found |= facts(weighted, decompose(weight, weights).values, rank, suffix="_weighted")
    return Converted(on_vectors(spec, weight, vectors), found)


METHOD = Method(
    name="low_rank",
    title="rows of `rank` numbers times a trained projection",
    paper="Lan et al., ALBERT, ICLR 2020, arXiv:1909.11942; Ginart et al., Mixed Dimension Embeddings, arXiv:1909.11810",
    knobs=(RANK,),
    bytes_formula="4 rank (N + D)",
    num_bytes=num_bytes,
    create=create,
    convert=_convert,
    sized_by="rank",
    sized_most=most_rank,
    exact_at=exact_at,
    check=partial(check_rank, "low_rank"),
)
