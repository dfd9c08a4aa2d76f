"""Which rank holds which rows: the plan that the exchange, checkpoints and reports read. planner.py makes one.

What is placed is a part of a table: rows of one width in a store (embeddings.Part). A plain table is one part and its bags are summed where the rows
are; of a compressed table the rows themselves travel and `combine` runs where the batch is. Every rank knows the whole plan, so who sends what
to whom is the same program everywhere; where rows lie in a rank's own store differs and enters as data (exchange.py).
"""

import itertools
from dataclasses import dataclass
from functools import cached_property

EVERYWHERE, SPLIT = -1, -2  # of Plan.where: a copy on every rank; an equal range of rows on each


@dataclass(frozen=True)
class TablePart:
    """A part of a table as the plan sees it.

    name        upstream's parameter name, "emb_l.3.weight"
    table       number of its table
    store       number of the store that holds rows of this width and codec
    num_rows, width
    row_bytes   of one row with its optimizer's state
    columns     row numbers that a row of the batch asks for: hotness x rows an id reads
    outputs     vectors that come back for them: 1 where the bag is summed by the owner, else `columns`
    pinned      it is to be on every rank: its table reorganizes itself between epochs
    """

    name: str
    table: int
    store: int
    num_rows: int
    width: int
    row_bytes: int
    columns: int
    outputs: int
    pinned: bool = False

    @property
    def num_bytes(self) -> int:
        return self.num_rows * self.row_bytes


@dataclass(frozen=True)
class Held:
    """Rows [first, first + num_rows) of part number `part`, which a rank holds from row `start` of its store on."""

    part: int
    first: int
    num_rows: int
    start: int


