"""Kill a run, resume it, and the remaining losses are bitwise those of a run that nobody killed."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, SMALL, Outcome

LONG = (
    *SMALL, "--num-batches=40", "--nepochs=2", "--test-freq=15", "--print-freq=3", "--save-model=m.pt", "--save-every=4",
    "--lr-num-warmup-steps=8", "--lr-decay-start-step=20", "--lr-num-decay-steps=50",
)  # fmt: skip


def log_lines(text: str) -> list[str]:
    """What a reader of the log compares: loss and accuracy lines, timing left out (it prints as -1.00)."""
    return [line for line in text.splitlines() if line.startswith(("Finished", "Testing at", " accuracy"))]


@pytest.mark.parametrize("device", ["cpu", "xla"])
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rwsadagrad"])
def test_resume_is_bitwise(cli, capsys, optimizer, device):
    """From every kind of place: inside an epoch, at its end, in the second one."""
    flags = (*LONG, f"--optimizer={optimizer}", "--print-freq=1")
    whole = cli(*flags, "--save-model=whole.pt", device=device)
    assert whole.code == 0, whole.err
    final = torch.load("whole.pt", weights_only=True)
    places = (12, 40, 52) if device == "cpu" else (52,)
    for done in places:
        cut = stopped_after(cli, flags, done, device, capsys)
        resumed = cli(*flags, "--load-model=m.pt", "--save-model=end.pt", device=device)
        assert resumed.code == 0, resumed.err
        assert log_lines(cut.out) + log_lines(resumed.out) == log_lines(whole.out)
        end = torch.load("end.pt", weights_only=True)
        for name, weight in final["state_dict"].items():
            assert torch.equal(weight, end["state_dict"][name]), f"{name} differs after resuming at batch {done}"


def stopped_after(cli, flags, done, device, capsys) -> Outcome:
    """A run that ends, as if killed, when `done` batches have been trained and saved."""
    from dlrm_xla import session

    class Killed(BaseException):
        pass

    original, seen = session.Session.save, []

    def save(self, path):
        original(self, path)
        seen.append(self.progress.epoch * self.progress.num_batches + self.progress.batch)
        if seen[-1] == done and "best" not in path.name:
            raise Killed

    session.Session.save = save
    try:
        with pytest.raises(Killed):
            cli(*flags, device=device)
    finally:
        session.Session.save = original
    return Outcome(0, capsys.readouterr().out, "")


SAVING_ALL_THE_TIME = [sys.executable, str(ROOT / "run_dlrm.py"), *LONG, "--num-batches=100", "--save-every=1", "--device=cpu"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = subprocess.run(SAVING_ALL_THE_TIME, cwd=folder, capture_output=True, text=True, timeout=120)
    assert whole.returncode == 0, whole.stderr
    return log_lines(whole.stdout)


@pytest.mark.parametrize("delay", [0.0, 0.15, 0.4])
def test_kill_minus_9(tmp_path, undisturbed, delay):
    """A process killed by the system at an arbitrary moment, possibly in the middle of writing a checkpoint."""
    command = SAVING_ALL_THE_TIME
    victim = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    for line in victim.stdout:
        if line.startswith("Finished training it 30/"):
            break
    time.sleep(delay)
    os.kill(victim.pid, signal.SIGKILL)
    victim.wait()
    victim.stdout.close()
    resumed = subprocess.run([*command, "--load-model=m.pt"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert resumed.returncode == 0, resumed.stderr
    tail = log_lines(resumed.stdout)
    assert len(tail) > 10
    assert tail == undisturbed[-len(tail) :]
    assert victim.returncode == -signal.SIGKILL


def test_resume_after_the_first_epoch_ends(cli):
    """Upstream spins for ever here."""
    flags = (*SMALL, "--save-model=m.pt", "--save-every=12")
    assert cli(*flags, "--nepochs=2").code == 0
    outcome = cli(*flags, "--nepochs=3", "--load-model=m.pt")
    assert len(outcome.losses) == 12
    assert "of epoch 2" in outcome.out


def test_a_finished_run_resumes_to_nothing(cli):
    flags = (*SMALL, "--save-model=m.pt", "--save-every=12")
    assert cli(*flags).code == 0
    outcome = cli(*flags, "--load-model=m.pt")
    assert outcome.code == 0
    assert outcome.losses == []


def test_what_a_killed_writer_left_is_removed(cli, tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    stale, alive = tmp_path / f".m.pt.{gone.pid}.tmp", tmp_path / f".m.pt.{os.getppid()}.tmp"
    for path in (stale, alive):
        path.write_bytes(b"half")
    assert cli(*SMALL, "--save-model=m.pt", "--save-every=12").code == 0
    assert not stale.exists() and alive.exists()
