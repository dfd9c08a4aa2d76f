"""Interaction, pooling, MLP shapes and losses against plain float64 restatements."""

import math

import numpy as np
import pytest
import torch

from dlrm_xla.config import LossConfig
from dlrm_xla.losses import make_loss
from dlrm_xla.ops.interact import DotInteraction
from dlrm_xla.ops.pool import pool
from dlrm_xla.train import LossMeter, NotFiniteLoss


@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("num_features", [1, 2, 5, 27])
def test_interaction(num_features, itself):
    features = torch.randn(3, num_features, 4, dtype=torch.float64, requires_grad=True)
    module = DotInteraction(num_features, itself).double()
    expected = torch.stack([
        torch.stack([row[i] @ row[j] for i in range(num_features) for j in range(i + itself)] or [row.new_zeros(())])
        for row in features
    ])  # fmt: skip
    result = module(features)
    if module.num_pairs == 0:
        assert result.shape == (3, 0)
        return
    torch.testing.assert_close(result, expected)
    weight = torch.randn_like(result)
    (ours,) = torch.autograd.grad((result * weight).sum(), features)
    (theirs,) = torch.autograd.grad((expected * weight).sum(), features)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("hotness", [1, 2, 7])
def test_pool(hotness):
    vectors = torch.randn(4, 3, hotness, 5, dtype=torch.float64)
    weights = torch.randn(4, 3, hotness, dtype=torch.float64)
    torch.testing.assert_close(pool(vectors, weights), (vectors * weights[..., None]).sum(2))
    torch.testing.assert_close(pool(vectors, None), vectors.sum(2))


def test_losses_count_only_valid_rows():
    prediction, label = torch.tensor([[0.2], [0.9], [0.5], [1.0]]), torch.tensor([[0.0], [1.0], [0.0], [0.0]])
    valid = torch.tensor([[1.0], [1.0], [0.0], [0.0]])
    bce = (-math.log(0.8) - math.log(0.9)) / 2
    assert make_loss(LossConfig("bce", (1.0, 1.0), 0.0))(prediction, label, valid, torch.tensor(2.0)).item() == pytest.approx(bce, rel=1e-6)
    assert make_loss(LossConfig("mse", (1.0, 1.0), 0.0))(prediction, label, valid, torch.tensor(2.0)).item() == pytest.approx(0.025, rel=1e-6)
    weighted = (-0.3 * math.log(0.8) - 0.7 * math.log(0.9)) / 2
    assert make_loss(LossConfig("wbce", (0.3, 0.7), 0.0))(prediction, label, valid, torch.tensor(2.0)).item() == pytest.approx(weighted, 1e-6)
    saturated = make_loss(LossConfig("bce", (1.0, 1.0), 0.0))(prediction[3:], label[3:], torch.ones(1, 1), torch.tensor(1.0))
    assert saturated.item() == 100.0  # torch's clamp


def test_wbce_weight_of_a_label_that_is_not_rounded():
    """Upstream truncates the label to find its weight."""
    loss = make_loss(LossConfig("wbce", (0.3, 0.7), 0.0))
    half = loss(torch.tensor([[0.5]]), torch.tensor([[0.99]]), torch.ones(1, 1), torch.tensor(1.0))
    assert half.item() == pytest.approx(0.3 * math.log(2), rel=1e-6)


def test_meter_mean_and_first_bad_batch():
    meter = LossMeter(torch.device("cpu"))
    meter.start_epoch(10)
    losses = np.random.default_rng(0).random(1000).astype(np.float32)
    for loss in losses:
        meter.add(torch.tensor(loss), torch.tensor(128.0))
    assert meter.mean() == pytest.approx(losses.astype(np.float64).mean(), rel=1e-12)
    meter.reset()
    for loss in (1.0, float("nan"), float("inf")):
        meter.add(torch.tensor(loss), torch.tensor(128.0))
    meter.reset()  # a log line in between does not forget
    with pytest.raises(NotFiniteLoss) as error:
        meter.check()
    assert error.value.batch == 1012
