"""Several ranks: how they meet, and that whatever goes wrong on one ends all of them with one line and no wait. Real processes over gloo."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, xla_or_skip

from dlrm_xla import backends, flags, launch, xla_spawn
from dlrm_xla.board import differing
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

WORKER = str(ROOT / "tests" / "rank_worker.py")
LIMIT = 60  # seconds for any of these commands


@dataclass
class Ended:
    codes: list[int]
    out: list[str]  # of each rank
    err: list[str]

    @property
    def line(self) -> str:
        """The one line, from whichever rank, that says why; every rank has failed."""
        assert 0 not in self.codes and None not in self.codes, (self.codes, self.err)
        lines = [line for text in self.err for line in text.splitlines() if line.startswith(("error: ", "interrupted", "terminated"))]
        assert len(lines) == 1, self.err
        return lines[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


class Job:
    """Ranks as mpirun would start them, each with a folder of its own."""

    def __init__(self, folder: Path, world: int, command: list[str], per_rank: dict[int, list[str]] | None = None, port: int = 0):
        self.processes, port = [], port or free_port()
        for rank in range(world):
            place = folder / f"rank{rank}"
            place.mkdir(exist_ok=True)
            env = {
                **os.environ, "PMI_SIZE": str(world), "PMI_RANK": str(rank), "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": str(world),
                "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            argv = [sys.executable, *command, *(per_rank or {}).get(rank, [])]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            self.processes.append(subprocess.Popen(argv, cwd=place, env=env, text=True, **streams))

    def ready(self) -> None:
        for process in self.processes:
            assert process.stdout.readline() == "ready\n", process.communicate()

    def ended(self, stopped: int | None = None) -> Ended:
        """stopped: a rank that cannot end by itself; it is killed once the others have ended."""
        until = time.monotonic() + LIMIT
        try:
            for rank, process in enumerate(self.processes):
                if rank != stopped:
                    process.wait(until - time.monotonic())
        finally:
            for process in self.processes:
                process.kill()
        texts = [process.communicate() for process in self.processes]
        return Ended([process.returncode for process in self.processes], [out for out, _ in texts], [err for _, err in texts])


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


# the parts


@pytest.fixture
def environment(monkeypatch):
    """environment(**variables): none of a launcher's but these."""

    def settings(**variables: str):
        for name in (*launch.SIZE, *launch.RANK, *launch.LOCAL_RANK, *launch.LOCAL_SIZE, "MASTER_ADDR", "TORCHELASTIC_RUN_ID"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return settings


def test_places_come_from_the_launchers_variables(environment):
    environment()
    assert launch.find_place() == launch.Place()
    environment(WORLD_SIZE="1", RANK="0", LOCAL_RANK="0")
    assert launch.find_place() == launch.Place()
    environment(WORLD_SIZE="4", RANK="3", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", MASTER_ADDR="host0")
    assert launch.find_place() == launch.Place(3, 4, 1, 2, "host0")
    environment(OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="1", OMPI_COMM_WORLD_LOCAL_SIZE="2", WORLD_SIZE="9")
    assert launch.find_place() == launch.Place(1, 2, 1, 2)
    # torchrun in a shell that SLURM has started, alone or once on each host
    torchrun = {"TORCHELASTIC_RUN_ID": "none", "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    environment(**torchrun, PMI_SIZE="1", PMI_RANK="0")
    assert launch.find_place() == launch.Place(3, 4, 1, 2)
    environment(**torchrun, OMPI_COMM_WORLD_SIZE="2", OMPI_COMM_WORLD_RANK="1", OMPI_COMM_WORLD_LOCAL_RANK="0")
    assert launch.find_place() == launch.Place(3, 4, 1, 2)
    environment(WORLD_SIZE="two")
    with pytest.raises(UserError, match="WORLD_SIZE=two: the launcher's variable must be a whole number"):
        launch.find_place()
    environment(WORLD_SIZE="2", RANK="2")
    with pytest.raises(UserError, match="rank 2 of 2 ranks"):
        launch.find_place()


def test_the_first_difference_between_ranks_is_named():
    assert differing([{"a": 1, "b": 2}] * 3, "--{name}") is None
    error = differing([{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 7, "b": 3}], "--{name}", without=("a",))
    assert str(error) == "--b=2 on rank 0 and --b=3 on rank 2: must be the same on all ranks"


def test_more_ranks_than_cuda_devices(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launch.check_devices(2, 1)
    for world, rank in ((3, 0), (2, 2)):
        with pytest.raises(UserError, match="--device=cuda: 3 ranks on this host need 3 CUDA devices and it has 2; start 2 with torchrun"):
            launch.check_devices(world, rank)


@pytest.mark.parametrize(
    "wished, chips, expected", [(0, 4, 4), (4, 4, 4), (1, 4, 1), (0, 1, 1), (8, 4, "this host has 4 TPU chip"), (2, 4, "one chip")]
)
def test_processes_for_the_chips_of_a_host(monkeypatch, wished, chips, expected):
    monkeypatch.setattr(backends, "runs_on_tpu", lambda: True)
    monkeypatch.setattr(backends, "tpu_chips", lambda: chips)
    if isinstance(expected, int):
        assert launch.check_cores("--tpu-cores", wished) == expected
    else:
        with pytest.raises(UserError, match=f"--tpu-cores={wished}: .*{expected}"):
            launch.check_cores("--tpu-cores", wished)


def test_a_tpu_host_starts_a_process_for_each_chip(cli, monkeypatch):
    import run_dlrm

    monkeypatch.setattr(backends, "runs_on_tpu", lambda: True)
    monkeypatch.setattr(backends, "tpu_chips", lambda: 4)
    started = []
    monkeypatch.setattr(backends, "spawn", lambda fn, cores: started.append((fn, cores)) or 0)
    assert cli(*SMALL, device="xla").code == 0
    assert cli(*SMALL, "--tpu_num_cores=4", device="xla").code == 0
    assert started == [(run_dlrm._mp_fn, 0), (run_dlrm._mp_fn, 4)]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--tpu-cores=8", "--tpu_num_cores=4"], "--tpu-cores=8 and --tpu_num_cores=4 mean the same and differ"),
        (["--tpu_num_cores=8"], "--tpu-cores=8: is for --device=xla"),
        (["--tpu-cores=-1"], "--tpu-cores=-1: must be at least 1"),
        (["--dist-backend=mpi"], "--dist-backend=mpi: .*gloo"),
        (["--dist-backend=nccl"], "--dist-backend=nccl: connects CUDA devices"),
        (["--local_rank=-2"], "--local_rank=-2: must be at least 0"),
        (["--spmd"], "--spmd: .*add --device=xla"),
        (["--plan-ranks=2"], "--plan-ranks=2: is for --plan-only"),
        (["--plan-only", "--plan-ranks=3"], "--mini-batch-size=32: is the batch of all 3 ranks together"),
    ],
)
def test_flags_of_one_process(cli, argv, message):
    assert re.match(message, cli(*SMALL, *argv).error)


def test_spmd_refuses_weights_as_long_as_tables(cli):
    assert "--spmd: learned pooling weights are dense" in cli(*SMALL, "--spmd", "--weighted-pooling=learned", device="xla").error


def test_xlas_cpu_backend_is_one_process(cli, monkeypatch):
    monkeypatch.setattr(backends, "runs_on_tpu", lambda: False)
    assert "collectives between several devices of one process never end" in cli(*SMALL, "--tpu-cores=4", device="xla").error


def test_batches_must_divide_among_ranks():
    from dlrm_xla.rules import check_world

    config = Config.from_args(flags.parse([*SMALL, "--test-mini-batch-size=10"]))
    check_world(config, 2)
    with pytest.raises(UserError, match="--test-mini-batch-size=10: .* use 8 or 12"):
        check_world(config, 4)


def test_plan_only_prints_a_plan_and_leaves_nothing(cli, tmp_path):
    outcome = cli(*SMALL, "--plan-only", "--plan-ranks=2", "--optimizer=adagrad")
    assert outcome.code == 0 and outcome.err == ""
    assert "rank" in outcome.out and not list(tmp_path.iterdir())


# the launcher xla_spawn


def spawned(monkeypatch, *argv: str) -> tuple[int, list]:
    """xla_spawn.main's exit code, and what it would have started."""
    started = []
    monkeypatch.setattr(sys, "argv", ["xla_spawn"])
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(backends, "spawn", lambda fn, cores: started.append((fn.__module__, fn.__name__, cores, sys.argv[1:])) or 0)
    return xla_spawn.main(list(argv)), started


def test_xla_spawn_hands_flags_and_cores_to_the_script(monkeypatch):
    monkeypatch.setattr(backends, "runs_on_tpu", lambda: True)
    monkeypatch.setattr(backends, "tpu_chips", lambda: 8)
    code, started = spawned(monkeypatch, "--num_cores", "8", str(ROOT / "run_dlrm.py"), "--nepochs=2", "--device=xla")
    assert (code, started) == (0, [("run_dlrm", "_mp_fn", 8, ["--nepochs=2", "--device=xla", "--tpu_num_cores", "8"])])


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--num_cores", "9", str(ROOT / "run_dlrm.py")], "error: --num_cores=9: this host has 8 TPU chip"),
        (["missing.py"], "error: missing.py: is not there"),
        ([str(ROOT / "README.md")], "must be a Python file"),
        ([str(ROOT / "tests" / "made_source.py")], "has no function _mp_fn"),
        ([], "the following arguments are required: script"),
    ],
)
def test_xla_spawn_refuses_in_one_line(monkeypatch, capsys, argv, message):
    monkeypatch.setattr(backends, "runs_on_tpu", lambda: True)
    monkeypatch.setattr(backends, "tpu_chips", lambda: 8)
    code, started = spawned(monkeypatch, *argv)
    err = capsys.readouterr().err
    assert code == 2 and started == [] and message in err and len(err.splitlines()) == 1


def test_xla_spawn_trains_on_xlas_cpu_backend(tmp_path):
    xla_or_skip()
    command = [sys.executable, "-m", "dlrm_xla.xla_spawn", "--num_cores", "1", str(ROOT / "run_dlrm.py"), *SMALL, "--num-batches=2", "--device=xla"]
    env = {**os.environ, "PJRT_DEVICE": "CPU", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr
    assert "Using XLA:CPU..." in done.stdout and "Finished training it 2/2" in done.stdout
