"""Starting weights, drawn in upstream's order from upstream's two streams: NumPy's for tables and MLPs, torch's for what torch initializes.

Upstream's layers consume torch's stream even where the values are overwritten. Those draws matter only where something later comes from
that stream (QR and MD tables, DataLoader workers), so they are replayed only there: `replay_torch`.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

CHUNK = 1 << 20  # rows drawn at a time, so that the float64 draws of a large table need no second copy of it


def uniform_rows(rng: np.random.RandomState, num_rows: int, width: int, bound: float) -> Tensor:
    """[num_rows, width] float32 from U(-bound, bound), row by row in the stream's order."""
    rows = torch.empty(num_rows, width)
    for start in range(0, num_rows, CHUNK):
        stop = min(start + CHUNK, num_rows)
        rows[start:stop] = torch.from_numpy(rng.uniform(-bound, bound, (stop - start, width)))
    return rows


def table_rows(rng: np.random.RandomState, num_rows: int, width: int, replay_torch: bool) -> Tensor:
    """A plain table: U(-1/sqrt(n), 1/sqrt(n))."""
    if replay_torch:
        torch.empty(num_rows, width).normal_()  # what nn.EmbeddingBag draws and upstream overwrites
    return uniform_rows(rng, num_rows, width, math.sqrt(1 / num_rows))


def linear(rng: np.random.RandomState, num_inputs: int, num_outputs: int) -> nn.Linear:
    """A layer with W ~ N(0, sqrt(2 / (n_out + n_in))) and then b ~ N(0, sqrt(1 / n_out))."""
    layer = nn.Linear(num_inputs, num_outputs)  # draws from torch's stream, as upstream's does
    weight = rng.normal(0.0, np.sqrt(2 / (num_outputs + num_inputs)), (num_outputs, num_inputs)).astype(np.float32)
    bias = rng.normal(0.0, np.sqrt(1 / num_outputs), num_outputs).astype(np.float32)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer
