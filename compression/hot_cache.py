"""Rows of their own for the hottest ids of a compressed table, written back when they leave: no update is lost.

A cached id reads its own row, which the row optimizer trains, instead of the compressed value. Its row starts as that value, `loaded`. When the id
leaves, what it has learnt, row - loaded, goes into the compressed parameters by the chain rule (the table's `fold`); rows that stay keep their
value. TT-Rec (Yin et al., MLSys 2021) caches decompressed rows of a tensor train; its code drops what a row that leaves has learnt.

Which ids are hot: hot_counts.py. After each epoch the counts are halved, so that what was hot once cools down.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from compression.hot_counts import HotCounts, hot_counts_bytes
from compression.hot_ids import HotIds, hot_ids_bytes, num_buckets
from dlrm_xla.specs import UserError


class HotCache(nn.Module):
    """Room for `capacity` of `num_ids` ids. ids: where they lie;  seen: how often ids are looked up;  loaded [num_slots, dim]: the rows as they
    came in.

    origin [num_slots] int64: after `refresh`, the slot where a row lay before, -1 for one that is new.
    """

    kind = "parameters"

    def __init__(self, capacity: int, dim: int, num_ids: int):
        super().__init__()
        self.ids = HotIds(capacity)
        self.num_slots = self.ids.num_slots
        self.register_buffer("loaded", torch.zeros(self.num_slots, dim))
        self.seen = HotCounts(capacity, num_ids)

    def held(self) -> tuple[np.ndarray, np.ndarray]:
        """The ids that lie here [n] and their slots [n], int64, in the order of the slots."""
        keys = self.ids.keys.cpu().numpy().reshape(-1)
        slots = np.flatnonzero(keys >= 0)
        return keys[slots].astype(np.int64), slots

    @torch.no_grad()
    def refresh(
        self, rows: Tensor, wanted: np.ndarray, values: Callable[[np.ndarray], Tensor], fold: Callable[[np.ndarray, Tensor], float | None]
    ) -> bool:
        """`wanted` [n] take the place of what was here. rows [num_slots, dim]: on the host, changed in place. True where anything changed.

        values  ids [n] -> [n, dim] of the compressed table;  fold: (ids [n], deltas [n, dim]) into it, the share that it took
        """
        old, old_slots = self.held()
        self.origin = np.arange(self.num_slots)
        if np.array_equal(np.sort(old), np.sort(wanted)):
            return False
        loaded = self.loaded.detach().cpu().clone()
        stays = np.isin(old, wanted)
        gone, gone_slots = old[~stays], old_slots[~stays]
        if len(gone):
            done = fold(gone, rows[gone_slots] - loaded[gone_slots])
            if done is not None and done < 1 - 1e-6:
                raise UserError(
                    f"tt:cache={self.ids.num_slots}: what {len(gone)} cached rows have learnt cannot be written back whole ({100 * done:.0f} % was); "
                    "a lower --learning-rate or a smaller cache may help"
                )
        kept, kept_slots = old[stays], old_slots[stays]
        kept_rows, kept_loaded = rows[kept_slots].clone(), loaded[kept_slots].clone()
        new = wanted[~np.isin(wanted, old)]
        slots = dict(zip(wanted.tolist(), self.ids.put(wanted).tolist(), strict=True))
        rows.zero_()
        loaded.zero_()
        self.origin = np.full(self.num_slots, -1)
        self.origin[[slots[number] for number in kept.tolist()]] = kept_slots
        for ids, of_rows, of_loaded in ((kept, kept_rows, kept_loaded), (new, *2 * (values(new),))):
            places = [slots[number] for number in ids.tolist()]
            rows[places], loaded[places] = of_rows.to(rows.dtype), of_loaded.to(loaded.dtype)
        self.loaded.copy_(loaded)
        return True


def hot_cache_bytes(capacity: int, dim: int, num_ids: int) -> int:
    """Of the rows, what they were loaded as, where the ids lie, and the counts."""
    return 2 * 4 * dim * 4 * num_buckets(capacity) + hot_ids_bytes(capacity) + hot_counts_bytes(capacity, num_ids)
