"""Training steps on batches held in memory, and their embedding part alone: ours against upstream, the 2020 TPU port's way, and TorchRec.

Bound: the embedding part must read every row that is looked up once, and read and write it once in the update: 3 x 4 D bytes a lookup. At a core's
measured copying rate that is `bytes_ms`; the dense part multiplies matrices for `flops_ms` at the rate of a 2048 x 2048 x 2048 product. Neither
depends on the tables' length; a step whose gradient has a table's shape reads and writes whole tables (`dense_gradient_ms`).

    python benchmarks/embedding_step.py --upstream PATH [--torchrec-python PATH] [--cases kaggle multihot] [--rows 300000 1000000]
        [--batch 128 2048] [--contenders ...] [--optimizer sgd] [--rounds 7] [--threads N] [--out FILE]

ours-cpu, ours-xla  Trainer.step, the batch sent to the device included
upstream            dlrm_s_pytorch.py's DLRM_Net, imported from the checkout --upstream, and the lines of its training loop
port2020            a dense gradient of every table on XLA and torch.optim.SGD, as torch_xla's DLRM port of 2020 trained
torchrec            torchrec.models.dlrm.DLRM over FusedEmbeddingBagCollection on the CPU; --torchrec-python is an interpreter that has torch 2.9.0,
                    torchrec 1.4.0 and fbgemm-gpu-cpu 1.4.0

kaggle    26 tables of Criteo Kaggle's sizes, each cut at --rows, D=16, one lookup each, 13-512-256-64-16, 512-256-1
multihot  8 tables of a million rows, D=64, 100 lookups a bag, batch 256, 13-512-64, 512-1
Ids are uniform. Labels are random.

Each contender lives in a process of its own, with its own tables (2 GB in multihot; adagrad's copies on XLA make them 6), and waits while another
works. A block is as many steps as take BLOCK_S seconds, and ends when the device has finished; blocks take turns, and each round begins with the
next contender. Everybody starts from the same weights: the losses of the first three steps must agree within 1e-4. A ratio is of two blocks of one
round; figures are medians. On XLA the barrier itself is checked first. With --threads the processes are kept on as many cores, XLA included. Bars
stand beside the values at the end. The last line is JSON.
"""

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import psutil
import torch
from embedding_contenders import Case, cases, timed_product
from report import commit_of, finish, heading, median, say

CONTENDERS = ("ours-cpu", "ours-xla", "upstream", "port2020", "torchrec")
PARTS = ("step", "embedding")
BLOCK_S = 0.4
TOLERANCE = 1e-4
SERVER = Path(__file__).with_name("embedding_contenders.py")


