"""Every method at every size on one data set, and the baselines: python -m compression sweep --raw-data-file=train.txt --out=/tmp/sweep

Each run is a process of run_dlrm.py on one core; its figures are one small file in OUT/runs, so a sweep that was stopped goes on where it was,
and one with more methods, ratios or seeds does what is new. A run that failed is shown, and is tried again the next time. OUT holds rows of the
data (OUT/data), models (OUT/source) and figures: sweep.json, frontier.md and frontier.png, which hold figures alone.
"""

import argparse
import fcntl
import shlex
import shutil
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from compression import frontier, sweep_plan, sweep_time
from compression.choose import choose, wants_counts
from compression.registry import num_bytes
from compression.sweep_plan import PROTOCOL, RATIOS, Run
from compression.sweep_run import ROOT, Sweep, read_json, write_json
from compression.traffic import count_ids
from data_loaders.command import ended
from data_loaders.open import open_dataset
from dlrm_xla import flags as run_flags
from dlrm_xla.config import Config
from dlrm_xla.specs import TableSpec, UserError

OURS = (
    "raw-data-file", "processed-data-file", "numpy-rand-seed", "compress", "compress-to", "min-frequency", "nepochs", "log-dir", "save-model",
    "load-model", "print-freq", "test-freq", "inference-only", "mlperf-logging",
)  # fmt: skip



def parser() -> argparse.ArgumentParser:
    made = run_flags.Parser(prog="python -m compression sweep", description=__doc__.split("\n\n")[0])
    made.add_argument("--raw-data-file", default="", metavar="FILE", help="as of run_dlrm.py")
    made.add_argument("--processed-data-file", default="", metavar="FILE", help="its arrays, made where they are not there; without it in OUT/data")
    made.add_argument("--out", required=True, metavar="FOLDER", help="outside the project's folder: it will hold rows of the data")
    made.add_argument("--methods", default="", metavar="A,B:knob=2", help="methods, convert:METHOD, and baselines; without it all")
    made.add_argument("--ratios", default=RATIOS, metavar="3,10", help=f"how many times smaller all tables together (default {RATIOS})")
    made.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each, that differ in weights and order of rows (default 3)")
    made.add_argument("--epochs", type=int, default=3, metavar="N", help="with a test after each (default 3)")
    made.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at a time; 0: one for each core")
    made.add_argument("--flags", default="", metavar="'--FLAG=X ...'", help="of run_dlrm.py, for all runs")
    made.add_argument("--time", action="store_true", help="at the end, alone on the machine: time of lookups and steps")
    return made


def main(argv: list[str]) -> int:
    """The exit status: 0; 1 where a run failed; 2 for bad input; 130 when interrupted."""
    failed: list[str] = []
    status = ended(lambda: failed.extend(sweep(argv)), "interrupted; the same command goes on")
    return status or (1 if failed else 0)


