"""MLPerf's binary files of the Terabyte set, <stem>_{train,test,val}.bin: rows of 40 little-endian int32, label | 13 counts | 26 ids.

Train rows lie in the order of --memory-map, as upstream's numpy_to_binary writes them; test is the first half, rounded up, of the last day,
val the rest. A batch is consecutive rows, so reading needs no order and no random access. Beside the files lies <stem>_bins.json: what they
were made from and with, and how many rows each has. It is written first, and each .bin appears under its name when it is whole: an
interrupted run leaves nothing that a later one would take for finished. Files without it are upstream's: they are read as they are, as
upstream does.

Upstream crashes after writing these files (CriteoBinDataset has no num_samples); with that mended it trains from ours and from its own alike.
"""

import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from data_loaders.criteo_npz import Meta, Processed, RawFingerprint, atomic_write, cause
from data_loaders.criteo_set import read_id_counts, write_count_file
from data_loaders.criteo_split import CriteoDataset, CriteoSplit
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.part import WHOLE, Part
from data_loaders.reorder import MappedOrder
from dlrm_xla.specs import UserError

WIDTH = 1 + NUM_DENSE + NUM_SPARSE
ROW_BYTES = 4 * WIDTH
SPLITS = ("train", "test", "val")
FORMAT = 2
_CHUNK = 1 << 16  # rows


class OtherFormat(Exception):
    """Of a sidecar."""


@dataclass(frozen=True)
class MadeWith:
    """The flags that decide which rows the files hold. max_ind_range 0: no limit. The order is that of the seed of the run that made them."""

    max_ind_range: int
    sub_sample_rate: float
    min_frequency: int
    data_randomize: str


@dataclass(frozen=True)
class Sidecar:
    """<stem>_bins.json. counts [26] ids of each column; rows of each split; and what the processed set says of itself, or, where that is
    upstream's, which says nothing, the fingerprint of it."""

    made_with: MadeWith
    counts: tuple[int, ...]
    rows: dict[str, int]
    meta: Meta | None
    upstreams: RawFingerprint | None
    format: int = FORMAT

    def to_json(self) -> str:
        meta = json.loads(self.meta.to_json()) if self.meta is not None else None
        return json.dumps(asdict(self) | {"meta": meta}) + "\n"

    def same_rows(self, other: "Sidecar") -> bool:
        """Whether files made by one can lie beside files made by the other."""
        if self.meta is not None and other.meta is not None:
            same = self.meta.same_rows(other.meta)
        else:
            same = None not in (self.upstreams, other.upstreams) and self.upstreams.same_file(other.upstreams)
        return same and (self.made_with, self.counts, self.rows) == (other.made_with, other.counts, other.rows)

    @classmethod
    def from_json(cls, text: str) -> "Sidecar":
        """Raises ValueError, KeyError, TypeError or AttributeError where it is not ours, OtherFormat where an earlier version wrote it."""
        fields = json.loads(text)
        if fields["format"] != FORMAT:
            raise OtherFormat(fields["format"])
        rows = {split: int(fields["rows"][split]) for split in SPLITS}
        meta = Meta.from_json(json.dumps(fields["meta"])) if fields["meta"] is not None else None
        upstreams = RawFingerprint(**fields["upstreams"]) if fields["upstreams"] is not None else None
        return cls(MadeWith(**fields["made_with"]), tuple(int(count) for count in fields["counts"]), rows, meta, upstreams)


@dataclass(frozen=True)
class BinSource:
    """What the files are made from: the processed set and its place, rows of each day, the train rows' order (None: as they lie)."""

    path: Path
    data: Processed
    rows_of_days: np.ndarray
    order: MappedOrder | None


def bin_stem(processed: Path) -> Path:
    """Upstream's: the processed file's name up to its first dot."""
    return processed.with_name(processed.name.split(".")[0])


def bin_file(stem: Path, split: str) -> Path:
    return stem.with_name(f"{stem.name}_{split}.bin")


