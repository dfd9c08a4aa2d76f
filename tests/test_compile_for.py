"""--compile-for: the very programs of a run go through the real TPU compiler, and what it must find is found."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from conftest import ROOT, xla_or_skip
from test_cost import STEP_ON_XLA

import run_dlrm
from data_loaders.open import open_dataset
from dlrm_xla import backends, compile_for, compile_report, flags, hlo, tpu_compiler
from dlrm_xla.backends.xla import TracedStep
from dlrm_xla.config import Config
from dlrm_xla.layouts import PackedLayout
from dlrm_xla.optim import SGD
from dlrm_xla.specs import UserError
from dlrm_xla.stores import RowStore
from dlrm_xla.tpu_compiler import Compiled

HAS_WHEELS = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 13)
# 19 MB of tables: more than a batch of 64 could explain
SMALL = (
    "--arch-sparse-feature-size=16", "--arch-embedding-size=200000-100000-50", "--arch-mlp-bot=5-8-16", "--arch-mlp-top=9-1", "--mini-batch-size=64",
    "--num-batches=1", "--num-indices-per-lookup=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def compiler():
    """Skips where libtpu has no wheel; `make test` installs it everywhere else."""
    try:
        tpu_compiler.require()
    except UserError as error:
        (pytest.fail if HAS_WHEELS else pytest.skip)(str(error))


@pytest.fixture
def compiled(cli, tmp_path, compiler):
    """compiled(topology, *flags) -> (Outcome, the JSON report)."""

    def run(topology: str, *more: str):
        outcome = cli(*SMALL, *more, f"--compile-for={topology}", "--json=report.json", device=None)
        path = tmp_path / "report.json"
        return outcome, json.loads(path.read_text()) if path.is_file() else None

    return run


@pytest.mark.parametrize("topology", ["v5e:2x2", "v6e:2x2"])
@pytest.mark.parametrize("optimizer", ["sgd", "rwsadagrad", "adagrad"])
def test_packed_tables_are_updated_in_place(compiled, tmp_path, optimizer, topology):
    outcome, report = compiled(topology, f"--optimizer={optimizer}")
    assert outcome.code == 0, outcome.out + outcome.err
    assert report["passes"] and report["table_layout"] == "packed" and set(report["steps"]) == {"training step", "test step"}
    step = report["steps"]["training step"]
    assert step["copies"] == [] and step["not_donated"] == [] and step["collectives"] == {}
    assert set(step["layouts"]) == {"store0.data"}
    row_state = {"sgd": 0, "rwsadagrad": 1, "adagrad": 16}[optimizer]
    assert step["memory"]["tables"] == pytest.approx(300_050 * 16 * 4, rel=0.001)
    assert step["memory"]["row state"] == pytest.approx(300_050 * row_state * 4, rel=0.001)
    record = 32 if optimizer == "adagrad" else 16
    assert step["memory"]["temporaries"] < step["memory"]["tables"] / 4 and min(step["memory"].values()) >= 0
    assert step["total"] == sum(step["memory"].values())
    assert report["stores"] == [
        {"rows": 300_050, "width": 16, "record_width": record, "bytes_a_lookup": 512, "other_layout": 512 * record}
    ]
    assert "result: it fits and no step copies a table" in outcome.out and len(outcome.out.splitlines()) <= 40
    assert "training step: copies of a table's size: none of 1 MiB or more\n" in outcome.out
    assert "temporaries / tables" not in outcome.out, "19 MB of tables: the share would be the batch's size in other words"
    assert "(1,536 with the update)" in outcome.out and "to make it fit" not in outcome.out
    assert outcome.err.splitlines() == [f"compiling the test step for {topology}", f"compiling the training step for {topology}"]
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"], "no run folder"


def test_a_layout_that_the_compiler_copies_fails(compiled):
    """Rows of 32 numbers at this size: libtpu turns the whole buffer around and back in every step, four times padded."""
    outcome, report = compiled("v5e:2x2", "--optimizer=adagrad", "--table-layout=rows")
    assert outcome.code == 1 and "result: FAILED" in outcome.out
    copies = report["steps"]["training step"]["copies"]
    assert {(copy["op"], copy["array"]) for copy in copies} >= {("copy", "f32[300050,32]{1,0:T(8,128)}")}
    assert max(copy["bytes"] for copy in copies) > 3.9 * 300_050 * 32 * 4
    assert f"copy {copies[0]['name']} f32[300050,32]" in outcome.out


def test_inference_only_compiles_the_test_step(compiled):
    outcome, report = compiled("v4:2x2x1", "--inference-only", "--test-mini-batch-size=32")
    assert outcome.code == 0 and set(report["steps"]) == {"test step"}
    assert outcome.out.startswith("compiled for v4:2x2x1, one chip, by libtpu 0.0.21: test batches of 32\n")
    assert "update" not in outcome.out and ": 512; with --table-layout=rows: 8,192\n" in outcome.out


def test_temporaries_are_compared_with_large_tables(compiled):
    outcome, report = compiled("v5e:2x2", "--arch-embedding-size=1600000", "--inference-only")
    step = report["steps"]["test step"]
    share = 100 * step["memory"]["temporaries"] / step["memory"]["tables"]
    assert f"temporaries / tables{share:>20.1f} %\n" in outcome.out


def test_stores_of_several_widths(compiled):
    outcome, report = compiled("v5p:2x2x1", "--md-flag", "--optimizer=rwsadagrad")
    assert outcome.code == 0 and len(report["stores"]) == 3, outcome.out


def test_a_model_that_does_not_fit(compiled):
    """19 GB of tables and 1.2 GB of sums, traced without memory for them."""
    outcome, report = compiled("v5e:2x2", "--arch-embedding-size=300000000", "--optimizer=rwsadagrad")
    assert outcome.code == 1 and not report["passes"]
    step = report["steps"]["training step"]
    assert step["used"] == pytest.approx(300e6 * 17 * 4 / 2**30, abs=0.05) and step["usable"] == compile_for.USABLE_GIB["v5e"]
    assert step["memory"]["tables"] == pytest.approx(300e6 * 16 * 4, rel=1e-6)
    assert step["memory"]["row state"] == pytest.approx(300e6 * 4, rel=1e-6)
    assert 0 < step["memory"]["temporaries"] < 100e6
    page = outcome.out.splitlines()
    first = page.index(f"training step: DOES NOT FIT: needs {step['used']:.2f} GiB and 15.75 GiB can be used")
    assert page[first + 1].startswith("  tables 19.2 GB, optimizer state of rows 1.2 GB, dense parameters ") and "temporaries" in page[first + 1]
    assert page[first + 1].endswith("; 16.9 GB can be used")
    assert (
        "to make it fit: fewer rows (--arch-embedding-size, --qr-flag), shorter rows (--arch-sparse-feature-size, --md-flag), "
        "less state a row (--optimizer=sgd)"
    ) in page
    assert "Traceback" not in outcome.err


def test_a_model_that_only_copies_make_too_large(compiled):
    """Rows of 64 numbers: 6.7 GB of tables, which libtpu turns around into 13.3 GB of padded ones."""
    outcome, report = compiled(
        "v5e:2x2", "--arch-embedding-size=26000000", "--arch-sparse-feature-size=64", "--arch-mlp-bot=5-8-64", "--table-layout=rows"
    )
    memory = report["steps"]["training step"]["memory"]
    assert outcome.code == 1 and memory["temporaries"] > 1.9 * memory["tables"] > 0
    (advice,) = [line for line in outcome.out.splitlines() if line.startswith("to make it fit: ")]
    assert "--table-layout=packed" in advice and "--mini-batch-size" in advice and "--optimizer" not in advice


def traced(optimizer: str, layout: str, *model: str):
    config = Config.from_args(flags.parse([*model, f"--optimizer={optimizer}", f"--table-layout={layout}"]))
    tracer, rng = backends.make_tracer(), np.random.RandomState(1)
    data = open_dataset(config, rng, lambda line: None)
    trainer = run_dlrm.build(config, run_dlrm.table_specs(config, data), rng, tracer, device="meta")
    batch = next(data.train.batches())
    return compile_for.trace_steps(trainer, tracer, batch, batch)["training step"]


@pytest.mark.parametrize("optimizer, layout", [("rwsadagrad", "packed"), ("adagrad", "rows")])
def test_the_traced_program_is_the_one_that_a_run_executes(tmp_path, optimizer, layout):
    """Same parameters, same outputs, same donated memory as in the program that torch_xla hands to the compiler."""
    from test_cost import MODEL

    xla_or_skip()
    tests = Path(__file__).resolve().parent
    environment = {**os.environ, "XLA_FLAGS": f"--xla_dump_to={tmp_path} --xla_dump_hlo_as_text", "PJRT_DEVICE": "CPU", "OMP_NUM_THREADS": "1"}
    code = STEP_ON_XLA.format(root=str(ROOT), tests=str(tests))
    subprocess.run([sys.executable, "-c", code, optimizer, layout], env=environment, check=True, capture_output=True, text=True)
    executed = max((path.read_text() for path in tmp_path.glob("*before_optimizations.txt")), key=len)
    step = traced(optimizer, layout, *MODEL)

    def types(program: str) -> str:
        return re.search(r"entry_computation_layout=(.*)\}", program.split("\n", 1)[0])[1]

    assert types(step.hlo) == types(executed)
    donors = re.search(r"buffer_donor=\{(.*?)\}, entry", executed.split("\n", 1)[0])[1]
    assert set(step.donated) == {int(number) for number in re.findall(r"\((\d+), \{\}\)", donors)}
    assert len([name for name in step.parameters if name.startswith("tables")]) == 1
    assert not re.search(r"= s32\[\d+\]\S* constant\(", step.hlo), "numbers counted up come as data, not written into the program one by one"


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--compile-for=v5e"], "--compile-for=v5e: must be a TPU's name and its chips, as v4:2x2x1"),
        (["--compile-for=v9:2x2"], "--compile-for=v9:2x2: must be"),
        (["--compile-for="], "--compile-for=: must be a TPU's name and its chips"),
        (["--json=x.json"], "--json=x.json: is the report of --compile-for"),
        (["--compile-for=v5e:2x2", "--device=cpu"], "--device=cpu is none; leave --device out"),
        (["--compile-for=v5e:2x2", "--use-gpu"], "compiles for a TPU"),
        (["--compile-for=v5e:2x2", "--save-model=m.pt"], "leave --save-model out"),
        (["--compile-for=v5e:2x2", "--load-model=m.pt"], "leave --load-model out"),
        (["--compile-for=v5e:2x2", "--debug-mode"], "leave --debug-mode out"),
        (["--compile-for=v5e:2x2", "--mlperf-logging", "--mlperf-grad-accum-iter=2"], "leave --mlperf-grad-accum-iter out"),
        (["--compile-for=v5e:2x2", "--inference-only", "--quantize-mlp-with-bit=8"], "leave --quantize-mlp-with-bit and"),
    ],
)
def test_what_makes_no_sense_is_one_line(cli, tmp_path, argv, message):
    outcome = cli(*SMALL, *argv, device=None)
    assert message in outcome.error and len(outcome.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("topology", ["v5e:3x1", "v5e:1x2", "v6e:2x0", "v4:2x2x0", "v5p:4x3x2"])
def test_a_topology_that_the_compiler_refuses(cli, compiler, monkeypatch, topology):
    """One line that says which there are, before minutes of tracing."""
    monkeypatch.setattr(compile_for, "trace_steps", None)
    outcome = cli(*SMALL, f"--compile-for={topology}", device=None)
    assert outcome.error.startswith(f"--compile-for={topology}: there are TPUs of 2 x 2 chips") and len(outcome.err.splitlines()) == 1
    generation = topology.split(":")[0]
    assert f"as {generation}:{tpu_compiler.TOPOLOGIES[generation][0]}, {generation}:" in outcome.error


ASK_LIBTPU = """
import json, os, sys
os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
from jax.experimental import topologies
from dlrm_xla.tpu_compiler import CHIP_CONFIG
known = {}
for name in sys.argv[1:]:
    try:
        topologies.get_topology_desc(platform="tpu", topology_name=name, **CHIP_CONFIG.get(name.split(":")[0], {}))
        known[name] = True
    except Exception as error:
        known[name] = False
