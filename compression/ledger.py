"""What every table costs, to the byte: parameters, codes, pointers, seeds, optimizer state, and the padding of a TPU's tiles.

A ratio that is printed anywhere is `ratio` of a ledger. Its bytes are those of the tensors in a checkpoint (tests/test_methods.py), and, with the
padding, those of the arguments of the compiled program (tests/test_methods_tpu.py).
"""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor, nn

from compression.method import PLAIN
from compression.registry import num_bytes
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import LANES
from dlrm_xla.specs import size_text

KINDS = ("parameters", "codes", "pointers", "seeds", "state", "padding")
SUBLANES = 8
LEDGER_FILE = "ledger.json"


@dataclass(frozen=True)
class Entry:
    """One table.

    plain       bytes of the plain float32 table
    parameters  rows and dense parameters;  codes: of quantization and clustering;  pointers: from ids to rows;  seeds: of hashes and fixed matrices
    state       of the optimizer, and where duplicates are found with a scratch, that
    padding     of tiles, for dense parameters and buffers; what rows are padded by is in `shared` of the ledger
    """

    table: str
    method: str
    rows: int
    dim: int
    plain: int
    parameters: int = 0
    codes: int = 0
    pointers: int = 0
    seeds: int = 0
    state: int = 0
    padding: int = 0

    @property
    def stored(self) -> int:
        """What a checkpoint holds of it without the optimizer's state."""
        return self.parameters + self.codes + self.pointers + self.seeds

    @property
    def total(self) -> int:
        return self.stored + self.state + self.padding


@dataclass(frozen=True)
class Ledger:
    """entries: of the tables, wherever their rows are; shared: padding of the buffers here that tables lie in together, and clocks of rounding."""

    entries: tuple[Entry, ...]
    shared: int

    @property
    def stored(self) -> int:
        return sum(entry.stored for entry in self.entries)

    @property
    def plain(self) -> int:
        return sum(entry.plain for entry in self.entries)

    @property
    def ratio(self) -> float:
        """Bytes of plain tables to bytes of these, without optimizer state and padding."""
        return self.plain / self.stored

    @property
    def total(self) -> int:
        return sum(entry.total for entry in self.entries) + self.shared

    def to_json(self) -> dict:
        tables = [{**asdict(entry), "stored": entry.stored, "total": entry.total} for entry in self.entries]
        return {"tables": tables, "plain": self.plain, "stored": self.stored, "ratio": self.ratio, "shared": self.shared, "total": self.total}


def ledger(tables: EmbeddingCollection, dense_state: Callable[[nn.Parameter], dict[str, Tensor]], tiles: bool) -> Ledger:
    """dense_state: what the optimizer keeps for a parameter;  tiles: count the padding of a TPU's tiles."""
    entries, in_stores = [], 0
    for table, segments in zip(tables.tables, tables.segments, strict=True):
        sums = dict.fromkeys(KINDS, 0)
        for segment in segments:
            store = tables.stores[segment.store]
            numbers = [store.numbers(name) for name, _ in store.named_buffers() if name != "clock"]
            weights, others = (sum(kind) * 4 // store.num_rows for kind in zip(*numbers, strict=True))  # of a row
            sums["parameters"] += weights * segment.total
            sums["state"] += others * segment.total
            in_stores += (weights + others) * segment.num_rows
        for parameter in table.parameters():
            for kind, tensor in (("parameters", parameter), *(("state", value) for value in dense_state(parameter).values())):
                _add(sums, kind, tensor, tiles)
        for module in table.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    _add(sums, getattr(module, "kind", "codes"), buffer, tiles)
        spec, choice = table.spec, table.made_by or PLAIN
        entries.append(Entry(spec.name, choice.method, spec.num_embeddings, spec.embedding_dim, num_bytes(spec, PLAIN), **sums))
    buffers = [buffer for store in tables.stores for _, buffer in store.named_buffers()]
    held = sum(_tile_bytes(buffer) if tiles else buffer.nelement() * buffer.element_size() for buffer in buffers)
    return Ledger(tuple(entries), held - in_stores)


def write_ledger(folder: Path, trainer) -> None:
    """LEDGER_FILE of a run's folder: every table's bytes, without a TPU's padding."""
    states = {id(parameter): state for parameter, state in zip(trainer.dense.parameters, trainer.dense.state, strict=True)}
    found = ledger(trainer.tables, lambda parameter: states[id(parameter)], tiles=False)
    beside = folder / f".{LEDGER_FILE}.tmp"
    beside.write_text(json.dumps(found.to_json(), indent=1) + "\n", encoding="utf-8")
    beside.replace(folder / LEDGER_FILE)


def _add(sums: dict[str, int], kind: str, tensor: Tensor, tiles: bool) -> None:
    size = tensor.nelement() * tensor.element_size()
    sums[kind] += size
    if tiles:
        sums["padding"] += _tile_bytes(tensor) - size


def _tile_bytes(tensor: Tensor) -> int:
    """As the TPU compiler lays it out: its last two dimensions in tiles of 8 x 128 numbers of 32 bits, in the better of both orders."""
    return tensor.element_size() * padded_numbers(tuple(tensor.shape))


def padded_numbers(shape: tuple[int, ...]) -> int:
    """Numbers of 32 bits with the padding of tiles. One dimension: whole lines of 128, or of 1024 beyond that."""
    if not shape:
        return 1
    if len(shape) == 1:
        unit = LANES if shape[0] <= 1024 else 1024
        return -(-shape[0] // unit) * unit
    *outer, rows, columns = shape
    return math.prod(outer) * min(_tiled(rows, columns), _tiled(columns, rows))


def _tiled(sublanes: int, lanes: int) -> int:
    unit = min(SUBLANES, 1 << (sublanes - 1).bit_length())
    return -(-sublanes // unit) * unit * (-(-lanes // LANES) * LANES)


def lines(found: Ledger) -> list[str]:
    """A table for people: the largest tables first."""
    columns = ("table", "method", "rows", "plain", *KINDS, "ratio")
    rows = []
    for entry in sorted(found.entries, key=lambda entry: -entry.plain):
        sizes = (size_text(value) for value in (entry.plain, *(getattr(entry, kind) for kind in KINDS)))
        rows.append((entry.table, entry.method, f"{entry.rows:,}", *sizes, f"{entry.plain / entry.stored:.4g}x"))
    sums = [sum(getattr(entry, kind) for entry in found.entries) for kind in KINDS]
    rows.append(("all", "", "", size_text(found.plain), *(size_text(value) for value in sums), f"{found.ratio:.4g}x"))
    widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
    forms = [f"{{:{'<' if i < 2 else '>'}{width}}}" for i, width in enumerate(widths)]
    return ["  ".join(form.format(cell) for form, cell in zip(forms, row, strict=True)) for row in (columns, *rows)]
