"""Lookups of rows that other ranks hold: ids go to the owners, vectors come back, and gradients take the same way.

    ids [b, columns] --all-to-all--> [B, C] at the owner -> rows of its store -> bags summed [B, M, d] --all-to-all--> [b, outputs, d], a leaf
                                      its rows are updated <- gradients [B, M, d] <-----------------all-to-all------- its gradient

An owner sees the whole global batch (B = world x b rows, rank after rank), so that duplicates of a row are added up as on a single rank. Every rank
runs the same program: C and M are those of the rank with the most, and where a rank's rows lie is in buffers.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dlrm_xla.backends.collectives import Collectives
from dlrm_xla.layouts import Layout
from dlrm_xla.ops.bags import Bags
from dlrm_xla.sharding import SPLIT, Plan
from dlrm_xla.stores import RowStore


@dataclass
class ServedSlots:
    """Rows that this rank has read for all ranks: rows [B x C], records as read, and which of them are its own, [B, C, 1], None for all."""

    rows: Tensor
    records: Tensor
    found: Tensor | None


@dataclass
class ExchangeRead:
    """One batch's exchange. leaf: of each store [b, outputs, d] or None; served: what this rank read of its stores."""

    leaves: list[Tensor | None]
    served: list[ServedSlots | Bags | None]


