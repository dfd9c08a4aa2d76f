"""What the benchmarks share: the machine they ran on, and how a result is written."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def say(text: str) -> None:
    print(text, flush=True)


def median(values: list[float]) -> float:
    return float(statistics.median(values))


def commit_of(checkout: Path) -> str:
    done = subprocess.run(["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def machine() -> dict:
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "?")
    try:
        import torch_xla

        xla = torch_xla.__version__
    except ImportError:
        xla = None
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "torch_xla": xla, "numpy": np.__version__}
    return {
        "cpu": model, "cores": psutil.cpu_count(), "memory_gb": round(psutil.virtual_memory().total / 1e9), "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(), "kernel": os.uname().release, "versions": versions,
    }  # fmt: skip


def heading(benchmark: str) -> dict:
    """The first keys of every result."""
    return {"benchmark": benchmark, "date": time.strftime("%Y-%m-%d"), "commit": commit_of(ROOT), "machine": machine()}


def finish(result: dict, out: Path | None) -> None:
    """The result as the last line of the output and, whole or not at all, in the file --out."""
    if out:
        beside = out.with_name(out.name + ".tmp")
        beside.write_text(json.dumps(result, indent=1) + "\n")
        os.replace(beside, out)
    print(json.dumps(result))
