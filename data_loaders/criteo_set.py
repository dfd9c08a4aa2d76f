"""The two Criteo sets as upstream names them: how many days they have, and which files lie where."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_loaders.criteo_npz import DAMAGE, Meta, Processed, RawFingerprint, atomic_write, cause, read_array
from data_loaders.split import split_days
from dlrm_xla.specs import UserError

_OUR_MARK = "made_by_dlrm_xla"
PROCESSED_NAME = "kaggleAdDisplayChallenge_processed.npz"  # upstream's, in the raw file's folder
WAY_OUT = "delete it or choose another --processed-data-file"


@dataclass(frozen=True)
class CriteoSet:
    """kaggle: one raw file, cut into 7 equal days. terabyte: raw is a prefix, "DIR/day", of the files DIR/day_0 .. DIR/day_23, plain or .gz."""

    name: str
    days: int

    def stem(self, raw: Path) -> Path:
        """What upstream's file names begin with."""
        return raw.parent / raw.name.split(".")[0] if self.name == "kaggle" else raw

    def processed(self, raw: Path) -> Path:
        """Where a result lies that no flag names: upstream's file for Kaggle, a folder of our own for the Terabyte set."""
        if self.name == "kaggle":
            return raw.parent / PROCESSED_NAME
        return raw.with_name(f"{raw.name}_processed")

    def day_count_file(self, raw: Path) -> Path:
        """Where upstream looks for the rows of each day."""
        return _beside(self.stem(raw), "_day_count.npz")

    def id_count_file(self, raw: Path) -> Path:
        """Where upstream looks for the number of ids of each column."""
        return _beside(self.stem(raw), "_fea_count.npz")

    def reordered_file(self, raw: Path, day: int) -> Path:
        """Upstream's file of a day's rows in the order of --memory-map."""
        return _beside(self.stem(raw), f"{'_day' if self.name == 'kaggle' else ''}_{day}_reordered.npz")

    def raw_files(self, raw: Path) -> list[Path]:
        """The raw files that are there."""
        files = [raw] if self.name == "kaggle" else [_beside(raw, f"_{day}{end}") for day in range(self.days) for end in ("", ".gz")]
        return [file for file in files if file.is_file()]


SETS = {"kaggle": CriteoSet("kaggle", 7), "terabyte": CriteoSet("terabyte", 24)}


def _beside(stem: Path, end: str) -> Path:
    return stem.with_name(stem.name + end)


@dataclass(frozen=True)
class Asked:
    """What a run wants the rows to be made with. vocabulary: "" for none; draws: Meta.draws of this run's random numbers."""

    max_ind_range: int
    sub_sample_rate: float
    min_frequency: int
    vocabulary: str
    draws: str


def check_meta(criteo: CriteoSet, meta: Meta, path: Path, raw: Path | None, asked: Asked, way_out: str = WAY_OUT) -> None:
    """Refuses a file of ours that was made with other flags or from other raw files (if they are still there to compare). Raises UserError."""
    vocabulary = asked.vocabulary
    # 0 and every negative number mean the same: no limit
    rules = (
        ("number of days", meta.days, criteo.days),
        ("--max-ind-range", max(meta.max_ind_range, 0) or -1, max(asked.max_ind_range, 0) or -1),
        ("--data-sub-sample-rate", float(meta.sub_sample_rate), float(asked.sub_sample_rate)),
        ("--min-frequency", meta.min_frequency, asked.min_frequency),
    )
    for flag, of_file, wanted in rules:
        if of_file != wanted:
            raise UserError(f"{path}: made with {flag}={of_file}, but {wanted} is asked for; {way_out}")
    if asked.sub_sample_rate > 0 and meta.draws and meta.draws != asked.draws:
        raise UserError(f"{path}: its rows were sampled with another --numpy-rand-seed; give the seed that they were made with, or {way_out}")
    if bool(vocabulary) != (meta.vocabulary is not None):
        made, asked_for = ("without", "") if vocabulary else ("with", "not ")
        raise UserError(f"{path}: made {made} --vocabulary, which is {asked_for}asked for; {way_out}")
    if vocabulary and not _same(meta.vocabulary, vocabulary_file(Path(vocabulary))):
        raise UserError(f"{path}: made with another --vocabulary ({meta.vocabulary.name}) than {vocabulary}; {way_out}")
    if raw is None:
        return
    now = {_day_of(file.name): file for file in criteo.raw_files(raw)}
    for made in meta.raws or (meta.raw,):
        file = now.get(_day_of(made.name)) if criteo.name == "terabyte" else raw
        if file is None or not file.is_file() or _same(made, file):
            continue
        sizes = f"{made.size} bytes then, {file.stat().st_size} now" if made.size != file.stat().st_size else "same size, other content"
        named = f"--raw-data-file={raw}" if criteo.name == "kaggle" else f"{file}, of --raw-data-file={raw}"
        raise UserError(f"{path}: made from another raw file ({made.name}) than {named} ({sizes}); {way_out}")


