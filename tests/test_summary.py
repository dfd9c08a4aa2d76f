"""summary.png: drawn from every kind of run folder, showing the right curves; its command line."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dlrm_xla import summary
from dlrm_xla.console import Interval
from dlrm_xla.metrics import TestMetrics
from dlrm_xla.tracking import Tracker

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = Interval(samples_per_s=12_345.6, ms_per_it=3.824, data_wait_share=0.031, seconds_left=3725.0)
METRICS = TestMetrics(accuracy=0.484375, auc=0.7512, log_loss=0.5, normalized_entropy=0.9, calibration=1.01, num_rows=1000)
CONFIG = {"learning-rate": 0.1, "arch-mlp-bot": "13-16", "qr-flag": False, "weighted-pooling": None, "loss-function": "bce"}


def written(folder, train=(), tests=(), config=CONFIG, **start):
    with Tracker(folder, folder, config, {}, **start) as tracker:
        for step, loss in train:
            tracker.train(step, 0, loss, INTERVAL)
        for step, metrics in tests:
            tracker.test(step, 0, metrics)
    return folder


NO_AUC = TestMetrics(accuracy=0.5, auc=None, log_loss=0.7, normalized_entropy=None, calibration=None, num_rows=3)
CASES = {
    "one point": {"train": [(1, 0.7)]},
    "one point and test": {"train": [(1, 0.7)], "tests": [(1, METRICS)], "bayes_auc": 0.8},
    "no tests": {"train": [(step, 0.7) for step in range(1, 30)]},
    "tests without AUC": {"train": [(1, 0.7)], "tests": [(1, NO_AUC)]},
    "tests only": {"tests": [(1, METRICS), (2, METRICS)]},
    "inference": {"tests": [(-1, METRICS)]},
    "nothing": {},
    "losses from 1e-3 to 60": {"train": [(step, 60 * 0.95**step) for step in range(1, 200)], "tests": [(100, METRICS)]},
    "losses of 0": {"train": [(step, 0.0) for step in range(1, 100)]},
    "10,000 points": {"train": [(step, 0.5 + 0.1 / step) for step in range(1, 10_001)], "tests": [(5000, METRICS), (10_000, METRICS)]},
    "loss not finite": {"train": [(1, 0.7), (2, float("nan")), (3, float("inf"))]},
    "odd flags": {"train": [(1, 0.7)], "config": {"raw-data-file": "$\\x$", "optimizer": "$sgd", "arch-mlp-bot": "1-" * 100}},
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("case", CASES)
def test_pictures(tmp_path, case):
    from matplotlib.image import imread

    folder = written(tmp_path / "a $run_", **CASES[case])
    pixels = imread(summary.draw(folder))
    assert pixels.shape[1] == 1210 and 100 < pixels.shape[0] < 800
    assert (pixels[..., :3] < 0.7).any(), "something is drawn"
    assert not (folder / "summary.png.tmp").exists()


def test_picture_shows_the_figures(tmp_path):
    """Curves in their colours, and the dashed line of the best AUC only where it is known."""
    from matplotlib.image import imread

    train = [(step, 0.5 + 0.2 / step) for step in range(1, 50)]
    tests = [(25, METRICS), (49, METRICS)]

    def colours(**case):
        pixels = (imread(summary.draw(written(tmp_path / str(len(list(tmp_path.iterdir()))), **case)))[..., :3] * 255).round().astype(int)
        wanted = {
            name: tuple(int(code[i : i + 2], 16) for i in (1, 3, 5))
            for name, code in {"blue": summary.BLUE, "orange": summary.ORANGE, "green": summary.GREEN}.items()
        }
        return {name for name, colour in wanted.items() if (pixels == colour).all(-1).sum() > 50}

    assert colours(train=train) == {"blue"}
    assert colours(train=train, tests=[(25, NO_AUC), (49, NO_AUC)]) == {"blue", "orange"}
    assert colours(train=train, tests=tests) == {"blue", "orange", "green"}


def test_best_auc_is_drawn_where_it_is_known(tmp_path):
    from matplotlib.image import imread

    def longest_dark_row(**start):
        folder = written(tmp_path / str(len(start)), [(1, 0.5), (9, 0.5)], [(9, METRICS)], **start)
        return ((imread(summary.draw(folder))[..., :3] < 0.3).all(-1)).sum(1).max()

    assert longest_dark_row(bayes_auc=0.8) > 250 > longest_dark_row()


def test_caption_tells_what_matters(tmp_path):
    config = {
        "device": "xla",
        "qr-flag": True,
        "qr-collisions": 4,
        "md-flag": False,
        "learning-rate": 0.1,
        "data-generation": "dataset",
        "arch-embedding-size": "4-3-2",
    }
    run = summary.read_run(written(tmp_path, [(7, 0.5)], [(7, METRICS)], config))
    text = " ".join(summary._caption(run))
    for part in (
        "--device=xla",
        "--qr-flag=true",
        "--qr-collisions=4",
        "--learning-rate=0.1",
        "7 batches trained",
        "12,346 samples/s",
        "1,000 rows tested",
    ):
        assert part in text
    assert "md-flag" not in text and "arch-embedding-size" not in text
    assert "AUC 0.7512" in summary._last_figures(run)


def test_running_mean():
    values = np.random.default_rng(0).random(400)
    expected = [values[max(0, i - 10) : i + 11].mean() for i in range(400)]
    assert summary.running_mean(values) == pytest.approx(expected, abs=1e-12)


def test_command_line(tmp_path, capsys):
    folder = written(tmp_path / "run", [(1, 0.5)])
    assert summary.main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'summary.png'}\n"
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "metrics.jsonl").write_text("not JSON\n5\n")
    for argv in ([], ["a", "b"], ["--help"], [str(tmp_path)], [str(tmp_path / "nowhere")], [str(empty)]):
        assert summary.main(argv) == 2
        shown = capsys.readouterr()
        assert shown.out == "" and re.fullmatch(r"error: [^\n]+\n", shown.err)


def test_module_runs_by_name(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dlrm_xla.summary", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
