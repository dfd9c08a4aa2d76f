"""Columns of cells (pyarrow arrays, missing ones null) to labels, numbers, keys and times, a column at a time.

What is accepted does not depend on where a cell stands or what stands beside it. Blanks around numbers and a plus sign are allowed.
integer  64 bits, signed; "12.0" is 12 (pandas writes columns so that lack a value); "0x1f" is 31.  Key: two's complement
hex      1 to 8 digits, "0x" before them allowed.                                                     Key: 32 bits
string   as it is written; Parquet's numbers as Arrow writes them.                                    Key: XXH3 of the UTF-8 bytes
"""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

MISSING_64 = 1 << 63  # key of a missing cell: as an integer the least one, which is refused as a value; of texts one hash in 2^64
MISSING_32 = 0xFFFFFFFF  # as a hex value refused
_MAX_TEXT = 60


class BadCell(ValueError):
    """row: of the column; rule: what the cell is not, with the way out."""

    def __init__(self, row: int, value, rule: str):
        super().__init__(row, value, rule)
        self.row, self.value, self.rule = row, value, rule

    def show(self) -> str:
        text = self.value.decode("latin-1") if isinstance(self.value, bytes) else str(self.value)
        return ascii(text[:_MAX_TEXT]) + ("..." if len(text) > _MAX_TEXT else "")


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def agree(one: pa.DataType, other: pa.DataType, as_text: bool) -> bool:
    """Whether a column may be of both types, in different Parquet files: pandas writes 12 as 12.0 where a value is missing, and a column without
    values as null. as_text: its cells are hashed as they are written, so that 12 and 12.0 differ."""
    one, other = (kind.value_type if pa.types.is_dictionary(kind) else kind for kind in (one, other))
    is_number = [pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) for kind in (one, other)]
    if one == other or pa.types.is_null(one) or pa.types.is_null(other):
        return True
    return (is_text(one) and is_text(other)) or (all(is_number) and not as_text)


def plain(cells: pa.Array, missing: pa.Array) -> pa.Array:
    """Parquet's column as texts or numbers: dictionaries looked up, bytes as UTF-8, missing tokens and NaN null."""
    if pa.types.is_dictionary(cells.type):
        cells = cells.dictionary_decode()
    kind = cells.type
    if pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind) or str(kind).endswith("_view"):
        cells = _checked(cells, lambda part: pc.cast(part, pa.string()), "is not UTF-8")
    if is_text(cells.type):
        return pc.if_else(pc.is_in(cells, value_set=pc.cast(missing, cells.type)), pa.nulls(len(cells), cells.type), cells)
    if pa.types.is_floating(kind):
        cells = pc.cast(cells, pa.float64())
        return pc.if_else(pc.is_nan(cells), pa.nulls(len(cells), cells.type), cells)
    return cells


# ---- keys -------------------------------------------------------------------------------------------------------------------------


def keys(cells: pa.Array, kind: str) -> np.ndarray:
    """[n] uint32 (hex) or uint64, a missing cell the reserved one. kind: integer | hex | string. Raises BadCell."""
    if kind == "string":
        return _string_keys(cells)
    if kind == "hex":
        rule = "is not a hexadecimal id of 1 to 8 digits; longer ones and others are type: string"
        values = numbers(_checked(cells, _to_hex, rule), MISSING_32)
        _refuse_reserved(values, cells, MISSING_32, "stands for missing cells; add it to missing:, or use type: string")
        return values
    values = numbers(_checked(cells, _to_int, _no_integer), -MISSING_64)
    values = values.view(np.uint64)
    _refuse_reserved(values, cells, MISSING_64, "stands for missing cells; add it to missing:, or use type: string")
    return values


def _no_integer(value) -> str:
    fits_hex = isinstance(value, str) and re.fullmatch(r"(0[xX])?[0-9a-fA-F]{1,8}", value.strip())
    return f"is not a whole number of 64 bits, signed; use type: {'hex (or string)' if fits_hex else 'string'}"


def _refuse_reserved(values: np.ndarray, cells: pa.Array, reserved: int, rule: str) -> None:
    found = values == values.dtype.type(reserved)
    if np.count_nonzero(found) != cells.null_count:
        row = int(np.flatnonzero(found & _valid(cells))[0])
        raise BadCell(row, cells[row].as_py(), rule)


