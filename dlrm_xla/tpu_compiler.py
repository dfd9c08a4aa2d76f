"""The TPU compiler of libtpu, in a process of its own: it needs no TPU, and torch_xla must not meet its second XLA.

    python -m dlrm_xla.tpu_compiler JOB.json

JOB.json: {"topology": "v5e:2x2", "replicas": chips that run each program, "programs": [{"hlo": FILE, "donated": [parameter numbers],
"compiled": FILE to write}], "result": FILE to write}. The result: {"programs": [...], "versions": {...}} with, for each program, the fields of
`Compiled`; or {"error": message}.
"""

import ctypes
import importlib.metadata
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dlrm_xla.specs import UserError

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = "requirements-tpu-compiler.txt"
VERSIONS = {"jax": "0.7.1", "jaxlib": "0.7.1", "libtpu": "0.0.21"}  # what torch_xla 2.9.0 itself names for its TPU extras
# of each generation some that there are; tests/test_compile_for.py asks libtpu about them
TOPOLOGIES = {
    "v4": ("2x2x1", "2x2x2", "2x2x4", "4x4x4"), "v5e": ("2x2", "2x4", "4x4", "8x8", "16x16"),
    "v5p": ("2x2x1", "2x2x2", "2x2x4", "4x4x4"), "v6e": ("2x2", "2x4", "4x4", "8x8", "16x16"),
}  # fmt: skip
# two cores of a v4 chip are one device, as on a real v4 under torch_xla; the others have no such choice
CHIP_CONFIG = {"v4": {"chip_config_name": "megacore"}}
# what torch_xla sets for libtpu where it finds a TPU (torch_xla/__init__.py), so that the same compiler options are at work
FLAGS = {
    "xla_tpu_use_enhanced_launch_barrier": "false", "xla_latency_hiding_scheduler_rerun": "1",
    "xla_tpu_prefer_async_allgather_to_allreduce": "true", "xla_tpu_enable_flash_attention": "false",
}  # fmt: skip
FLAGS_V5 = {"xla_enable_async_all_gather": "true", "xla_enable_async_collective_permute": "true"}


@dataclass(frozen=True)
class Compiled:
    """error "" or the compiler's message; text of the optimized program; bytes of its memory on one chip; seconds it took."""

    error: str
    text: str
    arguments: int = 0
    outputs: int = 0
    aliased: int = 0
    temporaries: int = 0
    code: int = 0
    seconds: float = 0.0
    traffic: int = 0  # bytes that all operations read and write, by the compiler's estimate; on-chip memory included


def require(versions: dict[str, str] = VERSIONS) -> None:
    """UserError where the compiler's packages are missing or of other versions."""
    for name, wanted in versions.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if found != wanted:
            state = f"{name} {found} is installed" if found else f"{name} is not installed"
            raise UserError(
                f"--compile-for needs {name} {wanted} and {state}; get the TPU compiler with: pip install -r {REQUIREMENTS} "
                "(Linux x86-64, Python 3.11 or 3.12)"
            )


def check_topology(topology: str, replicas: int = 1) -> None:
    """UserError, without a start of the compiler, for one that libtpu refuses: its chips come in hosts of 2 x 2 x 1. "GENERATION:AxB" or "AxBxC".
    Also where it has fewer chips than run the program together; it may have more."""
    generation, _, shape = topology.partition(":")
    sizes = [int(size) for size in shape.split("x")]
    if sizes[0] % 2 or sizes[1] % 2 or 0 in sizes:
        raise UserError(
            f"--compile-for={topology}: there are TPUs of 2 x 2 chips and multiples of that, so the first two numbers must be even; as "
            f"{', '.join(f'{generation}:{example}' for example in TOPOLOGIES[generation])} (the program of one chip is the same for all of them)"
        )
    if replicas > math.prod(sizes):
        raise UserError(
            f"--compile-for={topology}: has {math.prod(sizes)} chips and the run is for {replicas}; name a larger topology, as "
            f"{', '.join(f'{generation}:{example}' for example in TOPOLOGIES[generation])}, or lower --tpu-cores"
        )


