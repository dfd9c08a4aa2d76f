"""Embedding tables as two pure functions between shared machinery: ids -> rows of stores -> vectors.

Everything that is not the two functions (gathering, pooling, fusing tables into one store, row updates) is here, once, for every method.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.batch import slot_starts
from dlrm_xla.layouts import Layout
from dlrm_xla.ops.bags import join
from dlrm_xla.ops.pool import pool
from dlrm_xla.quantized_store import QuantizedStore
from dlrm_xla.reads import BagColumns, BagRead, Columns, SlotRead
from dlrm_xla.specs import TableSpec, size_text
from dlrm_xla.stores import RowStore

STORES = {"float32": RowStore, "int8": QuantizedStore}
LARGE_BUFFER = 1 << 16  # numbers


@dataclass(frozen=True)
class Part:
    """Rows that a table keeps in a store: [num_rows, width].

    fill(rows): writes the starting values into that view, in place and a piece at a time, so that a large table needs its memory once.
    Parts are filled table by table, in order: what a fill draws comes after what the fills before it drew.
    codec: "float32", or "int8": a scale for each row and stochastic rounding of its updates (quantized_store.py)
    """

    num_rows: int
    width: int
    fill: Callable[[Tensor], None]
    codec: str = "float32"


class EmbeddingTable(nn.Module):
    """A table, plain or compressed. Subclasses give `parts` and the two functions; parameters they register are trained as dense ones, and
    persistent buffers (codes, pointers, seeds of hashes) are kept as they are, in checkpoints too.

    parts               the rows that it keeps in stores, by upstream's name: {"weight": Part(V, d, fill)}
    pools_before_combine  True where the rows of a bag are pooled before `combine` sees them, which is the same for a linear combine; an id
                          then reads one row of each part
    state_from          after `reorganize`: for each part, int64 [num_rows], the old row whose optimizer state a row goes on with, -1 for none;
                        None: the state of all rows starts at zero again
    observes            True where `observe` wants to see the ids of training
    made_by             what was chosen for it, for checkpoints and reports
    """

    pools_before_combine = False
    state_from: dict[str, np.ndarray] | None = None
    observes = False
    made_by = None  # compression.method.Choice; None: one row for each id

    def __init__(self, spec: TableSpec, parts: dict[str, Part]):
        super().__init__()
        self.spec, self.parts = spec, parts

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        """[...] int64 -> one [..., K_s] or [...] for each part: which rows an id reads."""
        raise NotImplementedError

    def combine(self, rows: tuple[Tensor, ...], ids: Tensor | None) -> Tensor:
        """One [..., K_s x d_s] for each part, an id's rows side by side -> [..., D]. ids: [...] as in row_ids, None where pools_before_combine."""
        raise NotImplementedError

    def fill_buffers(self) -> None:
        """Writes what the buffers hold at the start, where that is work: called before the parts are filled, and not for a table of shapes only."""

    def observe(self, ids: np.ndarray) -> None:
        """ids [n] of a batch of training that count, in the host's memory."""

    def reorganize(self, parts: dict[str, Tensor], epoch: int) -> bool:
        """After epoch number `epoch` (0 is the first): may change its rows, views in the host's memory by the names of `parts`, and its buffers,
        in place. True where it did."""
        return False


class PlainTable(EmbeddingTable):
    """One row for each id."""

    pools_before_combine = True

    def __init__(self, spec: TableSpec, fill: Callable[[Tensor], None]):
        super().__init__(spec, {"weight": Part(spec.num_embeddings, spec.embedding_dim, fill)})

    def row_ids(self, ids):
        return (ids,)

    def combine(self, rows, ids):
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
    """Neighbouring tables that one operator serves: plain ones of equal hotness and pooling, or a single other one. Slots [first, last)."""

    tables: tuple[int, ...]
    hotness: int
    pooling: str
    first: int
    last: int


@dataclass
class Lookup:
    """pooled [B, T, D], and what was read from each store; either kind may be missing there."""

    pooled: Tensor
    slots: list[SlotRead | None]
    bags: list[BagRead | None]


