"""python spmd_run.py JOB.json: trains models in a process of its own and writes down what happened. For tests/test_spmd.py.

JOB.json: {"spmd": true | false, "steps": {name: steps}, "cases": {name: flags}, "dump": folder for XLA's programs, "result": file to write}. For each
case: losses [steps]; compiles after each step; fallbacks; and with spmd marks (of each tensor of compile_for.state_of, before and after), shapes,
program (the optimized program of the step) and before (the same as the partitioner gets it), file names.
"""

import json
import os
import sys
from pathlib import Path

job = json.loads(Path(sys.argv[1]).read_text())
os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "4" if job["spmd"] else "1"}
os.environ["XLA_FLAGS"] = f"--xla_dump_to={job['dump']} --xla_dump_hlo_as_text" if job["spmd"] else ""
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402

import run_dlrm  # noqa: E402
from data_loaders.open import open_dataset  # noqa: E402
from dlrm_xla import backends, compile_for, flags  # noqa: E402
from dlrm_xla.config import Config  # noqa: E402


def largest(pattern: str, seen: set[Path]) -> Path | None:
    return max(set(Path(job["dump"]).glob(pattern)) - seen, key=lambda path: path.stat().st_size, default=None)


def train(backend, case: list[str], steps: int) -> dict:
    config = Config.from_args(flags.parse([*case, "--device=xla", *(["--spmd"] if job["spmd"] else [])]))
    torch.manual_seed(config.train.seed)
    rng = np.random.RandomState(config.train.seed)
    data = open_dataset(config, rng, lambda line: None)
    config = config.with_num_dense(data.num_dense)
    trainer = run_dlrm.build(config, run_dlrm.table_specs(config, data), rng, backend)
    batches = list(data.train.batches())
    found = {"losses": [], "compiles": []}
    if job["spmd"]:
        import torch_xla

        found["shapes"] = {name: list(tensor.shape) for name, tensor in compile_for.state_of(trainer).items()}
        found["marks"] = [{name: torch_xla._XLAC._get_xla_sharding_spec(value) for name, value in compile_for.state_of(trainer).items()}]
    seen = set(Path(job["dump"]).glob("*"))
    for index in range(steps):
        trainer.step(backend.to_device(batches[index % len(batches)]), index, last_of_epoch=False)
        found["losses"].append(trainer.meter.mean())
        trainer.meter.reset()
        found["compiles"].append(backend.compiles())
    found["fallbacks"] = backend.fallbacks()
    if job["spmd"]:
        found["marks"].append({name: torch_xla._XLAC._get_xla_sharding_spec(value) for name, value in compile_for.state_of(trainer).items()})
        found["program"] = str(largest("*cpu_after_optimizations.txt", seen))
        found["before"] = str(largest("*before_optimizations.txt", seen))
    return found


backend = backends.make("xla", spmd=job["spmd"])
Path(job["result"]).write_text(json.dumps({name: train(backend, case, job["steps"][name]) for name, case in job["cases"].items()}))
