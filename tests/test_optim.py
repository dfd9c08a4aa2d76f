"""Row updates against torch's sparse optimizers and against upstream's RWSAdagrad restated in float64; the learning rate's course."""

import numpy as np
import pytest
import torch

from dlrm_xla.config import TrainConfig
from dlrm_xla.ops.inplace import ONE_KERNEL, PLAIN_OPERATORS
from dlrm_xla.ops.rows import add_rows_scatter, sum_duplicates, sum_sorted
from dlrm_xla.optim import RULES, DenseOptimizer, learning_rate
from dlrm_xla.stores import RowStore

STEPS, ROWS, WIDTH, LOOKUPS = 20, 50, 8, 200


def draws(seed=0):
    """Many duplicates, and one row that is looked up in every step with a zero gradient."""
    rng = np.random.default_rng(seed)
    for _ in range(STEPS):
        rows = rng.integers(0, ROWS - 1, LOOKUPS)
        rows[: LOOKUPS // 3] = rng.integers(0, 3, LOOKUPS // 3)
        grads = rng.standard_normal((LOOKUPS, WIDTH))
        rows[-5:], grads[-5:] = ROWS - 1, 0.0
        yield rows, grads


def rows_in_float64(name, weight, lr):
    """The three rules, one row at a time."""
    weight, total_squares, mean_squares = weight.astype(np.float64), np.zeros(weight.shape), np.zeros(len(weight))
    for rows, grads in draws():
        for row in set(rows.tolist()):
            grad = grads[rows == row].sum(0)
            if name == "sgd":
                weight[row] -= lr * grad
            elif name == "adagrad":
                total_squares[row] += grad**2
                weight[row] -= lr * grad / (np.sqrt(total_squares[row]) + 1e-10)
            else:
                mean_squares[row] += (grad**2).mean()
                weight[row] -= lr * grad / (np.sqrt(mean_squares[row]) + 1e-10)
    return weight


def make_store(name, weight, layout, backend) -> RowStore:
    store = RowStore(*weight.shape, RULES[name](), backend.layout(layout))
    store.weight().copy_(weight)
    return backend.place(store)


def step(store, rows, grads, lr, backend):
    rows = torch.from_numpy(rows).to(store.layout.index_dtype).to(backend.device)
    grads = torch.from_numpy(grads).float().to(backend.device)
    store.update(rows, store.read(rows), grads, torch.tensor(-lr).to(backend.device))
    backend.end_step()


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", RULES)
def test_row_rules(name, layout, backend):
    weight = np.random.default_rng(1).standard_normal((ROWS, WIDTH)).astype(np.float32)
    store = make_store(name, torch.from_numpy(weight), layout, backend)
    for rows, grads in draws():
        step(store, rows, grads, 0.01, backend)
    expected = rows_in_float64(name, weight, 0.01)
    # float32 adds up to 67 gradients of size 1 to a row in each of 20 steps
    np.testing.assert_allclose(store.weight().numpy(), expected, atol=2e-6)
    np.testing.assert_array_equal(store.weight()[-1].numpy(), weight[-1])  # a zero gradient changes nothing


class UpstreamRWSAdagrad(torch.optim.Optimizer):
    """Upstream's rule in float32, on coalesced gradients."""

    def __init__(self, parameters, lr):
        super().__init__(parameters, {"lr": lr})
        self.momentum = torch.zeros(ROWS)

    @torch.no_grad()
    def step(self):
        (parameter,), lr = self.param_groups[0]["params"], self.param_groups[0]["lr"]
        grad = parameter.grad.coalesce()
        (rows,), values = grad.indices(), grad.values()
        self.momentum[rows] += values.pow(2).mean(1)
        parameter[rows] -= lr * values / (self.momentum[rows].sqrt() + 1e-10)[:, None]


@pytest.mark.parametrize("layout", ["rows", "packed"])
@pytest.mark.parametrize("name", RULES)
def test_row_rules_equal_torch_on_sparse_gradients(name, layout, backend):
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0))
    parameter = torch.nn.Parameter(weight.clone())
    optimizer = {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rwsadagrad": UpstreamRWSAdagrad}[name]([parameter], lr=0.1)
    store = make_store(name, weight, layout, backend)
    for rows, grads in draws():
        parameter.grad = torch.sparse_coo_tensor(torch.from_numpy(rows)[None], torch.from_numpy(grads).float(), (ROWS, WIDTH), check_invariants=True)
        optimizer.step()
        step(store, rows, grads, 0.1, backend)
        torch.testing.assert_close(store.weight(), parameter.detach(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("ops", [ONE_KERNEL, PLAIN_OPERATORS])
@pytest.mark.parametrize("name", ["sgd", "adagrad", "rwsadagrad"])
def test_dense_rules_equal_torch(name, ops):
    start = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    ours, theirs, untouched = (torch.nn.Parameter(start.clone()) for _ in range(3))
    optimizer = {"sgd": torch.optim.SGD}.get(name, torch.optim.Adagrad)([theirs], lr=0.05)
    dense = DenseOptimizer([ours, untouched], RULES[name](), ops)
    for step in range(STEPS):
        grad = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        optimizer.step()
        dense.step(torch.tensor(-0.05))
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-6)
    assert torch.equal(untouched, start)
    assert ours.grad is None


def test_sum_duplicates_ignores_what_is_in_the_scratch():
    rows, grads = torch.tensor([4, 1, 4, 4, 0]), torch.arange(10.0).view(5, 2)
    for content in (0, 3, -7):
        total = sum_duplicates(rows, grads, torch.full((6,), content, dtype=torch.int32), add_rows_scatter)
        by_row = {row: total[rows == row] for row in (0, 1, 4)}
        for row, expected in ((0, [8.0, 9.0]), (1, [2.0, 3.0]), (4, [0.0 + 4 + 6, 1.0 + 5 + 7])):
            assert by_row[row].sum(0).tolist() == expected
            assert (by_row[row] != 0).any(1).sum() == 1  # whole sum at one place, zeros at the others


@pytest.mark.parametrize("rows", [[4, 1, 4, 4, 0], [3], [2, 2, 2], [5, 4, 3, 2]])
def test_sums_by_a_sort(rows):
    rows = torch.tensor(rows, dtype=torch.int32)
    grads, records = torch.randn(len(rows), 2), torch.stack([rows.float(), -rows.float()], 1)
    found, their_records, total = sum_sorted(rows, records, grads)
    distinct = rows.unique()
    assert found[: len(distinct)].tolist() == distinct.tolist()
    assert set(found.tolist()) == set(rows.tolist())
    assert torch.equal(their_records, torch.stack([found.float(), -found.float()], 1))
    torch.testing.assert_close(total[: len(distinct)], torch.stack([grads[rows == row].sum(0) for row in distinct]))
    assert not total[len(distinct) :].any()


def course(compat, **steps):
    config = TrainConfig(1, "sgd", 1.0, steps.get("warmup", 0), steps.get("start", 0), steps.get("decay", 0), 1, 0)
    return [learning_rate(config, step, compat) for step in range(1, 13)]


def test_learning_rate():
    assert course(False) == [1.0] * 12
    assert course(False, warmup=4, start=4) == [0.25, 0.5, 0.75, *[1.0] * 9]
    assert course(True, warmup=4, start=4) == course(False, warmup=4, start=4)
    decay = [1.0, 0.75**2, 0.5**2, 0.25**2, 0.25**2, 0.25**2, 0.25**2]
    assert course(False, warmup=4, start=6, decay=4) == [0.25, 0.5, 0.75, 1.0, 1.0, *decay]
    assert course(True, warmup=4, start=6, decay=4) == [0.25, 0.5, 0.75, 0.75, 0.75, *decay]  # upstream stays below the full rate
    assert min(course(False, start=1, decay=2)) == 0.25
    assert min(course(False, start=1, decay=10**6)) > 0.99
