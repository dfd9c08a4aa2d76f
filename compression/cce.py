"""Clustered compositional embeddings: e_i = concat_c (T0_c[h0_c(i)] + T1_c[h1_c(i)]), c chunks of D / chunks columns, tables of `rows` rows.

Tsang and Ahle, "Clustering the Sketch: Dynamic Compression for Embedding Tables", NeurIPS 2023, arXiv:2210.05974, algorithm 3. h1 is a hash,
h0 a pointer for each id. After each of the first `until` epochs every chunk of the vectors of all ids is clustered: T0 becomes the centers of
k-means, h0 the assignment, h1 a fresh hash and T1 the mean of what is left, v_i - T0[h0(i)], over the ids of each of its rows: the
least-squares T1 for those pointers and hashes. So clustering frees the ids that met by chance to part, and brings similar ones together.
Differs from the paper: T1 starts its new life at those means, not at zero; ids may count as often as training has looked them up.
Differs from its reference code: h1 is drawn once for a clustering, so the means are taken with the hash that stays (it is redrawn there with
each piece of the ids); a row of T1 that no id reads is zero (0 / 0 there); h1 takes 8 bytes a chunk in all and h0 log2(rows) bits an id and
chunk (both are int64 for each id and chunk there, as many bytes as a full table of 16 float32 numbers at 4 chunks, and left out of its ratios).

Starting values: both tables U(-a, a), a = sqrt(1 / (2N)), pointers random: a vector's standard deviation is a plain table's, 1 / sqrt(3N).
Bytes: 8 rows D for the tables, N chunks ceil(log2 rows) / 8 for pointers, 8 chunks + 4 for seeds.
"""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compression.codes import BLOCK, PackedIntegers, packed_bytes
from compression.fitting import converted, id_weights
from compression.hashes import Hashes
from compression.kmeans import assign, kmeans, sample, weighted_means
from compression.method import Converted, Knob, Making, Method
from compression.optimal import importance
from compression.pq import code_bits, num_chunks
from dlrm_xla.init import fill_uniform
from dlrm_xla.ops.rows import count_up
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable, Part

SAMPLE = 1 << 16  # ids that k-means sees, at least
ITERATIONS = 10
Vectors = Callable[[np.ndarray], np.ndarray]  # ids [n] -> [n, D] float32


class Lookups(nn.Module):
    """How often each id was looked up: counts [N] float32, in checkpoints, so that a resumed run clusters as the whole one does."""

    kind = "pointers"

    def __init__(self, num_ids: int):
        super().__init__()
        self.register_buffer("counts", torch.zeros(num_ids))

    def add(self, ids: np.ndarray) -> None:
        found, times = np.unique(ids, return_counts=True)
        places = torch.from_numpy(found).to(self.counts.device)
        self.counts.index_add_(0, places, torch.from_numpy(times).to(self.counts))


