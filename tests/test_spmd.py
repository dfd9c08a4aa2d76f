"""--spmd on four devices of XLA's CPU backend: the single-device run, with tables in parts and no table on its way."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, xla_or_skip

from dlrm_xla import hlo, tpu_compiler
from dlrm_xla.specs import UserError

STEPS = 22
TABLES = (50_001, 20_003, 100, 3)  # 70,107 rows: not a multiple of 4
MODEL = (
    "--arch-sparse-feature-size=8", "--arch-mlp-bot=5-16-8", "--arch-mlp-top=16-8-1", "--mini-batch-size=32", "--num-batches=12",
    "--learning-rate=0.05", "--loss-function=bce", "--round-targets=True",
)  # fmt: skip
SIZES = f"--arch-embedding-size={'-'.join(map(str, TABLES))}"
ONE, SEVERAL = ("--num-indices-per-lookup=1", "--num-indices-per-lookup-fixed=True"), ("--num-indices-per-lookup=5",)
FIVE = ("--num-indices-per-lookup=5", "--num-indices-per-lookup-fixed=True")
CASES = {
    f"{kind} {rule} {layout}": [*MODEL, SIZES, *bags, f"--optimizer={rule}", f"--table-layout={layout}"]
    for kind, bags in (("one", ONE), ("bags", SEVERAL))
    for rule in ("sgd", "adagrad", "rwsadagrad")
    for layout in ("rows", "packed")
    if (kind, layout) != ("one", "packed") or rule == "sgd"
}
RWS = [*MODEL, SIZES, *SEVERAL, "--optimizer=rwsadagrad"]
CASES |= {
    "qr": [*RWS, "--qr-flag", "--qr-threshold=1000"],
    "hash": [*RWS, "--compress=hash:rows=5003"],
    "tt": [*RWS, "--compress=tt:rank=4"],
    "int8": [*RWS, "--compress=lpt"],
    "uneven batch": [*RWS, "--mini-batch-size=30"],
    "ten times the rows": [*MODEL, SIZES.replace("-50001-", "-700007-").replace("=50001-", "=700007-"), *ONE, "--optimizer=sgd"],
    "twice the batch": [*MODEL, SIZES, *ONE, "--optimizer=sgd", "--mini-batch-size=64"],
    "for a TPU": [*MODEL, "--arch-embedding-size=200001-100003-100", *FIVE, "--optimizer=rwsadagrad", "--table-layout=packed"],
}
PROGRAMS = {"ten times the rows": 3, "twice the batch": 3, "for a TPU": 3}  # steps of cases that are there for their programs
DENSE = 5 * 16 + 16 + 16 * 8 + 8 + 18 * 16 + 16 + 16 * 8 + 8 + 8 + 1  # numbers of the MLPs; 18 = 10 pairs + 8


def environment(devices: int) -> dict:
    return {**os.environ, "PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(single device, four devices), each case name -> what tests/spmd_run.py found."""
    xla_or_skip()
    folder = tmp_path_factory.mktemp("spmd")
    started = []
    for spmd in (False, True):  # side by side: most of the time goes into the compiler, which has one thread
        steps = {name: PROGRAMS.get(name, STEPS) for name in CASES}
        job = {"spmd": spmd, "steps": steps, "cases": CASES, "dump": str(folder / "dump"), "result": str(folder / f"{spmd}.json")}
        path = folder / f"job_{spmd}.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, str(ROOT / "tests" / "spmd_run.py"), str(path)]
        with (folder / f"{spmd}.log").open("w") as log:
            started.append(
                (subprocess.Popen(command, env=environment(4 if spmd else 1), stdout=log, stderr=log), folder / f"{spmd}.log", job["result"])
            )
    try:
        for process, log, _ in started:
            assert process.wait(timeout=400) == 0, log.read_text()[-3000:]
    finally:
        for process, _, _ in started:
            process.kill()
            process.wait()
    found = [json.loads(Path(result).read_text()) for _, _, result in started]
    return found


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_one_device(runs, case):
    one, four = (run[case] for run in runs)
    assert len(four["losses"]) == PROGRAMS.get(case, STEPS)
    assert max(abs(a - b) / max(abs(a), 0.1) for a, b in zip(one["losses"], four["losses"], strict=True)) < 1e-6
    assert four["losses"][0] != four["losses"][-1]
    assert four["compiles"][0] == four["compiles"][-1], "a step was compiled again"
    assert four["fallbacks"] == {}


@pytest.mark.parametrize("case", CASES)
def test_tables_stay_in_parts(runs, case):
    """Before the first step and after the last: the partitioner does not take another view of what it hands back."""
    before, after = runs[1][case]["marks"]
    assert before == after
    for name, mark in after.items():
        shape, kind = runs[1][case]["shapes"][name], name.split(":")[0]
        if kind in ("tables", "row state") and shape:
            assert mark.startswith(f"{{devices=[4{',1' * (len(shape) - 1)}]"), name
        else:
            assert mark == "{replicated}", name


@pytest.mark.parametrize("case", [name for name in CASES if name not in ("int8", "tt")])
def test_a_device_holds_a_quarter_and_no_table_is_copied_or_sent(runs, case):
    """int8 and tt: on XLA's CPU backend one device copies it too; the rows of the other are fewer than a batch reads."""
    program = Path(runs[1][case]["program"]).read_text()
    shapes = runs[1][case]["shapes"]
    rows = {name: shape for name, shape in shapes.items() if name.split(":")[0] in ("tables", "row state")}
    types = [(array.dims, array.dtype) for array in hlo.parameters(program)]
    whole = {tuple(shape) for shape in rows.values()}
    for name, shape in rows.items():
        assert ((math.ceil(shape[0] / 4), *shape[1:]), "s32" if "scratch" in name else "f32") in types, name
    assert not whole & {dims for dims, _ in types}
    kept = {number for number, (dims, _) in enumerate(types) if dims[:1] in {(math.ceil(shape[0] / 4),) for shape in rows.values()}}
    assert kept <= hlo.donated(program), "a part of a table gets new memory in each step"
    sizes = {math.prod(shape) for shape in rows.values()} | {math.ceil(shape[0] / 4) * math.prod(shape[1:]) for shape in rows.values()}
    made, _ = hlo.table_sized(program, {size for size in sizes if size > 16_384}, max(sizes))
    assert made == []