class EmbeddingCollection(nn.Module):
    """All tables of a model. Parts of the same width share a store, so that one gather and one update serve them.

    rule    the optimizer of the rows (optim.py); what it keeps lies in the stores
    layout  of the stores' buffers (layouts.py)
    device  "cpu", or "meta": shapes only, nothing is drawn
    """

    def __init__(self, tables: list[EmbeddingTable], weighted_pooling: str | None, rule, layout: Layout, device: str = "cpu"):
        super().__init__()
        self.tables, self.rule, self.layout = nn.ModuleList(tables), rule, layout
        self.hotness = tuple(table.spec.hotness for table in tables)
        starts = slot_starts(self.hotness)
        self.slots = starts[:-1], starts[1:]  # of each table, for the host
        self.segments, sizes = _segments(tables)
        self.stores = nn.ModuleList(STORES[codec](num_rows, width, rule, layout, device) for (width, codec), num_rows in sizes.items())
        self.part_names = [tuple(table.parts) for table in tables]
        if device == "meta":
            for table in tables:
                _to_meta(table)
        else:
            for table, segments in zip(tables, self.segments, strict=True):
                table.fill_buffers()
                for segment, part in zip(segments, table.parts.values(), strict=True):
                    self.stores[segment.store].fill(segment.start, segment.num_rows, part.fill)
                table.parts = {}  # what fills hold on to may go
        # upstream's "fixed" weights are ones: the plain sum
        learned = weighted_pooling == "learned"
        self.v_W_l = nn.ParameterList(nn.Parameter(torch.ones(table.spec.num_embeddings)) for table in tables) if learned else None
        self.runs = _runs(tables, learned)
        for index, run in enumerate(self.runs):
            if isinstance(tables[run.tables[0]], PlainTable):
                bases = torch.tensor([self.segments[t][0].start for t in run.tables], dtype=layout.index_dtype).repeat_interleave(run.hotness)
                self.register_buffer(f"base{index}", bases, persistent=False)  # [R * H]

    def lookup(self, ids: Tensor, weights: Tensor | None) -> Lookup:
        """ids [B, S] int32, weights [B, S] float32, zero in padded slots, or None (all ones) -> pooled vectors and what they come from."""
        batch, ids = ids.shape[0], ids.to(self.layout.index_dtype)
        slots = [Columns() for _ in self.stores]
        bags = [BagColumns() for _ in self.stores]
        places = []  # for each run and part: the collector, and where in it
        run_weights = [self._bag_weights(run, ids, weights) for run in self.runs]
        for index, (run, bag_weights) in enumerate(zip(self.runs, run_weights, strict=True)):
            filled = None if weights is None else weights[:, run.first : run.last]
            places.append([])
            for segment, rows in self._run_rows(index, run, ids[:, run.first : run.last]):
                if self._reads_bags(run, bag_weights):
                    collector = bags[segment.store]
                    place = collector.add(rows, filled, bag_weights, run.hotness)
                else:
                    collector = slots[segment.store]
                    place = collector.add(rows)
                places[-1].append((collector, place))
        slot_reads = [columns.read(store) for columns, store in zip(slots, self.stores, strict=True)]
        bag_reads = [collected.read(store) for collected, store in zip(bags, self.stores, strict=True)]
        pooled = []
        for run, run_places, bag_weights in zip(self.runs, places, run_weights, strict=True):
            parts = tuple(collector.values(place, batch, len(run.tables)) for collector, place in run_places)
            table = self.tables[run.tables[0]]
            if self._reads_bags(run, bag_weights):
                pooled.append(table.combine(parts, None))
                continue
            vectors = tuple(part.reshape(batch, len(run.tables), run.hotness, -1) for part in parts)
            if table.pools_before_combine:
                pooled.append(table.combine(tuple(pool(vector, bag_weights) for vector in vectors), None))
            else:
                of_run = ids[:, run.first : run.last].view(batch, len(run.tables), run.hotness)
                pooled.append(pool(table.combine(vectors, of_run), bag_weights))
        return Lookup(pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1), slot_reads, bag_reads)

    def update(self, lookups: list[Lookup], neg_lr: Tensor, scale: float = 1.0) -> None:
        """One step of the rule on every row that the lookups read, from the gradients of what was read times `scale`."""
        for index, store in enumerate(self.stores):
            slots = [lookup.slots[index] for lookup in lookups]
            if slots[0] is not None:
                pieces = [(read.rows, read.records, read.leaf.grad) for read in slots]
                rows, records, grads = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
                store.update(rows, records, grads if scale == 1.0 else grads * scale, neg_lr)
            bags = [lookup.bags[index] for lookup in lookups]
            if bags[0] is not None:
                grads = bags[0].sums.grad if len(bags) == 1 else torch.cat([read.sums.grad for read in bags])
                store.update_bags(join([read.bags for read in bags]), grads if scale == 1.0 else grads * scale, neg_lr)

    def _reads_bags(self, run: _Run, bag_weights: Tensor | None) -> bool:
        """Sum bags as they are read? Where shapes may depend on the data it is the faster way for all but plain additions to single rows:
        26 tables of width 16, batch 2048, SGD, popular ids: 1.01 ms with slots, 1.17 with bags (one core)."""
        several = run.hotness > 1 or bag_weights is not None or self.rule.sums_duplicates
        return self.layout.ragged and several and self.tables[run.tables[0]].pools_before_combine

    def describe(self) -> str:
        """Bytes and layout, for people."""
        buffers = [(store, name, buffer) for store in self.stores for name, buffer in store.named_buffers()]
        numbers = [store.numbers(name) for store, name, _ in buffers if name != "scratch"]
        weights, state = (4 * sum(kind) for kind in zip(*numbers, strict=True)) if numbers else (0, 0)
        rest = sum(buffer.nelement() * buffer.element_size() for _, _, buffer in buffers) - weights - state
        others = [value for table in self.tables for value in table.state_dict().values()]
        weights += sum(value.nelement() * value.element_size() for value in others)
        return (
            f"{sum(len(segments) for segments in self.segments)} in {len(self.stores)} store{'s' if len(self.stores) != 1 else ''}, "
            f"{size_text(weights)} of weights and {size_text(state)} of optimizer state"
            f"{f', {size_text(rest)} of scratch and padding' if rest else ''}, layout {self.layout.name}"
        )

    @torch.no_grad()
    def materialize(self, table: int, ids: Tensor) -> Tensor:
        """ids [n] -> [n, D] float32: the vectors that one table has for them, on the device; no bag, no weight."""
        ids = ids.to(self.layout.index_dtype)
        segments, method = self.segments[table], self.tables[table]
        rows = tuple(
            store.weights(store.read((rows + segment.start).reshape(-1))).reshape(ids.shape[0], -1)
            for segment, store, rows in zip(segments, [self.stores[s.store] for s in segments], method.row_ids(ids), strict=True)
        )
        return method.combine(rows, ids)

    def observe(self, ids: np.ndarray, weights: np.ndarray | None) -> None:
        """A batch of training in the host's memory, ids [n, S] and weights [n, S] or None, for the tables that want to see it."""
        for table, first, last in zip(self.tables, *self.slots, strict=True):
            if table.observes:
                seen = ids[:, first:last]
                table.observe(seen.reshape(-1) if weights is None else seen[weights[:, first:last] != 0])

    @torch.no_grad()
    def reorganize(self, epoch: int) -> bool:
        """After an epoch: tables that cluster or cache anew do so. True where something changed, and with it the meaning of rows."""
        wanted = [type(table).reorganize is not EmbeddingTable.reorganize for table in self.tables]
        if not any(wanted):
            return False
        buffers = [store.on_host() for store in self.stores]
        fields = [store.fields(of_store) for store, of_store in zip(self.stores, buffers, strict=True)]
        changed = False
        for table, segments, names, wants in zip(self.tables, self.segments, self.part_names, wanted, strict=True):
            if not wants:
                continue
            own = [{key: field[s.start : s.start + s.num_rows] for key, field in fields[s.store].items()} for s in segments]
            if table.reorganize({name: part["weight"] for name, part in zip(names, own, strict=True)}, epoch):
                changed = True
                for name, part in zip(names, own, strict=True):
                    states = [part[key] for key in (*self.rule.record[1:], *self.rule.scalars)]
                    _move_states(states, table.state_from and table.state_from[name])
        if changed:
            for store, of_store in zip(self.stores, buffers, strict=True):
                store.load(of_store)
        return changed

    def part_rows(self, segment: Segment) -> Tensor:
        """[num_rows, d] float32: the rows of one part, in the host's memory; on a CPU a view."""
        return self.stores[segment.store].weight()[segment.start : segment.start + segment.num_rows]

    def _run_rows(self, index: int, run: _Run, ids: Tensor):
        """ids [B, R * H] of one run -> (segment, rows of its store [B, k]) for each part."""
        table = self.tables[run.tables[0]]
        segments = self.segments[run.tables[0]]
        if isinstance(table, PlainTable):
            yield segments[0], ids + getattr(self, f"base{index}")
        else:
            for segment, rows in zip(segments, table.row_ids(ids), strict=True):
                yield segment, (rows + segment.start).reshape(ids.shape[0], -1)

    def _bag_weights(self, run: _Run, ids: Tensor, weights: Tensor | None) -> Tensor | None:
        """[B, R, H]: what each slot's vector is multiplied by; None where that is 1."""
        shape = (ids.shape[0], len(run.tables), run.hotness)
        bag_weights = None if weights is None else weights[:, run.first : run.last].reshape(shape)
        if run.pooling == "mean" and run.hotness > 1:
            if bag_weights is None:
                bag_weights = torch.full(shape, 1 / run.hotness, device=ids.device)
            else:
                bag_weights = bag_weights / (bag_weights != 0).sum(2, keepdim=True).clamp_(min=1)
        if self.v_W_l is not None:
            learned = self.v_W_l[run.tables[0]].index_select(0, ids[:, run.first : run.last].reshape(-1)).view(shape)
            bag_weights = learned if bag_weights is None else bag_weights * learned
        return bag_weights


