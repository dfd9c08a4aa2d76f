"""A run on W ranks equals the run on one rank: losses, tables, optimizer state and what is exchanged, whatever lies where."""

import functools

import numpy as np
import pytest
import torch
from rank_models import BATCH, DRAWING, KINDS, batches_of, config_of, everywhere, specs_of, spread, train, whole_state
from ranks import run_ranks
from test_methods import LAYOUTS, NAMES, make_table

from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.optim import RULES, DenseOptimizer
from dlrm_xla.segments import table_parts
from dlrm_xla.sharding import Plan
from dlrm_xla.specs import TableSpec, UserError


@functools.cache
def one_rank(kind, rule, layout, hotness, steps, pooling, more):
    """What a run is made of, and its losses and numbers on one rank."""
    config, specs = config_of(kind, rule, *more), specs_of(hotness, pooling)
    batches = batches_of(specs, steps)
    ((losses, alone),) = run_ranks(1, lambda backend: train(backend, config, specs, batches), LAYOUTS[layout])
    return config, specs, batches, losses, whole_state([alone])


def check(world, kind="plain", rule="sgd", layout="ragged", hotness=1, plan_of=None, steps=8, pooling="sum", more=()):
    config, specs, batches, wanted, expected = one_rank(kind, rule, layout, hotness, steps, pooling, tuple(more))
    ranks = run_ranks(world, lambda backend: train(backend, config, specs, batches, plan_of), LAYOUTS[layout])
    for losses, _ in ranks:
        np.testing.assert_allclose(losses, wanted, rtol=0, atol=1e-6)
    found = whole_state([trainer for _, trainer in ranks])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # the losses are the bar; Adagrad's first steps make of a sum's last bit a step of another size
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")
    return ranks


@pytest.mark.parametrize("layout", ["ragged", "rows", "packed"])
@pytest.mark.parametrize("rule", ["sgd", "rwsadagrad", "adagrad"])
@pytest.mark.parametrize("hotness", [1, 3])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_plain_tables(world, hotness, rule, layout):
    check(world, "plain", rule, layout, hotness, spread(world, seed=world + hotness))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "plain"])
@pytest.mark.parametrize("layout", ["ragged", "packed"])
@pytest.mark.parametrize("hotness", [1, 3])
def test_compressed_tables(hotness, layout, kind):
    for world in (2, 3):
        check(world, kind, "rwsadagrad", layout, hotness, spread(world, seed=world))


@pytest.mark.parametrize("layout", ["ragged", "packed"])
@pytest.mark.parametrize("rule", ["sgd", "rwsadagrad", "adagrad"])
def test_copies_on_every_rank(rule, layout, monkeypatch):
    """With few rows their gradients are summed, with many the looked up ones are gathered."""
    for densely in (True, False):
        monkeypatch.setattr(Plan, "sums_densely", lambda plan, store, densely=densely: densely)
        check(3, "plain", rule, layout, 3, everywhere(3))
        check(3, "plain", rule, layout, 3, everywhere(3), more=["--mlperf-logging", "--mlperf-grad-accum-iter=3"])
    check(2, "plain", rule, layout, 1, spread(2, seed=0))


@pytest.mark.parametrize("pooling", ["mean", "sum"])
@pytest.mark.parametrize("learned", [False, True])
def test_pooling(learned, pooling):
    check(3, "plain", "sgd", "ragged", 3, spread(3, seed=1), pooling=pooling, more=["--weighted-pooling=learned"] if learned else [])


def test_several_batches_to_a_step():
    more = ["--mlperf-logging", "--mlperf-grad-accum-iter=3"]
    for layout in ("ragged", "rows"):
        check(3, "plain", "rwsadagrad", layout, 3, spread(3, seed=2), more=more)


def made(name: str, spec: TableSpec):
    with DRAWING:
        return make_table(name, spec)