def sidecar_file(stem: Path) -> Path:
    return stem.with_name(f"{stem.name}_bins.json")


# ---- reading ----------------------------------------------------------------------------------------------------------------------


class BinRows:
    """Rows of a .bin where they lie on the disk: [first:end] is [.., 40] int32, checked; a row beyond what the tables hold is a UserError."""

    def __init__(self, path: Path, counts: np.ndarray, counts_from: str):
        """counts [26] ids of each column; counts_from: where they are from, for messages. Raises UserError where the file has no whole rows."""
        self._path, self._counts_from = path, counts_from
        self._largest = np.concatenate([[1], np.full(NUM_DENSE, 2**31 - 1), counts - 1]).astype(np.uint32)
        self._rows = _map(path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rows: slice) -> torch.Tensor:
        packed = self._rows[rows].copy()
        bad = packed.view(np.uint32) > self._largest  # a negative number is a large one here
        if bad.any():
            row, column = (int(place) for place in np.argwhere(bad)[0])
            raise UserError(
                f"{self._path}: row {rows.start + row} holds {COLUMNS[column]} {packed[row, column]}, at most {self._largest[column]} by "
                f"{self._counts_from}; the two do not belong together: delete the .bin files to have them made again, or mend the counts"
            )
        return torch.from_numpy(packed)


