"""Shapes of a tensor train: how a table's rows, its dimension and its ranks are divided among the cores.

A table [N, D] becomes d cores G_k of [p_k, R_{k-1}, q_k, R_k] numbers with N <= p_1 ... p_d, D = q_1 ... q_d and R_0 = R_d = 1.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from dlrm_xla.layouts import LANES
from dlrm_xla.specs import TableSpec, UserError

DEFAULT_RANK = 16
MOST_CORES = 4
ALIGNED_RANK = 32  # dimensions are divided so that rows of this rank fill lines of 128 lanes: they must not change with the rank


@dataclass(frozen=True)
class TTShape:
    """rows p_1 .. p_d, dims q_1 .. q_d, ranks R_0 .. R_d."""

    rows: tuple[int, ...]
    dims: tuple[int, ...]
    ranks: tuple[int, ...]

    @property
    def cores(self) -> int:
        return len(self.rows)

    def core(self, k: int) -> tuple[int, int, int, int]:
        """p, R before, q, R after of core k (0 is the first)."""
        return self.rows[k], self.ranks[k], self.dims[k], self.ranks[k + 1]

    @property
    def num_numbers(self) -> int:
        return sum(math.prod(self.core(k)) for k in range(self.cores))


def shape_of(method: str, spec: TableSpec, knobs: dict) -> TTShape:
    """The shape that knobs rank, cores, rows and dims ask for; what is left out is derived. UserError where they do not go with the table."""
    where = f"table {spec.name} has {spec.num_embeddings} rows of {spec.embedding_dim}"
    dims = _factors(method, "dims", knobs["dims"])
    rows = _factors(method, "rows", knobs["rows"])
    cores = knobs["cores"] or len(dims or rows or ()) or default_cores(spec.embedding_dim)
    for name, given in (("rows", rows), ("dims", dims)):
        if given and len(given) != cores:
            raise UserError(f"{method}:{name}={knobs[name]}: must have {cores} factors, one for each core")
    if dims and math.prod(dims) != spec.embedding_dim:
        chosen = "x".join(map(str, split_dim(spec.embedding_dim, default_cores(spec.embedding_dim))))
        raise UserError(f"{method}:dims={knobs['dims']}: {where}, and the product is {math.prod(dims)}; leave dims out or use dims={chosen}")
    if rows and math.prod(rows) < spec.num_embeddings:
        chosen = "x".join(map(str, split_rows(spec.num_embeddings, cores)))
        raise UserError(f"{method}:rows={knobs['rows']}: {where}, and the product is {math.prod(rows)}, less than that; use rows={chosen}")
    if not dims and not split_dim(spec.embedding_dim, cores):
        most = default_cores(spec.embedding_dim)
        ones = "x".join(map(str, (1,) * (cores - most) + split_dim(spec.embedding_dim, most)))
        raise UserError(
            f"{method}:cores={cores}: {where}, and {spec.embedding_dim} is no product of {cores} numbers above 1; use cores={most} or dims={ones}"
        )
    dims, rows = dims or split_dim(spec.embedding_dim, cores), rows or split_rows(spec.num_embeddings, cores)
    most = useful_ranks(rows, dims)
    rank = knobs["rank"] or min(DEFAULT_RANK, max(most))
    if rank > max(most):
        raise UserError(
            f"{method}:rank={rank}: {where}, divided into {'x'.join(map(str, rows))} rows of {'x'.join(map(str, dims))}, and no rank above "
            f"{max(most)} is of use; use rank={max(most)} or less, or leave the table out by --compress-threshold"
        )
    return TTShape(rows, dims, (1, *(min(rank, useful) for useful in most), 1))


def useful_ranks(rows: tuple[int, ...], dims: tuple[int, ...]) -> list[int]:
    """For each of the d - 1 bonds the rank at which a tensor train holds any table of this shape: the shorter side of the unfolding there."""
    sizes = [p * q for p, q in zip(rows, dims, strict=True)]
    return [min(math.prod(sizes[:k]), math.prod(sizes[k:])) for k in range(1, len(sizes))]


def default_cores(dim: int) -> int:
    """Three, as in the paper, where the dimension has so many factors above 1; two otherwise."""
    return 3 if split_dim(dim, 3) else 2


@lru_cache(maxsize=4096)
def split_dim(dim: int, cores: int) -> tuple[int, ...]:
    """q_1 .. q_d of a dimension, all above 1; () where there are none. Two cores take a 1 where the dimension is a prime or 1.

    Of all divisions, in this order: those with the fewest lanes in a row of the left and the right table of the best cut, at rank 32;
    the most even; the smallest cores.
    """

    def key(dims: tuple[int, ...]):
        cuts = [(math.prod(dims[:k]), math.prod(dims[k:])) for k in range(1, cores)]
        lanes = min(sum(-(-ALIGNED_RANK * side // LANES) for side in cut) for cut in cuts)
        return lanes, sum(dims), sum(dims[1:-1]), dims

    divisors = [number for number in range(2, dim + 1) if dim % number == 0]
    found = [dims for dims in product(divisors, repeat=cores) if math.prod(dims) == dim] if len(divisors) ** cores <= 1 << 17 else []
    if not found and cores == 2:
        return 1, dim
    return min(found, key=key) if found else ()


@lru_cache(maxsize=4096)
def split_rows(num_rows: int, cores: int) -> tuple[int, ...]:
    """p_1 .. p_d: all within 10 % of the d-th root, with the fewest rows too many, then the most even.

    The largest comes last, because the product of the others is the length of the prefix table, and the smallest lies inside, where a core has R^2.
    """
    root = num_rows ** (1 / cores)
    near = range(max(1, math.floor(0.9 * root)), math.ceil(1.1 * root) + 1)
    best = None
    for first in _rising(near, cores - 1):
        last = -(-num_rows // math.prod(first))
        key = (math.prod(first) * last, max(*first, last) - min(*first, last))
        if first[-1] <= last <= near[-1] and (best is None or key < best[0]):
            best = key, (*first, last)
    ordered = best[1]
    return (*ordered[-2:-1], *ordered[:-2], ordered[-1])


def _rising(values: range, count: int):
    """All rising tuples of `count` values."""
    if count == 0:
        yield ()
        return
    for rest in _rising(values, count - 1):
        yield from ((*rest, value) for value in values if not rest or value >= rest[-1])


def _factors(method: str, name: str, text: str) -> tuple[int, ...]:
    """ "200x220x250" -> (200, 220, 250); "" -> ()."""
    if not text:
        return ()
    pieces = text.lower().split("x")
    if not 2 <= len(pieces) <= MOST_CORES or not all(piece.isascii() and piece.isdigit() and int(piece) for piece in pieces):
        example = "200x220x250" if name == "rows" else "2x2x4"
        raise UserError(f"{method}:{name}={text}: must be 2 to {MOST_CORES} whole numbers with x between them, as {example}")
    return tuple(map(int, pieces))
