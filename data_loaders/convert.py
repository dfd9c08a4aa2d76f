"""A processed Criteo set in another of its forms; ids, rows and days stay as they are.

    python -m data_loaders.convert PROCESSED --to npz|arrays|bin|days --out PLACE [--force]

PROCESSED  an .npz of ours or of upstream, or an arrays folder
--to npz     PLACE is the .npz (upstream reads it too: --processed-data-file=PLACE)
     arrays  PLACE is the folder
     bin     PLACE is what --processed-data-file is to name: PLACE up to its name's first dot, and _train.bin, _test.bin, _val.bin (Terabyte)
     days    PLACE is what upstream's --raw-data-file is to name: the files that its --memory-map reads instead of the raw text
             (<PLACE>_0_reordered.npz ..., <PLACE>_day_count.npz, <PLACE>_fea_count.npz; Kaggle: <stem>_day_0_reordered.npz ...)
bin and days hold the training rows in the order of --memory-map, drawn for --numpy-rand-seed and --data-randomize, as upstream draws it when
it starts from the raw text. Nothing is overwritten without --force. Each file appears under its name when it is whole. Rows are read where
they lie, 65,536 at a time; only upstream's .npz, which is compressed, is read into memory (160 bytes a row). npz takes 4 bytes an id of the
largest column besides, arrays 8 bytes an id of all columns, bin and days, where the order is not there, what drawing it takes (data_loaders.reorder).
"""

import argparse
import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data_loaders import mlperf_bin
from data_loaders.arrays import is_arrays, read_manifest
from data_loaders.arrays_writer import checksums
from data_loaders.command import ended
from data_loaders.criteo_map import CannotBeMapped, read_processed
from data_loaders.criteo_npz import DAMAGE, Processed, atomic_write, cause, read_array, read_small, write_npz
from data_loaders.criteo_set import SETS, CriteoSet, rows_of_days, write_count_file
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.manifest import NAME, ROWS, DenseColumn, File, Manifest, Part, Table, is_only_arrays, vocabulary_files
from data_loaders.mlperf_bin import BinSource
from data_loaders.reorder import OrderKey, order_file, stored_order
from data_loaders.vocabulary import NPZ_SHARED, npz_member
from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

_CHUNK = 1 << 16  # rows
_WAY_OUT = "name another place with --out"


@dataclass(frozen=True)
class Opened:
    """A processed set, and which of Criteo's it is."""

    path: Path
    data: Processed
    criteo: CriteoSet
    rows_of_days: np.ndarray


