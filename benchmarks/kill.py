"""kill -9 at random moments of preprocessing, and what the next run makes of it: python benchmarks/kill.py --rows 300000 --tries 24

Each try starts a run in a process of its own, kills it at a moment drawn evenly from the time that an undisturbed run takes, notes how far it had
come, and lets a second run finish. Its result must be, byte for byte, the undisturbed one's; until then nothing may lie under its name. Every
third try kills the second run too. Segments are small, so that all stages are hit. Both formats; the last line is one JSON object.
"""

import argparse
import hashlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from report import ROOT, finish, heading, say

# Every segment, column and stretch of the result is recorded on its own, as it is at full size
RUN = """
import sys
from data_loaders import arrays_writer, number_stage, preprocess, read_stage
read_stage.SEGMENT_ROWS, number_stage.SAVE_SECONDS, arrays_writer.SAVE_BYTES = 15_000, -1, 2_000_000
print("started", flush=True)
sys.exit(preprocess.main(sys.argv[1:]))
"""


def start(raw: Path, out: Path) -> subprocess.Popen:
    """A run that has imported everything."""
    flags = [f"--raw-data-file={raw}", f"--processed-data-file={out}", "--data-sub-sample-rate=0.2", "--preprocess-memory=1GB"]
    process = subprocess.Popen([sys.executable, "-c", RUN, *flags], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    return process


def finished(raw: Path, out: Path) -> float:
    """Seconds that a run took to its end."""
    process, begin = start(raw, out), time.perf_counter()
    process.communicate()
    if process.returncode:
        raise SystemExit(f"a run ended with {process.returncode}")
    return time.perf_counter() - begin


def killed(raw: Path, out: Path, seconds: float) -> bool:
    """Whether the run was killed before its end."""
    process = start(raw, out)
    time.sleep(seconds)
    process.kill()
    process.communicate()
    return process.returncode == -9


def digest(out: Path) -> str | None:
    """Of every name and byte; None where there is nothing."""
    if not out.exists():
        return None
    sums = hashlib.sha256()
    for path in [out] if out.is_file() else sorted(set(out.iterdir()) - {out / "verified.json"}):  # which says when somebody has read it
        sums.update(f"{path.name if path != out else ''} {path.stat().st_size}\n".encode())
        sums.update(path.read_bytes())
    return sums.hexdigest()


def progress(out: Path) -> dict:
    """How far the unfinished work has come: the stage, and what of it the next run need not do again."""
    parts = out.with_name(f"{out.name}.parts")
    if not parts.exists():
        return {"stage": "finished" if out.exists() else "start"}
    try:
        state = json.loads((parts / "state.json").read_text())
    except FileNotFoundError:
        return {"stage": "read", "segments": len(list(parts.glob("segment_*.bin")))}
    if "built" in state:
        return {"stage": "name"}
    if state.get("written"):
        return {"stage": "write", "segments": state["written"]["segments"]}
    columns = len(state.get("columns", []))
    return {"stage": "write" if columns == 26 else "number", "columns": columns}


def one_format(raw: Path, folder: Path, name: str, tries: int, choose: random.Random) -> dict:
    out = folder / name
    finished(raw, out)  # warm
    shutil.rmtree(out) if out.is_dir() else out.unlink()
    seconds = finished(raw, out)
    wanted, stages, bad, kills, number = digest(out), Counter(), 0, 0, 0
    while number < tries:
        shutil.rmtree(out) if out.is_dir() else out.unlink(missing_ok=True)
        moment = choose.uniform(0, seconds)
        if not killed(raw, out, moment):
            continue
        found, half = progress(out), digest(out) not in (None, wanted)
        number, kills = number + 1, kills + 1
        stages[found["stage"]] += 1
        again = ""
        if number % 3 == 0 and killed(raw, out, choose.uniform(0, seconds / 2)):
            kills, half = kills + 1, half or digest(out) not in (None, wanted)
            again = f", then killed at {progress(out)}"
        rerun = finished(raw, out)
        same = digest(out) == wanted and not half and not out.with_name(f"{name}.parts").exists()
        bad += not same
        verdict = f"rerun {rerun:.2f} s, {'same' if same else 'OTHER'} bytes"
        say(f"{name} {number}/{tries}: killed after {moment:.2f} of {seconds:.2f} s at {found}{again}; {verdict}")
    return {"tries": tries, "kills": kills, "other_bytes": bad, "seconds_undisturbed": round(seconds, 2), "stages": dict(stages)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=300_000)
    parser.add_argument("--tries", type=int, default=24, help="for each format")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the result here")
    args = parser.parse_args()
    choose = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "train.txt"
        flags = ["--profile=criteo-kaggle", f"--rows={args.rows}", f"--out={raw}"]
        subprocess.run([sys.executable, "-m", "data_loaders.synth", *flags], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        formats = {name: one_format(raw, Path(folder), name, args.tries, choose) for name in ("out.npz", "out")}
    result = {**heading("kill"), "rows": args.rows, "seed": args.seed, "npz": formats["out.npz"], "arrays": formats["out"]}
    finish(result, args.out)
    if any(entry["other_bytes"] for entry in formats.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