def compile_programs(
    topology: str, programs: dict[str, tuple[str, tuple[int, ...]]], note: Callable[[str], None], python: str = sys.executable, replicas: int = 1
) -> dict[str, Compiled]:
    """Each program's name -> (HLO text, donated parameters) -> what the compiler made of it. UserError for a topology that it does not know.

    replicas: chips of the topology that run the same program together; 1: the program of one chip
    """
    with tempfile.TemporaryDirectory(prefix="dlrm_xla_") as folder:
        names = {name: Path(folder) / str(number) for number, name in enumerate(programs)}
        job = {
            "topology": topology, "replicas": replicas, "result": f"{folder}/result.json",
            "programs": [
                {"name": name, "hlo": f"{names[name]}.hlo", "compiled": f"{names[name]}.compiled", "donated": donated}
                for name, (_, donated) in programs.items()
            ],
        }  # fmt: skip
        for name, (text, _) in programs.items():
            names[name].with_suffix(".hlo").write_text(text)
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        log = Path(folder) / "log"
        command = [python, "-m", "dlrm_xla.tpu_compiler", str(path)]
        with (
            log.open("w") as messages,
            # libtpu writes logs into TMPDIR, whatever TPU_LOG_DIR says
            subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "TMPDIR": folder}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=messages, text=True
            ) as child,
        ):
            try:
                for line in child.stdout:
                    if line.startswith("compiling "):
                        note(line.rstrip())
            except BaseException:  # interrupted: libtpu does not listen to signals
                child.kill()
                raise
        result = Path(job["result"])
        if not result.is_file():
            said = log.read_text(errors="replace").strip().splitlines() or ["no message"]
            raise UserError(f"--compile-for={topology}: the compiler's process ended with code {child.returncode} ({said[-1][:300]})")
        answer = json.loads(result.read_text())
        if "error" in answer:
            raise UserError(f"--compile-for={topology}: {answer['error'][:300]}")
        compiled = {}
        for name, figures in zip(programs, answer["programs"], strict=True):
            text = names[name].with_suffix(".compiled").read_text() if not figures["error"] else ""
            compiled[name] = Compiled(text=text, **figures)
        return compiled


def main(path: str) -> None:
    """The child. It ends when its parent does, however that ends."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    job = json.loads(Path(path).read_text())
    generation = job["topology"].split(":")[0]
    chosen = FLAGS | (FLAGS_V5 if generation.startswith("v5") else {})
    given = os.environ.get("LIBTPU_INIT_ARGS", "")
    os.environ["LIBTPU_INIT_ARGS"] = " ".join([given, *(f"--{name}={value}" for name, value in chosen.items() if name not in given)])
    # no look for a TPU's metadata server, no claim on a chip, no log files
    os.environ |= {
        "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }  # fmt: skip
    from jax.experimental import topologies

    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=job["topology"], **CHIP_CONFIG.get(generation, {}))
    except Exception as error:  # whatever libtpu says about a name
        answer = {"error": " ".join(str(error).split())}
    else:
        devices = tuple(topology.devices[: job["replicas"]])
        answer = {"programs": [compile_one(program, devices, job["topology"]) for program in job["programs"]]}
    Path(job["result"]).write_text(json.dumps(answer))


def compile_one(program: dict, devices: tuple, topology: str) -> dict:
    import time

    from jaxlib import xla_client

    print(f"compiling the {program['name']} for {topology}", flush=True)
    module = xla_client._xla.hlo_module_from_text(Path(program["hlo"]).read_text())
    computation = xla_client.XlaComputation(module.as_serialized_hlo_module_proto())
    mlir = xla_client._xla.mlir.xla_computation_to_mlir_module(computation)
    mlir = mark_donated(mlir if isinstance(mlir, str) else mlir.decode(), set(program["donated"]))
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    start = time.monotonic()
    try:
        executable = devices[0].client.compile(mlir.encode(), xla_client.DeviceList(devices), options)
    except Exception as error:  # out of memory, mostly
        return {"error": str(error), "seconds": time.monotonic() - start}
    seconds = time.monotonic() - start
    Path(program["compiled"]).write_text(executable.hlo_modules()[0].to_string())
    memory = executable.get_compiled_memory_stats()
    cost = executable.cost_analysis()
    return {
        "error": "", "arguments": memory.argument_size_in_bytes, "outputs": memory.output_size_in_bytes,
        "aliased": memory.alias_size_in_bytes, "temporaries": memory.temp_size_in_bytes, "code": memory.generated_code_size_in_bytes,
        "seconds": seconds, "traffic": int(cost["bytes accessed"]),
    }  # fmt: skip


def mark_donated(mlir: str, numbers: set[int]) -> str:
    """The module with its donated arguments marked: the way over MLIR loses the marks of an HLO text."""
    lines = mlir.splitlines()
    main_line = next(number for number, line in enumerate(lines) if "func.func" in line and "@main(" in line)

    def mark(match: re.Match) -> str:
        return match[1] + (" {jax.buffer_donor = true}" if int(match[2]) in numbers else "")

    lines[main_line] = re.sub(r"(%arg(\d+): tensor<[^>]*>)", mark, lines[main_line])
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1])
