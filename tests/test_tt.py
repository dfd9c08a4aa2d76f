"""Tensor trains: values and gradients against loops in float64, shapes, starting values, TT-SVD inside its bracket."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression.method import Making
from compression.tt import METHOD, SVD_METHOD, gaussian_cores
from compression.tt_forms import choose, cost, forms
from compression.tt_shapes import TTShape, default_cores, shape_of, split_dim, split_rows, useful_ranks
from dlrm_xla import backends
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.optim import RULES, DenseOptimizer
from dlrm_xla.specs import TableSpec, UserError

SIZES = [(rows, dim, cores) for rows in (1, 7, 97, 10_007) for dim in (4, 12, 16, 64) for cores in (2, 3, 4) if split_dim(dim, cores)]


def knobs(**given) -> dict:
    return {**{knob.name: knob.default for knob in METHOD.knobs}, **given}


def make(num_rows: int, dim: int, seed: int = 0, counts=None, **given):
    return METHOD.create(TableSpec("emb_l.0", num_rows, dim), knobs(**given), Making(np.random.RandomState(seed), counts))


def row_by_loops(cores: list[np.ndarray], number: int) -> np.ndarray:
    """One row of the table, [D], from cores [p, R, q, R']: a sum over every path through the ranks."""
    picked, rest = [], number
    for core in cores:
        picked.append(core[rest % core.shape[0]])
        rest //= core.shape[0]
    assert rest == 0
    row = []
    for place in itertools.product(*(range(core.shape[1]) for core in picked)):
        matrix = np.ones((1, 1))
        for core, j in zip(picked, place, strict=True):
            following = np.zeros((1, core.shape[2]))
            for a in range(core.shape[0]):
                for b in range(core.shape[2]):
                    following[0, b] += matrix[0, a] * core[a, j, b]
            matrix = following
        row.append(matrix[0, 0])
    return np.array(row)


def shaped(table) -> list[torch.Tensor]:
    return [core.view(table.shape.core(k)) for k, core in enumerate(table.cores)]


def rebuilt(cores: list[torch.Tensor], num_rows: int) -> torch.Tensor:
    """[N, D] by one einsum over whole cores, differentiable; the other way round than the code: the last digit first."""
    letters = "abcdefghijkl"
    terms, rows, dims = [], [], []
    for k in range(len(cores)):
        i, j = letters[2 * k], letters[2 * k + 1]
        terms.append(f"{i}{'wxyzv'[k]}{j}{'wxyzv'[k + 1]}")
        rows.append(i)
        dims.append(j)
    whole = torch.einsum(f"{','.join(terms)}->{''.join(rows[::-1])}{''.join(dims)}", *cores)
    return whole.reshape(math.prod(core.shape[0] for core in cores), -1)[:num_rows]


@pytest.mark.parametrize("rows,dim,cores", SIZES)
def test_values_are_products_along_the_digits(rows, dim, cores):
    table = make(rows, dim, cores=cores, rank=None if rows < 10_000 else 5).double()
    ids = torch.from_numpy(np.unique(np.linspace(0, rows - 1, 12).astype(np.int64)))
    parts = [core.detach().numpy() for core in shaped(table)]
    expected = np.stack([row_by_loops(parts, number) for number in ids.tolist()])
    for form in forms(cores):
        table.form = form
        assert np.abs(table.combine((), ids).detach().numpy() - expected).max() < 1e-14


@pytest.mark.parametrize("rows,dim,cores", [(7, 4, 2), (97, 16, 3), (97, 12, 3), (97, 16, 4), (1009, 64, 3)])
def test_gradients_are_those_through_the_rebuilt_table(rows, dim, cores):
    table = make(rows, dim, cores=cores).double()
    ids = torch.from_numpy(np.random.RandomState(1).randint(0, rows, (40, 3)))
    direction = torch.randn(40, 3, dim, dtype=torch.float64)
    whole = [core.detach().clone().requires_grad_() for core in shaped(table)]
    (rebuilt(whole, rows)[ids] * direction).sum().backward()
    for form in forms(cores):
        table.form = form
        table.zero_grad()
        (table.combine((), ids) * direction).sum().backward()
        for core, expected in zip(table.cores, whole, strict=True):
            assert torch.allclose(core.grad.view_as(expected), expected.grad, rtol=1e-12, atol=1e-14)


def test_no_gradient_of_the_tables_size_exists():
    """Every tensor that the backward pass keeps is smaller than a table."""
    table = make(1_000_000, 16, rank=8)
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.nelement()) or tensor, lambda tensor: tensor):
        table.combine((), torch.arange(512)).sum().backward()
    assert max(sizes) < 1_000_000 * 16 / 20


