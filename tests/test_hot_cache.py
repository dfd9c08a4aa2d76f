"""The cache of hot rows: what enters, stays and leaves, and that no update is lost."""

import numpy as np
import pytest
import torch

import compression.hot_cache as hot_cache
from compression.hot_cache import HotCache, most_frequent
from compression.method import Making
from compression.tt import METHOD, SVD_METHOD
from dlrm_xla.specs import TableSpec

RATE = 0.05


def knobs(**given) -> dict:
    return {**{knob.name: knob.default for knob in METHOD.knobs}, **given}


def make(cache: int, counts=None, num_rows: int = 97, rank: int = 4):
    """A table in float64 and its rows, filled."""
    spec = TableSpec("t", num_rows, 12)
    table = METHOD.create(spec, knobs(rank=rank, cache=cache), Making(np.random.RandomState(0), counts)).double()
    table.fill_buffers()
    rows = {name: torch.empty(part.num_rows, part.width, dtype=torch.float64) for name, part in table.parts.items()}
    for name, part in table.parts.items():
        part.fill(rows[name])
    return table, rows


def sgd_step(table, rows: dict, ids: torch.Tensor, direction: torch.Tensor, rate: float = RATE) -> None:
    """Rows and cores by plain SGD on <vectors, direction>; ids [B]."""
    numbers = table.row_ids(ids)
    leaves = tuple(view[index].requires_grad_() for view, index in zip(rows.values(), numbers, strict=True))
    (table.combine(leaves, ids) * direction).sum().backward()
    with torch.no_grad():
        for view, index, leaf in zip(rows.values(), numbers, leaves, strict=True):
            view.index_add_(0, index, leaf.grad, alpha=-rate)
        for core in table.cores:
            if core.grad is not None:
                core -= rate * core.grad
            core.grad = None


