"""Rows per second of whole training runs on two ranks: ours on one core, ours on two, upstream's dlrm_s_pytorch.py on two, taking turns.

Bound: two cores cannot do more than twice the products of one, and do less where they share caches or a clock. The run multiplies the model's
own matrices on one core (batch B) and on both at once (B / 2 each) and states the ratio that is left (`products_ratio`); what ranks exchange
comes on top (`python run_dlrm.py --plan-only` prints the bytes).

    python benchmarks/ranks.py --upstream PATH --raw FILE [--rounds 3] [--batch 2048 4096 16384] [--optimizer sgd|adagrad] [--free]
        [--out FILE]

--upstream  a checkout of facebookresearch/dlrm, run from a copy as in train_step.py. Nothing in the copy is changed: with torch 2.9 upstream's
            gloo run works as it is (torchrun, --dist-backend=gloo, NumPy's loader in the training process)
--raw       Criteo Kaggle's text, plain or gzip; processed once by our preprocessing, and read by all sides from the processed file
--free      no rank is bound to a core: two ranks move between two cores (one rank stays on its one)

One thread a process (OMP_NUM_THREADS=1), each bound to a core of its own with its reading threads; one job at a time; the same flags on all
sides, and --num-batches so that every batch is full (upstream leaves out a last one that its ranks cannot share). The clock runs from line to
line after warm-up as in train_step.py, and CPU time is that of all the job's processes. `others_cores`: what other processes used meanwhile; a
run that they disturbed is done again. Ratios are of two runs of the same round (`of_cpu_time`: of CPU time a step and core, what is left on
a machine that is not idle); the order turns around every other round. Upstream's losses differ from ours: each of its ranks draws its own
tables, its line shows the first rank's half of the batch, and its tables learn at W times the rate. The last line is JSON.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from report import ROOT, finish, heading, median, say
from train_step import MODEL, OPTIMIZERS, TRAIN_LINE, Bench, Data, busy_seconds, copy_upstream, prepare, products, seconds_of_products, take_turns

SIDES = ("one", "two", "upstream")
BARS = {"two/one": 1.5, "two/upstream": 1.0}  # at batch 4096
WARM_UP, EVERY = 20, 5  # batches
TIMED_ROWS = 400_000  # and at least TIMED batches
TIMED = 30
LIMIT = 900  # seconds that a job may take


def launcher(ranks: int, cores: list[int], free: bool) -> list[str]:
    """What stands before a program: one process bound to the first core, or torchrun with a process for each."""
    if ranks == 1:
        return ["taskset", "-c", str(cores[0]), sys.executable]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    if free:
        return ["taskset", "-c", ",".join(map(str, cores)), *torchrun]
    bind = f'cores=({" ".join(map(str, cores))}); exec taskset -c ${{cores[$LOCAL_RANK]}} "$@"'
    return [*torchrun, "--no-python", "bash", "-c", bind, "bash", sys.executable]


def execute(command: list[str], folder: Path) -> list[tuple[int, float, float, float, float]]:
    """A job and all its processes. (batches done, seconds, CPU seconds of the job, of the whole machine, loss) of each training line."""
    place, lines = Path(tempfile.mkdtemp(dir=folder)), []
    with open(place / "stderr", "w+") as errors:
        job = subprocess.Popen(command, cwd=place, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1, start_new_session=True)
        timer = _after(LIMIT, job)
        try:
            inside = psutil.Process(job.pid)
            for line in job.stdout:
                now = time.perf_counter()
                if found := TRAIN_LINE.match(line):
                    done, num_batches, epoch = map(int, found.groups())
                    used = [process.cpu_times() for process in (inside, *inside.children(recursive=True))]
                    loss = float(line.rsplit("loss", 1)[1].split()[0])
                    lines.append((epoch * num_batches + done, now, sum(times.user + times.system for times in used), busy_seconds(), loss))
            code = job.wait()
        finally:
            timer.cancel()
            end(job)
        if code:
            errors.seek(0)
            raise SystemExit(f"error: {' '.join(command)} ended with {code}:\n{errors.read()[-3000:]}")
    return lines


def _after(seconds: float, job: subprocess.Popen) -> threading.Timer:
    timer = threading.Timer(seconds, end, [job])
    timer.daemon = True
    timer.start()
    return timer


def end(job: subprocess.Popen) -> None:
    """Every process of a job that has not ended. torchrun starts each rank in a session of its own, so the group of the first is not enough."""
    if job.poll() is not None:
        return  # its number may be another process's by now
    try:
        processes = psutil.Process(job.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        processes = []
    for process in (job, *processes):
        try:
            process.kill()
        except (psutil.NoSuchProcess, ProcessLookupError):
            pass


class RanksBench(Bench):
    """Bench.undisturbed_speed with jobs of several processes."""

    def __init__(self, data: Data, upstream: Path, attempts: int, cores: list[int], optimizer: str, free: bool):
        super().__init__(data, upstream, attempts)
        self.cores, self.optimizer, self.free = cores, optimizer, free

    def command(self, name: str, batch_size: int, optimizer: str, *more: str) -> list[str]:
        paths = (f"--raw-data-file={self.data.raw}", f"--processed-data-file={self.data.processed}", f"--mini-batch-size={batch_size}")
        ranks = 1 if name == "one" else len(self.cores)
        program = [str(self.upstream)] if name == "upstream" else [str(ROOT / "run_dlrm.py"), "--log-dir=run", "--device=cpu"]
        gloo = ["--dist-backend=gloo"] if ranks > 1 else []
        return [*launcher(ranks, self.cores, self.free), *program, *MODEL, *gloo, *paths, *OPTIMIZERS[optimizer], *more]

    def speed(self, name: str, batch_size: int) -> dict:
        """Rows per second; wall and CPU ms of a step, CPU of all processes together over the cores."""
        per_epoch = max(1, self.data.train_rows // batch_size)
        epochs = -(-(WARM_UP + max(TIMED, TIMED_ROWS // batch_size)) // per_epoch)
        flags = (f"--print-freq={EVERY}", "--test-freq=0", f"--nepochs={epochs}", f"--num-batches={per_epoch}")
        lines = execute(self.command(name, batch_size, self.optimizer, *flags), self.data.folder)
        timed = [line for line in lines if line[0] >= WARM_UP]
        (first, start, cpu_start, busy_start, _), (last, stop, cpu_stop, busy_stop, loss) = timed[0], timed[-1]
        windows = [(b[1] - a[1]) / (b[0] - a[0]) * 1e3 for a, b in zip(timed[:-1], timed[1:], strict=True)]
        return {
            "rows_per_s": (last - first) * batch_size / (stop - start),
            "step_ms": (stop - start) / (last - first) * 1e3,
            "p95_ms": float(np.percentile(windows, 95)),
            "cpu_ms_a_core": (cpu_stop - cpu_start) / (last - first) * 1e3 / (1 if name == "one" else len(self.cores)),
            "others_cores": max(0.0, (busy_stop - busy_start - cpu_stop + cpu_start) / (stop - start)),
            "last_loss": loss,
        }


def products_ratio(batch_size: int, cores: list[int]) -> dict:
    """ms of the model's products: batch B on one core, a share of it on each of all cores at once; the least of many repeats, slowest core."""
    share = batch_size // len(cores)
    alone = _products_at_once(batch_size, cores[:1])
    together = _products_at_once(share, cores)
    return {"one_core_ms": round(alone, 2), "all_cores_ms": round(together, 2), "products_ratio": round(alone / together, 3)}


