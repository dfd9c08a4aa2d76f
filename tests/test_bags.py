"""Bags summed straight from a matrix, and the gradients of its rows, against float64 loops."""

import numpy as np
import pytest
import torch
from test_cost import LargeTensors

from dlrm_xla.ops import bags as ops
from dlrm_xla.ops.rows import add_rows_index, add_rows_scatter

SHAPES = [(1, 1, 1), (1, 7, 3), (5, 1, 16), (13, 4, 5), (6, 100, 17), (3, 0, 4)]  # bags, slots, width
CHUNKS = [None, 1, 7, 10_000]


def draw(seed: int, num_bags: int, hotness: int, width: int, num_rows: int = 23):
    """Few rows, so that most stand in many bags and often twice in one: matrix, rows, filled, weights, gradients. Bag 0 is empty."""
    rng = np.random.default_rng(seed)
    rows = rng.integers(0, num_rows, (num_bags, hotness))
    filled = (np.arange(hotness) < rng.integers(0, hotness + 1, (num_bags, 1))).astype(np.float32)
    filled[0] = 0
    rows = np.where(filled > 0, rows, 0)
    weights = rng.normal(size=(num_bags, hotness))
    arrays = rng.normal(size=(num_rows, width)), rows, filled, weights, rng.normal(size=(num_bags, width))
    return tuple(torch.from_numpy(array) for array in arrays)


def slow_sums(matrix, rows, filled, weights):
    """[M, d] by a loop over slots."""
    sums = np.zeros((rows.shape[0], matrix.shape[1]))
    for (bag, slot), row in np.ndenumerate(rows.numpy()):
        if filled is None or filled[bag, slot] != 0:
            sums[bag] += (1.0 if weights is None else weights[bag, slot].item()) * matrix[row].double().numpy()
    return torch.from_numpy(sums)


def slow_row_grads(rows, filled, weights, grads):
    """{row: its summed gradient [d]} by a loop over slots."""
    found = {}
    for (bag, slot), row in np.ndenumerate(rows.numpy()):
        if filled is None or filled[bag, slot] != 0:
            factor = 1.0 if weights is None else weights[bag, slot].item()
            found[int(row)] = found.get(int(row), 0.0) + factor * grads[bag].double().numpy()
    return found


def variants(filled, weights):
    return [(None, None), (filled, None), (filled, weights), (None, weights)]