print(json.dumps(known))
"""


def test_the_rule_of_topologies_is_libtpus(compiler, tmp_path):
    shapes = ("1x1", "1x2", "2x1", "2x2", "2x3", "2x4", "3x1", "4x2", "4x6", "0x2", "2x0", "1x1x1", "2x2x1", "2x2x3", "2x1x2", "2x2x0", "6x4x5")
    names = {f"{generation}:{shape}" for generation, examples in tpu_compiler.TOPOLOGIES.items() for shape in (*shapes, *examples)}
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", ASK_LIBTPU, *sorted(names)], env=environment, capture_output=True, text=True, check=True)

    def accepted(name: str) -> bool:
        try:
            tpu_compiler.check_topology(name)
        except UserError:
            return False
        return True

    assert {name: accepted(name) for name in names} == json.loads(done.stdout.splitlines()[-1])


def test_a_report_that_nobody_reads(cli_process, tmp_path, compiler):
    """`run_dlrm.py ... | true`: the verdict and the JSON file are there all the same."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        outcome = cli_process(*SMALL, "--inference-only", "--compile-for=v5e:2x2", "--json=report.json", device=None, stdout=writer)
    finally:
        os.close(writer)
    assert outcome.code == 0 and "Exception" not in outcome.err and outcome.err.count("stdout has no reader any more") == 1, outcome.err
    assert json.loads((tmp_path / "report.json").read_text())["passes"]


