"""The Criteo sets as mini-batches: opens the raw or the processed files, splits them into train and test as upstream does.

Differs from upstream: rows stay in one packed int32 array and a batch is one gather (upstream keeps lists of arrays and builds tensors from
lists, 1.2 ms per 128 rows); the file is read once for both halves; with --memory-map the same file is read, not a second set of files; a
processed file made with other flags, or from another raw file, is refused; the place that --processed-data-file names is also the place
that is written; with --mlperf-logging --memory-map, batches of the Terabyte set straddle days as ever, and days shorter than a batch do
not pile up in one giant batch at the end (with --upstream-compat they do).
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_loaders import mlperf_bin
from data_loaders.arrays import is_arrays
from data_loaders.criteo_map import read_processed
from data_loaders.criteo_npz import Meta, Processed, cause
from data_loaders.criteo_set import SETS, Asked, CriteoSet, check_meta, rows_of_days
from data_loaders.criteo_source import draws_of
from data_loaders.criteo_split import CriteoDataset, CriteoSplit, upstreams_last_batch
from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from data_loaders.part import WHOLE, Part
from data_loaders.preprocess import preprocess
from data_loaders.reorder import MappedOrder, OrderKey, order_file, stored_order
from dlrm_xla.specs import UserError

RANDOMIZE_CHOICES = ("total", "day", "none")


@dataclass
class _Ready:
    """Opened rows. made_now: this run made them; order and drawn: of --memory-map (data_loaders.reorder)."""

    data: Processed
    rows_of_days: np.ndarray
    path: Path
    made_now: bool
    order: MappedOrder | None = None
    drawn: bool = False


@dataclass(frozen=True)
class _Request:
    """The flags that say which rows, checked."""

    criteo: CriteoSet
    raw: Path | None
    path: Path
    data_randomize: str
    asked: Asked
    memory_bytes: int
    memory_map: bool
    map_rows: bool
    upstream_compat: bool
    seed: int
    rng: np.random.RandomState
    preprocess_rng: np.random.RandomState
    progress: bool


def open_criteo(
    *,
    data_set: str,
    raw_data_file: str,
    processed_data_file: str,
    data_randomize: str,
    max_ind_range: int,
    sub_sample_rate: float,
    batch_size: int,
    test_batch_size: int,
    drop_last: bool,
    num_batches: int,
    rng: np.random.RandomState,
    preprocess_rng: np.random.RandomState,
    progress: bool,
    print_line: Callable[[str], None],
    upstream_compat: bool = False,
    memory_map: bool = False,
    seed: int = 0,
    mlperf: bool = False,
    bin_loader: bool = False,
    bin_shuffle: bool = False,
    memory_bytes: int = 4 * 10**9,
    min_frequency: int = 0,
    vocabulary: str = "",
    note: Callable[[str], None] = lambda line: None,
    map_rows: bool = False,
    part: Part = WHOLE,
) -> CriteoDataset:
    """The data set of upstream's flags of the same names; preprocesses first where the processed file does not exist.

    rng             the run's stream: the train permutation is drawn from it, then, as upstream's test half does, the same draws again
    preprocess_rng  the sub-sampling's stream, used only where preprocessing runs
    print_line      gets upstream's stdout lines, in its order
    upstream_compat ids of a file made without --max-ind-range are folded by modulo while reading; otherwise it is refused
    memory_map      rows stay in the file and so does the train order (data_loaders.reorder). Where that is not there it is drawn: from a
                    stream of its own that starts at `seed`, or, with upstream_compat, from the run's
    seed            of the run; the stored order holds for one seed
    mlperf          --mlperf-logging; matters with upstream_compat only, see the module
    bin_loader      read the binary files of data_loaders.mlperf_bin; made first where they are not there
    bin_shuffle     with bin_loader: train batches in another order in each epoch
    memory_bytes, min_frequency, vocabulary   of preprocessing (data_loaders.build.Options)
    note            gets what a user should know and upstream does not print
    map_rows        rows stay in the file, as with memory_map, and everything else is as without: several ranks share what the system keeps of it
    part            which rows of each batch are read and given
    Raises UserError for whatever is wrong with the flags or with the files; CannotBeMapped with memory_map or map_rows.
    """
    criteo = SETS.get(data_set)
    if criteo is None:
        raise UserError(f"--data-set={data_set} is not Criteo's; choose one of {', '.join(SETS)}")
    if data_randomize not in RANDOMIZE_CHOICES:
        raise UserError(f"--data-randomize={data_randomize} is unknown; choose one of {', '.join(RANDOMIZE_CHOICES)}")
    if not 0 <= sub_sample_rate <= 1:
        raise UserError(f"--data-sub-sample-rate={sub_sample_rate} is not a probability from 0 to 1")
    if not raw_data_file and not processed_data_file:
        raise UserError("no data: name Criteo's text with --raw-data-file=PATH, or a processed file with --processed-data-file=PATH")
    raw = Path(raw_data_file) if raw_data_file else None
    draws = draws_of(preprocess_rng.get_state(legacy=True)) if sub_sample_rate > 0 else ""
    asked = Asked(max_ind_range, float(sub_sample_rate), min_frequency, vocabulary, draws)
    request = _Request(
        criteo, raw, Path(processed_data_file) if processed_data_file else criteo.processed(raw), data_randomize, asked, memory_bytes,
        memory_map or bin_loader, memory_map or bin_loader or map_rows, upstream_compat, seed, rng, preprocess_rng, progress,
    )  # fmt: skip
    reading_raw, reading_processed = f"Reading raw data={raw_data_file}", f"Reading pre-processed data={processed_data_file}"

    def mapped() -> _Ready:
        """With upstream's lines of --memory-map."""
        ready = _open(request, lambda: print_line(reading_raw))
        if not ready.made_now:
            print_line(reading_raw if ready.drawn and raw is not None else reading_processed)
        features = f"Sparse features= {NUM_SPARSE}, Dense features= {NUM_DENSE}"
        for line in (features, reading_processed, features):
            print_line(line)
        return ready

    if bin_loader:
        if data_set != "terabyte":
            raise UserError(f"--mlperf-bin-loader with --data-set={data_set}: reads binary files of the Terabyte set; add --data-set=terabyte")

        def source() -> mlperf_bin.BinSource:
            ready = mapped()
            return mlperf_bin.BinSource(request.path, ready.data, ready.rows_of_days, ready.order)

        def check(meta: Meta | None, path: Path, way_out: str) -> None:
            if meta is not None:
                check_meta(criteo, meta, path, raw, asked, way_out)
            else:
                _check_upstreams(asked, path)

        made_with = mlperf_bin.MadeWith(max(max_ind_range, 0), float(sub_sample_rate), min_frequency, data_randomize)
        return mlperf_bin.open_bins(
            mlperf_bin.bin_stem(request.path), criteo.id_count_file(raw) if raw is not None else None, made_with, source, check,
            batch_size=batch_size, test_batch_size=test_batch_size, drop_last=drop_last, num_batches=num_batches, seed=seed,
            shuffle=bin_shuffle, draw_as_upstream=upstream_compat, progress=progress, print_line=print_line, note=note,
            part=part,
        )  # fmt: skip
    if memory_map:
        ready = mapped()
        order = ready.order
    else:
        ready = _open(request, lambda: print_line(reading_raw))
        # Upstream looks only where the flag says: without the flag it goes by the raw file every time
        again = reading_processed if processed_data_file else reading_raw
        if not ready.made_now:
            print_line(again)
        order = _train_order(ready.rows_of_days, data_randomize, rng)
        _train_order(ready.rows_of_days, data_randomize, rng)  # upstream's test half draws it too
        for line in (*_half_lines("train", data_randomize), again, *_half_lines("test", data_randomize)):
            print_line(line)

    counts, days = ready.data.counts, ready.rows_of_days
    fold = max_ind_range if 0 < max_ind_range < counts.max() else -1  # ids below max_ind_range are their own remainder
    num_train, num_test = int(days[:-1].sum()), (int(days[-1]) + 1) // 2
    piles_up = upstream_compat and mlperf and memory_map and data_set == "terabyte" and not drop_last
    train = CriteoSplit(
        ready.data.packed, order, num_rows=num_train, batch_size=batch_size, max_ind_range=fold, drop_last=drop_last,
        num_batches=num_batches, last_batch=upstreams_last_batch(days[:-1].tolist(), batch_size) if piles_up else None, part=part,
    )  # fmt: skip
    test = CriteoSplit(
        ready.data.packed, None, first=num_train, num_rows=num_test, batch_size=test_batch_size, max_ind_range=fold, num_batches=num_batches,
        part=part,
    )  # fmt: skip
    table_rows = np.minimum(counts, max_ind_range) if max_ind_range > 0 else counts
    bayes_auc = _bayes_auc(criteo, raw) if raw is not None and sub_sample_rate == 0 else None
    return CriteoDataset(tuple(int(rows) for rows in table_rows), (1,) * NUM_SPARSE, NUM_DENSE, bayes_auc, train, test)


