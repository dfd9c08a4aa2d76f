"""Where a step runs. `make` picks the backend; torch_xla is imported in xla.py only."""

import os
from pathlib import Path

from dlrm_xla.backends.base import Backend
from dlrm_xla.backends.collectives import Collectives


def resolve(device: str) -> str:
    """"auto" as "cpu", "cuda" or "xla": a TPU, else CUDA, else the CPU."""
    if device == "auto":
        return "xla" if tpu_present() else "cuda" if cuda_present() else "cpu"
    return device


def make(device: str, collectives: Collectives | None = None, local_rank: int = 0, spmd: bool = False) -> Backend:
    """UserError where the machine does not have it.

    device       "auto" | "cpu" | "cuda" | "xla"
    collectives  None: one rank, or on XLA those of its runtime
    local_rank   number of the CUDA device
    spmd         all XLA devices in this process
    """
    device = resolve(device)
    if device == "xla" and spmd:
        from dlrm_xla.backends.xla_spmd import SpmdBackend

        return SpmdBackend()
    if device == "xla":
        from dlrm_xla.backends.xla import XlaBackend

        return XlaBackend(collectives)
    from dlrm_xla.backends.eager import EagerBackend

    return EagerBackend(device, collectives, local_rank)


def make_tracer(world: int = 1):
    """The XLA backend that hands out programs instead of running them (xla.py). It leaves a TPU alone where there is one.

    world: chips that run the program together; they all run the same
    """
    os.environ["PJRT_DEVICE"] = "CPU"  # torch_xla reads it as it starts
    from dlrm_xla.backends.xla import XlaCollectives, XlaTracer

    return XlaTracer(XlaCollectives(0, world) if world > 1 else None)


def tpu_present() -> bool:
    return os.environ.get("PJRT_DEVICE") == "TPU" or any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def tpu_chips() -> int:
    """Of this host, counted without starting the runtime, which the processes spawned later have to start themselves."""
    if os.environ.get("TPU_VISIBLE_CHIPS"):
        return len(os.environ["TPU_VISIBLE_CHIPS"].split(","))
    return len(list(Path("/dev").glob("accel[0-9]*"))) or len(list(Path("/dev/vfio").glob("[0-9]*")))


def runs_on_tpu() -> bool:
    """Whether --device=xla is a TPU here and not XLA's CPU backend."""
    return tpu_present() and os.environ.get("PJRT_DEVICE", "TPU") == "TPU"


def spawn(fn, num_cores: int) -> int:
    """Runs fn(index) in a process for each chip of this host; 1: in this process. Gives an exit code; what fn exits with passes through."""
    from dlrm_xla.backends import xla

    return xla.spawn(fn, num_cores)


def xla_place() -> tuple[int, int, int, int, str]:
    """Of a process that was spawned: rank, world, number on its host, processes on its host, address of rank 0. Starts the runtime."""
    from dlrm_xla.backends import xla

    return xla.place()


def cuda_present() -> bool:
    import torch

    return torch.cuda.is_available()