def _products_at_once(batch_size: int, cores: list[int]) -> float:
    command = [sys.executable, __file__, "--products", str(batch_size)]
    started = [subprocess.Popen(["taskset", "-c", str(core), *command], stdout=subprocess.PIPE, text=True) for core in cores]
    return max(float(process.communicate()[0]) for process in started)


def compare(bench: RanksBench, batch_size: int, rounds: int, sides: list[str]) -> dict:
    """All sides in turn, `rounds` times."""
    runs = take_turns(bench, sides, batch_size, rounds, lambda own: f"{own['cpu_ms_a_core']:.1f} ms a core; loss {own['last_loss']:.6f}")
    results: dict = {"sides": {}, "ratios": {}}
    for name in sides:
        own = {key: round(median([run[key] for run in runs[name]]), 6 if key == "last_loss" else 3) for key in runs[name][0]}
        results["sides"][name] = {**own, "rows_per_s_of_rounds": [round(run["rows_per_s"]) for run in runs[name]]}
    for pair in BARS:
        above, below = pair.split("/")
        if above in runs and below in runs:
            of_rounds = [a["rows_per_s"] / b["rows_per_s"] for a, b in zip(runs[above], runs[below], strict=True)]
            cpu = [b["cpu_ms_a_core"] / a["cpu_ms_a_core"] for a, b in zip(runs[above], runs[below], strict=True)]
            rounded = [round(ratio, 3) for ratio in of_rounds]
            results["ratios"][pair] = {"median": round(median(of_rounds), 3), "of_rounds": rounded, "of_cpu_time": round(median(cpu), 3)}
    return results


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, metavar="PATH", help="a checkout of facebookresearch/dlrm; without it ours alone")
    parser.add_argument("--raw", type=Path, metavar="FILE", help="Criteo Kaggle's text, plain or .gz")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[2048, 4096, 16384], help="of all ranks together")
    parser.add_argument("--optimizer", default="sgd", choices=list(OPTIMIZERS))
    parser.add_argument("--ranks", type=int, default=2, help="processes, and cores, of the sides with several")
    parser.add_argument("--free", action="store_true", help="ranks are not bound to a core each")
    parser.add_argument("--attempts", type=int, default=4, help="repeats, at most, of a run that other processes disturb")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    parser.add_argument("--products", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.products is None and args.raw is None:
        parser.error("--raw is missing: Criteo Kaggle's train.txt or train.txt.gz")
    return args


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # for the processes started below
    if args.products is not None:
        print(seconds_of_products(products(args.products), torch.float32) * 1e3)
        return
    cores = sorted(os.sched_getaffinity(0))[: args.ranks]
    if len(cores) < args.ranks:
        raise SystemExit(f"error: --ranks={args.ranks}: this machine has {len(cores)} cores")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        program, upstream_commit = copy_upstream(args.upstream, folder) if args.upstream else (Path(), None)
        say("preparing the data")
        data = prepare(folder, args.raw)
        bench = RanksBench(data, program, args.attempts, cores, args.optimizer, args.free)
        result = {
            **heading("ranks"), "upstream_commit": upstream_commit, "train_rows": data.train_rows, "ranks": args.ranks, "rounds": args.rounds,
            "optimizer": args.optimizer, "bound_to_cores": not args.free, "batch": {},
        }  # fmt: skip
        say(json.dumps(result["machine"]))
        sides = [side for side in SIDES if side != "upstream" or args.upstream]
        for size in args.batch:
            result["batch"][str(size)] = {"bound": products_ratio(size, cores), **compare(bench, size, args.rounds, sides)}
    for size, block in result["batch"].items():
        for name, own in block["sides"].items():
            text = f"{own['rows_per_s']:>9,.0f} rows/s  {own['step_ms']:>7.1f} ms a step, CPU {own['cpu_ms_a_core']:.1f} a core"
            say(f"batch {size:>5}  {name:<9} {text}")
        for pair, ratio in block["ratios"].items():
            bar = f" (bar {BARS[pair]})" if size == "4096" else ""
            bound = block["bound"]["products_ratio"]
            say(f"batch {size:>5}  {pair}: {ratio['median']:.2f}{bar}, of CPU time {ratio['of_cpu_time']:.2f}; of products {bound:.2f}")
    finish(result, args.out)


if __name__ == "__main__":
    main()
