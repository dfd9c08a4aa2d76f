"""Row-wise quantization of a trained table to 8 or 4 bits: e_i = scale_g q_i + bias_g, q_i in {0, ..., L}^D, L = 2^bits - 1, g the row's group.

Guan et al., "Post-Training 4-bit Quantization on Embedding Tables", MLSys workshop at NeurIPS 2019, arXiv:1911.02079. Range of a row: its
smallest and largest number ("minmax"), or the paper's greedy search, which moves one end inwards by 1/200 of the range, the one that leaves
the smaller squared error, for 32 moves, and keeps the best range it has seen.
Differs from the paper: rows_per_scale neighbouring rows may share a scale and a bias (at D = 16 they are a fifth of an int8 table), and there
errors may count as often as ids are looked up; the range found is compared with "minmax" once more after its ends are rounded to 16 bits, so no
row is ever worse than by "minmax".
Differs from implementations (FBGEMM, torchrec): half-precision scales and biases are multiples of a power of two that the table's largest
number sets. Tables of many rows hold small numbers, 1/sqrt(3N) at the start; a plain half-precision scale of an int8 row has one or two digits
there.

Bytes of a row: D bits / 8 of codes, and 4 (scales=float16) or 8 (float32) for each group. Half-precision numbers are decoded by integer
operations and products by powers of two, which are exact: reading a tensor's bits as another type is left to the host by XLA.
Training does not change codes, nor half-precision scales; float32 scales are a part [groups, 2] and are trained on.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.codes import PackedIntegers, packed_bytes
from compression.fitting import converted, id_weights
from compression.kmeans import optimal_1d
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

BINS, MOVES = 200, 32  # the paper's b, and r = 0.16 of it
CHUNK = 1 << 17  # numbers fitted at a time: they stay in a core's cache
SAMPLE = 500  # groups for which the optimum is computed
LEAST_SAMPLE, OPTIMUM_WORK = 8, 5e7  # groups; steps of the exact optimum: 22 s for 500 groups of 512 numbers, 2 s with it


class QuantizedRows(EmbeddingTable):
    """Codes [N, D]; scale and bias of each group of rows_per_scale (a power of two) rows, half-precision or a float32 part. Zeros at first."""

    def __init__(self, spec: TableSpec, bits: int, rows_per_scale: int, half: bool):
        groups = -(-spec.num_embeddings // rows_per_scale)
        super().__init__(spec, {} if half else {"scales": Part(groups, 2, torch.Tensor.zero_)})
        self.shift, self.half = rows_per_scale.bit_length() - 1, half
        self.codes = PackedIntegers(spec.num_embeddings, spec.embedding_dim, bits)
        if half:
            self.scales = PackedIntegers(groups, 2, 16)
            self.register_buffer("units", torch.ones(2))

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        return () if self.half else (self._groups(ids),)

    def combine(self, rows: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        scales = decode_half(self.scales.read(self._groups(ids))) * self.units if self.half else rows[0]
        return self.codes.read(ids).to(torch.float32) * scales[..., :1] + scales[..., 1:]

    def _groups(self, ids: Tensor) -> Tensor:
        return torch.bitwise_right_shift(ids, self.shift) if self.shift else ids


def decode_half(bits: Tensor) -> Tensor:
    """int32 [...], the 16 bits of finite half-precision numbers -> those numbers in float32, exactly."""
    exponent = torch.bitwise_and(torch.bitwise_right_shift(bits, 10), 31)
    fraction = torch.bitwise_and(bits, 1023) + (exponent > 0).to(torch.int32) * 1024
    value = fraction.to(torch.float32) * 2.0**-25
    exponent = exponent.clamp(min=1)
    for bit in range(5):
        value = value * torch.where(torch.bitwise_and(exponent, 1 << bit) > 0, 2.0 ** (1 << bit), 1.0)
    return torch.where(bits >= 1 << 15, -value, value)


def minmax(numbers: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """numbers [G, n] -> (low, high) [G]."""
    return numbers.min(1), numbers.max(1)


def greedy(numbers: np.ndarray, levels: int, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """numbers [G, n] float32, weights [G, n] -> (low, high) [G] of the paper's search."""
    low, high = minmax(numbers, levels)
    move = (high - low) / BINS
    best_low, best_high, best = low, high, squared_errors(numbers, low, (high - low) / levels, levels, weights)
    for _ in range(MOVES):
        left = squared_errors(numbers, low + move, (high - low - move) / levels, levels, weights)
        right = squared_errors(numbers, low, (high - low - move) / levels, levels, weights)
        low, high, error = np.where(left < right, low + move, low), np.where(left < right, high, high - move), np.minimum(left, right)
        better = error < best
        best_low, best_high, best = np.where(better, low, best_low), np.where(better, high, best_high), np.where(better, error, best)
    return best_low, best_high


