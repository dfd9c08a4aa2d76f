"""Seeded 32-bit hash functions of ids, the same bits in eager PyTorch, on XLA and in NumPy.

    x = id xor a;  x *= 0x7feb352d;  x ^= x >> 16;  x *= b;  x ^= x >> 15;  x *= 0x846ca68b;  x ^= x >> 16        (modulo 2^32)

with a, and an odd b, drawn for each function. Multiplications by odd numbers and xor-shifts are bijections, so two ids never share all 32 bits.
The constants are those of Wellons' "lowbias32" (public domain), which mixes evenly. A TPU has 32-bit integers only, so the polynomial hashes
modulo a prime of 31 or 61 bits that the literature uses, which need products of 62 bits and more, are not for it.
"""

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.ops.integers import mix32


class Hashes(nn.Module):
    """`count` functions. Ids are int64 or int32 below 2^31. 8 bytes a function, which lie in the buffer `seeds`, int32 [count, 2]."""

    kind = "seeds"

    def __init__(self, count: int, rng: np.random.RandomState):
        super().__init__()
        self.register_buffer("seeds", draw_seeds(count, rng))

    def mix(self, ids: Tensor, function: int) -> Tensor:
        """ids [...] -> 32 mixed bits [...] int32."""
        return mix32(ids.to(torch.int32), self.seeds[function, 0], self.seeds[function, 1])

    def mix_all(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., count] int32: every function's bits."""
        return mix32(ids.to(torch.int32)[..., None], self.seeds[:, 0], self.seeds[:, 1])

    def row(self, ids: Tensor, function: int, num_rows: int) -> Tensor:
        """ids [...] -> [...] in [0, num_rows), in the integer type of ids. 31 bits modulo num_rows: even but for num_rows / 2^31."""
        return torch.fmod(torch.bitwise_and(self.mix(ids, function), 0x7FFFFFFF), num_rows).to(ids.dtype)

    def rows_all(self, ids: Tensor, num_rows: int) -> Tensor:
        """ids [...] -> [..., count]: every function's row."""
        return torch.fmod(torch.bitwise_and(self.mix_all(ids), 0x7FFFFFFF), num_rows).to(ids.dtype)

    def signs_all(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., count]: every function's sign."""
        return 1.0 - 2.0 * (self.mix_all(ids) < 0).to(torch.float32)

    def sign(self, ids: Tensor, function: int) -> Tensor:
        """ids [...] -> [...] float32, 1 or -1: the bit that `row` leaves out."""
        return 1.0 - 2.0 * (self.mix(ids, function) < 0).to(torch.float32)


def draw_seeds(count: int, rng: np.random.RandomState) -> Tensor:
    """int32 [count, 2]; the second of a pair is odd."""
    drawn = rng.randint(0, 1 << 32, (count, 2), dtype=np.uint32)
    drawn[:, 1] |= 1
    return torch.from_numpy(drawn.view(np.int32))
