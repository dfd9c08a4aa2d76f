"""The cache of hot rows: what enters, stays and leaves, and that no update is lost."""

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_resume import stopped_after

import compression.hot_counts as hot_counts
from compression.hot_cache import HotCache
from compression.hot_counts import HotCounts, hot_counts_bytes, most_frequent
from compression.hot_ids import hot_ids_bytes
from compression.ledger import ledger
from compression.method import Making
from compression.tt import METHOD, SVD_METHOD
from compression.write_back import write_back
from dlrm_xla import backends
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.optim import RULES, DenseOptimizer
from dlrm_xla.specs import TableSpec

RATE = 0.05


def knobs(**given) -> dict:
    return {**{knob.name: knob.default for knob in METHOD.knobs}, **given}


def make(cache: int, counts=None, num_rows: int = 97, rank: int = 4, leverage: float = 1.0):
    """A table in float64 and its rows, filled. leverage: how far its vectors move when the cores do, relative to the usual."""
    spec = TableSpec("t", num_rows, 12)
    table = METHOD.create(spec, knobs(rank=rank, cache=cache), Making(np.random.RandomState(0), counts)).double()
    for core in table.cores:
        core.data *= leverage ** (0.5 / (len(table.cores) - 1))
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


def flush(table, rows: dict) -> None:
    """Empties the cache into the cores."""
    table.cache.refresh(rows["cache"], np.zeros(0, np.int64), table.values, table.fold)


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
    """Up to rounding where all ids of the step are cached; where others move the cores in the same step, up to the square of the rate. With small
    cores: those of so small a table would move past what the rows have learnt."""
    generator = torch.Generator().manual_seed(1)

    def difference(ids: torch.Tensor, rate: float) -> float:
        direction = torch.randn(len(ids), 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (cached, rows), (plain, nothing) = make(20, np.arange(97.0), leverage=0.01), make(0, leverage=0.01)
        sgd_step(cached, rows, ids, direction, rate)
        sgd_step(plain, nothing, ids, direction, rate)
        before = [core.detach().clone() for core in make(0, leverage=0.01)[0].cores]
        flush(cached, rows)
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(plain.cores, before, strict=True))
        assert moved > 0.01 * rate and not len(cached.cache.held()[0])
        return max(float((a - b).detach().abs().max()) for a, b in zip(cached.cores, plain.cores, strict=True))

    hot = torch.randint(77, 97, (50,), generator=generator)
    assert difference(hot, RATE) < 1e-14
    mixed = torch.randint(0, 97, (50,), generator=generator)
    whole, half = difference(mixed, 1e-3), difference(mixed, 5e-4)
    assert whole > 0 and whole / half == pytest.approx(4, rel=0.05)


def test_no_update_is_lost_over_a_trace_with_refreshes(monkeypatch):
    """For every id: what was folded into the cores plus what the cache still holds is -lr x the sum of its gradients while it was cached."""
    monkeypatch.setattr(hot_counts, "LEAST_KEPT", 64)  # so that rare ids are forgotten
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
    flush(table, rows)
    assert (folded - expected).abs().max() < 1e-12


@pytest.mark.parametrize("rule,rate", [("adagrad", 0.05), ("adagrad", 0.1), ("rwsadagrad", 0.1)])
def test_a_refresh_at_an_ordinary_rate_does_no_harm(rule, rate):
    """Rows learn vectors that are noise, which no tensor train can hold, and others become hot after each epoch. The loss over the ids as they are
    looked up rises at a refresh by 8 % at most; with 20,000 rows it went from 0.18 to 20, and after four refreshes to 1e24, when all that a row had
    learnt went back in one step."""
    rng, num_rows, cached = np.random.RandomState(0), 5000, 125
    table = METHOD.create(TableSpec("emb_l.0", num_rows, 16), knobs(cache=cached), Making(np.random.RandomState(1)))
    collection = EmbeddingCollection([table], None, RULES[rule](), backends.make("cpu").layout("auto"))
    dense = DenseOptimizer(list(table.cores), collection.rule, backends.make("cpu").inplace)
    target = torch.from_numpy(rng.standard_normal((num_rows, 16)).astype(np.float32))
    names, frequencies, neg_lr = rng.permutation(num_rows), np.arange(1, num_rows + 1) ** -1.2, torch.tensor(-rate)
    frequencies /= frequencies.sum()
    of_names = torch.from_numpy(frequencies).float()

    def loss() -> float:
        return float((collection.materialize(0, torch.from_numpy(names)) - target[names]).square().mean(1) @ of_names)

    first = loss()
    for epoch in range(4):
        names[: 2 * cached] = np.roll(names[: 2 * cached], 75)
        for _ in range(40):
            ids = torch.from_numpy(names[rng.choice(num_rows, 1024, p=frequencies)])
            collection.observe(ids[:, None].numpy(), None)
            found = collection.lookup(ids[:, None].int(), None)
            (found.pooled[:, 0] - target[ids]).square().mean(1).mean().backward()
            dense.step(neg_lr)
            collection.update([found], neg_lr)
        before, held, states = loss(), dict(zip(*table.cache.held(), strict=True)), cache_state(collection)
        assert collection.reorganize(epoch)
        for number, slot in zip(*table.cache.held(), strict=True):
            for old, new in zip(states, cache_state(collection), strict=True):
                wanted = old[held[number]] if number in held else torch.zeros_like(new[slot])
                assert torch.equal(new[slot], wanted), "rows that stay keep their sums, new ones have none"
        assert before < 0.5 * first and loss() < 1.15 * before
        assert all(core.isfinite().all() for core in table.cores)


