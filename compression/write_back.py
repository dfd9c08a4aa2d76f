"""What cached rows have learnt goes into the parameters behind them: by the chain rule, and never past what was learnt.

A table's parameters move along d parameters / dt = J^T (wanted - values) from t = 0 to 1, J the derivative of the values by the parameters and
wanted = values + delta at t = 0. Where the parameters have little leverage (J J^T well below 1) that is J^T delta in one step, which is for
delta = -rate x gradient what plain SGD would have done without a cache. Where they have much, J^T delta would overshoot, many times over where
many ids share parameters; the flow then arrives at the wanted values and stays there. The distance to them only falls, so nothing diverges.
"""

from collections.abc import Callable

import torch
from torch import Tensor

MOST_TRIES = 256
ARRIVED, SLACK = 1e-9, 1e-12  # of the squared distance: nothing is left to do; rounding in float64


def write_back(parameters: list[Tensor], read: Callable[[list[Tensor], slice], Tensor], deltas: Tensor, chunk: int) -> tuple[list[Tensor], float]:
    """-> the moved parameters, float64 on the host, and how far it came, the t of MOST_TRIES steps: 1 but where it is very stiff.

    read    (parameters, which of the n ids) -> their values [.., D], differentiable;  deltas [n, D];  chunk: ids read at once

    Explicit Euler: a step s along J^T (wanted - values) =: g is taken where half of what the slope promises comes true, s |g|^2 / 2, which on a
    quadratic means not past the lowest point along g. Otherwise it is halved; after a success doubled.
    """
    pieces = [slice(start, start + chunk) for start in range(0, len(deltas), chunk)]
    place = [parameter.detach().cpu().double() for parameter in parameters]
    with torch.no_grad():
        wanted = [read(place, piece) + deltas[piece].double() for piece in pieces]
    distance, gradient = _slope(place, read, pieces, wanted)
    time, step, first = 0.0, 1.0, distance
    for _ in range(MOST_TRIES):
        promised = sum(float(part.square().sum()) for part in gradient)
        if time >= 1.0 or distance <= ARRIVED * first or promised == 0.0:
            return place, 1.0
        step = min(step, 1.0 - time)
        there = [parameter - step * part for parameter, part in zip(place, gradient, strict=True)]
        reached, next_gradient = _slope(there, read, pieces, wanted)
        if reached <= distance * (1 + SLACK) - 0.5 * step * promised:
            place, distance, gradient, time, step = there, reached, next_gradient, time + step, 2 * step
        else:
            step /= 2
    return place, time


def _slope(place: list[Tensor], read: Callable, pieces: list[slice], wanted: list[Tensor]) -> tuple[float, list[Tensor]]:
    """Half the squared distance to the wanted values, and its gradient."""
    leaves, total = [parameter.clone().requires_grad_() for parameter in place], 0.0
    with torch.enable_grad():
        for piece, goal in zip(pieces, wanted, strict=True):
            half = 0.5 * (read(leaves, piece) - goal).square().sum()
            half.backward()
            total += float(half.detach())
    return total, [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
