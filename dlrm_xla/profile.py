"""--enable-profiling: what each operator cost, as upstream's three files dlrm_s_pytorch<time>{_shape.prof,_total.prof,.json}.

Every operator of the whole run is kept in memory until its end: 4.6 MiB for a batch of a 26-table model, measured over 300 and 1200 batches on
the CPU. --num-batches keeps the run short.
Differs from upstream: files appear whole; on XLA, where upstream has nothing, the host's side is recorded.
"""

import datetime
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from dlrm_xla.specs import UserError

SORT_BY = "self_cpu_time_total"
MEMORY_PER_BATCH = 4.6 * 2**20  # bytes
MANY_BATCHES = 500


@contextmanager
def profiled(enabled: bool, device: str, num_batches: int, folder: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Records the operators of the block, and writes the three files into `folder` when it ends without an error.

    device       "cpu" | "cuda" | "xla"
    num_batches  that the block will go through; a large number draws a warning
    note         takes our lines

    UserError where the files cannot be written; whether they can be is asked first.
    """
    if not enabled:
        yield
        return
    if not os.access(folder, os.W_OK):
        raise UserError(f"--enable-profiling: no permission to write in {folder.absolute()}; start in another folder")
    if num_batches > MANY_BATCHES:
        gigabytes = num_batches * MEMORY_PER_BATCH / 2**30
        note(f"warning: profiling {num_batches:,} batches may take about {gigabytes:.0f} GiB of memory; --num-batches makes it fewer")
    if device != "cuda":
        # without a CUDA device the profiler's library prints an error that concerns nobody
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")
    if device == "xla":
        note("profiling: the files will show what the host does; XLA's own work on the device is not in them")
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True, acc_events=True) as profile:
        yield
    stem = "dlrm_s_pytorch" + str(datetime.datetime.now()).replace(" ", "_")
    by_shape, total = profile.key_averages(group_by_input_shape=True), profile.key_averages()
    _write(folder / f"{stem}_shape.prof", lambda path: path.write_text(by_shape.table(sort_by=SORT_BY)))
    _write(folder / f"{stem}_total.prof", lambda path: path.write_text(total.table(sort_by=SORT_BY)))
    _write(folder / f"{stem}.json", lambda path: profile.export_chrome_trace(str(path)))
    note(f"profile: {folder / stem}_total.prof, _shape.prof and .json (open it in chrome://tracing or ui.perfetto.dev)")


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """The file whole or not at all."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        write(beside)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # the profiler turns some of the system's errors into RuntimeErrors
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(f"--enable-profiling: {path} cannot be written ({reason}); free some space or start in another folder") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
