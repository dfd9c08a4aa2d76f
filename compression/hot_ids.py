"""Where a few chosen ids have a place of their own: a map id -> slot that a lookup can ask with static shapes, without sorting or searching.

Two-choice cuckoo hashing in buckets of four (Dietzfelbinger, Weidling, "Balanced allocation and dictionaries with tightly packed constant size
bins", ICALP 2005): an id lies in one of two buckets, so a lookup reads 2 x 4 keys whatever the number of ids. Such a table can be filled up to
98 %; this one is filled up to 95 %. 4.2 bytes an id, where an array with a place for each id of a table takes 4 bytes for every id there is.
"""

import numpy as np
import torch
from torch import Tensor, nn

from compression.hashes import Hashes, draw_seeds
from dlrm_xla.ops.rows import count_up

KEYS = 4  # of a bucket
MOST_LOAD = 0.95
ROUNDS, TRIES = 2000, 20


class HotIds(nn.Module):
    """Room for `capacity` ids.

    num_slots  4 x buckets, at least the capacity: slots are numbers below it
    keys       int32 [buckets, 4], -1 where nothing lies
    """

    kind = "pointers"

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.buckets = capacity, num_buckets(capacity)
        self.num_slots = self.buckets * KEYS
        self.register_buffer("keys", torch.full((self.buckets, KEYS), -1, dtype=torch.int32))
        self.hashes = Hashes(2, np.random.RandomState(0))  # which functions does not matter: `put` draws others where these do not do

    def find(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """ids [...] -> (whether it lies here [...] bool, its slot [...] in the type of ids; 0 where it does not)."""
        found, slot = None, None
        lanes = count_up(KEYS, ids.dtype, ids.device)
        for bucket in self._choices(ids, self.hashes):
            keys = self.keys.index_select(0, bucket.reshape(-1)).view(*ids.shape, KEYS)
            mine = keys == ids[..., None]
            place = torch.where(mine, bucket[..., None] * KEYS + lanes, 0).sum(-1, dtype=ids.dtype)
            # an id lies in one bucket only; where both choices are the same, the first has it
            slot = place if slot is None else torch.where(found, slot, place)
            found = mine.any(-1) if found is None else found | mine.any(-1)
        return found, slot

    @torch.no_grad()
    def put(self, ids: np.ndarray) -> np.ndarray:
        """ids [n], different ones, n at most `capacity` -> their slots [n] int64. They take the place of all that was here. On the host."""
        ids = np.asarray(ids, np.int64)
        if len(ids) > self.capacity:
            raise ValueError(f"{len(ids)} ids do not go into {self.capacity} places")
        hashes, wanted = Hashes(2, np.random.RandomState(0)), torch.from_numpy(ids)
        for attempt in range(TRIES):
            hashes.seeds.copy_(draw_seeds(2, np.random.RandomState(attempt)))
            first, second = (choice.numpy() for choice in self._choices(wanted, hashes))
            owners = _allocate(first, second, self.buckets, np.random.RandomState(attempt))
            if owners is not None:
                break
        else:
            raise RuntimeError(f"{len(ids)} ids found no place in {self.buckets} buckets in {TRIES} tries; are some of them equal?")
        taken = np.flatnonzero(owners >= 0)
        slots, keys = np.zeros(len(ids), np.int64), np.full(self.num_slots, -1, np.int32)
        slots[owners[taken]], keys[taken] = taken, ids[owners[taken]]
        self.hashes.seeds.copy_(hashes.seeds)
        self.keys.copy_(torch.from_numpy(keys).view(self.buckets, KEYS))
        return slots

    def _choices(self, ids: Tensor, hashes: Hashes) -> tuple[Tensor, Tensor]:
        """The two buckets of each id, [...]; different ones where there are two."""
        first = hashes.row(ids, 0, self.buckets)
        step = hashes.row(ids, 1, max(self.buckets - 1, 1)) + 1
        return first, torch.fmod(first + step, self.buckets)


def num_buckets(capacity: int) -> int:
    return max(1, -(-capacity // KEYS), int(np.ceil(capacity / (KEYS * MOST_LOAD))))


def hot_ids_bytes(capacity: int) -> int:
    """Of the buffers of HotIds(capacity)."""
    return num_buckets(capacity) * KEYS * 4 + 2 * 8


def _allocate(first: np.ndarray, second: np.ndarray, buckets: int, rng: np.random.RandomState) -> np.ndarray | None:
    """The two buckets of each id [n] -> which of the n lies in each slot [buckets * 4], -1 for none; None where it does not work out.

    In a round every waiting id names the emptier of its buckets, or either where both are full; one id for each bucket that was named moves
    in, and who it drives out waits again. A million ids take 0.4 s.
    """
    owners = np.full((buckets, KEYS), -1, np.int64)
    filled = np.zeros(buckets, np.int64)
    winner = np.zeros(buckets, np.int64)
    waiting = np.arange(len(first))
    for _ in range(ROUNDS):
        if not len(waiting):
            return owners.reshape(-1)
        one, other = first[waiting], second[waiting]
        leans = np.where(filled[one] == filled[other], rng.randint(0, 2, len(waiting)) == 1, filled[other] < filled[one])
        bucket = np.where(leans, other, one)
        winner[bucket] = np.arange(len(waiting))
        moves = winner[bucket] == np.arange(len(waiting))
        moving, into = waiting[moves], bucket[moves]
        full = filled[into] == KEYS
        place = np.where(full, rng.randint(0, KEYS, len(into)), filled[into] % KEYS)  # a bucket fills up from its first slot
        driven_out = owners[into, place][full]
        owners[into, place] = moving
        filled[into[~full]] += 1
        waiting = np.concatenate([waiting[~moves], driven_out])
    return None