def volumes(program: str) -> dict[str, int]:
    """Bytes by kind of collective, but for those of the dense gradients and of single numbers, which stand under "dense"."""
    found = {"dense": 0}
    for part in hlo.computations(program).values():
        for instruction in part.values():
            kind = instruction.op.removesuffix("-start")
            if kind in hlo.COLLECTIVES:
                size = sum(array.bytes for array in instruction.results)
                large = max(array.elements for array in instruction.results) > 16 * 18
                found[kind if large else "dense"] = found.get(kind if large else "dense", 0) + size
    return found


@pytest.mark.parametrize("batch", [32, 64])
def test_what_travels_in_a_step(runs, batch):
    """What was read and its gradients, once each, and the dense gradients; the loss and the count of rows are single numbers."""
    program = Path(runs[1]["one sgd rows" if batch == 32 else "twice the batch"]["program"]).read_text()
    rows = batch * len(TABLES) * 8 * 4
    assert volumes(program) == {"all-reduce": rows, "all-gather": rows, "dense": 4 * DENSE + volumes_of_single_numbers(program)}


def volumes_of_single_numbers(program: str) -> int:
    parts = hlo.computations(program).values()
    scalars = [i for part in parts for i in part.values() if i.op == "all-reduce" and i.results[0].dims == ()]
    assert len(scalars) <= 4
    return 4 * len(scalars)


def test_what_travels_does_not_depend_on_the_tables(runs):
    small, large = (volumes(Path(runs[1][case]["program"]).read_text()) for case in ("one sgd rows", "ten times the rows"))
    assert small == large


def test_packed_lines_do_not_travel(runs):
    """The lanes are picked first: a line has 16 times the bytes of a row of width 8."""
    rows, packed = (volumes(Path(runs[1][f"one sgd {layout}"]["program"]).read_text()) for layout in ("rows", "packed"))
    assert rows == packed


def test_the_tpu_compiler(runs, tmp_path):
    """For v5e: parts in place, nothing of their size, and the same collectives."""
    try:
        tpu_compiler.require()
    except UserError as error:
        pytest.skip(str(error))
    case = runs[1]["for a TPU"]
    command = [sys.executable, str(ROOT / "tests" / "spmd_tpu.py"), case["before"], "v5e:2x2", str(tmp_path / "result.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stderr[-2000:]
    answer = json.loads((tmp_path / "result.json").read_text())
    (shape,) = [shape for name, shape in case["shapes"].items() if name.startswith("tables")]
    part = math.ceil(shape[0] / 4) * 128
    arrays = hlo.parameters(answer["text"])
    (number,) = [number for number, array in enumerate(arrays) if array.elements == part]
    assert number in hlo.donated(answer["text"]) and arrays[number].padded_bytes < 1.001 * 4 * part
    assert hlo.table_sized(answer["text"], {part, 4 * part}, part)[0] == []
    read = 32 * 3 * 5
    sent = hlo.collectives(answer["text"])
    assert set(sent) <= {"all-reduce", "all-gather"} and sum(kind.total for kind in sent.values()) < 3 * read * 8 * 4 + read * 4 + 4 * DENSE


def test_checkpoints_go_both_ways(tmp_path):
    """Half a run on four devices, the rest on one, and the other way round: the losses of a run on one."""
    xla_or_skip()
    flags = (*RWS, "--num-batches=0", "--data-size=384", "--device=xla", "--print-freq=1", "--test-freq=12", "--nepochs=2")

    def run(name: str, devices: int, *more: str) -> list[float]:
        spmd = ["--spmd"] if devices > 1 else []
        command = [sys.executable, str(ROOT / "run_dlrm.py"), *flags, *spmd, f"--log-dir={name}", *more]
        done = subprocess.run(command, cwd=tmp_path, env=environment(devices), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr[-2000:]
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["kind"] == "train"]
        assert len({row["compiles"] for row in rows[2:11]}) == 1 and {row["fallbacks"] for row in rows} == {0}
        return [row["loss"] for row in rows]

    whole = run("whole", 1)
    assert len(whole) == 24
    for name, first, second in (("there", 4, 1), ("back", 1, 4)):
        start = run(f"{name}1", first, "--nepochs=1", f"--save-model={name}.pt")
        rest = run(f"{name}2", second, f"--load-model={name}.pt")
        assert len(start) == len(rest) == 12
        assert max(abs(a - b) / max(abs(a), 0.1) for a, b in zip(whole, start + rest, strict=True)) < 2e-6
    here, there = (torch.load(tmp_path / f"{name}.pt", weights_only=False)["state_dict"] for name in ("back", "there"))
    assert all(torch.allclose(here[name].float(), there[name].float(), atol=2e-6) for name in here)


def test_one_device_is_refused(cli_process):
    xla_or_skip()
    outcome = cli_process(*RWS, "--spmd", device="xla", env=environment(1))
    assert outcome.error == (
        "--spmd: splits tables over several devices and there is one here; set CPU_NUM_DEVICES=4 for four of XLA's CPU backend, or leave it out"
    )
