"""Upstream's bugs that the default mends: what a user sees now. Their numbers under --upstream-compat are in test_recorded.py."""

import re

import pytest
import torch
from conftest import CRITEO_MODEL, SMALL


def best_figures(outcome) -> list[tuple[float, float]]:
    """(accuracy, best) of each test."""
    return [tuple(map(float, found)) for found in re.findall(r"^ accuracy (\S+) %, best (\S+) %", outcome.out, re.M)]


def test_a_test_pass_does_not_change_the_training_data(cli):
    assert cli(*SMALL, "--test-freq=3").losses == cli(*SMALL).losses


def test_debug_mode_does_not_change_the_weights(cli):
    assert cli(*SMALL, "--debug-mode").losses == cli(*SMALL).losses


def test_workers_do_not_change_the_data(cli):
    assert cli(*SMALL, "--num-workers=3").losses == cli(*SMALL).losses


def test_best_is_remembered_and_only_the_best_is_saved(cli):
    outcome = cli(*SMALL, "--nepochs=4", "--test-freq=2", "--save-model=m.pt")
    figures, saved, best = best_figures(outcome), 0, 0.0
    for accuracy, shown in figures:
        saved += accuracy > best
        best = max(best, accuracy)
        assert shown == best
    assert outcome.out.count("Saving model to") == saved < len(figures)
    compat = cli(*SMALL, "--nepochs=4", "--test-freq=2", "--save-model=m.pt", "--upstream-compat")
    assert compat.out.count("Saving model to") == len(figures)
    assert all(accuracy == shown for accuracy, shown in best_figures(compat))


def test_best_survives_a_resume(cli):
    flags = (*SMALL, "--test-freq=6", "--save-model=m.pt", "--save-every=6")
    before = best_figures(cli(*flags))
    after = best_figures(cli(*flags, "--nepochs=2", "--load-model=m.pt"))
    assert after[0][1] >= before[-1][1]


@pytest.mark.parametrize("flag, word", [("--mlperf-auc-threshold=0.3", "auc"), ("--mlperf-acc-threshold=0.3", "accuracy")])
def test_early_stop(cli, flag, word):
    outcome = cli(*SMALL, "--mlperf-logging", "--test-freq=4", flag)
    assert outcome.out.count("Testing at") == 1
    assert f"MLPerf testing {word} threshold 0.3 reached, stop training" in outcome.out
    assert outcome.losses[-1:] and len(outcome.losses) == 4
    assert outcome.out.count('"key": "run_stop"') == 1
    if word == "auc":
        assert '"status": "success"' in outcome.out
    unreachable = cli(*SMALL, "--mlperf-logging", "--test-freq=4", "--mlperf-auc-threshold=0.99")
    assert len(unreachable.losses) == 12
    assert '"status": "aborted"' in unreachable.out


def test_accumulated_batches_are_one_larger_batch(cli, criteo_file):
    """3 batches of 32 rows, or one of 96; the last group is cut short by the epoch's end."""
    common = (*CRITEO_MODEL, "--data-randomize=none", f"--raw-data-file={criteo_file}", "--mlperf-logging", "--test-freq=3", "--drop-last")
    assert cli(*common, "--mini-batch-size=96", "--test-freq=1", "--save-model=large.pt", "--save-every=1").code == 0
    assert cli(*common, "--mini-batch-size=32", "--mlperf-grad-accum-iter=3", "--save-model=small.pt", "--save-every=3").code == 0
    large, small = (torch.load(name, weights_only=True) for name in ("large.pt", "small.pt"))
    # 603 training rows: 6 batches of 96 and 27 rows dropped; or 18 of 32 and 27 dropped
    assert (large["iter"], small["iter"]) == (6, 18)
    for name, weight in large["state_dict"].items():
        torch.testing.assert_close(weight, small["state_dict"][name], atol=2e-6, rtol=1e-5)


def test_a_group_cut_short_still_steps(cli):
    flags = (*SMALL, "--num-batches=4", "--mlperf-logging", "--mlperf-grad-accum-iter=3", "--save-model=m.pt", "--save-every=3")
    assert cli(*flags).code == 0
    assert torch.load("m.pt", weights_only=True)["dlrm_xla"]["progress"]["updates"] == 2


def test_a_fixed_bag_is_fixed(cli):
    outcome = cli(*SMALL, "--num-indices-per-lookup-fixed", "--num-indices-per-lookup=6", "--num-batches=1", "--debug-mode")
    lengths = re.search(r"tensor\(\[\[([\d\[\],\s]*)\]\], dtype=torch.int32\)", outcome.out).group(1)
    assert set(re.findall(r"\d+", lengths)) == {"6"}


def test_small_tables_beside_mixed_dimensions(cli):
    outcome = cli(*SMALL, "--md-flag", "--md-threshold=30", "--save-model=m.pt", "--save-every=12")
    assert outcome.code == 0
    shapes = {name: tuple(weight.shape) for name, weight in torch.load("m.pt", weights_only=True)["state_dict"].items() if name.startswith("emb")}
    assert shapes["emb_l.1.embs.weight"] == (20, 8)  # at most 30 rows: full width, no projection
    assert shapes["emb_l.2.embs.weight"][1] < 8 and shapes["emb_l.2.proj.weight"][0] == 8
    assert "emb_l.1.proj.weight" not in shapes


def test_auc_of_one_half_draws_a_warning(cli):
    """Random labels over many rows: nothing to learn."""
    many_rows = ("--num-batches=400", "--mini-batch-size=256", "--print-freq=400", "--test-freq=400")
    outcome = cli(*SMALL, *many_rows, "--learning-rate=0", "--numpy-rand-seed=5")
    auc = float(re.search(r"AUC (\S+),", outcome.err).group(1))
    assert abs(auc - 0.5) < 0.005, "choose another seed"
    assert "warning: after epoch 0 the test AUC is" in outcome.err
