"""Embedding tables as two pure functions between shared machinery: ids -> rows of stores -> vectors.

Everything that is not the two functions (gathering, pooling, fusing tables into one store, row updates) is here, once, for every method.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.backends.collectives import Alone, Collectives
from dlrm_xla.batch import slot_starts
from dlrm_xla.exchange import Exchange, ExchangeRead
from dlrm_xla.layouts import Layout
from dlrm_xla.ops.bags import Bags, join
from dlrm_xla.ops.pool import pool
from dlrm_xla.ops.rows import count_up
from dlrm_xla.reads import BagColumns, BagRead, Columns, SlotRead
from dlrm_xla.segments import STORES, Run, Segment, elsewhere_of, planned_segments, runs_of, segments_of, stores_of
from dlrm_xla.sharding import Plan
from dlrm_xla.specs import MAX_INT32, UserError, size_text
from dlrm_xla.stores import RowStore
from dlrm_xla.tables import EmbeddingTable, PlainTable

LARGE_BUFFER = 1 << 16  # numbers


@dataclass
class Lookup:
    """pooled [B, T, D], and what was read from each store; each kind may be missing there."""

    pooled: Tensor
    slots: list[SlotRead | None]
    bags: list[BagRead | None]
    exchanged: ExchangeRead | None = None


class EmbeddingCollection(nn.Module):
    """All tables of a model. Parts of the same width share a store, so that one gather and one update serve them.

    rule    the optimizer of the rows (optim.py); what it keeps lies in the stores
    layout  of the stores' buffers (layouts.py)
    device  "cpu", or "meta": shapes only, nothing is drawn
    plan    which rank holds which rows (sharding.py), made from `table_parts`; None: this one holds all
    """

    def __init__(
        self,
        tables: list[EmbeddingTable],
        weighted_pooling: str | None,
        rule,
        layout: Layout,
        device: str = "cpu",
        plan: Plan | None = None,
        collectives: Collectives | None = None,
    ):
        super().__init__()
        self.tables, self.rule, self.layout = nn.ModuleList(tables), rule, layout
        self.plan, self.collectives = plan, collectives or Alone()
        self.hotness = tuple(table.spec.hotness for table in tables)
        starts = slot_starts(self.hotness)
        self.slots = starts[:-1], starts[1:]  # of each table, for the host
        for store in range(0 if plan is None else plan.num_stores):
            if plan.replicated_rows(store) > MAX_INT32:
                rows = plan.replicated_rows(store)
                raise UserError(f"--sharding: copies {rows} rows of one width to every rank, and at most {MAX_INT32} can be; use --sharding=auto")
        learned = weighted_pooling == "learned"
        kinds = stores_of(tables)
        self.segments, sizes = segments_of(tables, kinds) if plan is None else planned_segments(tables, plan, self.collectives.rank)
        self.stores = nn.ModuleList(STORES[codec](rows, width, rule, layout, device) for (width, codec), rows in zip(kinds, sizes, strict=True))
        self.part_names = [tuple(table.parts) for table in tables]
        if device == "meta":
            for table in tables:
                _to_meta(table)
        else:
            for table, segments in zip(tables, self.segments, strict=True):
                table.fill_buffers()
                for segment, part in zip(segments, table.parts.values(), strict=True):
                    self.stores[segment.store].fill(segment.start, segment.num_rows, part.fill, segment.first, segment.total)
                table.parts = {}  # what fills hold on to may go
        # upstream's "fixed" weights are ones: the plain sum
        self.v_W_l = nn.ParameterList(nn.Parameter(torch.ones(table.spec.num_embeddings)) for table in tables) if learned else None
        elsewhere = elsewhere_of(self.part_names, plan)
        self.runs = runs_of(tables, learned, elsewhere, anywhere=plan is not None)
        for index, run in enumerate(self.runs):
            if not isinstance(run.slots, slice):
                self.register_buffer(f"slots{index}", torch.tensor(run.slots), persistent=False)
            if isinstance(tables[run.tables[0]], PlainTable) and not run.summed:
                bases = torch.tensor([self.segments[t][0].start for t in run.tables], dtype=layout.index_dtype).repeat_interleave(run.hotness)
                self.register_buffer(f"base{index}", bases, persistent=False)  # [R * H]
        shown = [table for run in self.runs for table in run.tables]
        self.sorted = shown == sorted(shown)
        if not self.sorted:
            self.register_buffer("order", torch.tensor(shown).argsort(), persistent=False)  # from the runs' order to the tables'
        self.exchange, self.asked = None, [[None] * len(elsewhere[run.tables[0]]) for run in self.runs]
        if any(number is not None for numbers in elsewhere for number in numbers):
            self._plan_exchange(elsewhere)

    def _plan_exchange(self, elsewhere: list[list[int | None]]) -> None:
        """elsewhere: of each table and part its number in the plan, None where it is on every rank. Sets `asked`: of each run and part, the store
        and the outputs [first, first + count) of the exchange that are its own."""
        order: list[list[int]] = [[] for _ in self.stores]
        sources: dict[int, list[int]] = {}
        num_sources, num_outputs = 0, [0] * len(self.stores)
        for index, run in enumerate(self.runs):
            for table in run.tables:
                for position, number in enumerate(elsewhere[table]):
                    if number is None:
                        continue
                    part = self.plan.parts[number]
                    store, first = part.store, num_outputs[part.store]
                    before = self.asked[index][position]
                    self.asked[index][position] = (store, first, part.outputs) if before is None else (store, before[1], before[2] + part.outputs)
                    sources[number] = list(range(num_sources, num_sources + part.columns))
                    num_sources, num_outputs[store] = num_sources + part.columns, first + part.outputs
                    order[store].append(number)
        self.exchange = Exchange(self.plan, self.collectives, order, sources, self.layout, self.rule)

    def lookup(self, ids: Tensor, weights: Tensor | None) -> Lookup:
        """ids [B, S] int32, weights [B, S] float32, zero in padded slots, or None (all ones) -> pooled vectors and what they come from.

        On several ranks the B rows are this rank's part of the batch.
        """
        ids = ids.to(self.layout.index_dtype)
        slots = [Columns() for _ in self.stores]
        bags = [BagColumns() for _ in self.stores]
        wanted: list[Tensor] = []  # from other ranks: columns of row numbers [B, k]
        places = []  # for each run and part: the collector, and where in it
        of_runs = [self._of_run(index, run, ids) for index, run in enumerate(self.runs)]
        run_weights = [self._bag_weights(index, run, of_run, weights) for index, (run, of_run) in enumerate(zip(self.runs, of_runs, strict=True))]
        for index, (run, of_run, bag_weights) in enumerate(zip(self.runs, of_runs, run_weights, strict=True)):
            filled = None if weights is None else self._of_run(index, run, weights)
            places.append([])
            for asked, (segment, rows) in zip(self.asked[index], self._run_rows(index, run, of_run), strict=True):
                if asked is not None:
                    wanted.append(rows if filled is None or not self._sums_there(run) else torch.where(filled != 0, rows, -1))
                    places[-1].append(None)
                elif self._reads_bags(run, bag_weights):
                    places[-1].append((bags[segment.store], bags[segment.store].add(rows, filled, bag_weights, run.hotness)))
                else:
                    places[-1].append((slots[segment.store], slots[segment.store].add(rows)))
        slot_reads = [columns.read(store) for columns, store in zip(slots, self.stores, strict=True)]
        bag_reads = [collected.read(store) for collected, store in zip(bags, self.stores, strict=True)]
        exchanged = None
        if self.exchange is not None:
            source = (wanted[0] if len(wanted) == 1 else torch.cat(wanted, 1)).to(torch.int32)
            exchanged = self.exchange.lookup(source, self.stores, weights is not None)
        pooled = [
            self._pooled(index, run_places, of_runs[index], run_weights[index], exchanged) for index, run_places in enumerate(places)
        ]
        vectors = pooled[0] if len(pooled) == 1 else torch.cat(pooled, dim=1)
        return Lookup(vectors if self.sorted else vectors.index_select(1, self.order), slot_reads, bag_reads, exchanged)

    def _pooled(self, index: int, places: list, of_run: Tensor, bag_weights: Tensor | None, exchanged: ExchangeRead | None) -> Tensor:
        """[B, R, D] of run number `index`, from what the collectors and the exchange have read. of_run: its ids [B, R * H]."""
        run, batch = self.runs[index], of_run.shape[0]
        table = self.tables[run.tables[0]]
        parts = []  # [B, R, d] where bags are summed already, else [B, R, H, K x d]
        for place, asked in zip(places, self.asked[index], strict=True):
            if asked is None:
                collector, where = place
                values, summed = collector.values(where, batch, len(run.tables)), isinstance(collector, BagColumns)
            else:
                store, first, count = asked
                values, summed = exchanged.leaves[store].narrow(1, first, count), self._sums_there(run)
                if summed and run.pooling == "mean" and bag_weights is not None:  # the same for every filled slot of a bag
                    values = values * bag_weights.amax(2, keepdim=True)
            parts.append(values if summed else values.reshape(batch, len(run.tables), run.hotness, -1))
        if table.pools_before_combine:
            return table.combine(tuple(pool(part, bag_weights) if part.dim() == 4 else part for part in parts), None)
        return pool(table.combine(tuple(parts), of_run.view(batch, len(run.tables), run.hotness)), bag_weights)

    def _sums_there(self, run: Run) -> bool:
        """Does an owner sum the bags of these tables? Learned weights stay where the batch is."""
        return self.tables[run.tables[0]].pools_before_combine and self.v_W_l is None

    @torch.no_grad()
    def shared_gradients(self, lookups: list[Lookup], scale: float = 1.0) -> list[Tensor]:
        """Of each store whose copies are kept equal by sums over all ranks [copied rows, d]: this rank's gradients of them. For `update`."""
        if self.plan is None:
            return []
        sums = []
        for store in self._summed_stores():
            rows, _, grads = _joined([lookup.slots[store] for lookup in lookups], scale)
            sums.append(grads.new_zeros(self.plan.replicated_rows(store), grads.shape[1]))
            self.layout.add_rows(sums[-1], rows, grads)
        return sums

    @torch.no_grad()
    def update(self, lookups: list[Lookup], neg_lr: Tensor, scale: float = 1.0, shared: list[Tensor] | None = None) -> None:
        """One step of the rule on every row that the lookups read, from the gradients of what was read times `scale`.

        shared: the sums over all ranks of what `shared_gradients` gave
        """
        served = [] if self.exchange is None else [self.exchange.gradients(lookup.exchanged) for lookup in lookups]
        by_store = dict(zip(self._summed_stores() if shared else [], shared or [], strict=True))
        for index, store in enumerate(self.stores):
            pieces = []  # rows [K], records, grads [K, d]
            if lookups[0].slots[index] is not None:
                pieces.append(self._copies(store, [lookup.slots[index] for lookup in lookups], scale, by_store.get(index)))
                if self.plan is not None and index not in by_store:
                    # alone, so that copies stay the same bits everywhere: beside other rows duplicates could be added up in another order
                    store.update(*pieces.pop(), neg_lr)
            bags = [(lookup.bags[index].bags, lookup.bags[index].sums.grad) for lookup in lookups if lookup.bags[index] is not None]
            for lookup, grads in zip(lookups, served, strict=False):
                read = lookup.exchanged.served[index]
                if isinstance(read, Bags):
                    bags.append((read, grads[index].flatten(0, 1)))
                elif read is not None:
                    grads_read = self.exchange.slot_gradients(index, read, grads[index])
                    pieces.append((read.rows, read.records, grads_read if scale == 1.0 else grads_read * scale))
            if pieces:
                rows, records, grads = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
                store.update(rows, records, grads, neg_lr)
            if bags:
                grads = bags[0][1] if len(bags) == 1 else torch.cat([grad for _, grad in bags])
                store.update_bags(join([read for read, _ in bags]), grads if scale == 1.0 else grads * scale, neg_lr)

    def _copies(self, store: RowStore, reads: list[SlotRead], scale: float, summed: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """What to update of the rows that this rank has looked up in its own store: on several ranks the same on each."""
        if summed is not None:
            rows = count_up(summed.shape[0], self.layout.index_dtype, summed.device)
            return rows, store.read(rows), summed
        rows, records, grads = _joined(reads, scale)
        if self.plan is None:
            return rows, records, grads
        rows = self.collectives.all_gather(rows.to(torch.int32)).to(self.layout.index_dtype)
        return rows, store.read(rows), self.collectives.all_gather(grads)

    def _summed_stores(self) -> list[int]:
        return [store for store in range(len(self.stores)) if self.plan.replicated(store) and self.plan.sums_densely(store)]

    def _reads_bags(self, run: Run, bag_weights: Tensor | None) -> bool:
        """Sum bags as they are read? Where shapes may depend on the data it is the faster way for all but plain additions to single rows:
        26 tables of width 16, batch 2048, SGD, popular ids: 1.01 ms with slots, 1.17 with bags (one core)."""
        several = run.hotness > 1 or bag_weights is not None or self.rule.sums_duplicates
        return self.plan is None and self.layout.ragged and several and self.tables[run.tables[0]].pools_before_combine

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
            f"{f', {size_text(rest)} of scratch and padding' if rest else ''}{' on this rank' if self.plan else ''}, layout {self.layout.name}"
        )

    @torch.no_grad()
    def materialize(self, table: int, ids: Tensor) -> Tensor:
        """ids [n] -> [n, D] float32: the vectors that one table has for them, on the device; no bag, no weight."""
        if self.plan is not None:
            raise ValueError("rows of this table may lie on other ranks")
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
                if self.plan is not None:  # other processors round otherwise, and an id must mean the same row everywhere
                    self._as_on_rank_0([*(value for part in own for value in part.values()), *table.buffers()])
        if changed:
            for store, of_store in zip(self.stores, buffers, strict=True):
                store.load(of_store)
        return changed

    def _as_on_rank_0(self, tensors: list[Tensor]) -> None:
        """In place, each [n, ...] or 0-D."""
        for value in tensors:
            given = value.reshape(-1).contiguous().to(self.stores[0].data.device)
            value.copy_(self.collectives.all_gather(given)[: value.nelement()].to(value.device).view(value.shape))

    def part_rows(self, segment: Segment) -> Tensor:
        """[num_rows, d] float32: the rows of one part, in the host's memory; on a CPU a view."""
        return self.stores[segment.store].weight()[segment.start : segment.start + segment.num_rows]

    def _of_run(self, index: int, run: Run, columns: Tensor) -> Tensor:
        """[B, S] -> [B, R * H]: the slots of one run."""
        return columns[:, run.slots] if isinstance(run.slots, slice) else columns.index_select(1, getattr(self, f"slots{index}"))

    def _run_rows(self, index: int, run: Run, ids: Tensor):
        """ids [B, R * H] of one run -> (segment, rows [B, k]) for each part: rows of its store, or of the part itself where other ranks hold it."""
        table = self.tables[run.tables[0]]
        segments = self.segments[run.tables[0]]
        if isinstance(table, PlainTable):
            yield segments[0], ids if run.summed or self.asked[index][0] is not None else ids + getattr(self, f"base{index}")
        else:
            for asked, segment, rows in zip(self.asked[index], segments, table.row_ids(ids), strict=True):
                yield segment, (rows if asked is not None else rows + segment.start).reshape(ids.shape[0], -1)

    def _bag_weights(self, index: int, run: Run, of_run: Tensor, weights: Tensor | None) -> Tensor | None:
        """[B, R, H]: what each slot's vector is multiplied by; None where that is 1. of_run: its ids [B, R * H]."""
        if run.summed and run.pooling == "sum":
            return None
        shape = (of_run.shape[0], len(run.tables), run.hotness)
        bag_weights = None if weights is None else self._of_run(index, run, weights).reshape(shape)
        if run.pooling == "mean" and run.hotness > 1:
            if bag_weights is None:
                bag_weights = torch.full(shape, 1 / run.hotness, device=of_run.device)
            else:
                bag_weights = bag_weights / (bag_weights != 0).sum(2, keepdim=True).clamp_(min=1)
        if self.v_W_l is not None:
            learned = self.v_W_l[run.tables[0]].index_select(0, of_run.reshape(-1)).view(shape)
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


def _to_meta(table: EmbeddingTable) -> None:
    """Large buffers become shapes: whoever traces a step puts placeholders there."""
    for module in table.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.nelement() > LARGE_BUFFER:
                setattr(module, name, buffer.to("meta"))


def _joined(reads: list[SlotRead], scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """rows [K], records and gradients times `scale` of one or more batches."""
    pieces = [(read.rows, read.records, read.leaf.grad) for read in reads]
    rows, records, grads = pieces[0] if len(pieces) == 1 else map(torch.cat, zip(*pieces, strict=True))
    return rows, records, grads if scale == 1.0 else grads * scale
