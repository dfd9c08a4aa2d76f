"""Criteo Kaggle as mini-batches: opens the raw or the processed file, splits it into train and test as upstream does, gathers batches.

Differs from upstream: rows stay in one packed int32 array and a batch is one gather (upstream keeps lists of arrays and builds tensors from
lists, 1.2 ms per 128 rows); the file is read once for both halves; with --memory-map the same file is read, not a second set of files; a
processed file made with other flags, or from another raw file, is refused; the place that --processed-data-file names is also the place
that is written.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_loaders.criteo_map import MappedRows, map_npz
from data_loaders.criteo_npz import DAMAGE, Processed, RawFingerprint, cause, read_array, read_npz
from data_loaders.criteo_text import NUM_DENSE, NUM_SPARSE
from data_loaders.preprocess import DAYS, PROCESSED_NAME, day_count_file, preprocess, split_days
from data_loaders.reorder import MappedOrder, OrderKey, order_file, stored_order
from dlrm_xla.batch import Batch, pad_rows
from dlrm_xla.specs import UserError

RANDOMIZE_CHOICES = ("total", "day", "none")


class CriteoSplit:
    """Rows order[0], order[1], ... of the packed array (order None: rows `first` to `first + num_rows - 1` as they lie), as batches."""

    def __init__(
        self,
        packed: torch.Tensor | MappedRows,
        order: torch.Tensor | MappedOrder | None,
        *,
        first: int = 0,
        num_rows: int,
        batch_size: int,
        max_ind_range: int = -1,
        drop_last: bool = False,
        num_batches: int = 0,
    ):
        """packed [n, 40] int32 = label | 13 counts | 26 ids; order [num_rows] int64; num_batches above 0 caps an epoch's batches."""
        self.num_rows = num_rows
        self.batch_size = min(batch_size, num_rows)
        whole, rest = divmod(num_rows, self.batch_size)
        available = whole if drop_last or rest == 0 else whole + 1
        self.num_batches = min(num_batches, available) if num_batches > 0 else available
        self._packed, self._order, self._first, self._max_ind_range = packed, order, first, max_ind_range

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """One epoch from batch number `start`; every epoch has the same order, as upstream's."""
        for number in range(start, self.num_batches):
            yield self.batch(number)

    def batch(self, number: int) -> Batch:
        """Batch `number` of the epoch: dense = log(count + 1) in float32, no weights, padded rows at the end of the last one."""
        begin = number * self.batch_size
        end = min(begin + self.batch_size, self.num_rows)
        if self._order is None:
            rows = self._packed[self._first + begin : self._first + end]
        else:
            rows = self._packed.index_select(0, self._order[begin:end])  # [B, 40]
        ids = rows[:, 1 + NUM_DENSE :]
        ids = ids % self._max_ind_range if self._max_ind_range > 0 else ids.contiguous()
        dense = torch.log(rows[:, 1 : 1 + NUM_DENSE].to(torch.float32) + 1)
        batch = Batch(dense, ids, None, rows[:, :1].to(torch.float32), end - begin)
        return pad_rows(batch, self.batch_size)


