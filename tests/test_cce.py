"""Clustered compositional embeddings against loops in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression import cce
from compression.cce import METHOD
from compression.hashes import Hashes
from compression.method import Making
from dlrm_xla import backends
from dlrm_xla.specs import TableSpec

SHAPES = ((1, 4), (7, 16), (97, 64), (10_007, 16))


def made(ids: int, dim: int = 16, seed: int = 0, **given):
    """(table with starting values, its parts filled)."""
    spec, knobs = TableSpec("emb_l.0", ids, dim), METHOD.knob_values({name: str(value).lower() for name, value in given.items()})
    table = METHOD.create(spec, knobs, Making(np.random.RandomState(seed)))
    table.fill_buffers()
    parts = {name: torch.full((part.num_rows, part.width), np.nan) for name, part in table.parts.items()}
    for name, part in table.parts.items():
        part.fill(parts[name])
    size = sum(4 * part.nelement() for part in parts.values()) + sum(b.nelement() * b.element_size() for b in table.buffers())
    assert size == METHOD.num_bytes(spec, knobs)
    return table, parts


def look_up(table, parts: dict, ids: torch.Tensor) -> torch.Tensor:
    rows = table.row_ids(ids)
    read = tuple(part.index_select(0, row.reshape(-1)).reshape(*ids.shape, -1) for part, row in zip(parts.values(), rows, strict=True))
    return table.combine(read, ids)


def by_loops(table, parts: dict) -> np.ndarray:
    """[N, D] float64."""
    n, dim, rows, chunks = table.spec.num_embeddings, table.spec.embedding_dim, table.rows, table.chunks
    pointers = table.pointers.read(torch.arange(n)).numpy()
    hashed = np.stack([table.hashes.row(torch.arange(n), chunk, rows).numpy() for chunk in range(chunks)], 1)
    values = np.empty((n, chunks, dim // chunks))
    for i in range(n):
        for chunk in range(chunks):
            first = parts["table0"][chunk * rows + pointers[i, chunk]].double().numpy()
            values[i, chunk] = first + parts["table1"][chunk * rows + hashed[i, chunk]].double().numpy()
    return values.reshape(n, dim)


@pytest.mark.parametrize("rows, dim", SHAPES)
def test_values(rows, dim):
    table, parts = made(rows, dim, rows=5)
    np.testing.assert_allclose(look_up(table, parts, torch.arange(rows)).numpy(), by_loops(table, parts), rtol=1e-5, atol=1e-7)


def test_starting_values():
    table, parts = made(10_007, rows=2000)
    vectors = look_up(table, parts, torch.arange(10_007))
    assert vectors.std() == pytest.approx(1 / math.sqrt(3 * 10_007), rel=0.02)
    pointers = table.pointers.read(torch.arange(10_007))
    assert pointers.max() == 1999 and len(pointers.unique()) == 2000
    again = made(10_007, rows=2000)
    assert torch.equal(look_up(*again, torch.arange(10_007)), vectors)
    assert not torch.equal(look_up(*made(10_007, seed=1, rows=2000), torch.arange(10_007)), vectors)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("rows, dim", SHAPES)
def test_a_clustering(rows, dim, weighted, monkeypatch):
    """T0 at the pointers of the new assignment; T1 is the least-squares fit to what is left, with the hash that stays. Ids in several blocks:
    the reference code redraws the hash for each of them."""
    monkeypatch.setattr(cce, "BLOCK", 1000)
    table, parts = made(rows, dim, rows=40, weighted=weighted)
    counts = np.ones(rows)
    if weighted:
        for _ in range(3):
            seen = np.random.RandomState(1).zipf(1.3, 5000) % rows
            table.observe(seen)
        counts = 3.0 * np.bincount(seen, minlength=rows)
        assert np.array_equal(table.lookups.counts, counts)
        counts = np.maximum(counts / counts.mean(), 1e-12)
    before, seeds = by_loops(table, parts), table.hashes.seeds.clone()
    assert table.reorganize(parts, 0)
    assert not torch.equal(table.hashes.seeds, seeds)
    assert all(torch.isfinite(part).all() for part in parts.values())
    k, chunks, width = table.rows, table.chunks, dim // table.chunks
    pointers, ids = table.pointers.read(torch.arange(rows)).numpy(), torch.arange(rows)
    after = by_loops(table, parts)
    for chunk in range(chunks):
        own = slice(chunk * width, (chunk + 1) * width)
        centers = parts["table0"][chunk * k : (chunk + 1) * k].double().numpy()
        distances = ((before[:, None, own] - centers[None]) ** 2).sum(2)
        np.testing.assert_allclose(distances[np.arange(rows), pointers[:, chunk]], distances.min(1), atol=1e-6 * (before**2).mean())
        left, hashed = before[:, own] - centers[pointers[:, chunk]], table.hashes.row(ids, chunk, k).numpy()
        design = np.zeros((rows, k))
        design[np.arange(rows), hashed] = np.sqrt(counts)
        best = np.linalg.lstsq(design, left * np.sqrt(counts)[:, None], rcond=None)[0]
        np.testing.assert_allclose(parts["table1"][chunk * k : (chunk + 1) * k].numpy(), best, atol=1e-5 * np.abs(before).max())
        unread = np.setdiff1d(np.arange(k), hashed)
        assert not parts["table1"][chunk * k + unread].any()
        reached = (counts[:, None] * (after[:, own] - before[:, own]) ** 2).sum()
        least = (counts[:, None] * (left - best[hashed]) ** 2).sum()
        assert reached == pytest.approx(least, rel=1e-3, abs=1e-9 * (counts[:, None] * before[:, own] ** 2).sum())


def test_ids_that_belong_together_come_together():
    """Ten kinds of vectors, noise beside them: converted, each kind is found and the error is that of the noise."""
    rng = np.random.RandomState(0)
    kinds = rng.randint(10, size=2000)
    weight = (rng.randn(10, 16)[kinds] + 0.01 * rng.randn(2000, 16)).astype(np.float32)
    spec, knobs = TableSpec("emb_l.0", 2000, 16), METHOD.knob_values({"rows": "16", "chunks": "2"})
    done = METHOD.convert(spec, knobs, weight, Making(np.random.RandomState(0)))
    assert done.facts["relative_error"] < 0.012
    pointers = done.table.pointers.read(torch.arange(2000)).numpy()
    for chunk in range(2):
        assert all(len(set(kinds[pointers[:, chunk] == row])) <= 1 for row in range(16))
    parts = {name: torch.empty(part.num_rows, part.width) for name, part in done.table.parts.items()}
    done.table.fill_buffers()  # as a collection does; the pointers stay
    for name, part in done.table.parts.items():
        part.fill(parts[name])
    error = np.linalg.norm(by_loops(done.table, parts) - weight) / np.linalg.norm(weight)
    assert error == pytest.approx(done.facts["relative_error"], rel=1e-3)


@pytest.mark.parametrize("rows, dim", SHAPES)
def test_exact_with_a_row_for_each_id(rows, dim):
    spec, weight = TableSpec("emb_l.0", rows, dim), np.random.RandomState(0).randn(rows, dim).astype(np.float32) + 10
    knobs = METHOD.knob_values({name: str(value) for name, value in METHOD.exact_at(spec).items()})
    assert METHOD.convert(spec, knobs, weight, Making(np.random.RandomState(0))).facts["relative_error"] < 1e-7


def test_clusters_after_the_first_epochs_only_and_differently_each_time():
    table, parts = made(500, rows=20, until=2)
    seeds = [table.hashes.seeds.clone()]
    for epoch in range(2):
        assert table.reorganize(parts, epoch)
        seeds.append(table.hashes.seeds.clone())
    assert len({tuple(seed.flatten().tolist()) for seed in seeds}) == 3
    kept = by_loops(table, parts)
    assert not table.reorganize(parts, 2)
    assert np.array_equal(by_loops(table, parts), kept) and torch.equal(table.hashes.seeds, seeds[-1])


def test_goes_on_from_a_checkpoint_in_the_same_way():
    table, parts = made(500, rows=20)
    table.reorganize(parts, 0)
    other, _ = made(500, seed=5, rows=20)
    other.load_state_dict(table.state_dict())
    copies = {name: part.clone() for name, part in parts.items()}
    table.reorganize(parts, 1)
    other.reorganize(copies, 1)
    assert np.array_equal(by_loops(table, parts), by_loops(other, copies))


def test_gradients_equal_a_dense_models():
    table, parts = made(97, rows=6)
    ids = torch.from_numpy(np.random.RandomState(0).randint(0, 97, (5, 8)))
    wanted = torch.from_numpy(np.random.RandomState(1).randn(5, 8, 16))
    leaves = {name: part.double().requires_grad_() for name, part in parts.items()}
    (look_up(table, leaves, ids) * wanted).sum().backward()
    for leaf, rows in zip(leaves.values(), table.row_ids(ids), strict=True):
        expected = np.zeros(leaf.shape)
        np.add.at(expected, rows.numpy(), wanted.numpy().reshape(5, 8, table.chunks, -1))
        np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_xla(dtype):
    """Lookups, and a clustering of a table whose buffers lie on the device."""
    xla_or_skip()
    backend = backends.make("xla")
    table, parts = made(97, rows=6)
    ids = torch.arange(97, dtype=dtype)
    expected = look_up(table, parts, ids)
    twin, twins = made(97, rows=6)
    twin.reorganize(twins, 0)
    backend.place(table)
    before = backend.fallbacks()
    on_xla = look_up(table, {name: part.to(backend.device) for name, part in parts.items()}, ids.to(backend.device))
    backend.end_step()
    assert backend.fallbacks() == before
    assert torch.equal(on_xla.cpu(), expected)
    table.reorganize(parts, 0)
    assert table.pointers.words.device.type == "xla"
    on_xla = look_up(table, {name: part.to(backend.device) for name, part in parts.items()}, ids.to(backend.device))
    assert torch.equal(on_xla.cpu(), look_up(twin, twins, ids))


def test_pointers_are_small():
    """10 million ids, 4 chunks, 8,192 rows: 65 MB of pointers; two int64 for each chunk, as the reference code keeps, are 640 MB."""
    spec, knobs = TableSpec("emb_l.0", 10_000_000, 16), METHOD.knob_values({"rows": "8192"})
    assert METHOD.num_bytes(spec, knobs) - 8 * 8192 * 16 - 8 * 4 - 4 == pytest.approx(10_000_000 * 4 * 13 / 8, abs=512)
    assert isinstance(made(7)[0].hashes, Hashes)
