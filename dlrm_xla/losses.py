"""Losses over the rows that count: mean squared error, binary cross entropy, and the latter weighted by label."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from dlrm_xla.config import LossConfig

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def make_loss(config: LossConfig) -> Loss:
    """loss(prediction [B, 1], label [B, 1], valid [B, 1], num_counted 0-D) -> 0-D: the sum over the valid rows / num_counted, which is their
    mean, or of one rank's part of a batch its share of the whole batch's mean.

    Cross entropy clamps each logarithm at -100, as torch and so upstream do. Upstream's wbce promotes to float64; this stays in float32.
    """

    def squared(prediction, label):
        return (prediction - label) ** 2

    def cross_entropy(prediction, label):
        return functional.binary_cross_entropy(prediction, label, reduction="none")

    def weighted_cross_entropy(prediction, label):
        # upstream indexes the two weights by the label truncated to an integer
        weight = torch.where(label < 1.0, config.weights[0], config.weights[1])
        return weight * cross_entropy(prediction, label)

    row_loss = {"mse": squared, "bce": cross_entropy, "wbce": weighted_cross_entropy}[config.function]

    def loss(prediction: Tensor, label: Tensor, valid: Tensor, num_counted: Tensor) -> Tensor:
        return (row_loss(prediction, label) * valid).sum() / num_counted

    return loss
