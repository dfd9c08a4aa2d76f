"""Row-wise int8 and int4 against loops in float64."""

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression.method import Making
from compression.rowwise import INT4, INT8, decode_half, greedy
from dlrm_xla import backends
from dlrm_xla.specs import TableSpec, UserError

SHAPES = ((1, 16), (7, 4), (97, 64), (10_007, 16))
CASES = [
    {}, {"range": "minmax"}, {"rows_per_scale": "4"}, {"scales": "float32"}, {"scales": "float32", "rows_per_scale": "8", "range": "minmax"},
]  # fmt: skip


def trained(rows: int, dim: int) -> np.ndarray:
    """Rows of very different sizes, some constant, one of zeros."""
    rng = np.random.RandomState(rows)
    weight = rng.standard_t(3, (rows, dim)) * np.exp(2 * rng.randn(rows, 1)) * 1e-4
    weight[3::10], weight[5::50] = weight[3::10, :1], 0
    return weight.astype(np.float32)


def converted(method, weight: np.ndarray, given: dict, counts: np.ndarray | None = None):
    """(decoded [N, D], facts, table, the filled part or None)."""
    spec, knobs = TableSpec("emb_l.0", *weight.shape), method.knob_values(given)
    method.check(spec, knobs)
    done = method.convert(spec, knobs, weight, Making(np.random.RandomState(0), counts))
    rows = []
    for part in done.table.parts.values():
        rows.append(torch.full((part.num_rows, part.width), np.nan))
        part.fill(rows[-1])
    ids = torch.arange(len(weight))
    read = tuple(values[row] for values, row in zip(rows, done.table.row_ids(ids), strict=True))
    size = sum(4 * values.nelement() for values in rows) + sum(b.nelement() * b.element_size() for b in done.table.buffers())
    assert size == method.num_bytes(spec, knobs)
    return done.table.combine(read, ids), done.facts, done.table, read


def row_errors(weight: np.ndarray, decoded: torch.Tensor) -> np.ndarray:
    return ((weight.astype(np.float64) - decoded.double().numpy()) ** 2).sum(1)


def test_every_half_precision_number_is_decoded_exactly():
    bits = np.arange(1 << 16, dtype=np.uint16)
    numbers = bits.view(np.float16).astype(np.float32)
    finite = np.isfinite(numbers)
    assert np.array_equal(decode_half(torch.from_numpy(bits.astype(np.int32))).numpy()[finite], numbers[finite])


@pytest.mark.parametrize("given", CASES, ids=str)
@pytest.mark.parametrize("method", [INT8, INT4], ids=lambda method: method.name)
@pytest.mark.parametrize("rows, dim", SHAPES)
def test_error_against_float64(rows, dim, method, given):
    """At most half a step of the smallest-to-largest range for each number, the rounding of scales included; facts as computed by loops."""
    weight, levels = trained(rows, dim), 2 ** int(method.name[3:]) - 1
    decoded, facts, _, _ = converted(method, weight, given)
    together, squares = int(given.get("rows_per_scale", 1)), row_errors(weight, decoded)
    largest = float(np.abs(weight).max())
    for first in range(0, rows, together):
        group = weight[first : first + together].astype(np.float64)
        step = (group.max() - group.min()) / levels
        slack = 2.0**-10 * (np.abs(group).max() / levels + step) + 1e-8 * largest
        assert squares[first : first + together].sum() <= group.size * (step / 2 + slack) ** 2
    norm = np.linalg.norm(weight.astype(np.float64))
    assert facts["relative_error"] == pytest.approx(np.sqrt(squares.sum()) / norm, rel=1e-4)
    assert facts["relative_error"] <= facts["bound"] * (1 + 1e-3)


@pytest.mark.parametrize("scales", ["float16", "float32"])
@pytest.mark.parametrize("method", [INT8, INT4], ids=lambda method: method.name)
def test_greedy_is_never_worse_than_minmax(method, scales):
    weight = trained(10_007, 16)
    errors = {search: row_errors(weight, converted(method, weight, {"range": search, "scales": scales})[0]) for search in ("greedy", "minmax")}
    assert (errors["greedy"] <= errors["minmax"] * (1 + 1e-4) + 1e-18).all()
    assert errors["greedy"].sum() < (0.9 if method is INT4 else 1.0) * errors["minmax"].sum()


def paper_search(row: np.ndarray, levels: int, weights: np.ndarray) -> float:
    """The squared error that the paper's search ends with: loops, float64."""

    def error(low, high):
        step = (high - low) / levels
        return (weights * (np.clip(np.rint((row - low) / step), 0, levels) * step + low - row) ** 2).sum()

    low, high = row.min(), row.max()
    move, best = (high - low) / 200, error(low, high)
    for _ in range(32):
        left, right = error(low + move, high), error(low, high - move)
        low, high = (low + move, high) if left < right else (low, high - move)
        best = min(best, left, right)
    return best


