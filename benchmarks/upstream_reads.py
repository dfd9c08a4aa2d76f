"""Upstream trains from the files that we write in its formats, and prints the losses that it prints from its own files.

    python benchmarks/upstream_reads.py --upstream PATH [--rows 150] [--keep FOLDER] [--out FILE]

--upstream  a checkout of facebookresearch/dlrm; it is copied to a temporary folder and run from there, so nothing is written into it
--rows      of a day of the made-up Terabyte set; Kaggle's file has seven times as many

Made-up raw text goes through upstream's own preprocessing and through ours; then upstream trains, with the same flags, in a folder that holds
its own files and in one that holds only ours: the .npz, the files of --memory-map (with and without --mlperf-logging's loader), MLPerf's
binary files (shuffled too). Losses are compared as they are printed, to nine digits; binary files byte by byte.

Patches to the copy, only where upstream cannot run or cannot be read: ids wrap to int32, as before NumPy 2 (OverflowError without
--max-ind-range); CriteoBinDataset gets the attribute num_samples (AttributeError); losses are printed with nine digits instead of six.
The last line is JSON; the exit status is 1 where a loss or a byte differs.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from data_loaders.preprocess import preprocess  # noqa: E402

MODEL = (
    "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-32-16", "--arch-mlp-top=32-1", "--data-generation=dataset", "--loss-function=bce",
    "--round-targets=True", "--learning-rate=0.1", "--mini-batch-size=64", "--print-freq=1", "--test-freq=10", "--nepochs=2",
)  # fmt: skip
PATCHES = (
    ("data_utils.py", "lambda x: int(x, 16), line", "lambda x: (int(x, 16) + 2**31) % 2**32 - 2**31, line"),
    (
        "data_loader_terabyte.py",
        "        self.num_entries = ",
        "        self.num_samples = os.path.getsize(data_file) // (bytes_per_feature * self.tot_fea)\n        self.num_entries = ",
    ),
    ("dlrm_s_pytorch.py", "loss {:.6f}", "loss {:.9f}"),
)
LOSS = re.compile(r"^Finished training it .* loss (\S+)", re.M)
DISTINCT = (3, 5, 7, 10, 20, 50) * 4 + (11, 400)


def make_text(path: Path, num_rows: int, rng: np.random.Generator) -> None:
    """Criteo's format: tabs, a tenth to a fifth of the cells empty."""
    with open(path, "w") as file:
        for _ in range(num_rows):
            counts = ["" if rng.random() < 0.2 else str(rng.integers(-2, 200)) for _ in range(13)]
            ids = ["" if rng.random() < 0.1 else f"{int(rng.integers(size)) * 2654435761 % 2**32:08x}" for size in DISTINCT]
            file.write("\t".join([str(int(rng.random() < 0.3)), *counts, *ids]) + "\n")


