"""Ids that repeat as in a recorded trace: an LRU stack whose stack distances follow a distribution read from a file.

Upstream reads the file again for every bag and moves one id at a time; here the file is read once and all bags of a table take each step
together. A bag starts from the file's own order, as upstream's does. An unusable file is an error that names the line.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dlrm_xla.specs import UserError

# Upstream sums float shares, so its last entry may end a little below 1; a draw above it takes the largest distance.
CUMULATIVE_SLACK = 1e-6


@dataclass(frozen=True)
class TraceDistribution:
    """What a trace file says about one table.

    lines       [l] int64, the different ids, the next new one first
    distances   [k] int64 rising from 0; 0 is "an id not seen before", d is "the d-th most recent one"
    cumulative  [k] float64 rising to 1: share of accesses with at most this distance
    """

    lines: np.ndarray
    distances: np.ndarray
    cumulative: np.ndarray


def trace_path(pattern: str, table: int, replace_every_j: bool = False) -> Path:
    """The file of a table: each letter j of the file's name is replaced by the table's number, or, as upstream has it, of the whole path."""
    if replace_every_j:
        return Path(pattern.replace("j", str(table)))
    path = Path(pattern)
    return path.with_name(path.name.replace("j", str(table)))


def read_trace(path: Path) -> TraceDistribution:
    """Three lines of comma-separated numbers: ids, stack distances, cumulative shares. UserError with file and line where that is not so."""
    try:
        rows = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{path}: cannot read the trace distribution ({reason}); --data-trace-file names it, j stands for the table") from None
    if len(rows) < 3:
        raise UserError(f"{path}: {len(rows)} lines; a trace distribution has 3 (ids, stack distances, cumulative shares)")
    lines = _numbers(path, 1, rows[0], int)
    distances = _numbers(path, 2, rows[1], int)
    cumulative = _numbers(path, 3, rows[2], float)

    def require(holds: bool, line: int, rule: str) -> None:
        if not holds:
            raise UserError(f"{path}, line {line}: {rule}")

    require(0 <= min(lines) and max(lines) < 2**63, 1, f"ids run from {min(lines)} to {max(lines)}; they must lie in 0..2**63-1")
    require(distances[0] == 0, 2, f"the first stack distance is {distances[0]}; it must be 0, which stands for a new id")
    fall = _first_fall(distances, strict=True)
    require(fall is None, 2, f"stack distances must rise, but {fall} do not")
    require(distances[-1] <= len(lines), 2, f"stack distance {distances[-1]} is larger than the {len(lines)} ids of line 1")
    require(len(cumulative) == len(distances), 3, f"{len(cumulative)} cumulative shares for the {len(distances)} stack distances of line 2")
    require(cumulative[0] >= 0, 3, f"cumulative shares start at {cumulative[0]}; they must not be negative")
    fall = _first_fall(cumulative, strict=False)
    require(fall is None, 3, f"cumulative shares must not fall, but {fall} do")
    require(abs(cumulative[-1] - 1) <= CUMULATIVE_SLACK, 3, f"cumulative shares end at {cumulative[-1]}; they must end at 1")
    return TraceDistribution(np.array(lines, dtype=np.int64), np.array(distances, dtype=np.int64), np.array(cumulative))


def _numbers(path: Path, line: int, text: str, kind: type) -> list:
    numbers = []
    for word in text.split(","):
        try:
            number = kind(word)
            if kind is float and not np.isfinite(number):
                raise ValueError
        except ValueError:
            article = "an integer" if kind is int else "a finite number"
            raise UserError(f"{path}, line {line}: {word.strip()[:40]!r} is not {article}; numbers are separated by commas") from None
        numbers.append(number)
    return numbers


def _first_fall(numbers: list, strict: bool) -> str | None:
    for before, after in zip(numbers, numbers[1:], strict=False):
        if after < before or (strict and after == before):
            return f"{before}, {after}"
    return None


def walk_stack(trace: TraceDistribution, uniforms: np.ndarray, padding: bool) -> np.ndarray:
    """Ids [n, H] int64 for uniforms [n, H] in [0, 1): one LRU stack per bag, each from the file's order, one access per column.

    While fewer ids than the largest distance have been seen, distances beyond those seen are not drawn. After that, `padding` draws no
    new ids. The stack of a bag is the file's list with the ids accessed so far moved to its end, so only those are kept: `recent` holds
    their positions in `lines`, the latest first, and what lies below them is the list without those positions.
    """
    num_bags, hotness = uniforms.shape
    num_lines, largest = len(trace.lines), trace.distances[-1]
    ids = np.empty((num_bags, hotness), dtype=np.int64)
    recent = np.full((num_bags, hotness), num_lines + hotness, dtype=np.int64)  # an empty place: far enough never to count in `below`
    depth = np.zeros(num_bags, dtype=np.int64)  # accessed ids in `recent`
    seen = np.zeros(num_bags, dtype=np.int64)  # accesses that drew distance 0
    every = np.arange(num_bags)
    for step in range(hotness):
        reachable = trace.cumulative[np.searchsorted(trace.distances, seen, side="right") - 1]
        u = uniforms[:, step]
        after_all_seen = (1.0 - trace.cumulative[0]) * u + trace.cumulative[0] if padding else u
        u = np.where(seen < largest, u * reachable, after_all_seen)
        pick = np.minimum(np.searchsorted(trace.cumulative, u, side="left"), len(trace.distances) - 1)
        distance = trace.distances[pick]
        seen += distance == 0
        distance[distance == 0] = num_lines  # a new id is the one at the far end of the list

        # Not among the recent ones: it is the (num_lines - distance)-th position that no recent id took from the list.
        rank = num_lines - distance
        taken = np.sort(recent[:, : step + 1], axis=1)
        below = rank + (taken - np.arange(step + 1) <= rank[:, None]).sum(axis=1)
        place = np.where(distance <= depth, distance - 1, depth)
        position = np.where(distance <= depth, recent[every, place], below)
        depth += distance > depth

        # Move to the front: the places before `place` slide back by one.
        slide = np.arange(step + 1) <= place[:, None]
        slid = np.concatenate([position[:, None], recent[:, :step]], axis=1)
        recent[:, : step + 1] = np.where(slide, slid, recent[:, : step + 1])
        ids[:, step] = trace.lines[position]
    return ids
