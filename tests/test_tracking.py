"""What a run leaves behind: whole lines also after a kill, TensorBoard's tags, resume, full disks."""

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from dlrm_xla import summary
from dlrm_xla.console import Interval
from dlrm_xla.metrics import TestMetrics
from dlrm_xla.specs import UserError
from dlrm_xla.tracking import LineFile, Tracker, describe_environment

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = Interval(samples_per_s=12_345.6, ms_per_it=3.824, data_wait_share=0.031, seconds_left=3725.0)
METRICS = TestMetrics(accuracy=0.484375, auc=0.7512, log_loss=0.5, normalized_entropy=0.9, calibration=1.01, num_rows=1000)
MLPERF = {"recall": 0.0, "precision": 0.0, "f1": 0.0, "ap": 0.48652, "roc_auc": 0.45871, "accuracy": 0.4921875}
CONFIG = {"learning-rate": 0.1, "arch-mlp-bot": "13-16", "qr-flag": False, "weighted-pooling": None, "loss-function": "bce"}


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def python(code, **options):
    """A fresh interpreter in which dlrm_xla can be imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, text=True, timeout=60, **options)


# LineFile


@pytest.mark.parametrize("torn", [b"", b'{"a":', b"x" * 200_000, b"\xff\xfe"])
def test_line_file_cuts_off_an_unfinished_line(tmp_path, torn):
    path = tmp_path / "f"
    path.write_bytes(b'{"n": 1}\n' + torn)
    file = LineFile(path)
    file.write('{"n": 2}')
    file.close()
    assert path.read_bytes() == b'{"n": 1}\n{"n": 2}\n'


def test_line_file_of_nothing_but_an_unfinished_line(tmp_path):
    (tmp_path / "f").write_bytes(b"torn")
    file = LineFile(tmp_path / "f")
    file.write("whole")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"whole\n"


def test_line_file_tells_of_a_line_that_was_written_in_part(tmp_path):
    class NearlyFull(io.BytesIO):
        def write(self, data):
            return super().write(data[:3])

    file = LineFile(tmp_path / "f")
    file._file._file.close()
    file._file._file = NearlyFull()
    with pytest.raises(UserError, match="No space left on device"):
        file.write("whole")


def test_kill_loses_no_written_line(tmp_path):
    code = f"""