class ClusteredTable(EmbeddingTable):
    """Parts "table0", "table1" [chunks x rows, D / chunks], a chunk's rows after those of another; pointers [N, chunks]; a hash for each chunk.

    until     epochs after which it clusters: the first `until`
    sample    ids for each center that k-means sees
    weighted  ids count as often as training has looked them up, which takes a number for each
    """

    kind = "seeds"  # of the buffer that is this table's own

    def __init__(self, spec: TableSpec, rows: int, chunks: int, until: int, sample: int, weighted: bool, rng: np.random.RandomState):
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(0.5 / spec.num_embeddings))
        width = spec.embedding_dim // chunks
        super().__init__(spec, {"table0": Part(chunks * rows, width, fill), "table1": Part(chunks * rows, width, fill)})
        self.rows, self.chunks, self.until, self.sample, self.observes = rows, chunks, until, sample, weighted
        self.lookups = Lookups(spec.num_embeddings) if weighted else None
        self.pointers = PackedIntegers(spec.num_embeddings, chunks, code_bits(rows), kind="pointers")
        self.has_pointers = False  # of a clustering
        self.hashes = Hashes(chunks, rng)
        self.register_buffer("seed", torch.tensor([rng.randint(1 << 31)], dtype=torch.int32))  # of pointers and clusterings

    def fill_buffers(self) -> None:
        if self.has_pointers:
            return
        rng = np.random.RandomState(int(self.seed))
        firsts = range(0, self.spec.num_embeddings, BLOCK)
        counts = (min(BLOCK, self.spec.num_embeddings - first) for first in firsts)
        self.pointers.write_all((first, rng.randint(self.rows, size=(n, self.chunks))) for first, n in zip(firsts, counts, strict=True))

    def row_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        starts = count_up(self.chunks, ids.dtype, ids.device) * self.rows
        return self.pointers.read(ids).to(ids.dtype) + starts, self.hashes.rows_all(ids, self.rows) + starts

    def combine(self, rows: tuple[Tensor, Tensor], ids: Tensor) -> Tensor:
        return rows[0] + rows[1]

    def observe(self, ids: np.ndarray) -> None:
        self.lookups.add(ids)

    def reorganize(self, parts: dict[str, Tensor], epoch: int) -> bool:
        if epoch >= self.until:
            return False
        tables = [parts[name].numpy().copy() for name in ("table0", "table1")]
        words, hashes = self.pointers.words.cpu(), Hashes(self.chunks, np.random.RandomState(0))
        hashes.seeds.copy_(self.hashes.seeds)
        starts = np.arange(self.chunks) * self.rows

        def vectors(ids: np.ndarray) -> np.ndarray:
            ids = torch.from_numpy(ids)
            rows = self.pointers.read_from(words, ids).numpy() + starts, hashes.rows_all(ids, self.rows).numpy() + starts
            return (tables[0][rows[0]] + tables[1][rows[1]]).reshape(len(ids), -1)

        rng = np.random.RandomState([int(self.seed.cpu()), epoch + 1])
        counts = None if self.lookups is None else self.lookups.counts.cpu().numpy().astype(np.float64)
        for name, values in zip(("table0", "table1"), self.cluster(vectors, rng, importance(counts)), strict=True):
            parts[name].copy_(values)
        return True

    def cluster(self, vectors: Vectors, rng: np.random.RandomState, weights: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """The parts' new rows; pointers and seeds are replaced. `vectors` is asked for a sample of ids, then for every id, a block at a time."""
        n, width = self.spec.num_embeddings, self.spec.embedding_dim // self.chunks
        columns = [slice(chunk * width, (chunk + 1) * width) for chunk in range(self.chunks)]
        chosen, chosen_weights = sample(n, max(SAMPLE, self.sample * self.rows), rng, weights)
        points = vectors(chosen)
        found = [kmeans(np.ascontiguousarray(points[:, own]), self.rows, rng, chosen_weights, ITERATIONS) for own in columns]
        centers, all_seen = [clusters.centers for clusters in found], len(chosen) == n
        del points
        fresh = Hashes(self.chunks, rng)
        sums, totals = np.zeros((self.chunks, self.rows, width)), np.zeros((self.chunks, self.rows))

        def pieces():
            for first in range(0, n, BLOCK):
                ids = np.arange(first, min(first + BLOCK, n))
                block, hashed = vectors(ids), fresh.rows_all(torch.from_numpy(ids), self.rows).numpy()
                pointers = np.empty((len(ids), self.chunks), np.int64)
                for chunk, own in enumerate(columns):
                    wanted = np.ascontiguousarray(block[:, own])
                    pointers[:, chunk] = found[chunk].assigned[ids] if all_seen else assign(wanted, centers[chunk])
                    left = wanted - centers[chunk][pointers[:, chunk]]
                    more = weighted_means(left, None if weights is None else weights[ids], hashed[:, chunk], self.rows)
                    sums[chunk] += more[0]
                    totals[chunk] += more[1]
                yield first, pointers

        self.pointers.write_all(pieces())
        self.hashes.seeds.copy_(fresh.seeds)
        self.has_pointers = True
        means = np.where(totals[..., None] > 0, sums / np.where(totals > 0, totals, 1.0)[..., None], 0.0)
        return torch.from_numpy(np.concatenate(centers)), torch.from_numpy(means.reshape(-1, width).astype(np.float32))


def num_rows(spec: TableSpec, knobs: dict) -> int:
    """The knob, default N / 64, at most N."""
    return min(knobs["rows"] or max(spec.num_embeddings // 64, 1), spec.num_embeddings)


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    rows, chunks = num_rows(spec, knobs), num_chunks("cce", spec, knobs)
    counts = 4 * spec.num_embeddings if knobs["weighted"] else 0
    return counts + 8 * rows * spec.embedding_dim + packed_bytes(spec.num_embeddings, chunks, code_bits(rows)) + 8 * chunks + 4


def _create(spec: TableSpec, knobs: dict, making: Making) -> ClusteredTable:
    chunks = num_chunks("cce", spec, knobs)
    return ClusteredTable(spec, num_rows(spec, knobs), chunks, knobs["until"], knobs["sample"], knobs["weighted"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """A clustering of the trained table's vectors."""
    weights, table = id_weights("cce", spec, knobs, making), _create(spec, knobs, making)
    parts = table.cluster(lambda ids: weight[ids].astype(np.float32, copy=False), making.rng, weights)
    return converted(table, dict(zip(("table0", "table1"), parts, strict=True)), weight, making)


METHOD = Method(
    name="cce",
    title="clustered compositional embeddings: pointers from k-means after each of the first epochs, and a hash",
    paper="Tsang and Ahle, Clustering the Sketch, NeurIPS 2023, arXiv:2210.05974",
    knobs=(
        Knob("rows", int, None, "of each table; default N / 64, at most N", least=1),
        Knob("chunks", int, None, "pieces of a vector, each with tables and pointers of its own; must divide D, default D / 4", least=1),
        Knob("until", int, 2, "clusters after each of the first so many epochs; 0: never", least=0),
        Knob("sample", int, 16, f"ids for each center that k-means sees, at least {SAMPLE} in all", least=1),
        Knob("weighted", bool, False, "in clusterings an id counts as often as training looks it up"),
    ),
    bytes_formula="8 rows D + N chunks ceil(log2 rows) / 8 + 8 chunks + 4",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"rows": spec.num_embeddings},
    check=lambda spec, knobs: num_chunks("cce", spec, knobs) and None,
    weighted=True,
)
