"""ROBE: every vector is a stretch of one array, at a place that a hash chooses, so that stretches overlap. "robe".

    aligned:    e(i)[jZ + t] = g_j(i) A[h_j(i), (o_j(i) + t) mod 128]      A: lines of 128 numbers; block j of Z numbers lies in one line
    published:  e(i)[jZ + t] = g_j(i) A[(h_j(i) + t) mod S]                A: S numbers

h_j chooses a line, or a number; o_j an offset within a line, a multiple of the knob `step`; g_j is 1 or -1 where the knob `sign` says so.
Desai, Chou, Shrivastava, "Random Offset Block Embedding (ROBE) for compressed embedding tables in deep learning recommendation systems", MLSys 2022,
arXiv:2108.02191.
Differs from the paper: a stretch wraps round its line of 128 instead of the whole array, so that a lookup on a TPU reads one line of its memory
instead of Z single numbers (benchmarks/robe.py); each table has an array of its own; Z divides D. The knob aligned=false is the published form.
A step of 8 costs a TPU a tenth less at D = 16 and lost 0.004 AUC at 30x on the real rows (three seeds), so a stretch starts at any number.
Starting values: U(-sqrt(1/N), sqrt(1/N)), a plain table's, whose standard deviation is 1/sqrt(3N).
"""

import math
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from compression.fitting import WEIGHTED, chunks, converted, id_weights
from compression.hashes import Hashes
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.layouts import LANES
from dlrm_xla.ops.rows import count_up
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part


