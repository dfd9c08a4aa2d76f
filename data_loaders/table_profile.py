"""Facts on the columns of a sample: kind, missing, distinct values here and in the whole table, popularity, numbers, times, bags."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from data_loaders.schema import DEFAULT_MISSING
from data_loaders.table_kinds import INSIDE, Bags, Times, bags_of, is_decimal_comma, kind_of, shape_of, times_of
from data_loaders.table_sample import NOT_UTF8, Sample

MISSING_WORDS = (*DEFAULT_MISSING, "None", "none", "N/A", "n/a", "#N/A", "<NA>", "NAN", "Null", "(null)", "NaT")
NUMBER_MISSING = ("-", "?", ".", "--")  # stand for nothing only in columns of numbers
ESTIMATOR = "GEE"


@dataclass
class Profile:
    """One column of the sample.

    kind            of data_loaders.table_kinds.kind_of, or "bag" (cells of several values), "nested" (Parquet's structs, lists of lists),
                    "binary" (not UTF-8) or "comma" (numbers with a decimal comma)
    missing         cells; of bags: empty ones
    distinct        values in the sample (of bags: of their members)
    distinct_total  the same, estimated for the whole table by GEE (Charikar, Chaudhuri, Motwani and Narasayya, 2000): values seen once count
                    sqrt(N / n) times, N cells of which n were sampled; within a factor of that root of the truth
    top             (the most frequent value, its share of the cells that are not missing)
    zipf            exponent s of popularity ~ rank^-s, fitted where at least ten values came three times or more; straight: the fit's R^2
    top_percent     share of the cells that the most frequent 1% of the distinct values have
    numbers         (min, median, max) where all are numbers; of kind "integer" and "code" as int
    lengths         of bags: (shortest, mean, 99th percentile, longest)
    once            values that were seen once
    """

    name: str
    number: int
    kind: str
    cells: int
    missing: int
    distinct: int = 0
    distinct_total: int = 0
    top: tuple[str, float] = ("", 0.0)
    zipf: float | None = None
    straight: float = 0.0
    top_percent: float = 0.0
    numbers: tuple[float, float, float] | tuple[int, int, int] | None = None
    negative: float = 0.0
    whole: bool = False
    sorted_up: bool = False
    times: Times | None = None
    bags: Bags | None = None
    lengths: tuple[int, float, int, int] | None = None
    shape: str = ""
    once: int = 0
    native: str = ""
    missing_words: tuple[str, ...] = ()
    odd: str = ""
    values: pa.Array = field(default=None, repr=False)
    counts: np.ndarray = field(default=None, repr=False)
    codes: np.ndarray = field(default=None, repr=False)  # [cells] of values, -1: missing; None of bags

    @property
    def present(self) -> int:
        return self.cells - self.missing

    @property
    def unique(self) -> bool:
        """No value came twice."""
        return self.bags is None and self.present >= 20 and self.distinct == self.present


def profile(sample: Sample) -> list[Profile]:
    """One for each column."""
    return [
        profile_column(name, number, column, native, sample)
        for number, (name, column, native) in enumerate(zip(sample.dialect.columns, sample.columns, sample.native, strict=True))
    ]


def profile_column(name: str, number: int, column: pa.Array, native: str, sample: Sample) -> Profile:
    if native == NOT_UTF8:
        return Profile(name, number, "binary", len(column), 0, native=native)
    if pa.types.is_list(column.type):
        lengths = np.asarray(pc.fill_null(pc.list_value_length(column), 0))
        found = Profile(name, number, "bag", len(column), int((lengths == 0).sum()), native=native, bags=Bags("", False))
        _fill_bags(found, column.flatten().drop_null(), lengths, sample)
        return found
    if native.startswith(("struct", "map", "list<element: list", "list<item: list", "list<item: struct", "list<element: struct")):
        return Profile(name, number, "nested", len(column), 0, native=native)
    encoded = column.dictionary_encode()
    values, codes = encoded.dictionary, np.asarray(pc.fill_null(encoded.indices, -1)).astype(np.int64)
    words = [*MISSING_WORDS]
    if _numbers_but_for(values, words):
        words += NUMBER_MISSING
    is_missing = np.asarray(pc.is_in(values, pa.array(words))) if len(values) else np.zeros(0, bool)
    seen = np.bincount(codes[codes >= 0], minlength=len(values))
    renumber = np.where(is_missing, -1, np.cumsum(~is_missing) - 1)
    codes = np.where(codes >= 0, renumber[codes], -1) if len(values) else codes
    missing_words = tuple(str(word) for word in values.filter(pa.array(is_missing)).to_pylist())
    values, counts = values.filter(pa.array(~is_missing)), seen[~is_missing]
    found = Profile(name, number, kind_of(values), len(column), int((codes < 0).sum()), native=native, missing_words=missing_words)
    found.values, found.counts, found.codes = values, counts, codes
    if found.kind == "string":
        found.kind = "comma" if is_decimal_comma(values) else "string"
    if found.kind == "string":
        found.odd = _odd_ones(values, counts)
        found.shape = shape_of(values)
        found.bags = bags_of(values, found.present) if found.shape in ("", "hashes") else None
    if found.bags:
        found.kind, found.shape = "bag", ""
        _fill_bag_strings(found, sample)
        return found
    _fill_popularity(found, counts, values, sample)
    _fill_numbers(found)
    found.times = times_of(name, found.kind, values)
    return found


def number_text(number: float) -> str:
    """Whole numbers in full, so that they can be typed into a schema; others with six digits."""
    return str(number) if isinstance(number, int) else f"{number:.6g}"


def _numbers_but_for(values: pa.Array, words: list[str]) -> bool:
    """Whether all is numbers once the signs that stand for nothing are taken out, and there is one."""
    signs = pc.is_in(values, pa.array(NUMBER_MISSING))
    if not len(values) or not pc.any(signs).as_py():
        return False
    rest = values.filter(pc.invert(pc.is_in(values, pa.array([*words, *NUMBER_MISSING]))))
    return len(rest) > 0 and kind_of(rest) in ("integer", "float")


def _odd_ones(values: pa.Array, counts: np.ndarray) -> str:
    """Where a column is of numbers but for a few cells, what these are; else ""."""
    is_number = np.asarray(pc.match_substring_regex(values, r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"))
    odd = int(counts[~is_number].sum())
    if not 0 < odd < 0.02 * counts.sum():
        return ""
    example = values[int(np.flatnonzero(~is_number)[0])].as_py()
    return f"numbers but for {odd:,} cells, as {ascii(example[:30])}"


def gee(counts: np.ndarray, cells: int, total: float) -> int:
    """Distinct values among `total` cells, from how often each of them came among `cells` sampled ones. Never more than `total`."""
    once = int((counts == 1).sum())
    return int(min(total, len(counts) - once + round((max(1.0, total / max(1, cells))) ** 0.5 * once)))


def _fill_popularity(found: Profile, counts: np.ndarray, values: pa.Array, sample: Sample) -> None:
    """distinct, distinct_total, top, zipf, top_percent, once. counts [distinct] of values."""
    found.distinct = len(counts)
    if not len(counts):
        return
    cells = int(counts.sum())
    found.once = int((counts == 1).sum())
    found.distinct_total = len(counts) if sample.complete else gee(counts, cells, sample.total_rows * cells / max(1, sample.num_rows))
    found.top = (values[int(counts.argmax())].as_py(), float(counts.max() / cells))
    ordered = np.sort(counts)[::-1]
    found.top_percent = float(ordered[: max(1, len(ordered) // 100)].sum() / cells)
    found.zipf, found.straight = fit_zipf(ordered)


def fit_zipf(ordered: np.ndarray) -> tuple[float | None, float]:
    """(exponent, R^2) of a line through log count over log rank, at ranks evenly spaced in the logarithm; ordered: counts, largest first."""
    ranks = int((ordered >= 3).sum())
    if ranks < 10:
        return None, 0.0
    chosen = np.unique(np.geomspace(1, ranks, 40).astype(int))
    x, y = np.log(chosen), np.log(ordered[chosen - 1])
    slope, offset = np.polyfit(x, y, 1)
    scatter = ((y - y.mean()) ** 2).sum()
    return float(-slope), float(1 - ((y - offset - slope * x) ** 2).sum() / scatter) if scatter > 0 else 0.0


def _fill_numbers(found: Profile) -> None:
    if found.kind not in ("integer", "float", "code") or not found.distinct:
        return
    numbers = np.asarray(found.values.cast(pa.float64()))
    order = np.argsort(numbers)
    place = np.searchsorted(np.cumsum(found.counts[order]), found.counts.sum() / 2)
    found.numbers = (float(numbers.min()), float(numbers[order[place]]), float(numbers.max()))
    if found.kind == "code":
        found.numbers = tuple(int(found.values[int(order[rank])].as_py()) for rank in (0, place, -1))
    if found.kind == "integer":  # as float64 those above 2^53 would lose digits
        exact = np.sort(np.asarray(found.values.cast(pa.int64())))
        found.numbers = (int(exact[0]), int(exact[place]), int(exact[-1]))
    found.negative = float(found.counts[numbers < 0].sum() / found.counts.sum())
    found.whole = bool((numbers == np.floor(numbers)).all())
    in_order = numbers[found.codes[found.codes >= 0]]
    found.sorted_up = bool((np.diff(in_order) >= 0).all())


def _fill_bag_strings(found: Profile, sample: Sample) -> None:
    """Cells of strings that hold several values each: found.values, .codes are of whole cells."""
    inner = found.values
    if found.bags.brackets:
        inner = pc.replace_substring_regex(inner, INSIDE, "")
    split = pc.split_pattern(inner, found.bags.separator)
    members = split.flatten()
    if found.bags.brackets:
        members = pc.replace_substring_regex(pc.utf8_trim_whitespace(members), r"""^['"]|['"]$""", "")
    empty = np.asarray(pc.equal(members, ""))
    owners = np.asarray(pc.list_parent_indices(split))
    sizes = np.bincount(owners, weights=~empty, minlength=len(inner)).astype(np.int64)
    weights = np.repeat(found.counts, np.asarray(pc.list_value_length(split)))[~empty]
    encoded = members.filter(pa.array(~empty)).dictionary_encode()
    counts = np.bincount(np.asarray(encoded.indices), weights=weights, minlength=len(encoded.dictionary)).astype(np.int64)
    lengths = np.where(found.codes >= 0, sizes[np.maximum(found.codes, 0)], 0)
    found.missing = int((lengths == 0).sum())
    found.values, found.counts, found.codes = encoded.dictionary, counts, None
    _fill_lengths(found, lengths)
    _fill_popularity(found, counts, found.values, sample)


def _fill_bags(found: Profile, members: pa.Array, lengths: np.ndarray, sample: Sample) -> None:
    encoded = members.dictionary_encode()
    found.values, found.counts = encoded.dictionary, np.bincount(np.asarray(encoded.indices), minlength=len(encoded.dictionary))
    _fill_lengths(found, lengths)
    _fill_popularity(found, found.counts, found.values, sample)


def _fill_lengths(found: Profile, lengths: np.ndarray) -> None:
    found.lengths = (int(lengths.min()), float(lengths.mean()), int(np.percentile(lengths, 99)), int(lengths.max())) if len(lengths) else None
