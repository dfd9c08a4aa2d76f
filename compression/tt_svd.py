"""TT-SVD: the tensor train of a trained table, bond after bond by its largest singular values, and how far it is from the best.

Oseledets, "Tensor-Train Decomposition", SIAM J. Sci. Comput. 33(5), 2011, algorithm 1 and theorem 2.2: with eps_k the error of the best rank-R_k
matrix to the k-th unfolding, every tensor train of these ranks has an error of at least max eps_k, and this one's is at most sqrt(sum eps_k^2).
Differs from the paper: singular vectors come from a Gram matrix in float64 where the shorter side of an unfolding is at most LARGEST_GRAM, so time
is linear in the table and memory is a copy of it; from a randomized range finder with two power iterations (Halko, Martinsson, Tropp 2011) above.
The table is filled up with rows of zeros to p_1 ... p_d. The lower bound is that of the part without them, and holds whatever stands there.
"""

import math

import numpy as np
import torch
from torch import Tensor

from compression.tt_shapes import TTShape

LARGEST_GRAM = 4096
OVERSAMPLING, POWER = 16, 2
PIECE = 1 << 22  # numbers of a table that are in float64 at once


@torch.no_grad()
def tt_svd(weight: np.ndarray, shape: TTShape, rng: np.random.RandomState) -> tuple[list[Tensor], dict[str, float]]:
    """weight [N, D] float32 -> cores [p, R, q, R'] float32, and facts: relative_error, lower, upper, all relative to the table's norm.

    Works from the last digit, which runs slowest, to the first: modes [p_d q_d, ..., p_1 q_1], ranks in that order.
    """
    tensor, ranks = _unfold(weight, shape), shape.ranks[::-1]
    sizes = [p * q for p, q in zip(shape.rows[::-1], shape.dims[::-1], strict=True)]
    norm = math.sqrt(_sum_of_squares(tensor))
    if norm == 0.0:
        return [torch.zeros(shape.core(k)) for k in range(shape.cores)], {"relative_error": 0.0, "lower": 0.0, "upper": 0.0}
    cores, rest, dropped = [], tensor.reshape(-1), []
    for k in range(shape.cores - 1, 0, -1):
        matrix = rest.reshape(-1, sizes[k] * ranks[k + 1])
        basis = _right_vectors(matrix, ranks[k], rng)
        rest = matrix @ basis
        dropped.append(max(0.0, _sum_of_squares(matrix) - _sum_of_squares(rest)))
        cores.append(basis.T)
    cores = [rest, *cores[::-1]]
    last, rows_of = shape.rows[-1], math.prod(shape.rows[:-1])
    complete = weight.shape[0] // rows_of  # values of the last digit whose rows are all real
    error = _squared_error(tensor, cores, complete, sizes, ranks)
    lower, upper = 0.0, 0.0
    for k, missed in zip(range(shape.cores - 1, 0, -1), dropped, strict=True):
        unfolding = tensor.reshape(math.prod(sizes[:k]), -1)
        whole, real = _tails(unfolding, ranks[k], complete, last)
        lower, upper = max(lower, real), upper + (missed if whole is None else whole)
    shaped = [
        core.reshape(ranks[k], shape.rows[-1 - k], shape.dims[-1 - k], ranks[k + 1]).permute(1, 3, 2, 0).contiguous() for k, core in enumerate(cores)
    ][::-1]
    error += _squared_error_of_rows(weight, shaped, complete * rows_of)
    return shaped, {"relative_error": math.sqrt(error) / norm, "lower": math.sqrt(lower) / norm, "upper": min(1.0, math.sqrt(upper) / norm)}


def _unfold(weight: np.ndarray, shape: TTShape) -> Tensor:
    """[N, D] -> [p_d, q_d, ..., p_1, q_1], rows of zeros at the end; a copy."""
    d, missing = shape.cores, math.prod(shape.rows) - weight.shape[0]
    rows = torch.from_numpy(np.ascontiguousarray(weight, np.float32))
    if missing:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, missing))
    order = [axis for k in range(d) for axis in (k, 2 * d - 1 - k)]
    return rows.view(*shape.rows[::-1], *shape.dims).permute(order).contiguous()


