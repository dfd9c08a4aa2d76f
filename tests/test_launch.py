"""How ranks are found and started: launchers' variables, chips of a TPU host, flags, xla_spawn. test_jobs.py starts real processes."""

import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, xla_or_skip
from jobs import LIMIT

from dlrm_xla import backends, flags, launch, xla_spawn
from dlrm_xla.board import differing
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

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

    config = Config.from_args(flags.parse([*SMALL, "--mini-batch-size=10", "--test-mini-batch-size=11"]))
    check_world(config, 2)
    with pytest.raises(UserError, match="--mini-batch-size=10: .* use 8 or 12"):
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