def _open(request: _Request, announce: Callable[[], None]) -> _Ready:
    """The processed rows, made first (after announce()) where they are not there, checked against the flags; with --memory-map, their order."""
    criteo, raw, path, asked = request.criteo, request.raw, request.path, request.asked
    ready = is_arrays(path) if path.is_dir() else path.exists()
    if path.is_dir() and not ready and any(path.iterdir()):
        raise UserError(f"--processed-data-file={path}: a folder without manifest.json, so not a processed set; name another place, or empty it")
    if not ready:
        _make(request, announce)
    data = read_processed(path, mapped=request.map_rows, progress=request.progress)
    if data.meta is not None:
        check_meta(criteo, data.meta, path, raw, asked)
    elif 0 < asked.max_ind_range < data.counts.max() and not request.upstream_compat:
        raise UserError(
            f"{path}: has columns of up to {data.counts.max()} ids, so it was not made with --max-ind-range={asked.max_ind_range}; "
            "delete it, choose another --processed-data-file, or fold its ids with --upstream-compat"
        )
    else:
        _check_upstreams(asked, path)
    days = rows_of_days(criteo, data, path, raw)
    if days[:-1].sum() == 0 or days[-1] == 0:
        raise UserError(f"{path}: {len(data.packed)} rows are too few: the last of {len(days)} days is for test, the others for training")
    if not request.memory_map:
        return _Ready(data, days, path, not ready)
    order, drawn = stored_order(
        order_file(path),
        OrderKey(request.seed, request.data_randomize, tuple(days.tolist())),
        request.rng if request.upstream_compat else None,
        made_now=not ready,
        sampled_rows=data.meta.raw_rows if data.meta is not None and asked.sub_sample_rate > 0 else 0,
        progress=request.progress,
    )
    return _Ready(data, days, path, not ready, order, drawn)


