"""Does reading hold up training? Rows per second of an epoch's batches alone, against the training step's, and of both together.

Bound: a row of Criteo is 40 numbers of 4 bytes. Read in order they pass at the speed of memory (10 GB/s: 60 M rows/s); in random order each row
is three cache lines that must be fetched (about 50 ns: 20 M rows/s). On top come 13 logarithms, looked up.

    python benchmarks/read_epoch.py [--rows 2400000] [--batch 2048] [--rounds 5] [--threads N] [--matmul-precision bfloat16] [--device cpu]
        [--num-workers 0] [--folder DIR] [--out FILE]

Makes a file of the criteo-kaggle profile (data_loaders.synth) and processes it to an .npz and to an arrays folder; --folder keeps them for the
next time. Every way of reading (rows in memory, .npz and folder mapped; random order, file order) takes its turn with the training step of the
Kaggle model, each round anew: the step on batches that are there already (`step`), the whole epoch's batches with no step (`read`), and steps
on batches as they come through read-ahead (`together`). `ratio` is read over step in the same round, and the bar is 5. `held_up` is what
together loses against step; on a machine whose cores are all busy with the step, reading's own CPU time (`cpu_us_per_row`) is lost in any case.
The first epoch, in which a mapped file comes from the disk or from the page cache, is not timed. Medians of all rounds; the last line is JSON.
"""

import argparse
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from report import finish, heading, median, say

from compression.registry import create_tables
from data_loaders import synth, synth_profiles
from data_loaders.open import open_dataset
from data_loaders.prefetch import read_ahead
from dlrm_xla import backends, flags
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.models.dlrm import DLRM
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.train import Trainer

MODEL = (
    "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-512-256-64-16", "--arch-mlp-top=512-256-1", "--data-generation=dataset",
    "--loss-function=bce", "--learning-rate=0.1",
)  # fmt: skip
BAR = 5.0
STEPS = 20
KEPT = 20  # batches that the step is measured on


def ways(folder: Path) -> dict[str, tuple[str, ...]]:
    npz, arrays = (f"--processed-data-file={folder / name}" for name in ("processed.npz", "processed"))
    random, in_order = "--data-randomize=total", "--data-randomize=none"
    return {
        "memory, random": (npz, random),
        "memory, in order": (npz, in_order),
        "mapped npz, random": (npz, random, "--memory-map"),
        "mapped npz, in order": (npz, in_order, "--memory-map"),
        "mapped folder, random": (arrays, random, "--memory-map"),
        "mapped folder, in order": (arrays, in_order, "--memory-map"),
    }


def configure(args, folder: Path, more: tuple[str, ...]) -> Config:
    common = (
        f"--raw-data-file={folder / 'train.txt'}", f"--mini-batch-size={args.batch}", f"--device={args.device}",
        f"--matmul-precision={args.matmul_precision}",
    )  # fmt: skip
    return Config.from_args(flags.parse([*MODEL, *common, *more]))


def open_ways(args, folder: Path) -> dict:
    """The data set of every way that this version can read."""
    opened = {}
    for name, more in ways(folder).items():
        try:
            opened[name] = open_dataset(configure(args, folder, more), np.random.RandomState(123), lambda line: None)
        except (UserError, NotImplementedError) as error:
            say(f"{name}: left out ({error})")
    return opened


