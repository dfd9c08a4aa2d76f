"""The order of the training rows under --memory-map: upstream's shuffle in two passes, drawn once and kept in a file beside the data.

Upstream rewrites all rows in the new order, in files that any later run reads, whatever its flags. Here only the row numbers are written,
4 bytes a row, with the seed, the --data-randomize and the rows per day they were drawn for; a run that asks for something else draws anew.
The file is memory-mapped like the data, and compared with its checksum once: a stamp beside it, <name>.verified.json, spares the next run the
17 GB of the Terabyte set. A run maps what it has drawn before that gets its name, so runs with other seeds may replace it at any time.

Row numbers are int32, from 2^31 rows on uint32, from 2^32 on int64. Pass 1 writes them to a file without a name, where each target day has
its place; pass 2 shuffles one day at a time in memory. So memory is one day's: 4 bytes a row of the longest day, and a byte in pass 1.
"""

import json
import os
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
from tqdm import tqdm

from data_loaders.criteo_map import MappedInts
from data_loaders.criteo_npz import DAMAGE, atomic_write, check_once, read_header, read_small, write_npz

_CHUNK = 1 << 20
_TYPES = tuple(np.dtype(name) for name in ("<i4", "<u4", "<i8"))


@dataclass(frozen=True)
class OrderKey:
    """What an order was drawn for. after_sampling: the numbers of the sub-sampling were drawn before it."""

    seed: int
    randomize: str  # "total" | "day"
    total_per_file: tuple[int, ...]
    after_sampling: bool = False

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "total_per_file": list(self.total_per_file)})

    @classmethod
    def from_json(cls, text: str) -> "OrderKey":
        """Raises one of DAMAGE where it is not ours."""
        fields = json.loads(text)
        return cls(**{**fields, "total_per_file": tuple(fields["total_per_file"])})


class MappedOrder:
    """Stands for the tensor [train rows] of row numbers: [first:end] is that tensor's."""

    def __init__(self, rows: MappedInts):
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        return torch.from_numpy(self._rows[rows].reshape(-1).astype(np.int64))


def order_file(processed: Path) -> Path:
    """Where the order of a processed file or folder lies."""
    return processed.with_name(f"{processed.name.removesuffix('.npz')}_order.npz")


def stored_order(
    path: Path, key: OrderKey, stream: np.random.RandomState | None, *, made_now: bool, sampled_rows: int, progress: bool = False
) -> tuple[MappedOrder | None, bool]:
    """The train order in the file `path`, drawn and written first where it is not there, and whether it was; None for the data's own order.

    The order is the one that upstream draws when it starts from the raw file: sub-sampling, a number for each of `sampled_rows` (0: none),
    comes first.
    stream    None: the numbers come from a stream of their own, which starts at key.seed. --upstream-compat gives the run's, so that the
              weights, drawn after the order, differ from those of later runs. Sub-sampling that an earlier run drew is then not drawn again:
              another order, which runs without --upstream-compat do not use
    made_now  the processed file was made by this run: upstream makes both or none
    progress  a bar on stderr while an order is drawn
    Raises UserError where the file cannot be written.
    """
    if key.randomize == "none":
        return None, False
    key, early = replace(key, after_sampling=sampled_rows > 0), replace(key, after_sampling=False)
    accepted = (key,) if stream is None else (key, early)
    order = None if made_now else _read(path, accepted)
    if order is not None:
        return order, False
    if stream is not None:
        return _write(path, key if made_now else early, stream, progress), True
    stream = np.random.RandomState(key.seed)
    for start in range(0, sampled_rows, _CHUNK):
        stream.uniform(size=min(_CHUNK, sampled_rows - start))
    return _write(path, key, stream, progress), True


