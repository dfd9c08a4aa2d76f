"""Which column of a sample is the label, which cells count as 1, and which columns give it away."""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from data_loaders.table_profile import Profile

# small letters, everything but letters and digits taken out; the first that is there and plausible is taken
NAMES = (
    "click clicked isclick isclicked clk label islabel target y isattributed conversion isconversion converted isconverted purchase ispurchase "
    "purchased bought isbuy buy outcome response reward like isliked islike liked clicks conversions purchases rating ratings ratingscore stars "
    "star starrating userrating reviewrating overall score reviewscore eventtype event behavior behaviour behaviortype behaviourtype actiontype "
    "action useraction"
).split()
_BOUGHT = {"buy", "bought", "purchase", "purchased", "transaction", "order", "ordered", "pay", "paid", "payment", "conversion", "checkout"}
_CLICKED = {"click", "clicked", "clk"}
_OTHER_EVENTS = "pv view viewed impression imp show cart addtocart fav favorite favourite removefromcart like dislike skip share"
_EVENTS = _BOUGHT | _CLICKED | set(_OTHER_EVENTS.split())
_YES = {"yes", "y", "t", "true", "clicked", "click", "positive", "pos", "1"}


@dataclass(frozen=True)
class Label:
    """positive: as in a schema (None: cells are 0, 1, true or false). rows [cells] 0, 1, or -1 where the cell is missing. why: of the choice."""

    column: Profile
    positive: str | tuple[str, ...] | None
    rows: np.ndarray
    why: str

    @property
    def rate(self) -> float:
        """Share of ones."""
        return float((self.rows == 1).sum() / max(1, (self.rows >= 0).sum()))


@dataclass(frozen=True)
class Leak:
    """A column that says what the label is. how: with figures."""

    column: Profile
    how: str


def guess_label(columns: list[Profile]) -> Label | None:
    """By name, then the first or the last column where it has two values, then, where nothing has a name, events or ratings; None where nothing
    is plausible."""
    by_name = {re.sub(r"[\W_]+", "", column.name.lower()): column for column in reversed(columns)}
    for name in NAMES:
        if name in by_name:
            found = as_label(by_name[name], "by its name")
            if found:
                return found
    ends = [as_label(column, f"a column of two values at the {where}") for column, where in ((columns[0], "beginning"), (columns[-1], "end"))]
    ends = [end for end in ends if end and end.positive is None]
    if ends:
        return min(ends, key=lambda end: end.rate)
    events = [column for column in columns if _words(column) and _words(column) <= _EVENTS and column.distinct > 1]
    if len(events) == 1:
        return as_label(events[0], "its values are events")
    ratings = [column for column in columns if column.name == f"c{column.number}" and _is_rating(column)]
    return as_label(ratings[0], "values as ratings have them") if len(ratings) == 1 else None


def as_label(column: Profile, why: str) -> Label | None:
    """The label that a column can be; None where its cells do not say what counts as 1."""
    if column.codes is None or not 2 <= column.distinct <= 2000:
        return None
    values = column.values.to_pylist()
    words = [value.strip().lower() for value in values]
    positive: str | tuple[str, ...] | None
    if set(words) <= {"0", "1", "0.0", "1.0", "true", "false"}:
        positive, ones = None, [word in ("1", "1.0", "true") for word in words]
    elif column.numbers and column.kind != "code":
        numbers = np.array([float(value) for value in values])
        positive, note = _threshold(column, numbers)
        if not positive:
            return None
        why, ones = f"{why}; {note}", list(numbers >= float(positive.removeprefix(">= ")))
    else:
        chosen = _positive_words(words)
        if not chosen:
            return None
        positive = tuple(value for value, word in zip(values, words, strict=True) if word in chosen)
        ones = [word in chosen for word in words]
        why += f"; the other values are {', '.join(sorted(value for value, one in zip(values, ones, strict=True) if not one)[:6])}"
    rows = np.where(column.codes >= 0, np.array(ones, dtype=np.int64)[column.codes], -1)
    return Label(column, positive, rows, why)


def _words(column: Profile) -> set[str]:
    if column.codes is None or not 0 < column.distinct <= 20 or column.kind != "string":
        return set()
    return {re.sub(r"[\W_]+", "", value.lower()) for value in column.values.to_pylist()}


