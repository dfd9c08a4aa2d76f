"""How long a lookup and a step of training take, for every method and size of a sweep, one after the other on one core.

Each model is made anew with starting values and given the same batches of the data. All of them are timed in turn, a few batches each, for several
rounds, so that a slow spell of the machine falls on all; the figure is the median of the rounds. It is the processor's time, which is that of a clock
where nothing else is at work.
"""

import itertools
import sys
import time
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

from compression.choose import choose, wants_counts
from compression.method import Choice, Making
from compression.registry import METHODS, create_table
from compression.sweep_plan import FIRST_SEED, Run
from compression.sweep_run import Sweep, write_json
from compression.traffic import count_ids
from dlrm_xla import backends
from dlrm_xla import flags as run_flags
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.init import fill_table
from dlrm_xla.models.dlrm import DLRM
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable
from dlrm_xla.train import Trainer

ROUNDS, BATCHES = 15, 8


def measure(shared: Sweep, runs: list[Run], data: dict) -> None:
    """Writes OUT/times.json: for each method and size {"lookup_us": of a batch, "step_ms", "batch": rows, "lookup_spread": ...}."""
    torch.set_num_threads(1)
    groups = {run.group: run for run in runs if run.seed == FIRST_SEED and run.kind != "source" and run.rate_share == 1}
    batches = {changes: list(itertools.islice(opened.train.batches(), BATCHES)) for changes, (opened, _) in data.items()}
    counts: dict = {}
    timed, times = {}, {}
    show = partial(tqdm, disable=not sys.stderr.isatty(), leave=False)
    for group, run in show(groups.items(), desc="making tables", unit=" models"):
        opened, specs = data[run.data]
        try:
            timed[group] = trainer_of(shared, run, opened, specs, counts), batches[run.data]
        except UserError:  # no knob meets the budget: the run says so
            continue
        times[group] = ([], [])
    for _ in show(range(ROUNDS + 1), desc="timing", unit=" rounds"):
        for group, (trainer, of_data) in timed.items():
            for record, value in zip(times[group], one_round(trainer, of_data), strict=True):
                record.append(value)
    found = {}
    for group, (lookups, steps) in times.items():
        lookups, steps = np.array(lookups[1:]), np.array(steps[1:])  # the first round warms up
        quarter = [float(np.subtract(*np.percentile(values, [75, 25]))) for values in (lookups, steps)]
        found[group] = {
            "lookup_us": 1e6 * float(np.median(lookups)), "step_ms": 1e3 * float(np.median(steps)), "lookup_quartiles_us": 1e6 * quarter[0],
            "step_quartiles_ms": 1e3 * quarter[1], "batch": batches[groups[group].data][0].num_valid,
        }  # fmt: skip
    write_json(shared.out / "times.json", found)


def one_round(trainer: Trainer, batches: list) -> tuple[float, float]:
    """Seconds of the processor for a lookup without gradients and of a training step, means over the batches."""
    moved = [trainer.backend.to_device(batch) for batch in batches]
    start = time.process_time()
    with torch.no_grad():
        for batch in moved:
            trainer.tables.lookup(batch.ids, batch.weights)
    middle = time.process_time()
    for index, batch in enumerate(moved):
        trainer.step(batch, index, last_of_epoch=False)
    return (middle - start) / len(moved), (time.process_time() - middle) / len(moved)


def trainer_of(shared: Sweep, run: Run, opened, specs: list[TableSpec], counts: dict) -> Trainer:
    """As run_dlrm.py makes it, but on the CPU always, and tables that are made from trained ones are made from random ones here."""
    config = Config.from_args(run_flags.parse(shared.argv(run))).with_num_dense(opened.num_dense)
    if wants_counts(config.method) and run.data not in counts:
        counts[run.data] = count_ids(opened.train, specs)
    choices = choose(specs, config.method, counts.get(run.data))
    rng, backend = np.random.RandomState(config.train.seed), backends.make("cpu")
    known = counts.get(run.data, [None] * len(specs))
    tables = [_table(spec, choice, Making(rng, count)) for spec, choice, count in zip(specs, choices, known, strict=True)]
    rule = RULES[config.train.optimizer]()
    collection = EmbeddingCollection(tables, config.model.weighted_pooling, rule, backend.layout(config.table_layout))
    model = DLRM(config.model, len(specs), config.loss.threshold, rng)
    return Trainer(config, backend.place(model), backend.place(collection), backend)


def _table(spec: TableSpec, choice: Choice, making: Making) -> EmbeddingTable:
    method = METHODS.get(choice.method)
    if method is None or method.create is not None:
        return create_table(spec, choice, making)
    weight = torch.empty(spec.num_embeddings, spec.embedding_dim)
    fill_table(weight, making.rng, making.replay_torch)
    return method.convert(spec, choice.knobs, weight.numpy(), making).table
