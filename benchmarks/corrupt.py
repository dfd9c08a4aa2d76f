"""Damaged Criteo files against what upstream makes of them: python benchmarks/corrupt.py [--upstream PATH] [--seed 0] [--share 1]

Every variant of tests/oracles/corrupt.py goes through run_dlrm.main in a process of its own (forked, so that libraries are imported once),
under a time limit. It must end in one of three ways: the rows that upstream would read (tests/oracles/upstream_text.py); exit code 2 and
one line that names the file and its first bad line, where upstream fails too; or the same refusal for one of the reasons in that file.
After a refusal the good file is put in the bad one's place and must be preprocessed as if nothing had been. --processes variants go through
`python run_dlrm.py` too, with the same outcome. --upstream PATH, a checkout of facebookresearch/dlrm, runs its own code on every variant and
holds the restatement against it (ids are kept to 32 bits, as NumPy 1 did). --signals runs are interrupted at random moments by SIGINT and
SIGTERM in turn, then run again. The last line is one JSON object; the exit status is 1 where anything failed.
"""

import argparse
import functools
import json
import os
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from tqdm import tqdm  # noqa: E402

from tests.oracles import corrupt, upstream_text  # noqa: E402
from tests.oracles.upstream_text import Verdict  # noqa: E402

SECONDS = 60  # an ordinary variant takes 0.4
IMPORTED_ONCE = (
    "torch", "matplotlib.pyplot", "torch.utils.tensorboard", "compression.registry", "data_loaders.open", "data_loaders.criteo",
    "dlrm_xla.debug", "dlrm_xla.onnx_export", "dlrm_xla.quantize", "dlrm_xla.session", "dlrm_xla.summary", "dlrm_xla.tracking",
)  # fmt: skip
FLAGS = ((-1, 0.0), (-1, 0.0), (20, 0.0), (97, 0.4))  # --max-ind-range, --data-sub-sample-rate: by the variant's number
MODEL = (
    "--device=cpu", "--data-generation=dataset", "--arch-sparse-feature-size=2", "--arch-mlp-bot=13-2", "--arch-mlp-top=2-1",
    "--loss-function=bce", "--mini-batch-size=64", "--num-batches=1",
)  # fmt: skip


@dataclass
class Ended:
    """How a process ended: its exit code, -N after signal N, or "hang"; and its stderr."""

    code: int | str
    err: str