@pytest.mark.parametrize("cores", [2, 3, 4])
@pytest.mark.parametrize("rank", [4, 16, 128])
def test_starting_values_have_the_deviation_of_a_plain_table(cores, rank):
    rows, dim = 100_003, 16
    spec = TableSpec("t", rows, dim)
    rank = min(rank, METHOD.sized_most(spec, knobs(cores=cores)))
    shape = shape_of("tt", spec, knobs(rank=rank, cores=cores))
    table = METHOD.create(spec, knobs(rank=rank, cores=cores), Making(np.random.RandomState(3)))
    values = table.values(np.arange(rows))
    assert float(values.double().std()) * math.sqrt(3 * rows) == pytest.approx(1, abs=0.02)
    assert all(torch.equal(a, b) for a, b in zip(gaussian_cores(shape, rows, np.random.RandomState(3)), shaped(table), strict=True))


def test_dimensions_are_divided_exactly_and_rows_with_little_left_over():
    for dim in range(1, 130):
        for cores in (2, 3, 4):
            divided = split_dim(dim, cores)
            assert not divided or math.prod(divided) == dim and len(divided) == cores
    for rows in (1, 2, 3, 7, 97, 10_007, 142_572, 10_131_227, 40_000_000):
        for cores in (2, 3, 4):
            divided = split_rows(rows, cores)
            assert rows <= math.prod(divided) <= rows * 1.1 + 2**cores and max(divided) <= 1.3 * rows ** (1 / cores) + 1


@pytest.mark.parametrize("dim,dims", [(16, (2, 2, 4)), (64, (4, 2, 8)), (128, (4, 4, 8))])
def test_rows_of_the_prefix_form_are_whole_lines_at_rank_32(dim, dims):
    assert split_dim(dim, 3) == dims
    assert 32 * math.prod(dims[:2]) % 128 == 0 and 32 * dims[2] % 128 == 0


def test_given_shapes_are_taken():
    table = make(10_131_227, 16, rank=4, rows="200x220x250", dims="2x2x4")
    assert table.shape == TTShape((200, 220, 250), (2, 2, 4), (1, 4, 4, 1))
    assert make(97, 7).shape.dims == (1, 7) and default_cores(7) == 2


@pytest.mark.parametrize(
    "given,message",
    [
        ({"rank": 21}, "tt:rank=21: table emb_l.0 has 97 rows of 16, divided into 5x4x5 rows of 2x2x4, and no rank above 20 is of use; use"),
        ({"cores": 4, "dims": "2x2x4"}, "tt:dims=2x2x4: must have 4 factors"),
        ({"dims": "2x3x4"}, "tt:dims=2x3x4: table emb_l.0 has 97 rows of 16, and the product is 24; leave dims out or use dims=2x2x4"),
        ({"rows": "4x4x4"}, "tt:rows=4x4x4: table emb_l.0 has 97 rows of 16, and the product is 64, less than that; use rows=5x4x5"),
        ({"rows": "many"}, "tt:rows=many: must be 2 to 4 whole numbers with x between them, as 200x220x250"),
        ({"cache": 98}, "tt:cache=98: table emb_l.0 has 97 rows; at most as many can be cached"),
    ],
)
def test_what_does_not_go_together_is_said_in_a_line(given, message):
    with pytest.raises(UserError) as caught:
        METHOD.check(TableSpec("emb_l.0", 97, 16), knobs(**given))
    assert str(caught.value).startswith(message)


