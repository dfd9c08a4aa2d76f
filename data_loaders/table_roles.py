"""What each column of a sample is proposed to be in a schema (label, dense, categorical, time to split by, left out), and why."""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from data_loaders.schema import DEFAULT_MISSING, CategoricalColumn, DenseColumn, LabelColumn, Schema, SplitBy
from data_loaders.table_kinds import name_words, share
from data_loaders.table_label import Label, Leak, find_leaks
from data_loaders.table_profile import Profile, number_text
from data_loaders.table_sample import Sample

NO_LABEL = "???"
MOST_ROWS = 10_000_000  # of a table; above, ids are taken modulo this
_MOST_HOT = 100
_ID_WORDS = frozenset(
    "id ids uid iid pid cid user item sku asin isbn code zip zipcode postal hash key product brand campaign adgroup creative advertiser device "
    "site domain app region city country state gender sex type category cat cate class group segment channel hour weekday dow month version os "
    "browser banner position pos slot store shop seller customer movie book song artist video author page url tag cluster level status flag is "
    "has color colour size platform source movieid userid itemid ip language lang carrier network model make c".split()
)
_COUNT_WORDS = frozenset(
    "count counts cnt num number nb total sum avg mean median std max min price cost amount amt revenue sales age duration length len quantity qty "
    "rate ratio ctr cvr width height weight days visits views clicks impressions bid distance dist lat latitude lon lng longitude salary income "
    "votes helpful percent pct value temperature temp balance budget fee score discount speed minutes seconds hours stock i".split()
)
_ROW_ID_NAMES = frozenset(
    "id rowid row index idx recordid impressionid impid requestid reqid logid eventid bidid uuid guid reviewid transactionid txid orderid tripid "
    "sampleid instanceid exampleid unnamed0".split()
)


@dataclass
class Role:
    """role: label, time, dense, categorical or left out. entry: what goes into the schema."""

    column: Profile
    role: str
    why: str
    entry: DenseColumn | CategoricalColumn | None = None


@dataclass
class Proposal:
    """schema's label is called NO_LABEL where none was found. comments: by column; roles: one for each column, in order."""

    schema: Schema
    roles: list[Role]
    label: Label | None
    leaks: list[Leak]
    comments: dict[str, str]
    split_why: str
    notes: list[str] = field(default_factory=list)


def propose(sample: Sample, columns: list[Profile], label: Label | None) -> Proposal:
    leaks = find_leaks(label, columns) if label else []
    leaky = {leak.column.name: leak.how for leak in leaks}
    time, split, split_why = _split(columns, label, leaky)
    roles = []
    for column in columns:
        if label and column is label.column:
            roles.append(Role(column, "label", f"{label.rate:.2%} ones; {label.why}"))
        elif column.name in leaky:
            roles.append(Role(column, "left out", f"leak: {leaky[column.name]}"))
        elif column is time:
            roles.append(Role(column, "time", f"{column.times.unit}, {column.times.first} to {column.times.last}; for the split only"))
        else:
            roles.append(_role(column, sample))
    dialect = sample.dialect
    text = dialect.format != "parquet"
    schema = Schema(
        label=LabelColumn(label.column.name if label else NO_LABEL, label.positive if label else None),
        categorical=tuple(role.entry for role in roles if isinstance(role.entry, CategoricalColumn)),
        dense=tuple(role.entry for role in roles if isinstance(role.entry, DenseColumn)),
        split=split,
        format=dialect.format,
        delimiter=dialect.delimiter if text else None,
        header=dialect.header if text else None,
        quote=(dialect.quote or "") if text else None,
        encoding=dialect.encoding if text else None,
        columns=dialect.columns if text and not dialect.header else (),
        missing=_missing(columns),
    )
    comments = {role.column.name: role.why for role in roles}
    if not label:
        comments[NO_LABEL] = "no column looks like a label: put its name here (and positive: where its cells are not 0 and 1), or give --label=COLUMN"
    return Proposal(schema, roles, label, leaks, comments, split_why)


def _missing(columns: list[Profile]) -> tuple[str, ...]:
    """The schema's default and what else stands for nothing in this sample."""
    met = dict.fromkeys(word for column in columns for word in column.missing_words)
    return (*DEFAULT_MISSING, *(word for word in met if word not in DEFAULT_MISSING))


