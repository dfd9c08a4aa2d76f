"""How upstream reads Criteo's text, restated line by line (facebookresearch/dlrm, data_utils.py), and a verdict on an outcome of ours.

Upstream opens the file as UTF-8 text, where a lone carriage return ends a line too; cuts lines at tabs; takes an empty cell for 0; reads
label and counts with int() and ids with int(x, 16), which allow blanks, signs, underscores and digits of any script; keeps 32 bits of an id
(NumPy 1); gives a row with one count or one id that value in all columns; drops label 0 by sub-sampling before it looks at the rest; needs a
row for each of seven days. Imports none of our code.
"""

import contextlib
import gzip
import re
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from tests.oracles import criteo

DAYS, SEED = 7, 123  # --numpy-rand-seed
GZIP_ROWS = 400
ARRAYS = ("X_cat", "X_int", "y", "counts")
# why we refuse a line that upstream takes; the first that holds is the line's. Texts are decoded as Latin-1 unless they are UTF-8
REASONS = {
    "label not 0 or 1": lambda cells, drawn: cells[0] == "" or (_is_int(cells[0]) and _plain(cells[0]) and int(cells[0]) not in (0, 1)),
    "lone carriage return": lambda cells, drawn: "\r" in "\t".join(cells).removesuffix("\r"),
    "one id for all columns": lambda cells, drawn: len(cells) == 15,
    "blanks in a number": lambda cells, drawn: any(c.isspace() for cell in cells for c in cell),
    "plus sign": lambda cells, drawn: any("+" in cell for cell in cells),
    "underscore": lambda cells, drawn: any("_" in cell for cell in cells),
    "digits of another script": lambda cells, drawn: any(not c.isascii() and c.isdecimal() for cell in cells for c in cell),
    "negative id": lambda cells, drawn: any(cell.startswith("-") for cell in cells[14:]),
    "id of more than 8 digits": lambda cells, drawn: any(len(re.sub("^0[xX]", "", cell)) > 8 for cell in cells[14:]),
    "damage in a row that sub-sampling drops": lambda cells, drawn: drawn,
}


class Refused(Exception):
    """What upstream cannot read; args[0] says why."""


def unpacked(data: bytes) -> bytes:
    """The text of a raw file: upstream is given what gunzip makes of a gzip file."""
    if data[:2] != b"\x1f\x8b":
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise Refused(f"gzip: {error}") from None


