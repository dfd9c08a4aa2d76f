"""Sizing by a budget, --compress-to: the knob of each table's method set so that all tables together fit into so many bytes."""

import re

import numpy as np

from compression.method import PLAIN, Choice, Method
from compression.registry import METHODS, num_bytes
from dlrm_xla.config import MethodConfig
from dlrm_xla.specs import TableSpec, UserError, parse_size, size_text

MOST_SHARED = 4.0  # of a knob that all tables share (md:temperature)


def parse_budget(text: str, full_bytes: int) -> int:
    """Bytes of "100x" (of full_bytes) or of a size, "5MB"."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*[xX]\s*", text)
    if found:
        if float(found[1]) < 1:
            raise UserError(f"--compress-to={text}: must be at least 1x, or a size as 5MB")
        return int(full_bytes / float(found[1]))
    try:
        size = parse_size("--compress-to", text)
        if re.fullmatch(r"[\d.\s]+", text):
            raise UserError("")
        return size
    except UserError:
        raise UserError(f"--compress-to={text}: must be a ratio, as 100x, or a size, as 5MB") from None


def with_spread(specs: list[TableSpec], choices: list[Choice]) -> list[Choice]:
    """Knobs that depend on all tables of a method together."""
    for method in METHODS.values():
        if method.spread is None:
            continue
        groups: dict[str, list[int]] = {}
        for index, choice in enumerate(choices):
            if choice.method == method.name:
                groups.setdefault(choice.text(), []).append(index)
        for members in groups.values():
            spread = method.spread([specs[i] for i in members], choices[members[0]].knobs)
            for index, knobs in zip(members, spread, strict=True):
                choices[index] = Choice(method.name, knobs)
    return choices


def to_budget(
    specs: list[TableSpec], choices: list[Choice], budget: int, config: MethodConfig, counts: list[np.ndarray] | None = None
) -> list[Choice]:
    """The same methods with their sizing knobs set so that all tables together take at most `budget` bytes, and nearly that.

    No table is given more bytes than another while that one could still be larger; a method that goes by traffic is given the ids that are looked
    up most, whichever table they are in. What rounding leaves over goes to the tables one after the other, the largest first. A table whose method
    would take more than the plain table stays plain.

    counts: of each table how often training looks its ids up, where it is known
    """
    flag = f"--compress-to={config.compress_to}"
    for choice in choices:
        if choice.method != "plain" and not METHODS[choice.method].sized_by:
            start = METHODS[choice.method].create is not None
            sized = ", ".join(sorted(name for name, method in METHODS.items() if method.sized_by and (method.create is not None) == start))
            raise UserError(f"{flag}: {choice.method} has no knob that sets its size; it can be used with {sized}")
    shared = {choice.method for choice in choices if choice.method != "plain" and METHODS[choice.method].spread}
    if shared and len({choice.method for choice in choices} - {"plain"}) > 1:
        raise UserError(f"{flag}: one number sets the sizes of all tables of {', '.join(shared)}, so a budget takes no other method beside it")
    if shared:
        return _shared_to_budget(specs, choices, budget, config)
    ladders = [_Ladder(spec, choice) for spec, choice in zip(specs, choices, strict=True)]
    full = sum(num_bytes(spec, PLAIN) for spec in specs)
    least = sum(ladder.bytes_at(0) for ladder in ladders)
    if least > budget:
        fixed = sum(num_bytes(spec, choice) for spec, choice in zip(specs, choices, strict=True) if choice.method == "plain")
        raise UserError(
            f"{flag}: the tables would have to fit into {size_text(budget)} of {size_text(full)}, and no knob makes them smaller than "
            f"{size_text(least)} ({full / least:.3g}x), {size_text(fixed)} of that in tables that stay plain "
            f"(--compress-threshold={config.threshold}); ask for less, take another method, or lower --compress-threshold"
        )
    if counts is not None and all(choice.method == "plain" or METHODS[choice.method].needs_counts for choice in choices):
        levels = _ByTraffic(ladders, counts)
    else:
        levels = _ByBytes(ladders)
    low, high = 0, levels.most
    while low < high:
        middle = (low + high + 1) // 2
        fits = sum(ladder.bytes_at(step) for ladder, step in zip(ladders, levels.steps(middle), strict=True)) <= budget
        low, high = (middle, high) if fits else (low, middle - 1)
    steps = levels.steps(low)
    left = budget - sum(ladder.bytes_at(step) for ladder, step in zip(ladders, steps, strict=True))
    for index in sorted(range(len(ladders)), key=lambda i: -ladders[i].plain):
        ladder = ladders[index]
        now = ladder.bytes_at(steps[index])
        better = ladder.step_within(now + left)
        if ladder.bytes_at(better) > now:
            left -= ladder.bytes_at(better) - now
            steps[index] = better
    return [ladder.choice_at(step) for ladder, step in zip(ladders, steps, strict=True)]


class _ByBytes:
    """Levels of filling: no table above so many bytes. Small tables, whose ids are looked up often, stay whole while large ones are cut."""

    def __init__(self, ladders: list["_Ladder"]):
        self.ladders, self.most = ladders, max(ladder.plain for ladder in ladders)

    def steps(self, level: int) -> list[int]:
        return [ladder.step_within(level) for ladder in self.ladders]


class _ByTraffic:
    """Levels where a table's knob counts ids in the order of their traffic: the ids that training looks up most, whichever table they are in."""

    def __init__(self, ladders: list["_Ladder"], counts: list[np.ndarray]):
        self.ladders = ladders
        tables = [index for index, ladder in enumerate(ladders) if ladder.choice.method != "plain"]
        owners = np.repeat(tables, [len(counts[index]) for index in tables])
        order = np.argsort(-np.concatenate([counts[index] for index in tables]), kind="stable")
        self.owners, self.most = owners[order], len(order)

    def steps(self, level: int) -> list[int]:
        hot = np.bincount(self.owners[:level], minlength=len(self.ladders))
        return [ladder.step_of(int(number)) for ladder, number in zip(self.ladders, hot, strict=True)]