def open_processed(path: Path, data_set: str, raw: Path | None, progress: bool) -> Opened:
    """data_set "": told by the file. raw: for upstream's file, which says neither its set nor (Terabyte) the rows of its days."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and not is_arrays(path):
        raise UserError(f"{path}: a folder without manifest.json, so not a processed set")
    try:
        data = read_processed(path, mapped=True, progress=progress)
    except CannotBeMapped:
        data = read_processed(path, mapped=False, progress=progress)
    days = len(data.total_per_file) if data.total_per_file is not None else 0
    told = next((known.name for known in SETS.values() if known.days == days), "")
    if not (data_set or told):
        raise UserError(f"{path}: does not say whether it is Kaggle's or the Terabyte set; add --data-set=kaggle or --data-set=terabyte")
    if data_set and told and data_set != told:
        raise UserError(f"--data-set={data_set}: {path} is of {days} days, so it is {told}")
    criteo = SETS[data_set or told]
    if data.total_per_file is None and raw is None:  # upstream writes both into one folder
        found = sorted(path.parent.glob("*_day_count.npz"))
        raw = path.parent / found[0].name.removesuffix("_day_count.npz") if len(found) == 1 else None
    return Opened(path, data, criteo, rows_of_days(criteo, data, path, raw))


def convert(
    opened: Opened, form: str, out: Path, *, raw: Path | None, seed: int, randomize: str, force: bool, progress: bool
) -> list[Path]:
    """Writes the files of `form` and returns their names.

    raw   what upstream's --raw-data-file is to name: npz also writes <raw>_day_count.npz, bin <raw>_fea_count.npz; upstream needs them
    seed, randomize   bin, days: of the training rows' order
    Raises UserError.
    """
    if form == "bin" and opened.criteo.name != "terabyte":
        raise UserError(f"--to bin: {opened.path} is Kaggle's; MLPerf's binary files are of the Terabyte set")
    if form == "npz" and out.suffix != ".npz":
        raise UserError(f"--out {out}: must end in .npz")
    if form == "arrays" and out.suffix == ".npz":
        raise UserError(f"--out {out}: an arrays folder's name does not end in .npz")
    targets = _targets(opened.criteo, form, out)
    there = [target for target in targets if target.exists()]
    if any(target.samefile(opened.path) for target in there):
        raise UserError(f"--out {out}: is what is to be read; {_WAY_OUT}")
    if there and not force:
        raise UserError(f"{there[0]}: exists; --force overwrites it{f' and {len(there) - 1} more' if len(there) > 1 else ''}, or {_WAY_OUT}")
    for target in there:
        if form != "arrays" and target.is_dir():
            raise UserError(f"{target}: is a folder; {_WAY_OUT}")
        if form == "arrays":
            _check_ours(target)
    if form == "npz":
        _write_npz(opened, out, progress)
        if raw is not None:
            _write_counts(opened.criteo.day_count_file(raw), "total_per_file", opened.rows_of_days, force)
    elif form == "arrays":
        _write_arrays(opened, out, progress)
    elif form == "bin":
        _write_bins(opened, out, there, raw, seed, randomize, progress)
    else:
        _write_days(opened, out, there, seed, randomize, force, progress)
    return targets


def _check_ours(target: Path) -> None:
    """Raises UserError where it is anything but a folder that is ours as a whole."""
    if not target.is_dir():
        raise UserError(f"{target}: is a file; {_WAY_OUT}")
    if not is_only_arrays(target):
        raise UserError(f"{target}: is a folder that holds other things; {_WAY_OUT}")


def _targets(criteo: CriteoSet, form: str, out: Path) -> list[Path]:
    if form == "bin":
        stem = mlperf_bin.bin_stem(out)
        # in the order in which --force deletes them: without the last one the others would pass for upstream's
        return [*(mlperf_bin.bin_file(stem, split) for split in mlperf_bin.SPLITS), mlperf_bin.sidecar_file(stem)]
    return [criteo.reordered_file(out, day) for day in range(criteo.days)] if form == "days" else [out]


def _in_order(opened: Opened, seed: int, randomize: str, progress: bool) -> BinSource:
    """The rows with the training rows' order, which is drawn and kept beside them where it is not there."""
    meta = opened.data.meta
    key = OrderKey(seed, randomize, tuple(opened.rows_of_days.tolist()))
    sampled = meta.raw_rows if meta is not None and meta.sub_sample_rate > 0 else 0
    order, _ = stored_order(order_file(opened.path), key, None, made_now=False, sampled_rows=sampled, progress=progress)
    return BinSource(opened.path, opened.data, opened.rows_of_days, order)


def _npz_arrays(pieces: "dict[str, Iterator[np.ndarray]]", num_rows: int) -> dict:
    shapes = {"X_cat": (num_rows, NUM_SPARSE), "X_int": (num_rows, NUM_DENSE), "y": (num_rows,)}
    return {name: (shapes[name], pieces[name]) for name in shapes}


def _columns(rows: Iterator[np.ndarray], name: str, bar: tqdm) -> Iterator[np.ndarray]:
    """X_cat, X_int or y of packed rows, piece by piece."""
    columns = {"X_cat": slice(1 + NUM_DENSE, None), "X_int": slice(1, 1 + NUM_DENSE), "y": 0}[name]
    for piece in rows:
        yield piece[:, columns].astype("<i4", copy=False)
        bar.update(len(piece))


def _plain(opened: Opened) -> Iterator[np.ndarray]:
    for start in range(0, len(opened.data.packed), _CHUNK):
        yield opened.data.packed[start : start + _CHUNK].numpy()


def _write_npz(opened: Opened, out: Path, progress: bool) -> None:
    data, num_rows = opened.data, len(opened.data.packed)
    with atomic_write(out, _WAY_OUT) as file, tqdm(total=3 * num_rows, unit="row", unit_scale=True, desc=out.name, disable=not progress) as bar:
        arrays = _npz_arrays({name: _columns(_plain(opened), name, bar) for name in ("X_cat", "X_int", "y")}, num_rows)
        arrays["counts"] = ((NUM_SPARSE,), iter([data.counts.astype("<i4")]))
        arrays["total_per_file"] = ((opened.criteo.days,), iter([opened.rows_of_days]))
        if data.meta is not None:
            arrays["meta"] = ((), iter([np.array(data.meta.to_json())]))
        vocabularies = _vocabularies(opened)
        if vocabularies is not None:
            shared, keys = vocabularies
            arrays[NPZ_SHARED] = ((), iter([np.array(shared)]))
            arrays |= {npz_member(column): ((int(count),), map(keys, [column])) for column, count in enumerate(data.counts)}
        write_npz(file, arrays)