def sweep(argv: list[str]) -> list[str]:
    """Runs what is not done and writes the results. The keys of runs that failed."""
    args = parser().parse_args(argv)
    for name in ("seeds", "epochs"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name}={getattr(args, name)}: must be at least 1")
    if args.jobs < 0:
        raise UserError(f"--jobs={args.jobs}: must be at least 1, or 0 for one for each core")
    runs = sweep_plan.plan(sweep_plan.parse_methods(args.methods), sweep_plan.parse_ratios(args.ratios), args.seeds)
    flags = (*PROTOCOL, *own_flags(args.flags), *((f"--raw-data-file={Path(args.raw_data_file).resolve()}",) if args.raw_data_file else ()))
    config = Config.from_args(run_flags.parse(list(flags)))
    out = Path(args.out).resolve()
    if out == ROOT or ROOT in out.parents:
        raise UserError(f"--out={args.out}: lies in the project's folder, and rows of the data would be written there; choose another place")
    for folder in ("runs", "data", "work"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    with alone(out):
        check_protocol(out, flags, args.epochs)
        files = processed_files(out, runs, args.processed_data_file, config)
        shared = Sweep(out, flags, config.train.learning_rate, args.epochs, files, config.method.threshold)
        data = {changes: open_tables(shared, changes) for changes in dict.fromkeys(run.data for run in runs)}
        failed = run_all(shared, runs, data, args.jobs or num_cores())
        if args.time:
            sweep_time.measure(shared, runs, data)
        write_results(shared, runs)
    return failed


def own_flags(text: str) -> list[str]:
    """The user's. UserError for one that the sweep sets itself."""
    try:
        given = shlex.split(text)
    except ValueError as error:
        raise UserError(f"--flags={text}: {error}") from None
    for flag in given:
        name = flag.split("=")[0].removeprefix("--")
        if name in OURS:
            raise UserError(f"--flags: {flag}: the sweep sets --{name} itself; leave it out")
    return given


@contextmanager
def alone(out: Path):
    """Two sweeps in one folder would do each run twice."""
    with open(out / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--out={out}: another sweep is at work there; wait for it or choose another folder") from None
        shutil.rmtree(out / "work", ignore_errors=True)  # of a sweep that was killed
        yield


def check_protocol(out: Path, flags: tuple[str, ...], epochs: int) -> None:
    """Runs of one folder can be compared: UserError where earlier ones had other flags."""
    path, now = out / "protocol.json", {"flags": list(flags), "epochs": epochs}
    before = read_json(path)
    if before is not None and before != now:
        differs = sorted(set(before["flags"]) ^ set(flags)) or [f"--epochs={before['epochs']}"]
        raise UserError(f"--out={out}: holds runs with other flags ({' '.join(differs)}); give the same flags, or another folder")
    write_json(path, now)


def processed_files(out: Path, runs: list[Run], given: str, config: Config) -> dict[tuple[str, ...], Path]:
    suffix = ".npz" if config.data.source == "kaggle" else ""
    files = {}
    for run in runs:
        name = "-".join(flag.strip("-").replace("=", "") for flag in run.data) or "plain"
        files[run.data] = Path(given).resolve() if given and not run.data else out / "data" / f"{name}{suffix}"
    return files


def num_cores() -> int:
    import os

    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def open_tables(shared: Sweep, changes: tuple[str, ...]) -> tuple[object, list[TableSpec]]:
    """The data, made now where it is not there, and the tables as run_dlrm.py will see them."""
    config = Config.from_args(run_flags.parse(shared.argv(Run("plain", "", sweep_plan.FIRST_SEED, data=changes))))
    opened = open_dataset(config, np.random.RandomState(config.train.seed), lambda line: None)
    width = config.model.feature_dim
    pairs = enumerate(zip(opened.table_rows, opened.hotness, strict=True))
    return opened, [TableSpec(f"emb_l.{index}", int(rows), width, hotness) for index, (rows, hotness) in pairs]


def sizes_of(shared: Sweep, run: Run, opened, specs: list[TableSpec], plain: int, counts: dict) -> dict:
    """Bytes that all tables of a run take, small ones that stay plain included; {"error": ...} where no knob meets its budget.

    counts: of each choice of data, how often training looks ids up; filled in where a method wants to know
    """
    config = Config.from_args(run_flags.parse(shared.argv(run)))
    if wants_counts(config.method) and run.data not in counts:
        counts[run.data] = count_ids(opened.train, specs)
    try:
        choices = choose(specs, config.method, counts.get(run.data))
    except UserError as error:
        return {"error": str(error), "impossible": True}
    stored = sum(num_bytes(spec, choice) for spec, choice in zip(specs, choices, strict=True))
    kinds = [choice.method for choice in choices]
    return {"bytes": stored, "ratio": plain / stored, "tables": {name: kinds.count(name) for name in sorted(set(kinds))}}


def run_all(shared: Sweep, runs: list[Run], data: dict, jobs: int) -> list[str]:
    """The keys of those that failed."""
    plain = sum(num_bytes(spec, choice) for spec, choice in zip(data[()][1], choose(data[()][1], plain_method(shared)), strict=True))
    waiting = [run for run in runs if not shared.is_done(run)]
    failed: list[str] = []
    counts: dict = {}
    with tqdm(total=len(runs), initial=len(runs) - len(waiting), desc="runs", unit=" runs", disable=not sys.stderr.isatty()) as bar, terminable():
        for stage in (True, False):  # the others may start from the sources
            part = [run for run in waiting if (run.kind == "source") == stage]
            with ThreadPoolExecutor(jobs) as pool, ending(shared, pool):
                doing = {pool.submit(shared.do, run, sizes_of(shared, run, *data[run.data], plain, counts)): run for run in part}
                for future in as_completed(doing):
                    found, run = future.result(), doing[future]
                    bar.update()
                    bar.write(line_of(run, found), file=sys.stderr)
                    if "error" in found and "impossible" not in found:
                        failed.append(run.key)
    return failed


def plain_method(shared: Sweep):
    return Config.from_args(run_flags.parse(list(shared.flags))).method


def line_of(run: Run, found: dict) -> str:
    if "error" in found:
        return f"{run.key}: {'cannot be' if 'impossible' in found else 'failed'}: {found['error']}"
    aucs = " ".join("-" if epoch["auc"] is None else f"{epoch['auc']:.4f}" for epoch in found["epochs"])
    return f"{run.key}: {found['ratio']:.4g}x, AUC {aucs}, {found['seconds']:.0f} s"


@contextmanager
def ending(shared: Sweep, pool: ThreadPoolExecutor):
    """Whatever goes wrong, Ctrl-C too, ends the runs that are at work, and no other is begun."""
    try:
        yield
    except BaseException:
        shared.children.stop()
        pool.shutdown(cancel_futures=True)
        raise


@contextmanager
def terminable():
    """SIGTERM is taken as Ctrl-C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number, frame):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_results(shared: Sweep, runs: list[Run]) -> None:
    """sweep.json of all runs in the folder, and the table and the plot made of it."""
    found = [read_json(path) for path in sorted((shared.out / "runs").glob("*.json"))]
    known = [{key: value for key, value in one.items() if key != "seconds"} for one in found if one is not None]
    times = read_json(shared.out / "times.json") or {}
    flags = [flag for flag in shared.flags if not flag.startswith("--raw-data-file")]
    write_json(shared.out / "sweep.json", {"flags": flags, "epochs": shared.epochs, "runs": known, "times": times})
    for path in frontier.write(shared.out):
        print(path)
