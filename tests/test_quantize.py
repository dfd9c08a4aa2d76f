"""Quantized inference against predictions that upstream gave (HEAD 090956e, torch 2.9.0, one thread), and the rules around it.

Expected are the first four predictions of the first and of the last test batch, with nine digits.
"""

import numpy as np
import pytest
import torch

import dlrm_xla.session
from dlrm_xla import quantize
from dlrm_xla.backends.base import StepBatch
from tests.conftest import SMALL

INFERENCE = (*SMALL, "--inference-only")
SHORT = ("--num-batches=0", "--data-size=40")  # a batch of 32 rows and one of 8
MIXED = ("--md-flag", "--md-threshold=2")
QR = ("--qr-flag", "--qr-threshold=10", "--upstream-compat")  # another starting range and pooling without --upstream-compat

CASES = {
    "float32": ((), [0.100524589, 0.095181704, 0.096129708, 0.097554855], None),
    "tables8": (("--quantize-emb-with-bit=8",), [0.100526467, 0.095158316, 0.096070848, 0.097530931], None),
    "tables4": (
        ("--quantize-emb-with-bit=4",),
        [0.100405984, 0.095119253, 0.096063882, 0.097411528],
        [0.096381649, 0.089296184, 0.086776912, 0.089935645],
    ),
    "layers8": (("--quantize-mlp-with-bit=8",), [0.100322455, 0.094787866, 0.096232101, 0.097235017], None),
    "layers16": (("--quantize-mlp-with-bit=16",), [0.100519955, 0.095178246, 0.096124753, 0.097547449], None),
    "tables4_layers8": (
        ("--quantize-emb-with-bit=4", "--quantize-mlp-with-bit=8"),
        [0.100735687, 0.095175929, 0.096600212, 0.097597368],
        [0.097043186, 0.088759296, 0.085587606, 0.08979281],
    ),
    "layers8_short_batch": (
        (*SHORT, "--quantize-mlp-with-bit=8"),
        [0.100322455, 0.094787866, 0.096232101, 0.097235017],
        [0.091251493, 0.096683636, 0.106293641, 0.094969869],
    ),
    "tables8_layers8_short_batch": (
        (*SHORT, "--quantize-emb-with-bit=8", "--quantize-mlp-with-bit=8"),
        [0.100364879, 0.094831169, 0.095982656, 0.097277954],
        [0.091303915, 0.096108347, 0.106326029, 0.095003806],
    ),
    # the projections of mixed dimensions are linear layers too
    "mixed_dimensions_layers8": (
        (*MIXED, "--quantize-mlp-with-bit=8"),
        [0.630810142, 0.564081907, 0.64127773, 0.640631795],
        [0.655260503, 0.644428253, 0.621573627, 0.662261546],
    ),
    "mixed_dimensions_layers16": (
        (*MIXED, "--quantize-mlp-with-bit=16"),
        [0.632438064, 0.566266298, 0.641418457, 0.639768839],
        [0.656011343, 0.642438114, 0.622947514, 0.663050056],
    ),
    "qr_layers8": ((*QR, "--quantize-mlp-with-bit=8"), [0.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.932005525, 1.0]),
}
# after twelve batches of training with learned pooling weights
WEIGHTED = {
    "float32": (
        (), [0.285923809, 0.288287193, 0.290439695, 0.27766189], [0.286439091, 0.292033017, 0.284905493, 0.2785528],
    ),
    "tables8": (
        ("--quantize-emb-with-bit=8",),
        [0.285917342, 0.288309902, 0.290443063, 0.277659595],
        [0.286474675, 0.292057335, 0.284837753, 0.278576702],
    ),
    "tables4_layers16": (
        ("--quantize-emb-with-bit=4", "--quantize-mlp-with-bit=16"),
        [0.285771877, 0.28879416, 0.290941358, 0.278545648],
        [0.286402911, 0.291712135, 0.285330415, 0.278332472],
    ),
}  # fmt: skip


@pytest.fixture
def predictions(monkeypatch):
    """Takes what every test pass predicts, the rows of all its batches in one array."""
    taken = []

    def predict(*arguments):
        result = original(*arguments)
        taken.append(result[0])
        return result

    original = dlrm_xla.session.predict
    monkeypatch.setattr(dlrm_xla.session, "predict", predict)
    return taken


def assert_first_and_last(found: np.ndarray, first: list[float], last: list[float] | None):
    np.testing.assert_allclose(found[:4], first, rtol=0, atol=1e-6)
    if last is not None:
        start = (len(found) - 1) // 32 * 32
        np.testing.assert_allclose(found[start : start + 4], last, rtol=0, atol=1e-6)


