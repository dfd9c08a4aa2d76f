"""Hash functions against Python integers, and that they are as even and as independent as their uses need."""

import numpy as np
import pytest
import torch

from compression.hashes import Hashes
from tests.oracles import hashed

IDS = np.unique(np.concatenate([np.arange(300), 2 ** np.arange(31) - 1, np.random.RandomState(0).randint(0, 2**31 - 1, 300)]))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_bits_are_those_of_python_integers(backend, dtype):
    """Eager and on XLA, in both types of ids."""
    functions = Hashes(4, np.random.RandomState(7))
    seeds = functions.seeds.clone()
    functions = backend.place(functions)
    before = backend.fallbacks()
    ids = torch.from_numpy(IDS).to(dtype).to(backend.device)
    bits, rows, signs = functions.mix_all(ids), functions.rows_all(ids, 10_007), functions.signs_all(ids)
    one = [functions.mix(ids, 2), functions.row(ids, 2, 10_007), functions.sign(ids, 2)]
    backend.end_step()
    assert bits.dtype == torch.int32 and rows.dtype == dtype and signs.dtype == torch.float32
    assert backend.fallbacks() == before
    for j in range(4):
        assert (bits[:, j].cpu().numpy().view(np.uint32) == [hashed.mix(int(i), seeds[j]) for i in IDS]).all()
        assert rows[:, j].cpu().tolist() == [hashed.row(int(i), seeds[j], 10_007) for i in IDS]
        assert signs[:, j].cpu().tolist() == [hashed.sign(int(i), seeds[j]) for i in IDS]
    for single, several in zip(one, (bits, rows, signs), strict=True):
        assert torch.equal(single.cpu(), several[:, 2].cpu())


def chi_square(counts: np.ndarray) -> float:
    """In standard deviations from its mean."""
    expected, degrees = counts.sum() / counts.size, counts.size - 1
    return (((counts - expected) ** 2 / expected).sum() - degrees) / np.sqrt(2 * degrees)


@pytest.mark.parametrize("step", [1, 2, 1024])
@pytest.mark.parametrize("num_rows", [2, 7, 97, 1000, 10_007, 65_536])
def test_buckets_of_sequential_ids_are_even(num_rows, step):
    functions = Hashes(8, np.random.RandomState(1))
    ids = torch.arange(1 << 20) * step
    found = [chi_square(np.bincount(functions.row(ids, j, num_rows).numpy(), minlength=num_rows)) for j in range(8)]
    assert max(np.abs(found)) < 5, found
    signs = torch.stack([functions.sign(ids, j).mean() for j in range(8)])
    assert signs.abs().max() < 5 / 1024


@pytest.mark.parametrize("num_rows", [97, 1000])
def test_pairs_collide_once_in_m(num_rows):
    """The same pair over many functions, which is what a hash promises: neighbours, and ids that differ in one bit."""
    functions = Hashes(40_000, np.random.RandomState(2))
    for first, second in ((0, 1), (5, 6), (0, 2**30), (12345, 12345 ^ 1 << 16), (7, 7 + num_rows)):
        rows = functions.rows_all(torch.tensor([first, second]), num_rows)
        rate = (rows[0] == rows[1]).double().mean().item()
        assert abs(rate - 1 / num_rows) < 5 * np.sqrt(1 / num_rows / 40_000), (first, second, rate * num_rows)


def test_two_functions_are_independent():
    """Pairs of rows of all ids fill a grid evenly; rows and signs of one function too."""
    functions = Hashes(6, np.random.RandomState(3))
    ids = torch.arange(1 << 19)
    for j in range(5):
        grid = functions.row(ids, j, 50) * 50 + functions.row(ids, j + 1, 50)
        assert abs(chi_square(np.bincount(grid.numpy(), minlength=2500))) < 5
        signed = functions.row(ids, j, 50) * 2 + (functions.sign(ids, j) > 0)
        assert abs(chi_square(np.bincount(signed.numpy(), minlength=100))) < 5


def test_seeds_are_in_the_checkpoint():
    state = Hashes(3, np.random.RandomState(0)).state_dict()
    assert {name: (value.dtype, tuple(value.shape)) for name, value in state.items()} == {"seeds": (torch.int32, (3, 2))}