def read(data: bytes, max_ind_range: int = -1, sub_sample_rate: float = 0.0, *, min_rows: int = DAYS) -> tuple[dict[str, np.ndarray], set[int]]:
    """X_cat, X_int, y, counts as upstream makes them, and the numbers (from 0) of lines that sub-sampling dropped unread. Raises Refused."""
    try:
        text = unpacked(data).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Refused(str(error)) from None
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    if lines[-1] == "":
        lines.pop()
    if len(lines) < max(min_rows, 1):
        raise Refused(f"{len(lines)} rows for {DAYS} days")
    sizes = [len(lines) // DAYS + (day < len(lines) % DAYS) for day in range(DAYS)]
    rng = np.random.RandomState(SEED)
    draws = np.concatenate([rng.uniform(size=size) for size in sizes]) if sub_sample_rate else np.ones(len(lines))
    dictionaries, dropped = [{} for _ in range(26)], set()
    y, x_int, x_cat = [], [], []
    for k, line in enumerate(lines):
        cells = [cell or "0" for cell in line.split("\t")]
        label = _int32(cells[0])
        if label == 0 and draws[k] < sub_sample_rate:
            dropped.add(k)
            continue
        counts = _spread([_int32(cell) for cell in cells[1:14]], 13)
        ids = _spread([_id(cell, max_ind_range) for cell in cells[14:]], 26)
        y.append(label)
        x_int.append([max(count, 0) for count in counts])
        x_cat.append([known.setdefault(key, len(known)) for known, key in zip(dictionaries, ids, strict=True)])
    shapes = {"X_cat": (-1, 26), "X_int": (-1, 13), "y": (-1,), "counts": (26,)}
    values = {"X_cat": x_cat, "X_int": x_int, "y": y, "counts": [len(known) for known in dictionaries]}
    return {name: np.array(values[name], dtype=np.int64).reshape(shapes[name]) for name in ARRAYS}, dropped


def _is_int(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _plain(text: str) -> bool:
    return re.fullmatch("-?[0-9]+", text) is not None


@contextlib.contextmanager
def any_number_of_digits() -> Iterator[None]:
    """int() without Python 3.11's limit of 4300 digits, which is younger than upstream's code."""
    limit = sys.get_int_max_str_digits()
    sys.set_int_max_str_digits(0)
    try:
        yield
    finally:
        sys.set_int_max_str_digits(limit)


def _whole(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise Refused(f"{text[:40]!r} is not a number of base {base}") from None


def _int32(text: str) -> int:
    value = _whole(text, 10)
    if not -(2**31) <= value < 2**31:
        raise Refused(f"{text[:40]} does not fit 32 bits")
    return value


def _id(text: str, max_ind_range: int) -> int:
    value = _whole(text, 16)
    if max_ind_range > 0:
        return value % max_ind_range
    if not -(2**63) <= value < 2**63:
        raise Refused(f"{text[:40]} does not fit 64 bits")
    return value % 2**32


def _spread(values: list[int], width: int) -> list[int]:
    if len(values) not in (1, width):
        raise Refused(f"{len(values)} cells for {width} columns")
    return values * width if len(values) == 1 else values


# ---- the verdict ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """name: "same rows", "refused by both", "refused by us: <reason>", or what begins with "FAIL"; note: for people."""

    name: str
    note: str = ""

    @property
    def failed(self) -> bool:
        return self.name.startswith("FAIL")


@any_number_of_digits()
def judge(
    data: bytes, ours: dict[str, np.ndarray] | str, path: str, max_ind_range: int = -1, sub_sample_rate: float = 0.0, *, min_rows: int = DAYS
) -> Verdict:
    """ours: the processed arrays, or the one line of the refusal. min_rows: 0 where ours comes from preprocessing alone, for it is the run
    that looks at the days."""
    try:
        wanted, dropped = read(data, max_ind_range, sub_sample_rate, min_rows=min_rows)
    except Refused as error:
        wanted, dropped, why = None, set(), error.args[0]
    if isinstance(ours, str):
        fault = _message_fault(data, ours, path)
        if fault:
            return Verdict("FAIL: message", f"{fault}: {ours}")
        if wanted is None:
            return Verdict("refused by both", f"{ours} | {why}")
        reason = _reason(data, _line_of(ours), dropped)
        return Verdict(f"refused by us: {reason}", ours) if reason else Verdict("FAIL: refused without a reason", ours)
    if wanted is None:
        return Verdict("FAIL: accepted what upstream refuses", why)
    if len(ours["y"]) < len(wanted["y"]):
        return Verdict("FAIL: rows lost", f"{len(ours['y'])} of {len(wanted['y'])}")
    for name in ARRAYS:
        if ours[name].shape != wanted[name].shape or (ours[name] != wanted[name]).any():
            return Verdict("FAIL: other rows", name)
    return Verdict("same rows")


def _line_of(message: str) -> int:
    found = re.search(r": line (\d+)", message)
    return int(found[1]) if found else 0


def _message_fault(data: bytes, message: str, path: str) -> str:
    """What is wrong with a refusal; empty where it is one printable line that names the file and the first bad line."""
    if "\n" in message or not message.isprintable() or len(message) > 600:
        return "not one short printable line"
    if path not in message:
        return "no file"
    line, text, whole = _line_of(message), prefix(data), True
    try:
        unpacked(data)
    except Refused:
        whole = False
    try:
        rows = len(criteo.read_text(text if whole else text[: text.rfind(b"\n") + 1]))
    except criteo.BadLine as bad:
        return "" if line == bad.args[0] or not whole and line < bad.args[0] else f"line {bad.args[0]} is the first bad one"
    if not whole:  # what zlib had made of the last 8 KiB before the damage is lost to a reader that hands it larger pieces
        return "" if max(1, rows + 1 - GZIP_ROWS) <= line <= rows + 1 else f"the damage is in line {rows + 1}"
    if rows == 0 and "empty" in message or rows < DAYS and "too few" in message:
        return ""
    return "no line is bad"


def prefix(data: bytes) -> bytes:
    """All the text that can be had of a raw file, damaged as it may be: gzip data go through zlib byte by byte where a stretch of them fails."""
    pieces = []
    while data[:2] == b"\x1f\x8b":
        reader, at, step = zlib.decompressobj(31), 0, 1024
        while at < len(data) and not reader.eof:
            before = reader.copy()
            try:
                pieces.append(reader.decompress(data[at : at + step]))
            except zlib.error:
                if step == 1:
                    return b"".join(pieces)
                reader, step = before, 1
                continue
            at += step
        rest = reader.unused_data + data[at:]
        data = rest.lstrip(b"\0")  # padding, which gunzip leaves out too
        if not data or not reader.eof:
            break
    else:
        pieces.append(data if not pieces else b"")
    return b"".join(pieces)


def _reason(data: bytes, number: int, dropped: set[int]) -> str:
    """Why we refuse line `number` of a file that upstream reads; empty where none of REASONS holds."""
    lines = unpacked(data).decode("utf-8").split("\n")
    if not 1 <= number <= len(lines):
        return ""
    cells = lines[number - 1].removesuffix("\r").split("\t")
    return next((reason for reason, holds in REASONS.items() if holds(cells, number - 1 in dropped)), "")
