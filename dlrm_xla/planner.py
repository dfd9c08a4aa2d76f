"""Which rank holds which part of a table: --sharding. Whole numbers only and no drawing of lots, so that every machine makes the same plan.

What is weighed, for each rank:
bytes       of what it holds: rows with their optimizer's state, copies included. What it allocates (`padded_bytes`) is as much as the fullest
            rank needs in every store, because all ranks run one program.
lookups     rows that it finds for one global batch of B rows: B x columns for a part that it holds whole, B / world x columns for a copy and for
            its range of a split part, whose ids are taken to be spread evenly. All ranks together find B x columns of each part, however it is
            placed, so max / mean says how evenly the work is spread; this is what "imbalance of lookups" means.
gathered    rows that the program reads: the same, but B x columns for a range too, because a static shape must have room for all ids. The mean is
            larger and the difference between ranks the same, so its imbalance is never above that of the lookups.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from dlrm_xla.sharding import EVERYWHERE, SPLIT, Plan, TablePart
from dlrm_xla.specs import UserError, size_text

SHARDINGS = ("auto", "data", "table", "row", "hybrid")
# A byte between ranks takes the time of so many bytes of a rank's memory. Published figures: TPU v4 1,228 GB/s of memory to 300 between chips,
# v5e 819 to 200, v5p 2,765 to 600; H100 3,350 to 450 in each direction
WIRE = 5
EVEN, NEARLY = 1050, 1020  # per mille of max / mean: a plan up to 1.05 is even; up to 1.02 none is worse than another
UNEVEN = 2  # a plan that is not counts as UNEVEN x max / mean times what it moves
COPIES_SHARE, COPIES_BYTES = 10, 64 * 10**6  # copies may take a tenth of a rank's even share of all tables, and 64 MB in any case
UNIT = 10**9  # of shares, whole numbers
WORK = 500_000  # sets how many plans are compared: half a second
REFINED = 2  # candidates that are changed part by part, with and without the comparison to the greedy
MOST_EXCHANGED = 64  # parts, the largest, that may change places
MOST_WORLDS = 64  # tried for the advice where nothing fits


@dataclass(frozen=True)
class Load:
    """What one rank holds and does for a global batch, padding not counted.

    ids, vectors    numbers of 4 bytes that it receives and that it sends back, its own share included
    """

    bytes: int
    lookups: int
    gathered: int
    ids: int
    vectors: int


def loads(plan: Plan) -> list[Load]:
    """Of each rank."""
    batch, local = plan.batch_size, plan.batch_size // plan.world
    held, found, gathered, ids, vectors = ([0] * plan.world for _ in range(5))
    for store in range(plan.num_stores):
        copies = local * sum(plan.parts[n].columns for n in plan.replicated(store))
        split = [plan.parts[n] for n in plan.split(store)]
        split_columns, split_outputs = sum(part.columns for part in split), sum(part.outputs for part in split)
        for rank, rows in enumerate(plan.rank_rows(store)):
            whole = [plan.parts[n] for n in plan.whole(store, rank)]
            columns = sum(part.columns for part in whole)
            held[rank] += rows * plan.row_bytes[store]
            found[rank] += batch * columns + copies + local * split_columns
            gathered[rank] += batch * (columns + split_columns) + copies
            ids[rank] += batch * (columns + split_columns)
            vectors[rank] += batch * (sum(part.outputs for part in whole) + split_outputs) * plan.widths[store]
    return [Load(*load) for load in zip(held, found, gathered, ids, vectors, strict=True)]


def padded_bytes(plan: Plan) -> int:
    """That every rank allocates for its stores."""
    return sum(plan.store_rows(store) * plan.row_bytes[store] for store in range(plan.num_stores))


def imbalance(values: Sequence[int]) -> float:
    """max / mean, 1.0 where all are equal."""
    return max(values) * len(values) / sum(values) if sum(values) else 1.0


def time_proxy(plan: Plan) -> int:
    """Bytes that one rank moves in a training step, times the number of ranks (to stay whole): WIRE x those between ranks + those of its memory.

    Of an all-to-all (world - 1) / world leaves the rank, of an all-reduce twice that, and an all-gather brings the shares of all others. A row
    that is found is read once to look it up, read and written to update it; padding is read like the rest. Every rank updates its copies: all
    rows where gradients are summed densely, else those that the whole batch looks up.
    """
    world, batch = plan.world, plan.batch_size
    ids, vectors, gradients, summed, *gathered = plan.volumes(0).values()
    wire = (world - 1) * (ids + vectors + gradients + 2 * summed + world * sum(gathered))
    memory = 0
    for store in range(plan.num_stores):
        looked_up = batch * sum(plan.parts[n].columns for n in plan.replicated(store))
        updated = plan.replicated_rows(store) if plan.sums_densely(store) else looked_up
        memory += (world * (3 * batch * plan.columns(store) + 2 * updated) + looked_up) * plan.row_bytes[store]
    return WIRE * wire + memory


def make_plan(parts: Sequence[TablePart], world: int, batch_size: int, sharding: str = "auto", rank_bytes: int | None = None) -> Plan:
    """The plan of --sharding for `world` ranks and a global batch of `batch_size` rows.

    data     a copy of everything on every rank
    table    every part whole on one rank, small ones too
    row      every part split over all ranks; one with fewer rows than ranks is copied
    hybrid   small parts copied, the others whole on one rank, or split where that balances better
    auto     the best of these and of the largest-first greedy

    The best of several plans is, in this order: one that fits into rank_bytes; whose copies take no more than a tenth of a rank's even share of the
    tables (or 64 MB); whose max / mean of bytes and of lookups (auto) are no worse than those of the largest-first greedy, or up to 1.02; that moves
    the fewest bytes in a step (`time_proxy`), where a plan is charged 2 x max / mean of that if it is not even: if the fullest rank allocates more
    than 1.05 of the mean or has more than 1.05 of the mean lookups. So evenness may cost twice the traffic, and not ten times, which
    splitting 26 tables over 64 ranks would. Parts are independent: those of one compressed table may lie on different ranks.

    rank_bytes: what tables and their optimizer's state may take on one rank; None: do not ask
    Parts that are pinned are copied in any case.
    Raises UserError: a batch that does not divide, no plan that fits (with what would).
    """
    parts = tuple(parts)
    if sharding not in SHARDINGS:
        raise UserError(f"--sharding={sharding}: must be one of {', '.join(SHARDINGS)}")
    if world < 1 or batch_size < 1 or batch_size % world:
        raise UserError(f"--mini-batch-size={batch_size}: is for all ranks together and must be a multiple of their number, {world}")
    judge = _Judge(parts, world, batch_size, sharding, rank_bytes)
    candidates = dict.fromkeys(_candidates(judge, sharding))  # each once, in a fixed order
    best = min(candidates, key=judge.key)
    if sharding in ("hybrid", "auto") and world > 1 and parts:
        # a plan that is worse than the greedy by a hair may be mended on the way
        keys = (judge.key, judge.key_beside_greedy) if sharding == "auto" else (judge.key,)
        best = min((_refined(judge, where, key) for key in keys for where in sorted(candidates, key=key)[:REFINED]), key=judge.key)
    plan = judge.plan(best)
    if rank_bytes is not None and padded_bytes(plan) > rank_bytes:
        raise UserError(_advice(plan, sharding, rank_bytes))
    return plan


class _Judge:
    """Compares plans of one set of parts on one number of ranks."""

    def __init__(self, parts: tuple[TablePart, ...], world: int, batch_size: int, sharding: str, rank_bytes: int | None):
        self.parts, self.world, self.batch_size, self.sharding, self.rank_bytes = parts, world, batch_size, sharding, rank_bytes
        self.total = sum(part.num_bytes for part in parts)
        self.most_copied = max(self.total // (COPIES_SHARE * world), COPIES_BYTES)
        greedy = loads(self.plan(_largest_first(parts, world)))
        self.greedy_bytes, self.greedy_lookups = [load.bytes for load in greedy], [load.lookups for load in greedy]
        self._keys: dict[tuple[int, ...], tuple] = {}

    def plan(self, where: tuple[int, ...]) -> Plan:
        places = (EVERYWHERE if part.pinned else place for part, place in zip(self.parts, where, strict=True))
        return Plan(self.world, self.batch_size, self.parts, tuple(places))

    def key(self, where: tuple[int, ...]) -> tuple:
        """The smallest is the best; see make_plan. Then the evener, and then the first, so that there are no ties."""
        if where not in self._keys:
            self._keys[where] = self._judged(self.plan(where))
        return self._keys[where]

    def key_beside_greedy(self, where: tuple[int, ...]) -> tuple:
        """The same without the comparison to the greedy."""
        misfit, copies, _, *rest = self.key(where)
        return misfit, copies, *rest

    def _judged(self, plan: Plan) -> tuple:
        held, allocated = loads(plan), padded_bytes(plan)
        nbytes, lookups = [load.bytes for load in held], [load.lookups for load in held]
        copied = sum(part.num_bytes for part, place in zip(plan.parts, plan.where, strict=True) if place == EVERYWHERE)
        worse = self.sharding == "auto" and (_above(nbytes, self.greedy_bytes) or _above(lookups, self.greedy_lookups))
        uneven = max(_per_mille(allocated, nbytes), _per_mille(max(lookups), lookups))
        squares = sum(_per_mille(a, nbytes) ** 2 + _per_mille(b, lookups) ** 2 for a, b in zip(nbytes, lookups, strict=True))
        misfit = max(0, allocated - self.rank_bytes) if self.rank_bytes is not None else 0
        charged = time_proxy(plan) * (1000 if uneven <= EVEN else UNEVEN * uneven)
        return misfit, copied > self.most_copied, worse, charged, squares, plan.where


def _above(values: list[int], others: list[int]) -> bool:
    """Is max / mean of the first above that of the others, and above 1.02?"""
    return max(values) * sum(others) > max(others) * sum(values) and _per_mille(max(values), values) > NEARLY


def _per_mille(value: int, values: list[int]) -> int:
    """Of the mean, rounded up."""
    return -(-1000 * value * len(values) // max(1, sum(values)))


def _candidates(judge: _Judge, sharding: str) -> Iterator[tuple[int, ...]]:
    parts, world = judge.parts, judge.world
    if world == 1 and sharding in ("hybrid", "auto"):
        yield (0,) * len(parts)
        return
    if sharding in ("data", "auto"):
        yield (EVERYWHERE,) * len(parts)
    if sharding in ("row", "auto"):
        yield tuple(_split(part, world) for part in parts)
    if sharding in ("table", "auto"):
        yield from _placed(judge, [None] * len(parts))
        yield _largest_first(parts, world)
    if sharding in ("hybrid", "auto"):
        yield from _mixed(judge)


def _split(part: TablePart, world: int) -> int:
    """Fewer rows than ranks are copied."""
    return SPLIT if part.num_rows >= world else EVERYWHERE


def _largest_first(parts: Sequence[TablePart], world: int) -> tuple[int, ...]:
    """The greedy that others use: whole tables, the largest first, each to the rank with the fewest bytes."""
    sizes: dict[int, int] = {}
    for part in parts:
        sizes[part.table] = sizes.get(part.table, 0) + part.num_bytes
    held, place = [0] * world, {}
    for table in sorted(sizes, key=lambda t: (-sizes[t], t)):
        place[table] = held.index(min(held))
        held[place[table]] += sizes[table]
    return tuple(place[part.table] for part in parts)


def _mixed(judge: _Judge) -> Iterator[tuple[int, ...]]:
    """The k parts that are the cheapest to copy are copied, of the others the m with the largest share of bytes or lookups are split, the rest lie
    whole on one rank each. Every k and m where there are few parts; else those for which a copy costs up to once or 4 times what it saves, and
    for which a part is more than 1, 1/2 or 1/8 of a rank's even share."""
    parts, world = judge.parts, judge.world
    orders = [(_by_share(range(len(parts)), shares), shares) for shares in _all_shares(judge)]
    cheapest = sorted(range(len(parts)), key=lambda n: (_copy_price(parts[n]), n))
    copied, most = 0, 0
    while most < len(parts) and copied + parts[cheapest[most]].num_bytes <= judge.most_copied:
        copied += parts[cheapest[most]].num_bytes
        most += 1
    few = len(parts) ** 2 * world * len(parts) <= 4 * WORK
    cheap = [sum(1 for n in cheapest[:most] if _copy_price(parts[n]) * world <= times * judge.batch_size * UNIT) for times in (1, 4)]
    for k in range(most + 1) if few else sorted({0, *cheap}):
        copies = set(cheapest[:k])
        for order, shares in orders:
            others = [n for n in order if n not in copies]
            large = [sum(1 for n in others if max(shares[n]) * world * times > UNIT) for times in (1, 2, 8)]
            for m in range(len(others) + 1) if few else sorted({0, *large}):
                where: list[int | None] = [EVERYWHERE if n in copies else None for n in range(len(parts))]
                for n in others[:m]:
                    where[n] = _split(parts[n], world)
                yield from itertools.islice(_placed(judge, where), 2 if few else 1)


