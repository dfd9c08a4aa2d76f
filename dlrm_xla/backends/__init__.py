"""Where a step runs. `make` picks the backend; torch_xla is imported in xla.py only."""

import os
from pathlib import Path

from dlrm_xla.backends.base import Backend


def make(device: str) -> Backend:
    """device: "auto" | "cpu" | "cuda" | "xla". UserError where the machine does not have it. auto: a TPU, else CUDA, else the CPU."""
    if device == "auto":
        device = "xla" if tpu_present() else "cuda" if cuda_present() else "cpu"
    if device == "xla":
        from dlrm_xla.backends.xla import XlaBackend

        return XlaBackend()
    from dlrm_xla.backends.eager import EagerBackend

    return EagerBackend(device)


def make_tracer():
    """The XLA backend that hands out programs instead of running them (xla.py). It leaves a TPU alone where there is one."""
    os.environ["PJRT_DEVICE"] = "CPU"  # torch_xla reads it as it starts
    from dlrm_xla.backends.xla import XlaTracer

    return XlaTracer()


def tpu_present() -> bool:
    return os.environ.get("PJRT_DEVICE") == "TPU" or any(Path("/dev").glob("accel[0-9]*")) or any(Path("/dev/vfio").glob("[0-9]*"))


def cuda_present() -> bool:
    import torch

    return torch.cuda.is_available()
