"""Every table method against a dense float64 model of it: pooled vectors, and the gradients that reach rows and parameters."""

from functools import partial

import numpy as np
import pytest
import torch

from compression.mixed_dim import MixedDimTable, dimensions
from compression.qr import QRTable
from dlrm_xla.batch import slot_starts
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.init import fill_uniform
from dlrm_xla.layouts import PackedLayout, RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import PlainTable

BATCH, DIM = 6, 4


def make(kind, spec, rng):
    if kind == "plain":
        return PlainTable(spec, partial(fill_uniform, rng=rng, bound=1.0))
    if kind == "md":
        return MixedDimTable(spec, 2, rng)
    if kind == "md-full":
        return MixedDimTable(spec, DIM, rng)
    operation, compat = kind.removeprefix("qr-").removesuffix("-compat"), kind.endswith("-compat")
    return QRTable(spec, operation, 3, compat)


KINDS = ["plain", "md", "md-full", "qr-mult", "qr-add", "qr-concat", "qr-mult-compat", "qr-concat-compat"]


def dense_vectors(table, weights):
    """[N, D] in float64 with autograd: the whole table that a method stands for. Pooling first is the caller's business."""
    ids = torch.arange(table.spec.num_embeddings)
    if isinstance(table, QRTable):
        quotient, remainder = weights["weight_q"][ids // 3], weights["weight_r"][ids % 3]
        return quotient, remainder
    rows = weights.get("weight", weights.get("embs.weight"))
    return (rows,)


def combine_dense(table, parts, projection):
    if isinstance(table, QRTable):
        first, second = parts
        return {"mult": first * second, "add": first + second}[table.operation] if table.operation != "concat" else torch.cat(parts, -1)
    return parts[0] if projection is None else parts[0] @ projection.T


LAYOUTS = {"rows": RowsLayout(add_rows_scatter, ragged=False), "packed": PackedLayout(), "ragged": RowsLayout(add_rows_scatter, ragged=True)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("sizes", [(1,), (7,), (97, 7, 97), (10_007, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_lookup_and_gradients(kind, sizes, weighted, rule, layout):
    torch.manual_seed(0)
    rng = np.random.RandomState(0)
    hotness = tuple(1 + index % 3 for index in range(len(sizes)))
    specs = [TableSpec(f"emb_l.{index}", rows, DIM, hot) for index, (rows, hot) in enumerate(zip(sizes, hotness, strict=True))]
    tables = [make(kind, spec, rng) for spec in specs]
    collection = EmbeddingCollection(tables, None, RULES[rule](), LAYOUTS[layout])
    initial = [
        {segment.name.removeprefix(f"{table.spec.name}."): collection.part_rows(segment).double().clone().requires_grad_() for segment in segments}
        for table, segments in zip(tables, collection.segments, strict=True)
    ]
    projections = [table.proj.weight.detach().double().clone().requires_grad_() if kind == "md" else None for table in tables]
    starts = slot_starts(hotness)
    ids = torch.cat([torch.from_numpy(rng.randint(0, rows, (BATCH, hot))) for rows, hot in zip(sizes, hotness, strict=True)], 1).int()
    weights = torch.from_numpy(rng.rand(BATCH, starts[-1])).float() if weighted else None
    lookup = collection.lookup(ids, weights)
    expected = []
    for index, table in enumerate(tables):
        slots = slice(starts[index], starts[index + 1])
        bag_weights = torch.ones(BATCH, hotness[index], dtype=torch.float64) if weights is None else weights[:, slots].double()
        parts = [part[ids[:, slots].long()] for part in dense_vectors(table, initial[index])]
        if kind.endswith("-compat"):  # upstream: each side pooled, then combined
            parts = [(part * bag_weights[..., None]).sum(1) for part in parts]
            expected.append(combine_dense(table, parts, None))
        else:
            expected.append((combine_dense(table, parts, projections[index]) * bag_weights[..., None]).sum(1))
    expected = torch.stack(expected, 1)
    torch.testing.assert_close(lookup.pooled.double(), expected, atol=1e-6, rtol=1e-5)
    direction = torch.randn(expected.shape, dtype=torch.float64)
    (expected * direction).sum().backward()
    (lookup.pooled * direction.float()).sum().backward()
    collection.update([lookup], torch.tensor(-0.5))
    for index, segments in enumerate(collection.segments):
        for segment in segments:
            part = initial[index][segment.name.removeprefix(f"emb_l.{index}.")]
            gradient = {"sgd": 1.0, "adagrad": part.grad.abs() + 1e-10, "rwsadagrad": part.grad.square().mean(1, keepdim=True).sqrt() + 1e-10}
            expected = part.detach() - 0.5 * part.grad / gradient[rule]  # both Adagrads' first step
            sure = part.grad.abs() > 1e-4 if rule == "adagrad" else torch.ones_like(part.grad, dtype=torch.bool)  # a sign of rounding is none
            updated = collection.part_rows(segment).double()
            torch.testing.assert_close(updated[sure], expected[sure], atol=1e-5, rtol=1e-5)
            untouched = part.grad.abs().sum(1) == 0
            assert torch.equal(updated[untouched], part.detach()[untouched])
        if projections[index] is not None:
            torch.testing.assert_close(tables[index].proj.weight.grad.double(), projections[index].grad, atol=1e-5, rtol=1e-5)


def test_learned_pooling_weights():
    specs = [TableSpec("emb_l.0", 5, DIM, 2), TableSpec("emb_l.1", 9, DIM, 1)]
    rng = np.random.RandomState(0)
    collection = EmbeddingCollection([make("plain", spec, rng) for spec in specs], "learned", RULES["sgd"](), LAYOUTS["rows"])
    with torch.no_grad():
        for weight in collection.v_W_l:
            weight.copy_(torch.arange(1.0, len(weight) + 1))
    ids = torch.tensor([[1, 4, 8]], dtype=torch.int32)
    rows = collection.stores[0].weight()
    pooled = collection.lookup(ids, None).pooled
    torch.testing.assert_close(pooled[0, 0], 2 * rows[1] + 5 * rows[4])
    torch.testing.assert_close(pooled[0, 1], 9 * rows[5 + 8])
    pooled.sum().backward()
    assert collection.v_W_l[0].grad.nonzero().flatten().tolist() == [1, 4]


def test_tables_of_one_width_share_a_store():
    specs = [TableSpec(f"emb_l.{index}", 10 + index, DIM, 1) for index in range(3)]
    collection = EmbeddingCollection([make("plain", spec, np.random.RandomState(0)) for spec in specs], None, RULES["sgd"](), LAYOUTS["rows"])
    assert [store.weight().shape for store in collection.stores] == [(33, DIM)]
    assert [segments[0].start for segments in collection.segments] == [0, 10, 21]


def test_quotients_of_large_ids_are_exact():
    """Upstream divides in float32, which cannot hold ids above 2^24."""
    big = torch.tensor([2**24 * 4 + 1, 2**24 * 4 - 1])
    table = QRTable(TableSpec("emb_l.0", 100, DIM), "add", 4, False)
    assert table.row_ids(big)[0].tolist() == [2**24, 2**24 - 1]
    table.through_float = True
    assert table.row_ids(big)[0].tolist() != [2**24, 2**24 - 1]


@pytest.mark.parametrize("operation", ["mult", "add", "concat"])
def test_qr_starts_symmetric_with_the_spread_of_a_plain_table(operation):
    torch.manual_seed(0)
    rows = 10_000
    table = QRTable(TableSpec("emb_l.0", rows, 64), operation, 100, False)
    collection = EmbeddingCollection([table], None, RULES["sgd"](), LAYOUTS["rows"])
    quotient, remainder = (collection.part_rows(segment) for segment in collection.segments[0])
    vectors = table.combine((quotient[torch.arange(rows) // 100], remainder[torch.arange(rows) % 100]), None)
    assert vectors.std().item() == pytest.approx((1 / (3 * rows)) ** 0.5, rel=0.05)
    assert abs(vectors.mean().item()) < 0.05 * vectors.std().item()


def test_mixed_dimensions_by_hand():
    """lambda = 16 * 10^0.5; d = lambda / sqrt(n): 16, 5.06, 1.6, and at least 1."""
    assert dimensions([1000, 10, 100, 10**7], 0.5, 16, False) == [2, 16, 5, 1]
    assert dimensions([1000, 10, 100, 10**7], 0.5, 16, True) == [2, 16, 4, 1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_pooling_equals_torchs(layout):
    """Tables of both poolings side by side, bags of none to three ids, with and without padding."""
    rng = np.random.RandomState(0)
    specs = [TableSpec("emb_l.0", 9, DIM, 3, "mean"), TableSpec("emb_l.1", 5, DIM, 3), TableSpec("emb_l.2", 6, DIM, 1, "mean")]
    collection = EmbeddingCollection([make("plain", spec, rng) for spec in specs], None, RULES["sgd"](), LAYOUTS[layout])
    tables = [collection.part_rows(segment).clone() for (segment,) in collection.segments]
    bags = [[[1, 1, 8], [], [4, 0]], [[2, 3], [4], []], [[5], [0], []]]  # of each table, in each of three rows
    ids, weights = torch.zeros(3, 7, dtype=torch.int32), torch.zeros(3, 7)
    for table, start in enumerate((0, 3, 6)):
        for row, bag in enumerate(bags[table]):
            ids[row, start : start + len(bag)] = torch.tensor(bag, dtype=torch.int32)
            weights[row, start : start + len(bag)] = 1
    pooled = collection.lookup(ids, weights).pooled
    for table, spec in enumerate(specs):
        offsets = torch.tensor([0, *np.cumsum([len(bag) for bag in bags[table]])[:-1]])
        expected = torch.nn.functional.embedding_bag(torch.tensor(sum(bags[table], [])), tables[table], offsets, mode=spec.pooling)
        torch.testing.assert_close(pooled[:, table], expected)
    full = torch.tensor([[1, 2, 2, 0, 1, 2, 5]], dtype=torch.int32)
    torch.testing.assert_close(collection.lookup(full, None).pooled[0, 0], (tables[0][1] + 2 * tables[0][2]) / 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("padded", [False, True])
def test_learned_weights_of_a_mean(layout, padded):
    rng = np.random.RandomState(0)
    collection = EmbeddingCollection([make("plain", TableSpec("emb_l.0", 9, DIM, 3, "mean"), rng)], "learned", RULES["sgd"](), LAYOUTS[layout])
    with torch.no_grad():
        collection.v_W_l[0].copy_(torch.arange(1.0, 10.0))
    rows = collection.part_rows(collection.segments[0][0]).clone()
    ids = torch.tensor([[4, 8, 0 if padded else 2]], dtype=torch.int32)
    pooled = collection.lookup(ids, torch.tensor([[1.0, 1.0, 0.0]]) if padded else None).pooled[0, 0]
    torch.testing.assert_close(pooled, (5 * rows[4] + 9 * rows[8]) / 2 if padded else (5 * rows[4] + 9 * rows[8] + 3 * rows[2]) / 3)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rule", RULES)
def test_one_update_from_several_lookups(rule, layout):
    """Batches whose gradients are accumulated: the rule sees the sum of all of a row's gradients times `scale`."""
    rng = np.random.RandomState(0)
    specs = [TableSpec("emb_l.0", 5, DIM, 1), TableSpec("emb_l.1", 7, DIM, 3)]
    collection = EmbeddingCollection([make("plain", spec, rng) for spec in specs], None, RULES[rule](), LAYOUTS[layout])
    before = [collection.part_rows(segment).double().clone() for (segment,) in collection.segments]
    gradients, lookups = [torch.zeros_like(rows) for rows in before], []
    for _ in range(2):
        ids = torch.from_numpy(np.concatenate([rng.randint(0, 5, (BATCH, 1)), rng.randint(0, 7, (BATCH, 3))], 1)).int()
        direction = torch.from_numpy(rng.standard_normal((BATCH, 2, DIM)))
        lookups.append(collection.lookup(ids, None))
        (lookups[-1].pooled * direction.float()).sum().backward()
        for table, columns in enumerate((ids[:, :1], ids[:, 1:])):
            for column in columns.T.long():
                gradients[table].index_add_(0, column, direction[:, table] / 2)
    collection.update(lookups, torch.tensor(-0.5), 0.5)
    for rows, gradient, (segment,) in zip(before, gradients, collection.segments, strict=True):
        size = {"sgd": 1.0, "adagrad": gradient.abs() + 1e-10, "rwsadagrad": gradient.square().mean(1, keepdim=True).sqrt() + 1e-10}[rule]
        torch.testing.assert_close(collection.part_rows(segment).double(), rows - 0.5 * gradient / size, atol=1e-5, rtol=1e-5)


def test_a_wrong_pooling_is_refused():
    with pytest.raises(ValueError, match="pooling is 'max'; it must be sum or mean"):
        TableSpec("emb_l.0", 9, DIM, 3, "max")