def _copy_price(part: TablePart) -> int:
    """What a step sums for a copy, over what it would send for the part held whole elsewhere."""
    return part.num_rows * part.width * UNIT // (part.columns + 2 * part.outputs * part.width)


def _all_shares(judge: _Judge) -> list[list[tuple[int, int]]]:
    """Each part's share of bytes and of lookups among all parts; where there are several stores, also among those of its store."""
    return [_shares(judge.parts, 0)] if len({part.store for part in judge.parts}) == 1 else [_shares(judge.parts, 0), _shares(judge.parts, 1)]


def _shares(parts: tuple[TablePart, ...], by_store: bool) -> list[tuple[int, int]]:
    nbytes: dict[int, int] = {}
    reads: dict[int, int] = {}
    for part in parts:
        group = part.store if by_store else 0
        nbytes[group] = nbytes.get(group, 0) + part.num_bytes
        reads[group] = reads.get(group, 0) + part.columns * part.row_bytes
    groups = [part.store if by_store else 0 for part in parts]
    return [
        (part.num_bytes * UNIT // nbytes[group], part.columns * part.row_bytes * UNIT // reads[group])
        for part, group in zip(parts, groups, strict=True)
    ]


def _by_share(numbers: Iterable[int], shares: list[tuple[int, int]]) -> list[int]:
    """Numbers of parts, the one with the largest share of bytes or of lookups first."""
    return sorted(numbers, key=lambda n: (-max(shares[n]), -sum(shares[n]), n))


def _placed(judge: _Judge, where: list[int | None]) -> Iterator[tuple[int, ...]]:
    """Every part without a place goes to a rank, in two ways."""
    shares = _shares(judge.parts, False)
    order = _by_share((n for n, place in enumerate(where) if place is None), shares)
    for by_squares in (True, False):
        yield tuple(_fill(judge, where, order, shares, by_squares))


def _fill(judge: _Judge, where: list[int | None], order: list[int], shares: list[tuple[int, int]], by_squares: bool) -> list[int]:
    """Part after part to the rank where the fullest of its store grows the least, in bytes and lookups together. Among equals, where the sum of
    squares of the ranks' shares grows the least, or else to where the larger of the rank's two shares stays the smallest."""
    found = list(where)
    in_store: dict[int, tuple[list[int], list[int]]] = {}
    all_bytes, all_reads = [0] * judge.world, [0] * judge.world
    for n in order:
        nbytes, reads = in_store.setdefault(judge.parts[n].store, ([0] * judge.world, [0] * judge.world))
        more_bytes, more_reads = shares[n]
        room_bytes, room_reads = max(nbytes) - more_bytes, max(reads) - more_reads
        best = None
        for rank in range(judge.world):
            growth = max(0, nbytes[rank] - room_bytes) + max(0, reads[rank] - room_reads)
            if by_squares:
                key = growth, all_bytes[rank] * more_bytes + all_reads[rank] * more_reads, rank
            else:
                key = growth, max(all_bytes[rank] + more_bytes, all_reads[rank] + more_reads), rank
            best = key if best is None or key < best else best
        for values, more in ((nbytes, more_bytes), (reads, more_reads), (all_bytes, more_bytes), (all_reads, more_reads)):
            values[best[2]] += more
        found[n] = best[2]
    return found


def _refined(judge: _Judge, where: tuple[int, ...], key: Callable[[tuple[int, ...]], tuple]) -> tuple[int, ...]:
    """The plan with one part moved, split or copied, or two exchanged, for as long as that makes it better and is no long work."""
    changes, since = _changes(judge), 0
    for number in range(WORK // (8 * (len(judge.parts) + 4 * judge.world))):  # a plan is judged in about (parts + 4 ranks) x 2 us
        a, b, place = changes[number % len(changes)]
        changed = list(where)
        changed[a], changed[b] = (place, place) if a == b else (where[b], where[a])
        if tuple(changed) != where and key(tuple(changed)) < key(where):
            where, since = tuple(changed), 0
        since += 1
        if since > len(changes):
            break
    return where


def _changes(judge: _Judge) -> list[tuple[int, int, int]]:
    """(part, the same part, a place for it), then (part, another to change places with): the parts with the largest shares first."""
    parts, shares = judge.parts, _shares(judge.parts, False)
    order = _by_share(range(len(parts)), shares)
    moves = [(n, n, place) for n in order for place in (_split(parts[n], judge.world), EVERYWHERE, *range(judge.world))]
    return moves + [(a, b, 0) for a, b in itertools.combinations(order[:MOST_EXCHANGED], 2)]


def _advice(plan: Plan, sharding: str, rank_bytes: int) -> str:
    """One line: needed, allowed, and what would fit."""
    needed, ways = padded_bytes(plan), []
    if sharding != "auto":
        least = _least_bytes(plan.parts, plan.world, plan.batch_size, "auto")
        if least <= rank_bytes:
            ways.append(f"--sharding=auto ({size_text(least)})")
    world = _smallest_world(plan, sharding, rank_bytes)
    if world is not None:
        ways.append(f"{world:,} ranks")
    weights = sum(4 * part.num_rows * part.width for part in plan.parts)
    room = rank_bytes * (1 if sharding == "data" else plan.world)
    most = room * weights * 9 // (10 * sum(part.num_bytes for part in plan.parts))  # a tenth is left for padding and copies
    ways.append(f"--compress-to={_flag_size(most)}")
    return (
        f"--rank-memory={size_text(rank_bytes).replace(' ', '')}: with --sharding={sharding} tables and their optimizer's state take "
        f"{exact_size(needed)} on the fullest rank of {plan.world:,}; use {', '.join(ways)} or a smaller --max-ind-range"
    )


def exact_size(num_bytes: int) -> str:
    """ "1.7 MB (1,703,936 bytes)" """
    return f"{size_text(num_bytes)} ({num_bytes:,} bytes)" if num_bytes >= 1000 else f"{num_bytes} bytes"


def _flag_size(num_bytes: int) -> str:
    """As --compress-to reads it, rounded down to two figures: "48GB"."""
    power = max(0, len(str(num_bytes)) - 2)
    num_bytes = num_bytes // 10**power * 10**power
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= scale:
            return f"{num_bytes / scale:g}{unit}"
    return f"{max(1, num_bytes)}B"


def _least_bytes(parts: tuple[TablePart, ...], world: int, batch_size: int, sharding: str) -> int:
    """Bytes of the leanest of the simple plans of a sharding."""
    judge = _Judge(parts, world, batch_size, sharding, None)
    simple = ("row", "table") if sharding in ("hybrid", "auto") else (sharding,)
    return min(padded_bytes(judge.plan(where)) for name in simple for where in _candidates(judge, name))


def _smallest_world(plan: Plan, sharding: str, rank_bytes: int) -> int | None:
    """The smallest number of ranks that divides the batch and would do; None: none of those tried."""
    if sharding == "data":
        return None
    least = max(plan.world + 1, -(-sum(part.num_bytes for part in plan.parts) // max(1, rank_bytes)))
    worlds = (world for world in range(least, plan.batch_size + 1) if plan.batch_size % world == 0)
    for _, world in zip(range(MOST_WORLDS), worlds, strict=False):
        if _least_bytes(plan.parts, world, plan.batch_size, sharding) <= rank_bytes:
            return world
    return None
