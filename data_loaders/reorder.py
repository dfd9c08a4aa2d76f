"""The order of the training rows under --memory-map: upstream's shuffle in two passes, drawn once and kept in a file beside the data.

Upstream rewrites all rows in the new order, in files that any later run reads, whatever its flags. Here only the row numbers are written,
4 bytes a row, with the seed, the --data-randomize and the rows per day they were drawn for; a run that asks for something else draws anew.
The file is memory-mapped like the data. Drawing takes 6 bytes of memory a row, and 2.6 s of CPU for the 45.8 million rows of Kaggle (measured).
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data_loaders.criteo_map import MappedInts
from data_loaders.criteo_npz import DAMAGE, atomic_write, read_small, write_npz
from dlrm_xla.specs import UserError

_CHUNK = 1 << 20


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
    """Where the order of a processed file lies."""
    return processed.with_name(f"{processed.name.removesuffix('.npz')}_order.npz")


def stored_order(
    path: Path, key: OrderKey, stream: np.random.RandomState | None, *, made_now: bool, sampled_rows: int
) -> tuple[MappedOrder | None, bool]:
    """The train order in the file `path`, drawn and written first where it is not there, and whether it was; None for the data's own order.

    The order is the one that upstream draws when it starts from the raw file: sub-sampling, a number for each of `sampled_rows` (0: none),
    comes first.
    stream    None: the numbers come from a stream of their own, which starts at key.seed. --upstream-compat gives the run's, so that the
              weights, drawn after the order, differ from those of later runs. Sub-sampling that an earlier run drew is then not drawn again:
              another order, which runs without --upstream-compat do not use
    made_now  the processed file was made by this run: upstream makes both or none
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
        _write(path, key if made_now else early, stream)
    else:
        stream = np.random.RandomState(key.seed)
        for start in range(0, sampled_rows, _CHUNK):
            stream.uniform(size=min(_CHUNK, sampled_rows - start))
        _write(path, key, stream)
    order = _read(path, accepted)
    if order is None:
        raise UserError(f"{path}: was written but cannot be read back; check the disk, or leave --memory-map out")
    return order, True


def _read(path: Path, accepted: tuple[OrderKey, ...]) -> MappedOrder | None:
    """The order in the file if it was drawn for one of `accepted`; None where it was not, where there is none or where it is damaged."""
    try:
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            key = OrderKey.from_json(str(read_small(archive, "meta")))
            if key not in accepted:
                return None
            with archive.open("order.npy") as member:
                while member.read(_CHUNK):  # to the end: that checks the checksum
                    pass
            return MappedOrder(MappedInts(file, archive, "order", (sum(key.total_per_file[:-1]),)))
    except (OSError, *DAMAGE):
        return None


def _write(path: Path, key: OrderKey, rng: np.random.RandomState) -> None:
    rows = sum(key.total_per_file[:-1])
    arrays = {
        "order": ((rows,), (day.astype("<i4") for day in draw_order(key.total_per_file, key.randomize, rng))),
        "meta": ((), iter([np.array(key.to_json())])),
    }
    with atomic_write(path, "name a place that can be written with --processed-data-file=PATH, or use --data-randomize=none") as file:
        write_npz(file, arrays)


def draw_order(total_per_file: tuple[int, ...], randomize: str, rng: np.random.RandomState) -> Iterator[np.ndarray]:
    """Row numbers of each train day in its new order, [rows of the day] int64; the last day, which is for test, stays as it is.

    total  pass 1 gives every row a day at random, as long as that day has room; pass 2 permutes each day
    day    pass 2 only
    """
    sizes = total_per_file[:-1]
    if randomize == "total":
        day_of_row = _draw_days(sizes, rng)
        rng.randint(0, len(sizes), size=total_per_file[-1])  # upstream draws days for the test rows too, and does not use them
    first = 0
    for day, size in enumerate(sizes):
        order = rng.permutation(size)
        yield np.flatnonzero(day_of_row == day)[order] if randomize == "total" else first + order
        first += size


def _draw_days(sizes: tuple[int, ...], rng: np.random.RandomState) -> np.ndarray:
    """[sum of sizes] uint8: the day that each row goes to; sizes[day] rows go to each."""
    room, drawn_days = list(sizes), []
    for size in sizes:
        days = rng.randint(0, len(sizes), size=size)
        # nothing happens one by one until the first row that finds its day full, which is near the end of the last train day
        full = [np.flatnonzero(days == day)[free : free + 1] for day, free in enumerate(room)]
        begin = min((int(found[0]) for found in full if len(found)), default=size)
        room = [free - int(used) for free, used in zip(room, np.bincount(days[:begin], minlength=len(sizes)), strict=True)]
        late = days[begin:].tolist()
        for row, day in enumerate(late):
            while room[day] == 0:
                day = rng.randint(0, len(sizes))
            room[day] -= 1
            late[row] = day
        days[begin:] = late
        drawn_days.append(days.astype(np.uint8))
    return np.concatenate(drawn_days)
