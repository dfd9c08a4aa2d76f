"""The contract: what every registered compression method must keep, whatever it does inside. A method is tested by being in the registry.

What a method computes is checked against float64 restatements in the method's own test file; here is what all of them share.
"""

import copy
import json

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression.choose import parse_asked
from compression.ledger import ledger
from compression.method import Choice, Making, Method
from compression.registry import METHODS, create_table, num_bytes
from dlrm_xla import backends
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import PackedLayout, RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES, DenseOptimizer
from dlrm_xla.specs import TableSpec

SIZES, DIM, BATCH = (1, 7, 97, 10_007), 16, 6
LAYOUTS = {"rows": RowsLayout(add_rows_scatter, ragged=False), "ragged": RowsLayout(add_rows_scatter, ragged=True), "packed": PackedLayout()}
# other forms of methods that the contract holds too: what runs are made of is not the defaults alone
FORMS = (
    "hot_cold:width=4", "cce:chunks=1", "cce:weighted=true", "pq:chunks=1", "robe:aligned=false", "tt:cache=20", "tt:cores=2", "qr:operation=add",
    "qr:operation=concat", "double_hash:combine=concat", "memcom:bias=true", "compositional:operation=add", "random_projection:family=sign",
)  # fmt: skip
NAMES = [*sorted(METHODS), *FORMS]


def spec_of(rows: int, hotness: int = 1, pooling: str = "sum") -> TableSpec:
    return TableSpec("emb_l.0", rows, DIM, hotness, pooling)


def method_of(name: str) -> Method:
    """Of a method's name, or of a form of it: "hot_cold:width=4"."""
    return METHODS[name.partition(":")[0]]


def knobs_of(name: str, spec: TableSpec, **given) -> dict:
    """The defaults, the sizing knob brought into this table's range."""
    method = method_of(name)
    knobs = {**method.knob_values(parse_asked(name).given), **given}
    if "cache" in knobs:
        knobs["cache"] = min(knobs["cache"], spec.num_embeddings)
    if method.sized_most is not None and method.sized_by not in given:
        least = int(method.knob(method.sized_by).least or 1)
        knobs[method.sized_by] = max(least, min(knobs[method.sized_by] or 8, method.sized_most(spec, knobs)))
    if method.spread is not None:
        knobs = method.spread([spec], knobs)[0]
    return knobs


def counts_of(rows: int) -> np.ndarray:
    """Zipf-like, in no order of the ids; some ids are never looked up."""
    rng = np.random.RandomState(7)
    return np.floor(100.0 / (1 + rng.permutation(rows)))


def trained(rows: int, dim: int = DIM) -> np.ndarray:
    """A table that has been somewhere: low-rank structure and noise."""
    rng = np.random.RandomState(3)
    return (rng.randn(rows, 3) @ rng.randn(3, dim) * 0.1 + 0.02 * rng.randn(rows, dim)).astype(np.float32)


def make_table(name: str, spec: TableSpec, seed: int = 0, **given):
    method, knobs = method_of(name), knobs_of(name, spec, **given)
    making = Making(np.random.RandomState(seed), counts_of(spec.num_embeddings))
    torch.manual_seed(seed)
    if method.create is not None:
        return create_table(spec, Choice(method.name, knobs), making)
    table = method.convert(spec, knobs, trained(spec.num_embeddings), making).table
    table.made_by = Choice(method.name, knobs)
    return table


def collection_of(name: str, spec: TableSpec, layout="rows", rule="sgd", seed: int = 0, **given) -> EmbeddingCollection:
    layout = LAYOUTS[layout] if isinstance(layout, str) else layout
    return EmbeddingCollection([make_table(name, spec, seed, **given)], None, RULES[rule](), layout)


def batch_of(spec: TableSpec, seed: int = 0, batch: int = BATCH) -> torch.Tensor:
    rng = np.random.RandomState(seed)
    return torch.from_numpy(rng.randint(0, spec.num_embeddings, (batch, spec.hotness))).int()


def state_of(collection: EmbeddingCollection) -> dict[str, torch.Tensor]:
    """Everything that a step may change, but what is found anew each time."""
    return {name: value.detach().clone().cpu() for name, value in collection.state_dict().items() if not name.endswith("scratch")}


def step(collection: EmbeddingCollection, dense: DenseOptimizer, ids, weights, target, rate: float = 0.1) -> float:
    lookup = collection.lookup(ids, weights)
    loss = (lookup.pooled[:, 0] - target).square().sum(1).mean()
    backward(loss)
    neg_lr = torch.tensor(-rate).to(ids.device)
    collection.update([lookup], neg_lr)
    dense.step(neg_lr)
    return loss.detach()


