"""What a run leaves behind: the run folder with metrics.jsonl, config.yaml, environment.json and summary.png, and TensorBoard's files.

Upstream writes TensorBoard's Train/Loss, Test/Acc and mlperf-metrics-test/*; the other tags and the run folder are ours.
"""

import errno
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

from dlrm_xla.console import Interval
from dlrm_xla.metrics import TestMetrics
from dlrm_xla.specs import UserError

PACKAGES = ("torch", "torch_xla", "numpy", "pyarrow", "scikit-learn", "tensorboard")


@contextmanager
def writing(path: Path, flag: str = "--log-dir") -> Iterator[None]:
    """An error of the system while `path` is written becomes one line that names the flag with which to choose another place."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{path}: cannot be written ({reason}); free some space or choose another folder with {flag}") from None


def make_folder(path: Path, flag: str = "--log-dir") -> None:
    with writing(path, flag):
        path.mkdir(parents=True, exist_ok=True)


class LineFile:
    """A text file that grows by whole lines: each is handed to the system at once, so a kill loses the line being written and no other.

    An unfinished last line, left by a kill, is cut off on opening. Errors are UserErrors that name the file and --log-dir.
    """

    def __init__(self, path: Path):
        self.path = path
        with writing(self.path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._cut_unfinished_line()
            self._file = _WholeWrites(path, "ab")

    def write(self, line: str) -> None:
        with writing(self.path):
            self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        self._file.close()

    def _cut_unfinished_line(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size == 0:
            return
        with open(self.path, "rb+") as file:
            end = size
            while end > 0:
                start = max(0, end - 65536)
                file.seek(start)
                newline = file.read(end - start).rfind(b"\n")
                if newline >= 0:
                    end = start + newline + 1
                    break
                end = start
            if end < size:
                file.truncate(end)


class EventFile:
    """One of TensorBoard's event files, with TensorBoard's own record format and messages.

    SummaryWriter is not used because it writes in a thread: a full disk shows as that thread's traceback, and a kill loses its queue. Here
    each event is in the file when the call returns, the scalars of a step are one event (21 us of CPU for six, 131 us with SummaryWriter),
    and start-up takes 0.2 s instead of 1.6 s.

    first_step  TensorBoard forgets what earlier files of the folder say about this step and later ones; None: nothing
    """

    def __init__(self, folder: Path, first_step: int | None = None):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._folder, self._event, self._summary = folder, event_pb2.Event, summary_pb2.Summary
        stem = f"events.out.tfevents.{time.time():010.0f}.{platform.node()}.{os.getpid()}"
        with writing(folder, "--tensor-board-filename"):
            folder.mkdir(parents=True, exist_ok=True)
            names = (folder / f"{stem}.{number}" for number in range(1000))
            self._file = _WholeWrites(next(name for name in names if not name.exists()), "xb")
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        if first_step is not None:
            self._write(step=first_step, session_log=event_pb2.SessionLog(status=event_pb2.SessionLog.START))

    def scalars(self, step: int, values: dict[str, float]) -> None:
        named = [self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        self._write(step=step, summary=self._summary(value=named))

    def hparams(self, settings: dict, tags: list[str]) -> None:
        """Settings of the run for the HParams page, whose figures are the last values of the scalars `tags`.

        They go into the run's own file: SummaryWriter.add_hparams would open a folder inside it, a second run in TensorBoard's list.
        """
        from torch.utils.tensorboard.summary import hparams  # over a second

        for summary in hparams(settings, dict.fromkeys(tags, 0.0)):
            self._write(summary=summary)

    def close(self) -> None:
        self._file.close()

    def _write(self, **fields) -> None:
        with writing(self._folder, "--tensor-board-filename"):
            self._records.write(self._event(wall_time=time.time(), **fields).SerializeToString())


class _WholeWrites:
    """A file whose write is complete or an OSError, after which it is closed: a full disk may take a part of it."""

    def __init__(self, path: Path, mode: str):
        self._file = open(path, mode, buffering=0)  # noqa: SIM115

    def write(self, data: bytes) -> None:
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.close()
            raise

    def close(self) -> None:
        self._file.close()


class Tracker:
    """The run folder: metrics.jsonl, config.yaml, environment.json, TensorBoard's files and, at the end, summary.png.

    run_dir          made if need be; figures of an earlier run in it stay, a "start" line separates them
    tensorboard_dir  may be the same folder
    config           flag name: value, written as --config reads it
    environment      of describe_environment; those of earlier starts are kept under "earlier"
    resumed          this run goes on from a checkpoint at batch `first_step` (counted over all epochs): TensorBoard and summary.png leave
                     out what an earlier process wrote beyond it
    bayes_auc        best AUC that any model can reach, where the data's maker knows it

    Steps count batches over all epochs: num_batches * epoch + batches done in the epoch; an inference-only test has step -1.
    """

    def __init__(
        self,
        run_dir: Path,
        tensorboard_dir: Path,
        config: dict,
        environment: dict,
        resumed: bool = False,
        first_step: int = 0,
        bayes_auc: float | None = None,
    ):
        self.run_dir, self.tensorboard_dir = Path(run_dir), Path(tensorboard_dir)
        with writing(self.run_dir):
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._config = config
        self._tags: dict[str, None] = {}  # a set that keeps the order
        _write_file(self.run_dir / "config.yaml", _yaml(config))
        _write_file(self.run_dir / "environment.json", _with_earlier(self.run_dir / "environment.json", environment))
        self._lines = LineFile(self.run_dir / "metrics.jsonl")
        self._record("start", first_step, None, {"resumed": resumed, "bayes_auc": bayes_auc})
        try:
            self._events = EventFile(self.tensorboard_dir, first_step + 1 if resumed else None)
        except UserError:
            self._lines.close()
            raise

    def train(
        self, step: int, epoch: int, loss: float, interval: Interval, compiles: int | None = None, fallbacks: int | None = None
    ) -> None:
        """compiles, fallbacks: counts so far on XLA, None elsewhere."""
        perf = {"samples_per_s": interval.samples_per_s, "ms_per_it": interval.ms_per_it, "data_wait_share": interval.data_wait_share}
        xla = {name: count for name, count in (("compiles", compiles), ("fallbacks", fallbacks)) if count is not None}
        self._record("train", step, epoch, {"loss": loss, **perf, **xla})
        scalars = {"Train/Loss": loss}
        scalars.update({f"Perf/{name}": value for name, value in perf.items()})
        scalars.update({f"XLA/{name}": count for name, count in xla.items()})
        self._scalars(step, scalars)

    def test(self, step: int, epoch: int | None, metrics: TestMetrics, mlperf: dict[str, float] | None = None) -> None:
        """mlperf: of metrics.mlperf_metrics, which take the place of Test/Acc as upstream's do."""
        ours = {"AUC": metrics.auc, "LogLoss": metrics.log_loss, "NE": metrics.normalized_entropy, "Calibration": metrics.calibration}
        values = asdict(metrics)
        self._record("test", step, epoch, values if mlperf is None else {**values, "mlperf": mlperf})
        upstream = {"Test/Acc": metrics.accuracy} if mlperf is None else {f"mlperf-metrics-test/{name}": v for name, v in mlperf.items()}
        self._scalars(step, upstream | {f"Test/{name}": value for name, value in ours.items() if value is not None})

    def close(self, final: dict) -> dict[str, Path]:
        """Ends the run: `final` (last figures, by name) to metrics.jsonl, hparams to TensorBoard, the picture.

        Returns the paths {"run", "metrics", "tensorboard", "summary"}.
        """
        from dlrm_xla import summary

        self._record("end", None, None, final)
        settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in self._config.items()}
        self._events.hparams(settings, [tag for tag in self._tags if not tag.startswith(("Perf/", "XLA/"))])
        self.stop()
        with writing(self.run_dir / "summary.png"):
            picture = summary.draw(self.run_dir)
        return {"run": self.run_dir, "metrics": self._lines.path, "tensorboard": self.tensorboard_dir, "summary": picture}

    def stop(self) -> None:
        """Closes the files of a run that ends early; after close() it does nothing."""
        self._lines.close()
        self._events.close()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        self.stop()

    def _record(self, kind: str, step: int | None, epoch: int | None, values: dict) -> None:
        row = {"time": round(time.time(), 3), "kind": kind, "step": step, "epoch": epoch, **values}
        self._lines.write(json.dumps(_plain(row), allow_nan=False))

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._events.scalars(step, scalars)
        self._tags.update(dict.fromkeys(scalars))