class Bench:
    """The trainer, and batches that are there before the clock starts."""

    def __init__(self, args, folder: Path, data):
        config = configure(args, folder, ())
        torch.manual_seed(123)
        rng = np.random.RandomState(123)
        self.backend = backends.make(args.device)
        config = config.with_num_dense(data.num_dense)
        specs = [TableSpec(f"emb_l.{t}", rows, config.model.feature_dim) for t, rows in enumerate(data.table_rows)]
        tables = EmbeddingCollection(create_tables(specs, config.method, rng, False, False), None, RULES["sgd"](), self.backend.layout("auto"))
        model = DLRM(config.model, len(specs), config.loss.threshold, rng)
        self.trainer = Trainer(config, self.backend.place(model), self.backend.place(tables), self.backend)
        self.kept = list(islice(data.train.batches(), KEPT))
        self.num_workers = args.num_workers
        self.step(self.kept)

    def step(self, batches) -> float:
        """Rows per second of STEPS steps."""
        rows, start = 0, time.perf_counter()
        for index, batch in enumerate(batches):
            self.trainer.step(self.backend.to_device(batch), index, last_of_epoch=False)
            rows += batch.num_valid
        self.backend.wait()
        return rows / (time.perf_counter() - start)

    def step_alone(self) -> float:
        return self.step(self.kept[k % KEPT] for k in range(STEPS))

    def together(self, split) -> float:
        depth = 2 * max(1, self.num_workers)
        ahead = read_ahead(split.batches(), depth, max(1, self.num_workers))
        try:
            return self.step(islice(ahead, STEPS))
        finally:
            ahead.close()

    def read(self, split) -> tuple[float, float]:
        """Rows per second of the whole epoch, read by one thread, or by --num-workers of them; microseconds of CPU for a row."""
        batches = split.batches() if self.num_workers == 0 else read_ahead(split.batches(), 2 * self.num_workers, self.num_workers)
        rows, start, cpu = 0, time.perf_counter(), time.process_time()
        for batch in batches:
            rows += batch.num_valid
        return rows / (time.perf_counter() - start), (time.process_time() - cpu) / rows * 1e6


def measure(args, folder: Path) -> dict:
    text = folder / "train.txt"
    if not text.exists():
        say(f"writing {args.rows:,} rows")
        synth.write_profile(synth_profiles.PROFILES["criteo-kaggle"], text, args.rows, 1, progress=False, threads=torch.get_num_threads())
    opened = open_ways(args, folder)
    bench = Bench(args, folder, opened["memory, random"])
    rounds: dict[str, list[dict]] = {name: [] for name in opened}
    for number in range(args.rounds + 1):
        for name, data in opened.items():
            step = bench.step_alone()
            read, cpu = bench.read(data.train)
            together = bench.together(data.train)
            if number > 0:
                rounds[name].append({"step": step, "read": read, "together": together, "cpu_us_per_row": cpu})
    return {name: summary(found) for name, found in rounds.items()}


def summary(rounds: list[dict]) -> dict:
    figures = {key: median([one[key] for one in rounds]) for key in rounds[0]}
    figures["ratio"] = median([one["read"] / one["step"] for one in rounds])
    figures["held_up"] = median([1 - one["together"] / one["step"] for one in rounds])
    return {key: round(value, 3) if value < 1000 else round(value) for key, value in figures.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2_400_000)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: as many as it takes by itself")
    parser.add_argument("--matmul-precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", choices=["cpu", "cuda", "xla"], default="cpu")
    parser.add_argument("--num-workers", type=int, default=0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = {**heading("read_epoch"), "arguments": {"rows": args.rows, "batch": args.batch, "num_workers": args.num_workers}}
        result["matmul_precision"], result["device"] = args.matmul_precision, args.device
        result["ways"] = measure(args, folder)
    say(f"{'':26}{'step':>12}{'read':>14}{'ratio':>8}{'together':>12}{'held up':>9}{'CPU us/row':>12}")
    for name, found in result["ways"].items():
        say(
            f"{name:26}{found['step']:12,.0f}{found['read']:14,.0f}{found['ratio']:8.1f}{found['together']:12,.0f}{found['held_up']:9.1%}"
            f"{found['cpu_us_per_row']:12.3f}"
        )
    worst = min(found["ratio"] for found in result["ways"].values())
    result["bar"], result["worst_ratio"], result["kept"] = BAR, worst, worst >= BAR
    say(f"slowest way of reading: {worst:.1f} times the step; the bar is {BAR:g}: {'kept' if worst >= BAR else 'missed'}")
    finish(result, args.out)


if __name__ == "__main__":
    main()
