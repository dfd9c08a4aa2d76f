"""kill -9 of a random rank at random moments of training, then a resume on another number of ranks: the losses of the undisturbed run.

    python benchmarks/kill_ranks.py [--tries 50] [--seed 1] [--keep DIR] [--out FILE]

Each try starts a job of 2 or 3 ranks (torchrun, gloo) with an optimizer, a method and a sharding drawn by chance, and kills one rank of it: at a
moment drawn evenly from the time between the first training line and the end, or, every third try, within SAVING s of a line that says that a
checkpoint is being written. Then:

- the job must end within END s, with an exit code that is not 0, no process left, and one line of error from all ranks together;
- `--load-model` on another number of ranks (1 to 4) goes on to the end. It must begin at the last checkpoint that was whole: no earlier than the
  last one after which the killed job has printed another line, no later than the last one that it had begun;
- where the kill came before the first checkpoint was whole, the resume must say so in one line, and the job begins anew;
- of the metrics of both jobs together no step may be missing, and every loss, before the kill and after it, must be that of an undisturbed run
  on one rank within TOLERANCE; so must the log loss of every test (AUC within AUC, accuracy within ROWS rows).

A kill after the run's last record (rank 0 draws its picture, the others leave) is too late and no try.

The model is small on purpose: another number of ranks adds numbers up in another order, and where a weight's last bit decides whether a ReLU
lets a sample through, the run takes another course, 1e-5 apart and more. With 13-32-8 and 32-1 layers, batches of 240 and a rate of 0.1 that
was seen in some runs of 120 steps; with these flags there are 46,000 such decisions in a run instead of 2,000,000, and a rate of a fifth. A
lost update or a batch trained twice changes the next losses by far more than TOLERANCE. The last line is JSON; the exit code is 1 where a try
was not as above.
"""

import argparse
import atexit
import itertools
import json
import os
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from ranks import end
from report import ROOT, finish, heading, say

END, LIMIT = 30.0, 180.0  # seconds for a job to end after the kill; for any job altogether
SAVING = 0.03  # about as long as a checkpoint takes
TOLERANCE, AUC, ROWS = 1e-6, 1e-4, 1
BATCHES, EPOCHS, SAVE_EVERY, BATCH = 40, 3, 5, 24  # 24 divides by 1, 2, 3 and 4
STEPS = BATCHES * EPOCHS
FLAGS = (
    "--arch-sparse-feature-size=8", "--arch-mlp-bot=13-8", "--arch-mlp-top=8-1", "--data-generation=dataset", "--data-set=kaggle",
    "--loss-function=bce", "--round-targets=True", "--test-mini-batch-size=240", f"--mini-batch-size={BATCH}", "--print-freq=1",
    "--test-freq=30", f"--num-batches={BATCHES}", f"--nepochs={EPOCHS}", f"--save-every={SAVE_EVERY}", "--save-model=saved", "--log-dir=run",
    "--device=cpu",
)  # fmt: skip
OPTIMIZERS = {"sgd": ("--learning-rate=0.02",), "rwsadagrad": ("--optimizer=rwsadagrad", "--learning-rate=0.002")}
METHODS = {"plain": (), "qr": ("--qr-flag", "--qr-threshold=200")}
SHARDINGS = ("auto", "data", "table", "row", "hybrid")


@dataclass
class Job:
    """A started job of run_dlrm.py; lines of its stdout arrive in `lines` with the time of their arrival. None: the end."""

    process: subprocess.Popen
    folder: Path
    lines: queue.Queue = field(default_factory=queue.Queue)
    seen: list[tuple[float, str]] = field(default_factory=list)

    def read(self) -> None:
        for line in self.process.stdout:
            self.lines.put((time.perf_counter(), line))
        self.lines.put(None)

    def next_line(self, until: float) -> str | None:
        """None at the end; TimeoutError once the clock shows `until`."""
        try:
            item = self.lines.get(timeout=max(0.0, until - time.perf_counter()))
        except queue.Empty:
            raise TimeoutError from None
        if item is None:
            self.lines.put(None)
            return None
        self.seen.append(item)
        return item[1]

    def errors(self) -> list[str]:
        """What the ranks wrote to stderr besides notes and figures: torchrun's own words are elsewhere."""
        files = sorted((self.folder / "logs").rglob("stderr.log")) or [self.folder / "stderr"]
        text = "\n".join(path.read_text(errors="replace") for path in files)
        return [line for line in text.splitlines() if line.startswith(("error:", "Traceback", "interrupted"))]


