"""Low rank, exact and randomized SVD, random projection: tables and conversions against NumPy's SVD of dense matrices in float64."""

import math

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression import low_rank, random_projection
from compression.method import Making
from compression.svd import RSVD, SVD, oversampling_of
from dlrm_xla import backends
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError

LOW_RANK, PROJECTION = low_rank.METHOD, random_projection.METHOD
METHODS = {method.name: method for method in (LOW_RANK, SVD, RSVD, PROJECTION)}
SHAPES = [(1, 16), (7, 16), (97, 16), (10_007, 16), (97, 33), (7, 1)]


def spec_of(num_rows, width, hotness=1):
    return TableSpec("emb_l.0", num_rows, width, hotness)


def knobs_of(method, **given):
    return method.knob_values({name: str(value).lower() if isinstance(value, bool) else str(value) for name, value in given.items()})


def making(seed=0, counts=None):
    return Making(np.random.RandomState(seed), counts)


def decaying(num_rows, width, seed=0, alpha=0.7):
    """[N, D] float32 whose columns count less and less, in a basis of its own."""
    rng = np.random.RandomState(seed)
    turned = np.linalg.qr(rng.normal(size=(width, width)))[0]
    return ((rng.normal(size=(num_rows, width)) * np.arange(1, width + 1) ** -alpha) @ turned / 10).astype(np.float32)


