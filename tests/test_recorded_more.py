"""More of upstream's recorded runs: other seeds and other combinations than test_recorded.py's, resuming, and whole transcripts.

Every case was chosen so that upstream's own losses move by less than 5e-7 when all its first weights move by a last digit.
"""

import json
import re
from pathlib import Path

import pytest
import torch

RECORDED = json.loads((Path(__file__).parent / "recorded" / "more_upstream_losses.json").read_text())
TRACE = "1, 2, 3, 4, 5, 6\n0, 1, 3, 4, 5\n0.55, 0.64, 0.82, 0.91, 1.0\n"
RESUMED = [name for name in RECORDED if name.startswith("resume_")]
CASES = [name for name in RECORDED if name not in ("_about", "transcript", *RESUMED)]
ON_XLA = ("qr_concat_unsaturated", "learned_rwsadagrad", "md_adagrad", "accumulate_3")  # a few seconds each
# these rest on none of upstream's bugs, so they hold without --upstream-compat too
WITHOUT_COMPAT = (
    "learned_sgd", "learned_adagrad", "learned_rwsadagrad", "md_adagrad", "interaction_itself", "loss_threshold", "warm_up_only",
    "day_max_ind_range",
)  # fmt: skip
TOLERANCE = {"cpu": 1e-6, "xla": 1e-5}
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


@pytest.fixture
def files(tmp_path, criteo_file) -> None:
    """What the flags name: K/train.txt and a trace."""
    (tmp_path / "input").mkdir()
    (tmp_path / "input" / "dist_emb_0.log").write_text(TRACE)


def check(outcome, losses, accuracy, device) -> None:
    """All losses, in number too, and all test accuracies."""
    assert outcome.code == 0, outcome.err
    assert len(outcome.losses) == len(losses)
    for index, (loss, recorded) in enumerate(zip(outcome.losses, losses, strict=True)):
        assert abs(loss - recorded) <= TOLERANCE[device] * max(1.0, recorded), f"line {index}: {loss}, upstream {recorded}"
    assert [float(share) for share in re.findall(r"accuracy (\S+) %, best", outcome.out)] == (accuracy or [])


@pytest.mark.parametrize(("name", "device"), [*((name, "cpu") for name in CASES), *((name, "xla") for name in ON_XLA)])
def test_compatible_run(cli, files, name, device):
    case = RECORDED[name]
    for again in ("", "_again") if "losses_again" in case else ("",):  # from the raw file, then from the processed one
        outcome = cli(*case["flags"].split(), "--upstream-compat", device=device)
        check(outcome, case[f"losses{again}"], case.get(f"accuracy{again}"), device)


@pytest.mark.parametrize("name", WITHOUT_COMPAT)
def test_default_run(cli, files, name):
    case = RECORDED[name]
    check(cli(*case["flags"].split()), case["losses"], case.get("accuracy"), "cpu")


@pytest.mark.parametrize(("name", "device"), [*((name, "cpu") for name in RESUMED), ("resume_adagrad", "xla")])
def test_resumed_run(cli, name, device):
    """Two epochs after resuming inside the first: upstream leaves out the first batches of both."""
    case = RECORDED[name]
    assert cli(*case["first"].split(), "--upstream-compat", device=device).code == 0
    check(cli(*case["flags"].split(), "--upstream-compat", device=device), case["losses"], case["accuracy"], device)


def test_transcripts(cli):
    """stdout line by line: training and testing, saving, resuming, testing only, and MLPerf's test line without its events."""
    for run in RECORDED["transcript"]:
        outcome = cli(*run["flags"].split(), "--upstream-compat")
        assert outcome.code == 0, outcome.err
        shown = [line for line in outcome.out.splitlines() if not line.startswith((":::MLLOG", "command line args"))]
        ours = next(index for index, line in enumerate(shown) if line.startswith(("test AUC", "log loss", "TensorBoard: ")))
        for line, recorded in zip(shown[:ours], run["stdout"], strict=True):
            line, recorded = (re.sub(r"\d+\.\d\d ms/it", "", text) for text in (line, recorded))
            # the sixth digit of a loss may round the other way on another processor
            assert NUMBER.sub("#", line) == NUMBER.sub("#", recorded)
            for number, expected in zip(NUMBER.findall(line), NUMBER.findall(recorded), strict=True):
                assert abs(float(number) - float(expected)) <= 1.5e-6, f"{line!r}, upstream {recorded!r}"


def test_debug_mode_prints_each_mixed_dimension(cli):
    outcome = cli(*RECORDED["debug_md"]["flags"].split(), "--upstream-compat")
    assert "with dimensions [3, 1, 4, 1]x:" in outcome.out


def test_debug_mode_saves_and_resumes_three_groups(cli):
    """Upstream's optimizer in debug mode: tables, bottom and top MLP, without the learned pooling weights. Others it refuses to load."""
    flags = ("--weighted-pooling=learned", "--debug-mode", "--optimizer=adagrad", "--upstream-compat")
    assert cli(*flags, "--round-targets", "--num-batches=4", "--mini-batch-size=8", "--test-freq=4", "--save-model=m.pt").code == 0
    saved = torch.load("m.pt", weights_only=True)["opt_state_dict"]
    # three tables; two layers of two parameters in the bottom MLP, three in the top one
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    assert saved["state"][3]["sum"].shape == (3, 4)
    outcome = cli(*flags, "--round-targets", "--num-batches=6", "--mini-batch-size=8", "--load-model=m.pt")
    assert len(outcome.losses) == 2


def test_resumed_mlperf_run_shows_the_checkpoints_accuracy(cli):
    """Upstream takes the accuracy of the loaded test as the best for the rest of the run, and 0 where nothing was loaded."""
    flags = ("--mlperf-logging", "--round-targets", "--mini-batch-size=32", "--test-freq=2", "--upstream-compat")
    first = cli(*flags, "--num-batches=2", "--save-model=m.pt")
    accuracy, best = re.search(r"accuracy (\S+) %, best accuracy (\S+) %", first.out).groups()
    assert best == "0.000"
    assert f"best accuracy {accuracy} %" in cli(*flags, "--num-batches=4", "--load-model=m.pt").out