@pytest.mark.parametrize("compat", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_predicts_what_upstream_predicts(cli, predictions, name, compat):
    flags, first, last = CASES[name]
    if not compat and "--upstream-compat" in flags:
        pytest.skip("the starting weights differ without --upstream-compat")
    outcome = cli(*INFERENCE, *flags, f"--upstream-compat={compat}")
    assert outcome.code == 0, outcome.err
    assert_first_and_last(predictions[0], first, last)
    assert len(predictions[0]) == (40 if SHORT[0] in flags else 12 * 32)


@pytest.mark.parametrize("pooling", ["learned", None])
def test_a_trained_checkpoint(cli, predictions, pooling):
    flags = () if pooling is None else (f"--weighted-pooling={pooling}",)
    # upstream's recorded run without weights tested (and drew test data) every four batches
    test_freq = "--test-freq=4" if pooling is None else "--test-freq=12"
    assert cli(*SMALL, *flags, test_freq, "--save-model=m.pt", "--upstream-compat").code == 0
    cases = {"float32": ((), [0.280744791, 0.282352507, 0.286106497, 0.271971285], None)} if pooling is None else WEIGHTED
    for quantization, first, last in cases.values():
        for compat in (True, False):
            predictions.clear()
            outcome = cli(*INFERENCE, *flags, *quantization, "--load-model=m.pt", f"--upstream-compat={compat}")
            assert outcome.code == 0, outcome.err
            assert_first_and_last(predictions[0], first, last)


@pytest.mark.parametrize("embedding_bits", [8, 32])
def test_padded_rows_change_nothing(cli, monkeypatch, embedding_bits):
    """int8 layers choose the scale of their input from the whole batch. Nor does quantizing change the trained model."""
    trainers = []
    original = quantize.quantized_forward
    monkeypatch.setattr(quantize, "quantized_forward", lambda trainer, *others: trainers.append(trainer) or original(trainer, *others))
    assert cli(*INFERENCE, "--quantize-mlp-with-bit=8").code == 0
    trainer = trainers[0]
    generator = torch.Generator().manual_seed(1)
    dense = torch.rand(6, 5, generator=generator)
    dense[4:] *= 1000
    ids = torch.randint(0, 3, (6, sum(trainer.tables.hotness)), generator=generator, dtype=torch.int32)
    weights, labels = torch.ones(ids.shape), torch.zeros(6, 1)
    valid = torch.tensor([1.0, 1, 1, 1, 0, 0]).unsqueeze(1)
    before = trainer.forward(StepBatch(dense, ids, weights, labels, valid, valid.sum()))
    forward = original(trainer, 8, embedding_bits)
    padded = forward(StepBatch(dense, ids, weights, labels, valid, valid.sum()))
    alone = forward(StepBatch(dense[:4], ids[:4], weights[:4], labels[:4], valid[:4], valid.sum()))
    assert torch.equal(padded[:4], alone) and alone.std() > 1e-3
    np.testing.assert_allclose(alone.detach(), before[:4].detach(), rtol=0, atol=0.01)
    assert torch.equal(trainer.forward(StepBatch(dense, ids, weights, labels, valid, valid.sum())), before)


def test_upstreams_line_for_every_table_and_batch(cli):
    lines = [line for line in cli(*INFERENCE, "--quantize-emb-with-bit=8", "--upstream-compat").out.splitlines() if "quantized" in line]
    # a row of 8 numbers is 8 bytes, and 4 each for its scale and bias
    assert lines == [f"quantized emb sizes: {rows * 16} {rows * 16}" for rows in (50, 20, 100, 3)] * 12
    assert "quantized" not in cli(*INFERENCE, "--quantize-emb-with-bit=8").out


def test_says_nothing_about_the_library(cli_process):
    """PyTorch deprecates its quantization package in several warnings; the user has no part in that."""
    bits = ("--quantize-mlp-with-bit=8", "--quantize-emb-with-bit=4")
    outcome = cli_process(*INFERENCE, *bits, before="import warnings; warnings.simplefilter('always')")
    assert outcome.code == 0
    assert "torch.ao" not in outcome.err and "quantiz" not in outcome.err


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--quantize-emb-with-bit=4", "--arch-sparse-feature-size=3", "--arch-mlp-bot=5-3"), "must be even"),
        (("--quantize-mlp-with-bit=8", "--save-onnx"), "--save-onnx"),
        (("--quantize-mlp-with-bit=4",), "8, 16, 32"),
    ],
)
def test_refusals(cli, flags, message):
    assert message in cli(*INFERENCE, *flags).error


def test_runs_on_the_cpu_where_no_device_is_named(cli, monkeypatch):
    monkeypatch.setenv("PJRT_DEVICE", "TPU")  # what --device=auto would take
    assert "Using CPU..." in cli(*INFERENCE, "--quantize-mlp-with-bit=8", device=None).out
    assert "--device=cpu" in cli(*INFERENCE, "--quantize-mlp-with-bit=8", device="xla").error
