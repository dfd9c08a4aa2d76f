"""Methods whose rows are chosen by hashes or digits: vectors and gradients against loops in float64, starting spread, bytes, conversions."""

import math

import numpy as np
import pytest
import torch

from compression import compositional, dhe, double_hash, hash_embeddings, hashing, hot_cold, memcom, robe
from compression.method import Making
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import PackedLayout, RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError
from tests.oracles import hashed

METHODS = {module.METHOD.name: module.METHOD for module in (hashing, double_hash, hash_embeddings, compositional, memcom, dhe, robe, hot_cold)}
KINDS = [
    "hash", "hash:rows=3", "hash:rows=3,function=mod", "hash:rows=20000", "double_hash", "double_hash:combine=concat,rows=5",
    "hash_embeddings", "hash_embeddings:rows=5,hashes=3,importance_rows=4", "compositional", "compositional:operation=add,rows=30",
    "compositional:operation=concat,partitions=2", "compositional:partitions=5,operation=add", "memcom", "memcom:rows=3,bias=true",
    "dhe:hashes=16,width=8", "dhe:hashes=8,width=16,depth=3,activation=relu", "robe:lines=2", "robe:lines=3,block=2", "robe:sign=false",
    "robe:lines=1,aligned=false", "hot_cold", "hot_cold:hot=5,rows=3",
]  # fmt: skip
LAYOUTS = {"rows": RowsLayout(add_rows_scatter, ragged=False), "packed": PackedLayout(), "ragged": RowsLayout(add_rows_scatter, ragged=True)}
SIZES = [1, 7, 97, 10_007]


def parse(kind):
    name, _, text = kind.partition(":")
    return METHODS[name], METHODS[name].knob_values(dict(pair.split("=") for pair in text.split(",") if pair))