def _is_rating(column: Profile) -> bool:
    """Whether the values are 1 to 5, or halves up to 5."""
    if column.numbers is None or not 4 <= column.distinct <= 11 or column.numbers[0] < 0 or column.numbers[2] != 5:
        return False
    return all(float(value) % 0.5 == 0 for value in column.values.to_pylist())


def _threshold(column: Profile, numbers: np.ndarray) -> tuple[str, str]:
    """(rule, why) of a column of numbers: the larger of two; ratings from four fifths of the largest on; counts from 1 on."""
    name = re.sub(r"[\W_]+", "", column.name.lower())
    low, _, high = column.numbers
    if len(numbers) == 2:
        return f">= {high:.15g}", f"{high:.15g} is taken for 1 and {low:.15g} for 0"
    if name in ("clicks", "conversions", "purchases"):
        return ">= 1", "a count"
    if any(word in name for word in ("behavio", "action", "event")) and len(numbers) <= 10:
        return f">= {high:.15g}", f"of the {len(numbers)} kinds the last, {high:.15g}, is taken for the rarest and most wanted"
    if _is_rating(column) or any(word in name for word in ("rating", "star", "overall", "score")) and len(numbers) <= 101 and high > 1:
        bound = high * 0.8
        return f">= {bound:.15g}", f"values from {low:.15g} to {high:.15g}"
    return "", ""


def _positive_words(words: list[str]) -> set[str]:
    plain = {re.sub(r"[\W_]+", "", word): word for word in words}
    for wanted in (_BOUGHT, _CLICKED):
        found = {word for short, word in plain.items() if short in wanted}
        if found and len(found) < len(words):
            return found
    return {word for word in words if word in _YES} if len(words) == 2 else set()


def find_leaks(label: Label, columns: list[Profile]) -> list[Leak]:
    """Columns whose values, or whose being missing, tell the label in nearly every row."""
    known = label.rows >= 0
    ones = label.rows[known]
    if min((ones == 1).sum(), (ones == 0).sum()) < 10:
        return []
    leaks = []
    for column in columns:
        if column is label.column or column.codes is None or column.kind in ("empty", "nested"):
            continue
        codes = column.codes[known]
        how = _by_value(codes + 1, ones) or _by_value((codes >= 0).astype(np.int64), ones, ", by whether it is missing")
        how = how or _by_order(column, codes, ones)
        if how:
            leaks.append(Leak(column, how))
    return leaks


def _by_value(codes: np.ndarray, ones: np.ndarray, by: str = "") -> str:
    """Values that came five times or more, and make up half the rows, err a tenth as often as always saying the more frequent label."""
    count = np.bincount(codes)
    positive = np.bincount(codes, weights=ones, minlength=len(count))
    often = count >= 5
    rows = count[often].sum()
    if rows < len(ones) / 2 or often.sum() < 2:
        return ""
    wrong = np.minimum(positive, count - positive)[often].sum() / rows
    guessing = min(positive[often].sum(), rows - positive[often].sum()) / rows
    if wrong > 0.01 or wrong > 0.1 * guessing:
        return ""
    return f"tells the label in {_percent(1 - wrong)} of the rows{by}"


def _by_order(column: Profile, codes: np.ndarray, ones: np.ndarray) -> str:
    if not column.numbers:
        return ""
    there = codes >= 0
    if there.sum() < len(ones) / 2:
        return ""
    numbers = np.asarray(column.values.cast(pa.float64()))[codes[there]]
    _, place, ties = np.unique(numbers, return_inverse=True, return_counts=True)
    rank = (np.cumsum(ties) - (ties - 1) / 2)[place]
    wins = int(ones[there].sum())
    losses = int(there.sum()) - wins
    if not wins or not losses:
        return ""
    auc = (rank[ones[there] == 1].sum() - wins * (wins + 1) / 2) / (wins * losses)
    return f"its order alone has an AUC of {max(auc, 1 - auc):.4f}" if max(auc, 1 - auc) > 0.995 else ""


def _percent(value: float) -> str:
    return "100%" if value == 1 else f"{min(value, 0.9999):.2%}"
