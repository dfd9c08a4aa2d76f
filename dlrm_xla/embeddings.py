"""Embedding tables as two pure functions between shared machinery: ids -> rows of stores -> vectors.

Everything that is not the two functions (gathering, pooling, fusing tables into one store, row updates) is here, once, for every method.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrm_xla.batch import slot_starts
from dlrm_xla.ops.pool import pool
from dlrm_xla.ops.rows import AddRows
from dlrm_xla.specs import TableSpec
from dlrm_xla.stores import RowStore


class EmbeddingTable(nn.Module):
    """A table, plain or compressed. Subclasses give `parts` and the two functions; parameters they register are trained as dense ones.

    parts               the initial rows of each store it needs, by upstream's name: {"weight": [V, d]}
    pools_before_combine  True where the rows of a bag are pooled before `combine` sees them, which is the same for a linear combine
    """

    pools_before_combine = False

    def __init__(self, spec: TableSpec, parts: dict[str, Tensor]):
        super().__init__()
        self.spec, self.parts = spec, parts

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        """[...] int64 -> one [..., K_s] or [...] for each part: which rows an id reads."""
        raise NotImplementedError

    def combine(self, rows: tuple[Tensor, ...]) -> Tensor:
        """One [..., d_s] for each part -> [..., D]."""
        raise NotImplementedError


class PlainTable(EmbeddingTable):
    """One row for each id. init: [N, D] float32."""

    def __init__(self, spec: TableSpec, init: Tensor):
        super().__init__(spec, {"weight": init})

    def row_ids(self, ids):
        return (ids,)

    def combine(self, rows):
        return rows[0]


@dataclass(frozen=True)
class Segment:
    """Where a part of a table lies: rows [start, start + num_rows) of a store."""

    name: str  # upstream's parameter name
    store: int
    start: int
    num_rows: int


@dataclass(frozen=True)
class _Run:
    """Neighbouring tables that one operator serves: plain ones of equal hotness, or a single other one. Slots [first, last)."""

    tables: tuple[int, ...]
    hotness: int
    first: int
    last: int


@dataclass
class Lookup:
    """pooled [B, T, D], a function of `leaves`: for each store the rows read, [K] int64, and their values [K, d], an autograd leaf."""

    pooled: Tensor
    rows: list[Tensor]
    leaves: list[Tensor]


class EmbeddingCollection(nn.Module):
    """All tables of a model. Parts of the same width share a store, so that one gather and one update serve them."""

    def __init__(self, tables: list[EmbeddingTable], weighted_pooling: str | None, add_rows: AddRows):
        super().__init__()
        self.tables = nn.ModuleList(tables)
        self.hotness = tuple(table.spec.hotness for table in tables)
        pieces: dict[int, list[Tensor]] = {}
        self.segments: list[tuple[Segment, ...]] = []
        filled: dict[int, int] = {}
        widths: list[int] = []
        for table in tables:
            segments = []
            for name, init in table.parts.items():
                width = init.shape[1]
                if width not in widths:
                    widths.append(width)
                start = filled.get(width, 0)
                segments.append(Segment(f"{table.spec.name}.{name}", widths.index(width), start, init.shape[0]))
                pieces.setdefault(width, []).append(init)
                filled[width] = start + init.shape[0]
            self.segments.append(tuple(segments))
            table.parts = {}  # the store owns the rows from here on
        self.stores = nn.ModuleList(RowStore(_concatenate(pieces.pop(width)), add_rows) for width in widths)
        # upstream's "fixed" weights are ones: the plain sum
        learned = weighted_pooling == "learned"
        self.v_W_l = nn.ParameterList(nn.Parameter(torch.ones(table.spec.num_embeddings)) for table in tables) if learned else None
        self.runs = _runs(tables, learned)
        for index, run in enumerate(self.runs):
            if isinstance(tables[run.tables[0]], PlainTable):
                bases = torch.tensor([self.segments[t][0].start for t in run.tables]).repeat_interleave(run.hotness)
                self.register_buffer(f"base{index}", bases, persistent=False)  # [R * H]

    def lookup(self, ids: Tensor, weights: Tensor | None) -> Lookup:
        """ids [B, S] int32, weights [B, S] float32 or None -> pooled vectors and the leaves they come from."""
        batch, ids = ids.shape[0], ids.long()
        wanted: list[list[Tensor]] = [[] for _ in self.stores]  # for each store [B, k] pieces
        places = []  # for each run and part: store, first column
        columns = [0] * len(self.stores)
        for index, run in enumerate(self.runs):
            run_places = []
            for segment, rows in self._run_rows(index, run, ids[:, run.first : run.last]):
                run_places.append((segment.store, columns[segment.store], rows.shape[1]))
                wanted[segment.store].append(rows)
                columns[segment.store] += rows.shape[1]
            places.append(run_places)
        rows = [(pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)).reshape(-1) for pieces in wanted]
        leaves = [store.read(row).requires_grad_() for store, row in zip(self.stores, rows, strict=True)]
        values = [leaf.view(batch, -1, leaf.shape[1]) for leaf in leaves]
        pooled = []
        for run, run_places in zip(self.runs, places, strict=True):
            parts = [values[store].narrow(1, column, width) for store, column, width in run_places]
            pooled.append(self._pool_run(run, parts, ids, weights))
        return Lookup(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1), rows, leaves)

    def prepare(self, rule) -> None:
        """Add the state that the row rule needs to every store."""
        for store in self.stores:
            rule.prepare(store)

    def _run_rows(self, index: int, run: _Run, ids: Tensor):
        """ids [B, R * H] of one run -> (segment, rows of its store [B, k]) for each part."""
        table = self.tables[run.tables[0]]
        segments = self.segments[run.tables[0]]
        if isinstance(table, PlainTable):
            yield segments[0], ids + getattr(self, f"base{index}")
        else:
            for segment, rows in zip(segments, table.row_ids(ids), strict=True):
                yield segment, (rows + segment.start).reshape(ids.shape[0], -1)

    def _pool_run(self, run: _Run, parts: list[Tensor], ids: Tensor, weights: Tensor | None) -> Tensor:
        """Rows of one run, each part [B, R * H * K, d], to pooled vectors [B, R, D]."""
        batch, tables, hotness = ids.shape[0], len(run.tables), run.hotness
        shape = (batch, tables, hotness)
        bag_weights = None if weights is None else weights[:, run.first : run.last].reshape(shape)
        if self.v_W_l is not None:
            learned = self.v_W_l[run.tables[0]].index_select(0, ids[:, run.first : run.last].reshape(-1)).view(shape)
            bag_weights = learned if bag_weights is None else bag_weights * learned
        table = self.tables[run.tables[0]]
        vectors = tuple(part.reshape(*shape, -1) for part in parts)
        if table.pools_before_combine:
            return table.combine(tuple(pool(vector, bag_weights) for vector in vectors))
        return pool(table.combine(vectors), bag_weights)


def _concatenate(pieces: list[Tensor]) -> Tensor:
    """One tensor from many, letting go of each piece once it is copied: a large model needs its tables once, not twice."""
    if len(pieces) == 1:
        return pieces.pop()
    whole = torch.empty(sum(piece.shape[0] for piece in pieces), pieces[0].shape[1])
    start = 0
    pieces.reverse()
    while pieces:
        piece = pieces.pop()
        whole[start : start + piece.shape[0]] = piece
        start += piece.shape[0]
    return whole


def _runs(tables: list[EmbeddingTable], learned: bool) -> list[_Run]:
    starts = slot_starts([table.spec.hotness for table in tables])
    runs: list[list[int]] = []
    for index, table in enumerate(tables):
        before = tables[index - 1] if index else None
        joins = (
            before is not None
            and not learned
            and isinstance(table, PlainTable)
            and isinstance(before, PlainTable)
            and before.spec.hotness == table.spec.hotness
        )
        if joins:
            runs[-1].append(index)
        else:
            runs.append([index])
    return [_Run(tuple(run), tables[run[0]].spec.hotness, int(starts[run[0]]), int(starts[run[-1] + 1])) for run in runs]
