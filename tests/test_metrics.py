"""Test metrics against pair-counting and float64 oracles, cases worked out by hand, and sklearn."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dlrm_xla import metrics
from dlrm_xla.metrics import evaluate_predictions, mlperf_metrics, roc_auc
from dlrm_xla.specs import UserError


def auc_by_pairs(predictions, labels):
    """Every positive row against every negative one."""
    won = pairs = 0.0
    for p, t in zip(predictions, labels, strict=True):
        for q, u in zip(predictions, labels, strict=True):
            if t == 1 and u == 0:
                pairs += 1
                won += 1.0 if p > q else 0.5 if p == q else 0.0
    return won / pairs if pairs else None


def log_loss_by_rows(predictions, labels):
    def log(x):
        return max(math.log(x), -100.0) if x > 0 else -100.0

    return sum(-(t * log(p) + (1 - t) * log(1 - p)) for p, t in zip(predictions.tolist(), labels.tolist(), strict=True)) / len(labels)


def random_case(n, seed=0, dtype=np.float32, digits=None):
    rng = np.random.default_rng(seed)
    p = rng.random(n).astype(dtype)
    if digits is not None:
        p = np.round(p, digits)  # ties
    return p, (rng.random(n) < p).astype(np.float32)


def test_by_hand():
    m = evaluate_predictions(np.array([0.1, 0.4, 0.35, 0.8]), np.array([0.0, 0.0, 1.0, 1.0]))
    assert m.auc == 0.75  # of the pairs (.35, .8) x (.1, .4) only .35 < .4 is lost
    assert m.accuracy == 0.75
    assert m.log_loss == pytest.approx(-(math.log(0.9) + math.log(0.6) + math.log(0.35) + math.log(0.8)) / 4, rel=1e-15)
    assert m.normalized_entropy == pytest.approx(m.log_loss / math.log(2), rel=1e-15)  # base rate 1/2: one bit
    assert m.calibration == pytest.approx(1.65 / 2, rel=1e-15)
    assert m.num_rows == 4


def test_predicting_the_mean_has_entropy_one_calibration_one_and_auc_half():
    labels = (np.arange(1000) % 4 == 0).astype(np.float32)
    m = evaluate_predictions(np.full(1000, 0.25, np.float32), labels)
    assert m.normalized_entropy == pytest.approx(1.0, abs=1e-14)
    assert m.calibration == pytest.approx(1.0, abs=1e-14)
    assert m.auc == 0.5


def test_accuracy_rounds_half_to_even_as_upstream():
    predictions, labels = np.array([0.5, 0.5, 0.50001, 0.49999], np.float32), np.array([0, 1, 1, 0], np.float32)
    assert evaluate_predictions(predictions, labels).accuracy == 0.75  # 0.5 rounds to 0
    upstream = np.sum((np.round(predictions, 0) == labels).astype(np.uint8)) / 4
    assert upstream == 0.75


@pytest.mark.parametrize("n", [2, 7, 97, 500])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("digits", [None, 1])
def test_against_oracles(n, dtype, digits):
    p, t = random_case(n, n, dtype, digits)
    t[0], t[1] = 0, 1
    m = evaluate_predictions(p, t)
    assert m.auc == pytest.approx(auc_by_pairs(p, t), rel=1e-14)
    assert m.log_loss == pytest.approx(log_loss_by_rows(p.astype(np.float64), t), rel=1e-12)
    assert m.accuracy == np.mean(np.round(p) == t)
    assert m.calibration == pytest.approx(sum(map(float, p)) / sum(map(float, t)), rel=1e-12)


def test_many_rows_in_several_blocks(monkeypatch):
    p, t = random_case(10_007, 5)
    whole = evaluate_predictions(p, t)
    monkeypatch.setattr(metrics, "BLOCK_ROWS", 100)
    parts = evaluate_predictions(p, t)
    assert (parts.accuracy, parts.auc, parts.num_rows) == (whole.accuracy, whole.auc, 10_007)
    assert parts.log_loss == pytest.approx(whole.log_loss, rel=1e-13)
    assert parts.calibration == pytest.approx(whole.calibration, rel=1e-13)


def test_log_loss_is_torchs_bce_also_at_certain_and_wrong():
    p, t = np.array([0.0, 1.0, 1.0, 0.0, 0.3]), np.array([1.0, 0.0, 1.0, 0.0, 0.25])
    expected = torch.nn.functional.binary_cross_entropy(torch.tensor(p), torch.tensor(t)).item()
    assert evaluate_predictions(p, t).log_loss == pytest.approx(expected, rel=1e-14)


SCORES = st.sampled_from([0.0, -0.0, 1e-45, 0.1, 0.25, 0.5, 0.75, 1.0]) | st.floats(0, 1, width=32)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(SCORES, st.integers(0, 1)), min_size=1, max_size=40), st.sampled_from([np.float32, np.float64]))
def test_auc_with_ties(rows, dtype):
    p, t = np.array([row[0] for row in rows], dtype), np.array([row[1] for row in rows], np.float32)
    expected = auc_by_pairs(p, t)
    found = roc_auc(p, t)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-15))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(SCORES, st.integers(0, 1)), min_size=2, max_size=40))
def test_turning_scores_round_turns_auc_round(rows):
    p, t = np.array([row[0] for row in rows], np.float64), np.array([row[1] for row in rows], np.float32)
    auc, other = roc_auc(p, t), roc_auc(p, 1 - t)
    assert (auc is None) == (other is None)
    assert auc is None or auc + other == pytest.approx(1.0, abs=1e-15)


def test_inputs_are_not_changed():
    p, t = random_case(97)
    before = p.copy(), t.copy()
    evaluate_predictions(p, t)
    roc_auc(p, t)
    assert np.array_equal(p, before[0]) and np.array_equal(t, before[1])


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_one_class(label):
    m = evaluate_predictions(np.array([0.2, 0.7]), np.full(2, label))
    assert m.auc is None and m.normalized_entropy is None
    assert (m.calibration is None) == (label == 0)
    assert m.log_loss > 0


def test_labels_between_zero_and_one():
    m = evaluate_predictions(np.array([0.2, 0.7]), np.array([0.3, 0.9]))
    assert m.auc is None and m.normalized_entropy is None
    assert m.log_loss == pytest.approx(log_loss_by_rows(np.array([0.2, 0.7]), np.array([0.3, 0.9])), rel=1e-14)


def test_columns_are_taken_as_rows():
    p, t = random_case(50)
    assert evaluate_predictions(p[:, None], t[:, None]) == evaluate_predictions(p, t)


def test_wrong_input():
    with pytest.raises(UserError, match=r"NaN for 2 of 3 test rows \(first: row 1\).*--learning-rate"):
        evaluate_predictions(np.array([0.1, np.nan, np.nan]), np.zeros(3))
    with pytest.raises(UserError, match="no rows"):
        evaluate_predictions(np.zeros(0), np.zeros(0))
    with pytest.raises(ValueError, match="2 predictions for 3 labels"):
        evaluate_predictions(np.zeros(2), np.zeros(3))
    with pytest.raises(ValueError, match="probabilities"):
        evaluate_predictions(np.array([0.5, 1.5]), np.zeros(2))


def test_mlperf_metrics_are_upstreams():
    from sklearn import metrics as sk

    p, t = random_case(1000, 3, digits=2)
    p, t = p[:, None], t[:, None]  # upstream hands sklearn columns
    values = mlperf_metrics(p, t)
    expected = {
        "recall": sk.recall_score(y_true=t, y_pred=np.round(p)),
        "precision": sk.precision_score(y_true=t, y_pred=np.round(p)),
        "f1": sk.f1_score(y_true=t, y_pred=np.round(p)),
        "ap": sk.average_precision_score(t, p),
        "roc_auc": sk.roc_auc_score(t, p),
        "accuracy": sk.accuracy_score(y_true=t, y_pred=np.round(p)),
    }
    assert values == expected and list(values) == list(expected)
    assert values["roc_auc"] == pytest.approx(evaluate_predictions(p, t).auc, rel=1e-14)
    assert values["accuracy"] == evaluate_predictions(p, t).accuracy


def test_mlperf_metrics_without_warnings_where_nothing_is_predicted_or_present():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        never = mlperf_metrics(np.array([0.1, 0.2]), np.array([0.0, 1.0]))
        absent = mlperf_metrics(np.array([0.1, 0.2]), np.array([0.0, 0.0]))
    assert (never["recall"], never["precision"], never["f1"]) == (0.0, 0.0, 0.0)
    assert math.isnan(absent["roc_auc"])


def test_mlperf_metrics_need_binary_labels():
    with pytest.raises(UserError, match=r"has 0\.25; add --round-targets"):
        mlperf_metrics(np.array([0.1, 0.2]), np.array([0.25, 1.0]))
