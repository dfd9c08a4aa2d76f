"""Integer arithmetic: exact beyond float32, where torch_xla's own division is not, and the same bits everywhere."""

import numpy as np
import pytest
import torch

from dlrm_xla.ops.integers import mix32, quotient, shift_right
from dlrm_xla.ops.noise import uniform_noise

IDS = [0, 1, 6, 7, 16_777_217, 16_777_219, 39_999_999, 123_456_789, 2**31 - 2]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("size", [1, 3, 7, 44_000, 116_964, 2**24 + 1, 2**30, 2**31 - 2])
def test_quotients(backend, size, dtype):
    ids = torch.tensor(IDS, dtype=dtype).to(backend.device)
    assert quotient(ids, size).cpu().tolist() == [number // size for number in IDS]
    assert torch.fmod(ids, size).cpu().tolist() == [number % size for number in IDS]


def test_shifts_bring_in_zeros(backend):
    values = torch.tensor([-1, -42, 5, -(2**31)], dtype=torch.int32).to(backend.device)
    assert shift_right(values, 16).cpu().tolist() == [(number % 2**32) >> 16 for number in (-1, -42, 5, -(2**31))]


def test_mixing_is_numpys(backend):
    x, first, second = np.arange(1000, dtype=np.uint32) * np.uint32(40_503), np.uint32(77), np.uint32(99)
    found = mix32(torch.from_numpy(x.view(np.int32)).to(backend.device), 77, 99).cpu().numpy().view(np.uint32)
    with np.errstate(over="ignore"):
        wanted = (x ^ first) * np.uint32(0x7FEB352D)
        wanted = (wanted ^ (wanted >> np.uint32(16))) * second
        wanted = (wanted ^ (wanted >> np.uint32(15))) * np.uint32(0x846CA68B)
    assert np.array_equal(found, wanted ^ (wanted >> np.uint32(16)))


def test_noise_is_uniform_and_new_at_every_tick(backend):
    rows, columns = torch.arange(4000).to(backend.device), torch.arange(16, dtype=torch.int32).to(backend.device)
    clock = torch.tensor(3, dtype=torch.int32).to(backend.device)
    first, second = (uniform_noise(rows, 16, tick, columns).cpu().double() for tick in (clock, clock + 1))
    for noise in (first, second):
        assert 0 <= noise.min() and noise.max() < 1
        assert abs(noise.mean() - 0.5) < 0.005 and abs(noise.var() - 1 / 12) < 0.002
        assert np.histogram(noise.numpy(), 20, (0, 1))[0].min() > 64_000 / 20 * 0.9
    joined = torch.stack([first.flatten(), second.flatten(), first.roll(1, 0).flatten(), first.roll(1, 1).flatten()])
    assert (torch.corrcoef(joined) - torch.eye(4)).abs().max() < 0.02
