"""CPU time a row of preprocessing Criteo text, and its peak memory: python benchmarks/preprocess.py --rows 10000000 --preprocess-memory 2GB

The physical bound is reading the text once: a scan of 240 bytes a row (gunzip: 0.35 us), and writing 160 bytes a row; keeping to the memory takes
another 264 bytes a row written and read. Upstream takes 54 us a row for the same arrays. CPU time is that of all threads, start-up of
Python and its imports excluded; the peak is that of the whole process. Each round is a process. Without --raw, --rows rows of --profile are
generated first. --check compares every id with those of upstream's 26 dictionaries, restated here. The last line is one JSON object.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def peak_bytes() -> int:
    """Of this process' resident memory. (On Linux ru_maxrss is no less than that of the process that started this one.)"""
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def once(raw: Path, out: Path, memory: str) -> dict:
    """One preprocessing run in this process."""
    from data_loaders.preprocess import preprocess
    from dlrm_xla.specs import parse_size

    start, wall = time.process_time(), time.perf_counter()
    num_bytes = parse_size("--preprocess-memory", memory)
    built = preprocess(raw, out, max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False, memory_bytes=num_bytes)
    cpu, wall = time.process_time() - start, time.perf_counter() - wall
    rows, peak = built.rows, peak_bytes()
    figures = {"cpu_us_per_row": 1e6 * cpu / rows, "wall_us_per_row": 1e6 * wall / rows, "peak_mb": peak / 1e6}
    return {"rows": rows, "ids": sum(built.table_rows), "largest_table": max(built.table_rows), **figures}


def check(raw: Path, out: Path) -> None:
    """Every id against its rank in order of first appearance, by a dictionary of the texts; labels and counts against the text's."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.csv as csv
    from report import say

    if out.is_dir():
        rows = np.memmap(out / "rows.bin", np.int32, "r").reshape(-1, 40)
        labels, counts, ids = rows[:, 0], rows[:, 1:14], rows[:, 14:]
    else:
        data = np.load(out)
        labels, counts, ids = data["y"], data["X_int"], data["X_cat"]
    names = [str(place) for place in range(40)]
    reading, parsing = csv.ReadOptions(column_names=names), csv.ParseOptions(delimiter="\t")
    for place in range(40):
        kind = pa.string() if place >= 14 else pa.int32()
        options = csv.ConvertOptions(include_columns=[str(place)], column_types={str(place): kind}, null_values=[""])
        column, first, seen = csv.read_csv(raw, reading, parsing, options)[0], 0, {}
        for chunk in column.chunks:
            values = chunk.to_pylist()
            if place >= 14:  # upstream's dictionary of numbers: nothing is 0
                wanted = [seen.setdefault(value or "00000000", len(seen)) for value in values]
            else:
                wanted = [max(value or 0, 0) for value in values]
            found = ids[:, place - 14] if place >= 14 else counts[:, place - 1] if place else labels
            assert np.array_equal(found[first : first + len(values)], wanted), f"column {place}, rows from {first} on"
            first += len(values)
        assert first == len(labels)
        say(f"column {place}: {first:,} rows are right" + (f", {len(seen):,} ids" if place >= 14 else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--profile", default="small", help="of data_loaders.synth: small, criteo-kaggle or uniform")
    parser.add_argument("--cardinality", type=int, default=100_000, help="of --profile=uniform")
    parser.add_argument("--preprocess-memory", default="4GB", metavar="SIZE")
    parser.add_argument("--format", choices=("npz", "arrays"), default="npz")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--check", action="store_true", help="compare the last round's result with dictionaries")
    parser.add_argument("--out", type=Path, help="also write the result here")
    parser.add_argument("--once", type=Path, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.once:
        print(json.dumps(once(*args.once, args.preprocess_memory)))
        return
    from report import finish, heading, median, say  # not in the measured process: it imports torch

    with tempfile.TemporaryDirectory() as folder:
        raw, made = args.raw or Path(folder) / "train.txt", Path(folder) / ("out.npz" if args.format == "npz" else "out")
        if args.raw is None:
            flags = [f"--profile={args.profile}", f"--rows={args.rows}", f"--out={raw}"]
            flags += [f"--cardinality={args.cardinality}"] * (args.profile == "uniform")
            subprocess.run([sys.executable, "-m", "data_loaders.synth", *flags], check=True, cwd=Path(__file__).parent.parent, stdout=sys.stderr)
        rounds = []
        for number in range(args.rounds):
            if made.exists():
                shutil.rmtree(made) if made.is_dir() else made.unlink()
            command = [sys.executable, __file__, f"--preprocess-memory={args.preprocess_memory}", "--once", str(raw), str(made)]
            rounds.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
            say(f"round {number + 1}/{args.rounds}: {rounds[-1]['cpu_us_per_row']:.2f} us of CPU a row, peak {rounds[-1]['peak_mb']:.0f} MB")
        if args.check:
            check(raw, made)
    result = {
        **heading("preprocess"), "rows": rounds[0]["rows"], "ids": rounds[0]["ids"], "largest_table": rounds[0]["largest_table"],
        "profile": None if args.raw else args.profile, "gzip": raw.name.endswith(".gz"), "format": args.format,
        "preprocess_memory": args.preprocess_memory, "rounds": args.rounds, "checked": args.check,
        **{f"{figure}_median": round(median([row[figure] for row in rounds]), 3) for figure in ("cpu_us_per_row", "wall_us_per_row", "peak_mb")},
        **{f"{figure}_max": round(max(row[figure] for row in rounds), 3) for figure in ("cpu_us_per_row", "peak_mb")},
    }  # fmt: skip
    finish(result, args.out)


if __name__ == "__main__":
    main()
