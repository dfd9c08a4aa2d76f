"""Saves of several ranks without a model, for tests: tensors that ranks hold in parts, written by threads, read back."""

import threading
from pathlib import Path

import torch

from dlrm_xla import shards
from dlrm_xla.checkpoint_file import Checkpoint, Progress
from dlrm_xla.shards import Piece, Writers
from dlrm_xla.specs import UserError

SPLIT, LAST, ALL = "split", "last", "all"
# name and key -> (shape, type, which ranks hold it)
TENSORS = {
    ("emb_l.0.weight", ""): ((37, 8), torch.float32, SPLIT),
    ("emb_l.0.weight", "sum"): ((37, 8), torch.float32, SPLIT),
    ("emb_l.1.weight", ""): ((11, 8), torch.int8, LAST),
    ("emb_l.1.weight", "momentum"): ((11,), torch.float32, LAST),
    ("emb_l.1.weight_scale", ""): ((11,), torch.float32, LAST),
    ("emb_l.2.weight", ""): ((2, 8), torch.float32, SPLIT),  # fewer rows than ranks
    ("emb_l.3.weight", ""): ((5, 8), torch.float32, ALL),
    ("bot_l.0.weight", ""): ((4, 3), torch.float32, ALL),
    ("bot_l.0.weight", "sum"): ((4, 3), torch.float32, ALL),
    ("emb_l.3.codes", ""): ((6,), torch.int64, ALL),
    ("int8_clock.8", ""): ((), torch.int32, ALL),
}
ORDER = ["emb_l.0.weight", "emb_l.1.weight", "emb_l.1.weight_scale", "emb_l.2.weight", "emb_l.3.weight", "bot_l.0.weight"]
State = dict[tuple[str, str], torch.Tensor]


def made(seed: int) -> State:
    torch.manual_seed(seed)
    return {at: (torch.randn(shape) * 50).to(dtype) for at, (shape, dtype, _) in TENSORS.items()}


def range_of(at, rank: int, world: int) -> tuple[int, int]:
    """Rows that a rank holds."""
    shape, _, where = TENSORS[at]
    rows = shape[0] if shape else 1
    share = -(-rows // world)
    if where == SPLIT:
        return min(rank * share, rows), min((rank + 1) * share, rows)
    return (0, rows) if where == ALL or rank == world - 1 else (0, 0)


def pieces_of(state: State, rank: int, world: int) -> list[Piece]:
    found = []
    for at, values in state.items():
        first, last = range_of(at, rank, world)
        if first < last and (TENSORS[at][2] != ALL or rank == 0):
            found.append(Piece(*at, first, values[first:last] if values.dim() else values))
    return found


def checkpoint_of(path: Path, state: State, batch: int, meta: bool) -> Checkpoint:
    def shown(values):
        return values.to("meta") if meta else values

    states = {
        at: {"step": torch.tensor(7.0), **{key: shown(state[name, key]) for other, key in state if other == name and key}}
        for at, name in enumerate(ORDER)
    }
    optimizer = {"state": states, "param_groups": [{"lr": 0.1, "params": list(range(len(ORDER)))}]}
    weights = {name: shown(values) for (name, key), values in state.items() if not key}
    progress = Progress(epoch=1, batch=batch, num_batches=9, num_epochs=2, updates=batch + 9, loss_sum=1.25, loss_rows=32.0)
    tables = [{"method": "plain", "knobs": {}, "rows": 5, "dim": 8}]
    return Checkpoint(path, weights, optimizer, progress, exact=True, flags={"learning_rate": 0.1}, tables=tables)


class Hub:
    """Writers that are threads."""

    def __init__(self, world: int):
        self.world, self.said, self.barrier = world, [None] * world, threading.Barrier(world, timeout=60)

    def ranks(self, rank: int) -> Writers:
        def gather(numbers):
            assert len(numbers) == 3
            self.said[rank] = numbers
            self.barrier.wait()
            said = list(self.said)
            self.barrier.wait()
            return said

        return Writers(rank, self.world, gather)

    def run(self, action) -> list:
        """action(ranks) on every rank: what it gave, or the UserError that it raised."""
        results = [None] * self.world

        def work(rank):
            try:
                results[rank] = action(self.ranks(rank))
            except UserError as error:
                results[rank] = error
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def save(path: Path, state: State, world: int, batch: int = 3) -> list:
    return Hub(world).run(
        lambda ranks: shards.write(checkpoint_of(path, state, batch, meta=True), ORDER, pieces_of(state, ranks.rank, world), ranks)
    )


def copied(loaded: Checkpoint, rank: int = 0, world: int = 1) -> State:
    """What one of `world` ranks takes from it."""
    states = {(name, key): value for at, name in enumerate(ORDER) for key, value in loaded.optimizer["state"][at].items() if key != "step"}
    found = {}
    for at, values in {**{(name, ""): values for name, values in loaded.weights.items()}, **states}.items():
        first, last = range_of(at, rank, world)
        into = torch.empty((last - first, *values.shape[1:]) if values.dim() else (), dtype=values.dtype)
        loaded.copy(*at, values, first, into)
        found[at] = into
    return found


def assert_same(found: State, state: State, rank: int = 0, world: int = 1) -> None:
    assert found.keys() == state.keys()
    for at, values in state.items():
        first, last = range_of(at, rank, world)
        assert torch.equal(found[at], values[first:last] if values.dim() else values), at


def the_save(path: Path) -> Path:
    [one] = path.glob("save-*")
    return one


def equal(one, other) -> bool:
    """Values, types and the order of keys."""
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)
    return type(one) is type(other) and one == other
