"""Numbers that look random and depend on nothing but integers: the same on every device, in every order, and after a resume.

A generator of the device's own would be part of a run's state, differ between devices, and on XLA be seeded anew in every step.
"""

import torch
from torch import Tensor

from dlrm_xla.ops.integers import mix32, shift_right

_ODD = (0x2C1B3C6D, 0x297A2D39)  # any odd numbers


def uniform_noise(rows: Tensor, width: int, clock: Tensor, columns: Tensor) -> Tensor:
    """[K, width] float32 in [0, 1), multiples of 2^-24, from the row numbers [K], the column numbers [width] int32 and a 0-D int32 clock."""
    seeds = mix32(rows.to(torch.int32), clock, _ODD[0])
    bits = mix32(seeds[:, None] + columns[None, :], clock, _ODD[1])
    return shift_right(bits, 8).to(torch.float32) * 2.0**-24