def test_json_that_cannot_be_written(cli, tmp_path, compiler):
    for name in ("no/such/folder.json", "."):
        outcome = cli(*SMALL, "--compile-for=v5e:2x2", f"--json={name}", device=None)
        assert f"--json={name}: cannot be written" in outcome.error and len(outcome.err.splitlines()) == 1, "before anything is compiled"
    assert not list(tmp_path.iterdir())


def test_missing_packages(monkeypatch, cli):
    def version(name):
        if name == "libtpu":
            raise tpu_compiler.importlib.metadata.PackageNotFoundError(name)
        return tpu_compiler.VERSIONS[name] if name == "jax" else "0.9"

    monkeypatch.setattr(tpu_compiler.importlib.metadata, "version", version)
    outcome = cli(*SMALL, "--compile-for=v5e:2x2", device=None)
    assert "jaxlib 0.7.1 and jaxlib 0.9 is installed" in outcome.error and "pip install -r requirements-tpu-compiler.txt" in outcome.error
    with pytest.raises(UserError, match="libtpu 0.0.21 and libtpu is not installed"):
        tpu_compiler.require({"libtpu": "0.0.21"})


def test_requirements_name_the_versions_and_where_they_have_wheels():
    lines = [line for line in (ROOT / tpu_compiler.REQUIREMENTS).read_text().splitlines() if not line.startswith("#")]
    wanted = dict(line.split(" ;")[0].split("==") for line in lines)
    assert wanted == tpu_compiler.VERSIONS
    assert len({line.split(" ;")[1] for line in lines}) == 1 and 'python_version < "3.13"' in lines[0]