import os, signal
from pathlib import Path
from dlrm_xla.console import Interval
from dlrm_xla.tracking import Tracker
tracker = Tracker(Path({str(tmp_path)!r}), Path({str(tmp_path)!r}), {{}}, {{}})
for step in range(1, 51):
    tracker.train(step, 0, 1.0 / step, Interval(1.0, 1.0, 0.0, 0.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert python(code).returncode == -9
    rows = rows_of(tmp_path)
    assert [row["loss"] for row in rows if row["kind"] == "train"] == [1.0 / step for step in range(1, 51)]
    assert [point.step for point in events(tmp_path).Scalars("Train/Loss")] == list(range(1, 51)), "TensorBoard's file has them too"


# Tracker


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return accumulator


def test_tracker_writes_everything(tmp_path):
    run, board = tmp_path / "runs" / "a", tmp_path / "tb"
    with Tracker(run, board, CONFIG, {"python": "3"}, bayes_auc=0.8) as tracker:
        tracker.train(1, 0, np.float64(0.7), INTERVAL)
        tracker.train(2, 0, 0.6, INTERVAL, compiles=3, fallbacks=0)
        tracker.test(2, 0, METRICS)
        paths = tracker.close({"best_auc": 0.7512, "loss": float("nan")})
    assert paths == {"run": run, "metrics": run / "metrics.jsonl", "tensorboard": board, "summary": run / "summary.png"}
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "environment.json", "metrics.jsonl", "summary.png"]
    assert paths["summary"].read_bytes().startswith(b"\x89PNG")

    start, first, second, test, end = rows_of(run)
    assert (start["kind"], start["step"], start["resumed"], start["bayes_auc"]) == ("start", 0, False, 0.8)
    assert (first["kind"], first["step"], first["epoch"], first["loss"]) == ("train", 1, 0, 0.7) and "compiles" not in first
    assert (second["compiles"], second["fallbacks"], second["ms_per_it"], second["data_wait_share"]) == (3, 0, 3.824, 0.031)
    assert (test["kind"], test["auc"], test["log_loss"], test["num_rows"]) == ("test", 0.7512, 0.5, 1000)
    assert (end["kind"], end["best_auc"], end["loss"]) == ("end", 0.7512, None)
    assert yaml.safe_load((run / "config.yaml").read_text()) == CONFIG
    assert json.loads((run / "environment.json").read_text()) == {"python": "3"}

    board_events = events(board)
    scalars = {
        tag: [(point.step, pytest.approx(point.value)) for point in board_events.Scalars(tag)] for tag in board_events.Tags()["scalars"]
    }
    assert scalars == {
        "Train/Loss": [(1, 0.7), (2, 0.6)],
        "Perf/samples_per_s": [(1, 12_345.6), (2, 12_345.6)],
        "Perf/ms_per_it": [(1, 3.824), (2, 3.824)],
        "Perf/data_wait_share": [(1, 0.031), (2, 0.031)],
        "XLA/compiles": [(2, 3)],
        "XLA/fallbacks": [(2, 0)],
        "Test/Acc": [(2, 0.484375)],
        "Test/AUC": [(2, 0.7512)],
        "Test/LogLoss": [(2, 0.5)],
        "Test/NE": [(2, 0.9)],
        "Test/Calibration": [(2, 1.01)],
    }


def test_hparams_are_in_the_runs_own_event_file(tmp_path):
    from tensorboard.plugins.hparams import plugin_data_pb2

    with Tracker(tmp_path, tmp_path, CONFIG, {}) as tracker:
        tracker.train(1, 0, 0.7, INTERVAL)
        tracker.test(1, 0, METRICS)
        tracker.close({})
    assert not [path for path in tmp_path.iterdir() if path.is_dir()], "add_hparams would have made a folder"
    content = {}
    metadata = events(tmp_path).summary_metadata
    for tag in ("_hparams_/experiment", "_hparams_/session_start_info", "_hparams_/session_end_info"):
        content[tag] = plugin_data_pb2.HParamsPluginData.FromString(metadata[tag].plugin_data.content)
    settings = content["_hparams_/session_start_info"].session_start_info.hparams
    assert settings["learning-rate"].number_value == 0.1 and settings["arch-mlp-bot"].string_value == "13-16"
    assert settings["qr-flag"].bool_value is False
    figures = [info.name.tag for info in content["_hparams_/experiment"].experiment.metric_infos]
    assert figures == ["Train/Loss", "Test/Acc", "Test/AUC", "Test/LogLoss", "Test/NE", "Test/Calibration"]


def test_mlperf_tags_take_the_place_of_accuracy_and_inference_has_step_minus_one(tmp_path):
    undefined = TestMetrics(accuracy=0.5, auc=None, log_loss=0.7, normalized_entropy=None, calibration=None, num_rows=3)
    with Tracker(tmp_path, tmp_path, {}, {}) as tracker:
        tracker.test(-1, None, undefined, MLPERF)
        tracker.close({})
    tags = events(tmp_path)
    assert set(tags.Tags()["scalars"]) == {f"mlperf-metrics-test/{name}" for name in MLPERF} | {"Test/LogLoss"}
    assert [(point.step, pytest.approx(point.value)) for point in tags.Scalars("mlperf-metrics-test/roc_auc")] == [(-1, 0.45871)]
    test = rows_of(tmp_path)[1]
    assert test["mlperf"] == MLPERF and test["auc"] is None


def test_resume_forgets_what_the_killed_run_did_beyond_the_checkpoint(tmp_path):
    with Tracker(tmp_path, tmp_path, {}, {"n": 1}) as tracker:
        for step in range(1, 11):
            tracker.train(step, 0, float(step), INTERVAL)
        tracker.test(4, 0, METRICS)
        tracker.test(8, 0, METRICS)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"time": 1, "kind": "tr')  # killed while writing
    for number in (2, 3):
        with Tracker(tmp_path, tmp_path, {}, {"n": number}, resumed=True, first_step=6) as tracker:
            for step in range(7, 13):
                tracker.train(step, 0, 100.0 * number + step, INTERVAL)
            tracker.close({})
    expected = [(step, float(step)) for step in range(1, 7)] + [(step, 300.0 + step) for step in range(7, 13)]
    assert [(point.step, point.value) for point in events(tmp_path).Scalars("Train/Loss")] == expected
    run = summary.read_run(tmp_path)
    assert [(row["step"], row["loss"]) for row in run.train] == expected
    assert [row["step"] for row in run.test] == [4]
    assert run.resumed_at == [6, 6]
    environment = json.loads((tmp_path / "environment.json").read_text())
    assert environment == {"n": 3, "earlier": [{"n": 1}, {"n": 2}]}


def test_a_new_run_in_an_old_folder_starts_afresh_and_loses_nothing(tmp_path):
    for loss in (1.0, 2.0):
        with Tracker(tmp_path, tmp_path, {}, {}) as tracker:
            tracker.train(1, 0, loss, INTERVAL)
    assert [row["loss"] for row in summary.read_run(tmp_path).train] == [2.0]
    assert [row["loss"] for row in rows_of(tmp_path) if row["kind"] == "train"] == [1.0, 2.0]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run: cannot be written \(Not a directory\).*--log-dir"):
        Tracker(tmp_path / "file" / "run", tmp_path / "tb", {}, {})
    with pytest.raises(UserError, match=r"file/tb: cannot be written \(Not a directory\).*--tensor-board-filename"):
        Tracker(tmp_path / "run", tmp_path / "file" / "tb", {}, {})
    full = tmp_path / "full"
    full.mkdir()
    (full / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(UserError, match=r"metrics\.jsonl: cannot be written \(No space left on device\).*--log-dir"):
        Tracker(full, tmp_path / "tb", {}, {})


@pytest.mark.parametrize("file", ["metrics.jsonl", "tensorboard"])
def test_disk_that_fills_up_ends_in_one_line(tmp_path, file):
    code = f"""
import resource, sys
from pathlib import Path
from dlrm_xla.console import Interval
from dlrm_xla.specs import UserError
from dlrm_xla.tracking import Tracker
folder = Path({str(tmp_path)!r})
try:
    with Tracker(folder, folder / "tb", {{}}, {{}}) as tracker:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
        if {file == "tensorboard"}:
            tracker._lines.write = lambda line: None
        else:
            tracker._events.scalars = lambda step, values: None
        for step in range(1000):
            tracker.train(step, 0, 0.5, Interval(1.0, 1.0, 0.0, 0.0))
except UserError as error:
    print(f"error: {{error}}", file=sys.stderr)
    sys.exit(2)
"""
    done = python(code, capture_output=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: \S+: cannot be written \([^)]*\); free some space or choose another folder with --\S+\n", done.stderr)


def test_environment():
    environment = describe_environment("cpu", ["run_dlrm.py", "--nepochs=1"])
    assert environment["argv"] == ["run_dlrm.py", "--nepochs=1"] and environment["device"] == "cpu"
    assert environment["python"].startswith("3.") and environment["torch"] and environment["numpy"] and environment["cpu_count"] >= 1
    assert "torch_xla" in environment
    assert environment["git_commit"] is None or re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment["git_commit"])
    json.dumps(environment)


def test_importing_these_modules_stays_quick_and_apart():
    code = """
import sys
import dlrm_xla.console, dlrm_xla.metrics, dlrm_xla.mlperf, dlrm_xla.summary, dlrm_xla.tracking
heavy = ("torch", "matplotlib", "tensorboard", "tqdm", "sklearn", "torch_xla", "compression.registry", "data_loaders")
print([name for name in heavy if name in sys.modules])
"""
    assert python(code, capture_output=True).stdout.strip() == "[]"
