"""What the cells of a column are, told from its distinct values: numbers, hashes, times, bags of values, free text.

A kind is one that every cell of the sample has: a single word among numbers makes them strings, since a reader would stop there.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_INTEGER = r"^-?\d{1,18}$"
_FLOAT = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_HEX = r"^(0[xX])?[0-9a-fA-F]{1,8}$"
_ISO = r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,9})?)?(Z|[+-]\d\d:?\d\d)?)?$"
_OTHER_TIME = r"^(\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}|\d{4}[/.]\d{1,2}[/.]\d{1,2})([T ,].*)?$|^\d{1,2}:\d\d(:\d\d.*)?$"
_WORDS = {"bool": {"true", "false", "yes", "no", "y", "n", "t", "f"}}
# (what it is, pattern that nearly all values follow)
_SHAPES = (
    ("UUIDs", r"^[0-9a-fA-F]{8}-([0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}$"),
    ("IP addresses", r"^\d{1,3}(\.\d{1,3}){3}(:\d+)?$|^[0-9a-fA-F]{0,4}(:[0-9a-fA-F]{0,4}){2,7}$"),
    ("user agents", r"^(Mozilla|Opera|Dalvik|okhttp|curl|Wget|Googlebot|python-requests|CFNetwork)[/ ]|AppleWebKit/|Gecko/"),
    ("URLs", r"^(https?://|www\.)\S+$|^/\S*$"),
    ("e-mail addresses", r"^[^@\s]+@[^@\s]+\.[a-zA-Z]+$"),
    ("hashes", r"^[0-9a-fA-F]{24,64}$|^[A-Za-z0-9+/_-]{22,}={0,2}$"),
)
BRACKETS, INSIDE = r"^\s*\[.*\]\s*$", r"^\s*\[\s*|\s*\]\s*$"  # "[1, 2]"; what is replaced to get at "1, 2"
SEPARATORS = ("|", ",", ";", "^", " ", "\x02", "\x03")
_DECIMAL_COMMA = r"^[+-]?(\d+|\d{1,3}(\.\d{3})+),\d+$"
_TIME_WORDS = {"time", "timestamp", "stamp", "ts", "date", "datetime", "day", "hour", "dt", "at", "unix", "epoch", "created", "utc", "month"}
_COMPACT = (  # digits, strptime's form, needs a name that says time
    (8, "%Y%m%d", False),
    (8, "%y%m%d%H", True),
    (10, "%Y%m%d%H", True),
    (12, "%Y%m%d%H%M", True),
    (14, "%Y%m%d%H%M%S", False),
    (6, "%y%m%d", True),
)
_SHOWN = {"%Y": "YYYY", "%y": "YY", "%m": "MM", "%d": "DD", "%H": "HH", "%M": "MM", "%S": "SS"}


@dataclass(frozen=True)
class Times:
    """A column of times. unit: "ISO 8601", "seconds", "milliseconds", "microseconds", "YYMMDDHH", ..., "numbers"; first, last: as people read
    them. sortable: rows can be split by it (ISO 8601 or numbers that grow with time)."""

    unit: str
    first: str
    last: str
    sortable: bool = True


@dataclass(frozen=True)
class Bags:
    """Cells that hold several values. brackets: they look like "[1, 2]"."""

    separator: str
    brackets: bool


def name_words(name: str) -> set[str]:
    """The words of a column's name in small letters: userId, user_id -> user, id."""
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", name)}


def share(values: pa.Array, pattern: str) -> float:
    """Of the values that a pattern is found in; 0 where there are none."""
    return pc.sum(pc.match_substring_regex(values, pattern)).as_py() / len(values) if len(values) else 0.0


def _all(values: pa.Array, pattern: str) -> bool:
    """Whether every value has it; the first thousand decide most cases."""
    return share(values[:1000], pattern) == 1.0 and share(values, pattern) == 1.0


def kind_of(values: pa.Array) -> str:
    """values: the distinct ones of a column, missing ones taken out. "empty", "integer", "code" (digits that are no 64-bit number, or with zeros
    in front that matter), "float", "bool", "hex", "time" or "string"."""
    if not len(values):
        return "empty"
    if _all(values, _INTEGER):
        zeros, lengths = share(values, r"^-?0\d"), pc.min_max(pc.utf8_length(values)).as_py()
        return "code" if zeros and lengths["min"] != lengths["max"] else "integer"
    if _all(values, r"^\d{1,40}$"):
        return "code"
    if _all(values, _FLOAT):
        return "float"
    if len(values) <= 8 and {value.lower() for value in values.to_pylist()} <= _WORDS["bool"]:
        return "bool"
    if _all(values, _ISO) or _all(values, _OTHER_TIME):
        return "time"
    if _all(values, _HEX):
        lengths = pc.min_max(pc.utf8_length(values)).as_py()
        if _all(values, r"^0[xX]") or (lengths["min"] == lengths["max"] >= 6 and share(values, r"\d") > 0.8):
            return "hex"
    return "string"


def shape_of(values: pa.Array) -> str:
    """What strings look like: "UUIDs", "IP addresses", ..., "free text", or ""."""
    values = values[:5000]
    for shape, pattern in _SHAPES:
        if share(values, pattern) > 0.95:
            return shape
    spaces = np.asarray(pc.count_substring(values, " "))
    lengths = np.asarray(pc.utf8_length(values))
    many_words = (spaces >= 5).mean() > 0.5 or (lengths.mean() > 60 and spaces.mean() >= 4)
    return "free text" if many_words or share(values, r"\n") > 0.2 else ""


