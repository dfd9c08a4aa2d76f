"""Delimiter, quote and header of a text, guessed from its beginning.

The delimiter is the one that cuts most lines into the same number of columns, quotes respected. The header is told by comparing the first
line with the others column by column: names over numbers, names that never come again in columns whose values do.
"""

import csv
import io
import re
from collections import Counter
from dataclasses import dataclass

from dlrm_xla.specs import UserError

DELIMITERS = ("\x01", "\t", ",", ";", "|", " ")  # where two fit equally well, the one that comes first
_ROWS = 2000
_CONSISTENT = 0.9  # share of the lines that must have the same number of columns
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_TYPED = re.compile(  # numbers, times, hashes, addresses, lists: what no name looks like
    _NUMBER.pattern
    + r"|\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}([T ]\d.*)?|\d{1,2}:\d\d(:\d\d.*)?"
    + r"|(0[xX])?(?=[0-9a-fA-F-]*\d)[0-9a-fA-F-]{8,}|\d+(\.\d+){3}|\[.*\]"
)
_NAME = re.compile(r"[^\W\d][\w .:/()#%$?*@+-]{0,79}")
_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_SPARSE = (  # rows of a label and then only the features that are there
    ("libsvm", re.compile(r"[+-]?\d+(\.\d+)?( +qid:\d+)?( +\d+:[+-]?[\d.]+([eE][+-]?\d+)?)+ *(#.*)?")),
    ("Vowpal Wabbit's", re.compile(r"[+-]?\d+(\.\d+)? +([^|]*\s)?\|([A-Za-z]\w*(:[\d.]+)? +[^|]|\s+\S+:[\d.]+).*")),
)
_KNOWN = frozenset(
    "id ids uid iid user item userid itemid movieid label click clicks clicked target rating ratings score time timestamp datetime date hour day ts "
    "price cost amount category cat name title type brand genre genres tags device site app os browser country city ip url age gender sex event "
    "action session product ad campaign creative position rank count text review body stars conversion purchase history behavior behaviour".split()
)


class NoRows(UserError):
    """An empty file, or one of a header only: among others it can be passed over."""


@dataclass(frozen=True)
class TextGuess:
    delimiter: str
    quote: str | None
    header: bool
    columns: tuple[str, ...]


@dataclass(frozen=True)
class _Cut:
    """The text as one delimiter cuts it. share: of the rows that have `width` columns; strict: nothing but a delimiter comes behind a cell's
    closing quote."""

    delimiter: str
    quote: str | None
    rows: list[list[str]]
    width: int
    share: float
    strict: bool = True

    @property
    def fits(self) -> bool:
        return self.width > 1 and self.share >= _CONSISTENT and len(self.rows[0]) == self.width


def guess_text(text: str, name: str, whole: bool, delimiter: str = "", quote: str = "") -> TextGuess:
    """text: the beginning of a file, `whole` where it is all of it; name: of the file, for messages; delimiter, quote ("none"): known ones."""
    if "\n" not in text and "\r" in text.rstrip("\r"):
        raise UserError(f"{name}: lines end in a lone carriage return; convert them with tr '\\r' '\\n'")
    if not text.strip(" \r\n"):
        raise NoRows(f"{name}: the file holds blank lines only; it needs rows")
    if not delimiter:
        _refuse_sparse(text, name)
    cut = _cut_as_told(text, whole, delimiter, quote) if delimiter else _best_cut(text, name, whole, quote)
    header = _has_header(cut.rows)
    if header and len(cut.rows) == 1:
        raise NoRows(f"{name}: the file holds one line, which looks like a header, and no rows; name one that has rows")
    columns = tuple(f"c{i}" for i in range(len(cut.rows[0])))
    if header:
        columns = tuple(cell.strip() or f"c{i}" for i, cell in enumerate(cut.rows[0]))
        twice = next((column for column, count in Counter(columns).items() if count > 1), None)
        if twice is not None:
            raise UserError(f"{name}: line 1: two columns are called {twice!r}; a name must be there once, so rename one")
    return TextGuess(cut.delimiter, cut.quote, header, columns)


