"""Rows per second of whole training runs, step and data loading together: ours against upstream's dlrm_s_pytorch.py, taking turns.

Bound: a sample of the Kaggle model costs 2.90 MFLOP of matrix products, forward and backward (2.92 with the inputs' own gradient). The run
measures how fast this machine multiplies matrices and states the time that a batch cannot go below (`floor_ms`: at the rate of a 2048 x 2048
x 2048 product; `products_ms`: the products of the model's own shapes one after the other, and nothing else).

    python benchmarks/train_step.py --upstream PATH --raw FILE [--rounds 3] [--batch 128 2048] [--variants cpu,cpu-bf16,xla] [--threads N]
        [--out FILE]

--upstream  a checkout of facebookresearch/dlrm; it is copied to a temporary folder and run from there, so nothing is written into it
--raw       Criteo Kaggle's text, plain or gzip; processed once by our preprocessing, and read by both sides from the processed file

One process at a time, both sides with the same flags and the same threads: what PyTorch takes by itself, or --threads. The clock runs from
the line of a training batch after warm-up (so imports, reading, compiling are left out) to the last training line, as the lines arrive
here; there is no test in between. p95 is of windows between two lines (10 batches of 128, 5 of 2048). AUC is of separate runs of one epoch
with a test at the end. A run that other processes disturbed is done again (`others_cores`: what they used). A ratio is of two runs of the
same round; the order turns around every other round. The last line is JSON.
"""

import argparse
import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil
import torch
from report import ROOT, commit_of, finish, heading, median, say

from data_loaders.criteo_set import PROCESSED_NAME
from data_loaders.preprocess import preprocess

BOTTOM, TOP, WIDTH, TABLES = (13, 512, 256, 64, 16), (367, 512, 256, 1), 16, 26
MODEL = (
    "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-512-256-64-16", "--arch-mlp-top=512-256-1", "--data-generation=dataset",
    "--data-set=kaggle", "--loss-function=bce", "--round-targets=True", "--test-mini-batch-size=16384",
)  # fmt: skip
VARIANTS = {
    "cpu": ("--device=cpu",),
    "cpu-bf16": ("--device=cpu", "--matmul-precision=bfloat16"),
    "xla": ("--device=xla",),
    "xla-bf16": ("--device=xla", "--matmul-precision=bfloat16"),
}
OPTIMIZERS = {"sgd": ("--learning-rate=0.1",), "adagrad": ("--learning-rate=0.01", "--optimizer=adagrad")}
TRAIN_LINE = re.compile(r"Finished training it (\d+)/(\d+) of epoch (\d+),")
AUC = re.compile(r"\bauc ([01]\.\d+), best auc")
MIN_BATCHES = 100  # timed runs have as many epochs as this takes
OTHERS = 0.1  # a run during which other processes used more cores than this is done again