def squared_errors(numbers: np.ndarray, low: np.ndarray, scale: np.ndarray, levels: int, weights: np.ndarray | None) -> np.ndarray:
    """[G]: sum of w (x - decoded)^2."""
    steps = numbers - low[:, None]
    steps *= reciprocals(scale)[:, None]
    wrong = np.rint(steps)
    np.clip(wrong, 0, levels, out=wrong)
    wrong -= steps
    squares = np.einsum("gn,gn->g", wrong, wrong) if weights is None else np.einsum("gn,gn,gn->g", wrong, wrong, weights)
    flat = scale <= 0  # nothing is encoded, the bias stands for all
    if flat.any():
        away = numbers[flat] - low[flat, None]
        squares[flat] = (away**2 if weights is None else away**2 * weights[flat]).sum(1)
    return np.where(flat, squares, squares * scale**2)


def reciprocals(scale: np.ndarray) -> np.ndarray:
    return np.where(scale > 0, 1 / np.where(scale > 0, scale, 1), 0).astype(scale.dtype)


class Encoding:
    """How scale and bias are stored: half-precision multiples of `units` (scale's, bias's), or float32 where units is None."""

    def __init__(self, half: bool, largest: float, levels: int):
        """largest: absolute value of the table's numbers. Multiples stay below 2^15 (1 + 2^-10), the largest half-precision number is 65504."""
        power = np.exp2(np.ceil(np.log2(largest))) if largest > 0 else 1.0
        self.units = np.array([2 * power / (levels + 1), power], np.float64) * 2.0**-14 if half else None

    def bias(self, low: np.ndarray, floor: bool) -> np.ndarray:
        """What is stored for `low`, float64; floor: not above it, else the nearest."""
        return low.astype(np.float32).astype(np.float64) if self.units is None else self._half(low, 1, -np.inf if floor else None)

    def scale(self, scale: np.ndarray, ceil: bool) -> np.ndarray:
        return scale.astype(np.float32).astype(np.float64) if self.units is None else self._half(scale, 0, np.inf if ceil else None)

    def bits(self, scale: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """[G, 2]: of stored numbers."""
        return (np.stack([scale, bias], 1) / self.units).astype(np.float16).view(np.uint16)

    def _half(self, value: np.ndarray, unit: int, toward: float | None) -> np.ndarray:
        multiple = value.astype(np.float64) / self.units[unit]
        near = multiple.astype(np.float16)
        if toward is not None:
            wrong = near < multiple if toward > 0 else near > multiple
            near = np.where(wrong, np.nextafter(near, np.float16(toward)), near)
        return near.astype(np.float64) * self.units[unit]


def fit(
    numbers: np.ndarray, levels: int, search: str, encoding: Encoding, weights: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """numbers [G, n] float32 -> (scale, bias, scale of "minmax") [G] float64 as stored. "minmax" is rounded to cover every number."""
    low, high = (end.astype(np.float64) for end in minmax(numbers, levels))
    bias = encoding.bias(low, floor=True)
    scale = covering = encoding.scale((high - bias) / levels, ceil=True)
    if search == "greedy":
        low, high = (end.astype(np.float64) for end in greedy(numbers, levels, weights))
        other_bias = encoding.bias(low, floor=False)
        other_scale = encoding.scale(np.maximum(high - other_bias, 0) / levels, ceil=False)
        exact = numbers.astype(np.float64)
        better = squared_errors(exact, other_bias, other_scale, levels, weights) < squared_errors(exact, bias, scale, levels, weights)
        scale, bias = np.where(better, other_scale, scale), np.where(better, other_bias, bias)
    return scale, bias, covering


def quantize(numbers: np.ndarray, scale: np.ndarray, bias: np.ndarray, levels: int) -> np.ndarray:
    """[G, n] -> codes [G, n] uint8, the nearest."""
    return np.clip(np.rint((numbers - bias[:, None]) * reciprocals(scale)[:, None]), 0, levels).astype(np.uint8)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making, bits: int) -> Converted:
    """Facts: relative_error; `bound`, what it is at most (half a step for each number); where a group has more numbers than there are codes,
    `optimal`: the error with the best free codebook for each group (exact 1-D k-means, the paper's codebook method), over a sample of them."""
    weights = id_weights(f"int{bits}", spec, knobs, making)
    largest = max(float(weight.max()), -float(weight.min()))
    if not np.isfinite(largest):
        raise UserError(f"table {spec.name}: some of its numbers are not finite, so it cannot be quantized; take an earlier checkpoint")
    levels, together, half = (1 << bits) - 1, knobs["rows_per_scale"], knobs["scales"] == "float16"
    table, encoding = QuantizedRows(spec, bits, together, half), Encoding(half, largest, levels)
    groups, size = -(-spec.num_embeddings // together), max(CHUNK // (together * spec.embedding_dim), 1)
    scale, bias, covering = np.empty((3, groups))

    def pieces():
        for first in range(0, groups, size):
            part = slice(first, min(first + size, groups))
            numbers, counts, rows = _group(weight, weights, part, together)
            scale[part], bias[part], covering[part] = fit(numbers, levels, knobs["range"], encoding, counts)
            codes = quantize(numbers, scale[part], bias[part], levels)
            yield first * together, codes.reshape(-1, spec.embedding_dim)[:rows]

    table.codes.write_all(pieces())
    values = {}
    if half:
        table.scales.write(0, encoding.bits(scale, bias))
        table.units.copy_(torch.from_numpy(encoding.units))
    else:
        values["scales"] = torch.from_numpy(np.stack([scale, bias], 1).astype(np.float32))
    done = converted(table, values, weight, making)
    if weights is None:
        rows = np.minimum(together, spec.num_embeddings - np.arange(groups) * together)
        norm = np.sqrt(np.einsum("nd,nd->", weight, weight, dtype=np.float64))
        done.facts["bound"] = float(np.sqrt(covering**2 @ rows * spec.embedding_dim) / 2 / norm) if norm > 0 else 0.0
    if together * spec.embedding_dim > levels + 1:
        done.facts["optimal"] = _optimal(weight, together, levels + 1, making.rng)
    return done


def _optimal(weight: np.ndarray, together: int, codes: int, rng: np.random.RandomState) -> float:
    """Relative error of whole groups with the best codebook of that many numbers for each, over at most SAMPLE of them, fewer where one is work."""
    whole, size = max(len(weight) // together, 1), together * weight.shape[1]
    most = max(LEAST_SAMPLE, int(OPTIMUM_WORK / (size * codes * np.log2(size))))
    chosen = np.sort(rng.choice(whole, min(whole, SAMPLE, most), replace=False))
    numbers = np.stack([weight[group * together : (group + 1) * together].reshape(-1) for group in chosen])
    norm = np.einsum("gn,gn->", numbers, numbers, dtype=np.float64)
    return float(np.sqrt(optimal_1d(numbers, codes).sum() / norm)) if norm > 0 else 0.0


def _group(weight: np.ndarray, weights: np.ndarray | None, part: slice, together: int) -> tuple[np.ndarray, np.ndarray | None, int]:
    """(numbers [G, together D] float32, their weights or None, rows) of groups `part`; a last group that is not full repeats its last row
    with weight 0."""
    rows = weight[part.start * together : part.stop * together]
    counts = None if weights is None else weights[part.start * together : part.stop * together]
    missing = (part.stop - part.start) * together - len(rows)
    if missing:
        counts = np.concatenate([np.ones(len(rows)) if counts is None else counts, np.zeros(missing)])
    numbers = np.concatenate([rows, np.repeat(rows[-1:], missing, 0)]) if missing else rows
    numbers = np.ascontiguousarray(numbers, np.float32).reshape(part.stop - part.start, -1)
    return numbers, None if counts is None else counts.repeat(weight.shape[1]).reshape(numbers.shape).astype(np.float32), len(rows)


def _num_bytes(spec: TableSpec, knobs: dict, bits: int) -> int:
    groups = -(-spec.num_embeddings // knobs["rows_per_scale"])
    scales = packed_bytes(groups, 2, 16) + 8 if knobs["scales"] == "float16" else 8 * groups
    return packed_bytes(spec.num_embeddings, spec.embedding_dim, bits) + scales


def _check(spec: TableSpec, knobs: dict, bits: int) -> None:
    together = knobs["rows_per_scale"]
    if together & (together - 1):
        raise UserError(f"int{bits}:rows_per_scale={together}: must be a power of two; use {1 << (together.bit_length() - 1)}")


def _shell(spec: TableSpec, knobs: dict, making: Making, bits: int) -> QuantizedRows:
    return QuantizedRows(spec, bits, knobs["rows_per_scale"], knobs["scales"] == "float16")


def _method(bits: int) -> Method:
    return Method(
        name=f"int{bits}",
        title=f"row-wise quantization to {bits} bits",
        paper="Guan et al., Post-Training 4-bit Quantization on Embedding Tables, NeurIPS 2019 workshop, arXiv:1911.02079",
        knobs=(
            Knob("range", str, "greedy", "ends of a row's range: its smallest and largest number, or searched", choices=("minmax", "greedy")),
            Knob("rows_per_scale", int, 1, "neighbouring rows that share a scale and a bias, a power of two", least=1, most=1 << 16),
            Knob("scales", str, "float16", "numbers that scale and bias are; float32 ones are trained on", choices=("float16", "float32")),
            Knob("weighted", bool, False, "where rows share a scale, an id counts as often as training looks it up"),
        ),
        bytes_formula=f"N D {bits} / 8 + ceil(N / rows_per_scale) (4, float32: 8)",
        num_bytes=partial(_num_bytes, bits=bits),
        convert=partial(_convert, bits=bits),
        shell=partial(_shell, bits=bits),
        check=partial(_check, bits=bits),
        weighted=True,
        trainable=False,
    )


INT8, INT4 = _method(8), _method(4)
METHODS = (INT8, INT4)
