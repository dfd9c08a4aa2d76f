"""One run of a sweep: the processes of run_dlrm.py that train and test it, and the figures that they leave.

A run has its figures in one file, written when it is finished; what it needs on the way lies in a folder of its own that goes at its end.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from compression.sweep_plan import Run
from dlrm_xla.specs import UserError, one_line

ROOT = Path(__file__).resolve().parent.parent
PRINT_FREQ = 50  # batches to a training loss
NO_END = 10**9  # --test-freq: a test comes at the end of every epoch
TEST_FIGURES = ("auc", "log_loss", "accuracy", "normalized_entropy", "calibration")


class Failed(Exception):
    """A process of a run has ended with an error; the message is its line."""


class Stopped(Exception):
    """The sweep was interrupted."""


class Children:
    """The processes that are running, so that an interrupted sweep ends them."""

    def __init__(self):
        self._running: set[subprocess.Popen] = set()
        self._lock, self._stopped = threading.Lock(), False

    def run(self, command: list[str], folder: Path, log: Path) -> None:
        """Waits for it. Failed with its error; what it prints goes to `log`. One thread: a core is for one run."""
        with open(log, "ab") as file:
            with self._lock:
                if self._stopped:
                    raise Stopped
                # a group of its own, so that Ctrl-C reaches it through stop() alone
                child = subprocess.Popen(
                    ["env", "OMP_NUM_THREADS=1", *command], cwd=folder, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
                self._running.add(child)
        status = child.wait()
        with self._lock:
            self._running.discard(child)
            if self._stopped:
                raise Stopped
        if status:
            raise Failed(error_line(log, status))

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


def error_line(log: Path, status: int) -> str:
    """What an ended process said: its line "error: ...", or else its last one."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    last = errors[-1] if errors else (lines[-1] if lines else "")
    return one_line(last) if last else f"ended with status {status}"


@dataclass(frozen=True)
class Sweep:
    """What all runs share.

    flags      of run_dlrm.py: the protocol, the raw file; the last of a name counts
    processed  of each choice of data flags: the file of arrays
    threshold  tables of more rows are compressed
    """

    out: Path
    flags: tuple[str, ...]
    learning_rate: float
    epochs: int
    processed: dict[tuple[str, ...], Path]
    threshold: int = 200
    children: Children = field(default_factory=Children)

    def result(self, run: Run) -> Path:
        return self.out / "runs" / f"{run.key}.json"

    def source(self, seed: int) -> Path:
        return self.out / "source" / f"s{seed}.pt"

    def argv(self, run: Run, *more: str) -> list[str]:
        """Flags of run_dlrm.py."""
        return [*self.flags, f"--processed-data-file={self.processed[run.data]}", *run.flags(self.learning_rate), *more]

    def is_done(self, run: Run) -> bool:
        """Failed runs are tried again."""
        done = read_json(self.result(run))
        return done is not None and "error" not in done and (run.kind != "source" or self.source(run.seed).exists())

    def do(self, run: Run, sizes: dict) -> dict:
        """Its result, which is then on the disk too; sizes: what is known of it beforehand, or {"error": why it cannot be}."""
        head = {"label": run.label, "point": run.point, "seed": run.seed, "kind": run.kind, **sizes}
        folder = self.out / "work" / run.key
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        log, started = folder / "log.txt", time.monotonic()
        kept = self.out / "failed" / f"{run.key}.txt"
        kept.unlink(missing_ok=True)
        try:
            epochs = [] if "error" in sizes else self._train(run, folder, log)
            found = {**head, "epochs": epochs, "seconds": round(time.monotonic() - started, 1)}
        except Failed as error:
            found = {**head, "error": str(error)}
            kept.parent.mkdir(exist_ok=True)
            os.replace(log, kept)
        write_json(self.result(run), found)
        shutil.rmtree(folder, ignore_errors=True)
        return found

    def _train(self, run: Run, folder: Path, log: Path) -> list[dict]:
        def run_dlrm(name: str, *flags: str) -> Path:
            tests = (f"--print-freq={PRINT_FREQ}", f"--test-freq={NO_END}", f"--log-dir={folder / name}")
            self.children.run([sys.executable, str(ROOT / "run_dlrm.py"), *flags, *tests], folder, log)
            return folder / name / "metrics.jsonl"

        if run.kind == "train":
            return read_epochs(run_dlrm("run", *self.argv(run, f"--nepochs={self.epochs}")))
        source = self.source(run.seed)
        plain = Run(run.label, run.point, run.seed)
        if run.kind == "source":
            source.parent.mkdir(exist_ok=True)
            return read_epochs(run_dlrm("run", *self.argv(plain, "--nepochs=1", f"--save-model={source}")))
        if not source.exists():
            raise Failed(f"no trained tables to convert: the run source-s{run.seed} failed")
        made = folder / "converted.pt"
        budget = (f"--compress-to={run.budget}",) if run.budget else ()
        command = [sys.executable, "-m", "compression", "convert", f"--load-model={source}", f"--method={run.method}", *budget]
        command += [f"--compress-threshold={self.threshold}", f"--numpy-rand-seed={run.seed}"]
        with_root = ["env", f"PYTHONPATH={ROOT}"]
        self.children.run([*with_root, *command, f"--save-model={made}"], folder, log)
        epochs = read_epochs(run_dlrm("test", *self.argv(plain, f"--load-model={made}", "--inference-only")))
        if self.epochs > 1:
            epochs += read_epochs(run_dlrm("on", *self.argv(plain, f"--load-model={made}", f"--nepochs={self.epochs}")))
        return epochs


def read_epochs(metrics: Path) -> list[dict]:
    """The tests of a run, oldest first, each with "train_loss": the mean loss of the batches of the epoch's second half as they came, before the
    step that learnt them; None for a test without training. It is the mean over whole intervals of PRINT_FREQ batches that end in that half.
    """
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    epochs, began, before = [], 0, 0
    losses: list[tuple[int, int, float]] = []  # where an interval ends, its batches, its loss
    for row in rows:
        if row["kind"] == "start":
            began = before = row["step"]
        elif row["kind"] == "train":
            losses.append((row["step"], row["step"] - before, row["loss"]))
            before = row["step"]
        elif row["kind"] == "test":
            half = [(batches, loss) for end, batches, loss in losses if end > (began + row["step"]) / 2]
            mean = sum(batches * loss for batches, loss in half) / sum(batches for batches, _ in half) if half else None
            epochs.append({**{name: row[name] for name in TEST_FIGURES}, "train_loss": mean, "test_rows": row["num_rows"]})
            began, losses = row["step"], []
    if not epochs:
        raise Failed("it left no test")
    return epochs


def read_json(path: Path) -> dict | None:
    """None where it is not there."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        raise UserError(f"{path}: is no JSON; delete it, and its run is done again") from None


def write_json(path: Path, content: dict) -> None:
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