def make_raw(folder: Path, rows: int) -> None:
    """train.txt, and day_0 to day_23, of unequal lengths."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    make_text(folder / "train.txt", 7 * rows + 3, rng)
    for day in range(24):
        make_text(folder / f"day_{day}", rows + 7 * (day % 5), rng)


def patched(upstream: Path, folder: Path) -> Path:
    """The copy of upstream."""
    copy = folder / "upstream"
    shutil.copytree(upstream, copy, ignore=shutil.ignore_patterns(".git"))
    for name, old, new in PATCHES:
        text = (copy / name).read_text()
        if text.count(old) != 1:
            raise SystemExit(f"{name}: {old!r} is there {text.count(old)} times, not once: another version of upstream?")
        (copy / name).write_text(text.replace(old, new))
    return copy


def train(copy: Path, *flags: str) -> list[str]:
    """The losses that upstream prints, as text."""
    done = subprocess.run(
        [sys.executable, str(copy / "dlrm_s_pytorch.py"), *MODEL, *flags], cwd=copy, capture_output=True, text=True, timeout=600
    )
    losses = LOSS.findall(done.stdout)
    if done.returncode != 0 or not losses:
        raise SystemExit(f"upstream {' '.join(flags)}: exit status {done.returncode}, {len(losses)} losses\n{done.stderr[-3000:]}")
    return losses


def convert(*flags: object) -> None:
    subprocess.run([sys.executable, "-m", "data_loaders.convert", *map(str, flags)], cwd=ROOT, check=True)


def flags_of(data_set: str, folder: Path, processed: str, *more: str) -> tuple[str, ...]:
    raw = folder / ("train.txt" if data_set == "kaggle" else "day")
    return (f"--data-set={data_set}", f"--raw-data-file={raw}", f"--processed-data-file={folder / processed}", *more)


MAPPED = ("--memory-map",)
MLPERF = ("--memory-map", "--mlperf-logging")
BIN = (*MLPERF, "--mlperf-bin-loader")
# name: data set, further flags, form that `convert` writes
CASES = {
    "kaggle npz": ("kaggle", (), "npz"),
    "kaggle days": ("kaggle", MAPPED, "days"),
    "kaggle npz, max-ind-range": ("kaggle", ("--max-ind-range=20",), "npz"),
    "terabyte npz": ("terabyte", (), "npz"),
    "terabyte days": ("terabyte", MAPPED, "days"),
    "terabyte days, mlperf": ("terabyte", MLPERF, "days"),
    "terabyte days, mlperf, max-ind-range": ("terabyte", (*MLPERF, "--max-ind-range=20"), "days"),
    "terabyte bin": ("terabyte", BIN, "bin"),
    "terabyte bin, shuffled": ("terabyte", (*BIN, "--mlperf-bin-shuffle"), "bin"),
}
PROCESSED = {"kaggle": "kaggleAdDisplayChallenge_processed.npz", "terabyte": "terabyte_processed.npz"}  # upstream's names


def compare(copy: Path, raw: Path, folder: Path, name: str) -> dict:
    """One case: upstream in a folder with its own files, made from the raw text, and in one with only ours."""
    data_set, more, form = CASES[name]
    theirs, ours = folder / "theirs", folder / "ours"
    shutil.copytree(raw, theirs)
    ours.mkdir()
    train(copy, *flags_of(data_set, theirs, PROCESSED[data_set], *more))  # the first run makes the files, and draws from the weights' stream
    expected = train(copy, *flags_of(data_set, theirs, PROCESSED[data_set], *more))

    max_ind_range = next((int(flag.split("=")[1]) for flag in more if flag.startswith("--max-ind-range")), -1)
    made = folder / "made.npz" if data_set == "kaggle" else folder / "made"
    name = "train.txt" if data_set == "kaggle" else "day"
    preprocess(raw / name, made, data_set=data_set, max_ind_range=max_ind_range, sub_sample_rate=0.0, rng=None, progress=False)
    place = ours / name
    convert(made, "--to", form, "--out", place if form == "days" else ours / PROCESSED[data_set], "--raw-data-file", place)
    found = train(copy, *flags_of(data_set, ours, PROCESSED[data_set], *more))
    result = {"batches": len(found), "losses_equal": found == expected, "first": found[0], "last": found[-1]}
    if form == "bin":
        files = [f"terabyte_processed_{split}.bin" for split in ("train", "test", "val")]
        result["bytes_equal"] = all((theirs / file).read_bytes() == (ours / file).read_bytes() for file in files)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=150)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--keep", type=Path, help="folder that the files stay in")
    parser.add_argument("--out", type=Path, help="file for the JSON line, too")
    args = parser.parse_args()
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep.resolve() if args.keep else Path(temporary)
        copy = patched(args.upstream, folder)
        make_raw(folder / "raw", args.rows)
        for number, name in enumerate(args.cases):
            results[name] = compare(copy, folder / "raw", folder / f"case{number}", name)
            print(f"{name}: {results[name]}", flush=True)
    passed = all(result["losses_equal"] and result.get("bytes_equal", True) for result in results.values())
    line = json.dumps({"benchmark": "upstream_reads", "rows_of_a_day": args.rows, "passed": passed, "cases": results})
    if args.out:
        args.out.write_text(line + "\n")
    print(line)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