def start(ranks: int, folder: Path, flags: list[str]) -> Job:
    """In `folder`, where a job that it continues has run; ranks write stderr to files, so that torchrun's report is told from ours."""
    shutil.rmtree(folder / "logs", ignore_errors=True)
    program = [str(ROOT / "run_dlrm.py"), *flags]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "--redirects=2", "--log-dir=logs"]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *program]
    with open(folder / "stderr", "w") as errors:
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=errors, text=True, start_new_session=True)
    job = Job(process, folder)
    threading.Thread(target=job.read, daemon=True).start()
    atexit.register(end, process)
    timer = threading.Timer(LIMIT, end, [process])
    timer.daemon = True
    timer.start()
    return job


def wait(job: Job, limit: float = LIMIT) -> int:
    """The exit code, once it has ended by itself; -1 where it had to be ended."""
    until = time.perf_counter() + limit
    try:
        while job.next_line(until) is not None:
            pass
        return job.process.wait(max(0.1, until - time.perf_counter()))
    except (TimeoutError, subprocess.TimeoutExpired):
        end(job.process)
        job.process.wait()
        return -1


def ranks_of(job: Job) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process(job.process.pid).children(recursive=True):
        try:
            found[int(process.environ()["RANK"])] = process
        except (psutil.Error, KeyError):
            continue
    return found


def is_training(line: str) -> bool:
    return line.startswith("Finished training it")


def is_saving(line: str) -> bool:
    """The newest state, not the best test's."""
    return line.rstrip() == "Saving model to saved"


@dataclass
class Killed:
    """seconds: from the kill to the job's end; saves: begun, and known to be whole; step: of the last training line."""

    rank: int
    seconds: float
    code: int
    left: int
    errors: list[str]
    begun: int
    whole: int
    step: int


