"""Several ranks: how they meet, and that whatever goes wrong on one ends all of them with one line and no wait. Real processes over gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, xla_or_skip
from jobs import LIMIT, WORKER, Ended, Job


@pytest.fixture
def run_ranks(tmp_path):
    """run_ranks(world, *flags, per_rank=None): run_dlrm.py to its end."""

    def run(world: int, *flags: str, per_rank=None, port: int = 0) -> Ended:
        return Job(tmp_path, world, [str(ROOT / "run_dlrm.py"), *SMALL, "--device=cpu", *flags], per_rank, port).ended()

    return run


def worker(folder: Path, world: int, what: str) -> Job:
    return Job(folder, world, [WORKER, what])


# a run that goes well


def test_torchrun_prints_upstreams_lines_from_the_first_rank_and_ends_well(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(ROOT / "run_dlrm.py"), *SMALL]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--device=cpu", "--log-dir=run", "--test-freq=6"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines.count("Running on 2 ranks using gloo backend") == 1
    for rank in (0, 1):
        assert lines.count(f"world size: 2, current rank: {rank}, local rank: {rank}") == 1
    assert lines.count("Using CPU...") == 1
    assert len([line for line in lines if line.startswith("Finished training it 12/12")]) == 1
    assert not [line for line in lines if "Gloo" in line]
    about = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert (about["world_size"], about["dist_backend"]) == (2, "gloo")
    assert len([line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"kind": "start"' in line]) == 1


def test_a_run_goes_on_with_other_ranks_and_is_exported(run_ranks, tmp_path):
    """Saved by 2 ranks in the middle of an epoch, resumed by 4 and by 1; the folder becomes one file, with which one rank goes on too."""

    def losses(ended: Ended) -> dict[int, float]:
        assert ended.codes == [0] * len(ended.codes), ended.err
        lines = re.findall(r"Finished training it (\d+)/\d+ of epoch 0, .* loss ([\d.]+)", ended.out[0])
        return {int(batch): float(loss) for batch, loss in lines}

    folder = tmp_path / "model"
    flags = ["--optimizer=rwsadagrad", "--print-freq=1"]
    whole = losses(run_ranks(2, *flags))
    first = losses(run_ranks(2, *flags, "--num-batches=8", f"--save-model={folder}", "--save-every=8"))
    assert list(first) == list(range(1, 9)) and len(list(folder.glob("save-*"))) == 1
    for world in (4, 1):
        rest = losses(run_ranks(world, *flags, f"--load-model={folder}"))
        assert list(rest) == [9, 10, 11, 12]
        assert first | rest == pytest.approx(whole, abs=2e-6)
    exported = tmp_path / "one.pt"
    command = [sys.executable, "-m", "dlrm_xla.export_checkpoint", str(folder), str(exported)]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, timeout=LIMIT).returncode == 0
    assert first | losses(run_ranks(1, *flags, f"--load-model={exported}")) == pytest.approx(whole, abs=2e-6)


# mistakes before the first step


@pytest.mark.parametrize(
    "per_rank, flags, message",
    [
        ({1: ["--learning-rate=0.3"]}, [], "error: --learning-rate=0.1 on rank 0 and --learning-rate=0.3 on rank 1: must be the same on all ranks"),
        ({1: ["--nepochs=-3"]}, [], "error: rank 1: --nepochs=-3: must be at least 0"),
        (None, ["--mini-batch-size=33"], "error: --mini-batch-size=33: is the batch of all 2 ranks together .* use 32 or 34"),
        (None, ["--device=xla"], "error: --device=xla: torchrun and MPI start processes for gloo and nccl, .*--spmd"),
    ],
)
def test_mistakes_in_flags_are_one_line_from_the_first_rank(run_ranks, per_rank, flags, message):
    if flags == ["--device=xla"]:
        flags = ["--device=cpu", *flags]
    ended = run_ranks(2, *flags, per_rank=per_rank)
    assert re.fullmatch(message, ended.line) and ended.line in ended.err[0]
    assert ended.codes == [2, 2]


def trained(folder: Path, *flags: str) -> None:
    """A checkpoint m.pt of one rank in a folder."""
    folder.mkdir()
    first = subprocess.run(
        [sys.executable, str(ROOT / "run_dlrm.py"), *SMALL, "--device=cpu", "--save-model=m.pt", "--save-every=12", *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert first.returncode == 0, first.stderr


def test_hosts_with_different_checkpoints_end(tmp_path):
    """Of one position, but not the same: each rank would go on with tables of its own."""
    trained(tmp_path / "rank0")
    trained(tmp_path / "rank1", "--numpy-rand-seed=7")
    ended = Job(tmp_path, 2, [str(ROOT / "run_dlrm.py"), *SMALL, "--device=cpu", "--load-model=m.pt"]).ended()
    assert re.fullmatch(r"error: --load-model=m.pt: content=check sum \w+ on rank 0 and .* on rank 1: must be the same on all ranks", ended.line)
    assert ended.codes == [2, 2]


def test_what_one_host_lacks_ends_all(tmp_path):
    """A checkpoint that rank 1 cannot read: the others come to the same point, see its message and end."""
    from test_bad_input import files_in

    trained(tmp_path / "rank0")
    ended = Job(tmp_path, 2, [str(ROOT / "run_dlrm.py"), *SMALL, "--device=cpu", "--load-model=m.pt"]).ended()
    assert ended.line == "error: rank 1: --load-model=m.pt: cannot be read (No such file or directory)"
    assert ended.line in ended.err[0] and ended.codes == [2, 2]
    assert not files_in(tmp_path / "rank1")


def test_a_port_in_use_is_one_line(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        job = Job(tmp_path, 2, [WORKER, "forever"], port=port)
        job.processes[0].wait(LIMIT)
        ended = job.ended(stopped=1)  # it gives up after 22 s
    assert ended.line == f"error: MASTER_PORT={port}: is in use on this host; set MASTER_PORT to a free port, the same for all ranks"
    assert ended.codes[0] == 2


def test_gloo_is_kept_from_tensors_on_xla(tmp_path):
    """It would leave them as they are."""
    xla_or_skip()
    ended = worker(tmp_path, 2, "xla").ended()
    assert ended.line.startswith("error: --device=xla: torch.distributed does not reach tensors on XLA")


# a rank that fails or is lost


@pytest.mark.parametrize(
    "world, what, rank, number, codes, message",
    [
        (3, "forever", 1, signal.SIGKILL, [3, -9, 3], r"error: rank 1 has died \(.*\); go on with X"),
        (2, "forever", 0, signal.SIGKILL, [-9, 3], r"error: rank 0 has died or does not answer, and with it the store .*; go on with X"),
        (2, "sleep", 0, signal.SIGKILL, [-9, 3], r"error: rank 0 has died or does not answer, .*"),
        (2, "forever", 1, signal.SIGSTOP, [3, -9], r"error: rank 1 has said nothing for 6 s \(stopped or killed, .*; go on with X"),
        (2, "forever", None, signal.SIGTERM, None, r"(terminated|error: rank \d was terminated); go on with X"),  # one gets the signal first
        (2, "forever", None, signal.SIGINT, [130, 130], "interrupted.*"),
        (2, "error", None, None, [2, 2], "error: rank 1: its disk is full"),
        (2, "crash", None, None, [3, 3], r"error: rank 1: KeyError: 'no such thing' \(a fault of the program; its traceback is above\)"),
    ],
)
def test_a_rank_that_is_lost_ends_all(tmp_path, world, what, rank, number, codes, message):
    job = worker(tmp_path, world, what)
    job.ready()
    if number is not None:
        for process in job.processes if rank is None else [job.processes[rank]]:
            process.send_signal(number)
    started = time.monotonic()
    ended = job.ended(stopped=rank if number == signal.SIGSTOP else None)
    assert time.monotonic() - started < 30
    assert re.fullmatch(message, ended.line)
    assert ended.codes == codes if codes is not None else set(ended.codes) <= {3, 143}
    assert any(ended.line in err for err in ended.err) if rank is None else ended.line in ended.err[1 if rank == 0 else 0]