def _map(path: Path) -> np.ndarray:
    """[n, 40] int32, in memory that belongs to the file."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size % ROW_BYTES:
                raise UserError(f"{path}: {size} bytes are not rows of {ROW_BYTES} bytes: it is cut off; delete it to have it made again")
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror}") from None
    return np.frombuffer(memory, "<i4").reshape(-1, WIDTH)


def epoch_order(seed: int) -> Callable[[int, int], torch.Tensor]:
    """(number of batches, epoch) -> their order, the same whenever it is asked for: a run that goes on sees what an undisturbed one sees."""

    def order(num_batches: int, epoch: int) -> torch.Tensor:
        # upstream's RandomSampler draws a seed for each epoch, and with it a permutation
        seeds = torch.empty(epoch + 1, dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
        return torch.randperm(num_batches, generator=torch.Generator().manual_seed(int(seeds[epoch])))

    return order


def drawn_order(shuffle: bool) -> Callable[[int, int], Any]:
    """The same as upstream: from torch's own stream, which each pass over the data takes a number from, and one more for a shuffle's seed."""

    def order(num_batches: int, epoch: int):
        torch.empty((), dtype=torch.int64).random_()
        if not shuffle:
            return range(num_batches)
        seed = int(torch.empty((), dtype=torch.int64).random_())
        return torch.randperm(num_batches, generator=torch.Generator().manual_seed(seed))

    return order


def open_bins(
    stem: Path,
    counts_file: Path | None,
    made_with: MadeWith,
    source: Callable[[], BinSource],
    check: Callable[[Meta | None, Path, str], None],
    *,
    batch_size: int,
    test_batch_size: int,
    drop_last: bool,
    num_batches: int,
    seed: int,
    shuffle: bool,
    draw_as_upstream: bool,
    progress: bool,
    print_line: Callable[[str], None],
    note: Callable[[str], None],
    part: Part = WHOLE,
) -> CriteoDataset:
    """Both halves from the files of `stem`, which are made first where none is there.

    counts_file       <raw>_fea_count.npz, as upstream reads and we write it; counts come from it, from our sidecar (where both are there
                      they must agree), or from reading all rows once, which `note` is told
    source            opens what the files are made from
    check             (what our files were made from, their sidecar, the way out) raises UserError where a run asks for others
    shuffle           train batches, whole ones, in another order in each epoch; the order of an epoch follows from `seed`
    draw_as_upstream  the order comes from torch's stream instead, as upstream's
    part              which rows of each batch are read and given
    Ids are taken modulo max_ind_range where columns have more, as upstream does. Raises UserError.
    """
    sidecar = _read_sidecar(stem)
    there = [split for split in SPLITS if bin_file(stem, split).exists()]
    if sidecar is not None:
        _check_sidecar(sidecar, stem, made_with, there, check)
    elif there and not {"train", "test"} <= set(there):
        raise UserError(
            f"{bin_file(stem, there[0])}: is there, but not all of {', '.join(bin_file(stem, split).name for split in ('train', 'test'))}, and "
            f"no {sidecar_file(stem).name} says that it is ours: what an interrupted run left? delete it to have all made again"
        )
    if len(there) < len(SPLITS) if sidecar is not None else not there:
        sidecar = write_bins(stem, source(), made_with, counts_file=counts_file, progress=progress)
    counts, counts_from = _counts(stem, sidecar, counts_file, progress, note)
    fold = made_with.max_ind_range if 0 < made_with.max_ind_range < counts.max() else -1
    train, test = (BinRows(bin_file(stem, split), counts, counts_from) for split in ("train", "test"))
    for split, rows, size in (("train", train, batch_size), ("test", test, test_batch_size)):
        print_line(f"data file: {bin_file(stem, split)} number of batches: {-(-len(rows) // size)}")
    order = drawn_order(shuffle) if draw_as_upstream else epoch_order(seed) if shuffle else None
    halves = (
        CriteoSplit(
            train, None, num_rows=len(train), batch_size=batch_size, max_ind_range=fold, drop_last=drop_last, num_batches=num_batches,
            batch_order=order, part=part,
        ),
        CriteoSplit(
            test, None, num_rows=len(test), batch_size=test_batch_size, max_ind_range=fold, num_batches=num_batches,
            batch_order=drawn_order(shuffle=False) if draw_as_upstream else None, part=part,
        ),
    )  # fmt: skip
    table_rows = np.minimum(counts, made_with.max_ind_range) if made_with.max_ind_range > 0 else counts
    return CriteoDataset(tuple(int(rows) for rows in table_rows), (1,) * NUM_SPARSE, NUM_DENSE, None, *halves)


def _read_sidecar(stem: Path) -> Sidecar | None:
    path = sidecar_file(stem)
    try:
        return Sidecar.from_json(path.read_text())
    except FileNotFoundError:
        return None
    except OtherFormat as error:
        raise UserError(
            f"{path}: is of format {error}, this version's is {FORMAT}: format 1 does not say which raw files the .bin files are of; delete it "
            "and them to have them made again, or it alone to have whole ones read as upstream's are, unchecked"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: damaged ({cause(error)}); delete it and the .bin files beside it to have them made again") from None


def _check_sidecar(
    sidecar: Sidecar, stem: Path, made_with: MadeWith, there: list[str], check: Callable[[Meta | None, Path, str], None]
) -> None:
    way_out = "delete the .bin files and this one, or choose another --processed-data-file"
    flags = {"sub_sample_rate": "--data-sub-sample-rate"}
    for name, wanted in asdict(made_with).items():
        of_files = getattr(sidecar.made_with, name)
        if of_files != wanted:
            flag = f"{flags.get(name, '--' + name.replace('_', '-'))}={of_files}"
            raise UserError(f"{sidecar_file(stem)}: the files were made with {flag}, but {wanted} is asked for; {way_out}")
    check(sidecar.meta, sidecar_file(stem), way_out)
    for split in there:
        path, rows = bin_file(stem, split), sidecar.rows[split]
        if (size := path.stat().st_size) != rows * ROW_BYTES:
            raise UserError(f"{path}: {size} bytes, not the {rows} rows of {ROW_BYTES} that were written; {way_out}")


def _counts(
    stem: Path, sidecar: Sidecar | None, counts_file: Path | None, progress: bool, note: Callable[[str], None]
) -> tuple[np.ndarray, str]:
    """[26] int64, and where they are from."""
    if counts_file is not None and counts_file.exists():
        counts = read_id_counts(counts_file)
        if sidecar is not None and tuple(counts.tolist()) != sidecar.counts:
            raise UserError(f"{counts_file}: its counts are not those that {sidecar_file(stem).name} has; it belongs to other data: delete it")
        return counts, str(counts_file)
    if sidecar is not None:
        return np.array(sidecar.counts), str(sidecar_file(stem))
    note(
        f"{counts_file or 'no --raw-data-file=DIR/day, so no DIR/day_fea_count.npz'}: not there; the number of ids of each column is the largest "
        "one found in the .bin files"
    )
    largest = np.zeros(NUM_SPARSE, dtype=np.int64)
    for split in SPLITS:
        if bin_file(stem, split).exists() and bin_file(stem, split).stat().st_size:  # one row in the last day leaves none to val
            rows = _map(bin_file(stem, split))
            for start in tqdm(range(0, len(rows), _CHUNK), desc=f"Counting ids of {split}", disable=not progress):
                np.maximum(largest, rows[start : start + _CHUNK, 1 + NUM_DENSE :].max(axis=0), out=largest)
    return largest + 1, "the largest id found in the .bin files"


# ---- writing ----------------------------------------------------------------------------------------------------------------------


def bounds(rows_of_days: np.ndarray) -> dict[str, tuple[int, int]]:
    """Which rows each split has, as they lie after reordering: [first, end)."""
    num_train, last = int(rows_of_days[:-1].sum()), int(rows_of_days[-1])
    middle = num_train + (last + 1) // 2
    return {"train": (0, num_train), "test": (num_train, middle), "val": (middle, num_train + last)}


def reordered(source: BinSource, first: int, end: int) -> Iterator[np.ndarray]:
    """Rows `first` to `end` - 1 of the reordered set, [.., 40] int32, in pieces; the last day is not reordered."""
    num_train = int(source.rows_of_days[:-1].sum())
    for begin in range(first, end, _CHUNK):
        stop = min(begin + _CHUNK, end)
        if source.order is None or begin >= num_train:
            yield source.data.packed[begin:stop].numpy()
            continue
        rows = source.order[begin:stop].numpy()
        by_place = np.argsort(rows)  # the file is read forwards
        piece = np.empty((len(rows), WIDTH), dtype=np.int32)
        piece[by_place] = source.data.packed.index_select(0, torch.from_numpy(rows[by_place])).numpy()
        yield piece


def write_bins(stem: Path, source: BinSource, made_with: MadeWith, *, counts_file: Path | None, progress: bool) -> Sidecar:
    """Those of the three files that are not there, the sidecar before them and, where counts_file is a place, upstream's counts.

    Memory: a piece of 65,536 rows, 10 MB. Raises UserError where a file cannot be written, or counts of other data are in the way.
    """
    rows = {split: end - first for split, (first, end) in bounds(source.rows_of_days).items()}
    counts = tuple(int(count) for count in source.data.counts)
    meta = source.data.meta
    sidecar = Sidecar(made_with, counts, rows, meta, RawFingerprint.of(source.path) if meta is None else None)
    earlier = _read_sidecar(stem)
    if earlier is not None and not earlier.same_rows(sidecar):
        raise UserError(f"{sidecar_file(stem)}: is of other rows than those that its files are to be made from; delete it and the .bin files")
    way_out = "name another place with --processed-data-file=PATH"
    if counts_file is not None:
        written = write_count_file(counts_file, "counts", np.array(counts, dtype=np.int32))
        if not written and tuple(read_id_counts(counts_file).tolist()) != counts:
            raise UserError(f"{counts_file}: holds the counts of other data, so upstream would take the .bin files for wrong; delete it")
    with atomic_write(sidecar_file(stem), way_out) as file:
        file.write(sidecar.to_json().encode())
    for split, (first, end) in bounds(source.rows_of_days).items():
        path = bin_file(stem, split)
        if path.exists():
            continue
        bar = tqdm(total=end - first, unit="row", unit_scale=True, desc=path.name, disable=not progress)
        with atomic_write(path, way_out) as file, bar:
            for piece in reordered(source, first, end):
                file.write(np.ascontiguousarray(piece, dtype="<i4").data)
                bar.update(len(piece))
    return sidecar
