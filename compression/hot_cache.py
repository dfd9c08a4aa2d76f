"""Rows of their own for the hottest ids of a compressed table, written back when they leave: no update is lost.

A cached id reads its own row, which the row optimizer trains, instead of the compressed value. Its row starts as that value, `loaded`. When the id
leaves, what it has learnt, row - loaded, goes into the compressed parameters by the chain rule (the table's `fold`); rows that stay keep their
value. TT-Rec (Yin et al., MLSys 2021) caches decompressed rows of a tensor train; its code drops what a row that leaves has learnt.

Which ids are hot is counted on the host, as they pass, in memory that depends on the cache and not on the table: of all ids that were ever
counted the most frequent KEEP for each cached one are remembered (cf. Manku, Motwani, "Approximate Frequency Counts over Data Streams", VLDB
2002). After each epoch the counts are halved, so that what was hot once cools down.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from compression.hot_ids import HotIds, hot_ids_bytes, num_buckets

KEEP, LEAST_KEPT = 16, 1 << 16  # ids counted: for each cached one, and at least
WAITING = 1 << 20  # ids gathered before they are counted: a sort of so many takes 0.1 s
AGEING = 0.5


class HotCache(nn.Module):
    """Room for `capacity` ids of a table of dimension `dim`. ids: where they lie;  loaded [num_slots, dim]: the rows as they came in."""

    kind = "rows"

    def __init__(self, capacity: int, dim: int):
        super().__init__()
        self.ids = HotIds(capacity)
        self.num_slots = self.ids.num_slots
        self.register_buffer("loaded", torch.zeros(self.num_slots, dim))
        self.counted, self.counts = np.zeros(0, np.int64), np.zeros(0, np.float64)
        self.waiting: list[np.ndarray] = []

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids that lie here [n] and their slots [n], int64, in the order of the slots."""
        keys = self.ids.keys.cpu().numpy().reshape(-1)
        slots = np.flatnonzero(keys >= 0)
        return keys[slots].astype(np.int64), slots

    def count(self, ids: np.ndarray) -> None:
        self.waiting.append(np.asarray(ids).reshape(-1).astype(np.int64))
        if sum(map(len, self.waiting)) >= WAITING:
            self._settle()

    def wanted(self) -> np.ndarray:
        """The hottest ids so far, at most `capacity`, and ages the counts."""
        self._settle()
        best = self.counted[_largest(self.counts, self.ids.capacity)]
        self.counts *= AGEING
        return best

    @torch.no_grad()
    def refresh(self, rows: Tensor, wanted: np.ndarray, values: Callable[[np.ndarray], Tensor], fold: Callable[[np.ndarray, Tensor], None]) -> bool:
        """`wanted` [n] take the place of what was here. rows [num_slots, dim]: on the host, changed in place. True where anything changed.

        values  ids [n] -> [n, dim] of the compressed table;  fold: (ids [n], deltas [n, dim]) into it
        """
        old, old_slots = self.held()
        if np.array_equal(np.sort(old), np.sort(wanted)):
            return False
        loaded = self.loaded.detach().cpu().clone()
        stays = np.isin(old, wanted)
        gone, gone_slots = old[~stays], old_slots[~stays]
        if len(gone):
            fold(gone, rows[gone_slots] - loaded[gone_slots])
        kept, kept_slots = old[stays], old_slots[stays]
        kept_rows, kept_loaded = rows[kept_slots].clone(), loaded[kept_slots].clone()
        new = wanted[~np.isin(wanted, old)]
        slots = dict(zip(wanted.tolist(), self.ids.put(wanted).tolist(), strict=True))
        rows.zero_()
        loaded.zero_()
        for ids, of_rows, of_loaded in ((kept, kept_rows, kept_loaded), (new, *2 * (values(new),))):
            places = [slots[number] for number in ids.tolist()]
            rows[places], loaded[places] = of_rows.to(rows.dtype), of_loaded.to(loaded.dtype)
        self.loaded.copy_(loaded)
        return True

    def _settle(self) -> None:
        """Counts the ids that wait."""
        if not self.waiting:
            return
        ids, counts = np.unique(np.concatenate(self.waiting), return_counts=True)
        self.waiting = []
        both = np.concatenate([self.counted, ids])
        self.counted, place = np.unique(both, return_inverse=True)
        self.counts = np.bincount(place, np.concatenate([self.counts, counts.astype(np.float64)]), len(self.counted))
        most = max(KEEP * self.ids.capacity, LEAST_KEPT)
        if len(self.counted) > most:
            keep = np.sort(_largest(self.counts, most))
            self.counted, self.counts = self.counted[keep], self.counts[keep]


def hot_cache_bytes(capacity: int, dim: int) -> int:
    """Of the rows, what they were loaded as, and where the ids lie."""
    return 2 * 4 * dim * 4 * num_buckets(capacity) + hot_ids_bytes(capacity)


def most_frequent(counts: np.ndarray, capacity: int) -> np.ndarray:
    """counts [N] -> the ids with the largest counts above zero, at most `capacity`."""
    best = _largest(counts, capacity)
    return best[counts[best] > 0]


def _largest(counts: np.ndarray, number: int) -> np.ndarray:
    """Places of the `number` largest, largest first; of equal ones the first."""
    if len(counts) <= number:
        return np.argsort(-counts, kind="stable")
    least = np.partition(counts, len(counts) - number)[len(counts) - number]
    above, equal = np.flatnonzero(counts > least), np.flatnonzero(counts == least)
    return np.concatenate([above[np.argsort(-counts[above], kind="stable")], equal[: number - len(above)]])