def _move_states(states: list[Tensor], origin: np.ndarray | None) -> None:
    """states [num_rows] or [num_rows, d], in place: each row's becomes that of row origin[i], zero for -1."""
    for value in states:
        if origin is None:
            value.zero_()
        else:
            moved = value[np.maximum(origin, 0)]
            moved[origin < 0] = 0
            value.copy_(moved)


def _segments(tables: list[EmbeddingTable]) -> tuple[list[tuple[Segment, ...]], dict[tuple[int, str], int]]:
    """Where every part of every table lies, and the stores: (width, codec) -> number of rows, in the order of their numbers."""
    sizes: dict[tuple[int, str], int] = {}
    segments = []
    for table in tables:
        of_table = []
        for name, part in table.parts.items():
            kind = (part.width, part.codec)
            start = sizes.setdefault(kind, 0)
            of_table.append(Segment(f"{table.spec.name}.{name}", list(sizes).index(kind), start, part.num_rows))
            sizes[kind] = start + part.num_rows
        segments.append(tuple(of_table))
    return segments, sizes


def _to_meta(table: EmbeddingTable) -> None:
    """Large buffers become shapes: whoever traces a step puts placeholders there."""
    for module in table.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.nelement() > LARGE_BUFFER:
                setattr(module, name, buffer.to("meta"))


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
            and before.spec.pooling == table.spec.pooling
        )
        if joins:
            runs[-1].append(index)
        else:
            runs.append([index])
    return [_Run(tuple(run), tables[run[0]].spec.hotness, tables[run[0]].spec.pooling, int(starts[run[0]]), int(starts[run[-1] + 1])) for run in runs]
