"""Random projection: N rows of `rank` trained numbers times a projection that is drawn once and never trained. "random_projection".

    e = W[i] P,  W [N, rank] trained,  P [rank, D] fixed

Johnson and Lindenstrauss 1984; signs: Achlioptas, "Database-friendly random projections", JCSS 66 (2003); training in a random
subspace: Li et al., "Measuring the Intrinsic Dimension of Objective Landscapes", ICLR 2018, arXiv:1804.08838.
P by family: "orthogonal" has orthonormal rows; "gaussian" normal numbers and "sign" +-1, scaled so that their squares add up to `rank` as well.
With W from U(-b, b), b = sqrt(D / (rank N)), the vectors start with a plain table's standard deviation, 1 / sqrt(3 N), for every family.

A trained table is converted by least squares, W P^+ = W P^t (P P^t)^(-1): the projection on P's row space. That space is uniformly
random for "orthogonal" and "gaussian" alike, so the mean of the squared relative error is 1 - rank / D for any table: what ignoring the
table costs. (A Johnson-Lindenstrauss sketch, W P^t P D / rank, has an error larger than the table, about sqrt(D / rank) times.)
P is a persistent buffer and is counted; it could be drawn again from a seed, but the rows are what costs.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.low_rank import num_bytes, orthonormal_rows, project, starting_bound, write_products
from compression.method import Converted, Knob, Making, Method
from compression.optimal import decompose, facts, importance, relative_errors
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

FAMILIES = ("orthogonal", "gaussian", "sign")


class RandomProjectionTable(EmbeddingTable):
    """projection: [rank, D], kept. fill: of the rows [N, rank]."""

    kind = "seeds"  # of its fixed matrix, which a seed could make again

    pools_before_combine = True  # linear

    def __init__(self, spec: TableSpec, projection: np.ndarray, fill: Callable[[Tensor], None]):
        super().__init__(spec, {"weight": Part(spec.num_embeddings, len(projection), fill)})
        self.register_buffer("projection", torch.from_numpy(projection.astype(np.float32)))

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        return (ids,)

    def combine(self, rows: tuple[Tensor], ids: Tensor | None) -> Tensor:
        return rows[0] @ self.projection


def draw_projection(rng: np.random.RandomState, family: str, rank: int, dim: int) -> np.ndarray:
    """[rank, dim] float64; its squares add up to `rank`."""
    if family == "orthogonal":
        return orthonormal_rows(rng, rank, dim)
    drawn = rng.normal(size=(rank, dim)) if family == "gaussian" else 2.0 * rng.randint(0, 2, size=(rank, dim)) - 1
    return drawn * (np.sqrt(rank) / np.linalg.norm(drawn))


def _rank(spec: TableSpec, knobs: dict) -> int:
    return knobs["rank"] or max(1, spec.embedding_dim // 4)


def _filled(spec: TableSpec, knobs: dict) -> dict:
    return {**knobs, "rank": _rank(spec, knobs)}


def _check(spec: TableSpec, knobs: dict) -> None:
    most = spec.embedding_dim
    if _rank(spec, knobs) > most:
        raise UserError(
            f"random_projection:rank={knobs['rank']}: table {spec.name} has vectors of {most}, so its rank is at most {most}; "
            f"give random_projection:rank={most} or less"
        )


def _create(spec: TableSpec, knobs: dict, making: Making) -> RandomProjectionTable:
    rank = _rank(spec, knobs)
    projection = draw_projection(making.rng, knobs["family"], rank, spec.embedding_dim)
    return RandomProjectionTable(spec, projection, partial(fill_uniform, rng=making.rng, bound=starting_bound(spec, rank)))


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """facts: "expected" is sqrt(1 - rank / D). The rows of an id do not depend on other ids, so there is nothing to weight."""
    rank, weights = _rank(spec, knobs), importance(making.counts)
    projection = draw_projection(making.rng, knobs["family"], rank, spec.embedding_dim).astype(np.float32)
    inverse = np.linalg.pinv(projection.astype(np.float64))  # [D, rank]
    error, weighted = relative_errors(weight, lambda rows: project(rows, inverse, projection), weights)
    found = facts(error, decompose(weight, name=spec.name).values, rank)
    found["expected"] = float(np.sqrt(1 - rank / spec.embedding_dim))
    if weights is not None:
        found |= facts(weighted, decompose(weight, weights).values, rank, suffix="_weighted")
    return Converted(RandomProjectionTable(spec, projection, partial(write_products, weight=weight, coefficients=inverse)), found)


METHOD = Method(
    name="random_projection",
    title="rows of `rank` numbers times a fixed random projection",
    paper="Johnson and Lindenstrauss, 1984; Achlioptas, Database-friendly random projections, JCSS 66, 2003",
    knobs=(
        Knob("rank", int, None, "numbers that an id keeps; default: a quarter of D", least=1),
        Knob("family", str, "orthogonal", "how the projection is drawn", choices=FAMILIES),
    ),
    bytes_formula="4 rank (N + D)",
    num_bytes=lambda spec, knobs: num_bytes(spec, _filled(spec, knobs)),
    create=_create,
    convert=_convert,
    sized_by="rank",
    sized_most=lambda spec, knobs: spec.embedding_dim,
    exact_at=lambda spec: {"rank": spec.embedding_dim, "family": "orthogonal"},
    check=_check,
)