def forked(work: Callable[[], int], folder: Path, interrupt: tuple[int, float, Callable[[], bool]] | None = None) -> Ended:
    """work() in a child whose current folder is folder's parent, stdout thrown away. interrupt: (signal, seconds to wait, what must hold
    before the waiting starts)."""
    err = folder.with_suffix(".err")
    child = os.fork()
    if child == 0:
        code = 99
        try:
            out = os.open(err, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(out, 2)
            os.chdir(folder.parent)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = work()
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 1
            print(leaving, file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    start, due = time.monotonic(), None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return Ended(os.waitstatus_to_exitcode(status), err.read_text(errors="backslashreplace"))
        if interrupt and due is None and interrupt[2]():
            due = time.monotonic() + interrupt[1]
        if due is not None and time.monotonic() > due:
            os.kill(child, interrupt[0])
            interrupt = due = None
        if time.monotonic() - start > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Ended("hang", err.read_text(errors="backslashreplace"))
        time.sleep(0.001)


def argv_of(folder: Path, flags: tuple[int, float]) -> list[str]:
    files = [f"--raw-data-file={folder / 'train.txt'}", f"--processed-data-file={folder / 'processed.npz'}"]
    return [*MODEL, *files, f"--max-ind-range={flags[0]}", f"--data-sub-sample-rate={flags[1]}"]


@functools.cache
def root() -> dict:
    """What run_dlrm.py defines. It is run, not imported: nothing imports the composition root."""
    return runpy.run_path(str(ROOT / "run_dlrm.py"))


def ours(folder: Path, flags: tuple[int, float], small_blocks: bool) -> Ended:
    """run_dlrm.main over folder/train.txt. small_blocks: blocks of 15 rows, so that a small file has many."""

    def work() -> int:
        from data_loaders import criteo_text

        if small_blocks:
            criteo_text.BLOCK_BYTES = 4000
        return root()["main"](argv_of(folder, flags))

    return forked(work, folder)


def arrays(folder: Path) -> dict[str, np.ndarray]:
    with np.load(folder / "processed.npz") as data:
        return {name: data[name] for name in upstream_text.ARRAYS}


def put(folder: Path, variant: corrupt.Variant) -> None:
    """The variant as folder/train.txt, in an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    raw = folder / "train.txt"
    if variant.special == "folder":
        raw.mkdir()
    elif variant.special == "dangling":
        raw.symlink_to("absent.txt")
    elif variant.special == "loop":
        raw.symlink_to("train.txt")
    elif variant.special == "null":
        raw.symlink_to("/dev/null")
    else:
        raw.write_bytes(variant.data if variant.special != "locked" else corrupt.good_text())
        raw.chmod(0 if variant.special == "locked" else 0o600)


def replace_by_good(folder: Path) -> None:
    raw = folder / "train.txt"
    (shutil.rmtree if raw.is_dir() and not raw.is_symlink() else Path.unlink)(raw)
    raw.write_bytes(corrupt.good_text())


def refusal(ended: Ended) -> str | None:
    """The message, where the run ended as a refusal must: code 2, and the one line that starts with "error: " comes last on stderr."""
    lines = ended.err.splitlines()
    good = ended.code == 2 and lines and [line for line in lines if line.startswith("error: ")] == lines[-1:] and "Traceback" not in ended.err
    return lines[-1].removeprefix("error: ") if good else None


def verdict_of(variant: corrupt.Variant, folder: Path, flags: tuple[int, float], good: dict[str, np.ndarray]) -> tuple[Verdict, Ended, set[str]]:
    """What a variant came to, and the files that a refusal left."""
    put(folder, variant)
    ended = ours(folder, flags, small_blocks=variant.number % 2 == 0)
    message, root_reads = refusal(ended), variant.special == "locked" and os.geteuid() == 0
    if ended.code == "hang":
        return Verdict("FAIL: hang"), ended, set()
    if ended.code != 0 and message is None:
        return Verdict("FAIL: traceback", ended.err[-2000:]), ended, set()
    data = corrupt.good_text() if root_reads else variant.data
    if ended.code == 0:
        return upstream_text.judge(data, arrays(folder), "", *flags), ended, set()
    raw = folder / "train.txt"
    if not variant.special:
        verdict = upstream_text.judge(data, message, str(raw), *flags)
    else:
        verdict = Verdict("refused by both" if re.match(f"(--raw-data-file=)?{raw}: ", message) else "FAIL: message", message)
    left = {path.name for path in folder.iterdir()} - {"train.txt"}
    replace_by_good(folder)
    again = ours(folder, flags, small_blocks=False)
    if again.code != 0 or any((arrays(folder)[name] != good[name]).any() for name in upstream_text.ARRAYS):
        return Verdict("FAIL: the mended file", f"after {message}: {again.err[-500:]}"), ended, left
    return verdict, ended, left


def upstream_arrays(checkout: Path, data: bytes, folder: Path, flags: tuple[int, float]) -> dict[str, np.ndarray] | str:
    """What upstream's own code makes of a raw file; its last words where it fails."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "train.txt").write_bytes(data)

    def work() -> int:
        sys.set_int_max_str_digits(0)  # younger than upstream's code
        source = (checkout / "data_utils.py").read_text()
        mended = re.sub(r"(int\(x, 16\), line\[14:\]\)\)), dtype=np.int32\s*\)", r"\1, dtype=np.int64).astype(np.int32)", source)
        assert mended.count("astype(np.int32)") == source.count("astype(np.int32)") + 1, "upstream's line that NumPy 2 refuses is not found"
        names = {"__name__": "data_utils"}
        exec(compile(mended, "data_utils.py", "exec"), names)
        np.random.seed(upstream_text.SEED)
        names["getCriteoAdData"](f"{folder}/train.txt", "processed", *flags, upstream_text.DAYS, "train", "none", True)
        return 0

    ended = forked(work, folder)
    if ended.code != 0:
        return ended.err.strip().splitlines()[-1] if ended.err.strip() else f"exit code {ended.code}"
    return arrays(folder)


def restatement_fault(checkout: Path, variant: corrupt.Variant, folder: Path, flags: tuple[int, float]) -> str | None:
    """Where tests/oracles/upstream_text.py and upstream's own code differ; empty where they agree, None where there is no text to read."""
    try:
        text = upstream_text.unpacked(variant.data)
    except upstream_text.Refused:
        return None  # gunzip refuses
    theirs = upstream_arrays(checkout, text, folder, flags)
    try:
        with upstream_text.any_number_of_digits():
            restated = upstream_text.read(variant.data, *flags)[0]
    except upstream_text.Refused as error:
        return "" if isinstance(theirs, str) else f"restated as a refusal ({error}), upstream reads it"
    if isinstance(theirs, str):
        return f"restated as rows, upstream fails: {theirs}"
    differ = [name for name in upstream_text.ARRAYS if theirs[name].shape != restated[name].shape or (theirs[name] != restated[name]).any()]
    return f"other {', '.join(differ)}" if differ else ""


def as_commands(outcomes: list[tuple[corrupt.Variant, Ended]], many: int, folder: Path) -> list[str]:
    """Some variants through `python run_dlrm.py`: differences from what the forked processes came to."""
    faults = []
    step = max(1, len(outcomes) // max(many, 1))
    for variant, ended in tqdm(outcomes[step // 2 :: step][:many], desc="Commands", disable=not sys.stderr.isatty()):
        put(folder, variant)
        command = [sys.executable, str(ROOT / "run_dlrm.py"), *argv_of(folder, FLAGS[variant.number % len(FLAGS)])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=4 * SECONDS, errors="backslashreplace", cwd=folder.parent)
        # messages are compared up to the line's number: some go on with the size of a block
        told, before = (re.sub(r"(: line \d+).*", r"\1", str(refusal(way))) for way in (Ended(done.returncode, done.stderr), ended))
        if done.returncode != ended.code or told != before:
            faults.append(f"{variant.kind}, {variant.name}: {done.returncode} {done.stderr[-300:]} instead of {ended.code} {ended.err[-300:]}")
    return faults


def interrupted(many: int, folder: Path, seed: int) -> tuple[Counter, list[str], set[str]]:
    """Preprocessing of 60,000 rows interrupted at random moments and run again: how often each way of ending, faults, names of what was left."""
    text, flags, rng = corrupt.good_text(2000) * 30, FLAGS[0], random.Random(seed)
    put(folder, corrupt.Variant(0, "", "", text))
    start = time.monotonic()
    first = ours(folder, flags, small_blocks=False)
    seconds, whole = time.monotonic() - start, (folder / "processed.npz").read_bytes()
    assert first.code == 0, first.err
    ways, faults, left = Counter(), [], set()
    for k in tqdm(range(many), desc="Signals", disable=not sys.stderr.isatty()):
        number = (signal.SIGINT, signal.SIGTERM)[k % 2]
        put(folder, corrupt.Variant(0, "", "", text))

        def work() -> int:
            return root()["main"](argv_of(folder, flags))

        def begun() -> bool:
            return len(list(folder.iterdir())) > 1

        ended = forked(work, folder, (number, rng.random() * seconds / 2, begun))
        done = "with" if (folder / "processed.npz").exists() else "without"
        ways[f"{number.name}: code {ended.code}, {done} a processed file"] += 1
        said = ended.code != 130 or ended.err.endswith("interrupted\n")
        if ended.code not in (0, 130, -signal.SIGTERM, 143) or "Traceback" in ended.err or not said:
            faults.append(f"{number.name}: code {ended.code}, {ended.err[-1500:]}")
        if ended.code != 0:
            left |= {re.sub(r"\d+\.tmp$", "N.tmp", path.name) for path in folder.iterdir()} - {"train.txt"}
        again = ours(folder, flags, small_blocks=False)
        if again.code != 0 or (folder / "processed.npz").read_bytes() != whole:
            faults.append(f"{number.name}, then again: code {again.code}, other bytes; {again.err[-500:]}")
        over = {path.name for path in folder.iterdir()} - {"train.txt", "processed.npz", "train_day_count.npz"}
        if over:
            faults.append(f"{number.name}: a later run leaves {over}")
    return ways, faults, left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--share", type=float, default=1.0, help="of the variants")
    parser.add_argument("--processes", type=int, default=24)
    parser.add_argument("--signals", type=int, default=12)
    parser.add_argument("--list", action="store_true", help="print every variant and its verdict")
    args = parser.parse_args()
    for name in IMPORTED_ONCE:
        __import__(name)
    root()

    verdicts, classes, left, restated, outcomes, failed, held = Counter(), {}, Counter(), [], [], [], 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "K"
        good = {flags: upstream_text.read(corrupt.good_text(), *flags)[0] for flags in set(FLAGS)}
        found = corrupt.variants(args.seed, share=args.share)
        for variant in tqdm(found, desc="Variants", disable=not sys.stderr.isatty()):
            flags = FLAGS[variant.number % len(FLAGS)]
            verdict, ended, over = verdict_of(variant, folder, flags, good[flags])
            verdicts[verdict.name] += 1
            classes.setdefault(variant.kind, Counter())[verdict.name.split(":")[0]] += 1
            left.update(over)
            outcomes.append((variant, ended))
            if args.list or verdict.failed:
                print(f"{variant.number} {variant.kind}, {variant.name} {flags}: {verdict.name} | {verdict.note}")
            failed += [variant.number] * verdict.failed
            if args.upstream and not variant.special:
                fault = restatement_fault(args.upstream, variant, folder, flags)
                restated += [f"{variant.number} {variant.kind}, {variant.name} {flags}: {fault}"] * bool(fault)
                held += fault is not None
        commands = as_commands(outcomes, args.processes, folder)
        ways, signals, unfinished = interrupted(args.signals, folder, args.seed)
    for fault in (*restated, *commands, *signals):
        print(f"FAIL: {fault}")
    result = {
        "benchmark": "corrupt", "seed": args.seed, "variants": len(found), "failed": len(failed), "verdicts": dict(sorted(verdicts.items())),
        "classes": classes, "left_by_refusals": dict(left), "commands": min(args.processes, len(found)), "commands_differ": len(commands),
        "held_against_upstream": held, "restatement_differs": len(restated),
        "signals": dict(ways), "signals_failed": len(signals), "left_by_signals": sorted(unfinished),
    }  # fmt: skip
    print(json.dumps(result))
    return 1 if failed or restated or commands or signals else 0


if __name__ == "__main__":
    sys.exit(main())