def _split(columns: list[Profile], label: Label | None, leaky: dict[str, str]) -> tuple[Profile | None, SplitBy, str]:
    """(column of the time, split, why): by time where a column without gaps can be sorted by and its last moments are not too many rows."""
    candidates, rejected = [], ""
    for column in columns:
        if column.times and column.times.sortable and column.name not in leaky and not (label and column is label.column):
            if column.missing:
                rejected = f"{column.name} is a time but lacks {_share(column.missing, column.cells)} of its cells"
            elif column.distinct < 3 or _share_of_last(column) >= 0.1:
                rejected = f"{column.name} is a time of too few different values to cut a tenth off"
            else:
                candidates.append(column)
    if not candidates:
        return None, SplitBy("fraction", 0.1), rejected or "no column is a time: the last tenth of the rows"
    named = {"timestamp", "time", "ts", "hour", "date", "datetime", "event", "unix"}
    best = max(candidates, key=lambda column: (column.sorted_up, bool(name_words(column.name) & named), column.distinct))
    written = f"; start: is written as the column is, as {number_text(best.numbers[2])}" if best.numbers else ""
    return best, SplitBy("time", 0.1, best.name), f"the last tenth by time ({best.times.first} to {best.times.last}{written})"


def _share_of_last(column: Profile) -> float:
    numbers = column.values.cast(pa.float64()) if column.numbers else column.values
    last = int(np.argmax(np.asarray(numbers))) if column.numbers else max(range(len(numbers)), key=lambda i: numbers[i].as_py())
    return float(column.counts[last] / column.present)


def _share(part: float, whole: float) -> str:
    percent = 100 * part / max(1, whole)
    return f"{percent:.1f}%" if percent >= 0.1 or percent == 0 else "under 0.1%"


def _role(column: Profile, sample: Sample) -> Role:
    """Of a column that is neither label nor leak nor the time."""
    where = "" if sample.complete else " in the sample"
    if column.kind == "nested":
        return Role(column, "left out", f"Parquet's {column.native} cannot be read; flatten it")
    if column.kind == "binary":
        return Role(column, "left out", "binary, not UTF-8: bytes that are no text; write them as text (hexadecimal digits) to use them")
    if column.kind == "comma":
        return Role(column, "left out", f"numbers with a decimal comma, as {column.top[0]}: write 1234.5 (bags of two ids: name them yourself)")
    if column.kind == "empty" or not column.distinct:
        return Role(column, "left out", f"every cell is missing{where}")
    if column.distinct == 1 and not column.missing and column.kind != "bag":
        return Role(column, "left out", f"constant{where}: {ascii(column.top[0][:40])}")
    if column.times:
        again = "sortable" if column.times.sortable else "not ISO 8601"
        return Role(column, "left out", f"a time ({again}), {column.times.first} to {column.times.last}: its values do not come again")
    if column.kind == "time":
        return Role(column, "left out", "a time: its values do not come again")
    if column.kind == "bag":
        return _bag(column, sample)
    if column.shape == "free text" and column.distinct > 100 and column.distinct > 0.1 * column.present:
        return Role(column, "left out", f"free text ({column.distinct:,} distinct of {column.present:,}); DLRM reads no words")
    if _is_measure(column, sample):
        return _dense(column)
    if _is_row_id(column, sample):
        return Role(column, "left out", f"a row's own number or name: {column.distinct:,} distinct of {column.present:,}{where}")
    if column.kind == "float" and not _whole_ids(column):
        return _dense(column)
    if column.kind in ("integer", "float") and _is_count(column):
        return _dense(column)
    return _categorical(column, sample)


def _is_row_id(column: Profile, sample: Sample) -> bool:
    if column.present < 20 or column.kind in ("float", "bool"):
        return False
    few_twice = column.present > 1000 and column.distinct >= 0.98 * column.present and _is_code_like(column)  # rows written twice
    if column.distinct < 0.999 * column.present and not few_twice:
        return False
    name = "".join(sorted(name_words(column.name), key=column.name.lower().find))
    if name in _ROW_ID_NAMES or column.name == f"c{column.number}" and column.sorted_up:
        return True
    words = name_words(column.name)
    if column.kind == "integer":
        steps = column.sorted_up and sample.num_rows > 100
        return bool(steps or (not words & _COUNT_WORDS and column.present >= 200 and (sample.complete or not words & _ID_WORDS)))
    return sample.complete or not words & _ID_WORDS


def _is_code_like(column: Profile) -> bool:
    """Whole numbers, or texts of one word with a digit."""
    return column.kind in ("integer", "code", "hex") or column.shape in ("UUIDs", "hashes") or share(column.values, r"^[\w.:-]*\d[\w.:-]*$") == 1.0


def _is_measure(column: Profile, sample: Sample) -> bool:
    """Whole numbers of which, in all rows there are, hardly one comes twice, in no order, and whose name says nothing: as ids of no use."""
    if column.kind != "integer" or not sample.complete or column.distinct <= 0.9 * column.present or column.sorted_up:
        return False
    known = _ID_WORDS - {"c"} | _ROW_ID_NAMES
    return not name_words(column.name) & known and max(abs(column.numbers[0]), abs(column.numbers[2])) < 2**31


def _whole_ids(column: Profile) -> bool:
    """Whole numbers that pandas wrote with .0 because cells were missing."""
    return share(column.values, r"^-?\d{1,15}(\.0)?$") == 1.0 and not _is_count(column)


