"""Weighted k-means, and its exact optimum where points are numbers.

`kmeans`: seeds by D^2 sampling (k-means++, Arthur & Vassilvitskii, SODA 2007) in growing rounds (as k-means||, Bahmani et al., VLDB 2012: a
round draws an eighth as many points as there are seeds, so 4,096 seeds take 70 rounds and the distances to each are computed once), then
Lloyd's iterations. Finding the optimum is NP-hard in general. `optimal_1d`: in one dimension clusters are intervals of the sorted numbers, and
dynamic programming finds the best ones (Wang & Song, R Journal 2011; by divide and conquer in O(k n log n), Gronlund et al., arXiv:1701.07204).
"""

from dataclasses import dataclass

import numpy as np

BUDGET = 1 << 18  # distances held at a time, 1 MB
IMPROVES = 5e-4  # relative, per iteration: less ends the search
GROWTH = 8


@dataclass(frozen=True)
class Clusters:
    """centers [k, d] float32; assigned [n] int64, the nearest center; distortion: sum of w ||x - center||^2."""

    centers: np.ndarray
    assigned: np.ndarray
    distortion: float


def kmeans(points: np.ndarray, k: int, rng: np.random.RandomState, weights: np.ndarray | None = None, iterations: int = 25) -> Clusters:
    """points [n, d] float32, weights [n] not negative, None: ones. With k >= n every point is a center, and centers beyond them are zeros.

    Distances are float32, sums float64. Two runs with equal streams give equal bits.
    """
    n, d = points.shape
    if k >= n:
        return Clusters(np.concatenate([points, np.zeros((k - n, d), np.float32)]), np.arange(n), 0.0)
    weights = np.ones(n) if weights is None or not weights.any() else np.asarray(weights, np.float64)
    centers, best = _seeds(points, weights, k, rng), None
    for iteration in range(max(iterations, 1)):
        assigned = assign(points, centers)
        squares = squared_distances(points, centers, assigned)
        found = Clusters(centers, assigned, float(weights @ squares))
        improves = best is None or found.distortion < best.distortion * (1 - IMPROVES)
        best = found if best is None or found.distortion < best.distortion else best
        if not improves or iteration + 1 == iterations:
            break
        centers = _means(points, weights, assigned, squares, centers)
    return best