def skewed(num_rows):
    """Zipf's counts, of which the rarer half of the ids has none, in the order of the ids."""
    counts = np.floor(1e4 / np.arange(1, num_rows + 1) ** 1.1)
    counts[(num_rows + 1) // 2 :] = 0
    return counts


def dense(table, num_rows):
    """[N, D] float64: every row by the factors that the fills write."""
    rows = torch.empty(num_rows, table.parts["weight"].width)
    table.parts["weight"].fill(rows)
    return rows.double().numpy() @ table.projection.detach().double().numpy()


def best(weight, rank, counts=None):
    """The nearest matrix of that rank by NumPy's SVD of the dense weighted matrix; rows that do not count lie in the span of the others."""
    scale = np.ones(len(weight)) if counts is None else np.sqrt(counts)
    _, _, right = np.linalg.svd(scale[:, None] * weight.astype(np.float64), full_matrices=False)
    return weight.astype(np.float64) @ right[:rank].T @ right[:rank]


def distance(a, b, counts=None):
    """Frobenius, relative to b."""
    scale = np.ones(len(a)) if counts is None else np.sqrt(counts)
    return np.linalg.norm(scale[:, None] * (a - b)) / np.linalg.norm(scale[:, None] * b)


@pytest.mark.parametrize("rank", [1, 4, 16, 64])
@pytest.mark.parametrize("method", [LOW_RANK, PROJECTION], ids=lambda method: method.name)
@pytest.mark.parametrize("family", ["orthogonal", "gaussian", "sign"])
def test_vectors_start_with_the_deviation_of_a_plain_table(method, rank, family):
    given = {"rank": rank} | ({"family": family} if method is PROJECTION else {})
    vectors = dense(method.create(spec_of(10_007, 64), knobs_of(method, **given), making()), 10_007)
    # 10,007 rank independent numbers: the deviation of one draw strays by 0.5 % at rank 1
    assert abs(math.sqrt((vectors**2).mean()) * math.sqrt(3 * 10_007) - 1) < 0.02


@pytest.mark.parametrize("method", [LOW_RANK, PROJECTION], ids=lambda method: method.name)
def test_the_start_is_a_function_of_the_seed(method):
    a, b, other = (dense(method.create(spec_of(97, 16), knobs_of(method), making(seed)), 97) for seed in (3, 3, 4))
    assert (a == b).all() and (a != other).all()


def test_the_projection_of_a_random_projection_is_kept_and_not_trained():
    table = PROJECTION.create(spec_of(97, 16), knobs_of(PROJECTION, rank=4), making())
    assert list(table.state_dict()) == ["projection"] and not list(table.parameters())
    assert torch.allclose(table.projection @ table.projection.T, torch.eye(4), atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_bytes_are_those_of_rows_and_projection(method, shape):
    for given in ({}, {"rank": 1}):
        knobs, spec = knobs_of(method, **given), spec_of(*shape)
        method.check(spec, knobs)
        table = method.convert(spec, knobs, decaying(*shape), making()).table
        part = table.parts["weight"]
        assert method.num_bytes(spec, knobs) == 4 * part.num_rows * part.width + 4 * table.projection.nelement()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.name)
def test_full_rank_gives_the_table_back(method, shape):
    weight, spec = decaying(*shape), spec_of(*shape)
    knobs = knobs_of(method, **method.exact_at(spec))
    method.check(spec, knobs)
    done = method.convert(spec, knobs, weight, making())
    assert np.abs(dense(done.table, shape[0]) - weight).max() < 1e-5 * max(1, np.abs(weight).max())
    assert done.facts["relative_error"] < 1e-6 and done.facts["ratio"] == 1


@pytest.mark.parametrize("counts", [None, "skewed"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("method", [LOW_RANK, SVD], ids=lambda method: method.name)
def test_exact_is_eckart_young(method, shape, counts):
    """Unweighted, and with the counts; then a rank that the ids that were looked up leave open somewhere is not asked for."""
    counts = skewed(shape[0]) if counts else None
    weighted = counts is not None and method is SVD
    rank = max(1, min(shape[0] // 2, shape[1] // 4))
    weight = decaying(*shape)
    knobs = knobs_of(method, rank=rank, **({"weighted": True} if weighted else {}))
    done = method.convert(spec_of(*shape), knobs, weight, making(counts=counts))
    oracle = best(weight, rank, counts if weighted else None)
    got = dense(done.table, shape[0])
    np.testing.assert_allclose(got, oracle, atol=3e-6)
    assert done.facts["relative_error"] == pytest.approx(distance(oracle, weight), abs=1e-6)
    assert done.facts["optimal"] == pytest.approx(distance(best(weight, rank), weight), abs=1e-6)
    if counts is not None:
        assert done.facts["relative_error_weighted"] == pytest.approx(distance(oracle, weight, counts), abs=2e-6)
        assert done.facts["optimal_weighted"] == pytest.approx(distance(best(weight, rank, counts), weight, counts), abs=2e-6)


@pytest.mark.parametrize("method", [SVD, RSVD], ids=lambda method: method.name)
@pytest.mark.parametrize("num_rows", [97, 10_007])
def test_each_norm_has_its_own_optimum(method, num_rows):
    """Popular ids with directions of their own: minimizing one error costs in the other."""
    weight, counts = decaying(num_rows, 16), skewed(num_rows)
    weight[: num_rows // 20] = decaying(num_rows // 20, 16, seed=1)
    knobs = [knobs_of(method, rank=4, weighted=flag) for flag in (False, True)]
    plain, weighted = (method.convert(spec_of(num_rows, 16), of_flag, weight, making(counts=counts)).facts for of_flag in knobs)
    assert weighted["relative_error_weighted"] < 0.99 * plain["relative_error_weighted"]
    assert plain["relative_error"] < 0.99 * weighted["relative_error"]
    assert weighted["ratio_weighted"] < 1.02 and plain["ratio"] < 1.02
    assert min(weighted["ratio"], plain["ratio_weighted"]) > 1.01


@pytest.mark.parametrize("method", [SVD, RSVD], ids=lambda method: method.name)
@pytest.mark.parametrize("looked_up", [0, 1, 3])
def test_ids_that_are_never_looked_up_get_what_the_others_leave(method, looked_up):
    """Fewer ids are looked up than the rank has dimensions: those are exact, and the rest of the rank goes to the others."""
    weight, counts = decaying(97, 16), np.zeros(97)
    counts[:looked_up] = 5
    done = method.convert(spec_of(97, 16), knobs_of(method, rank=8, weighted=True), weight, making(counts=counts))
    got = dense(done.table, 97)
    assert looked_up == 0 or np.abs(got - weight)[:looked_up].max() < 1e-5
    # at least as good as the best of the dimensions that are left
    assert distance(got, weight) < 1.03 * distance(best(weight, 8 - looked_up), weight)


@pytest.mark.parametrize("family", ["gaussian", "sign"])
@pytest.mark.parametrize("power", [0, 1, 3])
def test_randomized_is_near_the_optimum_and_nearer_with_power(family, power):
    weight = decaying(10_007, 33, alpha=0.5)
    done = RSVD.convert(spec_of(10_007, 33), knobs_of(RSVD, rank=8, oversampling=10, power=power, family=family), weight, making())
    assert done.facts["ratio"] < {0: 1.06, 1: 1.01, 3: 1.001}[power]
    assert done.facts["bound_slack"] > 1 and done.facts["bound"] == pytest.approx(done.facts["optimal"] * math.sqrt(1 + 8 / 9))


def test_only_the_norm_that_was_minimized_has_a_bound():
    weight, counts = decaying(97, 16), skewed(97)
    for flag, has, lacks in ((True, "bound_weighted", "bound"), (False, "bound", "bound_weighted")):
        facts = RSVD.convert(spec_of(97, 16), knobs_of(RSVD, rank=2, weighted=flag), weight, making(counts=counts)).facts
        assert has in facts and lacks not in facts


def test_as_near_as_scikit_learns():
    sklearn = pytest.importorskip("sklearn.utils.extmath")
    weight = decaying(3000, 64, alpha=0.5)
    for rank in (4, 16):
        u, s, vt = sklearn.randomized_svd(weight.astype(np.float64), rank, n_oversamples=oversampling_of(rank), n_iter=1, random_state=0)
        ours = RSVD.convert(spec_of(3000, 64), knobs_of(RSVD, rank=rank), weight, making()).facts["relative_error"]
        assert ours <= 1.003 * distance(u * s @ vt, weight)


@pytest.mark.parametrize("family", ["orthogonal", "gaussian", "sign"])
def test_a_random_projection_keeps_its_share_of_any_table(family):
    weight, squares = decaying(97, 16), []
    for seed in range(60):
        done = PROJECTION.convert(spec_of(97, 16), knobs_of(PROJECTION, rank=4, family=family), weight, making(seed))
        projection = done.table.projection.double().numpy()
        oracle = np.linalg.lstsq(projection.T, weight.astype(np.float64).T, rcond=None)[0].T @ projection
        np.testing.assert_allclose(dense(done.table, 97), oracle, atol=2e-6)
        squares.append(done.facts["relative_error"] ** 2)
    assert done.facts["expected"] == pytest.approx(math.sqrt(1 - 4 / 16))
    assert math.sqrt(np.mean(squares)) == pytest.approx(done.facts["expected"], rel=0.05)


def test_a_table_of_zeros():
    for method in METHODS.values():
        done = method.convert(spec_of(97, 16), knobs_of(method, rank=2), np.zeros((97, 16), np.float32), making(counts=skewed(97)))
        assert (dense(done.table, 97) == 0).all() and done.facts["relative_error"] == 0 and done.facts["ratio"] == 1


@pytest.mark.parametrize("method", [LOW_RANK, SVD, RSVD], ids=lambda method: method.name)
@pytest.mark.parametrize("shape, most", [((7, 16), 7), ((97, 16), 16), ((1, 16), 1)])
def test_a_rank_too_large_names_the_largest(method, shape, most):
    name = method.name
    with pytest.raises(UserError, match=rf"^{name}:rank={most + 1}: table emb_l.0 .* at most {most}; give {name}:rank={most}\b") as error:
        method.check(spec_of(*shape), knobs_of(method, rank=most + 1))
    assert "\n" not in str(error.value)
    method.check(spec_of(*shape), knobs_of(method, rank=most))


def test_other_bad_input():
    with pytest.raises(UserError, match="random_projection:rank=17: .*at most 16"):
        PROJECTION.check(spec_of(7, 16), knobs_of(PROJECTION, rank=17))
    with pytest.raises(UserError, match="svd:weighted=true: table emb_l.0: .*weighted=false"):
        SVD.convert(spec_of(97, 16), knobs_of(SVD, weighted=True), decaying(97, 16), making())
    broken = decaying(97, 16)
    broken[3, 3] = np.nan
    for method in METHODS.values():
        with pytest.raises(UserError, match="table emb_l.0: .*not finite"):
            method.convert(spec_of(97, 16), knobs_of(method), broken, making())


HOTNESS = 3


def step(method, backend=None):
    """A lookup in bags of three and its backward pass -> pooled, gradient of the rows [97, rank], of the projection, and the inputs."""
    rng = np.random.RandomState(5)
    spec = spec_of(97, 16, HOTNESS)
    table = method.create(spec, knobs_of(method, rank=4), making())
    layout = RowsLayout(add_rows_scatter, ragged=False) if backend is None else backend.layout("rows")
    collection = EmbeddingCollection([table], None, RULES["sgd"], layout)
    rows = collection.part_rows(collection.segments[0][0]).clone()
    ids = torch.from_numpy(rng.randint(0, 97, (32, HOTNESS)).astype(np.int32))
    weights = torch.from_numpy(rng.randint(0, 2, (32, HOTNESS)).astype(np.float32))
    upstream = torch.from_numpy(rng.normal(size=(32, 1, 16)).astype(np.float32))
    device = "cpu" if backend is None else backend.device
    collection = collection.to(device)
    found = collection.lookup(ids.to(device), weights.to(device))
    (found.pooled * upstream.to(device)).sum().backward()
    read = found.slots[0]
    grads = torch.zeros(97, 4).index_add_(0, read.rows.cpu().long(), read.leaf.grad.cpu())
    projection = table.projection
    of_projection = None if projection.grad is None else projection.grad.cpu()
    return found.pooled.detach().cpu(), grads, of_projection, (rows, ids, weights, upstream, projection)


@pytest.mark.parametrize("method", [LOW_RANK, PROJECTION], ids=lambda method: method.name)
def test_values_and_gradients_are_autograds_of_the_dense_product(method):
    pooled, of_rows, of_projection, (rows, ids, weights, upstream, projection) = step(method)
    rows, projection = rows.double().requires_grad_(), projection.detach().double().requires_grad_()
    table = rows @ projection
    wanted = torch.stack([sum(w * table[i] for i, w in zip(bag, ws, strict=True)) for bag, ws in zip(ids.long(), weights.double(), strict=True)])
    (wanted[:, None] * upstream).sum().backward()
    torch.testing.assert_close(pooled[:, 0].double(), wanted.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(of_rows.double(), rows.grad, atol=1e-5, rtol=1e-5)
    if method is LOW_RANK:
        torch.testing.assert_close(of_projection.double(), projection.grad, atol=1e-5, rtol=1e-5)
    else:
        assert of_projection is None


@pytest.mark.parametrize("method", [LOW_RANK, PROJECTION], ids=lambda method: method.name)
def test_xla_gives_what_the_cpu_gives(method):
    xla_or_skip()
    for here, there in zip(step(method)[:3], step(method, backends.make("xla"))[:3], strict=True):
        assert here is there is None or torch.allclose(here, there, atol=1e-5, rtol=1e-5)