@dataclass
class CriteoDataset:
    """Both halves, and what the model needs to know of the columns (dlrm_xla.batch.Dataset)."""

    table_rows: tuple[int, ...]
    hotness: tuple[int, ...]
    num_dense: int
    bayes_auc: float | None
    train: CriteoSplit
    test: CriteoSplit


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
) -> CriteoDataset:
    """The data set of upstream's flags of the same names; preprocesses first where the processed file does not exist.

    rng             the run's stream: the train permutation is drawn from it, then, as upstream's test half does, the same draws again
    preprocess_rng  the sub-sampling's stream, used only where preprocessing runs
    print_line      gets upstream's stdout lines, in its order
    upstream_compat ids of a file made without --max-ind-range are folded by modulo while reading; otherwise it is refused
    memory_map      rows stay in the file and so does the train order (data_loaders.reorder). Where that is not there it is drawn: from a
                    stream of its own that starts at `seed`, or, with upstream_compat, from the run's
    seed            of the run; the stored order holds for one seed
    Raises UserError for whatever is wrong with the flags or with the files.
    """
    if data_set != "kaggle":
        raise UserError(f"--data-set={data_set} is not supported; the choice is kaggle")
    if data_randomize not in RANDOMIZE_CHOICES:
        raise UserError(f"--data-randomize={data_randomize} is unknown; choose one of {', '.join(RANDOMIZE_CHOICES)}")
    if not 0 <= sub_sample_rate <= 1:
        raise UserError(f"--data-sub-sample-rate={sub_sample_rate} is not a probability from 0 to 1")
    if not raw_data_file and not processed_data_file:
        raise UserError("no data: name Criteo's text with --raw-data-file=PATH, or a processed file with --processed-data-file=PATH")
    raw = Path(raw_data_file) if raw_data_file else None
    path = Path(processed_data_file) if processed_data_file else raw.parent / PROCESSED_NAME
    ready = path.exists()
    if not ready:
        if raw is None:
            raise UserError(f"--processed-data-file={path}: no such file; to make it, name Criteo's text with --raw-data-file=PATH")
        print_line(f"Reading raw data={raw_data_file}")
        flags = {"max_ind_range": max_ind_range, "sub_sample_rate": sub_sample_rate}
        preprocess(raw, path, **flags, rng=preprocess_rng, progress=progress)
    # Upstream looks only where the flag says: without the flag it goes by the raw file every time
    again = f"Reading pre-processed data={processed_data_file}" if processed_data_file else f"Reading raw data={raw_data_file}"
    if ready and not memory_map:
        print_line(again)
    data = map_npz(path) if memory_map else read_npz(path)
    if data.meta is not None:
        _check_meta(data, path, raw, max_ind_range, sub_sample_rate)
    elif 0 < max_ind_range < data.counts.max() and not upstream_compat:
        raise UserError(
            f"{path}: has columns of up to {data.counts.max()} ids, so it was not made with --max-ind-range={max_ind_range}; "
            "delete it, choose another --processed-data-file, or fold its ids with --upstream-compat"
        )
    total_per_file = _rows_of_days(data, path, raw)
    packed = data.packed if memory_map else torch.from_numpy(data.packed)
    num_train, num_last = int(total_per_file[:-1].sum()), int(total_per_file[-1])
    if num_train == 0 or num_last == 0:
        raise UserError(
            f"{path}: {len(packed)} rows are too few: the last of {len(total_per_file)} days is for test, the others for training"
        )
    fold = max_ind_range if 0 < max_ind_range < data.counts.max() else -1  # ids below max_ind_range are their own remainder

    if memory_map:
        order, drawn = stored_order(
            order_file(path),
            OrderKey(seed, data_randomize, tuple(total_per_file.tolist())),
            rng if upstream_compat else None,
            made_now=not ready,
            sampled_rows=data.meta.raw_rows if data.meta is not None and sub_sample_rate > 0 else 0,
        )
        again = f"Reading pre-processed data={processed_data_file}"
        if ready:
            print_line(f"Reading raw data={raw_data_file}" if drawn and raw is not None else again)
        announce = [f"Sparse features= {NUM_SPARSE}, Dense features= {NUM_DENSE}"]
        halves = announce, announce
    else:
        order = _train_order(total_per_file, data_randomize, rng)
        _train_order(total_per_file, data_randomize, rng)  # upstream's test half draws it too
        halves = _half_lines("train", data_randomize), _half_lines("test", data_randomize)
    for line in (*halves[0], again, *halves[1]):
        print_line(line)
    train = CriteoSplit(
        packed, order, num_rows=num_train, batch_size=batch_size, max_ind_range=fold, drop_last=drop_last, num_batches=num_batches
    )
    num_test = (num_last + 1) // 2
    test = CriteoSplit(
        packed, None, first=num_train, num_rows=num_test, batch_size=test_batch_size, max_ind_range=fold, num_batches=num_batches
    )
    table_rows = np.minimum(data.counts, max_ind_range) if max_ind_range > 0 else data.counts
    bayes_auc = _bayes_auc(raw) if raw is not None and sub_sample_rate == 0 else None
    return CriteoDataset(tuple(int(rows) for rows in table_rows), (1,) * NUM_SPARSE, NUM_DENSE, bayes_auc, train, test)


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


def _check_meta(data: Processed, path: Path, raw: Path | None, max_ind_range: int, sub_sample_rate: float) -> None:
    """Refuses a file of ours that was made with other flags or from another raw file (if the raw file is still there to compare)."""
    way_out = "delete it or choose another --processed-data-file"
    # 0 and every negative number mean the same: no limit
    asked = (
        ("--max-ind-range", max(data.meta.max_ind_range, 0) or -1, max(max_ind_range, 0) or -1),
        ("--data-sub-sample-rate", float(data.meta.sub_sample_rate), float(sub_sample_rate)),
        ("number of days", data.meta.days, DAYS),
    )
    for flag, of_file, wanted in asked:
        if of_file != wanted:
            raise UserError(f"{path}: made with {flag}={of_file}, but {wanted} is asked for; {way_out}")
    if raw is None or not raw.is_file():
        return
    try:
        now = RawFingerprint.of(raw)
    except OSError:
        return
    made = data.meta.raw
    if not made.same_file(now):
        sizes = f"{made.size} bytes then, {now.size} now" if made.size != now.size else "same size, other content"
        raise UserError(f"{path}: made from another raw file ({made.name}) than --raw-data-file={raw} ({sizes}); {way_out}")


def _rows_of_days(data: Processed, path: Path, raw: Path | None) -> np.ndarray:
    """[7] rows of each day: the file's own; else upstream's <stem>_day_count.npz by the raw file; else equal days, the remainder first."""
    total, source = data.total_per_file, path
    if total is None and raw is not None and day_count_file(raw).exists():
        source = day_count_file(raw)
        try:
            total = read_array(source, "total_per_file")
        except (OSError, *DAMAGE) as error:
            raise UserError(f"{source}: cannot read upstream's rows per day ({cause(error)}); delete it") from None
    n = len(data.packed)
    if total is None:
        return split_days(n, DAYS)
    if total.shape != (DAYS,) or total.dtype.kind not in "iu" or (total < 0).any() or int(total.sum()) != n:
        raise UserError(f"{source}: total_per_file {total.tolist()} is not the rows of {DAYS} days, {n} in all; delete {source.name}")
    return total.astype(np.int64)


def _bayes_auc(raw: Path) -> float | None:
    """The best test AUC that anyone can reach, where the raw file was generated and its maker wrote it down beside it."""
    sidecar = raw.parent / f"{raw.name}.bayes.json"
    try:
        facts = json.loads(sidecar.read_text())
        return float(facts["bayes_auc_test"]) if facts["raw_bytes"] == raw.stat().st_size else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{sidecar}: damaged ({type(error).__name__}: {cause(error)}); delete it") from None