@pytest.mark.parametrize(
    "text, padded, fastest",
    [
        ("f32[1000,16]{1,0:T(8,128)}", 1000 * 128 * 4, 1),
        ("f32[1000,16]{0,1:T(8,128)}", 16 * 1024 * 4, 0),
        ("f32[4220323,128]{1,0:T(8,128)}", 4220328 * 128 * 4, 1),
        ("s32[1000000]{0:T(1024)}", 1000448 * 4, 0),
        ("bf16[10,20]{1,0:T(8,128)(2,1)}", 16 * 128 * 2, 1),
        ("f32[3,5]{1,0}", 60, 1),
    ],
)
def test_bytes_of_an_array_in_its_tiles(text, padded, fastest):
    (array,) = hlo.arrays(text)
    assert (array.padded_bytes, array.order[0], str(array)) == (padded, fastest, text)
    assert hlo.arrays("f32[]{:T(128)}")[0].elements == 1


PROGRAM = """HloModule m, input_output_alias={ {0}: (0, {}, may-alias) }, entry_computation_layout={(f32[1000,128]{1,0}, s32[9]{0})->(f32[8]{0})}

%inner (a: f32[1000,128], b: f32[9,128]) -> f32[1000,128] {
  %a = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %big = f32[1000,128]{1,0:T(8,128)} negate(%a)
  ROOT %scatter.1 = f32[1000,128]{1,0:T(8,128)} scatter(%a, %b, %b), to_apply=%add
}

%outer (c: f32[1000,128], d: f32[9,128]) -> f32[1000,128] {
  %c = f32[1000,128]{1,0:T(8,128)} parameter(0)
  ROOT %fusion.9 = f32[1000,128]{1,0:T(8,128)} fusion(%c, %d), kind=kCustom, calls=%inner
}

%scaled (e: f32[1000,128]) -> f32[1000,128] {
  %e = f32[1000,128]{1,0:T(8,128)} parameter(0)
  ROOT %multiply.1 = f32[1000,128]{1,0:T(8,128)} multiply(%e, %e)
}

ENTRY %main (p0: f32[1000,128], p1: s32[9]) -> (f32[1000,128]) {
  %p0 = f32[1000,128]{1,0:T(8,128)} parameter(0)
  %p1 = s32[9]{0:T(128)} parameter(1)
  %slice-start = ((f32[1000,128]{1,0:T(8,128)}), f32[500,128]{1,0:T(8,128)S(1)}, s32[]{:S(2)}) slice-start(%p0), slice={[0:500], [0:128]}
  %slice-done = f32[500,128]{1,0:T(8,128)S(1)} slice-done(%slice-start)
  %fusion.1 = f32[1000,128]{1,0:T(8,128)} fusion(%p0, %p1), kind=kCustom, calls=%outer
  %fusion.0 = f32[1000,128]{1,0:T(8,128)S(1)} fusion(%p0), kind=kLoop, calls=%scaled
  %sums = f32[9,128]{1,0:T(8,128)} slice(%p0), slice={[0:9], [0:128]}
  %all = f32[9,128]{1,0:T(8,128)} all-reduce(%sums), to_apply=%add
EXTRA
  ROOT %tuple = (f32[1000,128]{1,0:T(8,128)}) tuple(%fusion.1)
}
"""