def test_a_dimension_without_enough_factors():
    with pytest.raises(UserError, match="4 is no product of 3 numbers above 1; use cores=2 or dims=1x2x2"):
        METHOD.check(TableSpec("t", 97, 4), knobs(cores=3))
    METHOD.check(TableSpec("t", 97, 4), knobs(cores=3, dims="1x2x2"))


@pytest.mark.parametrize("rows,dim", [(1, 4), (7, 16), (97, 12), (10_007, 16)])
@pytest.mark.parametrize("cached", [0, 5])
def test_bytes_are_those_of_the_table(rows, dim, cached):
    cached = min(cached, rows)
    table = make(rows, dim, cache=cached)
    state = sum(value.nelement() * value.element_size() for value in table.state_dict().values())
    rows_of = sum(4 * part.num_rows * part.width for part in table.parts.values())
    assert METHOD.num_bytes(TableSpec("t", rows, dim), knobs(cache=cached)) == state + rows_of


def test_bytes_rise_with_the_rank():
    spec = TableSpec("t", 10_007, 64)
    sizes = [METHOD.num_bytes(spec, knobs(rank=rank)) for rank in range(1, METHOD.sized_most(spec, knobs()) + 1)]
    assert all(a < b for a, b in itertools.pairwise(sizes))


@pytest.mark.parametrize("rows,dim,cores", SIZES)
def test_tt_svd_stays_in_its_bracket_and_is_exact_at_full_rank(rows, dim, cores):
    spec, rng = TableSpec("t", rows, dim), np.random.RandomState(0)
    weight = (rng.standard_normal((rows, dim)) * np.exp(-np.arange(dim) / 4)).astype(np.float32)
    most = SVD_METHOD.sized_most(spec, knobs(cores=cores))
    for rank in sorted({1, min(4, most), most}):
        made = SVD_METHOD.convert(spec, knobs(cores=cores, rank=rank), weight, Making(rng))
        values, facts = made.table.values(np.arange(rows)).numpy(), made.facts
        assert facts["relative_error"] == pytest.approx(np.linalg.norm(values - weight) / np.linalg.norm(weight), abs=2e-5)
        assert facts["lower"] - 1e-6 <= facts["relative_error"] <= facts["upper"] + 1e-6
    assert np.abs(values - weight).max() < 1e-5 * max(1, np.abs(weight).max())


def test_tt_svd_finds_a_tensor_train():
    spec = TableSpec("t", 10_007, 16)
    weight = make(10_007, 16, rank=6).values(np.arange(10_007)).numpy()
    made = SVD_METHOD.convert(spec, knobs(rank=6), weight, Making(np.random.RandomState(0)))
    # the rows of zeros at the end are no part of it, and there are few
    assert made.facts["relative_error"] < 0.1 and made.facts["lower"] < 1e-6


def test_tails_equal_singular_values():
    """Without padding lower and upper are max and root of the sum of squares of what NumPy's SVD of the unfoldings drops."""
    rng = np.random.RandomState(2)
    weight = rng.standard_normal((8 * 9 * 10, 16)).astype(np.float32)
    made = SVD_METHOD.convert(TableSpec("t", 720, 16), knobs(rank=7, rows="8x9x10", dims="2x2x4"), weight, Making(rng))
    tensor = weight.reshape(10, 9, 8, 2, 2, 4).transpose(2, 3, 1, 4, 0, 5)  # i1 j1 i2 j2 i3 j3
    tails = []
    for columns in (16, 16 * 18):
        values = np.linalg.svd(tensor.reshape(columns, -1).astype(np.float64), compute_uv=False)
        tails.append((values[7:] ** 2).sum() / (values**2).sum())
    assert made.facts["lower"] == pytest.approx(math.sqrt(max(tails)), rel=1e-6)
    assert made.facts["upper"] == pytest.approx(min(1, math.sqrt(sum(tails))), rel=1e-6)


