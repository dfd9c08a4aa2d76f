"""From a trained table to the nearest one of a rank: exactly ("svd") or with random numbers ("rsvd"). Training goes on from the result.

    W ~ (W V) V^t,  V [D, rank] the first right singular vectors of W, or of diag(sqrt f) W where lookups weight the ids (optimal.py says why)

The result is a low-rank table (low_rank.py): rows W V, projection V^t.

Exact: Eckart and Young, Psychometrika 1 (1936). V from the Gram matrix, one pass over the table, N D^2 products.

Randomized: Halko, Martinsson and Tropp, "Finding Structure with Randomness", SIAM Review 53 (2011), arXiv:0909.4061, algorithm 4.4 with 5.1, for
A = diag(sqrt f) W and l = rank + oversampling:
    Z = random [D, l];  `power` times: Z = qr(A^t A Z);  Y = A Z;  Q = orthonormal basis of Y;  V = right singular vectors of B = Q^t A
Differs from the paper, whose Q [N, l] has as many rows as the table: Q = Y (Y^t Y)^(-1/2) is never made, because B = (Z^t T)^(-1/2) T^t
needs only T = A^t A Z [D, l] and Y^t Y = Z^t T. So a table is read power + 1 times a piece at a time and nothing grows with N. That squares
the condition of Y, which float64 products bear for what a float32 table can hold (optimal.py). And rows are W V instead of Q U S, one more
pass over the table: the best rows for that V, so the error is never above the paper's for the same random numbers, and ids that are
never looked up have rows too.
Differs from scikit-learn's randomized_svd: oversampling adds up to the width of the table and no further; QR after every pass, not LU.

A pass costs 4 N D l products, the Gram matrix N D^2 (by symmetry): random numbers pay where l (power + 1) is well below D / 4
(benchmarks/randomized_svd.py), and on a TPU, where one column of tiles is 128 wide, not below D = 128.
"""

from functools import partial

import numpy as np

from compression.fitting import WEIGHTED, id_weights
from compression.low_rank import RANK, check_rank, create, exact_at, most_rank, num_bytes, on_vectors, project, rank_of
from compression.method import Converted, Knob, Making, Method
from compression.optimal import decompose, facts, importance, piece_of, relative_errors, slices
from dlrm_xla.specs import TableSpec

FAMILIES = ("gaussian", "sign")
LEAST_OVERSAMPLING = 10
NOISE = 1e-14  # eigenvalues of Y^t Y below so much of the largest are rounding


def oversampling_of(rank: int) -> int:
    """The default. With one power iteration the error of 1,000 random cases is at most 1.5 % above the optimum with as many as the rank,
    2.4 % with half as many and 4.8 % with 10; the worst are spectra that fall as slowly as j^-0.25 (benchmarks/randomized_svd.py)."""
    return max(LEAST_OVERSAMPLING, rank)


def gram_times(table: np.ndarray, z: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """A^t (A z) [D, l] float64 with A = diag(sqrt f) W, in one pass."""
    total = np.zeros_like(z)
    for part in slices(*table.shape):
        piece = piece_of(table, part, weights)
        total += piece.T @ (piece @ z)
    return total


def random_right_vectors(
    table: np.ndarray, rank: int, rng: np.random.RandomState, oversampling: int | None = None, power: int = 1, family: str = "gaussian",
    weights: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """table [N, D] -> V [D, rank] float64 with orthonormal columns, rank <= min(N, D). The algorithm is in the head of this file."""
    shape = table.shape[1], min(rank + (oversampling_of(rank) if oversampling is None else oversampling), *table.shape)
    z = rng.normal(size=shape) if family == "gaussian" else 2.0 * rng.randint(0, 2, size=shape) - 1
    for _ in range(power):
        z = np.linalg.qr(gram_times(table, z, weights))[0]
    t = gram_times(table, z, weights)
    squares, basis = np.linalg.eigh(z.T @ t)
    kept = squares > NOISE * squares[-1]
    # columns left out are zeros, whose left singular vectors complete the orthonormal ones
    scales = np.where(kept, 1 / np.sqrt(np.where(kept, squares, 1)), 0)
    return np.linalg.svd(t @ (basis * scales), full_matrices=False)[0][:, :rank]


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making, method: str) -> Converted:
    """The facts hold the optimum too, for which the Gram matrices are made in any case."""
    rank, weights, used = rank_of(spec, knobs), importance(making.counts), id_weights(method, spec, knobs, making)
    plain = decompose(weight, name=spec.name)
    weighted = None if weights is None else decompose(weight, weights)
    minimized = weighted if knobs["weighted"] else plain
    sampled = None
    if method == "rsvd":
        sampled = oversampling_of(rank) if knobs["oversampling"] is None else knobs["oversampling"]
        vectors = random_right_vectors(weight, rank, making.rng, sampled, knobs["power"], knobs["family"], used)
    else:
        vectors = minimized.vectors[:, :rank]
    error, error_weighted = relative_errors(weight, lambda rows: project(rows, vectors, vectors.T), weights)
    found = facts(error, plain.values, rank, sampled if minimized is plain else None)
    if weighted is not None:
        found |= facts(error_weighted, weighted.values, rank, sampled if minimized is weighted else None, suffix="_weighted")
    return Converted(on_vectors(spec, weight, vectors), found)


SVD = Method(
    name="svd",
    title="the nearest table of a rank, exactly (singular value decomposition)",
    paper="Eckart and Young, The approximation of one matrix by another of lower rank, Psychometrika 1, 1936",
    knobs=(RANK, WEIGHTED),
    bytes_formula="4 rank (N + D)",
    num_bytes=num_bytes,
    shell=create,
    convert=partial(_convert, method="svd"),
    sized_by="rank",
    sized_most=most_rank,
    exact_at=exact_at,
    check=partial(check_rank, "svd"),
    weighted=True,
)

RSVD = Method(
    name="rsvd",
    title="nearly the nearest table of a rank, by random sampling (randomized SVD)",
    paper="Halko, Martinsson and Tropp, Finding Structure with Randomness, SIAM Review 53, 2011, arXiv:0909.4061",
    knobs=(
        RANK,
        Knob("oversampling", int, None, f"random directions beyond the rank; default: as many, at least {LEAST_OVERSAMPLING}", least=0),
        Knob("power", int, 1, "power iterations, each one more pass over the table", least=0, most=20),
        Knob("family", str, "gaussian", "the random numbers: normal, or 1 and -1", choices=FAMILIES),
        WEIGHTED,
    ),
    bytes_formula="4 rank (N + D)",
    num_bytes=num_bytes,
    shell=create,
    convert=partial(_convert, method="rsvd"),
    sized_by="rank",
    sized_most=most_rank,
    exact_at=exact_at,
    check=partial(check_rank, "rsvd"),
    weighted=True,
)

METHODS = (SVD, RSVD)