class Exchange(nn.Module):
    """The exchange of one EmbeddingCollection.

    order    of each store, numbers of the plan's parts that are not everywhere, in the order in which their outputs are wanted
    sources  of each such part, the columns of `source` (see `lookup`) that it asks for, [columns]
    """

    def __init__(self, plan: Plan, collectives: Collectives, order: list[list[int]], sources: dict[int, list[int]], layout: Layout, rule):
        super().__init__()
        self.plan, self.collectives, self.order, self.layout, self.rule = plan, collectives, order, layout, rule
        self.used = [store for store in range(plan.num_stores) if order[store]]
        self.columns = [plan.columns(store) for store in self.used]
        self.outputs = [plan.outputs(store) for store in self.used]
        self.own_columns = [sum(plan.parts[n].columns for n in plan.served(store, collectives.rank)) for store in self.used]
        self.single = [all(plan.parts[n].columns == plan.parts[n].outputs for n in order[store]) for store in self.used]
        self.padded = [
            any(sum(plan.parts[n].columns for n in plan.served(store, rank)) < most for rank in range(plan.world))
            for store, most in zip(self.used, self.columns, strict=True)
        ]
        self.split = [any(plan.where[n] == SPLIT for n in order[store]) for store in self.used]
        self._keep("send", [column for rank in range(plan.world) for store in self.used for column in self._sent(store, rank, sources)], torch.int64)
        for i, store in enumerate(self.used):
            self._keep_owner(i, store)
            self._keep_places(i, store)

    def lookup(self, source: Tensor, stores: nn.ModuleList, padded_slots: bool) -> ExchangeRead:
        """source [b, columns of all sharded parts] int32: row numbers within parts, -1 for a slot that is padding (padded_slots: there are such)."""
        batch, world = source.shape[0], self.plan.world
        picked = source.index_select(1, self.send).view(batch, world, -1).transpose(0, 1)
        received = self.collectives.all_to_all(picked).reshape(world * batch, -1)  # [B, C]
        served: list[ServedSlots | Bags | None] = [None] * len(stores)
        vectors, start = [], 0
        for i, store in enumerate(self.used):
            ids = received[:, start : start + self.columns[i]]
            start += self.columns[i]
            served[store], vector = self._serve(i, stores[store], ids, padded_slots or self.split[i])
            vectors.append(vector.reshape(world, batch, -1))
        returned = self.collectives.all_to_all(vectors[0] if len(vectors) == 1 else torch.cat(vectors, 2))
        leaves: list[Tensor | None] = [None] * len(stores)
        for i, (store, piece) in enumerate(zip(self.used, returned.split([vector.shape[2] for vector in vectors], 2), strict=True)):
            by_owner = piece.view(world, batch, self.outputs[i], -1).transpose(0, 1).reshape(batch, world * self.outputs[i], -1)
            leaves[store] = self._arrange(i, by_owner).detach().requires_grad_()
        return ExchangeRead(leaves, served)

    @torch.no_grad()
    def gradients(self, read: ExchangeRead) -> list[Tensor | None]:
        """Of each store [B, M, d]: the gradients of what this rank served, after a backward pass on all ranks."""
        world, pieces = self.plan.world, []
        for i, store in enumerate(self.used):
            leaf = read.leaves[store]
            grads = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            batch, _, width = grads.shape
            padded = torch.nn.functional.pad(grads, (0, 0, 0, 1))  # a zero behind them, for outputs that are padding
            to_owner = padded.index_select(1, getattr(self, f"back{i}")).view(batch, world, self.outputs[i] * width)
            pieces.append(to_owner.transpose(0, 1))
        received = self.collectives.all_to_all(pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2))
        found: list[Tensor | None] = [None] * len(read.leaves)
        for i, (store, piece) in enumerate(zip(self.used, received.split([piece.shape[2] for piece in pieces], 2), strict=True)):
            found[store] = piece.reshape(piece.shape[0] * piece.shape[1], self.outputs[i], -1)
        return found

    def slot_gradients(self, store: int, served: ServedSlots, grads: Tensor) -> Tensor:
        """grads [B, M, d] -> [B x C, d], of the rows that were read."""
        i = self.used.index(store)
        of_columns = grads if self.single[i] else grads.index_select(1, getattr(self, f"bag{i}"))
        if served.found is not None:
            of_columns = torch.where(served.found, of_columns, 0)
        return of_columns.reshape(-1, grads.shape[2])

    def _serve(self, i: int, store: RowStore, ids: Tensor, masked: bool) -> tuple[ServedSlots | Bags, Tensor]:
        """ids [B, C] -> what was read, and vectors [B, M, d]."""
        low, high, shift = (getattr(self, f"{name}{i}") for name in ("low", "high", "shift"))
        several = not self.single[i]
        ids = ids.to(self.layout.index_dtype)
        if self.layout.ragged and store.reads_bags and (several or masked or self.rule.sums_duplicates):
            bags = self._bags(i, ids[:, : self.own_columns[i]], masked)
            return bags, store.bag_sum(bags).view(ids.shape[0], self.outputs[i], -1)
        found = None
        rows = ids + shift
        if masked or self.padded[i]:
            found = (ids >= low) & (ids < high)
            rows = torch.where(found, rows, 0)
            found = found[:, :, None]
        rows = rows.reshape(-1)
        records = store.read(rows)
        vectors = store.weights(records).view(*ids.shape, -1)
        if found is not None:
            vectors = torch.where(found, vectors, 0)
        if several:  # a product with zeros and ones instead of a scatter: which columns form a bag differs by rank, so it is data
            vectors = torch.matmul(getattr(self, f"sum{i}"), vectors)
        return ServedSlots(rows, records, found), vectors

    def _bags(self, i: int, ids: Tensor, masked: bool) -> Bags:
        """ids [B, own columns] -> B x M bags of rows. Only where shapes may depend on the data."""
        batch, columns = ids.shape
        low, high, shift, bag = (getattr(self, f"{name}{i}")[:columns] for name in ("low", "high", "shift", "bag"))
        rows = (ids + shift).reshape(-1)
        bag_of = (torch.arange(batch, device=ids.device)[:, None] * self.outputs[i] + bag).reshape(-1)
        if masked:
            kept = ((ids >= low) & (ids < high)).reshape(-1).nonzero().squeeze(1)
            rows, bag_of = rows.index_select(0, kept), bag_of.index_select(0, kept)
        starts = rows.new_zeros(batch * self.outputs[i] + 1)
        torch.cumsum(torch.bincount(bag_of, minlength=batch * self.outputs[i]), 0, out=starts[1:])
        return Bags(rows, bag_of, starts, None)

    def _arrange(self, i: int, by_owner: Tensor) -> Tensor:
        """[b, world x M, d], owner after owner -> [b, outputs, d] in `order`; a split part's is the sum of all ranks'."""
        if not self.split[i]:
            return by_owner.index_select(1, getattr(self, f"whole{i}"))
        batch, _, width = by_owner.shape
        parts = by_owner.index_select(1, getattr(self, f"split{i}")).view(batch, -1, self.plan.world, width).sum(2)
        both = torch.cat([by_owner.index_select(1, getattr(self, f"whole{i}")), parts], 1)
        return both.index_select(1, getattr(self, f"mixed{i}"))

    def _sent(self, store: int, rank: int, sources: dict[int, list[int]]) -> list[int]:
        """The columns of `source` that go to a rank, padded with column 0."""
        columns = [column for n in self.plan.served(store, rank) for column in sources[n]]
        return columns + [0] * (self.plan.columns(store) - len(columns))

    def _keep(self, name: str, values: list, dtype: torch.dtype) -> None:
        self.register_buffer(name, torch.tensor(values, dtype=dtype), persistent=False)

    def _keep_owner(self, i: int, store: int) -> None:
        """What this rank does with each column [C] that it receives: rows low <= id < high are its own, at id + shift; bag: their output."""
        plan, rank = self.plan, self.collectives.rank
        held = {one.part: one for one in plan.held(store, rank)}
        low, high, shift, bag = [], [], [], []
        outputs = 0
        for n in plan.served(store, rank):
            one, part = held[n], plan.parts[n]
            low += [one.first] * part.columns
            high += [one.first + one.num_rows] * part.columns
            shift += [one.start - one.first] * part.columns
            bag += [outputs + column * part.outputs // part.columns for column in range(part.columns)]
            outputs += part.outputs
        missing = self.columns[i] - len(low)
        for name, values in (("low", low), ("high", high), ("shift", shift)):
            self._keep(f"{name}{i}", values + [0] * missing, self.layout.index_dtype)
        if not self.single[i] or self.layout.ragged:
            self._keep(f"bag{i}", bag + [0] * missing, torch.int64)
        if not self.single[i]:
            sums = torch.zeros(self.outputs[i], self.columns[i])
            sums[bag, range(len(bag))] = 1
            self.register_buffer(f"sum{i}", sums, persistent=False)

    def _keep_places(self, i: int, store: int) -> None:
        """Where outputs lie among [world x M] that come back (`whole`, `split`, `mixed`), and what goes to which owner's output (`back`)."""
        plan, most = self.plan, self.outputs[i]
        first: dict[tuple[int, int], int] = {}  # (part, rank) -> its first output there
        for rank in range(plan.world):
            outputs = 0
            for n in plan.served(store, rank):
                first[n, rank] = rank * most + outputs
                outputs += plan.parts[n].outputs
        whole, split, kinds = [], [], []
        num_outputs = sum(plan.parts[n].outputs for n in self.order[store])
        back = [num_outputs] * (plan.world * most)
        number = 0
        for n in self.order[store]:
            ranks = range(plan.world) if plan.where[n] == SPLIT else [plan.where[n]]
            for output in range(plan.parts[n].outputs):
                places = [first[n, rank] + output for rank in ranks]
                for place in places:
                    back[place] = number
                number += 1
                kinds.append(plan.where[n] == SPLIT)
                if kinds[-1]:
                    split += places
                else:
                    whole += places
        self._keep(f"back{i}", back, torch.int64)
        self._keep(f"whole{i}", whole, torch.int64)
        if self.split[i]:
            self._keep(f"split{i}", split, torch.int64)
            next_of = [0, len(whole)]
            mixed = []
            for is_split in kinds:
                mixed.append(next_of[is_split])
                next_of[is_split] += 1
            self._keep(f"mixed{i}", mixed, torch.int64)
