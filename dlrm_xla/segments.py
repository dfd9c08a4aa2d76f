"""Where the parts of tables lie in stores, on one rank or as a plan has them, and which tables one operator serves."""

from dataclasses import dataclass

import torch

from dlrm_xla.batch import slot_starts
from dlrm_xla.quantized_store import QuantizedStore
from dlrm_xla.sharding import EVERYWHERE, Plan, TablePart
from dlrm_xla.specs import UserError
from dlrm_xla.stores import RowStore
from dlrm_xla.tables import EmbeddingTable, PlainTable

STORES = {"float32": RowStore, "int8": QuantizedStore}  # by the codec of their rows


@dataclass(frozen=True)
class Segment:
    """Where a part of a table lies: rows [start, start + num_rows) of a store are rows [first, first + num_rows) of its `total`. On one rank that is
    the whole part; on several it may be a part of it, or nothing."""

    name: str  # upstream's parameter name
    store: int
    start: int
    num_rows: int
    first: int
    total: int


@dataclass(frozen=True)
class Run:
    """Tables that one operator serves: plain ones of equal hotness and pooling, or a single other one.

    slots   their columns of a batch's ids, in order: a slice where they are neighbours
    summed  of plain tables that other ranks hold: bags come summed, so their hotness may differ
    """

    tables: tuple[int, ...]
    hotness: int
    pooling: str
    slots: slice | tuple[int, ...]
    summed: bool = False


def stores_of(tables: list[EmbeddingTable]) -> list[tuple[int, str]]:
    """(width, codec) of each store, in the order of their numbers."""
    return list(dict.fromkeys((part.width, part.codec) for table in tables for part in table.parts.values()))


def segments_of(tables: list[EmbeddingTable], kinds: list[tuple[int, str]]) -> tuple[list[tuple[Segment, ...]], list[int]]:
    """Where every part of every table lies on a single rank, and the rows of each store."""
    sizes = [0] * len(kinds)
    segments = []
    for table in tables:
        of_table = []
        for name, part in table.parts.items():
            store = kinds.index((part.width, part.codec))
            of_table.append(Segment(f"{table.spec.name}.{name}", store, sizes[store], part.num_rows, 0, part.num_rows))
            sizes[store] += part.num_rows
        segments.append(tuple(of_table))
    return segments, sizes


def planned_segments(tables: list[EmbeddingTable], plan: Plan, rank: int) -> tuple[list[tuple[Segment, ...]], list[int]]:
    """The same on one of several ranks."""
    held = {one.part: one for store in range(plan.num_stores) for one in plan.held(store, rank)}
    segments, number = [], 0
    for table in tables:
        of_table = []
        for name in table.parts:
            part, one = plan.parts[number], held.get(number)
            here = (one.start, one.num_rows, one.first) if one is not None else (0, 0, 0)
            of_table.append(Segment(f"{table.spec.name}.{name}", part.store, *here, part.num_rows))
            number += 1
        segments.append(tuple(of_table))
    return segments, [plan.store_rows(store) for store in range(plan.num_stores)]


def table_parts(tables: list[EmbeddingTable], rule, weighted_pooling: str | None, world: int) -> list[TablePart]:
    """The parts of all tables as a plan places them (sharding.py). UserError for a table that several ranks cannot train."""
    kinds, found = stores_of(tables), []
    for index, table in enumerate(tables):
        if table.observes and world > 1:
            raise UserError(
                f"table {table.spec.name}: its method counts the ids of training, of which each rank sees a part; train it on one rank, "
                "or take a method or knobs that do not count"
            )
        rows_an_id = [rows[0].nelement() for rows in table.row_ids(torch.zeros(1, dtype=torch.int64))]
        summed = table.pools_before_combine and weighted_pooling != "learned"
        pinned = type(table).reorganize is not EmbeddingTable.reorganize
        for (name, part), count in zip(table.parts.items(), rows_an_id, strict=True):
            columns = table.spec.hotness * count
            row_bytes = STORES[part.codec].row_bytes(part.width, rule)
            store = kinds.index((part.width, part.codec))
            outputs = 1 if summed else columns
            found.append(TablePart(f"{table.spec.name}.{name}", index, store, part.num_rows, part.width, row_bytes, columns, outputs, pinned))
    return found


def elsewhere_of(part_names: list[tuple[str, ...]], plan: Plan | None) -> list[list[int | None]]:
    """Of each table and part its number in the plan; None where every rank has it."""
    found, number = [], 0
    for names in part_names:
        numbers = range(number, number + len(names))
        found.append([None if plan is None or plan.where[n] == EVERYWHERE else n for n in numbers])
        number += len(names)
    return found


def runs_of(tables: list[EmbeddingTable], learned: bool, elsewhere: list[list[int | None]], anywhere: bool) -> list[Run]:
    """Plain tables of equal hotness and pooling form one run: neighbours, or `anywhere` in the list, where some of them lie on other ranks and
    would break up the runs of the rest. Of tables whose bags come summed the hotness does not matter."""
    groups: list[tuple[tuple | None, list[int]]] = []
    for index, (table, numbers) in enumerate(zip(tables, elsewhere, strict=True)):
        spec, there = table.spec, any(number is not None for number in numbers)
        key = None
        if isinstance(table, PlainTable) and not learned:
            key = (there, 0 if there and spec.pooling == "sum" else spec.hotness, spec.pooling)
        mine = [group for other, group in (groups if anywhere else groups[-1:]) if key is not None and other == key]
        if mine:
            mine[0].append(index)
        else:
            groups.append((key, [index]))
    starts, runs = slot_starts([table.spec.hotness for table in tables]), []
    for key, group in groups:
        columns = [column for t in group for column in range(int(starts[t]), int(starts[t + 1]))]
        neighbours = columns == list(range(columns[0], columns[-1] + 1))
        slots = slice(columns[0], columns[-1] + 1) if neighbours else tuple(columns)
        spec = tables[group[0]].spec
        runs.append(Run(tuple(group), spec.hotness, spec.pooling, slots, summed=key is not None and key[0]))
    return runs