def vocabulary_file(place: Path) -> Path:
    """The file that stands for an older result: an .npz itself, an arrays folder's manifest."""
    return place / "manifest.json" if place.is_dir() else place


def _day_of(name: str) -> str:
    return name.removesuffix(".gz").rpartition("_")[2]


def _same(made: RawFingerprint, file: Path) -> bool:
    """Also where the file cannot be read: nothing speaks against it."""
    try:
        return made.same_file(RawFingerprint.of(file))
    except OSError:
        return True


def rows_of_days(criteo: CriteoSet, data: Processed, path: Path, raw: Path | None) -> np.ndarray:
    """[days] int64, rows of each day: the file's own; else upstream's <stem>_day_count.npz by the raw file; else, Kaggle, equal days."""
    total, source = data.total_per_file, path
    if total is None and raw is not None and criteo.day_count_file(raw).exists():
        source = criteo.day_count_file(raw)
        try:
            total = read_array(source, "total_per_file")
        except (OSError, *DAMAGE) as error:
            raise UserError(f"{source}: cannot read upstream's rows per day ({cause(error)}); delete it") from None
    n = len(data.packed)
    if total is None and criteo.name == "kaggle":
        return split_days(n, criteo.days)
    if total is None:
        where = f"{criteo.day_count_file(raw)}: no such file" if raw is not None else "no --raw-data-file=DIR/day is given"
        raise UserError(f"{path}: does not say how many rows each day has, and {where}; upstream's DIR/day_day_count.npz says it")
    if total.shape != (criteo.days,) or total.dtype.kind not in "iu" or (total < 0).any() or int(total.sum()) != n:
        raise UserError(f"{source}: total_per_file {total.tolist()} is not the rows of {criteo.days} days, {n} in all; delete {source.name}")
    return total.astype(np.int64)


def read_id_counts(path: Path) -> np.ndarray:
    """[26] int64 of a file <stem>_fea_count.npz. Raises UserError where it is something else."""
    try:
        counts = read_array(path, "counts")
    except (OSError, *DAMAGE) as error:
        raise UserError(f"{path}: cannot read the number of ids of each column ({cause(error)}); delete it") from None
    if counts.shape != (26,) or counts.dtype.kind not in "iu" or (counts < 1).any():
        raise UserError(f"{path}: counts is not 26 whole numbers above 0; delete it")
    return counts.astype(np.int64)


def write_count_file(path: Path, name: str, values: np.ndarray, way_out: str = "name another place") -> bool:
    """One array as upstream looks for it. Upstream's own file is left as it is (False); one of ours is brought up to date."""
    if path.exists():
        try:
            read_array(path, _OUR_MARK)
        except (OSError, *DAMAGE):
            return False
    with atomic_write(path, way_out) as file:
        np.savez(file, **{name: values, _OUR_MARK: np.array("")})
    return True