def _right_vectors(matrix: Tensor, rank: int, rng: np.random.RandomState) -> Tensor:
    """[m, n] -> [n, rank], orthonormal: its leading right singular vectors."""
    rows, columns = matrix.shape
    if rank == columns:
        return torch.eye(columns)
    if rank == rows:
        return torch.linalg.qr(matrix.T).Q
    if columns <= LARGEST_GRAM and columns <= rows:
        return torch.linalg.eigh(_gram(matrix))[1][:, -rank:].flip(1).float()
    if rows <= LARGEST_GRAM:
        left = torch.linalg.eigh(_gram(matrix.T))[1][:, -rank:].flip(1).float()
        return torch.linalg.qr(matrix.T @ left).Q
    tests = min(rank + OVERSAMPLING, rows, columns)
    basis = torch.from_numpy(rng.standard_normal((columns, tests))).float()
    for _ in range(POWER + 1):
        basis = torch.linalg.qr(matrix.T @ torch.linalg.qr(matrix @ basis).Q).Q
    inner = torch.linalg.svd(matrix @ basis, full_matrices=False)[2]
    return basis @ inner[:rank].T


def _gram(matrix: Tensor) -> Tensor:
    """matrix^T matrix in float64, a piece of rows at a time."""
    total = torch.zeros(matrix.shape[1], matrix.shape[1], dtype=torch.float64)
    step = max(1, PIECE // matrix.shape[1])
    for start in range(0, matrix.shape[0], step):
        piece = matrix[start : start + step].double()
        total.addmm_(piece.T, piece)
    return total


def _tails(unfolding: Tensor, rank: int, complete: int, last: int) -> tuple[float | None, float]:
    """Squared error of the best matrix of this rank to an unfolding [m, n], and to its part with the first `complete` of `last` values of the last
    digit, the outermost index; (None, 0) where neither side is short enough."""
    rows, columns = unfolding.shape
    part = rows // last * complete
    if columns <= min(rows, LARGEST_GRAM):
        gram = _gram(unfolding)
        of_part = gram - _gram(unfolding[part:]) if complete < last else gram
    elif rows <= LARGEST_GRAM:
        gram = _gram(unfolding.T)
        of_part = gram[:part, :part]
    else:
        return None, 0.0
    whole = _tail(gram, rank)
    return whole, whole if complete == last else _tail(of_part, rank)


def _tail(gram: Tensor, rank: int) -> float:
    return float(torch.linalg.eigvalsh(gram)[: max(0, len(gram) - rank)].clamp(min=0).sum()) if len(gram) else 0.0


def _squared_error(tensor: Tensor, cores: list[Tensor], complete: int, sizes: list[int], ranks: tuple[int, ...]) -> float:
    """Of the rows with the first `complete` values of the last digit."""
    rest = torch.ones(1, 1)
    for k in range(len(sizes) - 1, 0, -1):
        rest = (cores[k].reshape(-1, ranks[k + 1]) @ rest).view(ranks[k], -1)
    flat = tensor.reshape(sizes[0], -1)
    return sum(_sum_of_squares(flat[row : row + 1] - cores[0].view(sizes[0], -1)[row : row + 1] @ rest) for row in range(complete * tensor.shape[1]))


def _squared_error_of_rows(weight: np.ndarray, cores: list[Tensor], start: int) -> float:
    """Of the rows from `start` on, which share their last digit."""
    if start == weight.shape[0]:
        return 0.0
    rows_of = math.prod(core.shape[0] for core in cores[:-1])
    table = torch.ones(1, 1, 1)  # [rows, q .., R]
    for core in [*cores[:-1], cores[-1][start // rows_of : start // rows_of + 1]]:
        table = torch.einsum("ncr,prqs->pncqs", table, core).reshape(table.shape[0] * core.shape[0], -1, core.shape[3])
    real = torch.from_numpy(weight[start:])
    return _sum_of_squares(table[: len(real), :, 0] - real)


def _sum_of_squares(values: Tensor) -> float:
    flat = values.reshape(-1)
    return sum(float(flat[start : start + PIECE].double().square().sum()) for start in range(0, len(flat), PIECE))
