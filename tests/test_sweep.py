"""The sweep over methods, ratios and seeds: what it plans, runs, takes up again and reports. Made-up rows; most runs are those of a stand-in."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from compression import frontier, sweep, sweep_plan, sweep_run
from compression.frontier_plot import spread_out
from compression.sweep_plan import Run

SMALL_MODEL = (
    "--flags=--arch-sparse-feature-size=4 --arch-mlp-bot=13-8-4 --arch-mlp-top=8-1 --mini-batch-size=64 --test-mini-batch-size=64 "
    "--compress-threshold=4"
)
# Leaves the figures of a run that it makes up from the flags, and a line in calls.txt beside itself; fails for --compress=md
STAND_IN = '''
import json, pathlib, sys, time
flags = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
here = pathlib.Path(__file__).parent
with open(here / "calls.txt", "a") as calls:
    calls.write(pathlib.Path(flags["--log-dir"]).parent.name + "\\n")
if flags.get("--compress") == "md":
    print("error: no luck today", file=sys.stderr)
    sys.exit(2)
wait = here / "wait"
while wait.exists() and int(flags["--numpy-rand-seed"]) != 123:
    time.sleep(0.05)
folder = pathlib.Path(flags["--log-dir"])
folder.mkdir(parents=True)
rows = [{"kind": "start", "step": 0}]
for epoch in range(int(flags["--nepochs"])):
    for step, loss in ((4, 0.9), (7, 0.5), (10, 0.4)):
        rows.append({"kind": "train", "step": 10 * epoch + step, "loss": loss - 0.1 * epoch})
    auc = 0.7 + 0.01 * epoch + 0.001 * (int(flags["--numpy-rand-seed"]) - 123) - 0.02 * ("--compress" in flags)
    rows.append({"kind": "test", "step": 10 * (epoch + 1), "auc": auc, "log_loss": 0.6, "accuracy": 0.7, "normalized_entropy": 0.9,
                 "calibration": 1.0, "num_rows": 50})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
'''


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """The folder of a run_dlrm.py that makes figures up."""
    folder = tmp_path / "stand_in"
    folder.mkdir()
    (folder / "run_dlrm.py").write_text(STAND_IN)
    monkeypatch.setattr(sweep_run, "ROOT", folder)
    return folder


def calls(stand_in) -> list[str]:
    return (stand_in / "calls.txt").read_text().split()


def argv(criteo_file, out, *more: str) -> list[str]:
    return [f"--raw-data-file={criteo_file}", f"--out={out}", SMALL_MODEL, "--ratios=1.5", "--jobs=2", *more]


def test_a_tiny_sweep_from_rows_to_the_picture(criteo_file, tmp_path, capsys):
    out = tmp_path / "out"
    flags = argv(criteo_file, out, "--methods=qr,convert:int8", "--seeds=1", "--epochs=2", "--time")
    assert sweep.main(flags) == 0, capsys.readouterr().err
    content = json.loads((out / "sweep.json").read_text())
    runs = {run["label"]: run for run in content["runs"]}
    assert set(runs) == {"source", "plain", "qr", "convert:int8"} and len(runs.pop("source")["epochs"]) == 1
    assert all(len(run["epochs"]) == 2 and run["epochs"][0]["auc"] for run in runs.values())
    converted, plain = runs["convert:int8"]["epochs"][0], runs["plain"]["epochs"][0]  # both after one epoch
    assert converted["train_loss"] is None and converted["log_loss"] == pytest.approx(plain["log_loss"], abs=1e-3)
    assert runs["plain"]["ratio"] == 1 and runs["qr"]["ratio"] >= 1.5
    assert runs["qr"]["bytes"] * runs["qr"]["ratio"] == pytest.approx(runs["plain"]["bytes"])
    assert set(content["times"]) == {"plain", "qr 1.5x", "convert:int8"} and all(times["step_ms"] > 0 for times in content["times"].values())
    assert (out / "frontier.png").read_bytes().startswith(b"\x89PNG") and not list((out / "work").iterdir())
    text = (out / "sweep.json").read_text() + (out / "frontier.md").read_text()
    assert str(criteo_file) not in text


def test_figures_of_an_epoch(tmp_path):
    path = tmp_path / "metrics.jsonl"
    test = {"auc": 0.7, "log_loss": 0.5, "accuracy": 0.8, "normalized_entropy": 0.9, "calibration": 1.0, "num_rows": 5}
    rows = [
        {"kind": "start", "step": 10},  # taken up from a checkpoint
        {"kind": "train", "step": 15, "loss": 9.0},  # ends in the first half
        {"kind": "train", "step": 18, "loss": 0.4},
        {"kind": "train", "step": 20, "loss": 0.9},
        {"kind": "test", "step": 20, **test},
        {"kind": "train", "step": 30, "loss": 0.3},
        {"kind": "test", "step": 30, **test},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    first, second = sweep_run.read_epochs(path)
    assert first["train_loss"] == pytest.approx((3 * 0.4 + 2 * 0.9) / 5) and second["train_loss"] == 0.3
    path.write_text(json.dumps(rows[0]) + "\n" + json.dumps({"kind": "test", "step": -1, **test}))
    assert sweep_run.read_epochs(path)[0]["train_loss"] is None


def test_a_failing_run_stops_no_other_and_is_tried_again(stand_in, criteo_file, tmp_path, capsys):
    out = tmp_path / "out"
    flags = argv(criteo_file, out, "--methods=md,qr", "--seeds=1", "--epochs=1")
    assert sweep.main(flags) == 1
    failed = json.loads((out / "runs" / "md_1.5x-s123.json").read_text())
    assert failed["error"] == "no luck today" and "epochs" not in failed
    assert "md_1.5x-s123: failed: no luck today" in capsys.readouterr().err
    assert "- md 1.5x: no luck today" in (out / "frontier.md").read_text()
    assert "no luck today" in (out / "failed" / "md_1.5x-s123.txt").read_text()
    assert sorted(calls(stand_in)) == ["md_1.5x-s123", "plain-s123", "qr_1.5x-s123"]
    assert sweep.main(flags) == 1
    assert sorted(calls(stand_in))[:2] == ["md_1.5x-s123"] * 2 and len(calls(stand_in)) == 4


def test_a_budget_that_no_knob_meets_is_no_failure(stand_in, criteo_file, tmp_path):
    out = tmp_path / "out"
    assert sweep.main(argv(criteo_file, out, "--methods=qr", "--seeds=1", "--epochs=1", "--ratios=100000")) == 0
    assert calls(stand_in) == ["plain-s123"]
    assert "- qr 100000x: --compress-to=100000x: the tables would have to fit" in (out / "frontier.md").read_text()


def test_the_table_says_what_the_figures_say(stand_in, criteo_file, tmp_path):
    out = tmp_path / "out"
    assert sweep.main(argv(criteo_file, out, "--methods=qr", "--seeds=3", "--epochs=2")) == 0
    cells = {}
    for line in (out / "frontier.md").read_text().splitlines():
        if line.startswith(("| plain", "| qr")):
            cells[line.split("|")[1].strip()] = [cell.strip() for cell in line.split("|")[1:-1]]
    content = json.loads((out / "sweep.json").read_text())
    for label in ("plain", "qr"):
        runs = [run for run in content["runs"] if run["label"] == label]
        firsts = [run["epochs"][0]["auc"] for run in runs]
        mean = sum(firsts) / 3
        spread = (sum((value - mean) ** 2 for value in firsts) / 2) ** 0.5
        best = sum(max(epoch["auc"] for epoch in run["epochs"]) for run in runs) / 3
        assert cells[label][4] == f"{mean:.4f} ± {spread:.4f}" and cells[label][5].startswith(f"{best:.4f}")
        assert cells[label][3] == f"{runs[0]['ratio']:.3g}x"
        # the second half of an epoch: 3 batches at 0.5, 3 at 0.4; a tenth less in the second epoch
        assert cells[label][8].startswith("0.1500") and cells[label][9].startswith("0.2500")


def test_killed_and_taken_up_again(stand_in, criteo_file, tmp_path):
    """Ctrl-C while runs of the second seed are at work: they end, and those of the first are not done again."""
    out, wait = tmp_path / "out", stand_in / "wait"
    wait.touch()
    flags = argv(criteo_file, out, "--methods=qr", "--seeds=2", "--epochs=1")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import dlrm_xla; from pathlib import Path; from compression import sweep, sweep_run; "
        f"sweep_run.ROOT = Path({str(stand_in)!r}); sys.exit(sweep.main(sys.argv[1:]))"
    )
    child = subprocess.Popen([sys.executable, "-c", code, *flags], stderr=subprocess.PIPE, text=True)
    waiting = ["plain-s123", "plain-s124", "qr_1.5x-s123", "qr_1.5x-s124"]
    deadline = time.monotonic() + 100
    while not (stand_in / "calls.txt").exists() or sorted(calls(stand_in)) != waiting:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    running = subprocess.run(["pgrep", "-f", str(stand_in / "run_dlrm.py")], capture_output=True, text=True).stdout.split()
    assert len(set(running) - {str(os.getpid())}) >= 2
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and "interrupted; the same command goes on" in err and "Traceback" not in err
    assert not [pid for pid in running if os.path.exists(f"/proc/{pid}") and _runs_stand_in(pid, stand_in)]
    wait.unlink()
    done = {path.name: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert set(done) == {"plain-s123.json", "qr_1.5x-s123.json"}
    assert sweep.main(flags) == 0
    assert sorted(calls(stand_in)[4:]) == ["plain-s124", "qr_1.5x-s124"]
    assert all((out / "runs" / name).stat().st_mtime_ns == when for name, when in done.items())


def _runs_stand_in(pid: str, stand_in) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline") as file:
            return str(stand_in / "run_dlrm.py") in file.read()
    except OSError:
        return False


BAD = (
    (("--methods=ttt",), "--methods: 'ttt' is no compression method"),
    (("--methods=qr:collision=3",), "--methods: qr:collision: qr has no knob of that name"),
    (("--ratios=10,x",), "--ratios=10,x: 'x' is not a number from 1 to 999999"),
    (("--ratios=0.5",), "is not a number from 1 to 999999"),
    (("--seeds=0",), "--seeds=0: must be at least 1"),
    (("--jobs=-1",), "--jobs=-1: must be at least 1"),
    (("--flags=--nepochs=4",), "--flags: --nepochs=4: the sweep sets --nepochs itself"),
    (("--flags=--mini-batch-siz=x",), "invalid int value"),
    (("--flags='",), "--flags='"),
    ((f"--out={ROOT}/sweep",), "lies in the project's folder"),
    (("--frobnicate",), "--frobnicate"),
)


@pytest.mark.parametrize("flags, message", BAD, ids=lambda value: re.sub(r"\W+", "_", value[0])[-40:] if isinstance(value, tuple) else "")
def test_bad_input(flags, message, tmp_path, capsys):
    assert sweep.main([f"--out={tmp_path / 'out'}", "--raw-data-file=none.txt", *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]


def test_other_flags_need_another_folder(stand_in, criteo_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep.main(argv(criteo_file, out, "--methods=plain", "--seeds=1", "--epochs=1")) == 0
    assert sweep.main(argv(criteo_file, out, "--methods=plain", "--seeds=1", "--epochs=2")) == 2
    assert "holds runs with other flags (--epochs=1)" in capsys.readouterr().err


def test_the_plan():
    assert sweep_plan.parse_methods("qr:operation=add,collisions=3,md") == ["plain", "qr:operation=add,collisions=3", "md"]
    everything = sweep_plan.parse_methods("")
    assert set(sweep_plan.BASELINES) < set(everything) and "qr" in everything
    runs = sweep_plan.plan(everything, ["3x", "10x"], 2)
    assert len({run.key for run in runs}) == len(runs)
    assert [run for run in runs if run.label == "qr"] == [Run("qr", r, s, "train", "qr", r) for s in (123, 124) for r in ("3x", "10x")]
    assert len([run for run in runs if run.label == "lpt"]) == 2  # nothing sets its size
    slow = next(run for run in runs if run.label == "slow")
    assert slow.flags(0.02) == ("--numpy-rand-seed=123", "--learning-rate=0.01")


def test_labels_do_not_overlap():
    assert spread_out([0.1, 0.12, 0.5], 0.1) == pytest.approx([0.06, 0.16, 0.5])
    assert spread_out([0.95, 0.97, 0.99], 0.1) == pytest.approx([0.8, 0.9, 1.0])


def test_a_folder_without_a_sweep(tmp_path, capsys):
    assert frontier.main([str(tmp_path)]) == 2
    assert "give the folder of a sweep" in capsys.readouterr().err
