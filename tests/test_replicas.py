"""The program of several TPU chips, without a TPU: traced in four replicas of torch_xla's own spawn, run on four CPU devices, compiled for TPUs."""

import importlib.metadata
import os
import pickle
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import replicas
import torch
from conftest import ROOT, xla_or_skip
from replicas import CASES, Case

from dlrm_xla import compile_for, compile_report, hlo, tpu_compiler
from dlrm_xla.compile_for import StepReport
from dlrm_xla.specs import UserError

HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)
TESTS = ROOT / "tests"


def finish(script: str, *argv: str, seconds: float) -> None:
    """Runs a script of this folder; it ends, with all that it has started, when its time is over."""
    command = [sys.executable, str(TESTS / script), *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True) as child:
        try:
            said, _ = child.communicate(timeout=seconds)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)
            raise
    assert child.returncode == 0, said[-3000:]


@pytest.fixture(scope="module")
def traced(tmp_path_factory) -> Path:
    """The folder with what replicas.py has written of every case."""
    xla_or_skip()
    folder = tmp_path_factory.mktemp("replicas")
    finish("replicas.py", str(folder), *map(str, range(len(CASES))), seconds=400)
    return folder


@pytest.fixture(scope="module")
def executed(traced) -> Path:
    try:
        importlib.metadata.version("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        (pytest.fail if HAS_WHEELS else pytest.skip)("jaxlib is not installed (requirements-tpu-compiler.txt)")
    finish("replicas_execute.py", str(traced), *map(str, range(len(CASES))), seconds=400)
    return traced


def ranks_of(folder: Path, case: Case) -> list[dict]:
    return [torch.load(folder / f"{CASES.index(case)}.{rank}.pt") for rank in range(case.world)]


def by_name(*names: str):
    return pytest.mark.parametrize("case", [case for case in CASES if not names or case.name in names], ids=lambda case: case.name)


@by_name()
def test_every_replica_traces_the_same_program(traced, case):
    """What differs by rank is data."""
    first, *others = ranks_of(traced, case)
    for rank, other in enumerate(others, 1):
        for step in ("test step", "training step"):
            mine, its = first[step]["hlo"].splitlines(), other[step]["hlo"].splitlines()
            different = next((pair for pair in zip(mine, its, strict=False) if pair[0] != pair[1]), None)
            assert different is None and len(mine) == len(its), f"{step}, rank 0 and rank {rank}: {different}"
            for what in ("parameters", "outputs", "donated"):
                assert first[step][what] == other[step][what]


@by_name()
def test_the_traced_collectives_are_the_plans(traced, case):
    first = ranks_of(traced, case)[0]
    trainer, _ = replicas.made_for_rank(case, 0)
    planned = compile_for.planned_collectives(trainer, case.batch, case.batch)
    for step, kinds in planned.items():
        sent = hlo.collectives(first[step]["hlo"])
        assert {kind: (one.count, one.bytes) for kind, one in sent.items()} == kinds
    spread = any(place != replicas.EVERYWHERE for place in case.where)
    counts = {kind: count for kind, (count, _) in planned["training step"].items()}
    assert counts.get("all-to-all", 0) == (3 if spread else 0) and counts["all-reduce"] == 1
    assert counts.get("all-gather", 0) == (2 if "gathered" in case.name else 0), "row numbers and gradients"


@by_name()
def test_four_devices_compute_what_one_rank_does(executed, case):
    """Losses of every step, then rows, their optimizer's state and dense parameters; before it the predictions."""
    results = torch.load(executed / f"{CASES.index(case)}.results.pt")
    losses, rows, dense, predictions = replicas.alone(case)
    assert results["losses"] == pytest.approx(losses, rel=1e-6, abs=1e-7)
    # an Adagrad divides a first gradient by its own size: where that is a rounding error of sums in another order, the update has another sign
    close = {"rtol": 0, "atol": 1e-6 if case.optimizer == "sgd" else 1e-4}
    found, copies_equal = replicas.rows_of_ranks(case, results["state"])
    assert copies_equal, "copies of a row differ between ranks"
    assert found.keys() == rows.keys()
    for name, values in rows.items():
        torch.testing.assert_close(found[name], values, msg=lambda text, name=name: f"{name}: {text}", **close)
    for name, values in dense.items():
        for of_rank in results["state"]:
            torch.testing.assert_close(of_rank[name], values, msg=lambda text, name=name: f"{name}: {text}", **close)
            assert of_rank[name].equal(results["state"][0][name]), f"{name} differs between ranks"
    for outputs in results["test outputs"]:
        (gathered,) = [value for value in outputs if value.shape == (case.batch, 3)]
        torch.testing.assert_close(gathered[:, :1], predictions, rtol=0, atol=1e-6)


MODELS = ("kaggle, sgd", "kaggle, rwsadagrad", "copies, gathered")  # "dlrm v2, rwsadagrad" takes the compiler minutes


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict:
    """What replicas_compile.py has found: (model, topology) -> report of the training step."""
    xla_or_skip()
    try:
        tpu_compiler.require()
    except UserError as error:
        (pytest.fail if HAS_WHEELS else pytest.skip)(str(error))
    path = tmp_path_factory.mktemp("compiled") / "reports.pickle"
    finish("replicas_compile.py", str(path), *MODELS, seconds=1500)
    return pickle.loads(path.read_bytes())


@pytest.mark.parametrize("model", MODELS)
def test_compiled_for_four_chips_of_every_generation(compiled, model):
    """Exactly the planned collectives with the planned bytes, tables updated in place, nothing else of a table's size."""
    reports = {topology: report for (name, topology), report in compiled.items() if name == model}
    assert set(reports) == ({"v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"} if model == "kaggle, sgd" else {"v5e:2x2"})
    for topology, report in reports.items():
        assert not report.error, report.error
        assert report.unplanned == [], (topology, report.collectives, report.planned)
        assert report.copies == [] and report.not_donated == [] and report.passes, (topology, report.copies)
        counts = {kind: sent.count for kind, sent in report.collectives.items()}
        assert counts == ({"all-reduce": 1, "all-gather": 2} if "gathered" in model else {"all-to-all": 3, "all-reduce": 1})
        assert report.collectives["all-reduce"].tokens == 4
        if "kaggle" in model:
            # v5p lays lines of a lookup out in its memory, on one chip too (docs/tpu.md)
            share = report.memory["temporaries"] / report.memory["tables"]
            assert share <= (0.06 if topology.startswith("v5p") else 0.02), (topology, share)


@pytest.mark.parametrize(
    "sent, unplanned",
    [
        ({"all-to-all": hlo.Sent(3, {"s32": 8, "f32": 64}, 0, 0)}, []),
        ({"all-to-all": hlo.Sent(4, {"s32": 8, "f32": 64}, 0, 0)}, ["all-to-all"]),
        ({"all-to-all": hlo.Sent(3, {"s32": 8, "f32": 60}, 0, 0)}, ["all-to-all"]),
        ({"all-to-all": hlo.Sent(3, {"s32": 8, "f32": 64}, 0, 0), "all-gather": hlo.Sent(1, {"f32": 4}, 0, 0)}, ["all-gather"]),
        ({}, ["all-to-all"]),
    ],
)
def test_what_is_not_planned_fails(sent, unplanned):
    memory = dict.fromkeys(compile_for.MEMORY, 0)
    report = StepReport("", None, 1.0, 0.0, memory, {}, 0, [], 0, sent, [], {"all-to-all": (3, {"s32": 8, "f32": 64})})
    assert report.unplanned == unplanned and report.passes == (not unplanned)
    page = compile_report._faults("training step", report)
    assert ("training step: as the plan says, to the byte" in page) == (not unplanned)
    if unplanned:
        of_plan = "3 all-to-all of 8 bytes of s32, 64 bytes of f32" if unplanned == ["all-to-all"] else "0 all-gather of 0 bytes"
        assert f"training step: NOT AS PLANNED: the plan has {of_plan}" in page


def test_a_topology_has_as_many_chips_as_the_run():
    tpu_compiler.check_topology("v5e:2x2", 4)
    tpu_compiler.check_topology("v5e:2x2", 2)
    with pytest.raises(UserError, match="has 4 chips and the run is for 8; name a larger topology"):
        tpu_compiler.check_topology("v4:2x2x1", 8)


def test_a_small_all_gather_may_become_an_all_reduce():
    """Which libtpu does: of four chips four times the bytes. Anything else is not as planned."""
    planned = {"all-reduce": (1, {"f32": 1672}), "all-gather": (2, {"s32": 192, "f32": 3072})}
    rewritten = {"all-reduce": (2, {"f32": 1672, "s32": 768}), "all-gather": (1, {"f32": 3072})}
    assert compile_for._with_gathers(rewritten, planned) == planned
    assert compile_for._with_gathers(planned, planned) == planned
    for wrong in (
        {"all-reduce": (1, {"f32": 1672}), "all-gather": (1, {"f32": 3072})},  # one is missing
        {"all-reduce": (2, {"f32": 1672, "s32": 700}), "all-gather": (1, {"f32": 3072})},
        {"all-reduce": (2, {"f32": 1672, "s32": 768}), "all-gather": (2, {"s32": 192, "f32": 3072})},  # one too many
    ):
        assert compile_for._with_gathers(wrong, planned) != planned
