"""What no approximation of a rank can beat, and how far one is from it: spectra, the Eckart-Young optimum, the bound of randomized methods.

For a table W [N, D] with singular values s_1 >= s_2 >= ...: no matrix of rank k is nearer to W than W V V^t, V the first k right singular
vectors (Eckart and Young 1936; Mirsky 1960): Frobenius error sqrt(sum_{j>k} s_j^2), spectral error s_{k+1}.

Weighted by traffic: of all matrices of rank k, sum_i f_i |w_i - b_i|^2 is least for B = W V V^t with V of diag(sqrt f) W. On the ids with
f_i > 0 that is Eckart-Young for diag(sqrt f) W, divided by sqrt f_i. And once the span of V is given, the best b_i is the projection of
w_i on it whatever f_i is; so ids that were never looked up are projected too, the best that span can do for them.

All in float64, a piece of the table at a time. D is small here, so V comes from the Gram matrix W^t W = V S^2 V^t: one pass, N D^2 products.
Squaring loses half the digits, s_j is lost below 1e-8 s_1: float64 has them, because a float32 table is itself no more precise than 6e-8 of its
numbers. (A Gram matrix in float32 is of use down to 3e-4 s_1 only.)
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dlrm_xla.specs import UserError

PIECE = 1 << 18  # numbers of a table in work at a time: 2 MB of float64 stay in a core's cache; pieces of 67 MB take 1.2 to 1.5 times as long
ROUNDING = 1e-6  # relative errors below it are float32 rounding, and count as this much where errors are divided
NEVER = 1e-12  # what an id that is never looked up counts, of the mean: decides only what the other ids leave open


def slices(num_rows: int, width: int) -> Iterator[slice]:
    step = max(1, PIECE // width)
    return (slice(start, min(start + step, num_rows)) for start in range(0, num_rows, step))


def importance(counts: np.ndarray | None) -> np.ndarray | None:
    """counts [N] of lookups -> [N] float64 with mean 1 and no zero; None stays None. Where nothing was counted all ids count the same."""
    if counts is None:
        return None
    mean = counts.mean()
    return np.maximum(counts / mean, NEVER) if mean > 0 else np.ones(len(counts))


def piece_of(table: np.ndarray, part: slice, weights: np.ndarray | None) -> np.ndarray:
    """[n, D] float64: rows of the table, each times the square root of its weight."""
    piece = table[part].astype(np.float64)
    if weights is not None:
        piece *= np.sqrt(weights[part])[:, None]
    return piece


@dataclass(frozen=True)
class Decomposition:
    """Of W, or of diag(sqrt f) W. values: [min(N, D)] singular values, falling. vectors: [D, D] right singular vectors, a column each."""

    values: np.ndarray
    vectors: np.ndarray

    @property
    def norm(self) -> float:
        return float(np.linalg.norm(self.values))


def gram(table: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """[D, D] float64: sum_i f_i w_i w_i^t, in one pass."""
    total = np.zeros((table.shape[1], table.shape[1]))
    for part in slices(*table.shape):
        piece = piece_of(table, part, weights)
        total += piece.T @ piece  # NumPy sees the symmetry and does half the products
    return total


def decompose(table: np.ndarray, weights: np.ndarray | None = None, name: str = "") -> Decomposition:
    """The exact one. name: of the table, for the UserError where a number is not finite."""
    total = gram(table, weights)
    if not np.isfinite(total).all():
        raise UserError(f"table {name}: some of its numbers are not finite, so it has no nearest table of a rank; take an earlier checkpoint")
    squares, vectors = np.linalg.eigh(total)
    return Decomposition(np.sqrt(np.maximum(squares[::-1], 0))[: min(table.shape)], vectors[:, ::-1])


def eckart_young(values: np.ndarray, rank: int, norm: str = "frobenius") -> float:
    """The least error of any matrix of that rank, absolute. norm: "frobenius" | "spectral"."""
    tail = values[rank:]
    if norm == "spectral":
        return float(tail[0]) if len(tail) else 0.0
    return float(np.linalg.norm(tail))


def hmt_bound(values: np.ndarray, rank: int, oversampling: int, power: int = 0, norm: str = "frobenius") -> float:
    """What the error of a randomized approximation is at most in the mean over gaussian test matrices, absolute.

    Halko, Martinsson and Tropp, SIAM Review 53 (2011), arXiv:0909.4061. Frobenius: theorem 10.5, (1 + k / (p - 1))^(1/2) times the optimum;
    power iterations do not enter. It stands for all k + p dimensions and for the best k of them alike: with P the projection on the sample,
    |W - (P W)_k|^2 <= |W - P W_k|^2 = |W - W_k|^2 + |(I - P) W_k|^2, and the proof bounds this last term by the one that depends on the
    test matrix. Spectral: theorem 10.6, with power iterations corollary 10.10, for all k + p dimensions.
    Where k + p reaches min(N, D) the sample holds every row and the bound is the optimum; below p = 2 there is none: infinite.
    """
    if rank + oversampling >= len(values):
        return eckart_young(values, rank, norm)
    if oversampling < 2:
        return math.inf
    if norm == "frobenius":
        return math.sqrt(1 + rank / (oversampling - 1)) * eckart_young(values, rank)
    if values[0] == 0:
        return 0.0
    exponent = 2 * power + 1
    tail = (values[rank:] / values[0]) ** exponent
    factors = 1 + math.sqrt(rank / (oversampling - 1)), math.e * math.sqrt(rank + oversampling) / oversampling
    return float(values[0] * (factors[0] * tail[0] + factors[1] * np.linalg.norm(tail)) ** (1 / exponent))


def relative_errors(
    table: np.ndarray, approximate: Callable[[np.ndarray], np.ndarray], weights: np.ndarray | None = None
) -> tuple[float, float | None]:
    """|W - B| / |W| in the Frobenius norm, and the same weighted (None without weights). approximate: rows [n, D] float32 -> those of B."""
    sums = np.zeros((2, 2))  # plain and weighted: of the error, of the table
    for part in slices(*table.shape):
        rows = table[part]
        whole = rows.astype(np.float64)
        for column, matrix in enumerate((whole - approximate(rows), whole)):
            squares = np.einsum("nd,nd->n", matrix, matrix)
            sums[0, column] += squares.sum()
            sums[1, column] += squares @ weights[part] if weights is not None else 0
    plain, weighted = (math.sqrt(error / whole) if whole else 0.0 for error, whole in sums)
    return plain, weighted if weights is not None else None


def ratio(error: float, other: float) -> float:
    """Of two relative errors, 1 where both are rounding."""
    return max(error, ROUNDING) / max(other, ROUNDING)


def facts(error: float, values: np.ndarray, rank: int, oversampling: int | None = None, suffix: str = "") -> dict[str, float]:
    """A measured relative error beside what is possible, all relative to the table's norm.

    ratio        measured / optimal
    bound        of hmt_bound, where `oversampling` says that the result is a randomized one that minimized this norm
    bound_slack  bound / measured: above 1, the bound holds
    """
    norm = np.linalg.norm(values) or 1.0
    optimal = eckart_young(values, rank) / norm
    found = {"relative_error": error, "optimal": optimal, "ratio": ratio(error, optimal)}
    if oversampling is not None:
        found["bound"] = hmt_bound(values, rank, oversampling) / norm
        found["bound_slack"] = ratio(found["bound"], error)
    return {key + suffix: float(value) for key, value in found.items()}
