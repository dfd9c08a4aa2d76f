"""Rows wanted from a store by many tables, collected and read by one operator: slots of static shape, or bags that are summed as they are read."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dlrm_xla.ops.bags import Bags, join, pack
from dlrm_xla.stores import RowStore


@dataclass
class SlotRead:
    """Rows of a store read into static slots: rows [K], records [K, record_width] as read, and their weights [K, d], an autograd leaf."""

    rows: Tensor
    records: Tensor
    leaf: Tensor


@dataclass
class BagRead:
    """Rows of a store summed bag by bag as they are read (ops/bags.py): sums [M, d], whose gradient is every row's times its weight."""

    bags: Bags
    sums: Tensor


class Columns:
    """Slots wanted from one store: run after run, each a few columns [B, k] of row numbers. One gather reads them all."""

    def __init__(self):
        self.pieces: list[Tensor] = []
        self.width = 0

    def add(self, rows: Tensor) -> tuple[int, int]:
        place = (self.width, rows.shape[1])
        self.pieces.append(rows)
        self.width += rows.shape[1]
        return place

    def read(self, store: RowStore) -> SlotRead | None:
        if not self.pieces:
            return None
        rows = (self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=1)).reshape(-1)
        records = store.read(rows)
        self.leaf = store.weights(records).detach().requires_grad_()
        return SlotRead(rows, records, self.leaf)

    def values(self, place: tuple[int, int], batch: int, tables: int) -> Tensor:
        """[B, k, d]."""
        return self.leaf.reshape(batch, -1, self.leaf.shape[1]).narrow(1, *place)


class BagColumns:
    """Bags wanted from one store, run after run. One operator sums them all."""

    def __init__(self):
        self.pieces: list[Bags] = []
        self.count = 0

    def add(self, rows: Tensor, filled: Tensor | None, weights: Tensor | None, hotness: int) -> tuple[int, int]:
        bags = pack(rows.reshape(-1, hotness), None if filled is None else filled.reshape(-1, hotness), weights)
        place = (self.count, bags.num_bags)
        self.pieces.append(bags)
        self.count += bags.num_bags
        return place

    def read(self, store: RowStore) -> BagRead | None:
        if not self.pieces:
            return None
        bags = join(self.pieces)
        self.sums = store.bag_sum(bags)
        if self.sums.requires_grad:  # through learned pooling weights
            self.sums.retain_grad()
        else:
            self.sums.requires_grad_()
        return BagRead(bags, self.sums)

    def values(self, place: tuple[int, int], batch: int, tables: int) -> Tensor:
        """[B, R, d]."""
        return self.sums.narrow(0, *place).view(batch, tables, -1)
