"""What a run prints: stdout is upstream's byte for byte, our figures are on stderr; and where the time goes."""

import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dlrm_xla.console import Console, Interval, Meter, duration
from dlrm_xla.metrics import TestMetrics

ROOT = Path(__file__).resolve().parent.parent
INTERVAL = Interval(samples_per_s=12_345.6, ms_per_it=3.824, data_wait_share=0.031, seconds_left=3725.0)
METRICS = TestMetrics(accuracy=0.484375, auc=0.7512, log_loss=0.5, normalized_entropy=0.9, calibration=1.01, num_rows=1000)
MLPERF = {"recall": 0.0, "precision": 0.0, "f1": 0.0, "ap": 0.48652, "roc_auc": 0.45871, "accuracy": 0.4921875}


def console(**options):
    out, err = io.StringIO(), io.StringIO()
    return Console(**options, out=out, err=err), out, err


def python(code, **options):
    """A fresh interpreter in which dlrm_xla can be imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-W", "error", "-c", code], env=env, text=True, timeout=60, **options)


# Console


def test_stdout_of_a_training_run_is_upstreams():
    c, out, err = console()
    c.world()
    c.device()
    c.loading("m.pt")
    c.loaded(epoch=0, num_epochs=1, batch=6, num_batches=6, num_test_batches=6, loss=1.0384103, accuracy=0.484375)
    c.header()
    c.train(1, 6, 0, 1.2335268, INTERVAL)
    c.testing(1, 6, 0)
    c.accuracy(0.484375, 0.5)
    c.test_figures(METRICS)
    c.saving("m.pt")
    c.testing_only()
    assert out.getvalue() == (
        "world size: 1, current rank: 0, local rank: 0\n"
        "Using CPU...\n"
        "Loading saved model m.pt\n"
        "Saved at: epoch = 0/1, batch = 6/6, ntbatch = 6\n"
        "Training state: loss = 1.038410\n"
        "Testing state: accuracy = 48.438 %\n"
        "time/loss/accuracy (if enabled):\n"
        "Finished training it 1/6 of epoch 0, -1.00 ms/it, loss 1.233527\n"
        "Testing at - 1/6 of epoch 0,\n"
        " accuracy 48.438 %, best 50.000 %\n"
        "Saving model to m.pt\n"
        "Testing for inference only\n"
    )
    assert err.getvalue() == (
        "  12,346 samples/s, 3.1 % of time waiting for data, 1:02:05 left\n"
        "  test: AUC 0.751200, log loss 0.500000, NE 0.900000, calibration 1.010000, 1,000 rows\n"
    )


def test_stdout_under_mlperf_and_with_times_is_upstreams():
    c, out, err = console(print_time=True, print_wall_time=True)
    c.device(num_gpus=2)
    c.arguments({"nepochs": 2, "weighted_pooling": None, "ln_emb": [4, 3]})
    c.loaded(0, 1, 6, 6, 6, 1.0, 0.5, auc=0.48449)
    c.train(6, 6, 1, 0.5, INTERVAL, compiles=3)
    c.mlperf(MLPERF, best_auc=0.45871, best_accuracy=0.0)
    c.threshold_reached("accuracy", 0.7)
    c.threshold_reached("auc", 0.8025)
    lines = out.getvalue().splitlines()
    assert re.fullmatch(r"Finished training it 6/6 of epoch 1, 3\.82 ms/it, loss 0\.500000 \(\d\d:\d\d\)", lines.pop(5))
    assert lines == [
        "Using 2 GPU(s)...",
        'command line args:  {"nepochs": 2, "weighted_pooling": null, "ln_emb": [4, 3]}',
        "Saved at: epoch = 0/1, batch = 6/6, ntbatch = 6",
        "Training state: loss = 1.000000",
        "Testing state: accuracy = 50.000 %, auc = 0.484",
        "recall 0.0000, precision 0.0000, f1 0.0000, ap 0.4865, auc 0.4587, best auc 0.4587, accuracy 49.219 %, best accuracy 0.000 %",
        "MLPerf testing accuracy threshold 0.7 reached, stop training",
        "MLPerf testing auc threshold 0.8025 reached, stop training",
    ]
    assert err.getvalue().count("3 compiles") == 1


def test_no_bar_without_a_terminal():
    c, out, err = console()
    c.start_bar(10)
    c.advance()
    c.line("x")
    c.close_bar()
    assert out.getvalue() == "x\n" and err.getvalue() == ""


TALK = """
from dlrm_xla.console import Console, Interval
c = Console()
c.start_bar(3)
for done in range(1, 4):
    c.advance()
    c.train(done, 3, 0, 0.5, Interval(1000.0, 1.0, 0.5, 9.0))
