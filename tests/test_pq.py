"""Product quantization against loops in float64."""

import numpy as np
import pytest
import torch
from conftest import xla_or_skip

from compression.method import Making
from compression.pq import METHOD
from dlrm_xla import backends
from dlrm_xla.specs import TableSpec, UserError

SHAPES = ((1, 4), (7, 64), (97, 16), (10_007, 16))


def trained(rows: int, dim: int) -> np.ndarray:
    rng = np.random.RandomState(rows)
    return (rng.randn(rows, 3) @ rng.randn(3, dim) + 0.2 * rng.randn(rows, dim)).astype(np.float32)


def converted(weight: np.ndarray, counts: np.ndarray | None = None, **given):
    """(table, its codebook, facts)."""
    spec, knobs = TableSpec("emb_l.0", *weight.shape), METHOD.knob_values({name: str(value).lower() for name, value in given.items()})
    METHOD.check(spec, knobs)
    done = METHOD.convert(spec, knobs, weight, Making(np.random.RandomState(0), counts))
    (part,) = done.table.parts.values()
    codebook = torch.full((part.num_rows, part.width), np.nan)
    part.fill(codebook)
    assert METHOD.num_bytes(spec, knobs) == 4 * codebook.nelement() + 4 * done.table.codes.words.nelement()
    return done.table, codebook, done.facts


def look_up(table, codebook: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    (rows,) = table.row_ids(ids)
    assert rows.dtype == ids.dtype and rows.shape == (*ids.shape, table.chunks)
    return table.combine((codebook.index_select(0, rows.reshape(-1)).reshape(*ids.shape, -1),), ids)


@pytest.mark.parametrize("given", [{}, {"bits": 3}, {"chunks": 1}, {"chunks": 4, "bits": 5}], ids=str)
@pytest.mark.parametrize("rows, dim", SHAPES)
def test_each_chunk_is_its_nearest_center(rows, dim, given):
    weight = trained(rows, dim)
    table, codebook, facts = converted(weight, **given)
    chunks, k = table.chunks, min(2 ** given.get("bits", 8), rows)
    width = dim // chunks
    assert codebook.shape == (chunks * k, width)
    expected = np.empty((rows, dim))
    for chunk in range(chunks):
        centers = codebook[chunk * k : (chunk + 1) * k].double().numpy()
        points = weight[:, chunk * width : (chunk + 1) * width].astype(np.float64)
        distances = ((points[:, None] - centers[None]) ** 2).sum(2)
        expected[:, chunk * width : (chunk + 1) * width] = centers[table.codes.read(torch.arange(rows))[:, chunk].numpy()]
        reached = ((points - expected[:, chunk * width : (chunk + 1) * width]) ** 2).sum(1)
        np.testing.assert_allclose(reached, distances.min(1), atol=1e-5)
    np.testing.assert_array_equal(look_up(table, codebook, torch.arange(rows)).numpy(), expected.astype(np.float32))
    error = np.linalg.norm(weight - expected) / np.linalg.norm(weight.astype(np.float64))
    assert facts["relative_error"] == pytest.approx(error, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("rows, dim", SHAPES)
def test_exact_with_a_center_for_each_id(rows, dim):
    weight = trained(rows, dim) + 100
    table, codebook, facts = converted(weight, **METHOD.exact_at(TableSpec("emb_l.0", rows, dim)))
    assert np.array_equal(look_up(table, codebook, torch.arange(rows)).numpy(), weight) and facts["relative_error"] == 0


def test_a_sample_of_the_ids_gives_nearly_the_same(monkeypatch):
    weight = trained(10_007, 16)
    whole = converted(weight, bits=4)[2]["relative_error"]
    monkeypatch.setattr("compression.pq.SAMPLE", 2000)
    assert whole < converted(weight, bits=4)[2]["relative_error"] < 1.1 * whole


def test_near_the_one_dimensional_optimum():
    facts = converted(trained(500, 4), chunks=4, bits=3)[2]
    assert facts["optimal"] <= facts["relative_error"] * (1 + 1e-6) and facts["relative_error"] < 1.1 * facts["optimal"]
    assert "optimal" not in converted(trained(500, 4), chunks=2, bits=3)[2]
    counts = np.floor(100 / (1 + np.arange(500.0)))
    facts = converted(trained(500, 4), counts, chunks=4, bits=3, weighted=True)[2]
    assert facts["optimal_weighted"] <= facts["relative_error_weighted"] * (1 + 1e-5)


def test_weights_move_the_error_to_rare_ids():
    weight, counts = trained(2000, 16), 1000.0 / (1 + np.arange(2000))
    plain, weighted = (converted(weight, counts, bits=4, weighted=given)[2] for given in (False, True))
    assert weighted["relative_error_weighted"] < 0.9 * plain["relative_error_weighted"]
    assert weighted["relative_error"] > plain["relative_error"]


def test_gradients_of_centers_equal_a_dense_models():
    weight = trained(97, 16)
    table, codebook, _ = converted(weight, bits=3)
    ids = torch.from_numpy(np.random.RandomState(0).randint(0, 97, (5, 8)))
    wanted = torch.from_numpy(np.random.RandomState(1).randn(5, 8, 16))
    leaf = codebook.double().requires_grad_()
    (look_up(table, leaf, ids) * wanted).sum().backward()
    expected = np.zeros(codebook.shape)
    codes = table.codes.read(ids).numpy()
    for place in np.ndindex(5, 8):
        for chunk in range(4):
            expected[chunk * 8 + codes[(*place, chunk)]] += wanted.numpy()[place][chunk * 4 : (chunk + 1) * 4]
    np.testing.assert_allclose(leaf.grad.numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_xla(dtype):
    xla_or_skip()
    backend = backends.make("xla")
    table, codebook, _ = converted(trained(97, 16), bits=5)
    ids = torch.arange(97, dtype=dtype)
    expected = look_up(table, codebook, ids)
    backend.place(table)
    before = backend.fallbacks()
    on_xla = look_up(table, codebook.to(backend.device), ids.to(backend.device))
    backend.end_step()
    assert backend.fallbacks() == before
    assert torch.equal(on_xla.cpu(), expected)


def test_the_shell_has_the_same_state():
    table, _, _ = converted(trained(97, 16))
    shell = METHOD.shell(table.spec, METHOD.knob_values({}), Making(np.random.RandomState(0)))
    shell.load_state_dict(table.state_dict())
    assert torch.equal(shell.row_ids(torch.arange(97))[0], table.row_ids(torch.arange(97))[0])


def test_bad_knobs():
    with pytest.raises(UserError, match="^pq:chunks=3: table emb_l.0 has vectors of 16, which must be a multiple; use one of 1, 2, 4, 8, 16$"):
        METHOD.check(TableSpec("emb_l.0", 97, 16), METHOD.knob_values({"chunks": "3"}))