def cache_state(collection: EmbeddingCollection) -> list[torch.Tensor]:
    """The optimizer's state of the cached rows, copies."""
    (segment,) = collection.segments[0]
    fields = collection.stores[segment.store].fields(collection.stores[segment.store].on_host())
    return [value[segment.start : segment.start + segment.num_rows].clone() for key, value in fields.items() if key != "weight"]


@pytest.mark.parametrize("leverage", [1e-3, 0.5, 1.0, 30.0, 1000.0])
def test_write_back_goes_by_the_chain_rule_and_not_past_what_was_learnt(leverage):
    """Values sqrt(leverage) x parameter: J J^T is `leverage`."""
    scale, deltas = leverage**0.5, torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    moved, done = write_back([torch.zeros(2, 1)], lambda place, piece: scale * place[0][piece], deltas, chunk=1)
    share = scale * moved[0] / deltas
    assert done == 1.0
    if leverage <= 1:
        assert torch.allclose(share, torch.full_like(share, leverage), rtol=1e-12)
    else:
        assert (share > 0.99).all() and (share <= 1 + 1e-12).all()


def test_counts_go_on_from_a_checkpoint_as_if_nothing_had_been():
    """Saved at every odd moment, or never: the same ids are remembered, forgotten and hot."""
    rng = np.random.RandomState(0)
    trace = [rng.zipf(1.2, 700).clip(max=50_000) - 1 for _ in range(40)]
    whole, resumed = HotCounts(300, 50_000), HotCounts(300, 50_000)
    for number, ids in enumerate(trace):
        whole.add(ids)
        if number % 3 == 0:
            state = {name: value.clone() for name, value in resumed.state_dict().items()}
            resumed = HotCounts(300, 50_000)
            resumed.load_state_dict(state)
        resumed.add(ids)
        if number == 25:
            assert np.array_equal(whole.hottest(), resumed.hottest())
    assert len(np.unique(np.concatenate(trace))) > 3 * len(whole.known()), "some are forgotten"
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))
    assert np.array_equal(whole.hottest(), resumed.hottest())


@pytest.mark.parametrize("device", ["cpu", "xla"])
def test_resume_with_a_cache_is_bitwise(cli, capsys, device):
    """From the middle of both epochs and from the end of the first: the cache is filled with the same ids, and all numbers are the same."""
    flags = (
        *SMALL, "--arch-embedding-size=200-5", "--num-batches=12", "--nepochs=2", "--print-freq=1", "--save-model=m.pt", "--save-every=2",
        "--optimizer=rwsadagrad", "--compress=tt:rank=3,cache=8", "--compress-threshold=100",
    )  # fmt: skip
    whole = cli(*flags, "--save-model=whole.pt", "--save-every=12", device=device)
    assert whole.code == 0, whole.err
    final = torch.load("whole.pt", weights_only=True)["state_dict"]
    assert (final["emb_l.0.cache.ids.keys"] >= 0).sum() == 8
    for done in (6, 12, 18) if device == "cpu" else (6,):
        stopped_after(cli, flags, done, device, capsys)
        resumed = cli(*flags, "--load-model=m.pt", "--save-model=end.pt", device=device)
        assert resumed.code == 0, resumed.err
        end = torch.load("end.pt", weights_only=True)["state_dict"]
        assert final.keys() == end.keys()
        for name, value in final.items():
            assert torch.equal(value, end[name]), f"{name} differs after resuming at batch {done}"


def test_the_ledger_counts_the_cache():
    spec, values = TableSpec("emb_l.0", 10_007, 12), knobs(rank=4, cache=300)
    table = METHOD.create(spec, values, Making(np.random.RandomState(0)))
    collection = EmbeddingCollection([table], None, RULES["sgd"](), backends.make("cpu").layout("auto"))
    book = ledger(collection, lambda parameter: {}, tiles=False)
    assert book.stored == METHOD.num_bytes(spec, values)
    assert book.entries[0].pointers + book.entries[0].seeds == hot_ids_bytes(300) + hot_counts_bytes(300, 10_007)


def test_hit_rate_on_a_zipf_trace():
    """A thousandth of the ids, chosen by the counts of one epoch, answers for at least 60 % of the next."""
    rng, num_ids, epoch = np.random.RandomState(0), 200_000, 200_000
    bounds = np.cumsum(np.arange(1, num_ids + 1) ** -1.2)
    names = rng.permutation(num_ids)
    traces = [names[np.searchsorted(bounds, rng.random_sample(epoch) * bounds[-1])] for _ in range(2)]
    cache = HotCache(num_ids // 1000, 1, num_ids)
    for start in range(0, epoch, 2048):
        cache.seen.add(traces[0][start : start + 2048])
    cache.refresh(torch.zeros(cache.num_slots, 1), cache.seen.hottest(), lambda ids: torch.zeros(len(ids), 1), None)
    assert float(cache.ids.find(torch.from_numpy(traces[1]))[0].float().mean()) >= 0.6


def test_what_was_hot_cools_down():
    counts = HotCounts(1, 10)
    counts.add(np.full(100, 5))
    assert counts.hottest().tolist() == [5]
    counts.add(np.full(60, 9))
    assert counts.hottest().tolist() == [9]  # 60 against 100 / 2


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