def kill_one(job: Job, rank: int, moment: float | None, save: tuple[int, float] | None) -> Killed | None:
    """Kills a rank `moment` s after the first training line, or save[1] s after the line of save number save[0]. None: the run was over."""
    due, begun = None, 0
    until = time.perf_counter() + LIMIT
    while due is None or time.perf_counter() < due:
        try:
            line = job.next_line(until if due is None else due)
        except TimeoutError:
            break
        if line is None:
            return None
        begun += is_saving(line)
        if due is None and moment is not None and is_training(line):
            due = job.seen[-1][0] + moment
        if due is None and save is not None and begun == save[0]:
            due = job.seen[-1][0] + save[1]
    processes = ranks_of(job)
    if rank not in processes or job.process.poll() is not None:
        return None
    killed_at = time.perf_counter()
    processes[rank].send_signal(signal.SIGKILL)
    code = wait(job, END + 10)
    seconds = time.perf_counter() - killed_at
    left = [process for process in processes.values() if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    for process in left:
        process.kill()
    if '"kind": "end"' in (job.folder / "run" / "metrics.jsonl").read_text():
        return None
    lines = [line for _, line in job.seen]
    saves = [at for at, line in enumerate(lines) if is_saving(line)]
    whole = sum(any(is_training(line) for line in lines[at + 1 :]) for at in saves)
    step = max((_step(line) for line in lines if is_training(line)), default=0)
    return Killed(rank, seconds, code, len(left), job.errors(), len(saves), whole, step)


def _step(line: str) -> int:
    """'Finished training it 3/40 of epoch 1, ...' -> 43"""
    words = line.split()
    done, num_batches = map(int, words[3].split("/"))
    return int(words[6].rstrip(",")) * num_batches + done


def step_of_save(number: int) -> int:
    """Batches done, over all epochs, when a run makes its save number `number`, counted from 1."""
    return number * SAVE_EVERY


def metrics(folder: Path) -> tuple[dict[int, list[float]], dict[int, list[dict]], list[int]]:
    """Losses by step, tests by step (each as often as they were made), and the step from which each job started."""
    losses, tests, starts = {}, {}, []
    for line in (folder / "run" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["kind"] == "train":
            losses.setdefault(row["step"], []).append(row["loss"])
        elif row["kind"] == "test":
            tests.setdefault(row["step"], []).append(row)
        elif row["kind"] == "start":
            starts.append(row["step"])
    return losses, tests, starts


def differences(folder: Path, reference: Path) -> tuple[list[str], float]:
    """What is not as in the undisturbed run, and the largest difference of a loss."""
    (losses, tests, _), (wanted, wanted_tests, _) = metrics(folder), metrics(reference)
    found = []
    if missing := sorted(set(wanted) - set(losses)):
        found.append(f"{len(missing)} steps are missing, the first is {missing[0]}")
    worst, at = max(((abs(loss - wanted[step][0]), step) for step, of_step in losses.items() for loss in of_step), default=(0.0, 0))
    if worst > TOLERANCE:
        found.append(f"loss of step {at} differs by {worst:.1e}")
    for step, (test,) in wanted_tests.items():
        for other in tests.get(step, [{}]):
            limits = {"log_loss": TOLERANCE, "auc": AUC, "accuracy": (ROWS + 0.5) / test["num_rows"]}
            found += [f"{name} of the test at step {step} is {other.get(name)}, not {test[name]}"
                      for name, limit in limits.items() if name not in other or abs(other[name] - test[name]) > limit]  # fmt: skip
    return found, worst


class Tries:
    def __init__(self, folder: Path, seed: int):
        self.folder, self.choose = folder, random.Random(seed)
        self.references: dict[tuple[str, str], Path] = {}
        self.seconds: dict[int, float] = {}  # by ranks, from the first training line to the last checkpoint of an undisturbed job
        self.number = itertools.count()

    def flags(self, optimizer: str, method: str, sharding: str) -> list[str]:
        data = (f"--raw-data-file={self.folder / 'train.txt'}", f"--processed-data-file={self.folder / 'processed.npz'}")
        return [*FLAGS, *data, *OPTIMIZERS[optimizer], *METHODS[method], f"--sharding={sharding}"]

    def new_folder(self) -> Path:
        folder = self.folder / f"try{next(self.number)}"
        folder.mkdir()
        return folder

    def undisturbed(self, ranks: int, flags: list[str]) -> tuple[Path, float]:
        """The folder of a job, and the seconds from its first training line to the line of its last checkpoint."""
        folder = self.new_folder()
        job = start(ranks, folder, flags)
        code = wait(job)
        times = [moment for moment, line in job.seen if is_training(line) or is_saving(line)]
        if code or not times:
            raise SystemExit(f"an undisturbed job of {ranks} rank(s) ended with {code}: {' '.join(flags)}\n{_tail(folder)}")
        return folder, times[-1] - times[0]

    def reference(self, optimizer: str, method: str) -> Path:
        """Of one rank."""
        if (optimizer, method) not in self.references:
            self.references[optimizer, method] = self.undisturbed(1, self.flags(optimizer, method, "auto"))[0]
        return self.references[optimizer, method]

    def one(self, during_save: bool) -> dict | None:
        """A try; None where the job had ended before its rank was killed."""
        choose = self.choose
        optimizer, method, sharding = choose.choice(list(OPTIMIZERS)), choose.choice(list(METHODS)), choose.choice(SHARDINGS)
        ranks = choose.choice((2, 3))
        resumed_on = choose.choice([number for number in (1, 2, 3, 4) if number != ranks])
        flags, reference = self.flags(optimizer, method, sharding), self.reference(optimizer, method)
        if ranks not in self.seconds:
            folder, self.seconds[ranks] = self.undisturbed(ranks, self.flags("sgd", "plain", "auto"))
            shutil.rmtree(folder)
        folder, rank = self.new_folder(), choose.randrange(ranks)
        moment = choose.uniform(0, self.seconds[ranks])
        save = choose.randint(1, STEPS // SAVE_EVERY), choose.uniform(0, SAVING)
        killed = kill_one(start(ranks, folder, flags), rank, None if during_save else moment, save if during_save else None)
        if killed is None:
            shutil.rmtree(folder)
            return None
        wrong, again = self.judge_end(killed), False
        seconds, resume_step = time.perf_counter(), None
        if killed.begun:
            job = start(resumed_on, folder, [*flags, "--load-model=saved"])
            code = wait(job)
            if code and killed.whole == 0 and len(job.errors()) == 1 and "holds no whole checkpoint" in job.errors()[0]:
                again = True
            elif code:
                wrong.append(f"the resume ended with {code}: {job.errors() or _tail(folder)}")
            else:
                resume_step = metrics(folder)[2][-1]
                least, most = step_of_save(killed.whole), step_of_save(killed.begun)
                if not least <= resume_step <= most:
                    wrong.append(f"resumed at step {resume_step}, not from {least} to {most}")
        if again or not killed.begun:
            again = True
            job = start(resumed_on, folder, flags)
            if code := wait(job):
                wrong.append(f"started anew it ended with {code}: {job.errors() or _tail(folder)}")
        found, worst = differences(folder, reference)
        wrong += found
        if not wrong:
            shutil.rmtree(folder)
        return {
            "ranks": ranks, "killed": rank, "sharding": sharding, "optimizer": optimizer, "method": method, "during_save": during_save,
            "step": killed.step, "end_s": round(killed.seconds, 2), "code": killed.code, "line": (killed.errors or [""])[0],
            "resumed_on": resumed_on, "from": "nothing" if again else resume_step, "resume_s": round(time.perf_counter() - seconds, 1),
            "worst": worst, "wrong": wrong,
        }  # fmt: skip

    def judge_end(self, killed: Killed) -> list[str]:
        wrong = []
        if killed.seconds > END or killed.code == -1:
            wrong.append(f"the job ended {killed.seconds:.1f} s after the kill")
        if killed.code == 0:
            wrong.append("the job ended with 0")
        if killed.left:
            wrong.append(f"{killed.left} processes were left")
        if len(killed.errors) != 1 or not killed.errors[0].startswith("error:"):
            wrong.append(f"{len(killed.errors)} lines of error: {killed.errors}")
        return wrong


def _tail(folder: Path) -> str:
    texts = [path.read_text(errors="replace")[-1500:] for path in (folder / "stderr", *sorted((folder / "logs").rglob("stderr.log")))]
    return "\n".join(texts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in this folder, and leave there what went wrong")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1")  # of the jobs
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    with nullcontext(args.keep) if args.keep else tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve()
        synth = ["--profile=small", "--rows=12000", f"--out={folder / 'train.txt'}"]
        subprocess.run([sys.executable, "-m", "data_loaders.synth", *synth], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
        tries, done, too_late = Tries(folder, args.seed), [], 0
        while len(done) < args.tries:
            found = tries.one(during_save=len(done) % 3 == 2)
            if found is None:
                too_late += 1
                continue
            done.append(found)
            verdict = "equal" if not found["wrong"] else f"WRONG: {'; '.join(found['wrong'])}"
            text = "{optimizer}, {method}, {sharding}: rank {killed} of {ranks} killed after step {step}".format(**found)
            text += " in a save" if found["during_save"] else ""
            text += "; ended in {end_s} s with {code}; on {resumed_on} from {from} in {resume_s} s, worst {worst:.0e}".format(**found)
            say(f"{len(done)}/{args.tries}: {text}: {verdict}")
    bad = [found for found in done if found["wrong"]]
    result = {
        **heading("kill_ranks"), "tries": len(done), "equal": len(done) - len(bad), "wrong": len(bad), "too_late": too_late, "seed": args.seed,
        "from_nothing": sum(found["from"] == "nothing" for found in done), "during_save": sum(found["during_save"] for found in done),
        "end_s_max": max(found["end_s"] for found in done), "worst_loss_difference": max(found["worst"] for found in done),
        "exit_codes": dict(Counter(str(found["code"]) for found in done)), "lines": dict(Counter(found["line"] for found in done)),
        "what": done,
    }  # fmt: skip
    finish(result, args.out)
    if bad:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