def made_codecs(name: str) -> set[str]:
    return {part.codec for part in made(name, TableSpec("emb_l.0", 97, 16)).parts.values()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("hotness", [1, 3])
def test_every_method_gives_the_same_vectors_and_updates(hotness, name):
    """Of every registered method the lookup of 2 ranks equals that of one, and so do rows and parameters after two steps."""
    spec = TableSpec("emb_l.0", 97, 16, hotness)
    if made(name, spec).observes:
        with pytest.raises(UserError, match="counts the ids of training"):
            table_parts([made(name, spec)], RULES["sgd"](), None, 2)
        return
    rng = np.random.RandomState(0)
    ids = torch.from_numpy((rng.rand(2, BATCH, hotness) ** 2 * 97).astype(np.int32))
    weights = torch.from_numpy((rng.rand(BATCH, hotness) < 0.7).astype(np.float32)) if hotness > 1 else None
    target = torch.from_numpy(rng.randn(BATCH, 16).astype(np.float32))

    def work(backend, seed):
        rank, world, rule = backend.collectives.rank, backend.collectives.world, RULES["sgd"]()
        with DRAWING:
            table = make_table(name, spec)
            plan = spread(world, seed)(table_parts([table], rule, None, 2)) if world > 1 else None
            tables = EmbeddingCollection([table], None, rule, backend.layout("auto"), plan=plan, collectives=backend.collectives)
        dense = DenseOptimizer(list(tables.parameters()), rule, backend.inplace)
        mine = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
        seen = []
        for step in range(2):
            lookup = tables.lookup(ids[step][mine], None if weights is None else weights[mine])
            loss = (lookup.pooled[:, 0] - target[mine]).square().sum() / BATCH
            if loss.requires_grad:  # int8 tables with fixed scales train nothing
                loss.backward()
            shared = tables.shared_gradients([lookup])
            total, *sums = backend.collectives.sum_all([loss.detach(), *shared, *dense.gradients()])
            dense.set_gradients(sums[len(shared) :])
            tables.update([lookup], torch.tensor(-0.1), shared=sums[: len(shared)])
            dense.step(torch.tensor(-0.1))
            seen.append((lookup.pooled.detach(), total))
        return seen

    (alone,) = run_ranks(1, lambda backend: work(backend, 0))
    tolerance = 2e-2 if "int8" in made_codecs(name) else 1e-5  # stochastic rounding depends on where a row lies
    for seed in range(4):
        ranks = run_ranks(2, lambda backend, seed=seed: work(backend, seed))
        for step, (vectors, loss) in enumerate(alone):
            torch.testing.assert_close(torch.cat([seen[step][0] for seen in ranks]), vectors, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(ranks[0][step][1], loss, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("hotness", [1, 3])
@pytest.mark.parametrize("seed", range(6))
def test_the_planned_volume_is_what_is_exchanged(seed, hotness):
    """Every byte of every collective of a step, counted as it is sent."""
    config, specs = config_of("qr" if seed % 2 else "plain", "rwsadagrad"), specs_of(hotness)
    batches = batches_of(specs, 1)

    def work(backend):
        _, trainer = train(backend, config, specs, batches, spread(3, seed))
        sent: dict[str, list[int]] = {}
        for name, size in backend.collectives.calls:
            sent.setdefault(name, []).append(size)
        return sent, trainer.tables.plan.volumes(sum(parameter.nelement() for parameter in trainer.dense.parameters))

    for sent, planned in run_ranks(3, work):
        exchanged = [planned[name] for name in ("ids, all-to-all", "vectors, all-to-all", "gradients of vectors, all-to-all")]
        assert sent.get("all-to-all", [0, 0, 0]) == exchanged
        assert sent["all-reduce"] == [planned["sums of gradients, all-reduce"]]
        assert sum(sent.get("all-gather", [])) == planned["row numbers of copies, all-gather"] + planned["gradients of copies, all-gather"]
