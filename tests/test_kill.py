"""kill -9 at every step of a build that reaches the disk: what lies under the result's name is whole or not there, and the next run's result is,
byte for byte, an undisturbed one's. (benchmarks/kill.py kills at random moments.)"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from killing import Steps

STEPS = ("fsync", "replace", "unlink", "rmdir", "mkdir", "pwrite")


def contents(out: Path) -> dict[str, bytes] | None:
    """Everything under the result's name."""
    if not out.exists():
        return None
    return {path.name: path.read_bytes() for path in ([out] if out.is_file() else out.iterdir())}


def kill_at(step: int) -> None:
    """This process dies before its step number `step`; half of a write is done then."""
    from data_loaders import spill

    def write_half(file, piece) -> None:
        view = memoryview(piece).cast("B")
        file.write(view[: len(view) // 2])

    steps = Steps(step)
    steps.at(STEPS)
    half = steps.half(spill.write_all, write_half)
    for module in [module for name, module in sys.modules.items() if name.startswith("data_loaders.") and hasattr(module, "write_all")]:
        module.write_all = half


def in_a_child(make, step: int | None) -> int:
    """Runs make() in a fork that dies at a step; returns its signal, 0 where it came to its end. No thread runs here that a fork could lose."""
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            if step is not None:
                kill_at(step)
            make()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status


def maker(folder: Path, kind: str):
    """A function that makes folder/out of some thousand rows, in many segments, every column recorded on its own."""
    from data_loaders import arrays_writer, number_stage, read_stage
    from data_loaders.blocks import SplitRule
    from data_loaders.build import Options, build
    from data_loaders.preprocess import preprocess
    from tests.made_source import make_source
    from tests.oracles import criteo as oracle

    read_stage.SEGMENT_ROWS, number_stage.SAVE_SECONDS, arrays_writer.SAVE_BYTES = 700, -1, 30_000
    if kind == "table":
        source = make_source(folder, 2500, 1, floats=True, split=SplitRule("parts", parts=(1,)), block_rows=200)
        return folder / "out", lambda out: build(source, out, Options(min_frequency=2), progress=False)
    (folder / "train.txt").write_bytes(oracle.make_text(2500))
    flags = {"max_ind_range": 50, "sub_sample_rate": 0.5, "progress": False}
    return folder / "out.npz", lambda out: preprocess(folder / "train.txt", out, **flags, rng=np.random.RandomState(1))


def serve(folder: Path, kind: str, every: int) -> None:
    """Kills a run at every step (of which there are some hundreds; at every `every`-th one), each followed by an undisturbed run; then kills
    run after run a few steps further than where the one before began. Prints what it found in JSON."""
    out, make = maker(folder, kind)
    assert in_a_child(lambda: make(out), None) == 0
    wanted, step, kills = contents(out), 0, 0
    while True:
        remove(out)
        died = in_a_child(lambda: make(out), step)
        assert contents(out) in (None, wanted), f"step {step}: something that is not whole"
        if not died:
            break
        kills += 1
        assert in_a_child(lambda: make(out), None) == 0
        assert contents(out) == wanted, f"step {step}: not what an undisturbed run makes"
        assert not out.with_name(f"{out.name}.parts").exists(), f"step {step}: something is left behind"
        step += every
    chain = 0
    remove(out)
    while in_a_child(lambda: make(out), 20 + 10 * chain):  # some stretches of work are taken up from their beginning, so each run gets further
        chain += 1
        assert contents(out) in (None, wanted), f"chain, kill {chain}"
    assert contents(out) == wanted
    print(json.dumps({"steps": step, "kills": kills, "chain": chain}))


def remove(out: Path) -> None:
    for path in (out, out.with_name(f"{out.name}.parts")):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.parametrize("kind, every", [("table", 11), ("kaggle", 13)])
def test_killed_at_every_step(tmp_path, kind, every):
    code = f"from pathlib import Path; from tests.test_kill import serve; serve(Path({str(tmp_path)!r}), {kind!r}, {every})"
    path = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= 20 and found["chain"] >= 2, found
