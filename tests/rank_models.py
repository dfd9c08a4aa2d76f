"""Small models, batches and plans for tests of several ranks, and what ranks hold put together again."""

import threading

import numpy as np
import torch

import run_dlrm
from dlrm_xla import checkpoint, flags
from dlrm_xla.batch import Batch, rank_part
from dlrm_xla.config import Config
from dlrm_xla.sharding import EVERYWHERE, SPLIT, Plan
from dlrm_xla.specs import TableSpec

DRAWING = threading.Lock()  # torch's stream belongs to the process
ROWS = (50, 7, 400, 3, 121, 1000)
BATCH, DIM = 12, 8
KINDS = {
    "plain": "",
    "qr": "qr:collisions=4",
    "hash": "hash:rows=30",
    "tt": "tt:rank=4",
    "double_hash": "double_hash:rows=20",
    "low_rank": "low_rank:rank=3",
}


def config_of(method: str, rule: str, *more: str) -> Config:
    """method: as --compress has it, or a name of KINDS; "" is plain."""
    method = KINDS.get(method, method)
    compress = [f"--compress={method}", "--compress-threshold=40"] if method else []
    return Config.from_args(flags.parse([
        f"--arch-sparse-feature-size={DIM}", f"--arch-embedding-size={'-'.join(map(str, ROWS))}", f"--arch-mlp-bot=5-6-{DIM}", "--arch-mlp-top=9-1",
        f"--mini-batch-size={BATCH}", "--loss-function=bce", f"--optimizer={rule}", "--learning-rate=0.1", *compress, *more,
    ]))  # fmt: skip


def specs_of(hotness: int, pooling: str = "sum") -> list[TableSpec]:
    sizes = [1 + (index * hotness) % 4 if hotness > 1 else 1 for index in range(len(ROWS))]
    return [TableSpec(f"emb_l.{index}", rows, DIM, size, pooling) for index, (rows, size) in enumerate(zip(ROWS, sizes, strict=True))]


def batches_of(specs: list[TableSpec], count: int, seed: int = 0) -> list[Batch]:
    """Popular ids (many duplicates in a batch), bags of varying length where there are bags, a last batch that is not full."""
    rng = np.random.RandomState(seed)
    batches = []
    for number in range(count):
        ids = np.concatenate([(rng.rand(BATCH, spec.hotness) ** 3 * spec.num_embeddings).astype(np.int32) for spec in specs], 1)
        weights = None
        if any(spec.hotness > 1 for spec in specs):
            lengths = [rng.randint(0, spec.hotness + 1, (BATCH, 1)) for spec in specs]
            weights = np.concatenate([np.arange(spec.hotness) < length for spec, length in zip(specs, lengths, strict=True)], 1).astype(np.float32)
            ids[weights == 0] = 0
        valid = BATCH if number % 5 else 5
        dense, labels = rng.rand(BATCH, 5).astype(np.float32), (rng.rand(BATCH, 1) < 0.4).astype(np.float32)
        for values in (dense, labels, ids, *(() if weights is None else (weights,))):
            values[valid:] = 0
        weights = None if weights is None else torch.from_numpy(weights)
        batches.append(Batch(torch.from_numpy(dense), torch.from_numpy(ids), weights, torch.from_numpy(labels), valid))
    return batches


def spread(world: int, seed: int):
    """A plan with everything in it: copies, whole parts, split ones, at random."""

    def make(parts):
        rng = np.random.RandomState(seed)
        return Plan(world, BATCH, tuple(parts), tuple(EVERYWHERE if p.pinned else int(rng.choice([EVERYWHERE, SPLIT, *range(world)])) for p in parts))

    return make


def everywhere(world: int):
    return lambda parts: Plan(world, BATCH, tuple(parts), (EVERYWHERE,) * len(parts))


def train(backend, config: Config, specs, batches, plan_of=None):
    """Losses of every step, and the trainer. One epoch."""
    with DRAWING:
        torch.manual_seed(7)
        trainer = run_dlrm.build(config, specs, np.random.RandomState(3), backend, plan_of=plan_of)
    collectives, losses = backend.collectives, []
    for index, batch in enumerate(batches):
        part = rank_part(batch, collectives.rank, collectives.world)
        trainer.step(backend.to_device(part), index, last_of_epoch=index + 1 == len(batches))
        losses.append(trainer.meter.mean())
        trainer.meter.reset()
    return losses, trainer


def whole_state(trainers: list) -> dict[tuple[str, str], torch.Tensor]:
    """Every trained number by name and key, put together from what the ranks hold. Copies must be equal."""
    found, seen = {}, {}
    for trainer in trainers:
        segments = {s.name: s for of_table in trainer.tables.segments for s in of_table}
        for name, weight, state in checkpoint.parameters(trainer):
            segment = segments.get(name.removesuffix("_scale"))
            first, total = (segment.first, segment.total) if segment else (0, weight.shape[0])
            for key, values in {"": weight, **state}.items():
                whole = found.setdefault((name, key), torch.zeros((total, *values.shape[1:]), dtype=values.dtype))
                there, rows = seen.setdefault((name, key), torch.zeros(total, dtype=torch.bool)), slice(first, first + values.shape[0])
                assert torch.equal(whole[rows][there[rows]], values[there[rows]]), f"copies of {name} {key} differ"
                whole[rows], there[rows] = values, True
    assert all(there.all() for there in seen.values())
    return found
