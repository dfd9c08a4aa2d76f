"""Hot and cold ids: those that training looks up most have rows of their own, the others share hashed rows. "hot_cold".

Frequency hashing, Zhang et al., "Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems", RecSys 2020,
arXiv:2007.14523; the split of "adaptive embedding", as in Lai et al., "AdaEmbed", OSDI 2023, and Zhang et al., "CAFE", SIGMOD 2024.
Differs from the papers: which ids are hot is counted once, before training, and stays; cold ids are hashed once; the hot ones are found through a
cuckoo table (hot_ids.py) of 4.2 bytes each instead of an array of 4 bytes for every id.
Starting values: U(-sqrt(1/N), sqrt(1/N)), a plain table's, whose standard deviation is 1/sqrt(3N).
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compression.fitting import WEIGHTED, converted, fit_rows, float64_of, id_weights
from compression.hashes import Hashes
from compression.hot_ids import KEYS, HotIds, hot_ids_bytes, num_buckets
from compression.low_rank import orthonormal_rows, starting_bound
from compression.method import Converted, Knob, Making, Method
from compression.optimal import decompose
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part


class HotColdTable(EmbeddingTable):
    """One part: first the slots of hot ids, then num_cold shared rows.

    hot     how many ids have rows of their own
    width   numbers in a row; below D a trained projection makes vectors of them
    counts  [N], or None where every id is hot
    """

    pools_before_combine = True

    def __init__(self, spec: TableSpec, hot: int, num_cold: int, width: int, counts: np.ndarray | None, rng: np.random.RandomState):
        num_rows = num_buckets(hot) * KEYS + num_cold
        fill = partial(fill_uniform, rng=rng, bound=starting_bound(spec, width))
        super().__init__(spec, {"weight": Part(num_rows, width, fill)})
        start = orthonormal_rows(rng, width, spec.embedding_dim) if width < spec.embedding_dim else None
        self.projection = None if start is None else nn.Parameter(torch.from_numpy(start.astype(np.float32)))
        self.hot, self.num_cold, self.counts = hot, num_cold, counts
        self.hot_ids, self.hashes = HotIds(hot), Hashes(1, rng)

    def fill_buffers(self) -> None:
        self.hot_ids.put(self._hottest())
        self.counts = None

    def _hottest(self) -> np.ndarray:
        """The ids looked up most, of equals the smaller ones; none that never is, unless there is room for all."""
        if self.hot >= self.spec.num_embeddings:
            return np.arange(self.spec.num_embeddings)
        order = np.argsort(-self.counts, kind="stable")[: self.hot]
        return order[self.counts[order] > 0]

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        found, slot = self.hot_ids.find(ids)
        return (torch.where(found, slot, self.hashes.row(ids, 0, self.num_cold) + self.hot_ids.num_slots),)

    def combine(self, rows: tuple[Tensor], ids: Tensor | None) -> Tensor:
        return rows[0] if self.projection is None else rows[0] @ self.projection.to(rows[0].dtype)


def _hot(spec: TableSpec, knobs: dict) -> int:
    """The knob `hot` as a number of ids."""
    hot = knobs["hot"]
    return max(1, min(int(hot if hot >= 1 else hot * spec.num_embeddings), spec.num_embeddings))


def _cold(spec: TableSpec, knobs: dict) -> int:
    """Shared rows. At equal bytes one is best: on 137,139 real rows (seed 123, sized by traffic) AUC 0.7719, 0.7693 and 0.7656 at 10x, 30x and 100x
    with one, and 0.7705, 0.7671 and 0.7637 with an eighth as many as hot ones."""
    return min(knobs["rows"], spec.num_embeddings)


def _width(spec: TableSpec, knobs: dict) -> int:
    return knobs["width"] or spec.embedding_dim


def _check(spec: TableSpec, knobs: dict) -> None:
    if _width(spec, knobs) > spec.embedding_dim:
        raise UserError(f"hot_cold:width={knobs['width']}: table {spec.name} has vectors of {spec.embedding_dim}; give at most that")


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    hot, width = _hot(spec, knobs), _width(spec, knobs)
    projection = width * spec.embedding_dim if width < spec.embedding_dim else 0
    return 4 * (width * (num_buckets(hot) * KEYS + _cold(spec, knobs)) + projection) + hot_ids_bytes(hot) + 8


def _create(spec: TableSpec, knobs: dict, making: Making) -> HotColdTable:
    hot = _hot(spec, knobs)
    if making.counts is None and hot < spec.num_embeddings:
        raise UserError(
            f"hot_cold:hot={knobs['hot']:g}: table {spec.name}: how often training looks an id up is not known, so hot ids cannot be told; train "
            "on a data set that can be counted, or take another method, as hash"
        )
    return HotColdTable(spec, hot, _cold(spec, knobs), _width(spec, knobs), making.counts, making.rng)


def _shell(spec: TableSpec, knobs: dict, making: Making) -> HotColdTable:
    """Which ids are hot is among what the checkpoint brings."""
    return HotColdTable(spec, _hot(spec, knobs), _cold(spec, knobs), _width(spec, knobs), np.zeros(spec.num_embeddings), making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """Hot rows are copied; a shared row becomes the mean of its ids' vectors, the optimum for these hashes. Narrower rows: that table's projection on
    the singular vectors of the rows, each weighted by the ids that it serves, which is the optimum of that width."""
    table = _create(spec, knobs, making)
    table.hot_ids.put(table._hottest())
    (rows,) = table.row_ids(torch.arange(spec.num_embeddings))
    num_rows = table.hot_ids.num_slots + table.num_cold
    weights = id_weights("hot_cold", spec, knobs, making)
    values = fit_rows(rows, num_rows, float64_of(weight), weights)
    if table.projection is not None:
        served = np.bincount(rows.numpy(), weights, minlength=num_rows)
        vectors = torch.from_numpy(decompose(values.numpy(), served).vectors[:, : _width(spec, knobs)].copy())
        with torch.no_grad():
            table.projection.copy_(vectors.T)
        values = values.double() @ vectors.double()
    return converted(table, {"weight": values}, weight, making)


METHOD = Method(
    name="hot_cold",
    title="own rows for the ids that training looks up most, hashed rows for the others",
    paper="Zhang et al., Model Size Reduction Using Frequency Based Double Hashing for Recommender Systems, RecSys 2020, arXiv:2007.14523",
    knobs=(
        Knob("hot", float, 0.05, "ids with a row of their own: below 1 a share of the table's, otherwise a number", least=0),
        Knob("rows", int, 1, "rows that the others share", least=1),
        Knob("width", int, None, "numbers in a row; fewer than D go through a trained projection", least=1),
        WEIGHTED,
    ),
    bytes_formula="4 D (hot + rows) + 4.2 hot; width W: 4 W (hot + rows + D) + 4.2 hot",
    num_bytes=_num_bytes,
    create=_create,
    shell=_shell,
    convert=_convert,
    sized_by="hot",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"hot": float(spec.num_embeddings), "rows": 1},
    check=_check,
    needs_counts=True,
    uses_counts=lambda knobs: True,
    weighted=True,
)