def _read(path: Path, accepted: tuple[OrderKey, ...]) -> MappedOrder | None:
    """The order in the file if it was drawn for one of `accepted`; None where it was not, where there is none or where it is damaged."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            key = OrderKey.from_json(str(read_small(archive, "meta")))
            if key not in accepted:
                return None
            check_once(path, file, archive)
            return _mapped(file, archive, key)
    except (OSError, *DAMAGE):
        return None


def _mapped(file: IO[bytes], archive: zipfile.ZipFile, key: OrderKey) -> MappedOrder:
    """Raises one of DAMAGE where the order does not fit the key."""
    with archive.open("order.npy") as member:
        dtype = read_header(member)[2]
    if dtype not in _TYPES:
        raise ValueError(f"row numbers of type {dtype}")
    return MappedOrder(MappedInts(file, archive, "order", (sum(key.total_per_file[:-1]),), dtype))


def _write(path: Path, key: OrderKey, rng: np.random.RandomState, progress: bool) -> MappedOrder:
    """Writes the file, and returns the order as it lies there."""
    rows = sum(key.total_per_file[:-1])
    with atomic_write(path, "name a place that can be written with --processed-data-file=PATH, or use --data-randomize=none") as file:
        with tqdm(total=rows, unit="row", unit_scale=True, desc=f"Drawing {path.name}", disable=not progress) as bar:
            days = _counted(draw_order(key.total_per_file, key.randomize, rng, path.parent), bar)
            write_npz(file, {"order": ((rows,), days), "meta": ((), iter([np.array(key.to_json())]))})
        file.flush()
        with open(file.name, "rb") as written, zipfile.ZipFile(written) as archive:
            return _mapped(written, archive, key)


def _counted(days: Iterator[np.ndarray], bar: tqdm) -> Iterator[np.ndarray]:
    for day in days:
        yield day
        bar.update(len(day))


def row_type(num_rows: int) -> np.dtype:
    """The narrowest of the types that row numbers are stored in."""
    return next(dtype for dtype in _TYPES if num_rows - 1 <= np.iinfo(dtype).max)


def draw_order(total_per_file: tuple[int, ...], randomize: str, rng: np.random.RandomState, folder: Path) -> Iterator[np.ndarray]:
    """Row numbers of each train day in its new order, [rows of the day] row_type; the last day, which is for test, stays as it is.

    total  pass 1 gives every row a day at random, as long as that day has room; pass 2 permutes each day
    day    pass 2 only
    folder where pass 1 has its file; it has no name, so it is gone when the process is
    A shuffle in place makes the same draws as rng.permutation, and the same order.
    """
    sizes = total_per_file[:-1]
    dtype = row_type(sum(sizes))
    if randomize == "day":
        first = 0
        for size in sizes:
            day = np.arange(first, first + size, dtype=dtype)
            rng.shuffle(day)
            yield day
            first += size
        return
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        _deal_out(sizes, rng, file, dtype)
        for start in range(0, total_per_file[-1], _CHUNK):  # upstream draws days for the test rows too, and does not use them
            rng.randint(0, len(sizes), size=min(_CHUNK, total_per_file[-1] - start))
        file.seek(0)
        for size in sizes:
            day = np.empty(size, dtype)
            _read_all(file, day)
            rng.shuffle(day)
            yield day


def _read_all(file: IO[bytes], out: np.ndarray) -> None:
    view, done = memoryview(out.view(np.uint8)), 0
    while done < len(view):  # the system reads at most 2 GiB at a time
        read = file.readinto(view[done : done + (1 << 28)])
        if not read:
            raise OSError("the file of the first pass is shorter than it was")
        done += read


def _write_all(file: IO[bytes], data: memoryview, at: int) -> None:
    while len(data):
        written = os.pwrite(file.fileno(), data, at)
        data, at = data[written:], at + written


def _deal_out(sizes: tuple[int, ...], rng: np.random.RandomState, file: IO[bytes], dtype: np.dtype) -> None:
    """Pass 1: the numbers of the rows that go to day 0, in their order, those that go to day 1, and so on; sizes[day] rows go to each."""
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    room, first = np.array(sizes, dtype=np.int64), 0
    for size in sizes:
        for days in _days_of(size, room, rng):
            order = np.argsort(days, kind="stable")  # of bytes: counted, not compared
            rows = (first + order).astype(dtype)
            ends = np.cumsum(np.bincount(days, minlength=len(sizes)))
            for day, (begin, end) in enumerate(zip(np.concatenate([[0], ends[:-1]]), ends, strict=True)):
                if begin < end:
                    _write_all(file, memoryview(rows[begin:end].view(np.uint8)), int(starts[day]) * dtype.itemsize)
                    starts[day] += end - begin
            first += len(days)


def _days_of(size: int, room: np.ndarray, rng: np.random.RandomState) -> Iterator[np.ndarray]:
    """The days that `size` consecutive rows go to, uint8, in pieces; `room` [days] is brought up to date with each.

    As upstream: a day is drawn for every row; then a row that finds its day full draws again, one number at a time, until one is not full.
    """
    drawn = np.empty(size, dtype=np.uint8)
    for begin in range(0, size, _CHUNK):
        piece = drawn[begin : begin + _CHUNK]
        piece[:] = rng.randint(0, len(room), size=len(piece))
    again, begin = _Retries(rng, len(room)), 0
    while begin < size:
        days = drawn[begin : begin + _CHUNK].copy()
        full = room == 0
        late = np.flatnonzero(full[days])
        values, places = again.peek(len(late), full)
        days[late] = values
        # what was drawn holds up to the first row that finds a day full that was not when this piece began
        over = [np.flatnonzero(days == day)[room[day]] for day in np.flatnonzero(np.bincount(days, minlength=len(room)) > room)]
        end = int(min(over, default=len(days)))
        used = int(np.searchsorted(late, end))
        if used:
            again.take(int(places[used - 1]) + 1)
        days = days[:end]
        room -= np.bincount(days, minlength=len(room))
        begin += end
        if end:
            yield days
    again.close()


class _Retries:
    """Draws made ahead of need; close() leaves the stream where drawing one at a time would have."""

    def __init__(self, rng: np.random.RandomState, num_days: int):
        self._rng, self._num_days = rng, num_days
        self._before = None  # the stream's state before the first draw: 2.5 kB, so taken only where there is one
        self._ahead, self._taken = np.empty(0, dtype=np.uint8), 0

    def peek(self, count: int, full: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The next `count` draws that are not of a full day, and their places among all draws that are left."""
        if count and self._before is None:
            self._before = self._rng.get_state()
        open_places = np.flatnonzero(~full[self._ahead])
        while len(open_places) < count:
            more = self._rng.randint(0, self._num_days, size=min(_CHUNK, 2 * count + 1000)).astype(np.uint8)
            open_places = np.concatenate([open_places, len(self._ahead) + np.flatnonzero(~full[more])])
            self._ahead = np.concatenate([self._ahead, more])
        places = open_places[:count]
        return self._ahead[places], places

    def take(self, count: int) -> None:
        """The first `count` of the draws that are left are used up."""
        self._ahead, self._taken = self._ahead[count:], self._taken + count

    def close(self) -> None:
        if self._before is None or not len(self._ahead):
            return
        self._rng.set_state(self._before)
        for start in range(0, self._taken, _CHUNK):
            self._rng.randint(0, self._num_days, size=min(_CHUNK, self._taken - start))
