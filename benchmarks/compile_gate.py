"""What the TPU compiler makes of the training step: memory, temporaries, copies, for every generation, width, rule and layout.

Bound: tables of N rows of D numbers need 4 N D bytes, row-wise Adagrad 4 N more, element-wise Adagrad as much again; what a step needs besides should
depend on the batch only. A lookup cannot move less than a line of 512 bytes.

    python benchmarks/compile_gate.py [--topologies v5e:2x2 v4:2x2x1 v5p:2x2x1 v6e:2x2] [--dims 8 16 32 64 128] [--optimizers sgd rwsadagrad adagrad]
        [--required sgd rwsadagrad] [--layouts packed rows] [--models widths kaggle terabyte multihot] [--jobs N] [--out FILE] [--picture FILE]

Every case is a run of run_dlrm.py --compile-for --json. Nothing is timed: the compiler's figures do not depend on this machine.
widths     26 tables of a million rows, one lookup each, batch 2048; small layers, 13-64-D and 64-1, compile sooner
kaggle     Criteo Kaggle's 33,762,577 rows of 16, batch 2048        terabyte  MLPerf's 10M-cap Terabyte tables, 49.1M rows of 64, batch 2048, SGD
multihot   8 tables of a million rows of 64, 100 lookups, batch 256
The first topology gets every optimizer, terabyte, multihot, and `widths` with --table-layout=rows and SGD, which shows what packing is for.
The last line is JSON.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from embedding_contenders import KAGGLE
from report import ROOT, finish, heading, say

# MLPerf DLRM's cardinalities of Criteo Terabyte with --max-ind-range=10000000
TERABYTE = (
    9980333, 36084, 17217, 7378, 20134, 3, 7112, 1442, 61, 9758201, 1333352, 313829, 10, 2208, 11156, 122, 4, 970, 14, 9994222, 7267859, 9946608,
    415421, 12420, 101, 36,
)  # fmt: skip
TEMPORARIES_BAR, STORAGE_BAR, KAGGLE_BAR, TERABYTE_BAR = 0.02, 1.01, 5e9, 16e9
TRAIN = "training step"


def flags_of(model: str, dim: int) -> list[str]:
    rows = {"widths": (1_000_000,) * 26, "kaggle": KAGGLE, "terabyte": TERABYTE, "multihot": (1_000_000,) * 8}[model]
    hotness, batch = (100, 256) if model == "multihot" else (1, 2048)
    layers = {"terabyte": ("13-512-256-64", "512-512-256-1"), "multihot": ("13-512-64", "512-1")}
    if model == "widths":
        layers[model] = (f"13-64-{dim}", "64-1")
    bottom, top = layers.get(model, ("13-512-256-64-16", "512-256-1"))
    return [
        f"--arch-embedding-size={'-'.join(map(str, rows))}", f"--arch-sparse-feature-size={dim}", f"--arch-mlp-bot={bottom}", f"--arch-mlp-top={top}",
        f"--mini-batch-size={batch}", "--num-batches=1", f"--num-indices-per-lookup={hotness}", "--num-indices-per-lookup-fixed=True",
        "--loss-function=bce", "--round-targets=True",
    ]  # fmt: skip


def compiled(model: str, topology: str, dim: int, optimizer: str, layout: str) -> dict:
    """One case; raises SystemExit where the run ends in anything but a verdict."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [
            sys.executable, str(ROOT / "run_dlrm.py"), *flags_of(model, dim), f"--optimizer={optimizer}", f"--table-layout={layout}",
            f"--compile-for={topology}", f"--json={report}",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode not in (0, 1):
            raise SystemExit(f"error: {' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
        step = (whole := json.loads(report.read_text()))["steps"][TRAIN]
    found = {
        "model": model, "topology": topology, "dim": dim, "optimizer": optimizer, "layout": layout, "passes": step["passes"],
        "error": step["error"], "needs_gib": step["used"], "usable_gib": step["usable"], "seconds": round(step["seconds"], 1),
    }  # fmt: skip
    if not step["error"]:
        memory, stores = step["memory"], whole["stores"]
        numbers = 4 * sum(store["rows"] * store["width"] for store in stores)
        found |= {
            "table_bytes": numbers, "memory": memory, "total": step["total"], "temporaries_share": memory["temporaries"] / numbers,
            "padding": step["padding"], "copies": [copy["array"] for copy in step["copies"]], "through_on_chip_memory": step["moved"],
            "storage": 1 + step["padding"] / (numbers + memory["row state"]), "bytes_a_lookup": [store["bytes_a_lookup"] for store in stores],
        }  # fmt: skip
    say(line_of(found))
    return found


def line_of(case: dict) -> str:
    name = f"{case['model']:<9} {case['topology']:<10} D={case['dim']:<4} {case['optimizer']:<11} {case['layout']:<7}"
    if case["error"]:
        needs = f"needs {case['needs_gib']} of {case['usable_gib']} GiB" if case["needs_gib"] else case["error"]
        return f"{name} DOES NOT COMPILE: {needs}"
    return (
        f"{name} total {case['total'] / 1e6:>8,.0f} MB, temporaries {case['memory']['temporaries'] / 1e6:>7.1f} MB "
        f"({case['temporaries_share']:.2%}), "
        f"copies {len(case['copies'])}, storage {case['storage']:.4f}, through on-chip memory {case['through_on_chip_memory'] / 1e6:.0f} MB, "
        f"bytes a lookup {case['bytes_a_lookup'][0]}"
    )


def verdicts(cases: list[dict]) -> list[tuple[str, str, bool]]:
    """(bar, worst value, kept) for those that these cases can say something about."""
    found = []
    widths = [case for case in cases if case["model"] == "widths" and case["layout"] == "packed" and case["optimizer"] != "adagrad"]
    if widths:
        good = all(not case["error"] for case in widths)
        share = max((case["temporaries_share"] for case in widths if not case["error"]), default=1.0)
        storage = max((case["storage"] for case in widths if not case["error"]), default=9.0)
        copies = sum(len(case["copies"]) for case in widths if not case["error"])
        found.append((f"temporaries at most {TEMPORARIES_BAR:.0%} of the tables", f"{share:.2%}", good and share <= TEMPORARIES_BAR))
        found.append(("no copy of a table's size", str(copies), good and copies == 0))
        found.append((f"storage at most {STORAGE_BAR} x N D 4", f"{storage:.5f}", good and storage <= STORAGE_BAR))
    for model, optimizer, bar in (("kaggle", "rwsadagrad", KAGGLE_BAR), ("terabyte", "sgd", TERABYTE_BAR)):
        for case in cases:
            if (case["model"], case["optimizer"], case["topology"].split(":")[0]) == (model, optimizer, "v5e"):
                total = case.get("total", float("inf"))
                found.append((f"{model}, {optimizer}, v5e: at most {bar / 1e9:.0f} GB", f"{total / 1e9:.2f} GB", case["passes"] and total <= bar))
    return found


def draw(cases: list[dict], path: Path) -> None:
    """Bytes that one lookup moves, by width, in both layouts."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 3.6), layout="constrained")
    for layout, colour, label in (("rows", "#d6604d", "rows: --table-layout=rows"), ("packed", "#2166ac", "packed: --table-layout=packed")):
        mine = [case for case in cases if (case["model"], case["layout"], case["optimizer"]) == ("widths", layout, "sgd")]
        here = {case["dim"]: math.nan if case["error"] else case["bytes_a_lookup"][0] for case in mine}
        dims = sorted(here)
        axes.plot(dims, [here[dim] for dim in dims], "o-", color=colour, label=label)
        for dim in dims:
            text, height = (f"{dim}: does not fit", 30_000) if math.isnan(here[dim]) else (f"{here[dim]:,}", here[dim])
            axes.annotate(text, (dim, height), textcoords="offset points", xytext=(0, 7), ha="center", fontsize=8, color=colour)
    dims = sorted({case["dim"] for case in cases if case["model"] == "widths"})
    axes.plot(dims, [4 * dim for dim in dims], "--", color="#8a8a8a", label="the numbers themselves, 4 D")
    axes.set(xscale="log", yscale="log", xlabel="embedding dimension D", ylabel="bytes a lookup moves", ylim=(20, 200_000))
    axes.set_xticks(dims, [str(dim) for dim in dims])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.set_title("One lookup of a float32 table, as compiled for v5e", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v4:2x2x1", "v5p:2x2x1", "v6e:2x2"])
    parser.add_argument("--dims", type=int, nargs="+", default=[8, 16, 32, 64, 128])
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "rwsadagrad", "adagrad"])
    parser.add_argument("--required", nargs="+", default=["sgd", "rwsadagrad"], help="optimizers on the other topologies")
    parser.add_argument("--layouts", nargs="+", default=["packed", "rows"])
    parser.add_argument("--models", nargs="+", default=["widths", "kaggle", "terabyte", "multihot"])
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw bytes a lookup by width (PNG); needs both layouts and SGD")
    args = parser.parse_args()
    first, wanted = args.topologies[0], []
    for topology in args.topologies:
        for optimizer in args.optimizers if topology == first else args.required:
            if "widths" in args.models:
                wanted += [("widths", topology, dim, optimizer, "packed") for dim in args.dims]
                if topology == first and optimizer == "sgd" and "rows" in args.layouts:
                    wanted += [("widths", topology, dim, optimizer, "rows") for dim in args.dims]
            if "kaggle" in args.models and (topology == first or optimizer == "rwsadagrad"):
                wanted.append(("kaggle", topology, 16, optimizer, "packed"))
            if "multihot" in args.models and topology == first and optimizer in args.required:
                wanted.append(("multihot", topology, 64, optimizer, "packed"))
        if "terabyte" in args.models and topology == first:
            wanted.append(("terabyte", topology, 64, "sgd", "packed"))
    say(f"{len(wanted)} programs, {args.jobs} at a time")
    with ThreadPoolExecutor(args.jobs) as pool:
        cases = list(pool.map(lambda case: compiled(*case), wanted))
    bars = verdicts(cases)
    for bar, value, kept in bars:
        say(f"{'kept ' if kept else 'MISSED'} {bar}: {value}")
    if args.picture:
        draw(cases, args.picture)
    result = {
        **heading("compile_gate"), "bars": [{"bar": bar, "value": value, "kept": kept} for bar, value, kept in bars], "cases": cases,
    }  # fmt: skip
    finish(result, args.out)


if __name__ == "__main__":
    main()