@pytest.mark.parametrize("shape", SHAPES)
def test_sums(shape):
    matrix, rows, filled, weights, _ = draw(1, *shape)
    for mask, factors in variants(filled, weights):
        expected = slow_sums(matrix, rows, mask, factors)
        torch.testing.assert_close(ops.bag_sum(matrix, ops.pack(rows, mask, factors)), expected, rtol=1e-12, atol=1e-12)
        bags32 = ops.pack(rows, mask, None if factors is None else factors.float())
        torch.testing.assert_close(ops.bag_sum(matrix.float(), bags32).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_row_gradients(shape, chunk):
    matrix, rows, filled, weights, grads = draw(2, *shape)
    for mask, factors in variants(filled, weights):
        expected = slow_row_grads(rows, mask, factors, grads)
        bags = ops.pack(rows, mask, factors)

        pieces = list(ops.distinct_row_grads(bags, grads, matrix.shape[0], chunk))
        assert all(len(found) <= (chunk or len(found)) for found, _ in pieces)
        assert [int(row) for found, _ in pieces for row in found] == sorted(expected), "each row once, in rising order"
        for found, sums in pieces:
            for row, total in zip(found, sums, strict=True):
                np.testing.assert_allclose(total.numpy(), expected[int(row)], rtol=1e-12, atol=1e-12)

        total = np.zeros(matrix.shape)
        for row, gradient in expected.items():
            total[row] = gradient
        loose = np.zeros(matrix.shape)
        for found, values in ops.row_grads(bags, grads, chunk):
            np.add.at(loose, found.numpy(), values.numpy())
        np.testing.assert_allclose(loose, total, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("add_rows", [add_rows_scatter, add_rows_index])
@pytest.mark.parametrize("chunk", CHUNKS)
def test_a_linear_rule_in_place(add_rows, chunk):
    """Against autograd on float64 rows, at widths below and above 16, where eager PyTorch changes its scatter."""
    for width in (3, 16, 40):
        matrix, rows, filled, weights, grads = draw(3, 50, 9, width)
        dense = matrix.clone().requires_grad_()
        ((dense[rows] * (filled * weights)[..., None]).sum(1) * grads).sum().backward()
        target = matrix.float()
        address = target.data_ptr()
        ops.add_row_grads(target, ops.pack(rows, filled, weights.float()), grads.float() * -0.5, add_rows, chunk)
        assert target.data_ptr() == address
        torch.testing.assert_close(target.double(), matrix - 0.5 * dense.grad, rtol=1e-4, atol=1e-4)


def test_padded_slots_are_left_out():
    """Row 0 is NaN: whoever reads it for a slot without an id shows it; whoever updates it for one, too."""
    matrix = torch.ones(5, 16)
    matrix[0] = torch.nan
    bags = ops.pack(torch.tensor([[3, 0, 0], [0, 0, 0], [4, 4, 0]]), torch.tensor([[1.0, 0, 0], [0, 0, 0], [1, 1, 0]]))
    assert bags.num_bags == 3 and bags.rows.tolist() == [3, 4, 4] and bags.starts.tolist() == [0, 1, 1, 3]
    assert ops.bag_sum(matrix, bags)[:, 0].tolist() == [1.0, 0.0, 2.0]
    ((rows, sums),) = ops.distinct_row_grads(bags, torch.ones(3, 16), 5, None)
    assert rows.tolist() == [3, 4] and sums[:, 0].tolist() == [1.0, 2.0]


def test_a_zero_gradient_changes_nothing():
    matrix, rows, filled, _, grads = draw(4, 9, 5, 16)
    target = matrix.float()
    before = target.clone()
    ops.add_row_grads(target, ops.pack(rows, filled), torch.zeros_like(grads).float(), add_rows_scatter, 7)
    assert torch.equal(target, before)


def test_join():
    """Bags of different hotness in one call, as many parts of one store are read."""
    matrix, rows, filled, weights, grads = draw(5, 6, 8, 4)
    _, more, _, more_weights, more_grads = draw(6, 3, 2, 4)
    for factors, more_factors in ((None, None), (weights, more_weights)):
        parts = [ops.pack(rows, filled, factors), ops.pack(more, None, more_factors)]
        both = ops.join(parts)
        assert both.num_bags == 9 and ops.join(parts[:1]) is parts[0]
        expected = torch.cat([slow_sums(matrix, rows, filled, factors), slow_sums(matrix, more, None, more_factors)])
        torch.testing.assert_close(ops.bag_sum(matrix, both), expected)
        one, two = slow_row_grads(rows, filled, factors, grads), slow_row_grads(more, None, more_factors, more_grads)
        for found, sums in ops.distinct_row_grads(both, torch.cat([grads, more_grads]), matrix.shape[0], 4):
            for row, total in zip(found.tolist(), sums.numpy(), strict=True):
                np.testing.assert_allclose(total, one.get(row, 0.0) + two.get(row, 0.0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_join_where_some_have_no_weights(first):
    """A learned or padded table beside one whose bags are full: ones stand for the weights that the other lacks."""
    matrix, rows, filled, weights, _ = draw(8, 6, 8, 4)
    _, more, _, _, _ = draw(9, 3, 2, 4)
    parts = [(rows, filled, weights), (more, None, None)][:: 1 if first else -1]
    both = ops.join([ops.pack(r, f, None if w is None else w.float()) for r, f, w in parts])
    expected = torch.cat([slow_sums(matrix, *part) for part in parts])
    torch.testing.assert_close(ops.bag_sum(matrix.float(), both).double(), expected, rtol=1e-5, atol=1e-5)


def test_learned_weights_get_their_gradient():
    matrix, rows, filled, weights, grads = draw(7, 11, 6, 5)
    (ours,) = torch.autograd.grad((ops.bag_sum(matrix, ops.pack(rows, filled, weights.requires_grad_())) * grads).sum(), weights)
    expected = torch.einsum("mhd,md->mh", matrix[rows], grads) * filled
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("learned", [False, True])
def test_nothing_of_the_matrix_size_is_made(learned):
    matrix = torch.zeros(50_021, 16)
    rows = torch.randint(0, 50_021, (8, 5))
    weights = torch.ones(8, 5, requires_grad=True) if learned else None
    with LargeTensors(limit=50_021 // 4) as seen:
        bags = ops.pack(rows, None, weights)
        pooled = ops.bag_sum(matrix, bags)
        if learned:
            pooled.sum().backward()
        list(ops.distinct_row_grads(bags, torch.ones(8, 16), 50_021, 10))
        ops.add_row_grads(matrix, bags, torch.ones(8, 16), add_rows_scatter, 10)
    assert seen.found == []


def test_no_ids_at_all():
    bags = ops.pack(torch.zeros(4, 3, dtype=torch.int64), torch.zeros(4, 3))
    matrix = torch.ones(5, 16)
    assert torch.equal(ops.bag_sum(matrix, bags), torch.zeros(4, 16))
    assert list(ops.row_grads(bags, torch.ones(4, 16), 3)) == list(ops.distinct_row_grads(bags, torch.ones(4, 16), 5, 3)) == []
    ops.add_row_grads(matrix, bags, torch.ones(4, 16), add_rows_scatter, 3)
    assert torch.equal(matrix, torch.ones(5, 16))