def backward(loss: torch.Tensor) -> None:
    """Nothing where the method trains nothing."""
    if loss.requires_grad:
        loss.backward()


def dense_of(collection: EmbeddingCollection, ops=None) -> DenseOptimizer:
    from dlrm_xla.ops.inplace import ONE_KERNEL

    return DenseOptimizer(list(collection.parameters()), collection.rule, ops or ONE_KERNEL)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_value_is_materialize_row_by_row(name, rows, layout):
    spec = spec_of(rows)
    collection = collection_of(name, spec, layout)
    ids = torch.arange(min(rows, 500))
    whole = collection.materialize(0, ids)
    assert whole.shape == (len(ids), DIM) and whole.dtype == torch.float32 and torch.isfinite(whole).all()
    chosen = batch_of(spec) % len(ids)
    with torch.no_grad():
        torch.testing.assert_close(collection.lookup(chosen, None).pooled[:, 0], whole[chosen[:, 0].long()], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_pooled_bags(name, layout, pooling, weighted):
    spec = spec_of(97, 4, pooling)
    collection = collection_of(name, spec, layout)
    ids = batch_of(spec)
    filled = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).float()
    weights = filled * (torch.rand(BATCH, 4, generator=torch.Generator().manual_seed(1)) + 0.5) if weighted else filled
    ids = torch.where(filled != 0, ids, 0)
    vectors = collection.materialize(0, ids.reshape(-1)).double().view(BATCH, 4, DIM)
    expected = (vectors * weights.double()[..., None]).sum(1)
    if pooling == "mean":
        expected = expected / filled.sum(1, keepdim=True).clamp(min=1)
    with torch.no_grad():
        torch.testing.assert_close(collection.lookup(ids, weights).pooled[:, 0].double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_row_gradients_are_autograds_in_float64(name, rows):
    """The functions of the table, run in float64 by autograd over whole parts, against what reaches the store and the parameters."""
    spec = spec_of(rows, 2)
    collection = collection_of(name, spec)
    ids = batch_of(spec)
    table, twin = collection.tables[0], copy.deepcopy(collection.tables[0]).double()
    parts = [collection.part_rows(segment).double().clone().requires_grad_() for segment in collection.segments[0]]
    read = twin.row_ids(ids.long())
    flat = tuple(part[of_part].reshape(BATCH, 2, -1) for part, of_part in zip(parts, read, strict=True))
    dense = twin.combine(flat, ids.long()).sum(1) if parts or not twin.pools_before_combine else None
    direction = torch.randn(BATCH, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    backward((dense * direction).sum())
    lookup = collection.lookup(ids, None)
    torch.testing.assert_close(lookup.pooled[:, 0].double(), dense.detach(), atol=1e-6, rtol=1e-5)
    backward((lookup.pooled[:, 0] * direction.float()).sum())
    assert lookup.pooled.requires_grad == (method_of(name).trainable)
    for index, (segment, part) in enumerate(zip(collection.segments[0], parts, strict=True)):
        store = collection.stores[segment.store]
        slot = lookup.slots[segment.store]
        total = torch.zeros(store.num_rows, store.width, dtype=torch.float64).index_add_(0, slot.rows, slot.leaf.grad.double())
        found = total[segment.start : segment.start + segment.num_rows]
        torch.testing.assert_close(found, part.grad, atol=1e-5, rtol=1e-4, msg=lambda text, index=index: f"part {index}: {text}")
    for (parameter_name, parameter), other in zip(table.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(parameter.grad.double(), other.grad, atol=1e-5, rtol=1e-4, msg=lambda text, n=parameter_name: f"{n}: {text}")


@pytest.mark.parametrize("rule", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_padded_slots_and_rows_are_inert(name, layout, rule):
    """The same bags with room for more, and rows that do not count behind them: the same vectors, and the same tables after a step."""
    narrow, wide = spec_of(97, 2), spec_of(97, 5)
    ids, target = batch_of(narrow), torch.ones(BATCH, DIM)
    more = torch.cat([torch.cat([ids, torch.zeros(BATCH, 3, dtype=torch.int32)], 1), torch.zeros(2, 5, dtype=torch.int32)])
    filled = torch.cat([torch.cat([torch.ones(BATCH, 2), torch.zeros(BATCH, 3)], 1), torch.zeros(2, 5)])
    results = []
    for spec, batch, weights in ((narrow, ids, torch.ones(BATCH, 2)), (wide, more, filled)):
        collection = collection_of(name, spec, layout, rule)
        dense = dense_of(collection)
        lookup = collection.lookup(batch, weights)
        assert torch.equal(lookup.pooled[BATCH:], torch.zeros_like(lookup.pooled[BATCH:]))
        backward((lookup.pooled[:BATCH, 0] - target).square().sum())
        collection.update([lookup], torch.tensor(-0.01))
        dense.step(torch.tensor(-0.01))
        results.append((lookup.pooled[:BATCH].detach(), state_of(collection)))
    torch.testing.assert_close(*(pooled for pooled, _ in results))
    for key, value in results[0][1].items():
        torch.testing.assert_close(value, results[1][1][key], atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_a_batch_does_not_matter(name, layout):
    spec = spec_of(97, 2)
    ids, target = batch_of(spec, batch=16), torch.randn(16, DIM, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(16, generator=torch.Generator().manual_seed(4))
    states = []
    for chosen in (torch.arange(16), order):
        collection = collection_of(name, spec, layout)
        step(collection, dense_of(collection), ids[chosen], None, target[chosen])
        states.append(state_of(collection))
    for key, value in states[0].items():
        if value.dtype == torch.float32:
            torch.testing.assert_close(value, states[1][key], atol=1e-6, rtol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("rule", ["adagrad", "rwsadagrad"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in NAMES if method_of(name).trainable and method_of(name).name != "lpt"])
def test_two_steps_of_adagrad_equal_a_dense_one_in_float64(name, layout, rule):
    """Ids that share rows, and read one row twice, in a batch: what is added up before the rule sees it, by autograd over whole parts."""
    spec = spec_of(23, 3)
    small = {"hash": {"rows": 2}, "double_hash": {"rows": 2}, "hash_embeddings": {"rows": 2}, "robe": {"lines": 1}, "cce": {"rows": 3}}
    collection = collection_of(name, spec, layout, rule, **small.get(method_of(name).name, {}))
    dense, twin = dense_of(collection), copy.deepcopy(collection.tables[0]).double()
    parts = [collection.part_rows(segment).double().clone() for segment in collection.segments[0]]
    trained = [*parts, *(parameter.detach() for parameter in twin.parameters())]
    sums = [torch.zeros_like(value) for value in trained]
    for seed in range(2):
        ids, target = batch_of(spec, seed), torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(seed))
        leaves = [part.clone().requires_grad_() for part in parts]
        flat = tuple(part[of_part].reshape(BATCH, 3, -1) for part, of_part in zip(leaves, twin.row_ids(ids.long()), strict=True))
        (twin.combine(flat, ids.long()).sum(1) - target).square().sum(1).mean().backward()
        for index, (value, leaf) in enumerate(zip(trained, [*leaves, *twin.parameters()], strict=True)):
            rowwise = rule == "rwsadagrad" and index < len(parts)
            sums[index] += leaf.grad.square().mean(1, keepdim=True) if rowwise else leaf.grad.square()
            with torch.no_grad():
                value -= 0.1 * leaf.grad / (sums[index].sqrt() + 1e-10)
            leaf.grad = None
        step(collection, dense, ids, None, target)
    found = [*(collection.part_rows(segment) for segment in collection.segments[0]), *collection.tables[0].parameters()]
    for index, (value, total, other) in enumerate(zip(trained, sums, found, strict=True)):
        sure = (total > 1e-8).expand_as(value)  # where a gradient is rounding alone, its sign is none
        torch.testing.assert_close(other.double()[sure], value[sure], atol=2e-4, rtol=1e-3, msg=lambda text, i=index: f"{i}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_the_seed_decides_everything(name):
    first, again, other = (state_of(collection_of(name, spec_of(97), seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    if method_of(name).create is not None:
        assert any(not torch.equal(value, other[key]) for key, value in first.items())


@pytest.mark.parametrize("rule", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_ledgers(name, rows, rule):
    """What the formula says, what the ledger says and what the tensors hold: one number."""
    spec = spec_of(rows)
    collection = collection_of(name, spec, rule=rule)
    dense = dense_of(collection)
    states = {id(parameter): state for parameter, state in zip(dense.parameters, dense.state, strict=True)}
    found = ledger(collection, lambda parameter: states[id(parameter)], tiles=False)
    (entry,) = found.entries
    assert entry.stored == num_bytes(spec, collection.tables[0].made_by), entry
    held = sum(value.nelement() * value.element_size() for value in (*collection.parameters(), *collection.buffers()))
    held += sum(value.nelement() * value.element_size() for state in dense.state for value in state.values())
    assert found.total == held
    assert entry.plain == 4 * rows * DIM and entry.padding == 0
    json.dumps(found.to_json())


@pytest.mark.parametrize("rule", ["sgd", "rwsadagrad"])
@pytest.mark.parametrize("name", NAMES)
def test_xla_equals_the_cpu_and_compiles_once(name, rule):
    xla_or_skip()
    backend = backends.make("xla")
    spec = spec_of(97, 3)
    ids, weights = batch_of(spec), torch.rand(BATCH, 3, generator=torch.Generator().manual_seed(5))
    target = torch.randn(BATCH, DIM, generator=torch.Generator().manual_seed(6))
    for layout in (backend.layout("rows"), backend.layout("packed")):
        there = backend.place(collection_of(name, spec, layout, rule))
        here = collection_of(name, spec, rule=rule)
        on_host = dense_of(here)
        on_device = dense_of(there, backend.inplace)
        backend.end_step()
        device = [part.to(backend.device) for part in (ids, weights, target)]
        compiled, fallbacks = [], backend.fallbacks()
        for _ in range(4):
            wanted = step(here, on_host, ids, weights, target)
            loss = step(there, on_device, *device)
            backend.end_step()
            backend.wait()
            torch.testing.assert_close(loss.cpu(), wanted, atol=1e-5, rtol=1e-5)
            compiled.append(backend.compiles())
        assert compiled[1] == compiled[-1], "the second step compiles nothing"
        assert backend.fallbacks() == fallbacks
        with torch.no_grad():
            vectors = there.materialize(0, torch.arange(97).to(backend.device)).cpu()
        torch.testing.assert_close(vectors, here.materialize(0, torch.arange(97)), atol=1e-5, rtol=1e-4)


# half of its vector depends on the quotient alone, which says nothing of these groups
CANNOT_FIT = ("qr:operation=concat",)


@pytest.mark.parametrize("name", [name for name in NAMES if method_of(name).trainable and name not in CANNOT_FIT])
def test_300_steps_fit_a_known_function(name):
    """Vectors that depend on a few groups of ids, at the largest useful size: every method learns them."""
    rows, groups = 60, 4
    spec, method = spec_of(rows), method_of(name)
    given = {}
    if method.sized_most is not None:
        given[method.sized_by] = method.sized_most(spec, knobs_of(name, spec))
    given |= {"qr": {"collisions": groups}, "robe": {"lines": 512}}.get(method.name, {})  # ids modulo 4 are the groups; stretches that hardly overlap
    rng = np.random.RandomState(0)
    wanted = torch.from_numpy(rng.randn(groups, DIM)).float()[torch.arange(rows) % groups] * 0.5
    collection = collection_of(name, spec, rule="rwsadagrad", **given)
    dense = dense_of(collection)
    losses = []
    for index in range(300):
        ids = torch.from_numpy(rng.randint(0, rows, (64, 1))).int()
        losses.append(float(step(collection, dense, ids, None, wanted[ids[:, 0].long()], rate=0.1)))
        assert np.isfinite(losses[-1]), f"step {index}"
    share = 0.2 if "sign" in name else 0.1  # a square matrix of signs is nearly singular
    assert np.mean(losses[-20:]) < share * np.mean(losses[:3]), (np.mean(losses[:3]), np.mean(losses[-20:]))


@pytest.mark.parametrize("rows", SIZES)
@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if METHODS[name].exact_at is not None])
def test_at_its_exact_setting_it_is_the_plain_table(name, rows):
    spec, weight, method = spec_of(rows), trained(rows), method_of(name)
    knobs = {**method.knob_values(parse_asked(name).given), **method.exact_at(spec)}
    converted = method.convert(spec, knobs, weight, Making(np.random.RandomState(0), counts_of(rows)))
    collection = EmbeddingCollection([converted.table], None, RULES["sgd"](), LAYOUTS["rows"])
    torch.testing.assert_close(collection.materialize(0, torch.arange(rows)), torch.from_numpy(weight), atol=1e-5, rtol=1e-5)


def test_methods_say_what_they_are():
    for name, method in METHODS.items():
        assert method.name == name and method.title and method.paper and method.bytes_formula
        assert method.create or method.convert
        assert len({knob.name for knob in method.knobs}) == len(method.knobs) and all(knob.help for knob in method.knobs)
        assert not method.sized_by or method.knob(method.sized_by)
        module = __import__(f"compression.{type(make_table(name, spec_of(97))).__module__.split('.')[-1]}", fromlist=["x"])
        assert module.__doc__ and len(module.__doc__.splitlines()) > 2
