"""Numbers that look random and depend on nothing but integers: the same on every device, in every order, and after a resume.

A generator of the device's own would be part of a run's state, differ between devices, and on XLA be seeded anew in every step.
"""

import torch
from torch import Tensor

# the finalizer of MurmurHash3 (Appleby 2011), as signed 32-bit numbers
_FIRST, _SECOND = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)


def mix32(values: Tensor) -> Tensor:
    """int32 -> int32: a bijection under which every bit depends on every bit. Products wrap around; shifts bring in zeros."""
    values = values ^ _shift_right(values, 16)
    values = values * _FIRST
    values = values ^ _shift_right(values, 13)
    values = values * _SECOND
    return values ^ _shift_right(values, 16)


def uniform_noise(rows: Tensor, width: int, clock: Tensor, columns: Tensor) -> Tensor:
    """[K, width] float32 in [0, 1), multiples of 2^-24, from the row numbers [K], the column numbers [width] int32 and a 0-D int32 clock."""
    seeds = mix32(rows.to(torch.int32) * width + mix32(clock))
    bits = mix32(seeds[:, None] ^ mix32(columns + 1)[None, :])
    return _shift_right(bits, 8).to(torch.float32) * 2.0**-24


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical: torch's own shift repeats the sign."""
    return torch.bitwise_and(torch.bitwise_right_shift(values, bits), (1 << (32 - bits)) - 1)
