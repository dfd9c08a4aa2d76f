"""Packed integers, and k-means with its one-dimensional optimum, against loops."""

import itertools

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression.codes import PackedIntegers, packed_bytes
from compression.kmeans import assign, kmeans, optimal_1d, sample, squared_distances
from dlrm_xla import backends

SIZES = (1, 7, 97, 10_007)
SHAPES = ((1, 1), (1, 20), (3, 5), (4, 8), (4, 13), (7, 7), (16, 4), (16, 8), (64, 8), (2, 16), (5, 31), (200, 8))  # codes, bits


def some_codes(rows: int, codes: int, bits: int) -> np.ndarray:
    return np.random.RandomState(rows).randint(0, 1 << bits, (rows, codes), dtype=np.int64)


@pytest.mark.parametrize("codes, bits", SHAPES)
@pytest.mark.parametrize("rows", SIZES)
def test_reads_what_was_written(rows, codes, bits):
    packed, written = PackedIntegers(rows, codes, bits), some_codes(rows, codes, bits)
    cut = rows // 3
    packed.write_all([(cut, written[cut:]), (0, written[:cut])])
    for dtype in (torch.int64, torch.int32):
        assert np.array_equal(packed.read(torch.arange(rows, dtype=dtype)).numpy(), written)
    ids = torch.from_numpy(np.random.RandomState(0).randint(0, rows, (2, 3, 5)))
    assert np.array_equal(packed.read(ids).numpy(), written[ids.numpy()])
    assert packed.read(ids).dtype == torch.int32


@pytest.mark.parametrize("codes, bits", SHAPES)
def test_writing_a_few_rows_leaves_the_others(codes, bits):
    packed, expected = PackedIntegers(97, codes, bits), some_codes(97, codes, bits)
    packed.write(0, expected)
    rng = np.random.RandomState(1)
    for _ in range(20):
        first = rng.randint(97)
        new = rng.randint(0, 1 << bits, (rng.randint(0, 98 - first), codes), dtype=np.int64)
        packed.write(first, new)
        expected[first : first + len(new)] = new
        assert np.array_equal(packed.read(torch.arange(97)).numpy(), expected)


def test_bytes():
    """Of the buffer; for powers of two nothing but whole lines of 512 bytes is lost."""
    for rows, (codes, bits) in itertools.product(SIZES, SHAPES):
        packed = PackedIntegers(rows, codes, bits)
        size = packed.words.nelement() * packed.words.element_size()
        assert size == packed_bytes(rows, codes, bits)
        assert rows * codes * bits / 8 <= size <= rows * codes * bits / 8 * (9 / 8) ** 2 + 512
    assert packed_bytes(1 << 20, 16, 8) == 16 << 20
    assert packed_bytes(1 << 20, 4, 13) == 13 << 19
    assert packed_bytes(1 << 20, 1, 1) == 1 << 17


@pytest.mark.parametrize("first, value", [(0, 16), (0, -1), (90, 0)])
def test_refuses_what_does_not_fit(first, value):
    packed = PackedIntegers(97, 2, 4)
    with pytest.raises(ValueError):
        packed.write(first, np.full((8, 2), value))
    assert not packed.words.any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_xla_reads_the_same_without_the_host(dtype):
    xla_or_skip()
    backend = backends.make("xla")
    for codes, bits in SHAPES:
        packed, written = PackedIntegers(1000, codes, bits), some_codes(1000, codes, bits)
        packed.write(0, written)
        ids = torch.from_numpy(np.random.RandomState(0).randint(0, 1000, (4, 6))).to(dtype)
        backend.place(packed)
        before = backend.fallbacks()
        read = packed.read(ids.to(backend.device))
        backend.end_step()
        assert backend.fallbacks() == before
        assert np.array_equal(read.cpu().numpy(), written[ids.numpy()])
    packed.write(1, written[:1])  # the buffer lies on the device
    assert packed.words.device.type == "xla"
    assert np.array_equal(packed.read(torch.tensor([1]).to(backend.device)).cpu().numpy(), written[:1])


def best_partition(values: np.ndarray, weights: np.ndarray, k: int) -> float:
    """Over all assignments of the numbers to k centers."""
    least = np.inf
    for labels in itertools.product(range(k), repeat=len(values)):
        total = 0.0
        for label in set(labels):
            own = np.array(labels) == label
            center = np.average(values[own], weights=weights[own])
            total += (weights[own] * (values[own] - center) ** 2).sum()
        least = min(least, total)
    return least


@pytest.mark.parametrize("n, k", [(1, 1), (4, 1), (5, 2), (6, 3), (8, 3), (5, 5), (3, 7)])
def test_the_one_dimensional_optimum_against_all_partitions(n, k):
    rng = np.random.RandomState(n)
    rows, weights = np.round(rng.randn(3, n), 1), rng.rand(3, n) + 0.01
    expected = [best_partition(*row, k) for row in zip(rows, weights, strict=True)]
    np.testing.assert_allclose(optimal_1d(rows, k, weights), expected, atol=1e-12)
    np.testing.assert_allclose(optimal_1d(rows, k), [best_partition(row, np.ones(n), k) for row in rows], atol=1e-12)