def _refuse_sparse(text: str, name: str) -> None:
    lines = [line.rstrip("\r") for line in text.split("\n")[:101] if line.strip()]
    lines = lines[:-1] or lines  # the last one may be cut
    for kind, pattern in _SPARSE:
        if sum(bool(pattern.fullmatch(line)) for line in lines) >= _CONSISTENT * len(lines):
            way_out = "write CSV or Parquet, a column for each field (a bag where a field has several values: 236|605, separator: \"|\")"
            raise UserError(f"{name}: {kind} text (a label, then only the features that are there), which has no columns; {way_out}")


def _cut_as_told(text: str, whole: bool, delimiter: str, quote: str) -> _Cut:
    return _cut(text, whole, delimiter, None if quote == "none" else quote) if quote else _cut_either_way(text, whole, delimiter)


def _best_cut(text: str, name: str, whole: bool, quote: str) -> _Cut:
    cuts = [_cut_as_told(text, whole, delimiter, quote) for delimiter in DELIMITERS if delimiter in text]
    fitting = [cut for cut in cuts if cut.fits]
    by_delimiter = {cut.delimiter: cut for cut in fitting}
    if "," in by_delimiter and ";" in by_delimiter and _commas_are_decimal(by_delimiter[";"].rows):
        return by_delimiter[";"]
    if fitting:
        best = max(cut.share for cut in fitting)
        return next(cut for cut in fitting if cut.share > best - 0.02)
    if "::" in text:
        raise UserError(f"{name}: columns seem to be separated by '::'; a delimiter is one character, so convert it: sed 's/::/\\t/g'")
    nearly = max((cut for cut in cuts if cut.width > 1), key=lambda cut: cut.share, default=None)
    way_out = f"the schema can name it (delimiter: one of {', '.join(_shown(delimiter) for delimiter in DELIMITERS)})"
    if nearly is None or nearly.share < 0.5:
        raise UserError(f"{name}: one column, or no delimiter that cuts the lines into equal numbers of columns; {way_out}")
    if nearly.share >= _CONSISTENT:
        raise UserError(
            f"{name}: line 1 has {len(nearly.rows[0])} columns where most lines have {nearly.width} (delimiter {_shown(nearly.delimiter)}); "
            "the first line must be the header or the first row"
        )
    raise UserError(
        f"{name}: with delimiter {_shown(nearly.delimiter)} only {nearly.share:.0%} of the lines have {nearly.width} columns; "
        f"every row needs the same number. If it is another delimiter, {way_out}"
    )


def _shown(delimiter: str) -> str:
    return {"\t": '"\\t"', "\x01": '"\\x01"'}.get(delimiter, f'"{delimiter}"')


def _commas_are_decimal(rows: list[list[str]]) -> bool:
    """Whether what `;` leaves together are numbers with a decimal comma (1,5;2,25)."""
    cells = [cell for row in rows for cell in row if "," in cell]
    return sum(bool(_DECIMAL_COMMA.fullmatch(cell)) for cell in cells) > 0.9 * len(cells)


def _cut_either_way(text: str, whole: bool, delimiter: str) -> _Cut:
    """Quotes count as such where they make the rows more equal, or as equal and a delimiter or a line's end comes behind every closing one.
    In text without any, they would count in a CSV and not in a TSV (or \\x01): there they are rare, and a stray one would swallow rows."""
    plain = _cut(text, whole, delimiter, None)
    if '"' not in text:
        return _Cut(delimiter, None if delimiter in "\t\x01" else '"', plain.rows, plain.width, plain.share)
    quoted = _cut(text, whole, delimiter, '"')
    begun = [cell for row in plain.rows for cell in row if cell.startswith('"')]
    if not begun:  # only within cells: 5" screen
        return _Cut(delimiter, None if delimiter in "\t\x01" else '"', plain.rows, plain.width, plain.share)
    if quoted.share != plain.share:
        return quoted if quoted.share > plain.share else plain
    swallowed = len(quoted.rows) < 0.9 * len(plain.rows)  # by a stray quote: line ends within cells make plain's rows unequal
    return quoted if quoted.strict and not swallowed else plain