def _is_count(column: Profile) -> bool:
    """Whether whole numbers count or measure something, rather than name it: by the column's name, else by how popular small ones are."""
    words = name_words(column.name) - {"c" if column.name == f"c{column.number}" else ""}
    low, median, high = column.numbers
    if words & {"id", "ids", "uid", "iid", "code", "hash", "type", "category", "hour", "weekday", "class"}:
        return False
    if words & _COUNT_WORDS and not (words & {"i"} and len(words) > 2):
        return column.distinct > 2
    if words & _ID_WORDS and not (column.name == f"c{column.number}"):
        return False
    if column.distinct <= 20:
        return False
    numbers = np.asarray(column.values.cast(pa.float64()))
    rank_of_value, rank_of_count = np.argsort(np.argsort(numbers)), np.argsort(np.argsort(column.counts, kind="stable"))
    falling = np.corrcoef(rank_of_value, rank_of_count)[0, 1] < -0.5
    gaps = column.distinct < 0.5 * (high - low + 1)
    return bool(low <= 5 and falling and (gaps or high < 1000) and median < high / 4)


def _dense(column: Profile) -> Role:
    low, median, high = column.numbers
    facts = f"{number_text(low)} to {number_text(high)}, median {number_text(median)}"
    if column.negative > 0 and high > 10 * max(median, 1e-9) and high > -10 * low:
        transform, why = "log", f"a long tail; negative ones ({_share(column.negative, 1)}) count as 0"
    elif column.negative > 0:
        transform, why = "standardize", f"{_share(column.negative, 1)} are negative"
    elif high > 10 * max(median, 1e-9) and high > 5:
        transform, why = "log", "a long tail"
    elif 0 <= low and high <= 1:
        transform, why = "none", "between 0 and 1 already"
    else:
        transform, why = "standardize", "no long tail"
    missing = f"; {_share(column.missing, column.cells)} missing" if column.missing else ""
    return Role(column, "dense", f"{facts}: {why}{missing}", DenseColumn(column.name, transform))


def _categorical(column: Profile, sample: Sample) -> Role:
    kind = "integer" if column.kind in ("integer", "float") else "hex" if column.kind == "hex" else "string"
    modulo = MOST_ROWS if column.distinct_total > MOST_ROWS else 0
    why = f"{_distinct(column, sample)}{_popularity(column)}"
    what = column.shape or (column.kind if column.kind in ("bool", "code") else "")
    why += {"code": "; digits, read as text", "bool": "; true or false", "": ""}.get(what, f"; {what}")
    why += f"; {column.odd}" if column.odd else ""
    why += f"; {_share(column.missing, column.cells)} missing" if column.missing else ""
    if modulo:
        why += f"; modulo {MOST_ROWS:,} keeps the table small"
    elif column.unique and not sample.complete:
        why += "; none came twice in the sample, so it may be of no use"
    return Role(column, "categorical", why, CategoricalColumn(column.name, kind, max_ind_range=modulo))


def _bag(column: Profile, sample: Sample) -> Role:
    shortest, mean, most, longest = column.lengths
    integer, hexadecimal = (share(column.values, pattern) == 1.0 for pattern in (r"^[+-]?\d{1,18}$", r"^[0-9a-fA-F]{8}$"))
    kind = "integer" if integer and not share(column.values, r"^-?0\d") else "hex" if hexadecimal else "string"
    if column.native and share(column.values, r"^-?\d*\.\d*[1-9]") > 0.1:
        return Role(column, "left out", "lists of fractions, as embeddings: a bag is of ids")
    max_hot = min(most, _MOST_HOT) if longest > 10 and longest > most or longest > _MOST_HOT else 0
    why = f"bags of {shortest} to {longest}, {mean:.2g} on average; {_distinct(column, sample)}{_popularity(column)}"
    why += f"; {_share(column.missing, column.cells)} empty" if column.missing else ""
    why += f"; the first {max_hot} are enough for {'99%' if max_hot == most else 'most'} of the rows" if max_hot else ""
    modulo = MOST_ROWS if column.distinct_total > MOST_ROWS else 0
    separator = column.bags.separator or None
    return Role(column, "categorical", why, CategoricalColumn(column.name, kind, separator, max_hot, modulo))


def _distinct(column: Profile, sample: Sample) -> str:
    text = f"{column.distinct:,} distinct in {column.cells:,} rows"
    if not sample.complete and column.distinct_total > 1.05 * column.distinct:
        text += f", about {column.distinct_total:,} in all"
    return text


def _popularity(column: Profile) -> str:
    if column.zipf is not None and column.zipf > 0.4 and column.straight > 0.85:
        return f", Zipf-like ({column.zipf:.2f})"
    return f", the first {column.top[1]:.0%}" if column.distinct > 1 and column.top[1] > 0.5 else ""