def by_table(values: np.ndarray, k: int) -> float:
    """The plain dynamic program: the first i numbers in q intervals."""
    values = np.sort(values)
    cost = [[np.var(values[j:i]) * (i - j) if i > j else 0.0 for i in range(len(values) + 1)] for j in range(len(values) + 1)]
    best = [0.0] + [np.inf] * len(values)
    for _ in range(k):
        best = [0.0] + [min(best[j] + cost[j][i] for j in range(i)) for i in range(1, len(values) + 1)]
    return best[-1]


def test_the_one_dimensional_optimum_of_more_numbers():
    rows = np.random.RandomState(0).standard_t(2, (2, 60)) + 1000
    for k in (2, 7, 16, 59):
        np.testing.assert_allclose(optimal_1d(rows, k), [by_table(row, k) for row in rows], rtol=1e-6, atol=1e-9)


def test_an_id_without_weight_decides_nothing():
    rows, weights = np.array([[0.0, 1.0, 5.0, 100.0]]), np.array([[1.0, 1.0, 1.0, 0.0]])
    np.testing.assert_allclose(optimal_1d(rows, 2, weights), 0.5)


@pytest.mark.parametrize("weighted", [False, True])
def test_kmeans_is_as_good_as_scikit_learns(weighted):
    cluster = pytest.importorskip("sklearn.cluster")
    rng = np.random.RandomState(0)
    points = (rng.randn(5000, 4) + 20).astype(np.float32)
    weights = rng.rand(5000) ** 4 if weighted else None
    for k in (2, 16, 128):
        found = kmeans(points, k, np.random.RandomState(1), weights)
        other = cluster.KMeans(k, n_init=1, random_state=0).fit(points, sample_weight=weights).inertia_
        assert found.distortion <= 1.08 * other
        differences = ((points[:, None].astype(np.float64) - found.centers[None]) ** 2).sum(2)
        np.testing.assert_allclose(differences.min(1), squared_distances(points, found.centers, found.assigned), atol=1e-4)
        expected = (differences[np.arange(5000), found.assigned] * (1 if weights is None else weights)).sum()
        assert found.distortion == pytest.approx(expected, rel=1e-6)


def test_kmeans_never_beats_the_optimum_and_comes_near():
    points = np.random.RandomState(0).randn(400, 1).astype(np.float32)
    for k in (2, 8, 32):
        least = optimal_1d(points.T, k)[0]
        assert least * (1 - 1e-5) <= kmeans(points, k, np.random.RandomState(2)).distortion <= 1.3 * least


def test_kmeans_where_little_is_left_to_cluster():
    rng = np.random.RandomState(0)
    points = rng.randn(7, 3).astype(np.float32)
    for k in (7, 9):
        found = kmeans(points, k, rng)
        assert found.centers.shape == (k, 3) and np.array_equal(found.centers[found.assigned], points)
    same = np.repeat(points[:2], 50, 0)
    for weights in (None, np.zeros(100), np.eye(100)[0]):
        found = kmeans(same, 10, rng, weights)
        assert np.isfinite(found.centers).all() and found.distortion == 0
    assert np.array_equal(kmeans(same, 2, rng).centers[kmeans(same, 2, np.random.RandomState(1)).assigned].shape, same.shape)


def test_kmeans_moves_centers_that_own_nothing():
    """Far more clusters than the seeds find: each ends with a point of its own."""
    points = np.concatenate([np.random.RandomState(0).randn(500, 2), [[1e3, 0], [0, 1e3], [-1e3, 0]]]).astype(np.float32)
    found = kmeans(points, 40, np.random.RandomState(0))
    assert len(np.unique(found.assigned)) == 40 and found.distortion < 60


def test_kmeans_is_deterministic_and_pieces_do_not_matter(monkeypatch):
    points = np.random.RandomState(0).randn(3000, 4).astype(np.float32)
    first, second = (kmeans(points, 50, np.random.RandomState(3)) for _ in range(2))
    assert np.array_equal(first.centers, second.centers) and np.array_equal(first.assigned, second.assigned)
    monkeypatch.setattr("compression.kmeans.BUDGET", 1000)
    assert (assign(points, first.centers) == first.assigned).mean() > 0.999


def test_sampling_keeps_sums_on_average():
    rng = np.random.RandomState(0)
    weights, values = 1000.0 / (1 + rng.permutation(5000)), rng.randn(5000)
    for given in (None, weights):
        expected = (values if given is None else weights * values).sum()
        sums = []
        for _ in range(300):
            chosen, of_them = sample(5000, 500, rng, given)
            assert 400 <= len(chosen) <= 600 and len(np.unique(chosen)) == len(chosen)
            sums.append((of_them * values[chosen]).sum())
        assert abs(np.mean(sums) - expected) < 4 * np.std(sums) / 300**0.5
    chosen, of_them = sample(5000, 500, rng, weights)
    assert set(np.argsort(-weights)[:50]) <= set(chosen)
    assert sample(10, 500, rng, None)[0].tolist() == list(range(10))