def _cut(text: str, whole: bool, delimiter: str, quote: str | None) -> _Cut:
    rows, error = _rows(text, delimiter, quote, strict=bool(quote))
    strict = not error or "unexpected end" in error
    if whole and "unexpected end" in error:  # a quote that never ends
        return _Cut(delimiter, quote, rows or [[""]], 0, 0.0)
    if not strict:
        rows, error = _rows(text, delimiter, quote, strict=False)
        if error:  # a cell of more than 128 KiB: a quote that never ends
            return _Cut(delimiter, quote, rows or [[""]], 0, 0.0)
    if not whole or len(rows) > _ROWS:
        rows = rows[:-1] or rows  # it may be cut
    if not rows:
        return _Cut(delimiter, quote, [[""]], 0, 0.0)
    width, count = Counter(map(len, rows)).most_common(1)[0]
    share = count / len(rows)
    if quote and len(rows) < 3 and text.count("\n") > 20:  # all in one pair of quotes
        share = 0.0
    return _Cut(delimiter, quote, rows, width, share, strict)


def _rows(text: str, delimiter: str, quote: str | None, strict: bool) -> tuple[list[list[str]], str]:
    """(the first rows that are not blank, what stopped the reading before)."""
    quoting = {"quotechar": quote} if quote else {"quoting": csv.QUOTE_NONE, "quotechar": None}
    rows = []
    try:
        for row in csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=strict, **quoting):
            if row and (len(row) > 1 or row[0].strip()):
                rows.append(row)
            if len(rows) > _ROWS:
                break
    except csv.Error as error:
        return rows, str(error)
    return rows, ""


def _has_header(rows: list[list[str]]) -> bool:
    first, rest = rows[0], [row for row in rows[1:] if len(row) == len(rows[0])]
    names = [cell.strip() for cell in first]
    if not rest:
        return all(_NAME.fullmatch(name) and not _TYPED.fullmatch(name) for name in names)
    if _is_counting(names) and sum(row == first for row in rest) == 0:
        return True
    if any(_TYPED.fullmatch(name) and not _counts_from_zero(name) for name in names) or sum(not name for name in names[1:]) > len(names) / 4:
        return False
    index_column = 1.0 if not names[0] and all(row[0].strip().isdigit() for row in rest) else 0.0  # as pandas writes it
    return index_column + sum(_vote(name, [row[i].strip() for row in rest]) for i, name in enumerate(names)) > 0


def _counts_from_zero(name: str) -> bool:
    """A small whole number may be a column's name in a header that else has names."""
    return name.isdigit() and len(name) <= 4


def _is_counting(names: list[str]) -> bool:
    """0, 1, 2, ... or 1, 2, 3, 4, 5, ...: names that a program gave. A first one that is empty is an index column's."""
    if not names[0]:
        names = names[1:]
    return any(len(names) > least and names == [str(start + i) for i in range(len(names))] for start, least in ((0, 2), (1, 4)))


def _vote(name: str, column: list[str]) -> float:
    """Above 0: the first cell looks like the name of its column; below: like one of its values."""
    values = [value for value in column if value]
    if not name or not values:
        return 0.0
    if name in values:
        return -1.0
    typed = sum(bool(_TYPED.fullmatch(value)) for value in values) / len(values)
    if _TYPED.fullmatch(name):
        return -1.0 if typed > 0.5 else 0.0
    if not _NAME.fullmatch(name):
        return -0.5
    words = set(re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name.lower())) | set(re.split(r"[\W_]+|(?<=[a-z])(?=[A-Z])", name)) | {name.lower()}
    known = 1.5 if {word.lower() for word in words} & _KNOWN else 0.0
    if typed > 0.9:
        return 1.0 + known
    repeats = len(values) > 4 and len(set(values)) <= len(values) / 2
    return known + (0.5 if repeats else 0.0) - (0.0 if known or repeats else 0.1)
