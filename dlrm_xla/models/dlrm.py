"""DLRM (Naumov et al., arXiv:1906.00091): bottom MLP, interaction of features, top MLP."""

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.config import ModelConfig
from dlrm_xla.init import linear
from dlrm_xla.ops.interact import DotInteraction
from dlrm_xla.ops.linear import apply_layers


def mlp(sizes: tuple[int, ...], rng: np.random.RandomState, last: nn.Module) -> nn.Sequential:
    """Linear and ReLU for each pair of sizes, with `last` after the final one. Parameters are called 0, 2, 4, ... as upstream's."""
    layers: list[nn.Module] = []
    for num_inputs, num_outputs in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [linear(rng, num_inputs, num_outputs), nn.ReLU(inplace=True)]
    layers[-1] = last
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """dense [B, num_dense] and pooled [B, T, D] -> click probability [B, 1].

    num_tables  T
    threshold   predictions are clamped to [threshold, 1 - threshold] where 0 < threshold < 1
    """

    def __init__(self, config: ModelConfig, num_tables: int, threshold: float, rng: np.random.RandomState):
        super().__init__()
        self.threshold = threshold
        self.half_products = config.matmul_precision == "bfloat16"
        num_features, dim = num_tables + 1, config.feature_dim
        self.interaction = DotInteraction(num_features, config.interaction_itself) if config.interaction == "dot" else None
        num_interactions = num_features * dim if self.interaction is None else self.interaction.num_pairs + dim
        self.bot_l = mlp(config.bottom_layers, rng, nn.ReLU(inplace=True))
        self.top_l = mlp((num_interactions, *config.top_layers), rng, nn.Sigmoid())

    def forward(self, dense: Tensor, pooled: Tensor) -> Tensor:
        with torch.autocast(dense.device.type, torch.bfloat16, enabled=self.half_products):
            bottom = apply_layers(self.bot_l, dense)
            features = torch.cat([bottom.unsqueeze(1), pooled.to(bottom.dtype)], dim=1)  # [B, F, D]
            if self.interaction is None:
                crossed = features.flatten(1)
            else:
                crossed = torch.cat([bottom, self.interaction(features)], dim=1)
            logit = apply_layers(self.top_l[:-1], crossed)
        probability = self.top_l[-1](logit.float())
        if 0.0 < self.threshold < 1.0:
            probability = probability.clamp(self.threshold, 1.0 - self.threshold)
        return probability
