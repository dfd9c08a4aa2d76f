"""Tensor-train embedding: an id's vector is a product of small matrices, one from each core, picked by the id's digits.

    e = G_1[i_1] G_2[i_2] ... G_d[i_d],  G_k[i] of [R_{k-1}, q_k, R_k],  id = i_1 + p_1 (i_2 + p_2 (...)),  N <= p_1 ... p_d,  D = q_1 ... q_d

Yin et al., "TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models", MLSys 2021, arXiv:2101.11714; the format: Oseledets,
"Tensor-Train Decomposition", SIAM J. Sci. Comput. 33(5), 2011.
Differs from the paper: cores are multiplied out once a step where that is cheaper (tt_forms.py), with the first digit running fastest for it; the
middle core gets the smallest factor of D; Gaussian cores are scaled so that the rebuilt table has a plain table's standard deviation whatever the
rank; changes of cached rows go back into the cores (hot_cache.py).
Differs from its reference code: that one's "approx-normal" cores ignore the ranks (220 times the paper's deviation at rank 16, 441 times at 32),
every optimizer but SGD is Adagrad there, and a row that leaves the cache loses what it has learnt.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compression.hot_cache import HotCache, hot_cache_bytes
from compression.hot_counts import most_frequent
from compression.method import Converted, Knob, Making, Method
from compression.tt_forms import Form, choose, lookup
from compression.tt_shapes import MOST_CORES, TTShape, shape_of, useful_ranks
from compression.tt_svd import tt_svd
from compression.write_back import write_back
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part

CHUNK = 1 << 16  # ids read or folded at once on the host


class TTTable(EmbeddingTable):
    """d cores [p_k, R_{k-1} q_k R_k], ordinary parameters: every step changes most of them. With a cache also rows of its own, for hot ids.

    cores   starting values, float32 [p, R, q, R'] each
    cached  rows of the cache, 0 for none
    counts  [N] how often each id is looked up: the first to be cached; None: those seen in the first epoch, after it
    exact   [N, D] what the cached rows start with; None: the tensor train's values
    form    None: the cheapest, by tt_forms.choose
    """


    def __init__(
        self, spec: TableSpec, shape: TTShape, cores: list[Tensor], cached: int = 0, counts: np.ndarray | None = None, exact: np.ndarray | None = None
    ):
        slots = HotCache(cached, spec.embedding_dim, spec.num_embeddings) if cached else None
        parts = {"cache": Part(slots.num_slots, spec.embedding_dim, self._fill)} if cached else {}
        super().__init__(spec, parts)
        self.shape, self.form = shape, None
        self.cores = nn.ParameterList(nn.Parameter(core.reshape(core.shape[0], -1).contiguous()) for core in cores)
        self.cache, self.observes = slots, slots is not None
        self._first = None if slots is None or counts is None else most_frequent(counts, cached)
        self._exact = exact

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        return () if self.cache is None else (self.cache.ids.find(ids)[1],)

    def combine(self, rows: tuple[Tensor, ...], ids: Tensor) -> Tensor:
        vectors = lookup(list(self.cores), self.shape, ids.reshape(-1), self._form(ids.numel())).view(*ids.shape, -1)
        if self.cache is None:
            return vectors
        return torch.where(self.cache.ids.find(ids)[0][..., None], rows[0], vectors)

    def observe(self, ids: np.ndarray) -> None:
        self.cache.seen.add(ids)

    @torch.no_grad()
    def reorganize(self, parts: dict[str, Tensor], epoch: int) -> bool:
        """The ids that were looked up most often move into the cache; those that leave hand what they have learnt to the cores."""
        if self.cache is None:
            return False
        changed = self.cache.refresh(parts["cache"], self.cache.seen.hottest(), self.values, self.fold)
        self.state_from = {"cache": self.cache.origin}
        return changed

    @torch.no_grad()
    def values(self, ids: np.ndarray) -> Tensor:
        """[n] -> [n, D] of the cores alone, on the host."""
        cores = [core.detach().cpu() for core in self.cores]
        pieces = [torch.from_numpy(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)]
        form = choose(self.shape, min(len(ids), CHUNK))
        rows = [lookup(cores, self.shape, piece, form) for piece in pieces]
        return torch.cat(rows) if rows else cores[0].new_zeros(0, self.spec.embedding_dim)

    @torch.no_grad()
    def fold(self, ids: np.ndarray, deltas: Tensor) -> float:
        """ids [n], deltas [n, D]: the cores move so that the ids' vectors do by the deltas, as far as one step of SGD goes (write_back.py).

        Ids that are hot and read from the cores are to keep their vectors: without that, rows that had learnt noise raised the loss over all lookups
        by up to 74 % as they left, with it by 10 %; 7 % if what they had learnt were forgotten."""
        still = np.setdiff1d(self.cache.seen.known(), self.cache.held()[0])  # hot, and read from the cores: they had better not move
        numbers = torch.from_numpy(np.concatenate([ids, still]))
        deltas = torch.cat([deltas, deltas.new_zeros(len(still), deltas.shape[1])])

        def read(cores: list[Tensor], piece: slice) -> Tensor:
            return lookup(cores, self.shape, numbers[piece], choose(self.shape, min(len(numbers), CHUNK)))

        moved, done = write_back(list(self.cores), read, deltas, CHUNK)
        for core, new in zip(self.cores, moved, strict=True):
            core.copy_(new)
        return done

    def fill_buffers(self) -> None:
        if self._first is not None:
            self.cache.ids.put(self._first)

    def _form(self, lookups: int) -> Form:
        return self.form or choose(self.shape, lookups)

    def _fill(self, rows: Tensor) -> None:
        rows.zero_()
        ids, slots = self.cache.held()
        values = self.values(ids)
        self.cache.loaded[slots] = values
        rows[slots] = values if self._exact is None else torch.from_numpy(self._exact[ids])
        self._first = self._exact = None


def gaussian_cores(shape: TTShape, num_rows: int, rng: np.random.RandomState) -> list[Tensor]:
    """Cores [p, R, q, R'] whose first `num_rows` rows have a mean square of exactly 1 / (3 N), that of U(-1/sqrt(N), 1/sqrt(N)).

    Independent normal numbers of variance s^2 give entries of variance s^2d R_1 ... R_{d-1}; what is drawn is measured and scaled to it.
    """
    drawn = [rng.standard_normal(shape.core(k)) for k in range(shape.cores)]
    square = sum_of_squares(drawn, num_rows) / (num_rows * math.prod(shape.dims))
    scale = (1 / (3 * num_rows) / square) ** (0.5 / shape.cores)
    return [torch.from_numpy(core * scale).float() for core in drawn]


def sum_of_squares(cores: list[np.ndarray], num_rows: int) -> float:
    """Of rows 0 .. num_rows - 1 of the table that the cores [p, R, q, R'] stand for, in float64 and without building it."""

    def step(core: np.ndarray, gram: np.ndarray) -> np.ndarray:
        """sum over i and j of G[i, j]^T gram G[i, j]"""
        flat = core.transpose(1, 0, 2, 3)
        return core.transpose(0, 2, 1, 3).reshape(-1, core.shape[3]).T @ (
            (gram @ flat.reshape(len(gram), -1)).reshape(flat.shape).transpose(1, 2, 0, 3).reshape(-1, core.shape[3])
        )

    whole, part, size = np.ones((1, 1)), np.zeros((1, 1)), 1
    for core in cores:
        # ids below num_rows modulo this core's reach: all rows before it with a smaller digit, and some with the same one
        digit = num_rows // size % len(core) if size * len(core) > 0 else 0
        part = step(core[:digit], whole) + step(core[digit : digit + 1], part)
        whole, size = step(core, whole), size * len(core)
    return float((whole if num_rows == size else part)[0, 0])


KNOBS = (
    Knob("rank", int, None, "ranks between the cores; 16, or what is of use to a small table", least=1),
    Knob("cores", int, None, "how many; 3, or 2 where the dimension has no three factors", least=2, most=MOST_CORES),
    Knob("rows", str, "", "rows of the cores, as 200x220x250; derived where left out"),
    Knob("dims", str, "", "factors of the dimension, as 2x2x4; derived where left out"),
    Knob("cache", int, 0, "rows of its own for as many hot ids", least=0),
)


def _shape(name: str, spec: TableSpec, knobs: dict) -> TTShape:
    if knobs["cache"] > spec.num_embeddings:
        raise UserError(f"{name}:cache={knobs['cache']}: table {spec.name} has {spec.num_embeddings} rows; at most as many can be cached")
    return shape_of(name, spec, knobs)


def _num_bytes(name: str, spec: TableSpec, knobs: dict) -> int:
    cached = hot_cache_bytes(knobs["cache"], spec.embedding_dim, spec.num_embeddings) if knobs["cache"] else 0
    return 4 * _shape(name, spec, knobs).num_numbers + cached


def _most(name: str, spec: TableSpec, knobs: dict) -> int:
    shape = _shape(name, spec, {**knobs, "rank": 1})
    return max(useful_ranks(shape.rows, shape.dims))


def _exact_at(name: str, spec: TableSpec) -> dict:
    knobs = {knob.name: knob.default for knob in KNOBS}
    return {"rank": _most(name, spec, knobs)}


def _create(spec: TableSpec, knobs: dict, making: Making) -> TTTable:
    shape = _shape("tt", spec, knobs)
    return TTTable(spec, shape, gaussian_cores(shape, spec.num_embeddings, making.rng), knobs["cache"], making.counts)


def _convert(name: str, spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """By TT-SVD; cached rows keep the table's own."""
    shape = _shape(name, spec, knobs)
    cores, facts = tt_svd(weight, shape, making.rng)
    return Converted(TTTable(spec, shape, cores, knobs["cache"], making.counts, weight if knobs["cache"] else None), facts)


def _method(name: str, title: str, create) -> Method:
    return Method(
        name=name, title=title,
        paper={
            "tt": "Yin et al., TT-Rec: Tensor Train Compression for Deep Learning Recommendation Models, MLSys 2021, arXiv:2101.11714",
            "tt_svd": "Oseledets, Tensor-Train Decomposition, SIAM J. Sci. Comput. 33(5), 2011",
        }[name],
        knobs=KNOBS, bytes_formula="4 sum_k p_k R_{k-1} q_k R_k + 8.4 cache D + 52 cache",
        num_bytes=partial(_num_bytes, name), create=create, shell=_create, convert=partial(_convert, name), sized_by="rank",
        sized_most=partial(_most, name),
        uses_counts=lambda knobs: knobs["cache"] > 0, exact_at=partial(_exact_at, name), check=lambda spec, knobs: _shape(name, spec, knobs) and None,
    )  # fmt: skip


METHOD = _method("tt", "product of small matrices, one picked by each digit of the id", _create)
SVD_METHOD = _method("tt_svd", "the tensor train of a trained table, by singular values", None)