def vectors(table, rows: dict, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return table.combine(tuple(view[index] for view, index in zip(rows.values(), table.row_ids(ids), strict=True)), ids)


def test_a_cache_changes_no_value_until_something_is_learnt():
    counts = np.arange(97.0)
    cached, rows = make(10, counts)
    plain, nothing = make(0)
    ids = torch.arange(97)
    assert set(cached.cache.held()[0]) == set(range(87, 97))
    assert torch.allclose(vectors(cached, rows, ids), vectors(plain, nothing, ids), rtol=0, atol=1e-12)


def test_a_flush_after_one_step_gives_the_cores_of_a_step_without_a_cache():
    """Up to rounding where all ids of the step are cached; where others move the cores in the same step, up to the square of the rate."""
    generator = torch.Generator().manual_seed(1)

    def difference(ids: torch.Tensor, rate: float) -> float:
        direction = torch.randn(len(ids), 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (cached, rows), (plain, nothing) = make(20, np.arange(97.0)), make(0)
        sgd_step(cached, rows, ids, direction, rate)
        sgd_step(plain, nothing, ids, direction, rate)
        before = [core.detach().clone() for core in make(0)[0].cores]
        cached.flush(rows)
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(plain.cores, before, strict=True))
        assert moved > 0.1 * rate and not len(cached.cache.held()[0])
        return max(float((a - b).detach().abs().max()) for a, b in zip(cached.cores, plain.cores, strict=True))

    hot = torch.randint(77, 97, (50,), generator=generator)
    assert difference(hot, RATE) < 1e-14
    mixed = torch.randint(0, 97, (50,), generator=generator)
    whole, half = difference(mixed, 1e-3), difference(mixed, 5e-4)
    assert whole > 0 and whole / half == pytest.approx(4, rel=0.05)


def test_no_update_is_lost_over_a_trace_with_refreshes(monkeypatch):
    """For every id: what was folded into the cores plus what the cache still holds is -lr x the sum of its gradients while it was cached."""
    monkeypatch.setattr(hot_cache, "LEAST_KEPT", 64)  # so that rare ids are forgotten
    rng, num_rows = np.random.RandomState(3), 2003
    names = rng.permutation(num_rows)
    frequencies = np.arange(1, num_rows + 1) ** -1.2
    table, rows = make(20, num_rows=num_rows)
    folded, expected = torch.zeros(num_rows, 12, dtype=torch.float64), torch.zeros(num_rows, 12, dtype=torch.float64)
    fold = table.fold

    def count_fold(ids, deltas):
        folded[ids] += deltas
        fold(ids, deltas)

    table.fold = count_fold
    left = 0
    for epoch in range(6):
        names[:30] = np.roll(names[:30], 7)  # other ids become hot
        for _ in range(20):
            ids = torch.from_numpy(names[rng.choice(num_rows, 256, p=frequencies / frequencies.sum())])
            direction = torch.from_numpy(rng.standard_normal((256, 12)))
            cached = table.cache.ids.find(ids)[0]
            expected.index_add_(0, ids[cached], direction[cached], alpha=-1e-3)
            table.observe(ids.numpy())
            sgd_step(table, rows, ids, direction, 1e-3)
        before = dict(zip(*map(np.ndarray.tolist, table.cache.held()), strict=True))
        stayed = {number: rows["cache"][slot].clone() for number, slot in before.items()}
        assert table.reorganize(rows, epoch)
        after = dict(zip(*map(np.ndarray.tolist, table.cache.held()), strict=True))
        left += len(before.keys() - after.keys())
        for number in before.keys() & after.keys():
            assert torch.equal(rows["cache"][after[number]], stayed[number])
        for number in after.keys() - before.keys():
            assert torch.allclose(rows["cache"][after[number]], table.values(np.array([number]))[0], rtol=0, atol=1e-12)
        holds = folded.clone()
        ids, slots = table.cache.held()
        holds[ids] += rows["cache"][slots] - table.cache.loaded[slots]
        assert (holds - expected).abs().max() < 1e-12
    assert left > 10 and expected.abs().max() > 0.01
    table.flush(rows)
    assert (folded - expected).abs().max() < 1e-12


def test_hit_rate_on_a_zipf_trace():
    """A thousandth of the ids, chosen by the counts of one epoch, answers for at least 60 % of the next."""
    rng, num_ids, epoch = np.random.RandomState(0), 200_000, 200_000
    bounds = np.cumsum(np.arange(1, num_ids + 1) ** -1.2)
    names = rng.permutation(num_ids)
    traces = [names[np.searchsorted(bounds, rng.random_sample(epoch) * bounds[-1])] for _ in range(2)]
    cache = HotCache(num_ids // 1000, 1)
    for start in range(0, epoch, 2048):
        cache.count(traces[0][start : start + 2048])
    cache.refresh(torch.zeros(cache.num_slots, 1), cache.wanted(), lambda ids: torch.zeros(len(ids), 1), None)
    assert float(cache.ids.find(torch.from_numpy(traces[1]))[0].float().mean()) >= 0.6


def test_what_was_hot_cools_down():
    cache = HotCache(1, 1)
    cache.count(np.full(100, 5))
    assert cache.wanted().tolist() == [5]
    cache.count(np.full(60, 9))
    assert cache.wanted().tolist() == [9]  # 60 against 100 / 2


def test_nothing_happens_where_nothing_was_counted_or_nothing_changes():
    table, rows = make(10)
    assert table.observes and not table.reorganize(rows, 0)
    table.observe(np.array([3, 3, 4]))
    assert table.reorganize(rows, 1) and not table.reorganize(rows, 2)
    plain, nothing = make(0)
    assert not plain.observes and not plain.reorganize(nothing, 0) and plain.parts == {}


def test_a_converted_table_keeps_the_rows_of_its_hot_ids():
    weight = np.random.RandomState(1).standard_normal((97, 12)).astype(np.float32)
    counts = np.arange(97.0)[::-1].copy()
    made = SVD_METHOD.convert(TableSpec("t", 97, 12), knobs(rank=3, cache=10), weight, Making(np.random.RandomState(0), counts))
    made.table.fill_buffers()
    part = made.table.parts["cache"]
    rows = {"cache": torch.empty(part.num_rows, 12)}
    part.fill(rows["cache"])
    values = vectors(made.table, rows, torch.arange(97)).numpy()
    assert np.array_equal(values[:10], weight[:10]) and not np.array_equal(values[10:], weight[10:])


def test_ids_never_looked_up_are_not_cached():
    assert most_frequent(np.array([0.0, 3.0, 0.0, 5.0]), 3).tolist() == [3, 1]