def making(num_ids, seed=0):
    return Making(np.random.RandomState(seed), counts=np.random.RandomState(1).permutation(num_ids).astype(float) // 2)


def collection_of(kind, rows, dim, hotness=1, pooling="sum", rule="sgd", layout="rows", seed=0):
    method, knobs = parse(kind)
    spec = TableSpec("emb_l.0", rows, dim, hotness, pooling)
    return EmbeddingCollection([method.create(spec, knobs, making(rows, seed))], None, RULES[rule](), LAYOUTS[layout])


def exact_state(collection):
    """The table's parts, and its buffers and parameters, in float64 with autograd where they are trained."""
    table = collection.tables[0]
    parts = {segment.name.removeprefix("emb_l.0."): collection.part_rows(segment).double().clone() for segment in collection.segments[0]}
    for part in parts.values():
        part.requires_grad_()
    state = dict(table.named_buffers()) | {name: value.detach().double().clone().requires_grad_() for name, value in table.named_parameters()}
    return parts, state


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dim", [4, 16, 64])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_pooled_vectors_and_gradients(kind, rows, dim, layout):
    """Bags of three with weights, some of them zero as in padding."""
    method, knobs = parse(kind)
    collection = collection_of(kind, rows, dim, hotness=3, pooling="mean" if rows == 7 else "sum", layout=layout)
    parts, state = exact_state(collection)
    rng = np.random.RandomState(0)
    ids, weights = rng.randint(0, rows, (4, 3)), rng.rand(4, 3) * (rng.rand(4, 3) < 0.8) + 0.0
    scale = weights / np.maximum((weights != 0).sum(1, keepdims=True), 1) if rows == 7 else weights
    scale = torch.from_numpy(scale.astype(np.float32)).double()
    vectors = [torch.stack([hashed.vector(method.name, knobs, int(i), rows, dim, state, parts) for i in bag]) for bag in ids]
    expected = torch.stack([(vector * scale[b, :, None]).sum(0) for b, vector in enumerate(vectors)])
    lookup = collection.lookup(torch.from_numpy(ids).int(), torch.from_numpy(weights).float())
    assert lookup.pooled.shape == (4, 1, dim)
    torch.testing.assert_close(lookup.pooled[:, 0].double(), expected, atol=2e-6, rtol=1e-5)
    direction = torch.from_numpy(rng.standard_normal((4, dim)))
    (expected * direction).sum().backward()
    (lookup.pooled[:, 0] * direction.float()).sum().backward()
    collection.update([lookup], torch.tensor(-1.0))
    for part, segment in zip(parts.values(), collection.segments[0], strict=True):
        torch.testing.assert_close(collection.part_rows(segment).double(), part.detach() - part.grad, atol=1e-5, rtol=1e-5)
    for name, parameter in collection.tables[0].named_parameters():
        torch.testing.assert_close(parameter.grad.double(), state[name].grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dim", [4, 16, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_starting_spread_is_a_plain_tables(kind, dim):
    """Standard deviation 1/sqrt(3N) and mean 0 over tables of several seeds: with three shared rows one table says little."""
    rows = 1000
    found = torch.cat([all_vectors(collection_of(kind, rows, dim, seed=seed)) for seed in range(60 if ":" in kind else 20)])
    assert found.square().mean().sqrt().item() * math.sqrt(3 * rows) == pytest.approx(1, rel=0.08)
    assert abs(found.mean().item()) * math.sqrt(3 * rows) < 0.15


def all_vectors(collection):
    """[N, D], by bags of one."""
    with torch.no_grad():
        return collection.lookup(torch.arange(collection.tables[0].spec.num_embeddings, dtype=torch.int32)[:, None], None).pooled[:, 0].clone()


@pytest.mark.parametrize("dim", [4, 16, 64])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_of_the_table(kind, rows, dim):
    method, knobs = parse(kind)
    collection = collection_of(kind, rows, dim)
    held = 4 * sum(collection.part_rows(segment).numel() for segment in collection.segments[0])
    held += sum(tensor.numel() * tensor.element_size() for tensor in collection.tables[0].state_dict().values())
    assert method.num_bytes(TableSpec("emb_l.0", rows, dim), knobs) == held


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_decides_everything(kind):
    first, again, other = (all_vectors(collection_of(kind, 97, 16, seed=seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", METHODS)
def test_bytes_rise_with_the_sizing_knob(name):
    method, knobs = parse(name)
    spec = TableSpec("emb_l.0", 10_007, 16)
    most = method.sized_most(spec, knobs)
    sizes = [method.num_bytes(spec, knobs | {method.sized_by: value}) for value in range(1, most + 1, max(1, most // 300))]
    assert sizes == sorted(sizes)
    if name != "hash_embeddings":
        assert method.num_bytes(spec, knobs | {method.sized_by: 1}) < 4 * 10_007 * 16 / 10


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].exact_at])
def test_exact_setting_gives_a_table_back(name, rows):
    method, _ = parse(name)
    spec = TableSpec("emb_l.0", rows, 16)
    weight = np.random.RandomState(5).standard_normal((rows, 16)).astype(np.float32)
    knobs = method.knob_values({}) | method.exact_at(spec)
    found = method.convert(spec, knobs, weight, making(rows))
    assert found.facts["relative_error"] < 1e-6
    collection = EmbeddingCollection([found.table], None, RULES["sgd"](), LAYOUTS["rows"])
    np.testing.assert_allclose(all_vectors(collection).numpy(), weight, atol=1e-5)


CONVERTED = [
    "hash:rows=11", "hash:rows=11,function=mod", "double_hash:rows=11", "double_hash:rows=11,combine=concat", "compositional:operation=add",
    "compositional:operation=mult", "compositional:operation=concat,partitions=2", "memcom:rows=11", "memcom:rows=11,bias=true", "robe:lines=1",
    "robe:lines=1,aligned=false,block=2", "hot_cold:hot=9,rows=4",
]  # fmt: skip
LINEAR = [kind for kind in CONVERTED if "mult" not in kind and "memcom" not in kind]  # a least-squares problem with one solution


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", CONVERTED)
def test_conversions_are_least_squares(kind, weighted):
    """The error is what it says, and for linear methods that of a dense least-squares solver; for the others it is at a stationary point."""
    rows, dim = 97, 4
    method, knobs = parse(kind)
    knobs |= {"weighted": weighted}
    weight = np.random.RandomState(5).standard_normal((rows, dim)).astype(np.float32)
    makes = making(rows)
    found = method.convert(TableSpec("emb_l.0", rows, dim), knobs, weight, makes)
    collection = EmbeddingCollection([found.table], None, RULES["sgd"](), LAYOUTS["rows"])
    vectors = all_vectors(collection).double().numpy()
    np.testing.assert_allclose(found.facts["relative_error"], np.linalg.norm(vectors - weight) / np.linalg.norm(weight), rtol=1e-5)
    counts = makes.counts / makes.counts.mean()
    error = (counts[:, None] * (vectors - weight) ** 2).sum()
    np.testing.assert_allclose(found.facts["relative_error_weighted"], math.sqrt(error / (counts[:, None] * weight**2).sum()), rtol=1e-5)
    parts, state = exact_state(collection)
    importance = torch.from_numpy(np.maximum(counts, 1e-12) if weighted else np.ones(rows)).double()[:, None]
    numbers = torch.stack([hashed.vector(method.name, knobs, i, rows, dim, state, parts) for i in range(rows)])
    loss = (importance * (numbers - torch.from_numpy(weight).double()) ** 2).sum()
    loss.backward()
    steepest = max(part.grad.norm().item() for part in parts.values())
    assert steepest < (1e-4 if kind in LINEAR else 0.1) * loss.item(), "rows could be better"


def test_weights_need_counts():
    method, knobs = parse("hash:weighted=true")
    with pytest.raises(UserError, match="hash:weighted=true: table emb_l.0: how often"):
        method.convert(TableSpec("emb_l.0", 7, 4), knobs, np.zeros((7, 4), np.float32), Making(np.random.RandomState(0)))


@pytest.mark.parametrize(
    "kind, dim, message",
    [
        ("compositional:operation=concat", 16, "partitions=3: table emb_l.0 has vectors of 16.*valid with operation=concat: 2, 4, 8"),
        ("double_hash:combine=concat", 5, "valid: combine=sum"),
        ("robe:block=3", 16, "must divide that and be at most 128: 1, 2, 4, 8, 16"),
    ],
)
def test_impossible_knobs(kind, dim, message):
    method, knobs = parse(kind)
    with pytest.raises(UserError, match=message):
        method.check(TableSpec("emb_l.0", 97, dim), knobs)


def test_radices():
    assert compositional.choose_radices(1000, 3, None) == [10, 10, 10]
    assert compositional.choose_radices(1001, 3, None) == [11, 10, 10]
    assert compositional.choose_radices(7, 2, 100) == [7, 1]
    rng = np.random.RandomState(0)
    for _ in range(500):
        ids, parts = int(rng.randint(1, 10**7)), int(rng.randint(2, 6))
        radices = compositional.choose_radices(ids, parts, None)
        assert math.prod(radices) >= ids and max(radices) - min(radices) <= 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_on_xla(kind, backend):
    """Two steps on a device: values and updated rows of the CPU; no operator on the host, nothing compiled in the second step."""
    results = []
    for place, layout in ((None, LAYOUTS["rows"]), (backend, backend.layout("auto"))):
        method, knobs = parse(kind)
        spec = TableSpec("emb_l.0", 97, 16, 3)
        collection = EmbeddingCollection([method.create(spec, knobs, making(97))], None, RULES["rwsadagrad"](), layout)
        rng, steps, before = np.random.RandomState(3), [], None
        if place:
            place.place(collection)
        for step in range(4):
            ids = torch.from_numpy(rng.randint(0, 97, (8, 3))).int()
            weights = torch.from_numpy(rng.rand(8, 3)).float()
            rate = torch.tensor(-0.1)
            if place:
                ids, weights, rate = ids.to(place.device), weights.to(place.device), rate.to(place.device)
            lookup = collection.lookup(ids, weights)
            lookup.pooled.square().sum().backward()
            collection.update([lookup], rate)
            collection.zero_grad()
            steps.append(lookup.pooled.detach())
            if place:
                place.end_step()
            if place and step == 1:
                before = place.compiles(), place.fallbacks()
        if place:
            assert (place.compiles(), place.fallbacks()) == before
            assert not place.fallbacks()
        results.append(torch.stack([step.cpu() for step in steps]))
    torch.testing.assert_close(results[0], results[1], atol=1e-5, rtol=1e-5)
