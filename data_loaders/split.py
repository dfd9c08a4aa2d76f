"""Which rows of a spilled data set are for training and which for testing, and how many rows each part has."""

import math
from dataclasses import dataclass

import numpy as np

from data_loaders.blocks import Source
from data_loaders.spill import Segment
from dlrm_xla.specs import UserError

_RADIX_BITS = 16


@dataclass(frozen=True)
class Split:
    """num_train rows come first, then num_test; Criteo's last half day follows. moment: rows by time at or after it are for testing."""

    part_rows: tuple[int, ...]
    num_train: int
    num_test: int
    moment: int | None = None
    test_parts: tuple[int, ...] = ()

    @property
    def moves_rows(self) -> bool:
        """Whether rows leave the order of the files."""
        return self.moment is not None or bool(self.test_parts)

    def is_test(self, segment: Segment) -> np.ndarray:
        """[rows] bool; of a split that moves rows only."""
        if self.moment is not None:
            return segment.when() >= self.moment
        return np.concatenate([np.zeros(0, bool), *(np.full(rows, part in self.test_parts) for part, rows in segment.parts)])


def split_rows(source: Source, segments: list[Segment]) -> Split:
    """Raises UserError where one of the halves would be empty."""
    rule, n = source.split, sum(segment.rows for segment in segments)
    part_rows = _rows_of_cuts(segments, rule.cuts) if rule.cuts else _rows_of_parts(segments, len(source.part_names))
    if rule.by == "last_day":
        last = part_rows[-1]
        if last in (0, n):
            raise UserError(f"{source.files[-1]}: {n} rows are too few: the last of {len(part_rows)} days is for test, the others for training")
        return Split(part_rows, n - last, last - last // 2)
    share = math.floor(n * rule.test + 1e-9)
    if rule.by == "fraction":
        return _not_empty(Split(part_rows, n - share, share), f"the last {rule.test} of the rows")
    if rule.by == "parts":
        num_test = sum(part_rows[part] for part in rule.parts)
        return _not_empty(Split(part_rows, n - num_test, num_test, test_parts=rule.parts), "the rows of the named files")
    moment = rule.start if rule.start is not None else _earliest_moment(segments, share)
    num_test = 0 if moment is None else sum(int(np.count_nonzero(segment.when() >= moment)) for segment in segments)
    found = _not_empty(Split(part_rows, n - num_test, num_test, moment=moment), "the last rows by time")
    return found


def _not_empty(split: Split, what: str) -> Split:
    for name, rows in (("training", split.num_train), ("testing", split.num_test)):
        if rows == 0:
            total = split.num_train + split.num_test
            raise UserError(f"split: {what} are for testing, which leaves none of {total} rows for {name}; change the schema's split")
    return split


def _rows_of_parts(segments: list[Segment], num_parts: int) -> tuple[int, ...]:
    total = [0] * num_parts
    for segment in segments:
        for part, rows in segment.parts:
            total[part] += rows
    return tuple(total)


def split_days(num_rows: int, days: int) -> np.ndarray:
    """[days] int64: rows of each day, equal but for the remainder, which goes to the first ones."""
    return num_rows // days + (np.arange(days) < num_rows % days)


def _rows_of_cuts(segments: list[Segment], cuts: int) -> tuple[int, ...]:
    """Kept rows of each of `cuts` equal cuts of the raw rows."""
    if not segments:
        return (0,) * cuts
    last = segments[-1].mark
    ends = np.cumsum(split_days(last.rows + last.left_out, cuts))
    if not last.left_out:
        return tuple(np.diff(ends, prepend=0).tolist())
    before, kept = 0, np.zeros(cuts, np.int64)  # kept rows before each end
    for segment in segments:
        numbers = segment.when()
        kept += np.searchsorted(numbers, ends)
        before += len(numbers)
    return tuple(np.diff(kept, prepend=0).tolist())


def _earliest_moment(segments: list[Segment], most: int) -> int | None:
    """The earliest time with at most `most` rows at or after it, which is a time that some row has; None: even the last time has more rows.

    Found digit by digit, 16 bits of the time in a pass over all rows, so that memory does not grow with them.
    """
    prefix, room = 0, most  # times whose upper digits are above prefix have most - room rows
    for shift in range(64 - _RADIX_BITS, -1, -_RADIX_BITS):
        counts = np.zeros((1 << _RADIX_BITS) + 1, np.int64)
        for segment in segments:
            digits = _ordered(segment.when())
            if shift + _RADIX_BITS < 64:
                digits = digits[(digits >> np.uint64(shift + _RADIX_BITS)) == prefix]
            digit = ((digits >> np.uint64(shift)) & np.uint64((1 << _RADIX_BITS) - 1)).astype(np.int64)
            counts[:-1] += np.bincount(digit, minlength=1 << _RADIX_BITS)
        at_or_after = np.cumsum(counts[::-1])[::-1]
        fits = int(np.argmax(at_or_after <= room))  # the first digit at which all rows from there on fit; the digit below it is looked at closer
        room -= int(at_or_after[fits])
        prefix = (prefix << _RADIX_BITS) + fits - 1
        if fits == 0:
            return _least(segments)
    return _next_time(segments, prefix)


def _ordered(times: np.ndarray) -> np.ndarray:
    """int64 as uint64 of the same order."""
    return times.view(np.uint64) ^ np.uint64(1 << 63)


def _least(segments: list[Segment]) -> int:
    return min(int(segment.when().min()) for segment in segments if segment.rows)


def _next_time(segments: list[Segment], after: int) -> int | None:
    """The earliest time above `after` (as _ordered gives it)."""
    least = None
    for segment in segments:
        times = _ordered(segment.when())
        times = times[times > np.uint64(after)]
        if len(times):
            least = min(int(times.min()), least if least is not None else 1 << 64)
    return None if least is None else least - (1 << 63)
