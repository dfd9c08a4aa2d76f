"""What a lookup and its row update cost as the table grows: every rule and layout of RowStore, and a dense gradient beside them.

Bound: K lookups of width D read K rows and read and write K rows, 3 x 4 K D bytes (10 MB for 53,248 x 16), whatever the table's length. A dense
gradient writes a table, reads it, and reads and writes the weights: 16 N D bytes (1 GB for 4M x 16).

    python benchmarks/update.py [--device xla] [--rows 100000 1000000 4000000] [--width 16] [--lookups 53248] [--layouts rows packed] [--rounds 9]
        [--out FILE]

A step is: ids to the device, read, gradients that depend on what was read, update. Blocks of steps of all cases take turns; a block ends when the
device has finished (on XLA checked first: a product takes a plausible time and its result is there). Ids are uniform, gradients random.
`growth` is the time with the most rows over that with the fewest, of the same round, the median of all rounds. `extra_memory` is measured in a
process for each case: peak of resident memory over the first 12 steps, their compiling included, less what was resident before them, over the
table's bytes (weights only). Process CPU time is given beside the time that passed. The last line is JSON.
"""

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from embedding_contenders import check_barrier
from report import finish, heading, median, say

from dlrm_xla import backends
from dlrm_xla.optim import RULES
from dlrm_xla.stores import RowStore

BLOCK = 12  # steps
BARS = {"sgd": 2.0, "rwsadagrad": 2.0, "adagrad": 3.5}  # growth from 100k to 4M rows
MEMORY_BAR = 0.1


class Case:
    """A store of `rows` x `width` and batches of row numbers for it. rule: one of RULES, or "dense": a gradient of the table's shape and SGD."""

    def __init__(self, backend, rule: str, layout: str, rows: int, width: int, lookups: int):
        self.backend, self.rule = backend, rule
        self.store = RowStore(rows, width, RULES["sgd" if rule == "dense" else rule](), backend.layout(layout))
        self.store.data.uniform_(-0.01, 0.01)
        self.store = backend.place(self.store)
        generator = torch.Generator().manual_seed(0)
        self.ids = [torch.randint(0, rows, (lookups,), generator=generator).to(self.store.layout.index_dtype) for _ in range(4)]
        self.direction = torch.randn(lookups, width, generator=generator).to(backend.device)
        self.neg_lr = torch.tensor(-0.01).to(backend.device)
        self.position = 0

    def step(self) -> None:
        rows = self.ids[self.position % len(self.ids)].to(self.backend.device)
        self.position += 1
        records = self.store.read(rows)
        grads = self.store.weights(records) * 0.1 + self.direction
        if self.rule == "dense":
            table = self.store.data
            gradient = torch.zeros_like(table).index_add_(0, rows, grads)
            table.add_(gradient * self.neg_lr)
        else:
            self.store.update(rows, records, grads, self.neg_lr)
        self.backend.end_step()

    def block(self) -> tuple[float, float]:
        """Milliseconds a step: passed, and of the process's CPU."""
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(BLOCK):
            self.step()
        self.backend.wait()
        return (time.perf_counter() - wall) * 1e3 / BLOCK, (time.process_time() - cpu) * 1e3 / BLOCK


def extra_memory(device: str, rule: str, layout: str, rows: int, width: int, lookups: int) -> float:
    """Bytes beyond what is resident before the first step, in this process, whose compiler is warm. Linux counts the peak anew after a write to
    clear_refs."""
    backend = backends.make(device)
    Case(backend, rule, layout, 1000, width, lookups).block()
    case = Case(backend, rule, layout, rows, width, lookups)
    for buffer in case.store.buffers():
        buffer.sum().item()  # torch_xla sends a tensor when a program first wants it
    backend.wait()
    before = psutil.Process().memory_info().rss
    Path("/proc/self/clear_refs").write_text("5")
    case.block()
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return max(0, int(peak.split()[1]) * 1024 - before)


def measure_memory(args, rule: str, layout: str, rows: int) -> float:
    """The same in a process of its own, over the bytes of the table."""
    code = f"import update; print(update.extra_memory({args.device!r}, {rule!r}, {layout!r}, {rows}, {args.width}, {args.lookups}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {rule} {layout} {rows}:\n{done.stderr[-2000:]}")
    return float(done.stdout) / (rows * args.width * 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="xla", choices=["cpu", "xla"])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 4_000_000])
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--lookups", type=int, default=53_248)
    parser.add_argument("--layouts", nargs="+", default=["rows", "packed"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    backend = backends.make(args.device)
    rates = check_barrier(backend) if args.device == "xla" else {}
    kinds = [(rule, layout) for layout in args.layouts for rule in RULES] + [("dense", "rows")]
    names = [(*kind, rows) for kind in kinds for rows in args.rows]
    cases = {name: Case(backend, *name, args.width, args.lookups) for name in names}
    times: dict[tuple, list[tuple[float, float]]] = {name: [] for name in names}
    for case in cases.values():
        case.block()  # compiles
    for number in range(args.rounds):
        for name in names if number % 2 == 0 else names[::-1]:
            times[name].append(cases[name].block())
        say(f"round {number + 1}/{args.rounds}")
    cases.clear()
    result = {
        **heading("update"), "device": args.device, "barrier": rates, "width": args.width, "lookups": args.lookups, "rounds": args.rounds,
        "cases": [],
    }  # fmt: skip
    least, most = min(args.rows), max(args.rows)
    say(f"{'rule':<11} {'layout':<7} " + " ".join(f"{rows:>11,}" for rows in args.rows) + "  growth (CPU)   extra memory")
    for rule, layout in kinds:
        by_rows = {rows: times[rule, layout, rows] for rows in args.rows}
        growth, cpu_growth = (median([b[i] / a[i] for a, b in zip(by_rows[least], by_rows[most], strict=True)]) for i in (0, 1))
        memory = measure_memory(args, rule, layout, most) if Path("/proc/self/clear_refs").exists() else math.nan
        milliseconds = {rows: [round(median([pair[i] for pair in pairs]), 3) for i in (0, 1)] for rows, pairs in by_rows.items()}
        result["cases"].append({
            "rule": rule, "layout": layout, "ms_and_cpu_ms": milliseconds, "growth": round(growth, 3), "cpu_growth": round(cpu_growth, 3),
            "growth_bar": BARS.get(rule), "extra_memory": round(memory, 4), "memory_bar": MEMORY_BAR if rule in BARS else None,
        })  # fmt: skip
        bar = f"(bar {BARS[rule]})" if rule in BARS else ""
        say(
            f"{rule:<11} {layout:<7} " + " ".join(f"{value[0]:>8.2f} ms" for value in milliseconds.values())
            + f"  {growth:.2f} ({cpu_growth:.2f}) {bar}  {memory:.1%}"
        )  # fmt: skip
    finish(result, args.out)


if __name__ == "__main__":
    main()