def assign(points: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """[n] int64: the nearest of centers [k, d] for points [n, d], the first of equally near ones, up to float32 rounding of |c|^2 / 2 - x.c,
    both about the mean of the centers.

    0.5 ns for each distance at d = 4: a piece stays in the cache, and NumPy's argmin takes a tenth of torch's time.
    """
    origin = centers.mean(0, dtype=np.float64).astype(np.float32)
    centers = centers - origin
    half_norms = (centers.astype(np.float64) ** 2).sum(1)[None] / 2
    table = np.concatenate([-centers.T, half_norms.astype(np.float32)])
    nearest, size = np.empty(len(points), np.int64), max(BUDGET // len(centers), 16)
    lifted = np.ones((size, table.shape[0]), np.float32)
    distances = np.empty((size, table.shape[1]), np.float32)
    for first in range(0, len(points), size):
        piece = points[first : first + size]
        lifted[: len(piece), :-1] = piece - origin
        nearest[first : first + size] = np.matmul(lifted, table, out=distances)[: len(piece)].argmin(1)
    return nearest


def squared_distances(points: np.ndarray, centers: np.ndarray, assigned: np.ndarray) -> np.ndarray:
    """[n] float64: ||x - its center||^2."""
    squares = np.empty(len(points))
    for first in range(0, len(points), BUDGET):
        piece = slice(first, first + BUDGET)
        difference = points[piece].astype(np.float64) - centers[assigned[piece]]
        squares[piece] = np.einsum("nd,nd->n", difference, difference)
    return squares


def weighted_means(points: np.ndarray, weights: np.ndarray | None, assigned: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(sums [k, d] of w x, totals [k] of w), float64."""
    totals = np.bincount(assigned, weights, minlength=k).astype(np.float64)
    columns = (column if weights is None else column * weights for column in points.T.astype(np.float64))
    return np.stack([np.bincount(assigned, column, minlength=k) for column in columns], 1), totals


def sample(n: int, size: int, rng: np.random.RandomState, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """About `size` of n points and their weights, such that weighted sums over them are right on average: (indices, weights).

    A point is taken with probability in proportion to its weight, at most 1 (a heavy one is always taken), and weighs its weight over that.
    """
    if n <= size:
        return np.arange(n), np.ones(n) if weights is None else weights
    if weights is None or not weights.any():
        chosen = np.sort(rng.choice(n, size, replace=False))
        return chosen, np.full(size, n / size)
    chance, factor = np.minimum(weights / weights.max(), 1.0), 1.0
    for _ in range(50):  # raise the factor until `size` are expected; each round caps those that reach 1
        total = np.minimum(chance * factor, 1.0).sum()
        if total >= 0.999 * min(size, np.count_nonzero(weights)):
            break
        factor *= min(size, np.count_nonzero(weights)) / total
    chance = np.minimum(chance * factor, 1.0)
    chosen = np.flatnonzero(rng.random_sample(n) < chance)
    return chosen, weights[chosen] / chance[chosen]


def optimal_1d(rows: np.ndarray, k: int, weights: np.ndarray | None = None) -> np.ndarray:
    """rows [R, n] of numbers, weights alike -> [R] float64: for each row the least sum of w (x - center)^2 that k centers can reach.

    Work R k n log2 n, 40 to 80 ns each.
    """
    order = np.argsort(rows, axis=1, kind="stable")
    values = np.take_along_axis(rows, order, 1).astype(np.float64)
    values -= values.mean(1, keepdims=True)
    weights = np.ones(values.shape) if weights is None else np.take_along_axis(np.asarray(weights, np.float64), order, 1)
    moments = [np.pad((weights * values**power).cumsum(1), ((0, 0), (1, 0))) for power in range(3)]  # [R, n + 1]
    r, n = values.shape
    if k >= n:
        return np.zeros(r)
    cost = np.full((r, n + 1), np.inf)  # of the first i numbers with the clusters so far
    cost[:, 0] = 0.0
    for _ in range(k):
        cost = _one_more(cost, moments)
    return cost[:, n]


def _one_more(cost: np.ndarray, moments: list[np.ndarray]) -> np.ndarray:
    """new[r, i] = min over j <= i of cost[r, j] + the cost of one cluster (j, i]. The best j rises with i: of the middle i first, then of the
    middles of both halves between their neighbours' best, level by level and all rows at once."""
    r, last = cost.shape[0], cost.shape[1] - 1
    best = np.zeros((r, last + 2), np.int64)  # best[:, last + 1] bounds from above
    best[:, last + 1] = last
    new = np.zeros_like(cost)
    step = 1 << last.bit_length()
    while step:
        at = np.arange(step, last + 1, 2 * step)
        if len(at):
            low, high = best[:, at - step], np.minimum(best[:, np.minimum(at + step, last + 1)], at)
            new[:, at], best[:, at] = _least(cost, moments, at, low, high)
        step >>= 1
    new[:, 0] = 0.0
    return new


def _least(cost: np.ndarray, moments: list[np.ndarray], at: np.ndarray, low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row and each i in `at`: the least cost[j] + cluster (j, i] with low <= j <= high, and the first such j. low, high [R, A]."""
    lengths = (high - low + 1).reshape(-1)
    starts = np.concatenate([[0], lengths.cumsum()[:-1]])
    row = np.repeat(np.arange(cost.shape[0]), len(at)).repeat(lengths)
    end = np.tile(at, cost.shape[0]).repeat(lengths)
    j = np.arange(lengths.sum()) - starts.repeat(lengths) + low.reshape(-1).repeat(lengths)
    weight, first, second = (moment[row, end] - moment[row, j] for moment in moments)
    total = cost[row, j] + np.maximum(second - first**2 / np.where(weight > 0, weight, 1.0), 0.0)
    least = np.minimum.reduceat(total, starts)
    place = np.where(total == least.repeat(lengths), j, cost.shape[1])
    return least.reshape(low.shape), np.minimum.reduceat(place, starts).reshape(low.shape)


def _seeds(points: np.ndarray, weights: np.ndarray, k: int, rng: np.random.RandomState) -> np.ndarray:
    """[k, d]: points drawn in proportion to w times the squared distance to the nearest seed before. Once no distance is left: repeats."""
    centers = np.empty((k, points.shape[1]), np.float32)
    nearest = np.full(len(points), np.inf)
    chosen = _draw(weights, 1, rng)
    filled = 0
    while True:
        centers[filled : filled + len(chosen)] = points[chosen]
        new = centers[filled : filled + len(chosen)]
        nearest = np.minimum(nearest, squared_distances(points, new, assign(points, new)))
        filled += len(chosen)
        wanted = min(max(filled // GROWTH, 1), k - filled)
        chosen = _draw(weights * nearest, wanted, rng) if wanted else []
        if not len(chosen):
            centers[filled:] = centers[0]
            return centers


def _draw(chances: np.ndarray, count: int, rng: np.random.RandomState) -> np.ndarray:
    """At most `count` different indices, with probabilities in proportion to chances (one drawn twice counts once); none if all are 0."""
    ends = chances.cumsum()
    if not ends[-1] > 0:
        return np.empty(0, np.int64)
    drawn = np.searchsorted(ends, rng.random_sample(count) * ends[-1], side="right")
    return np.unique(np.minimum(drawn, np.flatnonzero(chances)[-1]))


def _means(points: np.ndarray, weights: np.ndarray, assigned: np.ndarray, squares: np.ndarray, centers: np.ndarray) -> np.ndarray:
    """The next centers: weighted means; one without weight moves to a point that costs most where it is, unless nothing costs anything."""
    sums, totals = weighted_means(points, weights, assigned, len(centers))
    new = np.where(totals[:, None] > 0, sums / np.where(totals > 0, totals, 1.0)[:, None], centers).astype(np.float32)
    empty = np.flatnonzero(totals == 0)
    if len(empty):
        losses = weights * squares
        worst = np.argsort(-losses, kind="stable")[: len(empty)]
        worst = worst[losses[worst] > 0]
        new[empty[: len(worst)]] = points[worst]
    return new
