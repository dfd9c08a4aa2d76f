"""How near to the optimum a randomized SVD comes, rank by rank: rows for `python -m compression report`, and tables of known spectra.

A known table is U diag(s) V^t. U: columns of the cosine basis of N numbers, sqrt(2 / N) cos(pi (i + 1/2) f / N), orthonormal for any N, with a
random sign for each row, so that a piece is made without the rest; V: uniformly random.
"""

import time
from collections.abc import Callable

import numpy as np

from compression.low_rank import orthonormal_rows, project
from compression.optimal import Decomposition, decompose, facts, importance, relative_errors, slices
from compression.svd import oversampling_of, random_right_vectors

SPECTRA: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "power": lambda j, alpha: j**-alpha,
    "exponential": lambda j, rate: rate ** (j - 1),
    "step": lambda j, low: np.where(j <= max(1, len(j) // 4), 1.0, low),
}


def known_spectrum(kind: str, parameter: float, count: int) -> np.ndarray:
    """[count] float64. "power" j^-parameter (0: flat), "exponential" parameter^(j - 1), "step": a quarter of ones, then `parameter`."""
    return SPECTRA[kind](np.arange(1, count + 1, dtype=np.float64), parameter)


def known_table(num_rows: int, width: int, values: np.ndarray, rng: np.random.RandomState) -> np.ndarray:
    """[N, D] float32 with singular values `values` [min(N, D)], up to rounding. Memory: the table; time: one cosine for each number."""
    count = len(values)
    assert count == min(num_rows, width)
    frequencies = rng.choice(num_rows, count, replace=False)
    scales = np.where(frequencies == 0, np.sqrt(1 / num_rows), np.sqrt(2 / num_rows)) * values
    right = scales[:, None] * orthonormal_rows(rng, count, width)
    table = np.empty((num_rows, width), np.float32)
    for part in slices(num_rows, width):
        places = np.arange(part.start, part.stop) + 0.5
        signs = 2.0 * rng.randint(0, 2, len(places)) - 1
        table[part] = (signs[:, None] * np.cos(np.pi / num_rows * np.outer(places, frequencies))) @ right
    return table


def rank_rows(
    table: np.ndarray, ranks: list[int], rng: np.random.RandomState, counts: np.ndarray | None = None, oversampling: int | None = None,
    power: int = 1,
) -> list[dict]:  # fmt: skip
    """For each rank: {"rank", "bytes", "compression" (bytes of the table / bytes), then optimal.facts of the randomized SVD: "relative_error",
    "optimal", "ratio", "bound", "bound_slack"}, all relative to the table's norm. With counts [N] also those ending in "_weighted", of the
    randomized SVD that minimizes the weighted error, and what each has in the other norm: "unweighted_in_weighted_norm",
    "weighted_in_unweighted_norm"."""
    weights, num_rows, width = importance(counts), *table.shape
    plain = decompose(table)
    weighted = None if weights is None else decompose(table, weights)
    rows = []
    for rank in ranks:
        size = 4 * rank * (num_rows + width)
        row = {"rank": rank, "bytes": size, "compression": 4 * num_rows * width / size}
        sampled = oversampling_of(rank) if oversampling is None else oversampling

        def errors_of(used, rank=rank, sampled=sampled):
            vectors = random_right_vectors(table, rank, rng, sampled, power, weights=used)
            return relative_errors(table, lambda piece: project(piece, vectors, vectors.T), weights)

        error, crossed = errors_of(None)
        row |= facts(error, plain.values, rank, sampled)
        if weighted is not None:
            crossed_back, error = errors_of(weights)
            row |= facts(error, weighted.values, rank, sampled, suffix="_weighted")
            row |= {"unweighted_in_weighted_norm": crossed, "weighted_in_unweighted_norm": crossed_back}
        rows.append(row)
    return rows


def time_rows(
    sizes: list[int], width: int, rank: int, rng: np.random.RandomState, oversampling: int | None = None, power: int = 1, rounds: int = 5,
    values: np.ndarray | None = None,
) -> list[dict]:  # fmt: skip
    """For each number of rows N: {"rows", "width", "rank", "oversampling", "power", "exact_ms", "randomized_ms", "ratio_of_times" (randomized /
    exact), "relative_error", "optimal", ...}. Times: until the right singular vectors are known, of this process's cores together, medians of
    `rounds` rounds in which both take turns. values: [width], default j^-0.5."""
    values = known_spectrum("power", 0.5, width) if values is None else values
    sampled = oversampling_of(rank) if oversampling is None else oversampling
    rows = []
    for num_rows in sizes:
        table = known_table(num_rows, width, values[: min(num_rows, width)], rng)
        times = []
        for _ in range(rounds):
            start = time.process_time()
            exact: Decomposition = decompose(table)
            middle = time.process_time()
            vectors = random_right_vectors(table, rank, rng, sampled, power)
            times.append((middle - start, time.process_time() - middle))
        exact_s, random_s = np.median(np.array(times), axis=0)
        error, _ = relative_errors(table, lambda piece, vectors=vectors: project(piece, vectors, vectors.T))
        rows.append({
            "rows": num_rows, "width": width, "rank": rank, "oversampling": sampled, "power": power, "exact_ms": 1000 * float(exact_s),
            "randomized_ms": 1000 * float(random_s), "ratio_of_times": float(random_s / exact_s), **facts(error, exact.values, rank, sampled),
        })  # fmt: skip
    return rows
