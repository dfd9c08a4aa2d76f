"""Spectra, optima and bounds against NumPy's SVD; randomized against exact on random cases."""

import math

import numpy as np
import pytest

from compression import optimal
from compression.against_optimal import known_spectrum, known_table, rank_rows, time_rows
from compression.low_rank import project
from compression.optimal import decompose, eckart_young, hmt_bound, importance, relative_errors
from compression.svd import oversampling_of, random_right_vectors


def random_table(num_rows, width, seed=0):
    return np.random.RandomState(seed).normal(size=(num_rows, width)).astype(np.float32)


@pytest.mark.parametrize("shape", [(1, 16), (7, 16), (97, 16), (10_007, 8), (7, 7)], ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_decompose_is_numpys(shape, weighted, monkeypatch):
    monkeypatch.setattr(optimal, "PIECE", 100)  # many pieces, the last one short
    table = random_table(*shape)
    counts = np.random.RandomState(1).randint(1, 50, shape[0]).astype(np.float64) if weighted else None
    found = decompose(table, importance(counts))
    scale = np.sqrt(counts / counts.mean()) if weighted else np.ones(shape[0])
    np.testing.assert_allclose(found.values, np.linalg.svd(scale[:, None] * table.astype(np.float64), compute_uv=False), rtol=1e-9)
    np.testing.assert_allclose(found.vectors.T @ found.vectors, np.eye(shape[1]), atol=1e-12)


def test_small_singular_values_survive_the_gram_matrix():
    values = known_spectrum("power", 4.0, 32)  # down to 1e-6 of the first
    table = known_table(1000, 32, values, np.random.RandomState(0))
    np.testing.assert_allclose(decompose(table).values, np.linalg.svd(table.astype(np.float64), compute_uv=False), rtol=1e-3)


def test_no_other_matrix_of_the_rank_is_nearer():
    table, rng = random_table(97, 16).astype(np.float64), np.random.RandomState(2)
    found = decompose(table)
    for rank in (1, 5, 15):
        least = eckart_young(found.values, rank)
        v = found.vectors[:, :rank]
        rest = table - table @ v @ v.T
        assert np.linalg.norm(rest) == pytest.approx(least)
        assert np.linalg.norm(rest, 2) == pytest.approx(eckart_young(found.values, rank, "spectral"))
        for _ in range(50):
            near = np.linalg.qr(v + 0.1 * rng.normal(size=v.shape))[0]
            assert np.linalg.norm(table - table @ near @ near.T) > least
    assert eckart_young(found.values, 16) == eckart_young(found.values, 16, "spectral") == 0


def test_the_bound_in_its_limits():
    values = known_spectrum("power", 0.5, 32)
    assert hmt_bound(values, 4, 5) == pytest.approx(math.sqrt(2) * eckart_young(values, 4))
    assert hmt_bound(values, 4, 1) == math.inf
    assert hmt_bound(values, 4, 28) == eckart_young(values, 4)
    spectral = [hmt_bound(values, 4, 10, power, "spectral") for power in (0, 1, 8)]
    assert spectral[0] > spectral[1] > spectral[2] > eckart_young(values, 4, "spectral")
    # theorem 10.6 written out
    tail = math.sqrt(sum(1 / j for j in range(5, 33)))
    assert spectral[0] == pytest.approx((1 + math.sqrt(4 / 9)) * values[4] + math.e * math.sqrt(14) / 10 * tail)
    assert hmt_bound(np.zeros(32), 4, 10, 0, "spectral") == 0


@pytest.mark.parametrize("weighted", [False, True])
def test_relative_errors_by_pieces(weighted, monkeypatch):
    monkeypatch.setattr(optimal, "PIECE", 50)
    table, counts = random_table(97, 16), np.random.RandomState(1).randint(0, 9, 97).astype(np.float64)
    plain, of_counts = relative_errors(table, lambda rows: rows * np.float32(0.75), importance(counts) if weighted else None)
    assert plain == pytest.approx(0.25)
    assert of_counts == pytest.approx(0.25) if weighted else of_counts is None


def test_known_tables_have_their_spectrum(monkeypatch):
    monkeypatch.setattr(optimal, "PIECE", 1000)
    for shape in ((1, 16), (7, 16), (16, 16), (10_007, 16)):
        for kind, parameter in (("power", 0.5), ("power", 0.0), ("exponential", 0.8), ("step", 0.1)):
            values = known_spectrum(kind, parameter, min(shape))
            table = known_table(*shape, values, np.random.RandomState(3))
            np.testing.assert_allclose(np.linalg.svd(table.astype(np.float64), compute_uv=False), values, rtol=1e-5)
    np.testing.assert_array_equal(known_spectrum("step", 0.1, 8), [1, 1] + [0.1] * 6)


def test_one_power_iteration_is_within_2_percent_on_random_cases():
    """100 of them; benchmarks/randomized_svd.py does 1,000."""
    for number in range(100):
        rng = np.random.RandomState(10_000 + number)
        num_rows, width = int(np.exp(rng.uniform(np.log(20), np.log(1500)))), int(rng.randint(2, 129))
        count = min(num_rows, width)
        kind, parameter = [("power", 0.0), ("power", 0.25), ("power", 0.5), ("power", 1.0), ("exponential", 0.9), ("step", 0.5)][number % 6]
        table = known_table(num_rows, width, known_spectrum(kind, parameter, count), rng)
        rank = int(rng.randint(1, count + 1))
        vectors = random_right_vectors(table, rank, rng, family=("gaussian", "sign")[number % 2])
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(rank), atol=1e-10)
        error, _ = relative_errors(table, lambda rows, vectors=vectors: project(rows, vectors, vectors.T))
        exact = np.linalg.svd(table.astype(np.float64), compute_uv=False)
        norm = np.linalg.norm(exact)
        assert error <= 1.02 * eckart_young(exact, rank) / norm + 1e-6, (number, kind, parameter, rank)
        assert error <= hmt_bound(exact, rank, oversampling_of(rank)) / norm + 1e-6


def test_a_table_of_less_rank_than_is_asked_for():
    table = random_table(97, 3) @ random_table(3, 16, seed=1)
    for power in (0, 1, 4):
        vectors = random_right_vectors(table, 8, np.random.RandomState(0), power=power)
        np.testing.assert_allclose(vectors.T @ vectors, np.eye(8), atol=1e-10)
        np.testing.assert_allclose(table @ vectors @ vectors.T, table, atol=1e-5)


def test_rows_of_a_report():
    table, counts = random_table(97, 16), 1e3 / np.arange(1, 98) ** 1.2
    rows = rank_rows(table, [1, 4, 16], np.random.RandomState(0), counts)
    assert [row["rank"] for row in rows] == [1, 4, 16] and rows[1]["bytes"] == 4 * 4 * (97 + 16)
    for row in rows:
        assert 1 - 1e-6 <= row["ratio"] < 1.02 and 1 - 1e-6 <= row["ratio_weighted"] < 1.02
        assert row["unweighted_in_weighted_norm"] >= row["relative_error_weighted"] - 1e-3
        assert row["weighted_in_unweighted_norm"] >= row["relative_error"] - 1e-3
    assert all(later["optimal"] < row["optimal"] for row, later in zip(rows, rows[1:], strict=False))
    assert "ratio_weighted" not in rank_rows(table, [2], np.random.RandomState(0))[0]


def test_rows_of_times():
    rows = time_rows([50, 500], 16, 4, np.random.RandomState(0), rounds=1)
    assert [row["rows"] for row in rows] == [50, 500] and all(row["exact_ms"] >= 0 and row["ratio"] < 1.02 for row in rows)
