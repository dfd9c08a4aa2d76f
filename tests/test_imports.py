"""Who may import whom, and that our `compression` folder and Python 3.14's package of the same name live together."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

# the parts of dlrm_xla; each level may import itself and those below
LEVELS = (
    {"specs", "files", "flags", "config", "rules", "batch", "sharding", "planner", "plan_report"},
    {"ops", "layouts", "backends", "metrics", "console", "mlperf", "tracking", "summary", "hlo", "tpu_compiler"},
    {"tables", "segments", "embeddings", "stores", "quantized_store", "reads", "exchange", "optim", "losses", "init"},
    {"models"},
    {"train", "evaluate", "checkpoint", "checkpoint_file", "shards"},
    {"session", "debug", "profile", "onnx_export", "quantize", "compile_for", "compile_report", "board", "launch", "xla_spawn", "export_checkpoint"},
)
CONTRACTS = {"files", "flags", "config", "specs", "batch"}
COMPRESSION_MAY = CONTRACTS | {"ops", "tables", "embeddings", "layouts", "stores", "init", "optim"}
# python -m compression COMMAND: like run_dlrm.py they know every package, but not each other's insides, and no method imports them
COMMANDS = {
    "__main__", "catalogue", "convert", "convert_report", "show_ledger", "stored", "training_data", "report", "sweep", "sweep_time", "frontier",
}  # fmt: skip
FILES = sorted(path for folder in ("dlrm_xla", "data_loaders", "compression") for path in (ROOT / folder).rglob("*.py"))
OUR_PACKAGES = ("dlrm_xla", "data_loaders", "compression", "run_dlrm", "benchmarks", "tests")


def imports(path: Path) -> set[str]:
    """Full names of all modules that a file imports, wherever in it: "from a.b import c" gives a.b and a.b.c."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: line {node.lineno}: a relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and "import_module" in ast.unparse(node.func) and node.args:
            names.add(ast.literal_eval(node.args[0]))
    return names


def part_of(name: str) -> str | None:
    """The part of dlrm_xla that a module name lies in; None for other packages and for dlrm_xla itself."""
    pieces = name.split(".")
    return pieces[1] if pieces[0] == "dlrm_xla" and len(pieces) > 1 else None


def level(part: str) -> int:
    known = [number for number, parts in enumerate(LEVELS) if part in parts]
    assert known, f"dlrm_xla.{part} is on no level; put it into LEVELS"
    return known[0]


def id_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=id_of)
def test_who_imports_whom(path):
    package, names = path.relative_to(ROOT).parts[0], imports(path)
    ours = {name.split(".")[0] for name in names} & set(OUR_PACKAGES)
    used = {part_of(name) for name in names} - {None}
    if package == "data_loaders":
        assert ours <= {"data_loaders", "dlrm_xla"} and used <= CONTRACTS
    elif package == "compression" and path.stem in COMMANDS:
        assert ours <= {"compression", "dlrm_xla", "data_loaders"}
    elif package == "compression":
        assert not {name.split(".")[1] for name in names if name.startswith("compression.")} & COMMANDS
        assert ours <= {"compression", "dlrm_xla"} and used <= COMPRESSION_MAY
    elif path == ROOT / "dlrm_xla" / "__init__.py":
        assert ours == {"compression"} and not used  # to find it, see there
    else:
        part = path.relative_to(ROOT / "dlrm_xla").parts[0].removesuffix(".py")
        assert ours <= {"dlrm_xla"}
        above = {other for other in used if level(other) > level(part)}
        assert not above, f"dlrm_xla.{part} (level {level(part)}) imports {', '.join(sorted(above))} from above it"


def test_torch_xla_is_imported_in_one_file():
    users = [id_of(path) for path in [*FILES, ROOT / "run_dlrm.py"] if any(name.split(".")[0] == "torch_xla" for name in imports(path))]
    assert users in (["dlrm_xla/backends/xla.py"], ["dlrm_xla/backends/xla.py", "dlrm_xla/backends/xla_spmd.py"])


def test_nothing_imports_the_root():
    for path in [*FILES, *(ROOT / "benchmarks").rglob("*.py")]:
        assert not any(name.split(".")[0] == "run_dlrm" for name in imports(path)), path


def test_the_contracts_need_no_library_but_torch_and_numpy():
    standard = set(sys.stdlib_module_names)
    for part in CONTRACTS:
        outside = {name.split(".")[0] for name in imports(ROOT / "dlrm_xla" / f"{part}.py")} - standard - {"dlrm_xla"}
        assert outside <= {"torch", "numpy"} | ({"yaml"} if part == "flags" else set()), part


def test_only_what_stands_nearest_to_the_machine_uses_the_environment():
    def reads(path: Path) -> bool:
        nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        return any(isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv") for node in nodes)

    # profile.py quietens a library of the profiler before it is loaded; tpu_compiler.py sets the compiler up in a process of its own
    allowed = {"dlrm_xla/backends/__init__.py", "dlrm_xla/backends/xla.py", "dlrm_xla/launch.py", "dlrm_xla/profile.py", "dlrm_xla/tpu_compiler.py"}
    allowed |= {"dlrm_xla/backends/xla_spmd.py"}  # how many devices XLA's CPU backend shows
    assert {id_of(path) for path in FILES if reads(path)} <= allowed


def test_the_compression_folder_can_live_beside_pythons():
    names = {path.stem for path in (ROOT / "compression").iterdir()}
    assert not names & {"__init__", "gzip", "bz2", "lzma", "zlib", "zstd", "_common"}


def run_python(code: str, *path: Path) -> str:
    """stdout of a fresh interpreter started in the repository's root, with `path` before everything else."""
    setup = f"import sys; sys.path[:0] = {[str(folder) for folder in path]!r}\n"
    done = subprocess.run([sys.executable, "-c", setup + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


ORDERS = {
    "gzip first": ("import gzip", "import dlrm_xla", "import compression.registry"),
    "ours first": ("import dlrm_xla", "import compression.registry", "import gzip"),
    "compression first": ("import compression", "import gzip", "import dlrm_xla", "import compression.registry"),
}
# stands for compression.registry's imports, torch among them, so that these processes take 0.1 s
FIND = "import importlib.util; spec = importlib.util.find_spec('compression.registry'); print(spec.origin)"


@pytest.mark.parametrize("order", ORDERS)
def test_gzip_and_ours_in_every_order(order):
    lines = [FIND if line == "import compression.registry" else line for line in ORDERS[order]]
    out = run_python("\n".join(lines) + "\nprint(gzip.decompress(gzip.compress(b'whole')))")
    assert out.splitlines() == [str(ROOT / "compression" / "registry.py"), "b'whole'"]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("ours_comes_first_on_the_path", [False, True])
def test_beside_a_standard_library_that_owns_compression(tmp_path, order, ours_comes_first_on_the_path):
    """Python 3.14's library: a package `compression`, and a gzip that imports from it. A stand-in on sys.path."""
    package = tmp_path / "compression"
    (package / "_common").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "_common" / "__init__.py").write_text("")
    (package / "_common" / "_streams.py").write_text("BUFFER_SIZE = 8192\n")
    (tmp_path / "gzip.py").write_text("from compression._common import _streams\nSTAND_IN = _streams.BUFFER_SIZE\n")
    lines = [FIND if line == "import compression.registry" else line for line in ORDERS[order]]
    path = [ROOT, tmp_path] if ours_comes_first_on_the_path else [tmp_path]
    assert run_python("\n".join([*lines, "print(gzip.STAND_IN)"]), *path).splitlines() == [str(ROOT / "compression" / "registry.py"), "8192"]