@pytest.mark.parametrize(
    "extra, found",
    [
        ("", []),
        ("  %copy.3 = f32[1000,128]{0,1:T(8,128)} copy(%p0)", ["copy.3"]),
        ("  %t = f32[128,1000]{1,0:T(8,128)} transpose(%p0), dimensions={1,0}", ["t"]),
        ("  %fusion.2 = f32[1000,128]{1,0:T(8,128)} fusion(%p0), kind=kLoop, calls=%scaled", ["fusion.2"]),
        ("  %w = f32[8000,128]{1,0:T(8,128)} broadcast(%p1), dimensions={}", ["w"]),
        ("  %copy-start.1 = (f32[1000,128]{1,0:T(8,128)}, f32[1000,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%p0)", ["copy-start.1"]),
        ("  %small = f32[500,128]{1,0:T(8,128)} copy(%slice-done)", []),
    ],
)
def test_table_sized_copies_are_seen(extra, found):
    program = PROGRAM.replace("EXTRA", extra)
    made, moved = hlo.table_sized(program, {128_000}, 500_000)
    assert [copy.name for copy in made] == found
    assert moved == 500 * 128 * 4
    assert hlo.donated(program) == {0} and len(hlo.parameters(program)) == 2
    assert hlo.collectives(program) == {"all-reduce": hlo.Sent(1, {"f32": 9 * 128 * 4}, 16 * 128 * 4, 0)}