class RobeTable(EmbeddingTable):
    """num_lines lines of 128 numbers; blocks of `block` numbers that start at multiples of `step` in a line; aligned or not."""

    def __init__(self, spec: TableSpec, num_lines: int, block: int, step: int, sign: bool, aligned: bool, rng: np.random.RandomState):
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(1 / spec.num_embeddings))
        part = Part(num_lines, LANES, fill) if aligned else Part(num_lines * LANES, 1, fill)
        super().__init__(spec, {"array": part})
        self.num_rows, self.block, self.blocks = part.num_rows, block, spec.embedding_dim // block
        self.step, self.sign, self.aligned = step, sign, aligned
        self.places = Hashes(self.blocks, rng)
        self.offsets = Hashes(self.blocks, rng) if aligned else None

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        starts = self.places.rows_all(ids, self.num_rows)
        if self.aligned:
            return (starts,)
        steps = count_up(self.block, ids.dtype, ids.device)
        return (torch.fmod(starts[..., None] + steps, self.num_rows).flatten(-2),)

    def windows(self, ids: Tensor) -> Tensor:
        """ids [...] -> [..., blocks] int32: where in its line each block starts, in steps."""
        return torch.bitwise_and(self.offsets.mix_all(ids), LANES // self.step - 1)

    def combine(self, rows: tuple[Tensor], ids: Tensor) -> Tensor:
        blocks = rows[0].unflatten(-1, (self.blocks, -1))
        if self.aligned:
            blocks = from_offset(blocks, self.windows(ids), self.step, self.block)
        return (blocks * self.places.signs_all(ids)[..., None] if self.sign else blocks).flatten(-2)


def from_offset(lines: Tensor, windows: Tensor, step: int, count: int) -> Tensor:
    """lines [..., 128], windows [...] int32 in [0, 128 / step) -> [..., count]: the numbers from lane `step` x window on, round the line's end.

    On XLA, where single numbers are dear, a masked sum: piece s of the result, `step` numbers, is slot (window + s) mod (128 / step) of its line,
    for all pieces at once. The TPU compiler makes one fusion of mask and sum, which reads the lines once. Its estimate for the lookup of 16,384
    vectors of 16 / 64 / 128, whose lines alone take 102 MB: 106 / 118 / 152 MB; shifts by an offset's bits in turn take 304 / 299 / 446, the same
    after adding up the line to the vector's length 108 / 186 / 463. In eager mode the sum's terms lie in memory: a gather is faster
    (a step of SGD on 17 tables of 64, batch 128, one core: 10.3 ms against 16.7).
    """
    if lines.device.type != "xla":
        lanes = windows.long()[..., None] * step + count_up(count, torch.int64, lines.device)
        return lines.gather(-1, torch.bitwise_and(lanes, LANES - 1))
    return picked_by_mask(lines, windows, step, count)


def picked_by_mask(lines: Tensor, windows: Tensor, step: int, count: int) -> Tensor:
    """from_offset by a masked sum."""
    slots, pieces = LANES // step, -(-count // step)
    mine = windows[..., None, None] == _window_of(slots, pieces, windows.dtype, windows.device)
    picked = torch.where(mine[..., None], lines.unflatten(-1, (1, slots, step)), 0.0).sum(-2)  # [..., pieces, step]
    return picked.flatten(-2)[..., :count]


@lru_cache(maxsize=64)
def _window_of(slots: int, pieces: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[pieces, slots]: the window for which piece s lies in slot w."""
    slot, piece = torch.arange(slots, dtype=dtype), torch.arange(pieces, dtype=dtype)
    return torch.bitwise_and(slot - piece[:, None], slots - 1).to(device)


def _lines(spec: TableSpec, knobs: dict) -> int:
    return knobs["lines"] or max(1, spec.num_embeddings * spec.embedding_dim // (10 * LANES))


def _block(spec: TableSpec, knobs: dict) -> int:
    return knobs["block"] or _blocks(spec)[-1]


def _blocks(spec: TableSpec) -> list[int]:
    """What Z may be: divisors of D, up to a line."""
    return [block for block in range(1, min(spec.embedding_dim, LANES) + 1) if spec.embedding_dim % block == 0]


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    hashes = spec.embedding_dim // _block(spec, knobs) * (2 if knobs["aligned"] else 1)
    return 4 * LANES * _lines(spec, knobs) + 8 * hashes


def _check(spec: TableSpec, knobs: dict) -> None:
    if knobs["block"] is not None and knobs["block"] not in _blocks(spec):
        raise UserError(
            f"robe:block={knobs['block']}: table {spec.name} has vectors of {spec.embedding_dim}; a block must divide that and be at most "
            f"{LANES}: {', '.join(map(str, _blocks(spec)))}"
        )


def _create(spec: TableSpec, knobs: dict, making: Making) -> RobeTable:
    return RobeTable(spec, _lines(spec, knobs), _block(spec, knobs), int(knobs["step"]), knobs["sign"], knobs["aligned"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """A number of the array becomes the mean of those that lie on it, with their signs: the optimum for these hashes."""
    table, weights = _create(spec, knobs, making), id_weights("robe", spec, knobs, making)
    lanes = table.num_rows * (LANES if table.aligned else 1)
    sums, counts = torch.zeros(lanes, dtype=torch.float64), torch.zeros(lanes, dtype=torch.float64)
    for ids in chunks(spec.num_embeddings):
        numbers = torch.arange(ids.start, ids.stop)
        values = torch.from_numpy(weight[ids]).double()
        if table.sign:
            values = values * table.places.signs_all(numbers).double().repeat_interleave(table.block, 1)
        count = torch.ones(len(numbers), 1, dtype=torch.float64) if weights is None else torch.from_numpy(weights[ids, None])
        places = _places(table, numbers).reshape(-1)
        sums.index_add_(0, places, (values * count).reshape(-1))
        counts.index_add_(0, places, count.expand_as(values).reshape(-1))
    means = torch.where(counts > 0, sums / counts.clamp(min=1e-300), 0.0).float()
    return converted(table, {"array": means.view(table.num_rows, -1)}, weight, making)


def _places(table: RobeTable, ids: Tensor) -> Tensor:
    """[n, D] int64: where in the array each number of a vector lies."""
    (rows,) = table.row_ids(ids)
    if not table.aligned:
        return rows
    lanes = table.windows(ids)[..., None] * table.step + torch.arange(table.block)
    return (rows[..., None] * LANES + lanes % LANES).flatten(1)


METHOD = Method(
    name="robe",
    title="ROBE: vectors are overlapping stretches of one array",
    paper="Desai et al., Random Offset Block Embedding (ROBE) for compressed embedding tables, MLSys 2022, arXiv:2108.02191",
    knobs=(
        Knob("lines", int, None, "length of the array, in lines of 128 numbers; without it a tenth of the table's", least=1),
        Knob("block", int, None, "Z, numbers that lie side by side; without it the whole vector, or the most that fits a line", least=1),
        Knob("step", str, "1", "a block may start at every so-manyth number of a line", choices=("1", "2", "4", "8", "16", "32", "64", "128")),
        Knob("sign", bool, True, "a hash also chooses each block's sign"),
        Knob("aligned", bool, True, "a block stays within a line of 128; false: the published form, number by number"),
        WEIGHTED,
    ),
    bytes_formula="512 lines",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="lines",
    sized_most=lambda spec, knobs: -(-spec.num_embeddings * spec.embedding_dim // LANES),
    check=_check,
    weighted=True,
)