class _Ladder:
    """One table's sizes: step 0 is the smallest that its method's sizing knob can make it, the last the largest below the plain table."""

    def __init__(self, spec: TableSpec, choice: Choice):
        self.spec, self.choice, self.plain = spec, choice, num_bytes(spec, PLAIN)
        self.steps = 1
        self.seen: dict[int, int] = {}
        if choice.method == "plain":
            return
        method = METHODS[choice.method]
        self.least = int(method.knob(method.sized_by).least or 1)
        most = max(self.least, method.sized_most(spec, choice.knobs))
        self.falling = self._bytes_with(most) < self._bytes_with(self.least)
        self.ends = (most, self.least) if self.falling else (self.least, most)
        self.steps = most - self.least + 1

    def _bytes_with(self, value: int) -> int:
        method = METHODS[self.choice.method]
        return method.num_bytes(self.spec, {**self.choice.knobs, method.sized_by: value})

    def value_at(self, step: int) -> int:
        return self.ends[0] - step if self.falling else self.ends[0] + step

    def bytes_at(self, step: int) -> int:
        if self.choice.method == "plain":
            return self.plain
        if step not in self.seen:
            self.seen[step] = min(self._bytes_with(self.value_at(step)), self.plain)
        return self.seen[step]

    def step_of(self, value: int) -> int:
        """The step at which the knob has the value nearest to this one."""
        if self.choice.method == "plain":
            return 0
        return min(max(self.ends[0] - value if self.falling else value - self.ends[0], 0), self.steps - 1)

    def step_within(self, num_bytes: float) -> int:
        """The largest step of at most so many bytes; the smallest of all where none is."""
        low, high = 0, self.steps - 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_at(middle) <= num_bytes else (low, middle - 1)
        return low

    def choice_at(self, step: int) -> Choice:
        if self.choice.method == "plain" or self._bytes_with(self.value_at(step)) >= self.plain:
            return PLAIN
        return Choice(self.choice.method, {**self.choice.knobs, METHODS[self.choice.method].sized_by: self.value_at(step)})


def _shared_to_budget(specs: list[TableSpec], choices: list[Choice], budget: int, config: MethodConfig) -> list[Choice]:
    """Where one number for all tables sets their sizes: as small as the budget asks for."""

    def at(value: float) -> list[Choice]:
        return with_spread(specs, [_with_shared(choice, value) for choice in choices])

    def total(value: float) -> int:
        return sum(num_bytes(spec, choice) for spec, choice in zip(specs, at(value), strict=True))

    if total(MOST_SHARED) > budget:
        least, full = total(MOST_SHARED), sum(num_bytes(spec, PLAIN) for spec in specs)
        names = sorted({choice.method for choice in choices} - {"plain"})
        raise UserError(
            f"--compress-to={config.compress_to}: {', '.join(names)} makes the tables {size_text(least)} ({full / least:.3g}x) at the least; ask for "
            "less, take another method, or lower --compress-threshold"
        )
    low, high = 0.0, MOST_SHARED
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if total(middle) <= budget else (middle, high)
    return at(high)


def _with_shared(choice: Choice, value: float) -> Choice:
    method: Method | None = METHODS.get(choice.method)
    if method is None or method.spread is None:
        return choice
    return Choice(choice.method, {**choice.knobs, method.sized_by: value})
