"""Every registered method's training step through the real TPU compiler: no copy of a table's size, and the ledger's bytes are the program's."""

import pickle
import platform
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from test_methods import method_of

import run_dlrm
from compression.choose import choose, parse_asked
from compression.ledger import ledger, padded_numbers
from compression.method import Choice
from compression.registry import METHODS
from data_loaders.open import open_dataset
from dlrm_xla import backends, compile_for, flags, hlo, tpu_compiler
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)
ROWS, DIM = 400_003, 16
CASES = (*sorted(METHODS), "hot_cold:width=4", "cce:chunks=1", "pq:chunks=1", "tt:cache=1000")
FLAGS = (
    f"--arch-sparse-feature-size={DIM}", f"--arch-embedding-size={ROWS}", f"--arch-mlp-bot=5-{DIM}", "--arch-mlp-top=9-1", "--mini-batch-size=64",
    "--num-batches=1", "--num-indices-per-lookup=2", "--optimizer=rwsadagrad",
)  # fmt: skip
NETWORKS = ("dhe", "tt", "tt_svd")  # all of them is read in every step: half a table's size would be half a minute of compiling


def large_knobs(name: str, spec) -> dict:
    """About half of the plain table where the method keeps rows, so that a copy of it would be seen."""
    method = method_of(name)
    knobs = method.knob_values({"width": "64"} if name == "dhe" else parse_asked(name).given)
    if method.sized_most is not None and method.name not in NETWORKS:
        least, most = int(method.knob(method.sized_by).least or 1), method.sized_most(spec, knobs)
        while least < most:
            middle = (least + most + 1) // 2
            fits = method.num_bytes(spec, {**knobs, method.sized_by: middle}) <= 2 * ROWS * DIM
            least, most = (middle, most) if fits else (least, middle - 1)
        knobs[method.sized_by] = least
    return method.spread([spec], knobs)[0] if method.spread is not None else knobs


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What make_reports returns, from a process of its own: after a trace values are left that no later step on XLA could compute."""
    try:
        tpu_compiler.require()
    except UserError as error:
        (pytest.fail if HAS_WHEELS else pytest.skip)(str(error))
    path = tmp_path_factory.mktemp("tpu") / "reports.pickle"
    code = f"""import sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import pickle, test_methods_tpu
pickle.dump(test_methods_tpu.make_reports(), open({str(path)!r}, "wb"))"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return pickle.loads(path.read_bytes())


def make_reports() -> dict:
    """Method -> (report of its training step, its ledger, the program's parameters by name). All programs in one start of the compiler."""
    config = Config.from_args(flags.parse([*FLAGS]))
    data = open_dataset(config, np.random.RandomState(0), lambda line: None)
    (spec,) = run_dlrm.table_specs(config, data)
    batch = next(data.train.batches())
    programs, found, trainers = {}, {}, {}
    for name in ("plain", *CASES):
        tracer = backends.make_tracer()
        choice = choose([spec], config.method)[0] if name == "plain" else Choice(method_of(name).name, large_knobs(name, spec))
        trainer = run_dlrm.build(config, [spec], np.random.RandomState(0), tracer, device="meta", choices=[choice], to_load=True)
        state = {id(p): s for p, s in zip(trainer.dense.parameters, trainer.dense.state, strict=True)}
        book = ledger(trainer.tables, lambda parameter, state=state: state[id(parameter)], tiles=True)
        state = compile_for.state_of(trainer)
        sizes = {key: value.nelement() * value.element_size() for key, value in state.items()}
        tiles = {key: value.element_size() * padded_numbers(tuple(value.shape)) for key, value in state.items()}
        step = compile_for.trace_steps(trainer, tracer, batch, None)["training step"]
        programs[name], found[name] = (step.hlo, step.donated), (step, sizes, tiles, book)
        trainers[name] = list(trainer.tables.stores)
    compiled = tpu_compiler.compile_programs("v5e:2x2", programs, lambda line: None)
    results = {}
    for name, (step, sizes, tiles, book) in found.items():
        report = compile_for.judge(step, compiled[name], trainers[name], sizes, 15.75)
        types = hlo.parameters(compiled[name].text) if not compiled[name].error else ()
        results[name] = report, book, dict(zip(step.parameters, types, strict=False)), tiles
    return results


@pytest.mark.parametrize("name", ["plain", *CASES])
def test_the_step_copies_no_table(reports, name):
    report = reports[name][0]
    assert not report.error, report.error
    assert report.copies == [] and report.not_donated == [], (report.copies, report.not_donated)
    assert report.memory["temporaries"] < ROWS * DIM * 4, "a table's size"


@pytest.mark.parametrize("name", ["plain", *CASES])
def test_the_programs_arguments_are_the_ledgers_bytes(reports, name):
    """Tables, codes, pointers, seeds and their optimizer's state, padding included; what the step does not read is not an argument."""
    report, book, arguments, tiles = reports[name]
    mine = {key: array for key, array in arguments.items() if re.match(r".*:(store\d|emb_l\.|tables\.)", key)}
    unread = {key: size for key, size in tiles.items() if re.match(r".*:(store\d|emb_l\.|tables\.)", key) and key not in mine}
    assert sum(array.padded_bytes for array in mine.values()) + sum(unread.values()) == book.total, (
        {key: str(array) for key, array in mine.items()}, unread, book.to_json(),
    )  # fmt: skip