def _check_upstreams(asked: Asked, path: Path) -> None:
    """Rows of upstream's file cannot have been made with flags that upstream does not have."""
    if asked.min_frequency or asked.vocabulary:
        flag = f"--min-frequency={asked.min_frequency}" if asked.min_frequency else f"--vocabulary={asked.vocabulary}"
        raise UserError(f"{path}: is of a file of upstream's, which knows no {flag.split('=')[0]}; leave {flag} out or choose another file")


def _make(request: _Request, announce: Callable[[], None]) -> None:
    """Preprocesses."""
    if request.raw is None:
        raise UserError(f"--processed-data-file={request.path}: no such file; to make it, name Criteo's text with --raw-data-file=PATH")
    announce()
    asked = request.asked
    preprocess(
        request.raw, request.path, data_set=request.criteo.name, max_ind_range=asked.max_ind_range, sub_sample_rate=asked.sub_sample_rate,
        rng=request.preprocess_rng, progress=request.progress, memory_bytes=request.memory_bytes, min_frequency=asked.min_frequency,
        vocabulary=Path(asked.vocabulary) if asked.vocabulary else None,
    )  # fmt: skip


def _train_order(total_per_file: np.ndarray, data_randomize: str, rng: np.random.RandomState) -> torch.Tensor | None:
    """[train rows] int64, or None for the order of the file. Draws from rng as upstream does: once, once per train day, or not."""
    ends = np.cumsum(total_per_file)
    if data_randomize == "total":
        return torch.from_numpy(rng.permutation(int(ends[-2])))
    if data_randomize == "day":
        days = [rng.permutation(np.arange(end - rows, end)) for rows, end in zip(total_per_file[:-1], ends[:-1], strict=True)]
        return torch.from_numpy(np.concatenate(days))
    return None


def _half_lines(half: str, data_randomize: str) -> list[str]:
    """What upstream prints of one half of data in memory."""
    lines = [f"Sparse fea = {NUM_SPARSE}, Dense fea = {NUM_DENSE}", f"Defined {half} indices...", "Split data according to indices..."]
    if data_randomize == "day":
        lines.insert(1, "Randomized indices per day ...")
    if data_randomize == "total":
        lines.insert(2, "Randomized indices across days ...")
    return lines


def _bayes_auc(criteo: CriteoSet, raw: Path) -> float | None:
    """The best test AUC that anyone can reach, where the raw files were generated and their maker wrote it down beside them."""
    sidecar = raw.parent / f"{raw.name}.bayes.json"
    try:
        facts = json.loads(sidecar.read_text())
        raw_bytes = sum(file.stat().st_size for file in criteo.raw_files(raw))
        return float(facts["bayes_auc_test"]) if facts["raw_bytes"] == raw_bytes else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{sidecar}: damaged ({type(error).__name__}: {cause(error)}); delete it") from None
