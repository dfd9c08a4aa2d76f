"""Random batches drawn one number at a time in upstream's order, with Python lists: slow and plain, sharing no code with the loader."""

from dataclasses import dataclass

import numpy as np


@dataclass
class LooseBatch:
    """dense [n, num_dense], bags[t][row] a list of ids, labels [n]."""

    dense: np.ndarray
    bags: list[list[list[int]]]
    labels: np.ndarray


def bag_size(rng, rows, lookups):
    """A uniform number times the largest size, rounded half to even, at least 1."""
    return int(np.rint(max(1.0, float(rng.random_sample()) * min(rows, lookups))))


def uniform_bag(rng, size, rows):
    return [int(np.rint(float(rng.random_sample()) * (rows - 1))) for _ in range(size)]


def gaussian_bag(rng, size, low, high, mu, sigma):
    """Clipped numbers, not yet cut to ids."""
    mean = (high + low) / 2 if mu == -1 else mu
    return [min(max(float(rng.normal(mean, sigma)), low), high) for _ in range(size)]


def trace_bag(rng, size, lines, distances, shares, padding):
    """A list as the LRU stack, its most recent id last. Distance 0 takes the first of the list, distance d the d-th from the end."""
    stack, num_new, ids = list(lines), 0, []
    for _ in range(size):
        u = float(rng.random_sample())
        if num_new < max(distances):
            u *= max(share for distance, share in zip(distances, shares, strict=True) if distance <= num_new)
        elif padding:
            u = (1.0 - shares[0]) * u + shares[0]
        distance = next(d for d, share in zip(distances, shares, strict=True) if u <= share)
        chosen = stack.pop(-distance if distance else 0)
        num_new += distance == 0
        stack.append(chosen)
        ids.append(chosen)
    return ids


def draw(spec, rng, num_rows, trace=None):
    """One batch of `num_rows` rows. trace: (lines, distances, shares), the same for every table."""
    dense = np.array([[rng.random_sample() for _ in range(spec.num_dense)] for _ in range(num_rows)]).astype(np.float32)
    bags = []
    for rows in spec.table_rows:
        table = []
        for _ in range(num_rows):
            size = spec.num_indices_per_lookup if spec.fixed else bag_size(rng, rows, spec.num_indices_per_lookup)
            if spec.distribution == "uniform":
                bag = uniform_bag(rng, size, rows)
            elif spec.distribution == "gaussian":
                bag = gaussian_bag(rng, size, spec.rand_min, spec.rand_max, spec.rand_mu, spec.rand_sigma)
            else:
                bag = trace_bag(rng, size, *trace, spec.trace_padding)
            if not (spec.fixed and spec.keep_duplicates):
                bag = sorted(set(bag))  # repeats go before numbers are cut to ids and before ids are wrapped
            table.append([int(value) % rows if spec.distribution == "trace" else int(value) for value in bag])
        bags.append(table)
    labels = np.array([rng.random_sample() for _ in range(num_rows)]).astype(np.float32)
    return LooseBatch(dense, bags, np.array([round(float(x)) for x in labels], dtype=np.float32) if spec.round_targets else labels)


def epoch(spec, rng, trace=None):
    """All batches of an epoch, drawn as they are asked for."""
    num_rows = spec.num_batches * spec.batch_size if spec.num_batches else spec.data_size
    rng.seed(spec.seed)
    while num_rows > 0:
        yield draw(spec, rng, min(num_rows, spec.batch_size), trace)
        num_rows -= spec.batch_size
