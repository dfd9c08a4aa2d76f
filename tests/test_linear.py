"""Linear layers through oneDNN: what nn.Linear gives, and where it is used."""

import copy

import pytest
import torch
from torch import nn

from dlrm_xla.ops import linear
from dlrm_xla.ops.linear import apply_layers, gains


@pytest.fixture
def asked(monkeypatch):
    """Every size is large; the products that oneDNN was asked for, as (rows, columns) of the result."""
    shapes, product = [], linear.product

    def counted(*operands):
        shapes.append(tuple(product(*operands).shape))
        return product(*operands)

    monkeypatch.setattr(linear, "LEAST_ROWS", 0)
    monkeypatch.setattr(linear, "LEAST_PRODUCTS", 0)
    monkeypatch.setattr(linear, "product", counted)
    return shapes


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(13, 37), nn.ReLU(inplace=True), nn.Linear(37, 8), nn.ReLU(inplace=True), nn.Linear(8, 1), nn.Sigmoid())


def outcome(layers: nn.Sequential, x: torch.Tensor, run) -> list[torch.Tensor]:
    """The result, the gradient of x and those of the parameters."""
    x = x.clone().requires_grad_()
    result = run(layers, x)
    result.square().sum().backward()
    return [result.detach(), x.grad, *(parameter.grad for parameter in layers.parameters())]


needs_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


@needs_onednn
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_equals_torch(asked, rows):
    layers, x = mlp(), torch.randn(rows, 13)
    ours = outcome(layers, x, apply_layers)
    assert asked == [(rows, 37), (rows, 8), (rows, 1), (rows, 8), (1, 8), (rows, 37), (8, 37), (rows, 13), (13, 37)]
    expected = outcome(copy.deepcopy(layers).double().requires_grad_(), x.double(), lambda layers, x: layers(x))
    for found, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)


@needs_onednn
def test_no_gradient_of_the_input(asked):
    layers = mlp()
    apply_layers(layers, torch.randn(4, 13)).sum().backward()
    assert len(asked) == 8  # not that of the dense features


@needs_onednn
def test_same_gradients_twice(asked):
    layers, x = mlp(), torch.randn(64, 13)
    first, second = (outcome(copy.deepcopy(layers), x, apply_layers) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_small_products_stay():
    assert not gains(torch.zeros(2048, 64), nn.Parameter(torch.zeros(16, 64)))
    assert not gains(torch.zeros(128, 367), nn.Parameter(torch.zeros(512, 367)))
    assert gains(torch.zeros(2048, 13), nn.Parameter(torch.zeros(512, 13))) == torch.backends.mkldnn.is_available()


@pytest.mark.parametrize("case", ["inference", "frozen", "float64", "bfloat16", "elsewhere"])
def test_left_to_torch(asked, case):
    layers, x = mlp(), torch.randn(4, 13)
    expected_type = torch.float32
    if case == "frozen":
        layers.requires_grad_(False)
    elif case == "float64":
        layers, x, expected_type = layers.double(), x.double(), torch.float64
    elif case == "elsewhere":
        layers, x = layers.to("meta"), x.to("meta")
    elif case == "bfloat16":
        expected_type = torch.bfloat16
    with torch.set_grad_enabled(case != "inference"), torch.autocast("cpu", torch.bfloat16, enabled=case == "bfloat16"):
        assert apply_layers(layers, x).dtype == expected_type
    assert not asked