def times_of(name: str, kind: str, values: pa.Array) -> Times | None:
    """Whether a column of `kind` with these distinct values is one of times, and from when to when."""
    if kind == "time":
        iso = _all(values, _ISO)
        ends = pc.min_max(values).as_py()
        return Times("ISO 8601" if iso else "not ISO 8601", ends["min"], ends["max"], iso)
    if kind not in ("integer", "float"):
        return None
    named = bool(name_words(name) & _TIME_WORDS)
    numbers = np.asarray(values.cast(pa.float64()))
    low, high = numbers.min(), numbers.max()
    if kind == "integer":
        compact = _compact(values, named)
        if compact:
            return compact
    for unit, scale in (("seconds", 1.0), ("milliseconds", 1e3), ("microseconds", 1e6)):
        first, last = low / scale, high / scale
        in_range = 3e8 <= first and last < 2.5e9 if named else 8e8 <= first and last < 2.1e9 and last - first < 3.2e8 and len(values) > 100
        if in_range:
            return Times(unit, *(datetime.fromtimestamp(t, UTC).strftime("%Y-%m-%d %H:%M:%S") for t in (first, last)))
    if {"timestamp", "ts", "stamp", "datetime"} & name_words(name) and len(values) > 100:
        return Times("numbers", *(f"{end:.0f}" if kind == "integer" else f"{end:.15g}" for end in (low, high)))
    return None


def _compact(values: pa.Array, named: bool) -> Times | None:
    """Dates written as whole numbers, as 20140131 or 14013123."""
    lengths = pc.min_max(pc.utf8_length(values)).as_py()
    if lengths["min"] != lengths["max"]:
        return None
    for digits, form, needs_name in _COMPACT:
        if lengths["max"] != digits or (needs_name and not named):
            continue
        sample = values[:: max(1, len(values) // 500)].to_pylist()
        try:
            found = [datetime.strptime(value, form) for value in sample]
        except ValueError:
            continue
        if min(found).year < 1980 or max(found).year > 2040 or (not named and len(found) < 5):
            continue
        unit = form
        for code, shown in _SHOWN.items():
            unit = unit.replace(code, shown)
        ends = pc.min_max(values).as_py()
        return Times(unit, *(datetime.strptime(ends[end], form).strftime("%Y-%m-%d %H:%M") for end in ("min", "max")))
    return None


def is_decimal_comma(values: pa.Array) -> bool:
    """Whether distinct strings are numbers such as 1,5 and 1.234,50: nearly all have one comma, and none has two, as bags would."""
    rest = 1 - share(values, r"^[+-]?(\d+|\d{1,3}(\.\d{3})+)$")
    return rest >= 0.5 and len(values) >= 5 and share(values, _DECIMAL_COMMA) > rest - 1e-9 and _no_pairs(values)


def _no_pairs(values: pa.Array) -> bool:
    """Not two ids a cell: what stands behind the comma has zeros in front, or as many digits nearly everywhere."""
    behind = pc.list_element(pc.split_pattern(values.filter(pc.match_substring(values, ",")), ","), 1)
    lengths = np.bincount(np.asarray(pc.utf8_length(behind)))
    return share(behind, r"^0\d") > 0 or lengths.max() > 0.8 * lengths.sum()


def bags_of(values: pa.Array, cells: int) -> Bags | None:
    """Whether distinct strings hold several values each; cells: how many there are in the sample, repeated ones counted."""
    values = values[:: max(1, len(values) // 3000)]
    if share(values, BRACKETS) > 0.95:
        inner = pc.replace_substring_regex(values, INSIDE, "")
        return Bags("," if share(inner, ",") or not share(inner, " ") else " ", True)
    for separator in SEPARATORS:
        if pc.sum(pc.count_substring(values[:200], separator)).as_py() and _is_separator(values.to_pylist(), separator, cells):
            return Bags(separator, False)
    return None


def _is_separator(values: list[str], separator: str, cells: int) -> bool:
    """Tokens of bags are short, come again, and stand now here, now there; bags have several lengths. A blank separates words of names
    as well, so its tokens must be numbers or codes, or very few."""
    split = [value.split(separator) for value in values]
    several = [tokens for tokens in split if len(tokens) > 1]
    if len(several) < 0.1 * len(split) or len(split) < 5:
        return False
    tokens = [token for bag in several for token in bag if token]
    if not tokens or np.median([len(token) for token in tokens]) > 24 or max(len(value) for value in values) > 5000:
        return False
    distinct = set(tokens)
    if len(distinct) > 0.7 * len(tokens):
        return False
    if separator in (",", ";") and sum(token.startswith(" ") for token in tokens) > 0.2 * len(tokens):
        return False  # the comma of a sentence: "Doe, John"
    heads, tails = {bag[0] for bag in several}, {token for bag in several for token in bag[1:]}
    moves = len(heads & tails) >= 0.2 * min(len(heads), len(tails))
    if not moves and len({len(bag) for bag in split}) < 3:
        return False
    if separator == " ":
        coded = sum(bool(re.fullmatch(r"[\w.-]*\d[\w.-]*|[a-z]+([_-][a-z]+)+", token)) for token in tokens) > 0.9 * len(tokens)
        tags = len(distinct) <= 0.2 * len(values) and moves and sum(token.islower() for token in tokens) > 0.9 * len(tokens)
        return coded or tags
    return True
