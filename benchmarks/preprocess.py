"""CPU time a row of preprocessing Criteo text, and its peak memory: python benchmarks/preprocess.py --raw train.txt.gz [--rows N] [--rounds 5]

The physical bound is reading the text once: gunzip at 0.35 us a row, a scan of 240 bytes a row, and writing 160 bytes a row. Upstream takes
54 us a row for the same arrays. CPU time is that of all threads, start-up of Python and its imports excluded; each round is a process.
Without --raw, --rows rows are generated first. The last line is one JSON object.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def once(raw: Path) -> dict:
    """One preprocessing run in this process."""
    import numpy as np

    from data_loaders.preprocess import preprocess

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "processed.npz"
        start, wall = time.process_time(), time.perf_counter()
        preprocess(raw, out, max_ind_range=-1, sub_sample_rate=0.0, rng=np.random.RandomState(123), progress=False)
        cpu, wall = time.process_time() - start, time.perf_counter() - wall
        rows = len(np.load(out)["y"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"rows": rows, "cpu_us_per_row": 1e6 * cpu / rows, "wall_us_per_row": 1e6 * wall / rows, "peak_mb": peak / 1e6}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--once", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(args.once)))
        return
    with tempfile.TemporaryDirectory() as folder:
        raw = args.raw or Path(folder) / "train.txt"
        if args.raw is None:
            from data_loaders.synth import write_file

            write_file(raw, args.rows, 1, progress=sys.stderr.isatty())
        rounds = []
        for number in range(args.rounds):
            done = subprocess.run([sys.executable, __file__, "--once", str(raw)], capture_output=True, text=True, check=True)
            rounds.append(json.loads(done.stdout))
            print(f"round {number + 1}/{args.rounds}: {rounds[-1]['cpu_us_per_row']:.2f} us of CPU a row", file=sys.stderr)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=Path(__file__).parent).stdout.strip()
    result = {
        "benchmark": "preprocess", "rows": rounds[0]["rows"], "gzip": raw.name.endswith(".gz"), "rounds": args.rounds,
        **{f"{figure}_median": round(median(row[figure] for row in rounds), 3) for figure in ("cpu_us_per_row", "wall_us_per_row", "peak_mb")},
        "cpu_us_per_row_max": round(max(row["cpu_us_per_row"] for row in rounds), 3),
        "machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "commit": commit,
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