@pytest.mark.parametrize("kept", [True, False])
def test_a_buffer_that_is_not_updated_in_place_fails(kept):
    """The compiled program takes over the memory that it is given, or does not."""
    store = RowStore(1000, 128, SGD(), PackedLayout(), "meta")
    step = TracedStep("", ("tables:store0.data", ""), (0,))
    program = PROGRAM.replace("EXTRA\n", "")
    if not kept:
        program = program.replace("input_output_alias={ {0}: (0, {}, may-alias) }, ", "")
    compiled = Compiled("", program, arguments=600_000, outputs=512_032, aliased=512_000 if kept else 0, temporaries=100)
    report = compile_for.judge(step, compiled, [store], {"tables:store0.data": 512_000}, 15.75)
    assert (report.not_donated, report.passes) == (([], True) if kept else (["store0.data"], False))
    assert report.memory["tables"] == 512_000 and report.memory["batch and constants"] == 88_000
    config = Config.from_args(flags.parse(["--compile-for=v5e:2x2"]))
    tables = SimpleNamespace(describe=lambda: "1", stores=[store], layout=store.layout, plan=None)
    page = compile_report.lines(config, tables, {"training step": report})
    assert ("training step: NOT UPDATED IN PLACE: store0.data" in page) != kept
    assert page[-1] == ("result: it fits and no step copies a table" if kept else "result: FAILED, see above")


def test_donated_arguments_are_marked():
    text = 'module {\n  func.func @main(%arg0: tensor<8x16xf32> loc("p0"), %arg1: tensor<i64> loc("p1")) -> tensor<8x16xf32> {\n  }\n}'
    marked = tpu_compiler.mark_donated(text, {0})
    assert '%arg0: tensor<8x16xf32> {jax.buffer_donor = true} loc("p0"), %arg1: tensor<i64> loc("p1")' in marked


def test_more_rows_than_numbers_for_them(cli, compiler):
    """Each table alone could be numbered; the store that they share could not."""
    rows = "--arch-embedding-size=1500000000-1500000000"
    outcome = cli(rows, "--arch-sparse-feature-size=4", "--arch-mlp-bot=4-16-4", "--num-batches=1", "--compile-for=v5p:2x2x1", device=None)
    assert outcome.error.startswith("--table-layout=packed: the tables of width 4 have 3000000000 rows together")


def test_json_goes_where_a_link_points_and_into_no_device(cli, tmp_path, compiler):
    target, link, pipe = tmp_path / "target.json", tmp_path / "link.json", tmp_path / "pipe"
    target.write_text("old")
    link.symlink_to(target)
    os.mkfifo(pipe)
    assert "is no ordinary file" in cli("--compile-for=v5e:2x2", f"--json={pipe}", device=None).error
    compile_report.check_writable(link)
    compile_report.write_json(link, {"passes": True})
    assert link.is_symlink() and json.loads(target.read_text()) == {"passes": True}


def test_the_compiler_ends_with_its_run(tmp_path, compiler):
    """SIGKILL of the run: its compiler, which hears no signal while it compiles, is gone soon after."""
    flags = ("--arch-embedding-size=100000-7", "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-512-256-16", "--arch-mlp-top=512-256-1")
    command = [sys.executable, str(ROOT / "run_dlrm.py"), *flags, "--mini-batch-size=4096", "--num-batches=1", "--compile-for=v5e:2x2"]
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as run:
        assert any(line.startswith("compiling ") for line in run.stderr)
        (child,) = [other for other in psutil.Process(run.pid).children(recursive=True) if "dlrm_xla.tpu_compiler" in other.cmdline()]
        run.kill()
    child.wait(timeout=20)