def _vocabularies(opened: Opened) -> tuple[bool, Callable[[int], np.ndarray]] | None:
    """Whether id 0 is shared, and what reads the keys of a column in id order, [ids] uint32; None where the set has none (upstream's)."""
    path = opened.path

    def keys(column: int) -> np.ndarray:
        with _reading_vocabularies(path):
            if path.is_dir():
                return np.memmap(path / vocabulary_files(read_manifest(path).tables[column].name)[0], "<u4", "r")
            with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
                found = read_small(archive, npz_member(column))
            if found.shape != (opened.data.counts[column],) or found.dtype != np.uint32:
                raise ValueError(f"column {column}: keys are {found.dtype} {list(found.shape)}, not uint32 [{opened.data.counts[column]}]")
            return found

    with _reading_vocabularies(path):
        if path.is_dir():
            return read_manifest(path).tables[0].shared, keys
        with open(path, "rb") as file, zipfile.ZipFile(file) as archive:
            return (bool(read_small(archive, NPZ_SHARED)), keys) if f"{NPZ_SHARED}.npy" in archive.namelist() else None


@contextlib.contextmanager
def _reading_vocabularies(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, *DAMAGE) as error:
        raise UserError(f"{path}: its vocabularies cannot be read ({cause(error)})") from None


def _write_arrays(opened: Opened, out: Path, progress: bool) -> None:
    """In a folder beside, which then gets the name; what had it is removed after that. Memory: 8 bytes an id of all columns, to count how often
    each comes, and, from an .npz, 4 bytes an id of one column."""
    data, vocabularies = opened.data, _vocabularies(opened)
    if vocabularies is None or data.meta is None:
        raise UserError(f"{opened.path}: is upstream's and says of no id what it stands for; --to npz makes a file that --memory-map reads")
    shared, keys = vocabularies
    seen = [np.zeros(rows, dtype=np.int64) for rows in data.counts]
    with _folder_of_its_own(out) as folder:
        unfinished = folder / "new"
        unfinished.mkdir()
        bar = tqdm(total=len(data.packed), unit="row", unit_scale=True, desc=out.name, disable=not progress)
        with open(unfinished / ROWS, "wb") as file, bar:
            for piece in _plain(opened):
                file.write(np.ascontiguousarray(piece, dtype="<i4").data)
                for column, counts in enumerate(seen):
                    np.add.at(counts, piece[:, 1 + NUM_DENSE + column], 1)
                bar.update(len(piece))
        for column, (table, counts) in enumerate(zip(_tables(opened, shared), seen, strict=True)):
            keys_file, counts_file = vocabulary_files(table.name)
            (unfinished / keys_file).write_bytes(keys(column).astype("<u4", copy=False).data)
            (unfinished / counts_file).write_bytes(counts.astype("<i8", copy=False).data)
        files = {path.name: checksums(path) for path in sorted(unfinished.iterdir())}
        (unfinished / NAME).write_text(_manifest(opened, shared, files).to_json())
        for path in unfinished.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        sync_folder(unfinished)
        if out.exists():  # by rename: a folder must not lie under this name half removed
            os.rename(out, folder / "old")
        os.rename(unfinished, out)
        sync_folder(out.parent)


@contextlib.contextmanager
def _folder_of_its_own(out: Path) -> Iterator[Path]:
    """.<name>.<process>.<random>.unfinished beside `out`, locked, and removed at the end. Those of runs that were killed are removed too: nobody
    holds their lock. An OSError becomes a UserError."""
    folder = out.with_name(f".{out.name}.{os.getpid()}.{secrets.token_hex(4)}.unfinished")
    try:
        for stale in out.parent.glob(f".{glob.escape(out.name)}.*.unfinished"):
            with contextlib.suppress(OSError), _opened(stale) as number:
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stale)
        folder.mkdir()
        with _opened(folder) as number:
            with contextlib.suppress(OSError):  # a file system without locks: only the cleaning up is lost
                fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield folder
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}; {_WAY_OUT}") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _opened(folder: Path) -> Iterator[int]:
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _tables(opened: Opened, shared: bool) -> tuple[Table, ...]:
    modulo = opened.data.meta.max_ind_range if 0 < opened.data.meta.max_ind_range < 2**32 else 0
    names = COLUMNS[1 + NUM_DENSE :]
    return tuple(Table(name, int(rows), modulo=modulo, shared=shared) for name, rows in zip(names, opened.data.counts, strict=True))