@pytest.mark.parametrize("levels", [15, 255])
def test_the_search_is_the_papers(levels):
    rows = np.random.RandomState(0).standard_t(4, (40, 64))
    weights = np.random.RandomState(1).rand(40, 64)
    for given in (None, weights):
        low, high = greedy(rows, levels, given)
        for row, counts, ends in zip(rows, weights if given is not None else np.ones((40, 64)), np.stack([low, high], 1), strict=True):
            step = (ends[1] - ends[0]) / levels
            reached = (counts * (np.clip(np.rint((row - ends[0]) / step), 0, levels) * step + ends[0] - row) ** 2).sum()
            assert reached == pytest.approx(paper_search(row, levels, counts), rel=1e-6)


def test_weights_decide_where_rows_share_a_scale():
    weight = trained(97, 16)
    counts = np.where(np.arange(97) % 4 == 0, 1000.0, 1.0)
    errors = [
        counts @ row_errors(weight, converted(INT4, weight, {"rows_per_scale": "4", "weighted": weighted}, counts)[0])
        for weighted in ("true", "false")
    ]
    assert errors[0] < errors[1]


def test_the_optimum_is_one_and_is_left_out_where_it_is_zero():
    facts = converted(INT4, trained(97, 64), {})[1]
    assert 0 < facts["optimal"] <= facts["relative_error"]
    assert "optimal" not in converted(INT8, trained(97, 64), {})[1]
    assert "optimal" not in converted(INT4, trained(97, 16), {})[1]


def test_bytes_of_a_row():
    spec = TableSpec("emb_l.0", 1 << 20, 16)
    assert INT8.num_bytes(spec, INT8.knob_values({})) == (20 << 20) + 8
    assert INT4.num_bytes(spec, INT4.knob_values({"rows_per_scale": "8"})) == (8 << 20) + (1 << 19) + 8


def test_small_numbers_keep_their_digits():
    """A table of 10^7 rows starts at 3e-4; as plain half-precision numbers the scales of an int8 row would be wrong by several percent."""
    weight = np.random.RandomState(0).uniform(-3e-4, 3e-4, (1000, 16)).astype(np.float32)
    assert converted(INT8, weight, {})[1]["relative_error"] < 0.004
    assert converted(INT8, weight * 1e-20, {})[1]["relative_error"] < 0.004
    assert converted(INT8, weight * np.float32(1e20), {})[1]["relative_error"] < 0.004


def test_gradients_of_float32_scales():
    weight = trained(97, 16)
    decoded, _, table, rows = converted(INT8, weight, {"scales": "float32", "rows_per_scale": "2"})
    leaf = rows[0].clone().requires_grad_()
    wanted = torch.from_numpy(np.random.RandomState(0).randn(97, 16).astype(np.float32))
    (table.combine((leaf,), torch.arange(97)) * wanted).sum().backward()
    codes = table.codes.read(torch.arange(97)).double().numpy()
    np.testing.assert_allclose(leaf.grad.numpy(), np.stack([(codes * wanted.numpy()).sum(1), wanted.numpy().sum(1)], 1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("given", CASES, ids=str)
def test_xla(given, dtype):
    xla_or_skip()
    weight, backend = trained(97, 16), backends.make("xla")
    decoded, _, table, rows = converted(INT4, weight, given)
    backend.place(table)
    before = backend.fallbacks()
    ids = torch.arange(97, dtype=dtype).to(backend.device)
    on_xla = table.combine(tuple(part.to(backend.device) for part in rows), ids)
    backend.end_step()
    assert backend.fallbacks() == before
    torch.testing.assert_close(on_xla.cpu(), decoded, rtol=1e-5, atol=1e-6 * float(np.abs(weight).max()))  # XLA fuses the sum


def test_bad_knobs():
    spec = TableSpec("emb_l.0", 97, 16)
    with pytest.raises(UserError, match="^int8:rows_per_scale=3: must be a power of two; use 2$"):
        INT8.check(spec, INT8.knob_values({"rows_per_scale": "3"}))
    with pytest.raises(UserError, match="^table emb_l.0: some of its numbers are not finite"):
        INT8.convert(spec, INT8.knob_values({}), np.full((97, 16), np.nan, np.float32), Making(np.random.RandomState(0)))
    with pytest.raises(UserError, match="^int8:weighted=true: table emb_l.0: how often"):
        INT8.convert(spec, INT8.knob_values({"weighted": "true"}), trained(97, 16), Making(np.random.RandomState(0)))