def test_a_large_unfolding_takes_random_projections(monkeypatch):
    import compression.tt_svd as module

    spec, weight = TableSpec("t", 10_007, 16), make(10_007, 16, rank=6).values(np.arange(10_007)).numpy()
    exact = SVD_METHOD.convert(spec, knobs(rank=4), weight, Making(np.random.RandomState(0))).facts
    monkeypatch.setattr(module, "LARGEST_GRAM", 8)
    facts = SVD_METHOD.convert(spec, knobs(rank=4), weight, Making(np.random.RandomState(0))).facts
    assert facts["relative_error"] == pytest.approx(exact["relative_error"], rel=0.02)
    assert facts["lower"] == 0.0 and facts["upper"] >= facts["relative_error"] - 1e-6


def test_a_table_of_zeros():
    made = SVD_METHOD.convert(TableSpec("t", 97, 16), knobs(), np.zeros((97, 16), np.float32), Making(np.random.RandomState(0)))
    assert made.facts["relative_error"] == 0.0 and not made.table.values(np.arange(97)).any()


def test_few_lookups_take_the_direct_form_and_many_the_prefix():
    shape = shape_of("tt", TableSpec("t", 10_131_227, 16), knobs(rank=32))
    assert choose(shape, 64) == (1, 1, 1) and choose(shape, 65_536) == (2, 1)
    for form in forms(3):
        assert cost(shape, form, 2) > cost(shape, form, 1)
    assert useful_ranks((200, 220, 250), (2, 2, 4)) == [400, 1000]


def trained_on(device: str, given: dict) -> tuple[dict[str, np.ndarray], int, dict]:
    """Three steps of Adagrad on bags with padded slots: pooled vectors and state, programs compiled by the third step, operators left to the host."""
    backend = backends.make(device)
    counts = np.arange(10_007.0)
    spec = TableSpec("emb_l.0", 10_007, 16, 3)
    table = METHOD.create(spec, knobs(rank=8, **given), Making(np.random.RandomState(0), counts))
    collection = backend.place(EmbeddingCollection([table], None, RULES["adagrad"](), backend.layout("auto")))
    dense = DenseOptimizer(list(table.cores), collection.rule, backend.inplace)
    generator, before, compiled = torch.Generator().manual_seed(1), backend.fallbacks(), 0
    for step in range(3):
        ids = torch.randint(0, 10_007, (64, 3), generator=generator, dtype=torch.int32)
        weights = torch.ones(64, 3)
        ids[::4, 1:], weights[::4, 1:] = 0, 0.0
        direction = torch.randn(64, 1, 16, generator=generator)
        ids, weights, direction = (part.to(backend.device) for part in (ids, weights, direction))
        neg_lr = torch.tensor(-0.01).to(backend.device)
        found = collection.lookup(ids, weights)
        ((found.pooled - direction) ** 2).sum().backward()
        dense.step(neg_lr)
        collection.update([found], neg_lr)
        pooled = found.pooled.detach()
        backend.end_step()
        if step == 1:
            backend.wait()
            compiled = backend.compiles()
    backend.wait()
    compiled = 0 if compiled is None else backend.compiles() - compiled
    after = {name: count for name, count in backend.fallbacks().items() if count != before.get(name)} if before is not None else {}
    state = {name: value.cpu().numpy() for name, value in collection.state_dict().items() if "scratch" not in name}
    return {"pooled": pooled.cpu().numpy(), **state}, compiled, after


@pytest.mark.parametrize("given", [{}, {"cache": 100}, {"cores": 4}, {"cores": 2}])
def test_xla_equals_the_cpu(given):
    xla_or_skip()
    expected, _, _ = trained_on("cpu", given)
    values, compiled, fallbacks = trained_on("xla", given)
    assert compiled == 0 and not fallbacks
    assert values.keys() == expected.keys()
    for name, value in values.items():
        assert np.abs(value.astype(np.float64) - expected[name]).max() < 1e-5
