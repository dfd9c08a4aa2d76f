"""A user's table (--data-set=table): made into an arrays folder once, then read as mini-batches.

The folder remembers the schema, the flags and the raw files that it was made from; a run that asks for others is refused.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_loaders.arrays import Arrays, is_arrays, open_arrays, read_manifest
from data_loaders.build import Options, build
from data_loaders.criteo_npz import RawFingerprint
from data_loaders.manifest import NAME, Manifest, Table, bag_files, vocabulary_files
from data_loaders.part import WHOLE, Part
from data_loaders.reorder import OrderKey, order_file, stored_order
from data_loaders.schema import Schema
from data_loaders.spill import Busy
from data_loaders.table_batches import TableSplit
from data_loaders.table_files import default_folder, find_files
from data_loaders.table_source import TableSource, column_ranges
from data_loaders.table_values import MISSING_32, MISSING_64
from dlrm_xla.specs import UserError

_MOST_PARTS = 200  # of a stored order, which has a byte for the number of a part
_COUNTED_ROWS = 2_000_000  # labels of mapped rows, and keys, are counted up to so many
_PIECE_ROWS = 1 << 16
_UNKNOWN_KEY = re.compile(r"--vocabulary=.*: column (\S+): key (\d+) ")  # of data_loaders.vocabulary
_WAY_OUT = "delete it or choose another --processed-data-file"


@dataclass
class TableDataset:
    """Both halves, and what the model needs to know of the columns (dlrm_xla.batch.Dataset). Without dense columns there is one of zeros."""

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    num_dense: int
    train: TableSplit
    test: TableSplit
    bayes_auc: float | None = None


def open_table(
    *,
    schema_file: str,
    raw_data_file: str,
    processed_data_file: str,
    data_randomize: str,
    max_ind_range: int,
    batch_size: int,
    test_batch_size: int,
    drop_last: bool,
    num_batches: int,
    memory_map: bool,
    memory_bytes: int,
    min_frequency: int,
    vocabulary: str,
    rng: np.random.RandomState,
    seed: int,
    progress: bool,
    print_line: Callable[[str], None],
    map_rows: bool = False,
    part: Part = WHOLE,
) -> TableDataset:
    """The data set of the flags of the same names. The arrays folder is processed_data_file, or else <raw file or folder>.processed; it is made
    first where it is not there.

    max_ind_range   of the columns for which the schema has none
    rng             the run's stream: the order of the training rows is drawn from it as Criteo's is
    seed            memory_map: the order lies in a file, drawn from a stream of its own that starts here (data_loaders.reorder)
    print_line      gets a summary: rows, CTR, each table's rows and bags; of several ranks the first one makes it
    map_rows        rows stay in the file, as with memory_map, and everything else is as without: several ranks share what the system keeps of it
    part            which rows of each batch are read and given
    Raises UserError for whatever is wrong with the flags, the schema or the files.
    """
    schema = Schema.read(schema_file)
    if processed_data_file.endswith(".npz"):
        raise UserError(f"--processed-data-file={processed_data_file}: the arrays of a table are a folder; name it without .npz")
    folder = Path(processed_data_file) if processed_data_file else default_folder(raw_data_file)
    older = Path(vocabulary) if vocabulary else None
    made_now = not is_arrays(folder)
    if made_now:
        if not raw_data_file:
            raise UserError(f"--processed-data-file={folder}: no arrays there; to make them, name the table's files with --raw-data-file")
        source = TableSource(find_files(raw_data_file), schema, max_ind_range)
        print_line(f"Reading raw data={raw_data_file}")
        try:
            build(source, folder, Options(memory_bytes, min_frequency, older), progress=progress)
        except Busy:
            raise
        except UserError as error:
            raise UserError(_more_exactly(str(error), source)) from None
    else:
        manifest = read_manifest(folder)
        _check_same(manifest, folder, schema, max_ind_range, min_frequency, older)
        if raw_data_file:
            _check_raw(manifest, folder, raw_data_file, print_line)
    print_line(f"Reading pre-processed data={folder}")
    arrays = open_arrays(folder, memory_map or map_rows, progress=progress)
    manifest = arrays.manifest
    if not manifest.num_train or not manifest.num_test:
        half = "train on" if not manifest.num_train else "test"
        raise UserError(f"{folder}: the split leaves no row to {half} ({manifest.rows} rows in all); change split: in {_split_line(schema)}")
    order = _order(manifest, folder, schema, data_randomize, memory_map, rng, seed, made_now, progress)
    train = TableSplit(
        arrays, order, num_rows=manifest.num_train, batch_size=batch_size, drop_last=drop_last, num_batches=num_batches, part=part
    )
    test = TableSplit(
        arrays, None, first=manifest.num_train, num_rows=manifest.num_test, batch_size=test_batch_size, num_batches=num_batches, part=part
    )
    if part.rank == 0:  # it reads labels
        for line in (*_summary(arrays, folder, memory_map or map_rows), *_one_label(arrays, schema)):
            print_line(line)
    tables = manifest.tables
    num_dense = max(len(manifest.dense), 1)
    return TableDataset(tuple(table.rows for table in tables), tuple(table.hotness for table in tables), num_dense, train, test)


# ---- what the build does not know of the schema -----------------------------------------------------------------------------------


def _more_exactly(error: str, source: TableSource) -> str:
    """An error of the build with the place in the schema, or with the cell that a key was made from."""
    if error.startswith("split: "):
        written = f" (the column is written as {source.first_time})" if source.schema.split.start is not None else ""
        return f"{_split_line(source.schema)}: {error}{written}"
    unknown = _UNKNOWN_KEY.search(error)
    names = [column.name for column in source.categorical]
    if unknown and unknown[1] in names:
        found = source.find_key(names.index(unknown[1]), int(unknown[2]))
        return f"{found}: {error}" if found else error
    return error


def _split_line(schema: Schema) -> str:
    return f"{schema.path}: line {schema.split.line}" if schema.split.line else schema.path


# ---- an older folder ----------------------------------------------------------------------------------------------------------------


def _check_same(
    manifest: Manifest, folder: Path, schema: Schema, max_ind_range: int, min_frequency: int, vocabulary: Path | None
) -> None:
    """Refuses a folder that was made with another schema or other flags."""
    if manifest.source.get("source") != "table":
        raise UserError(f"{folder}: holds another data set than a table's; name another --processed-data-file")
    if manifest.flags.get("schema") != schema.fingerprint():
        then, now = manifest.source.get("schema", {}), schema.canonical()
        differ = [key for key in now if then.get(key) != now[key]]
        what = f" ({', '.join(differ)}: differ)" if differ else ""
        raise UserError(f"{folder}: made with another schema than {schema.path}{what}; {_WAY_OUT}")
    if manifest.flags.get("max_ind_range") != column_ranges(schema, max_ind_range):
        then = manifest.flags.get("max_ind_range")
        raise UserError(f"{folder}: made with another --max-ind-range than {max_ind_range} (of the columns: {then}); {_WAY_OUT}")
    if manifest.flags.get("min_frequency", 0) != min_frequency:
        then = manifest.flags.get("min_frequency")
        raise UserError(f"{folder}: made with --min-frequency={then}, but {min_frequency} is asked for; {_WAY_OUT}")
    then = manifest.flags.get("vocabulary")
    if vocabulary is None:
        if then:
            raise UserError(f"{folder}: made with --vocabulary, and without it is asked for; {_WAY_OUT}")
        return
    if not then or not RawFingerprint(**then).same_file(_fingerprint(vocabulary / NAME if vocabulary.is_dir() else vocabulary, "--vocabulary")):
        raise UserError(f"{folder}: made {'with another' if then else 'without'} --vocabulary than {vocabulary}; {_WAY_OUT}")


def _check_raw(manifest: Manifest, folder: Path, raw_data_file: str, print_line: Callable[[str], None]) -> None:
    """Refuses a folder that was made from other files. Files that are no longer there cannot be compared."""
    try:
        files = find_files(raw_data_file)
    except UserError as error:
        print_line(f"{error}. {folder} is used as it is")
        return
    if len(files) != len(manifest.parts):
        made = len(manifest.parts)
        raise UserError(f"{folder}: made from {made} raw files, but --raw-data-file={raw_data_file} names {len(files)}; {_WAY_OUT}")
    for file, part in zip(files, manifest.parts, strict=True):
        made, now = RawFingerprint(**part.raw), _fingerprint(file, "--raw-data-file")
        if not made.same_file(now):
            sizes = f"{made.size} bytes then, {now.size} now" if made.size != now.size else "same size, other content"
            raise UserError(f"{folder}: made from another raw file ({made.name}) than --raw-data-file={file} ({sizes}); {_WAY_OUT}")


def _fingerprint(path: Path, flag: str) -> RawFingerprint:
    try:
        return RawFingerprint.of(path)
    except OSError as error:
        raise UserError(f"{flag}={path}: cannot read it: {error.strerror}") from None


# ---- the order of the training rows ---------------------------------------------------------------------------------------------


def _order(
    manifest: Manifest, folder: Path, schema: Schema, randomize: str, mapped: bool, rng: np.random.RandomState, seed: int, made_now: bool,
    progress: bool,
):  # fmt: skip
    """[num_train] row numbers, or what stands for them; None: as the rows lie."""
    if randomize == "none":
        return None
    parts = _train_rows_of_parts(manifest, schema)
    if randomize == "day" and parts is None:
        raise UserError("--data-randomize=day: a split by time takes rows out of their files; use --data-randomize=total or none")
    if mapped:
        if parts is None or (randomize == "total" and len(parts) > _MOST_PARTS):
            parts = (manifest.num_train,)
        key = OrderKey(seed, randomize, (*parts, manifest.num_test))
        return stored_order(order_file(folder), key, None, made_now=made_now, sampled_rows=0, progress=progress)[0]
    order = _draw(manifest.num_train, parts, randomize, rng)
    _draw(manifest.num_train, parts, randomize, rng)  # as Criteo's test half, and upstream's, does
    return order


def _draw(num_train: int, parts: tuple[int, ...] | None, randomize: str, rng: np.random.RandomState) -> torch.Tensor:
    if randomize == "total":
        return torch.from_numpy(rng.permutation(num_train))
    ends = np.cumsum(parts)
    return torch.from_numpy(np.concatenate([rng.permutation(np.arange(end - rows, end)) for rows, end in zip(parts, ends, strict=True)]))


def _train_rows_of_parts(manifest: Manifest, schema: Schema) -> tuple[int, ...] | None:
    """Training rows of each file that has some, in order; None where the split mixes files (by time) and there are several."""
    rows = [part.rows for part in manifest.parts]
    if schema.split.by == "fraction":
        ends = np.minimum(np.cumsum(rows), manifest.num_train)
        rows = np.diff(ends, prepend=0).tolist()
    elif schema.split.by == "file":
        rows = _train_files(rows, manifest.num_train, manifest.source.get("test_parts", []))
    elif len(rows) > 1:
        return None
    else:
        rows = [manifest.num_train]
    return tuple(count for count in rows if count)


def _train_files(rows: list[int], num_train: int, test_parts: list[int]) -> list[int]:
    kept = [count for part, count in enumerate(rows) if part not in test_parts]
    return kept if sum(kept) == num_train else [num_train]


# ---- the summary ----------------------------------------------------------------------------------------------------------------


def _summary(arrays: Arrays, folder: Path, mapped: bool) -> Iterator[str]:
    manifest = arrays.manifest
    num_train, num_test = manifest.num_train, manifest.num_test
    counted = ""
    if not mapped or num_train + num_test <= _COUNTED_ROWS:
        train, test = _share_of_ones(arrays, 0, num_train), _share_of_ones(arrays, num_train, num_train + num_test)
        counted = f"; label 1: {train:.2%} of the training rows, {test:.2%} of the others"
    yield f"Table of {num_train + num_test} rows, {num_train} for training, {num_test} for testing{counted}"
    yield f"{len(manifest.dense)} dense columns{' (the model gets one of zeros)' if not manifest.dense else ''}, {len(manifest.tables)} tables"
    for table in manifest.tables:
        yield f"  {table.name}: {table.rows} rows{_bags_text(manifest, table)}{_missing_text(folder, manifest, table)}"


def _one_label(arrays: Arrays, schema: Schema) -> Iterator[str]:
    """A warning for each half whose rows (the first _COUNTED_ROWS of them) have one label."""
    num_train, num_test = arrays.manifest.num_train, arrays.manifest.num_test
    for first, rows, half, follows in (
        (0, num_train, "training", "nothing can be learnt"), (num_train, num_test, "test", "the test has no AUC"),
    ):  # fmt: skip
        label = _only_label(arrays, first, first + min(rows, _COUNTED_ROWS))
        if label is not None:
            which = f"of the first {_COUNTED_ROWS:,} {half} rows" if rows > _COUNTED_ROWS else f"of the {rows:,} {half} rows"
            what = f"no row's label is {1 - label}"
            where = f"{schema.path}: line {schema.label.line}: label {schema.label.column!r}"
            yield f"warning: {where}: {what} {which}, so {follows}; look at positive: and split:"


def _only_label(arrays: Arrays, first: int, end: int) -> int | None:
    """The label that all of some rows have; mostly known to be none after the first piece."""
    shares = set()
    for start in range(first, end, _PIECE_ROWS):
        shares.add(_share_of_ones(arrays, start, min(start + _PIECE_ROWS, end)))
        if shares not in ({0.0}, {1.0}):
            return None
    return int(shares.pop())


def _share_of_ones(arrays: Arrays, first: int, end: int) -> float:
    ones = 0
    for start in range(first, end, _PIECE_ROWS):
        labels = arrays.rows[start : min(start + _PIECE_ROWS, end)][:, 0]
        ones += int(torch.count_nonzero(labels))  # words: 0.0 is 0
    return ones / (end - first)


def _bags_text(manifest: Manifest, table: Table) -> str:
    if not table.multi_hot:
        return ""
    mean = manifest.files[bag_files(table.name)[1]].bytes / 4 / max(manifest.rows, 1)
    advice = "; most slots stay empty, max_hot in the schema cuts long bags" if table.hotness > 16 and table.hotness > 8 * mean else ""
    return f", bags of up to {table.hotness} ids, {mean:.2f} on average{advice}"


def _missing_text(folder: Path, manifest: Manifest, table: Table) -> str:
    """How many cells were missing, as the vocabulary knows it; nothing where it does not (folded and very large columns)."""
    if table.multi_hot or table.modulo or table.rows > _COUNTED_ROWS:
        return ""
    keys_file, counts_file = (folder / name for name in vocabulary_files(table.name))
    try:
        keys = np.fromfile(keys_file, np.uint32 if table.key_bits == 32 else np.uint64)
        found = np.flatnonzero(keys == (MISSING_32 if table.key_bits == 32 else MISSING_64))
        found = found[found > 0] if table.shared else found
        count = int(np.fromfile(counts_file, np.int64)[found[0]]) if len(found) else 0
    except (OSError, IndexError):
        return ""
    return f", {count} cells missing" if count else ""
