"""Starting weights, drawn in upstream's order from upstream's two streams: NumPy's for tables and MLPs, torch's for what torch initializes.

Upstream's layers consume torch's stream even where the values are overwritten. Those draws matter only where something later comes from
that stream (QR and MD tables, DataLoader workers), so they are replayed only there: `replay_torch`.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

CHUNK = 1 << 18  # rows drawn at a time: the float64 draws of a large table need no second copy of it


def fill_uniform(rows: Tensor, rng: np.random.RandomState, bound: float) -> None:
    """rows [n, width] float32, in place, from U(-bound, bound), row by row in the stream's order."""
    for start in range(0, rows.shape[0], CHUNK):
        piece = rows[start : start + CHUNK]
        piece.copy_(torch.from_numpy(rng.uniform(-bound, bound, tuple(piece.shape))))


def fill_table(rows: Tensor, rng: np.random.RandomState, replay_torch: bool) -> None:
    """A plain table [n, width], in place: U(-1/sqrt(n), 1/sqrt(n))."""
    if replay_torch:
        torch.empty(rows.shape).normal_()  # what nn.EmbeddingBag draws and upstream overwrites
    fill_uniform(rows, rng, math.sqrt(1 / rows.shape[0]))


def linear(rng: np.random.RandomState, num_inputs: int, num_outputs: int) -> nn.Linear:
    """A layer with W ~ N(0, sqrt(2 / (n_out + n_in))) and then b ~ N(0, sqrt(1 / n_out))."""
    layer = nn.Linear(num_inputs, num_outputs)  # draws from torch's stream, as upstream's does
    weight = rng.normal(0.0, np.sqrt(2 / (num_outputs + num_inputs)), (num_outputs, num_inputs)).astype(np.float32)
    bias = rng.normal(0.0, np.sqrt(1 / num_outputs), num_outputs).astype(np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer
