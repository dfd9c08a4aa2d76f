"""What several tests share: the command line in this process or in one of its own, and Criteo-format files, made up or real."""

import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

# two workers of two spinning threads each on two cores take ten times as long as two of one
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402
import pytest  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
REAL_CRITEO = ROOT.parent / "shared" / "data" / "criteo_kaggle_137k" / "train.txt.gz"

# four tables of random data; a run takes a fraction of a second
SMALL = (
    "--arch-sparse-feature-size=8", "--arch-embedding-size=50-20-100-3", "--arch-mlp-bot=5-16-8", "--arch-mlp-top=16-8-1",
    "--mini-batch-size=32", "--num-batches=12", "--learning-rate=0.1", "--loss-function=bce", "--round-targets=True",
)  # fmt: skip
# a model for Criteo's 13 + 26 columns
CRITEO_MODEL = (
    "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-32-16", "--arch-mlp-top=32-1", "--data-generation=dataset", "--loss-function=bce",
    "--round-targets=True", "--learning-rate=0.1", "--mini-batch-size=64",
)  # fmt: skip


@dataclass
class Outcome:
    """What a command line came to."""

    code: int
    out: str
    err: str

    @property
    def losses(self) -> list[float]:
        """Of the lines "Finished training it ...", to the six digits printed."""
        return [float(loss) for loss in re.findall(r"^Finished training it .* loss (\S+)", self.out, re.M)]

    @property
    def error(self) -> str:
        """The message, where the run ended as bad input must: code 2 and, last on stderr, the one line that starts with "error: "."""
        lines = self.err.splitlines()
        assert self.code == 2, f"exit code {self.code}, stderr {self.err!r}"
        assert "Traceback" not in self.err
        assert [line for line in lines if line.startswith("error: ")] == lines[-1:], self.err
        return lines[-1].removeprefix("error: ")


def start_xla() -> str:
    """Why --device=xla cannot be tested here; empty where it can. Autograd's engine must meet XLA before its first backward pass: one that
    has only seen the CPU cannot run on XLA later, and one process tests both."""
    from dlrm_xla import backends
    from dlrm_xla.specs import UserError

    try:
        backends.make("xla")
    except UserError as error:
        return str(error)
    return ""


WITHOUT_XLA = start_xla()


def xla_or_skip() -> None:
    """Skips where torch_xla has no wheel; where it has one, XLA must work."""
    if WITHOUT_XLA:
        has_wheels = sys.platform == "linux" and platform.machine() == "x86_64" and sys.version_info < (3, 14)
        (pytest.fail if has_wheels else pytest.skip)(WITHOUT_XLA)


@pytest.fixture(params=["cpu", "xla"])
def backend(request):
    """A test for each backend."""
    from dlrm_xla import backends

    if request.param == "xla":
        xla_or_skip()
    return backends.make(request.param)


@pytest.fixture
def cli(capsys, tmp_path, monkeypatch):
    """cli(*flags, device="cpu") -> Outcome: run_dlrm.main in this process, in an empty folder. device=None leaves --device out."""
    import run_dlrm

    monkeypatch.chdir(tmp_path)

    def run(*flags: str, device: str | None = "cpu") -> Outcome:
        if device == "xla":
            xla_or_skip()
        capsys.readouterr()
        try:
            code = run_dlrm.main([*map(str, flags), *([f"--device={device}"] if device else [])])
        except SystemExit as leaving:  # --help
            code = leaving.code
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def cli_process(tmp_path):
    """cli_process(*flags, device="cpu", before="", env=None) -> Outcome: a process of its own, 2 to 4 s. before: Python to run there first."""

    def run(*flags: str, device: str | None = "cpu", before: str = "", env: dict | None = None, **options) -> Outcome:
        code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{before}\nimport run_dlrm; sys.exit(run_dlrm.main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, *map(str, flags), *([f"--device={device}"] if device else [])]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": tmp_path, "timeout": 120, **options}
        done = subprocess.run(command, text=True, env=env, **options)
        return Outcome(done.returncode, done.stdout or "", done.stderr or "")

    return run


def criteo_lines(num_rows: int, seed: int = 0) -> list[str]:
    """Made-up rows in Criteo's format, a tenth to a fifth of the cells empty; upstream's losses were recorded on the first 703 of seed 0."""
    rng = np.random.default_rng(seed)

    def count() -> str:
        return "" if rng.random() < 0.2 else str(rng.integers(-2, 200))

    def hashed(distinct: int) -> str:
        return "" if rng.random() < 0.1 else f"{int(rng.integers(0, distinct)) * 2654435761 % 2**32:08x}"

    distinct_ids = [*(3, 5, 7, 10, 20, 50) * 4, 11, 13]
    lines = []
    for _ in range(num_rows):
        label = "1" if rng.random() < 0.3 else "0"
        lines.append("\t".join([label, *(count() for _ in range(13)), *map(hashed, distinct_ids)]))
    return lines


@pytest.fixture(scope="session")
def criteo_rows() -> list[str]:
    """The 703 made-up rows."""
    return criteo_lines(703)


@pytest.fixture
def criteo_file(tmp_path, criteo_rows) -> Path:
    """The 703 made-up rows in a folder of their own, as K/train.txt."""
    path = tmp_path / "K" / "train.txt"
    path.parent.mkdir()
    path.write_text("".join(f"{line}\n" for line in criteo_rows))
    return path


@pytest.fixture(scope="session")
def real_criteo() -> Path:
    """The real Criteo rows, which may not be distributed with the project; without them the test is skipped."""
    if not REAL_CRITEO.is_file():
        pytest.skip(f"needs the real Criteo rows at {REAL_CRITEO}, which may not be distributed")
    return REAL_CRITEO