@dataclass(frozen=True)
class Data:
    folder: Path
    raw: Path
    processed: Path
    train_rows: int

    def rows_until(self, batch_size: int, batches: int) -> int:
        """Rows of the first `batches` batches of a run; the last batch of an epoch may be short."""
        epochs, rest = divmod(batches, -(-self.train_rows // batch_size))
        return epochs * self.train_rows + rest * batch_size


def prepare(folder: Path, raw: Path) -> Data:
    """Text and processed file side by side, where upstream looks for them."""
    text = folder / "kaggle" / "train.txt"
    text.parent.mkdir()
    with (gzip.open if raw.suffix == ".gz" else open)(raw, "rb") as source, open(text, "wb") as target:
        shutil.copyfileobj(source, target)
    processed = text.parent / PROCESSED_NAME
    preprocess(text, processed, max_ind_range=-1, sub_sample_rate=0.0, rng=np.random.RandomState(0), progress=False)
    with np.load(processed) as arrays:
        return Data(folder, text, processed, int(arrays["total_per_file"][:-1].sum()))


def copy_upstream(checkout: Path, folder: Path) -> tuple[Path, str]:
    """Its Python files in our folder, and its commit."""
    if not (checkout / "dlrm_s_pytorch.py").is_file():
        raise SystemExit(f"error: --upstream {checkout} holds no dlrm_s_pytorch.py")
    target = folder / "upstream"
    shutil.copytree(checkout, target, ignore=shutil.ignore_patterns(".git", "*.png", "*.log", "torchrec_dlrm"))
    return target / "dlrm_s_pytorch.py", commit_of(checkout)


@dataclass
class Run:
    """One process. lines: (batches done, seconds, CPU seconds of the process, of the whole machine) of each training line; auc of the last test."""

    lines: list[tuple[int, float, float, float]]
    auc: float | None


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine started."""
    times = psutil.cpu_times()
    return times.user + times.nice + times.system


def execute(command: list[str], folder: Path) -> Run:
    place = Path(tempfile.mkdtemp(dir=folder))
    lines, auc = [], None
    with open(place / "stderr", "w+") as errors:
        process = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1)
        try:
            inside = psutil.Process(process.pid)
            for line in process.stdout:
                now = time.perf_counter()
                if found := TRAIN_LINE.match(line):
                    done, num_batches, epoch = map(int, found.groups())
                    used = inside.cpu_times()
                    lines.append((epoch * num_batches + done, now, used.user + used.system, busy_seconds()))
                elif found := AUC.search(line):
                    auc = float(found.group(1))
        except BaseException:
            process.kill()
            raise
        if process.wait() != 0:
            errors.seek(0)
            raise SystemExit(f"error: {' '.join(command)} ended with {process.returncode}:\n{errors.read()[-2000:]}")
    shutil.rmtree(place)
    return Run(lines, auc)


class Bench:
    """upstream: its dlrm_s_pytorch.py. attempts: runs at most for one undisturbed."""

    def __init__(self, data: Data, upstream: Path, attempts: int):
        self.data, self.upstream, self.attempts = data, upstream, attempts

    def command(self, name: str, batch_size: int, optimizer: str, *more: str) -> list[str]:
        paths = (f"--raw-data-file={self.data.raw}", f"--processed-data-file={self.data.processed}", f"--mini-batch-size={batch_size}")
        program = (str(self.upstream),) if name == "upstream" else (str(ROOT / "run_dlrm.py"), "--log-dir=run", *VARIANTS[name])
        return [sys.executable, *program, *MODEL, *paths, *OPTIMIZERS[optimizer], *more]

    def speed(self, name: str, batch_size: int) -> dict:
        """Rows per second, and the mean step of each window between two lines, in ms."""
        warm_up = 50 if batch_size < 1000 else 20
        every = 10 if batch_size < 1000 else 5
        per_epoch = -(-self.data.train_rows // batch_size)
        epochs = max(1, -(-MIN_BATCHES // per_epoch))
        run = execute(self.command(name, batch_size, "sgd", f"--print-freq={every}", "--test-freq=0", f"--nepochs={epochs}"), self.data.folder)
        timed = [line for line in run.lines if line[0] >= warm_up]
        (first, start, cpu_start, busy_start), (last, end, cpu_end, busy_end) = timed[0], timed[-1]
        rows = self.data.rows_until(batch_size, last) - self.data.rows_until(batch_size, first)
        windows = [(b[1] - a[1]) / (b[0] - a[0]) * 1e3 for a, b in zip(timed[:-1], timed[1:], strict=True)]
        return {
            "rows_per_s": rows / (end - start),
            "step_ms": (end - start) / (last - first) * 1e3,
            "p95_ms": float(np.percentile(windows, 95)),
            "cpu_ms": (cpu_end - cpu_start) / (last - first) * 1e3,
            "others_cores": max(0.0, (busy_end - busy_start - cpu_end + cpu_start) / (end - start)),
        }

    def undisturbed_speed(self, name: str, batch_size: int) -> dict:
        """The first run during which nothing else used the machine, or else the least disturbed one."""
        runs: list[dict] = []
        for _ in range(self.attempts):
            runs.append(self.speed(name, batch_size))
            if runs[-1]["others_cores"] <= OTHERS:
                break
            say(f"  {name}: other processes used {runs[-1]['others_cores']:.2f} cores at {runs[-1]['rows_per_s']:,.0f} rows/s")
        return min(runs, key=lambda run: run["others_cores"])

    def auc(self, name: str, batch_size: int, optimizer: str) -> float:
        """Of the test half after one epoch."""
        per_epoch = -(-self.data.train_rows // batch_size)
        flags = (f"--print-freq={per_epoch}", f"--test-freq={per_epoch}", "--mlperf-logging")
        return execute(self.command(name, batch_size, optimizer, *flags), self.data.folder).auc


def products(batch_size: int) -> list[tuple[int, int, int]]:
    """(m, k, n) of every matrix product of the MLPs in a step; the inputs need no gradient. The interaction's small ones are left out."""
    shapes = []
    for sizes in (BOTTOM, TOP):
        for layer, (k, n) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            shapes += [(batch_size, k, n), (n, batch_size, k)]
            if sizes is TOP or layer:
                shapes.append((batch_size, n, k))
    return shapes


def seconds_of_products(shapes: list[tuple[int, int, int]], dtype: torch.dtype) -> float:
    """Of each the least of many repeats, added up: other work on the machine must not raise a bound."""
    total = 0.0
    for m, k, n in shapes:
        left, right = torch.rand(m, k, dtype=dtype), torch.rand(k, n, dtype=dtype)
        best = float("inf")
        for _ in range(50):
            start = time.perf_counter()
            left @ right
            best = min(best, time.perf_counter() - start)
        total += best
    return total


def bounds(batch_sizes: list[int]) -> dict:
    """What the machine's matrix products allow, by data type and batch size."""
    interaction = 3 * 2 * (TABLES + 1) ** 2 * WIDTH
    found = {}
    for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        rate = 2 * 2048**3 / seconds_of_products([(2048, 2048, 2048)], dtype)
        found[name] = {"gflop_per_s": round(rate / 1e9, 1)}
        for size in batch_sizes:
            flops = sum(2 * m * k * n for m, k, n in products(size)) + size * interaction
            found[name][str(size)] = {
                "mflop_per_sample": round(flops / size / 1e6, 3),
                "floor_ms": round(flops / rate * 1e3, 3),
                "products_ms": round(seconds_of_products(products(size), dtype) * 1e3, 3),
            }
    return found


def take_turns(bench, names: list[str], batch_size: int, rounds: int, cpu: Callable[[dict], str]) -> dict[str, list[dict]]:
    """bench.undisturbed_speed of all names in turn, `rounds` times; the order turns around every other round. cpu: its figure, for the log."""
    runs: dict[str, list[dict]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            own = bench.undisturbed_speed(name, batch_size)
            runs[name].append(own)
            say(
                f"batch {batch_size}, round {number + 1}/{rounds}, {name}: {own['rows_per_s']:,.0f} rows/s, {own['step_ms']:.2f} ms a step, "
                f"p95 {own['p95_ms']:.2f}, CPU {cpu(own)}; others {own['others_cores']:.2f} cores"
            )
    return runs


def compare(bench: Bench, names: list[str], batch_size: int, rounds: int, optimizers: list[str]) -> dict:
    """All variants in turn, `rounds` times; then their AUC."""
    runs = take_turns(bench, names, batch_size, rounds, lambda own: f"{own['cpu_ms']:.2f} ms")
    results = {}
    for name in names:
        own = {key: round(median([run[key] for run in runs[name]]), 3) for key in runs[name][0]}
        ratios = [ours["rows_per_s"] / theirs["rows_per_s"] for ours, theirs in zip(runs[name], runs["upstream"], strict=True)]
        own["ratios"], own["ratio"] = [round(ratio, 3) for ratio in ratios], round(median(ratios), 3)
        own["rows_per_s_of_rounds"] = [round(run["rows_per_s"]) for run in runs[name]]
        own["auc"] = {}
        results[name] = own
    for optimizer in optimizers:
        for name in names:
            results[name]["auc"][optimizer] = bench.auc(name, batch_size, optimizer)
            say(f"batch {batch_size}, {optimizer}, {name}: test AUC {results[name]['auc'][optimizer]:.4f}")
    return {"variants": results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, metavar="PATH", help="a checkout of facebookresearch/dlrm")
    parser.add_argument("--raw", type=Path, required=True, metavar="FILE", help="Criteo Kaggle's text, plain or .gz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--variants", default="cpu,cpu-bf16,xla", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--threads", type=int, help="of both sides; without it what PyTorch takes by itself")
    parser.add_argument("--attempts", type=int, default=4, help="repeats, at most, of a run that other processes disturb")
    parser.add_argument("--auc", default="sgd,adagrad", help="optimizers whose test AUC is compared; empty: none")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    names = ["upstream", *args.variants.split(",")]
    optimizers = [name for name in args.auc.split(",") if name]
    if unknown := set(names[1:]) - set(VARIANTS) | set(optimizers) - set(OPTIMIZERS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ.update(OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))  # for the processes started below
    # ended by a signal, it takes the running process and the copy of the data with it
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program, upstream_commit = copy_upstream(args.upstream, folder)
        say("preparing the data")
        data = prepare(folder, args.raw)
        bench = Bench(data, program, args.attempts)
        result = {
            **heading("train_step"), "upstream_commit": upstream_commit, "train_rows": data.train_rows, "rounds": args.rounds,
            "bounds": bounds(args.batch), "batch": {},
        }  # fmt: skip
        say(json.dumps(result["machine"]))
        say(json.dumps(result["bounds"]))
        for size in args.batch:
            result["batch"][str(size)] = compare(bench, names, size, args.rounds, optimizers)
    for size, block in result["batch"].items():
        for name, own in block["variants"].items():
            aucs = ", ".join(f"AUC {key} {value:.4f}" for key, value in own["auc"].items())
            say(f"batch {size:>5}  {name:<10} {own['rows_per_s']:>9,.0f} rows/s  {own['step_ms']:>7.2f} ms  {own['ratio']:.2f}x upstream  {aucs}")
    finish(result, args.out)


if __name__ == "__main__":
    main()