c.close_bar()
c.note("end")
"""
TRAINING_LINES = [f"Finished training it {done}/3 of epoch 0, -1.00 ms/it, loss 0.500000" for done in (1, 2, 3)]


def on_a_terminal(stdout_too):
    """TALK with stderr on a pseudo-terminal: (what stdout got, what the terminal got)."""
    ours, theirs = os.openpty()
    process = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", TALK],
        stdout=theirs if stdout_too else subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"},
    )
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    printed = b"" if stdout_too else process.stdout.read()
    if not stdout_too:
        process.stdout.close()
    assert process.wait(timeout=60) == 0
    return printed.decode(), shown.decode()


def as_seen(shown):
    """Lines as a terminal shows them: after a carriage return, letters are written over."""
    lines = []
    for raw in shown.replace("\r\n", "\n").split("\n"):
        cells = ""
        for part in raw.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines


def test_bar_and_lines_on_one_terminal_do_not_mix():
    _, shown = on_a_terminal(stdout_too=True)
    lines = as_seen(shown)
    assert [line for line in lines if "Finished" in line] == TRAINING_LINES
    assert any(line.startswith("100%") and "3/3" in line and "1,000 samples/s" in line for line in lines)
    assert "end" in lines
    assert not any(line.startswith("  1,000 samples/s") for line in lines), "on a terminal our figures are in the bar"


def test_bar_on_stderr_leaves_stdout_alone():
    printed, shown = on_a_terminal(stdout_too=False)
    assert printed.splitlines() == TRAINING_LINES
    assert "100%" in shown and "Finished" not in shown


def test_reader_of_stdout_goes_away():
    read, write = os.pipe()
    os.close(read)
    done = python(TALK, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert done.stderr.count("stdout has no reader any more; the run goes on") == 1
    assert done.stderr.endswith("end\n")


def test_full_disk_behind_stdout_is_a_user_error():
    code = """
import sys
from dlrm_xla.console import Console
from dlrm_xla.specs import UserError
try:
    Console().world()
except UserError as error:
    sys.stderr.write(str(error))
    sys.exit(2)
"""
    with open("/dev/full", "w") as full:
        done = python(code, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (2, "stdout cannot be written (No space left on device); free some space or send it elsewhere")


def test_letters_that_the_terminal_lacks():
    raw = io.BytesIO()
    c = Console(out=io.TextIOWrapper(raw, encoding="ascii"), err=io.StringIO())
    c.saving("mod\u00e8l.pt")
    assert raw.getvalue() == b"Saving model to mod\\xe8l.pt\n"


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3599, 360_000)] == ["0:00:00", "0:01:00", "0:59:59", "100:00:00"]


# Meter


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def batch(meter, clock, wait, step, rows=100):
    meter.waiting()
    clock.now += wait
    meter.arrived()
    clock.now += step
    meter.finished(rows)


def test_meter_counts_steps_waits_and_pauses_apart():
    clock = Clock()
    meter = Meter(10, clock=clock)
    for _ in range(4):
        batch(meter, clock, wait=0.1, step=0.3)
    with meter.paused():
        clock.now += 50
    first = meter.read()
    assert first.samples_per_s == pytest.approx(400 / 1.6)
    assert first.ms_per_it == pytest.approx(300)  # upstream's: without waiting and tests
    assert first.data_wait_share == pytest.approx(0.25)
    assert first.seconds_left == pytest.approx(6 * (0.4 + 50 / 4))
    batch(meter, clock, wait=0.0, step=0.1, rows=7)
    second = meter.read()
    assert (second.samples_per_s, second.ms_per_it, second.data_wait_share) == pytest.approx((70, 100, 0))


def test_meter_under_mlperf_counts_the_wait_as_upstream_does():
    clock = Clock()
    meter = Meter(2, count_wait=True, clock=clock)
    batch(meter, clock, wait=0.1, step=0.3)
    assert meter.read().ms_per_it == pytest.approx(400)


def test_meter_forgets_a_slow_start():
    clock = Clock()
    meter = Meter(1000, clock=clock)
    batch(meter, clock, wait=0, step=60)  # XLA compiles
    meter.read()
    for _ in range(100):
        batch(meter, clock, wait=0, step=0.1)
        interval = meter.read()
    assert interval.seconds_left == pytest.approx(899 * 0.1, rel=0.01)


def test_meter_without_batches():
    interval = Meter(0, clock=Clock()).read()
    assert (interval.samples_per_s, interval.ms_per_it, interval.seconds_left) == (0, 0, 0)
