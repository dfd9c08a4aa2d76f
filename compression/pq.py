"""Product quantization of a trained table: e_i = concat_c C_c[code_c(i)], C_c [K, D / chunks], K = 2^bits.

Jegou, Douze and Schmid, "Product Quantization for Nearest Neighbor Search", PAMI 33 (2011): the table is cut into chunks of columns and each
is clustered by itself. Chen, Li and Sun, "Differentiable Product Quantization", ICML 2020, arXiv:1908.09756, learn codes for embeddings while
training, from a full table; here they come from a table that is trained.
Differs from the paper: squared errors may count as often as ids are looked up; codes of any number of bits are packed without gaps (codes.py).
Where a chunk has more ids than SAMPLE and 16 for each center, k-means sees that many of them, and all are assigned at the end.

Bytes: N chunks bits / 8 of codes and 4 K D of centers. Codes do not change in training; centers are a part, so training on moves them.
"""

import math

import numpy as np
import torch
from torch import Tensor

from compression.codes import PackedIntegers, packed_bytes
from compression.fitting import WEIGHTED, converted, id_weights
from compression.kmeans import assign, kmeans, optimal_1d, sample
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.ops.rows import count_up
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

SAMPLE, SAMPLE_EACH = 1 << 16, 16  # ids that k-means sees, at least and for each center
MOST_BITS = 16
OPTIMUM_WORK = 1e8  # k n log2 n for all chunks: some 5 s


class ProductQuantized(EmbeddingTable):
    """Codes [N, chunks] and the part "codebook" [chunks x K, D / chunks], a chunk's centers after those of another. Zeros until written."""

    def __init__(self, spec: TableSpec, chunks: int, bits: int):
        self.chunks, self.centers = chunks, num_centers(spec, bits)
        super().__init__(spec, {"codebook": Part(chunks * self.centers, spec.embedding_dim // chunks, torch.Tensor.zero_)})
        self.codes = PackedIntegers(spec.num_embeddings, chunks, code_bits(self.centers))

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        codes = self.codes.read(ids).to(ids.dtype)
        return (codes + count_up(self.chunks, ids.dtype, ids.device) * self.centers,)

    def combine(self, rows: tuple[Tensor], ids: Tensor) -> Tensor:
        return rows[0]


def num_centers(spec: TableSpec, bits: int) -> int:
    """K: 2^bits, at most N."""
    return min(1 << bits, spec.num_embeddings)


def code_bits(count: int) -> int:
    """Bits of the numbers below `count`, at least 1."""
    return max((count - 1).bit_length(), 1)


def num_chunks(method: str, spec: TableSpec, knobs: dict) -> int:
    """The knob, or as many as make chunks of 4 numbers. UserError where it does not divide D."""
    dim = spec.embedding_dim
    chunks = knobs["chunks"] or (dim // 4 if dim % 4 == 0 else dim // 2 if dim % 2 == 0 else dim)
    if dim % chunks:
        valid = ", ".join(str(number) for number in range(1, dim + 1) if dim % number == 0)
        raise UserError(f"{method}:chunks={chunks}: table {spec.name} has vectors of {dim}, which must be a multiple; use one of {valid}")
    return chunks


def _shell(spec: TableSpec, knobs: dict, making: Making) -> ProductQuantized:
    return ProductQuantized(spec, num_chunks("pq", spec, knobs), knobs["bits"])


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """Facts: relative_error; where a chunk is one number and the table not large, `optimal`: what the best centers leave (exact 1-D k-means)."""
    weights, table = id_weights("pq", spec, knobs, making), _shell(spec, knobs, making)
    if not np.isfinite(weight).all():
        raise UserError(f"table {spec.name}: some of its numbers are not finite, so it cannot be quantized; take an earlier checkpoint")
    n, k, width = spec.num_embeddings, table.centers, spec.embedding_dim // table.chunks
    codes = np.empty((n, table.chunks), np.uint16)
    codebook = np.empty((table.chunks, k, width), np.float32)
    for chunk in range(table.chunks):
        points = np.ascontiguousarray(weight[:, chunk * width : (chunk + 1) * width], np.float32)
        chosen, chosen_weights = sample(n, max(SAMPLE, SAMPLE_EACH * k), making.rng, weights)
        found = kmeans(points if len(chosen) == n else points[chosen], k, making.rng, chosen_weights)
        codebook[chunk] = found.centers
        codes[:, chunk] = found.assigned if len(chosen) == n else assign(points, found.centers)
    table.codes.write(0, codes)
    done = converted(table, {"codebook": torch.from_numpy(codebook.reshape(-1, width))}, weight, making)
    if width == 1 and k * n * math.log2(n + 1) * table.chunks <= OPTIMUM_WORK:
        done.facts.update(_optimal(weight, k, weights))
    return done


def _optimal(weight: np.ndarray, k: int, weights: np.ndarray | None) -> dict[str, float]:
    counts = np.ones(len(weight)) if weights is None else weights
    least = sum(float(optimal_1d(column[None], k, counts[None])[0]) for column in weight.T)
    norm = float(counts @ np.einsum("nd,nd->n", weight, weight, dtype=np.float64))
    return {"optimal" if weights is None else "optimal_weighted": math.sqrt(least / norm) if norm > 0 else 0.0}


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    centers = num_centers(spec, knobs["bits"])
    chunks = num_chunks("pq", spec, knobs)
    return packed_bytes(spec.num_embeddings, chunks, code_bits(centers)) + 4 * centers * spec.embedding_dim


METHOD = Method(
    name="pq",
    title="product quantization: each chunk of a vector is one of K centers",
    paper="Jegou, Douze and Schmid, Product Quantization for Nearest Neighbor Search, PAMI 33, 2011",
    knobs=(
        Knob("chunks", int, None, "pieces of a vector; must divide D, default D / 4", least=1),
        Knob("bits", int, 8, "of a code; K = 2^bits centers for each chunk, at most N", least=1, most=MOST_BITS),
        WEIGHTED,
    ),
    bytes_formula="N chunks bits / 8 + 4 K D, K = min(2^bits, N)",
    num_bytes=_num_bytes,
    convert=_convert,
    shell=_shell,
    sized_by="bits",
    sized_most=lambda spec, knobs: min(code_bits(spec.num_embeddings), MOST_BITS),
    exact_at=lambda spec: {"chunks": 1, "bits": code_bits(spec.num_embeddings)},
    check=lambda spec, knobs: num_chunks("pq", spec, knobs) and None,
    weighted=True,
)
