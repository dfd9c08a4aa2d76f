"""Both layouts of a store against a plain matrix, on both backends: exact, whatever the width and the neighbours."""

import numpy as np
import pytest
import torch

from dlrm_xla.layouts import PackedLayout, lane_stride

ROWS, LOOKUPS = 37, 101
WIDTHS = [0, 1, 2, 3, 8, 16, 24, 64, 100, 128, 130, 256, 300]


def filled(layout, width, rows=ROWS):
    """A buffer in the host's memory and the matrix that it holds."""
    buffer = torch.zeros(layout.shape(rows, width))
    view = layout.as_rows(buffer, rows, width)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(width)))
    return buffer, view.clone()


@pytest.mark.parametrize("name", ["rows", "packed"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather_and_add(backend, name, width):
    layout = backend.layout(name)
    buffer, matrix = filled(layout, width)
    rng = np.random.default_rng(width)
    rows = torch.from_numpy(rng.integers(0, ROWS, LOOKUPS))
    values = torch.from_numpy(rng.integers(-8, 8, (LOOKUPS, width) if width else LOOKUPS)).float() / 4  # sums of these are exact
    on_device, rows_there = buffer.to(backend.device), rows.to(layout.index_dtype).to(backend.device)
    gathered = layout.gather(on_device, rows_there, width)
    torch.testing.assert_close(gathered.cpu(), matrix[rows], rtol=0, atol=0)
    matrix = (matrix * 4).round() / 4
    exact = torch.zeros_like(buffer)
    layout.as_rows(exact, ROWS, width).copy_(matrix)
    on_device = exact.to(backend.device)
    layout.add(on_device, rows_there, values.to(backend.device))
    expected = matrix.double()
    for row, value in zip(rows.tolist(), values.double(), strict=True):
        expected[row] += value
    result = layout.as_rows(on_device.cpu(), ROWS, width)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("width", [1, 8, 24, 64])
def test_a_neighbour_that_is_no_number_stays_alone(backend, width):
    layout = backend.layout("packed")
    buffer, matrix = filled(layout, width)
    view = layout.as_rows(buffer, ROWS, width)
    view[3], view[7] = float("nan"), float("inf")
    others = torch.tensor([row for row in range(ROWS) if row not in (3, 7)])
    on_device, rows = buffer.to(backend.device), others.to(torch.int32).to(backend.device)
    torch.testing.assert_close(layout.gather(on_device, rows, width).cpu(), matrix[others], rtol=0, atol=0)
    layout.add(on_device, rows, torch.ones(len(others), width).to(backend.device))
    after = layout.as_rows(on_device.cpu(), ROWS, width)
    torch.testing.assert_close(after[others], matrix[others] + 1, rtol=0, atol=0)
    assert after[3].isnan().all() and after[7].isinf().all()


def test_packed_storage_by_hand():
    """(rows, width) -> lines of 128: nothing is padded where the width divides 128 or is a multiple of it."""
    layout = PackedLayout()
    shapes = {(1_000_000, 16): 125_000, (1_000_000, 128): 1_000_000, (10, 64): 5, (9, 16): 2, (7, 200): 14, (128, 0): 1, (129, 0): 2, (5, 1): 1}
    assert {size: layout.shape(*size) for size in shapes} == {size: (lines, 128) for size, lines in shapes.items()}
    assert [lane_stride(width) for width in (0, 1, 3, 16, 24, 100, 128, 129, 384)] == [1, 1, 4, 16, 32, 128, 128, 256, 384]
