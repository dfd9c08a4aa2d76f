"""Ranks as processes, for tests: started as mpirun would start them, waited for, ended."""

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT

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