def _manifest(opened: Opened, shared: bool, files: dict[str, File]) -> Manifest:
    data, meta, days = opened.data, opened.data.meta, opened.rows_of_days
    raws = meta.raws or (meta.raw,) * len(days)
    parts = tuple(Part(f"day_{day}", int(rows), asdict(raw)) for day, (rows, raw) in enumerate(zip(days, raws, strict=True)))
    flags = {"max_ind_range": meta.max_ind_range, "sub_sample_rate": meta.sub_sample_rate}
    source = {"source": opened.criteo.name, **({"draws": meta.draws} if meta.draws else {}), "flags": flags}
    made = flags | {"min_frequency": meta.min_frequency, "vocabulary": asdict(meta.vocabulary) if meta.vocabulary else None}
    halves = (int(days[:-1].sum()), (int(days[-1]) + 1) // 2)
    dense = tuple(DenseColumn(name) for name in COLUMNS[1 : 1 + NUM_DENSE])
    return Manifest("int32", len(data.packed), meta.raw_rows, *halves, parts, dense, _tables(opened, shared), source, made, files)


def _write_bins(opened: Opened, out: Path, there: list[Path], raw: Path | None, seed: int, randomize: str, progress: bool) -> None:
    meta = opened.data.meta
    asked = (max(meta.max_ind_range, 0), meta.sub_sample_rate, meta.min_frequency) if meta is not None else (0, 0.0, 0)
    source = _in_order(opened, seed, randomize, progress)
    for target in there:
        target.unlink()
    counts_file = opened.criteo.id_count_file(raw) if raw is not None else None
    made_with = mlperf_bin.MadeWith(asked[0], asked[1], asked[2], randomize)
    mlperf_bin.write_bins(mlperf_bin.bin_stem(out), source, made_with, counts_file=counts_file, progress=progress)


def _write_days(opened: Opened, out: Path, there: list[Path], seed: int, randomize: str, force: bool, progress: bool) -> None:
    source = _in_order(opened, seed, randomize, progress)
    for target in there:  # all of them first: what an interrupted run leaves is then never a mix of old and new
        target.unlink()
    counts = (
        (opened.criteo.day_count_file(out), "total_per_file", opened.rows_of_days),
        (opened.criteo.id_count_file(out), "counts", opened.data.counts.astype("<i4")),
    )
    for path, name, values in counts:
        _write_counts(path, name, values, force)
    ends = np.cumsum(opened.rows_of_days)
    for day, end in enumerate(ends.tolist()):
        path, first = opened.criteo.reordered_file(out, day), end - int(opened.rows_of_days[day])
        bar = tqdm(total=3 * (end - first), unit="row", unit_scale=True, desc=path.name, disable=not progress)
        with atomic_write(path, _WAY_OUT) as file, bar:
            pieces = {name: _columns(mlperf_bin.reordered(source, first, end), name, bar) for name in ("X_cat", "X_int", "y")}
            write_npz(file, _npz_arrays(pieces, end - first))


def _write_counts(path: Path, name: str, values: np.ndarray, force: bool) -> None:
    """One of upstream's two small files; its own stays where it says the same."""
    if force:
        path.unlink(missing_ok=True)
    if write_count_file(path, name, values):
        return
    try:
        same = np.array_equal(read_array(path, name), values)
    except (OSError, *DAMAGE):
        same = False
    if not same:
        raise UserError(f"{path}: is not ours, and of other data; --force overwrites it, or {_WAY_OUT}")


def main(argv: list[str]) -> int:
    """Returns the exit status (data_loaders.command)."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.convert", description="A processed Criteo set in another of its forms.")
    parser.add_argument("processed", type=Path, metavar="PROCESSED", help=".npz of ours or of upstream, or an arrays folder")
    parser.add_argument("--to", required=True, choices=("npz", "arrays", "bin", "days"), help="days: the files of upstream's --memory-map")
    out_help = "npz, arrays: what to write; bin: what --processed-data-file is to name; days: what upstream's --raw-data-file is to name"
    parser.add_argument("--out", required=True, type=Path, metavar="PLACE", help=out_help)
    parser.add_argument("--force", action="store_true", help="overwrite what is there")
    parser.add_argument("--data-set", default="", choices=("", *SETS), help="of upstream's .npz, which does not say it")
    raw_help = "where upstream looks: its <this>_day_count.npz is read with its .npz; npz writes <this>_day_count.npz, bin <this>_fea_count.npz"
    parser.add_argument("--raw-data-file", default="", help=raw_help)
    parser.add_argument("--data-randomize", default="total", choices=("total", "day", "none"), help="bin, days: order of the training rows")
    parser.add_argument("--numpy-rand-seed", type=int, default=123, help="bin, days: seed of that order")
    args = parser.parse_args(argv)
    return ended(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    raw, progress = Path(args.raw_data_file) if args.raw_data_file else None, sys.stderr.isatty()
    if not 0 <= args.numpy_rand_seed < 2**32:
        raise UserError(f"--numpy-rand-seed={args.numpy_rand_seed}: must be from 0 to 4294967295")
    opened = open_processed(args.processed, args.data_set, raw, progress)
    options = {"raw": raw, "seed": args.numpy_rand_seed, "randomize": args.data_randomize}
    written = convert(opened, args.to, args.out, **options, force=args.force, progress=progress)
    more = f" and {len(written) - 1} more files" if len(written) > 1 else ""
    print(f"{len(opened.data.packed):,} rows of {opened.criteo.name}, {opened.criteo.days} days: {written[0]}{more}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
