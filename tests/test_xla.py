"""On XLA: one program for training and one for the test, none after warm-up, no operator on the host."""

import json
from pathlib import Path

import pytest
from conftest import SMALL

SCHEDULE = ("--lr-num-warmup-steps=4", "--lr-decay-start-step=6", "--lr-num-decay-steps=20")


def records(folder: str) -> list[dict]:
    rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row["kind"] == "train"]


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
@pytest.mark.parametrize("method", [(), ("--qr-flag", "--qr-threshold=10"), ("--md-flag", "--md-threshold=2"), ("--weighted-pooling=learned",)])
def test_nothing_compiles_after_warm_up(cli, optimizer, method):
    """Two epochs of random bag lengths with tests, a learning rate that changes at every step, and a short last batch."""
    outcome = cli(
        *SMALL, "--num-batches=0", "--data-size=300", "--nepochs=2", "--print-freq=1", "--test-freq=5", f"--optimizer={optimizer}",
        *method, *SCHEDULE, "--log-dir=run", device="xla",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = records("run")
    assert len(rows) == 20
    compiles = [row["compiles"] for row in rows]
    first_test = 5  # batches: the test's program is compiled there
    assert compiles[0] == compiles[first_test - 1], "a training step was compiled again"
    assert compiles[first_test] - compiles[0] <= 1, "a test compiles one program"
    assert compiles[-1] == compiles[first_test], "something compiled after warm-up"
    assert {row["fallbacks"] for row in rows} == {0}


@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
@pytest.mark.parametrize("layout", ["rows", "packed"])
def test_two_hundred_steps_with_random_bag_lengths(cli, optimizer, layout):
    """One program, no operator on the host, and the losses of the CPU, whatever the layout there."""
    flags = (*SMALL, "--num-batches=200", "--num-indices-per-lookup=12", f"--optimizer={optimizer}", "--learning-rate=0.01", "--print-freq=10")
    outcome = cli(*flags, f"--table-layout={layout}", "--log-dir=run", device="xla")
    assert outcome.code == 0, outcome.err
    assert f"layout {layout}\n" in outcome.err
    rows = records("run")
    assert len(rows) == 20
    assert rows[0]["compiles"] == rows[-1]["compiles"], "something compiled after the first steps"
    assert {row["fallbacks"] for row in rows} == {0}
    for on_cpu in (cli(*flags), cli(*flags, "--table-layout=packed")):
        assert max(abs(a - b) for a, b in zip(on_cpu.losses, outcome.losses, strict=True)) < 1e-5


def test_losses_equal_the_cpu(cli):
    flags = (*SMALL, "--optimizer=rwsadagrad", "--num-indices-per-lookup=7")
    on_cpu, on_xla = cli(*flags).losses, cli(*flags, device="xla").losses
    assert len(on_cpu) == 12
    assert max(abs(a - b) for a, b in zip(on_cpu, on_xla, strict=True)) < 1e-5


def test_metrics_report(cli):
    outcome = cli(*SMALL, "--tpu-metrics-debug", device="xla")
    assert "Metric: CompileTime" in outcome.out
    assert "torch_xla's metrics exist on --device=xla only" in cli(*SMALL, "--tpu-metrics-debug").error
