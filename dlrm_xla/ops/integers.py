"""Arithmetic of 32-bit integers that is the same in eager PyTorch, on XLA and on a TPU, which has no wider ones."""

import functools

import torch
from torch import Tensor

_FIRST, _SECOND = 0x7FEB352D, 0x846CA68B - (1 << 32)


def quotient(ids: Tensor, size: int) -> Tensor:
    """ids // size for ids from 0, in their integer type. torch_xla 2.9 divides integers in float32, which is wrong above 2^24: what is left is
    divided again, and the last step compares."""
    result = torch.div(ids, size, rounding_mode="floor")
    result = result + torch.div(ids - result * size, size, rounding_mode="floor")
    rest = ids - result * size
    return result + (rest >= size).to(ids.dtype) - (rest < 0).to(ids.dtype)


def mix32(x: Tensor, first: Tensor | int, second: Tensor | int) -> Tensor:
    """int32 -> int32, a bijection under which every bit depends on every bit: Wellons' "lowbias32" (public domain) with x xor `first` at its
    start and an odd `second` in the middle. Products wrap around."""
    x = torch.bitwise_xor(x, first) * _FIRST
    x = _xor_shift(x, 16) * second
    x = _xor_shift(x, 15) * _SECOND
    return _xor_shift(x, 16)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """int32 with zeros shifted in: torch's shift repeats the sign, so a mask takes those bits away."""
    return torch.bitwise_and(torch.bitwise_right_shift(x, _amount(bits, x.device)), (1 << (32 - bits)) - 1)


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    return torch.bitwise_xor(x, shift_right(x, bits))


@functools.lru_cache(maxsize=64)
def _amount(bits: int, device: torch.device) -> Tensor:
    """A shift by a Python number comes out as int64 on torch_xla 2.9, which then cannot lower what follows; x >> bits rounds towards zero there."""
    return torch.tensor(bits, dtype=torch.int32).to(device)