def _string_keys(cells: pa.Array) -> np.ndarray:
    """The distinct values of the block are hashed, one after the other."""
    if not is_text(cells.type):
        cells = _checked(cells, lambda part: pc.cast(part, pa.string()), f"of type {cells.type} cannot be read as text")
    encoded = cells.dictionary_encode()
    digest = xxhash.xxh3_64_intdigest
    hashes = [digest(value) for value in pc.cast(encoded.dictionary, pa.binary()).to_pylist()]
    hashes.append(MISSING_64)
    return np.array(hashes, dtype=np.uint64)[numbers(encoded.indices, -1)]  # -1: the last one


def _to_hex(cells: pa.Array) -> pa.Array:
    if not is_text(cells.type):
        raise pa.ArrowInvalid("numbers are no hexadecimal texts")
    try:
        return pc.cast(pc.binary_join_element_wise("0x", cells, ""), pa.uint32())
    except pa.ArrowInvalid:
        trimmed = pc.utf8_trim_whitespace(cells)
        prefixed = pc.match_substring_regex(trimmed, "^0[xX]")
        digits = pc.if_else(prefixed, pc.utf8_slice_codeunits(trimmed, 2), trimmed)
        return pc.cast(pc.binary_join_element_wise("0x", digits, ""), pa.uint32())


def _to_int(cells: pa.Array) -> pa.Array:
    try:
        return pc.cast(cells, pa.int64())
    except pa.ArrowInvalid:
        if not is_text(cells.type):
            raise
        cells = _unsigned(cells)
        whole = pc.if_else(pc.ends_with(cells, ".0"), pc.utf8_slice_codeunits(cells, 0, -2), cells)
        return pc.cast(whole, pa.int64())


def _unsigned(cells: pa.Array) -> pa.Array:
    """Blanks around a text and a plus sign before its digits taken off."""
    return pc.replace_substring_regex(pc.utf8_trim_whitespace(cells), r"^\+([0-9.])", r"\1")


# ---- bags -------------------------------------------------------------------------------------------------------------------------