@dataclass(frozen=True)
class Plan:
    """
    world       ranks
    batch_size  rows of the global batch, a multiple of `world`
    parts       in the order of the tables and of their parts
    where       of each part the rank that holds it whole, EVERYWHERE or SPLIT
    """

    world: int
    batch_size: int
    parts: tuple[TablePart, ...]
    where: tuple[int, ...]

    @property
    def num_stores(self) -> int:
        return 1 + max((part.store for part in self.parts), default=-1)

    @cached_property
    def _placed(self) -> dict[tuple[int, int], list[int]]:
        """Numbers of the parts by store and place: asked for once a rank and store, and 1,000 parts on 64 ranks are no rarity."""
        found: dict[tuple[int, int], list[int]] = {}
        for n, (part, place) in enumerate(zip(self.parts, self.where, strict=True)):
            found.setdefault((part.store, place), []).append(n)
        return found

    def replicated(self, store: int) -> list[int]:
        """Numbers of the parts of a store that every rank holds."""
        return list(self._placed.get((store, EVERYWHERE), ()))

    def whole(self, store: int, rank: int) -> list[int]:
        """Numbers of the parts of a store that this rank alone holds."""
        return list(self._placed.get((store, rank), ()))

    def split(self, store: int) -> list[int]:
        """Numbers of the parts of a store whose rows are split over all ranks."""
        return list(self._placed.get((store, SPLIT), ()))

    def replicated_rows(self, store: int) -> int:
        return sum(self.parts[n].num_rows for n in self.replicated(store))

    def held(self, store: int, rank: int) -> list[Held]:
        """What a rank's store holds, in the order of its rows: the copies first, the same everywhere; then its own parts, then its ranges."""
        found, start = [], 0
        for n in (*self.replicated(store), *self.whole(store, rank), *self.split(store)):
            rows = self.parts[n].num_rows
            first, last = self.range_of(n, rank) if self.where[n] == SPLIT else (0, rows)
            found.append(Held(n, first, last - first, start))
            start += last - first
        return found

    def range_of(self, part: int, rank: int) -> tuple[int, int]:
        """The rows [first, last) of a split part that a rank holds: ceil(rows / world) each, the last ranks fewer."""
        rows = self.parts[part].num_rows
        share = -(-rows // self.world)
        return min(rank * share, rows), min((rank + 1) * share, rows)

    def rank_rows(self, store: int) -> list[int]:
        """Rows of the store that each rank holds, copies included."""
        change = [0] * (self.world + 2)  # of ranges, from one rank to the next: a range_of for each rank would be 20 times the work
        for n in self.split(store):
            share = -(-self.parts[n].num_rows // self.world)
            full, rest = divmod(self.parts[n].num_rows, share)
            change[0] += share
            change[full] += rest - share
            change[full + 1] -= rest
        copies, ranges = self.replicated_rows(store), itertools.accumulate(change[: self.world])
        return [copies + own + sum(self.parts[n].num_rows for n in self.whole(store, rank)) for rank, own in enumerate(ranges)]

    def store_rows(self, store: int) -> int:
        """Rows of the store on every rank: as many as the fullest needs, so that the program is the same everywhere. At least 1."""
        return max(1, *self.rank_rows(store))

    def columns(self, store: int) -> int:
        """Row numbers that a rank receives for each row of the batch: those of the rank with the most; the others' are padded."""
        whole = max(sum(self.parts[n].columns for n in self.whole(store, rank)) for rank in range(self.world))
        return whole + sum(self.parts[n].columns for n in self.split(store))

    def outputs(self, store: int) -> int:
        """Vectors that a rank sends back for each row of the batch, padded likewise."""
        whole = max(sum(self.parts[n].outputs for n in self.whole(store, rank)) for rank in range(self.world))
        return whole + sum(self.parts[n].outputs for n in self.split(store))

    def served(self, store: int, rank: int) -> list[int]:
        """Numbers of the parts for which a rank answers lookups of others."""
        return [*self.whole(store, rank), *self.split(store)]

    def sums_densely(self, store: int) -> bool:
        """How the copies of a store are kept equal: one all-reduce over gradients of all their rows, or an all-gather of those looked up. The
        first where there are at most as many rows as lookups."""
        looked_up = self.batch_size * sum(self.parts[n].columns for n in self.replicated(store))
        return self.replicated_rows(store) <= looked_up

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Of each store."""
        by_store = {part.store: part.width for part in self.parts}
        return tuple(by_store[store] for store in range(self.num_stores))

    @cached_property
    def row_bytes(self) -> tuple[int, ...]:
        """Of a row of each store with its optimizer's state: all parts of a store have the same width, codec and optimizer."""
        by_store = {part.store: part.row_bytes for part in self.parts}
        return tuple(by_store[store] for store in range(self.num_stores))

    def volumes(self, dense_parameters: int, batch_size: int | None = None) -> dict[str, int]:
        """Bytes that one rank hands to each collective in a training step (its own share included), as they stand in the compiled program.

        dense_parameters: numbers of the model's dense parameters;  batch_size: of a batch of other size than the plan was made for
        """
        batch = self.batch_size if batch_size is None else batch_size
        local = batch // self.world
        stores = range(self.num_stores)
        columns = sum(self.columns(store) for store in stores)
        vectors = sum(self.outputs(store) * self.widths[store] for store in stores)
        summed, numbers, gradients = dense_parameters + 1, 0, 0
        for store in stores:
            if self.sums_densely(store):
                summed += self.replicated_rows(store) * self.widths[store]
            else:
                looked_up = local * sum(self.parts[n].columns for n in self.replicated(store))
                numbers, gradients = numbers + looked_up, gradients + looked_up * self.widths[store]
        return {
            "ids, all-to-all": batch * columns * 4,
            "vectors, all-to-all": batch * vectors * 4,
            "gradients of vectors, all-to-all": batch * vectors * 4,
            "sums of gradients, all-reduce": summed * 4,
            "row numbers of copies, all-gather": numbers * 4,
            "gradients of copies, all-gather": gradients * 4,
        }
