"""Both layouts of a store against a plain matrix, on both backends: exact, whatever the width and the neighbours."""

import numpy as np
import pytest
import torch

from dlrm_xla.layouts import PackedLayout, Region, lane_stride, packed_lines

ROWS, LOOKUPS = 37, 101
WIDTHS = [0, 1, 2, 3, 8, 16, 24, 64, 100, 128, 130, 256, 300]


def filled(layout, width, rows=ROWS):
    """A buffer in the host's memory, a field in it between others, and the matrix that the field holds."""
    shapes, regions = layout.regions(rows, {"before": 5, "data": width, "behind": 0})
    region = regions["data"]
    buffer = torch.full(shapes[region.buffer], 9.0)
    view = layout.as_rows(buffer, region, rows)
    view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(width)))
    return buffer, region, view.clone()


@pytest.mark.parametrize("name", ["rows", "packed"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gather_and_add(backend, name, width):
    layout = backend.layout(name)
    buffer, region, matrix = filled(layout, width)
    rng = np.random.default_rng(width)
    rows = torch.from_numpy(rng.integers(0, ROWS, LOOKUPS))
    values = torch.from_numpy(rng.integers(-8, 8, (LOOKUPS, width) if width else LOOKUPS)).float() / 4  # sums of these are exact
    on_device, rows_there = buffer.to(backend.device), rows.to(layout.index_dtype).to(backend.device)
    gathered = layout.gather(on_device, region, rows_there)
    torch.testing.assert_close(gathered.cpu(), matrix[rows], rtol=0, atol=0)
    matrix = (matrix * 4).round() / 4
    exact = buffer.clone()
    layout.as_rows(exact, region, ROWS).copy_(matrix)
    on_device = exact.to(backend.device)
    layout.add(on_device, region, rows_there, values.to(backend.device))
    expected = matrix.double()
    for row, value in zip(rows.tolist(), values.double(), strict=True):
        expected[row] += value
    result = on_device.cpu()
    torch.testing.assert_close(layout.as_rows(result, region, ROWS).double(), expected, rtol=0, atol=0)
    layout.as_rows(result, region, ROWS).copy_(matrix)
    assert torch.equal(result, exact), "numbers outside the field have changed"


@pytest.mark.parametrize("width", [1, 8, 24, 64])
def test_a_neighbour_that_is_no_number_stays_alone(backend, width):
    layout = backend.layout("packed")
    buffer, region, matrix = filled(layout, width)
    view = layout.as_rows(buffer, region, ROWS)
    view[3], view[7] = float("nan"), float("inf")
    others = torch.tensor([row for row in range(ROWS) if row not in (3, 7)])
    on_device, rows = buffer.to(backend.device), others.to(torch.int32).to(backend.device)
    torch.testing.assert_close(layout.gather(on_device, region, rows).cpu(), matrix[others], rtol=0, atol=0)
    layout.add(on_device, region, rows, torch.ones(len(others), width).to(backend.device))
    after = layout.as_rows(on_device.cpu(), region, ROWS)
    torch.testing.assert_close(after[others], matrix[others] + 1, rtol=0, atol=0)
    assert after[3].isnan().all() and after[7].isinf().all()


def test_packed_storage_by_hand():
    """(rows, width) -> lines of 128: nothing is padded where the width divides 128 or is a multiple of it."""
    lines = {(1_000_000, 16): 125_000, (1_000_000, 128): 1_000_000, (10, 64): 5, (9, 16): 2, (7, 200): 14, (128, 0): 1, (129, 0): 2, (5, 1): 1}
    assert {size: packed_lines(*size) for size in lines} == lines
    assert [lane_stride(width) for width in (0, 1, 3, 16, 24, 100, 128, 129, 384)] == [1, 1, 4, 16, 32, 128, 128, 256, 384]
    shapes, regions = PackedLayout().regions(1000, {"data": 32, "momentum": 0})
    assert shapes == {"data": (250 + 8, 128)} and regions["momentum"] == Region("data", 250, 0)


def test_large_buffers_need_no_large_row_numbers():
    """49.1M rows of 64 have 3.1e9 numbers, beyond int32; lines and rows stay below it."""
    layout = PackedLayout()
    _, regions = layout.regions(49_100_000, {"data": 64, "momentum": 0})
    line, _ = layout._place(torch.tensor([49_099_999], dtype=torch.int32), regions["momentum"], 1)
    assert line.tolist() == [49_100_000 // 2 + 49_099_999 // 128]