def bags(cells: pa.Array, kind: str, separator: str | None, max_hot: int, missing: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(keys of all bags one after the other, lengths [n] int32). cells: texts that `separator` cuts, or lists. A missing cell, and a text
    without values, are empty bags; missing values in a bag are left out; a bag's first max_hot values are kept (0: all). Raises BadCell."""
    if is_list(cells.type):
        lists = cells if pa.types.is_list(cells.type) else pc.cast(cells, pa.list_(cells.type.value_type))
    else:
        if not is_text(cells.type):
            cells = pc.cast(cells, pa.string())
        separator = separator or ","  # of Parquet's lists, where a file has none
        lists = pc.split_pattern(_without_brackets(cells, separator), separator)
    lengths = numbers(pc.list_value_length(lists), 0).astype(np.int64)
    items = plain(lists.flatten(), missing)
    if is_text(items.type):
        items = _trimmed(items, quoted=separator is not None and separator.strip() == ",")
        keep = _valid(items) & (numbers(pc.binary_length(items), 0) > 0)
        keep &= numbers(pc.cast(pc.is_in(items, value_set=pc.cast(missing, items.type)), pa.uint8()), 0) == 0
    else:
        keep = _valid(items)
    bag = np.repeat(np.arange(len(lengths)), lengths)
    if max_hot:
        rank = np.cumsum(keep) - 1  # among the kept items; less that of the bag's first
        starts = np.concatenate([[0], np.cumsum(np.bincount(bag[keep], minlength=len(lengths)))])
        keep &= rank - starts[bag] < max_hot
    kept = bag[keep]
    if len(kept) != len(items):
        items = items.filter(pa.array(keep))
    try:
        values = keys(items, kind)
    except BadCell as bad:
        raise BadCell(int(kept[bad.row]), bad.value, bad.rule) from None
    return values, np.bincount(kept, minlength=len(lengths)).astype(np.int32)


def _without_brackets(cells: pa.Array, separator: str) -> pa.Array:
    """ "[1, 2]", as pandas and JSON write lists, is "1, 2" where values are separated by commas or blanks."""
    if separator.strip() not in (",", ""):
        return cells
    cells = pc.utf8_trim_whitespace(cells)
    bracketed = pc.and_(pc.starts_with(cells, "["), pc.ends_with(cells, "]"))
    return pc.if_else(bracketed, pc.utf8_slice_codeunits(cells, 1, -1), cells)


def _trimmed(items: pa.Array, quoted: bool) -> pa.Array:
    items = pc.utf8_trim_whitespace(items)
    for mark in "'\"" if quoted else "":
        both = pc.and_(pc.and_(pc.starts_with(items, mark), pc.ends_with(items, mark)), pc.greater(pc.binary_length(items), 1))
        if pc.any(both).as_py():
            items = pc.if_else(both, pc.utf8_slice_codeunits(items, 1, -1), items)
    return items


# ---- dense, label, time -----------------------------------------------------------------------------------------------------------


def dense(cells: pa.Array) -> np.ndarray:
    """[n] float32, missing ones NaN. Raises BadCell."""
    values = floats(cells)
    with np.errstate(over="ignore"):
        single = values.astype(np.float32)
    if not np.isfinite(single[_valid(cells)]).all():
        row = int(np.flatnonzero(~np.isfinite(single) & _valid(cells))[0])
        rule = "does not fit float32 (up to 3.4e38)" if np.isfinite(values[row]) else "is not a finite number; add it to missing:"
        raise BadCell(row, cells[row].as_py(), rule)
    return single


def floats(cells: pa.Array) -> np.ndarray:
    """[n] float64, missing ones NaN; infinite ones as written. Raises BadCell."""
    kind = cells.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_decimal(kind)
    if not (is_text(kind) or is_number or pa.types.is_null(kind)):
        raise BadCell(0, cells[0].as_py(), f"of type {kind} is not a number")
    return numbers(_checked(cells, _to_float, "is not a number; write 1234.5 or 1.2e3, without thousands separators or units"), np.nan)


def _to_float(cells: pa.Array) -> pa.Array:
    try:
        return pc.cast(cells, pa.float64(), safe=False)
    except pa.ArrowInvalid:
        return pc.cast(_unsigned(cells), pa.float64())


def label_values(cells: pa.Array, positive: tuple | None) -> np.ndarray:
    """[n] float32, 0 or 1. positive: None; (operator, number); ("in", texts or numbers). Raises BadCell."""
    if cells.null_count:
        row = int(np.flatnonzero(~_valid(cells))[0])
        raise BadCell(row, "", "is missing; a row needs a label (take such rows out)")
    if positive is None or (positive[0] == "in" and isinstance(positive[1][0], str)):
        return _label_texts(cells, positive and positive[1])
    operator, bound = positive
    values = floats(cells)
    if np.isnan(values).any():
        row = int(np.flatnonzero(np.isnan(values))[0])
        raise BadCell(row, cells[row].as_py(), "is not a number")
    rules = {
        ">=": np.greater_equal, ">": np.greater, "<=": np.less_equal, "<": np.less, "==": np.equal, "in": lambda a, b: np.isin(a, np.array(b)),
    }  # fmt: skip
    return rules[operator](values, bound).astype(np.float32)


def _label_texts(cells: pa.Array, ones: tuple[str, ...] | None) -> np.ndarray:
    encoded = pc.cast(cells, pa.string()).dictionary_encode()
    texts, codes = encoded.dictionary.to_pylist(), numbers(encoded.indices, 0)
    if ones is not None:
        return np.array([text in ones for text in texts], dtype=np.float32)[codes]
    known = {"0": 0, "1": 1, "0.0": 0, "1.0": 1, "false": 0, "true": 1}
    values = np.array([known.get(text.strip().lower(), -1) for text in texts], dtype=np.float32)[codes]
    if (values < 0).any():
        row = int(np.flatnonzero(values < 0)[0])
        raise BadCell(row, texts[codes[row]], 'is not 0, 1, true or false; say what counts as 1 with positive: in the label, as ">= 4" or [buy]')
    return values


def time_kind(cells: pa.Array) -> str:
    """ "integer", "float" or "date": what the first cell of a column of times is. Raises BadCell."""
    kind = cells.type
    if pa.types.is_temporal(kind) and not pa.types.is_duration(kind):
        return "date"
    for name in ("integer", "float", "date"):
        try:
            times(cells[:1], name)
            return name
        except BadCell as bad:
            failed = bad
    raise failed


def times(cells: pa.Array, kind: str) -> np.ndarray:
    """[n] int64 in the order of the times. integer: as they are, what has a fraction rounded down; float: their bits, made to sort; date:
    nanoseconds since 1970 (ISO 8601; without an offset taken as UTC). Raises BadCell."""
    if cells.null_count:
        row = int(np.flatnonzero(~_valid(cells))[0])
        raise BadCell(row, "", "is missing; a row needs a time to be split by (take such rows out, or split by fraction)")
    if kind == "date":
        stamps = _checked(cells, _to_timestamp, "is not a time of ISO 8601 (2014-10-21 or 2014-10-21T09:30:00Z, years 1678 to 2261)")
        return numbers(stamps, 0)
    if kind == "integer":
        rule = "is not a number, as this column's first time is"
        return numbers(_checked(cells, _to_whole, rule), 0)
    values = floats(cells)
    if not np.isfinite(values).all():
        row = int(np.flatnonzero(~np.isfinite(values))[0])
        raise BadCell(row, cells[row].as_py(), "is not a time")
    bits = (values + 0.0).view(np.int64)  # + 0.0: -0.0 is 0.0
    return np.where(bits < 0, bits ^ np.int64(2**63 - 1), bits)


def _to_whole(cells: pa.Array) -> pa.Array:
    try:
        return _to_int(cells)
    except pa.ArrowInvalid:
        return pc.cast(pc.floor(_to_float(cells)), pa.int64())


def _to_timestamp(cells: pa.Array) -> pa.Array:
    if not is_text(cells.type):
        return pc.cast(pc.cast(cells, pa.timestamp("ns")), pa.int64())
    for text in (cells, pc.utf8_trim_whitespace(cells)):
        for zone in (None, "UTC"):
            try:
                return pc.cast(pc.cast(text, pa.timestamp("ns", zone)), pa.int64())
            except pa.ArrowInvalid:
                continue
    zoned = pc.match_substring_regex(text, r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)$")
    zoned = pc.and_(zoned, pc.match_substring(text, ":"))  # 2014-10-21 ends in -21
    with_offset = pc.cast(pc.cast(pc.if_else(zoned, text, None), pa.timestamp("ns", "UTC")), pa.int64())
    return pc.coalesce(with_offset, pc.cast(pc.cast(pc.if_else(zoned, None, text), pa.timestamp("ns")), pa.int64()))


# ---- pyarrow to NumPy -------------------------------------------------------------------------------------------------------------


def numbers(array: pa.Array, missing) -> np.ndarray:
    """[n] of the array's own number type, missing ones filled in. (pyarrow's own to_numpy() imports pandas where it is installed: 0.15 s.)"""
    dtype = np.dtype(str(array.type).replace("double", "float64"))
    data = array.buffers()[1]
    values = np.frombuffer(data, dtype=dtype, count=len(array), offset=array.offset * dtype.itemsize) if len(array) else np.empty(0, dtype)
    return np.where(_valid(array), values, dtype.type(missing)) if array.null_count else values


def _valid(array: pa.Array) -> np.ndarray:
    """[n] bool: where there is a value."""
    bitmap = array.buffers()[0]
    if bitmap is None or not array.null_count:
        return np.full(len(array), not isinstance(array, pa.NullArray))
    first = array.offset
    bits = np.unpackbits(np.frombuffer(bitmap, dtype=np.uint8), count=first + len(array), bitorder="little")
    return bits[first:].view(np.bool_)


def _checked(cells: pa.Array, convert, rule) -> pa.Array:
    """convert(cells); where it fails, BadCell of the first cell that it fails on. rule: a text, or what makes one of the cell."""
    try:
        return convert(cells)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        good, bad = 0, len(cells)  # convert(cells[:good]) works, convert(cells[:bad]) does not
        while bad - good > 1:
            middle = (good + bad) // 2
            try:
                convert(cells[:middle])
                good = middle
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
                bad = middle
        value = cells[good].as_py()
        raise BadCell(good, value, rule if isinstance(rule, str) else rule(value)) from None
