"""What converting the tables of a trained model costs in test AUC, without any training after it: int8, int4, and the SVD weighted by traffic.

    OMP_NUM_THREADS=1 python benchmarks/conversions.py --raw-data-file=train.txt.gz [--dims 16 64] [--seeds 3] [--work DIR] [--out FILE]

One epoch of plain tables for each seed and dimension, then `python -m compression convert` and a test of the result on the same rows, so that every
difference is of the same predictions' ranking. Ratios are honest: all tables, scales and small plain tables included. Bars: AUC lost at most
0.0005 by int8 and the SVD at 4x, 0.001 by int4 at 7x. Nothing that a row could be told from is written. The last line is JSON.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from report import ROOT, finish, heading, say

# what is asked of `convert`: method, budget, bar. One scale for 16 rows of 16 numbers brings int8 to 3.9x, for 4 rows int4 to 7.1x
CASES = {
    16: (
        ("int8", "", 0.0005), ("int8:rows_per_scale=16", "", 0.0005), ("svd:weighted=true", "4x", 0.0005), ("pq:weighted=true", "4x", 0.0005),
        ("int4", "", 0.001), ("int4:rows_per_scale=4", "", 0.001),
    ),
    64: (("int8", "", 0.0005), ("int8:rows_per_scale=16", "", 0.0005), ("svd:weighted=true", "4x", 0.0005), ("int4", "", 0.001)),
}  # fmt: skip


def flags(raw: str, work: Path, dim: int, seed: int) -> list[str]:
    return [
        "--device=cpu", "--data-generation=dataset", "--data-set=kaggle", f"--raw-data-file={raw}", f"--processed-data-file={work}/processed.npz",
        f"--arch-sparse-feature-size={dim}", f"--arch-mlp-bot=13-64-{dim}", "--arch-mlp-top=64-1", "--loss-function=bce", "--round-targets",
        "--optimizer=adagrad", "--learning-rate=0.02", "--mini-batch-size=128", "--test-mini-batch-size=16384", "--print-freq=10000",
        f"--numpy-rand-seed={seed}",
    ]  # fmt: skip


def run(*command: str) -> str:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\n{done.stderr.strip()[-500:]}")
    return done.stdout


def tested(folder: Path) -> tuple[float, float]:
    """AUC and log loss of a run's last test."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["kind"] == "test"][-1]
    return last["auc"], last["log_loss"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raw-data-file", required=True)
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64], choices=tuple(CASES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--work", type=Path, default=Path("/tmp/dlrm_xla_conversions"))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    raw, work = str(Path(args.raw_data_file).resolve()), args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    result = {**heading("conversions"), "cases": []}
    for dim in args.dims:
        sources = {}
        for seed in range(123, 123 + args.seeds):
            model, folder = work / f"d{dim}s{seed}.pt", work / f"d{dim}s{seed}"
            run("run_dlrm.py", *flags(raw, work, dim, seed), f"--save-model={model}", "--test-freq=1000000", f"--log-dir={folder}")
            sources[seed] = model, tested(folder)
            say(f"D={dim} seed {seed}: plain AUC {sources[seed][1][0]:.5f}")
        for method, budget, bar in CASES[dim]:
            lost, losses, ratio = [], [], None
            for seed, (model, (auc, loss)) in sources.items():
                made, report, folder = work / "converted.pt", work / "report.json", work / "converted"
                sized = [f"--compress-to={budget}"] if budget else []
                run("-m", "compression", "convert", f"--load-model={model}", f"--method={method}", *sized, f"--save-model={made}", "--force",
                    f"--json={report}")  # fmt: skip
                run("run_dlrm.py", *flags(raw, work, dim, seed), f"--load-model={made}", "--inference-only", f"--log-dir={folder}")
                now, loss_now = tested(folder)
                lost.append(auc - now)
                losses.append(loss_now - loss)
                total = json.loads(report.read_text())["totals"]
                others = total["bytes_of_other_tables"]
                ratio = (total["bytes_before"] + others) / (total["bytes_after"] + others)
            mean = sum(lost) / len(lost)
            case = {"dim": dim, "method": method, "asked": budget, "ratio": ratio, "auc_lost": lost, "mean": mean, "bar": bar}
            case["log_loss_gained"] = losses
            case["met"] = mean <= bar
            result["cases"].append(case)
            shown = " ".join(f"{value:+.5f}" for value in lost)
            say(f"D={dim} {method} {ratio:.2f}x: AUC lost {shown}, mean {mean:+.5f} (bar {bar}): {'met' if case['met'] else 'MISSED'}")
    finish(result, args.out)


if __name__ == "__main__":
    main()