class Worker:
    """A contender's process."""

    def __init__(self, name: str, args):
        self.name, self.log = name, tempfile.TemporaryFile("w+")
        interpreter = args.torchrec_python if name == "torchrec" else sys.executable
        command = [str(interpreter), str(SERVER), name, str(args.upstream.resolve()), str(args.threads or 0)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True)

    def ask(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            self.log.seek(0)
            raise SystemExit(f"error: {self.name} ended with {self.process.wait()} (-9: killed, perhaps for memory):\n{self.log.read()[-2000:]}")
        return json.loads(answer)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def check_losses(losses: dict[str, list[float]]) -> None:
    """Contenders with one optimizer must agree; names are "ours-DEVICE-OPTIMIZER" or, with SGD, anything else."""
    for name, own in losses.items():
        optimizer = name.split("-")[2:]
        first = next(other for key, other in losses.items() if key.split("-")[2:] == optimizer)
        if max(abs(a - b) for a, b in zip(own, first, strict=True)) > TOLERANCE:
            raise SystemExit(f"error: the losses of {name} are not those of the others: {losses}")


def measure(case: Case, names: list[str], args) -> dict:
    """Blocks of every contender in turn, for the whole step and for the embedding part alone."""
    def busy() -> float:
        times = psutil.cpu_times()
        return sum(times) - times.idle - times.iowait - times.guest - times.guest_nice

    with contextlib.ExitStack() as stack:
        workers = []
        for name in names:
            workers.append(Worker(name, args))
            stack.callback(workers[-1].close)
        found: dict = {"losses": {worker.name: worker.ask(case=asdict(case)) for worker in workers}, "parts": {}}
        say(f"{case.name}: first losses {found['losses']}")
        check_losses(found["losses"])
        barriers = {worker.name: worker.ask(check=True) for worker in workers if worker.name.startswith(("ours-xla", "port"))}
        say(f"{case.name}: barrier {barriers}")
        for part in PARTS:
            for worker in workers:  # warm-up
                worker.ask(part=part, steps=4)
            steps = {worker.name: max(3, round(BLOCK_S * 1e3 / worker.ask(part=part, steps=4)[0])) for worker in workers}
            blocks: dict[str, list] = {name: [] for name in names}
            start, before, own = time.perf_counter(), busy(), 0.0
            for number in range(args.rounds):
                turn = number % len(workers)
                for worker in workers[turn:] + workers[:turn]:
                    blocks[worker.name].append(worker.ask(part=part, steps=steps[worker.name]))
                    own += blocks[worker.name][-1][1] * steps[worker.name] / 1e3
            others = (busy() - before - own) / (time.perf_counter() - start)
            found["parts"][part] = {"others_cores": round(others, 2), **{name: summary(blocks, name) for name in names}}
            for name in names:
                figures = found["parts"][part][name]
                ratios = ", ".join(f"{value['wall']:.4f} (cpu {value['cpu']:.4f}) of {peer}" for peer, value in figures["ratios"].items())
                say(f"{case.name} {part:<9} {name:<20} {figures['wall_ms']:9.3f} ms, CPU {figures['cpu_ms']:9.3f} ms; {ratios}")
            say(f"{case.name} {part:<9} others used {others:.2f} cores")
    found["barrier"], found["bound"] = barriers, bounds(case)
    say(f"{case.name}: bound {found['bound']}")
    return found


def summary(blocks: dict[str, list], name: str) -> dict:
    """Of one contender; ratios, for ours only, to each peer, round by round."""
    figures = {"wall_ms": median([wall for wall, _ in blocks[name]]), "cpu_ms": median([cpu for _, cpu in blocks[name]])}
    figures = {key: round(value, 4) for key, value in figures.items()}
    figures["wall_ms_of_rounds"] = [round(wall, 3) for wall, _ in blocks[name]]
    figures["ratios"] = {}
    for peer in blocks if name.startswith("ours-") else ():
        if not peer.startswith("ours-"):
            wall, cpu = ([a[at] / b[at] for a, b in zip(blocks[name], blocks[peer], strict=True)] for at in (0, 1))
            figures["ratios"][peer] = {"wall": round(median(wall), 4), "cpu": round(median(cpu), 4), "rounds": [round(ratio, 3) for ratio in wall]}
    return figures


def bounds(case: Case) -> dict:
    """Milliseconds of the header's bounds, at this process's rates of copying and multiplying."""
    source, target = torch.rand(1 << 26), torch.rand(1 << 26)
    copying = math.inf
    for _ in range(5):
        start = time.perf_counter()
        target.copy_(source)
        copying = min(copying, time.perf_counter() - start)
    byte_ms, flop_ms = copying * 1e3 / (2 * source.nbytes), timed_product(torch.device("cpu"), lambda: None)[0] * 1e3 / 2**34
    lookups, features = case.batch * len(case.rows) * case.hotness, len(case.rows) + 1
    layers = [*zip(case.bottom[:-1], case.bottom[1:], strict=True), *zip(case.top_layers[:-1], case.top_layers[1:], strict=True)]
    products = 3 * sum(n * m for n, m in layers) - case.bottom[0] * case.bottom[1] + 3 * features**2 * case.dim
    return {
        "bytes_ms": round(12 * case.dim * lookups * byte_ms, 4), "flops_ms": round(2 * case.batch * products * flop_ms, 3),
        "dense_gradient_ms": round(16 * case.dim * sum(case.rows) * byte_ms, 2),
    }  # fmt: skip


# case (its name's ending), peer, ours, most that the ratio of their times may be
BARS = (
    ("300000-b128", "port2020", "ours-xla", 1 / 10), ("1000000-b128", "port2020", "ours-xla", 1 / 30), ("-b128", "upstream", "best", 0.85),
    ("-b2048", "upstream", "best", 0.75), ("multihot", "upstream", "best", 0.8), ("-b2048", "torchrec", "best", 0.9),
)  # fmt: skip


def compare_bars(found: dict) -> list[dict]:
    rows = []
    for label, case in found.items():
        step = case["parts"]["step"]
        for ending, peer, ours, limit in BARS:
            names = [name for name in step if (name in ("ours-cpu", "ours-xla") if ours == "best" else name == ours)]
            if label.endswith(ending) and peer in step and names:
                best = min(names, key=lambda name: step[name]["ratios"][peer]["wall"])
                ratio = step[best]["ratios"][peer]
                rows.append({"case": label, "ours": best, "peer": peer, "bar": round(limit, 4), **ratio, "pass": ratio["wall"] <= limit})
                say(
                    f"{label:<22} {best:<9} of {peer:<9} {ratio['wall']:.4f} (cpu {ratio['cpu']:.4f}), bar {limit:.4f} "
                    f"({1 / ratio['wall']:.2f} times faster, bar {1 / limit:.2f}): {'pass' if rows[-1]['pass'] else 'FAIL'}"
                )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path, required=True, metavar="PATH", help="a checkout of facebookresearch/dlrm")
    parser.add_argument("--torchrec-python", type=Path, metavar="PATH", help="an interpreter with TorchRec; without it TorchRec is left out")
    parser.add_argument("--cases", nargs="+", default=["kaggle", "multihot"], choices=["kaggle", "multihot"])
    parser.add_argument("--rows", type=int, nargs="+", default=[300_000, 1_000_000], help="kaggle: rows of a table, at most")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 2048], help="kaggle")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--optimizer", nargs="+", default=["sgd"], choices=["sgd", "adagrad", "rwsadagrad"], help="of ours; peers have SGD")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of every contender; without it what each takes by itself")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    if not (args.upstream / "dlrm_s_pytorch.py").is_file():
        parser.error(f"--upstream {args.upstream} holds no dlrm_s_pytorch.py")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ.update(OMP_NUM_THREADS=str(args.threads), MKL_NUM_THREADS=str(args.threads))  # for the processes started below
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    names = [f"{name}-{o}".removesuffix("-sgd") for o in args.optimizer for name in args.contenders if name.startswith("ours-")]
    names += [name for name in args.contenders if not name.startswith("ours-") and (name != "torchrec" or args.torchrec_python)]
    result = {
        **heading("embedding_step"), "upstream_commit": commit_of(args.upstream), "threads": args.threads, "rounds": args.rounds, "cases": {},
    }
    say(json.dumps(result["machine"]))
    for case in cases(args.cases, args.rows, args.batch):
        # dense gradients of 2 GB tables have nothing to say that the others do not
        chosen = [name for name in names if name != "port2020" or case.name != "multihot"]
        result["cases"][case.name] = measure(case, chosen, args)
    result["bars"] = compare_bars(result["cases"])
    finish(result, args.out)


if __name__ == "__main__":
    main()
