"""What a run says while it works: Console (upstream's lines on stdout, ours on stderr) and Meter (where the time goes).

stdout carries upstream's lines byte for byte and nothing else; our figures go to stderr, into a progress bar where that is a terminal.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TextIO

from dlrm_xla.metrics import TestMetrics
from dlrm_xla.specs import UserError

BAR = "{percentage:3.0f}% {bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


@dataclass(frozen=True)
class Interval:
    """Figures of the time between two lines of the log.

    samples_per_s    rows through the step per second, waiting for data included, tests and checkpoints not
    ms_per_it        upstream's: the step alone; with --mlperf-logging the wait for the batch too
    data_wait_share  0..1 of that time spent waiting for a batch
    seconds_left     to the end of the run, tests included at their rate so far
    """

    samples_per_s: float
    ms_per_it: float
    data_wait_share: float
    seconds_left: float


class Meter:
    """Where the time goes. For each batch: waiting(), arrived(), finished(rows). Tests and checkpoints: inside paused(). A line: read().

    num_batches  that this process will train, all epochs together
    count_wait   ms_per_it includes the wait for the batch, as upstream's does under --mlperf-logging
    clock        seconds
    """

    MEMORY = 0.9  # weight that an interval's speed keeps at each later read(): the time left follows about the last ten lines

    def __init__(self, num_batches: int, count_wait: bool = False, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._batches_left = num_batches
        self._count_wait = count_wait
        self._batches_done = 0
        self._recent_seconds = self._recent_batches = 0.0
        self._pauses = 0.0  # of the whole run
        self._reset()
        self._mark = self._start

    def _reset(self) -> None:
        self._start = self._clock()
        self._wait = self._step = self._paused = 0.0
        self._rows = self._batches = 0

    def waiting(self) -> None:
        self._mark = self._clock()

    def arrived(self) -> None:
        now = self._clock()
        self._wait += now - self._mark
        self._mark = now

    def finished(self, num_rows: int) -> None:
        self._step += self._clock() - self._mark
        self._rows += num_rows
        self._batches += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        start = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - start
            self._paused += seconds
            self._pauses += seconds

    def read(self) -> Interval:
        """Figures since the last read(), then a new interval starts."""
        active = max(self._clock() - self._start - self._paused, 1e-9)
        self._batches_done += self._batches
        self._batches_left -= self._batches
        self._recent_seconds = self.MEMORY * self._recent_seconds + active
        self._recent_batches = self.MEMORY * self._recent_batches + self._batches
        per_batch = self._recent_seconds / max(self._recent_batches, 1e-9) + self._pauses / max(self._batches_done, 1)
        busy = self._step + (self._wait if self._count_wait else 0.0)
        interval = Interval(
            samples_per_s=self._rows / active,
            ms_per_it=1000.0 * busy / max(self._batches, 1),
            data_wait_share=min(self._wait / active, 1.0),
            seconds_left=max(self._batches_left, 0) * per_batch if self._batches_done else 0.0,
        )
        self._reset()
        return interval


class Console:
    """Upstream's lines on `out`, ours on `err`.

    print_time       ms/it are shown, else -1.00
    print_wall_time  " (HH:MM)" ends each training line

    A reader of stdout that goes away (`| head`) does not end the run: a note says so and the lines are dropped.
    """

    def __init__(self, print_time: bool = False, print_wall_time: bool = False, out: TextIO | None = None, err: TextIO | None = None):
        self._print_time, self._print_wall_time = print_time, print_wall_time
        # Python sets sys.stdout to None where the shell closed it (`>&-`)
        self._out = out or sys.stdout or open(os.devnull, "w")  # noqa: SIM115
        self._err = err or sys.stderr or open(os.devnull, "w")  # noqa: SIM115
        self._bar = None

    # upstream's lines, in the order of a run

    def ranks(self, size: int, backend: str) -> None:
        """Where there are several. backend: "gloo" | "nccl" | "xla"."""
        self.line(f"Running on {size} ranks using {backend} backend")

    def world(self, size: int = 1, rank: int = 0, local_rank: int = 0) -> None:
        """Upstream leaves this line out in debug mode."""
        self.line(f"world size: {size}, current rank: {rank}, local rank: {local_rank}")

    def device(self, num_gpus: int = 0) -> None:
        self.line(f"Using {num_gpus} GPU(s)..." if num_gpus else "Using CPU...")

    def arguments(self, flags: dict) -> None:
        """With --mlperf-logging: upstream's flags and "ln_emb", the rows of each table."""
        self.line(f"command line args:  {json.dumps(flags)}")

    def loading(self, path: str) -> None:
        self.line(f"Loading saved model {path}")

    def loaded(
        self,
        epoch: int,
        num_epochs: int,
        batch: int,
        num_batches: int,
        num_test_batches: int,
        loss: float,
        accuracy: float,
        auc: float | None = None,
    ) -> None:
        """Three lines about a checkpoint; accuracy is 0..1; auc is told with --mlperf-logging."""
        self.line(f"Saved at: epoch = {epoch:d}/{num_epochs:d}, batch = {batch:d}/{num_batches:d}, ntbatch = {num_test_batches:d}")
        self.line(f"Training state: loss = {loss:.6f}")
        self.line(f"Testing state: accuracy = {accuracy * 100:3.3f} %" + ("" if auc is None else f", auc = {auc:.3f}"))

    def header(self) -> None:
        self.line("time/loss/accuracy (if enabled):")

    def train(self, done: int, num_batches: int, epoch: int, loss: float, interval: Interval, compiles: int | None = None) -> None:
        """One training line, then ours.

        done      batches of this epoch, 1..num_batches; epoch counts from 0
        compiles  XLA programs compiled so far; None where there is no compiler
        """
        ms = interval.ms_per_it if self._print_time else -1
        wall_time = time.strftime(" (%H:%M)") if self._print_wall_time else ""
        self.line(f"Finished training it {done}/{num_batches} of epoch {epoch}, {ms:.2f} ms/it, loss {loss:.6f}{wall_time}")
        parts = [f"{interval.samples_per_s:,.0f} samples/s", f"{100 * interval.data_wait_share:.1f} % of time waiting for data"]
        if compiles is not None:
            parts.append(f"{compiles} compiles")
        if self._bar is None:
            self.note("  " + ", ".join([*parts, f"{duration(interval.seconds_left)} left"]))
        else:  # shown when the bar is drawn next, at most 0.1 s later
            self._bar.set_postfix_str(", ".join(parts), refresh=False)

    def testing(self, done: int, num_batches: int, epoch: int) -> None:
        self.line(f"Testing at - {done}/{num_batches} of epoch {epoch},")

    def testing_only(self) -> None:
        self.line("Testing for inference only")

    def accuracy(self, accuracy: float, best: float) -> None:
        """Both 0..1; best includes this test."""
        self.line(f" accuracy {accuracy * 100:3.3f} %, best {best * 100:3.3f} %")

    def mlperf(self, values: dict[str, float], best_auc: float, best_accuracy: float) -> None:
        """values of metrics.mlperf_metrics; upstream's best accuracy is always 0."""
        self.line(
            f"recall {values['recall']:.4f}, precision {values['precision']:.4f}, f1 {values['f1']:.4f}, ap {values['ap']:.4f}, "
            f"auc {values['roc_auc']:.4f}, best auc {best_auc:.4f}, "
            f"accuracy {values['accuracy'] * 100:3.3f} %, best accuracy {best_accuracy * 100:3.3f} %"
        )

    def saving(self, path: str) -> None:
        self.line(f"Saving model to {path}")

    def threshold_reached(self, metric: str, threshold: float) -> None:
        """metric: "accuracy" | "auc"."""
        self.line(f"MLPerf testing {metric} threshold {threshold} reached, stop training")

    # ours

    def test_figures(self, metrics: TestMetrics) -> None:
        """Our line after upstream's test line."""
        figures = {"AUC": metrics.auc, "log loss": metrics.log_loss, "NE": metrics.normalized_entropy, "calibration": metrics.calibration}
        parts = [f"{name} {value:.6f}" for name, value in figures.items() if value is not None]
        self.note(f"  test: {', '.join(parts)}, {metrics.num_rows:,} rows")

    def start_bar(self, num_batches: int, done: int = 0) -> None:
        """A progress bar over all batches of the run, `done` of them before it began; nothing unless stderr is a terminal."""
        if self._err.isatty():
            from tqdm import tqdm

            known = os.get_terminal_size(self._err.fileno()).columns > 0  # a terminal without a size has 0, at which tqdm draws nothing
            self._bar = tqdm(
                total=num_batches,
                initial=done,
                file=self._err,
                ncols=None if known else 100,
                nrows=None if known else 24,
                dynamic_ncols=known,
                smoothing=0.1,
                bar_format=BAR,
            )

    def advance(self) -> None:
        """One more batch is done."""
        if self._bar is not None:
            self._bar.update(1)

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def line(self, text: str) -> None:
        """One line on stdout, at once. It takes the bar's place on a terminal, and the bar is drawn again below it."""
        self._write(self._out, text)

    def note(self, text: str) -> None:
        """One line on stderr."""
        self._write(self._err, text)

    def _write(self, stream: TextIO, text: str) -> None:
        try:
            if self._bar is not None and stream.isatty():
                with self._bar.external_write_mode(file=self._err):
                    _write_line(stream, text)
            else:
                _write_line(stream, text)
        except BrokenPipeError:
            _drop_output(stream)
            if stream is self._out:
                self.note("stdout has no reader any more; the run goes on, and its files are written")
        except OSError as error:
            _drop_output(stream)
            name = "stdout" if stream is self._out else "stderr"
            raise UserError(f"{name} cannot be written ({error.strerror}); free some space or send it elsewhere") from None


class SilentConsole(Console):
    """Of a rank that is not the first: upstream's line about ranks, which each of them prints, and nothing else."""

    def world(self, size: int = 1, rank: int = 0, local_rank: int = 0) -> None:
        super()._write(self._out, f"world size: {size}, current rank: {rank}, local rank: {local_rank}")

    def start_bar(self, num_batches: int, done: int = 0) -> None:
        pass

    def _write(self, stream: TextIO, text: str) -> None:
        pass


def duration(seconds: float) -> str:
    """h:mm:ss"""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def _write_line(stream: TextIO, text: str) -> None:
    try:
        stream.write(text + "\n")
    except UnicodeEncodeError:  # a path in a name that this terminal's encoding lacks
        encoding = stream.encoding or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()


def _drop_output(stream: TextIO) -> None:
    """What is still buffered, and all that follows, goes nowhere; so Python's own flush at exit does not fail either."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