class SilentTracker:
    """Of a rank that is not the first: a Tracker that leaves nothing behind."""

    def __init__(self, run_dir: Path, tensorboard_dir: Path):
        self.run_dir, self.tensorboard_dir = Path(run_dir), Path(tensorboard_dir)

    def train(
        self, step: int, epoch: int, loss: float, interval: Interval, compiles: int | None = None, fallbacks: int | None = None
    ) -> None:
        pass

    def test(self, step: int, epoch: int | None, metrics: TestMetrics, mlperf: dict[str, float] | None = None) -> None:
        pass

    def close(self, final: dict) -> dict[str, Path]:
        return {"run": self.run_dir, "tensorboard": self.tensorboard_dir, "metrics": self.run_dir, "summary": self.run_dir}

    def stop(self) -> None:
        pass

    def __enter__(self) -> "SilentTracker":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        pass


def describe_environment(device: str, argv: list[str], world: int = 1, dist_backend: str = "") -> dict:
    """What a reader needs to repeat a run: versions, machine, device, commit of this code (None outside a checkout), command line, time."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "argv": list(argv),
        "device": device,
        "world_size": world,
        "dist_backend": dist_backend,
        "python": platform.python_version(),
        **{package.replace("-", "_"): _version(package) for package in PACKAGES},
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "git_commit": _commit(Path(__file__).resolve().parent.parent),
    }


def _version(package: str) -> str | None:
    """From the installed package's metadata, which does not import it."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(root: Path) -> str | None:
    """40 hex digits, "-dirty" behind them if tracked files were changed."""
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _plain(value):
    """JSON has no NaN and no infinity: None stands for them; NumPy's numbers become Python's."""
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def _yaml(config: dict) -> str:
    import yaml

    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True)


def _with_earlier(path: Path, environment: dict) -> str:
    try:
        before = json.loads(path.read_text())
    except (OSError, ValueError):
        before = None
    if isinstance(before, dict):
        environment = {**environment, "earlier": [*before.pop("earlier", []), before]}
    return json.dumps(_plain(environment), indent=2) + "\n"


def _write_file(path: Path, text: str) -> None:
    """Whole or not at all: written beside, then put in place."""
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(beside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
