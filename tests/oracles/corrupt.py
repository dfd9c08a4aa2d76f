"""Damaged variants of a Criteo text file, the same ones on every machine: what disks, editors, converters and half-finished copies do to it.

Each class below is one kind of damage and a function of (good text, random numbers,
running number) -> (what was done, the bytes of the file). Imports none of our code.
"""

import bz2
import gzip
import io
import lzma
import random
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from tests.oracles.criteo import make_text

ROWS = 300
# bytes that mean something to some reader: separators, signs, digits, quotes, blanks of all kinds, marks, high bytes
PIECES = [
    *(bytes([c]) for c in b"\t\n\r -+_.,;\"'\\0179aAfFgGxX\0\x0b\x0c\x1a\x1c\x7f\x80\xa0\xff"),
    b"\r\n", b"\n\n", b"\r\r", b"\t\t", b"0x", b"\xc2\x85", b"\xc2\xa0", b"\xe2\x80\xa8", b"\xef\xbb\xbf", b"\xd9\xa5", b"\xff\xfe",
]  # fmt: skip
NUMBERS = [
    b"2147483647", b"2147483648", b"-2147483648", b"-2147483649", b"4294967296", b"9" * 19, b"9" * 30, b"9" * 5000, b"0" * 300 + b"7",
    b"-1", b"-0", b"00", b"007", b"+5", b"--5", b"5-", b"-", b"+", b"- 5", b"3.5", b"5.0", b".5", b"5.", b"1e3", b"1E5", b"nan", b"NaN",
    b"inf", b"-inf", b"NULL", b"null", b"None", b"NA", b"\\N", b"true", b"#N/A", b"?", b"1,000", b"1_0", b"1__0", b"_1", b"1_", b" 5", b"5 ",
    b" ", b"  ", b"\x0b5", b"5\x0c", b"\x1c5", b"\xc2\xa05", b"5\xe2\x80\xa8", b"\xc2\x855", b"\xe3\x80\x805", b"\xd9\xa5",
    b"\xef\xbc\x95", b"\xe0\xa5\xab", b"\xc2\xb2", b"\xc2\xbd", b"0x5", b"0b1", b"0o7", b"5\0", b"\0", b"\0005", b'"5"', b"'5'", b"5L",
    b"5u", b"2", b"3", b"10", b"01", b"-01",
]  # fmt: skip
IDS = [
    b"0", b"f", b"0a1b2c3", b"00000000", b"ffffffff", b"FFFFFFFF", b"AbCdEf01", b"80000000", b"0a1b2c3d4", b"000000001", b"0" * 40, b"1" * 17,
    b"7fffffffffffffff", b"8000000000000000", b"f" * 5000, b"0x1f", b"0X1F", b"0xffffffff", b"0x0a1b2c3d4", b"0x", b"0xg", b"-0x1f", b"0x-1",
    b"-1", b"-0", b"-a1b2c3d", b"-ffffffff", b"+a1b", b"a_b", b"0x_1f", b"_ab", b"ab ", b" ab", b"a b", b"ab\x0c", b"\x0bab", b"ab\xc2\xa0",
    b"\xe2\x80\xa8ab", b"\xd9\xa5\xd9\xa6", b"\xef\xbc\x91\xef\xbc\xa1", b"\xef\xbd\x81", b"0a1b2c3g", b"xyz", b"nan", b"1e5", b"1.5", b"#REF!",
    b'"0a1b2c3d"', b"0a1b2c3d,0a", b"ab\0", b"\0ab", b"\xff", b"ab\xe9", b"0b11", b"0o17", b"0h1f", b"1fh", b"\\x1f", b"NULL", b"deadbeef",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """data: the raw file as stored. special: not a file of these bytes but "folder", "dangling", "loop", "null" or "locked"."""

    number: int
    kind: str
    name: str
    data: bytes
    special: str = ""


Damage = Callable[[bytes, random.Random, int], tuple[str, bytes]]


def _flip_bit(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    at, bit = rng.randrange(len(text)), rng.randrange(8)
    return f"bit {bit} of byte {at}", text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :]


def _flip_bytes(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    data, many = bytearray(text), rng.choice([1, 1, 2, 5, 50])
    for _ in range(many):
        data[rng.randrange(len(data))] = rng.choice([rng.randrange(256), *b"\t\n0a-"])
    return f"{many} bytes", bytes(data)


def _insert(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    at, piece = rng.choice([0, len(text), len(text) - 1, *(rng.randrange(len(text)) for _ in range(12))]), PIECES[number % len(PIECES)]
    return f"{piece!r} before byte {at}", text[:at] + piece + text[at:]


def _replace(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    at, piece = rng.randrange(len(text)), PIECES[number % len(PIECES)]
    return f"{piece!r} in place of byte {at}", text[:at] + piece + text[at + 1 :]


def _delete(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    at, many = rng.randrange(len(text)), rng.choice([1, 1, 2, 9, 200, 4096])
    return f"{many} bytes from {at}", text[:at] + text[at + many :]


def _cut(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    line = text.index(b"\n", rng.randrange(len(text) - 1))
    length = rng.choice([rng.randrange(1, len(text)), line, line + 1, line - rng.randrange(1, 30), len(text) - rng.randrange(1, 12)])
    return f"to {length} bytes", text[:length]


def _columns(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    a, b = sorted(rng.sample(range(40), 2))

    def change(cells: list[bytes]) -> list[bytes]:
        return [
            [*cells[:a], *cells[a + 1 :]], [*cells[:a], cells[a], *cells[a:]], [*cells[:a], cells[b], *cells[a + 1 : b], cells[a],
            *cells[b + 1 :]],
            [*cells[: a // 2], b"".join(cells[a // 2 : a // 2 + 2]), *cells[a // 2 + 2 :]], [b"", *cells], [*cells, b""],
            [*cells[:a], b"", *cells[a:]], cells[: a + 1], cells[:15], cells[:2], [cells[0], *cells], cells * 2, cells[::-1],
            [*cells[:14], *cells[15:], b""], [b" ".join(cells)], [b",".join(cells)], [cell + b" " for cell in cells], [b""] * 40,
            [*cells[:a], cells[a] + b"\t" + cells[b], *cells[a + 1 : b], *cells[b + 1 :]], [b'"' + cell + b'"' for cell in cells], [*cells[1:],
            cells[0]],
        ][number % 21]  # fmt: skip

    lines = text.splitlines()
    chosen = range(len(lines)) if rng.random() < 0.2 else [rng.randrange(len(lines))]
    for k in chosen:
        lines[k] = b"\t".join(change(lines[k].split(b"\t")))
    return f"change {number % 21} of columns {a}, {b} in {len(chosen)} lines", b"\n".join(lines) + b"\n"


def _lines(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    lines = text.splitlines(keepends=True)
    k = rng.choice([0, len(lines) - 1, *rng.sample(range(len(lines)), 6)])
    line = lines[k]
    put = [
        [line, line], [b"\n", line], [line, b"\n"], [line, b"\n\n\n"], [b" \n", line], [b"\t\n", line], [b"\r\n", line], [line[:-1]], [line,
        b"\t" * 39 + b"\n"],
        [], [b"0\n", line], [line[: len(line) // 2], b"\n", line[len(line) // 2 :]], [b"# comment\n", line], [b"\x0c\n", line], [line[:-1],
        b"\r\r\n"],
        [line, line[::-1]], [b"label\tI1\n", line], [line, b"0" + b"\t" * 39 + b"\n"], [line, b"\0" * 512 + b"\n"], [b"\x1a", line],
    ][number % 20]  # fmt: skip
    return f"change {number % 20} of line {k + 1}", b"".join([*lines[:k], *put, *lines[k + 1 :]])


def _line_ends(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    ends = [
        b"\r\n", b"\r", b"\n\r", b"\r\r\n", b"\x0b", b"\x0c", b"\xc2\x85", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\x1c", b"\x1e", b"\0", b" \n",
        b"\t\n", b"\x85", b"\\n",
        b"\x0c\n", b"\n\n", b"", b"\r\n\r\n",
    ]  # fmt: skip
    end, share = ends[number % len(ends)], (1.0, 0.0, 0.3)[number // len(ends) % 3]
    lines = text.split(b"\n")[:-1]
    one = rng.randrange(len(lines))
    data = b"".join(line + (end if k == one or rng.random() < share else b"\n") for k, line in enumerate(lines))
    return f"{end!r} ends {share:.0%} of the lines and line {one + 1}", data.removesuffix(b"\n") if number % 2 else data


def _encoding(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    names = [
        "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be", "cp037", "cp500", "utf-7", "rot13", "hex", "high",
        "swap", "base64", "quopri",
    ]  # fmt: skip
    name = names[number % len(names)]
    if name == "high":  # Latin-1 letters, as one byte each, in a few cells
        for _ in range(3):
            at = rng.randrange(len(text))
            text = text[:at] + bytes([rng.randrange(128, 256)]) + text[at + 1 :]
        return "Latin-1 letters", text
    if name == "swap":
        return "every pair of bytes swapped", b"".join(text[k : k + 2][::-1] for k in range(0, len(text), 2))
    if name in ("hex", "base64", "quopri"):
        import codecs

        return name, codecs.encode(text, name)
    if name == "rot13":
        return name, text.translate(bytes.maketrans(b"abcdef", b"nopqrs"))
    whole = number // len(names) % 2 == 0
    half = 0 if whole else text.index(b"\n", len(text) // 2) + 1  # two files of different encodings, one after the other
    return name if whole else f"{name} from byte {half} on", text[:half] + text[half:].decode().encode(name)


def _cell(column: int, value: bytes, text: bytes, rng: random.Random) -> tuple[str, bytes]:
    lines = text.split(b"\n")
    k = rng.choice([0, len(lines) - 2, rng.randrange(len(lines) - 1), rng.randrange(len(lines) - 1)])
    cells = lines[k].split(b"\t")
    cells[column] = value
    lines[k] = b"\t".join(cells)
    return f"{value[:20]!r} in line {k + 1}, column {column + 1}", b"\n".join(lines)


def _label(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    return _cell(0, [b"", b"0.0", b"1.0", *NUMBERS][-(number % (len(NUMBERS) + 3))], text, rng)


def _count(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    return _cell(rng.randrange(1, 14), NUMBERS[number % len(NUMBERS)], text, rng)


def _id(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    return _cell(rng.choice([14, 39, rng.randrange(14, 40)]), IDS[number % len(IDS)], text, rng)


def gzip_header(text: bytes, flags: int, extra: bytes) -> bytes:
    """A gzip file with these header flags and optional header fields."""
    packer = zlib.compressobj(6, zlib.DEFLATED, -15)
    head = struct.pack("<2sBBIBB", b"\x1f\x8b", 8, flags, 0, 0, 255) + extra
    if flags & 2:
        head += struct.pack("<H", zlib.crc32(head) & 0xFFFF)
    return head + packer.compress(text) + packer.flush() + struct.pack("<II", zlib.crc32(text), len(text))


def _gzip(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    packed, half = gzip.compress(text, mtime=0), rng.randrange(len(text))
    first, second = gzip.compress(text[:half], mtime=0), gzip.compress(text[half:], mtime=0)
    at = rng.randrange(10, len(packed) - 8)
    choice, turn = number % 16, number // 16
    if choice < 4:
        lengths = (rng.randrange(len(packed)), len(packed) - rng.randrange(1, 9), rng.randrange(18), len(first) + rng.randrange(len(second)))
        length = lengths[turn % 4]
        return f"cut to {length} bytes", (first + second if turn % 4 == 3 else packed)[:length]
    if choice < 8:
        at = [at, at, len(packed) - 1 - turn % 8, at][choice - 4]
        data = bytearray(packed)
        data[at] ^= 1 << rng.randrange(8)
        return f"byte {at} of {len(packed)} flipped", bytes(data)
    if choice == 8:
        at = number // 16 % 10
        return f"header byte {at} changed", packed[:at] + bytes([packed[at] ^ rng.choice([1, 2, 4, 8, 16, 32, 64, 128])]) + packed[at + 1 :]
    several = _streams(text, packed, first, second, rng, turn)
    name = list(several)[((choice - 9) * 5 + turn) % len(several)]
    return name, several[name]()


def _streams(text: bytes, packed: bytes, first: bytes, second: bytes, rng: random.Random, turn: int) -> dict[str, Callable[[], bytes]]:
    """What is done, and how. packed: the text in one member; first, second: its two halves in members of their own."""

    def second_header() -> bytes:
        damage = bytearray(first + second)
        damage[len(first) + turn % 10] ^= 1 << rng.randrange(8)
        return bytes(damage)

    return {
        "members": lambda: first + second,
        "members, the second's header changed": second_header,
        "garbage behind": lambda: packed + rng.randbytes(40),
        "zeros behind": lambda: packed + bytes(rng.choice([1, 7, 512, 3_000_000])),
        "zeros between members": lambda: first + bytes(512) + second,
        "the beginning of a header behind": lambda: packed + packed[: 1 + turn % 12],
        "good": lambda: gzip.compress(text, rng.choice([0, 1, 9]), mtime=1),
        "gzip of gzip": lambda: gzip.compress(packed),
        "wrong magic": lambda: b"\x1f\x8c" + packed[2:],
        "empty member first": lambda: gzip.compress(b"") + packed,
        "empty member last": lambda: packed + gzip.compress(b""),
        "empty": lambda: gzip.compress(b""),
        "file name": lambda: gzip_header(text, 8, b"train.txt\0"),
        "extra field, comment": lambda: gzip_header(text, 20, b"\x04\0abcd" + b"hello\0"),
        "header checksum": lambda: gzip_header(text, 2, b""),
        "reserved flag": lambda: gzip_header(text, 32, b""),
        "name without end": lambda: gzip_header(text, 8, b"train"),
        "zlib": lambda: zlib.compress(text),
        "bzip2": lambda: bz2.compress(text),
        "xz": lambda: lzma.compress(text),
        "zip": lambda: _zip(text),
        "text behind": lambda: packed + text,
        "text before": lambda: text + packed,
        "length wrong": lambda: packed[:-4] + b"\1\2\3\4",
        "checksum wrong": lambda: packed[:-8] + b"\1\2\3\4" + packed[-4:],
        "members out of order": lambda: second + first,
        "beginning lost": lambda: packed[len(packed) // 3 :],
        "damaged text": lambda: gzip.compress(_flip_bit(text, rng, 0)[1]),
        "a line cut, in two members": lambda: gzip.compress(text[:-100]) + gzip.compress(text[-50:]),
        "many members": lambda: b"".join(map(gzip.compress, text.splitlines(True))),
        "line ends": lambda: gzip.compress(text.replace(b"\n", b"\r\n")),
        "a mark": lambda: gzip.compress(b"\xef\xbb\xbf" + text),
        "cut off text": lambda: gzip.compress(text[: rng.randrange(len(text))]),
    }


def _zip(text: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(zipfile.ZipInfo("train.txt"), text)
    return buffer.getvalue()


def _whole(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    lines = text.splitlines(keepends=True)
    return [
        ("empty", b""), ("one line", lines[0]), ("one line without its end", lines[0][:-1]), ("six rows", b"".join(lines[:6])), ("seven rows",
        b"".join(lines[:7])),
        ("a line end", b"\n"), ("a carriage return", b"\r"), ("one byte", b"0"), ("blanks", b" " * 1000), ("tabs", b"\t" * 39), ("NUL bytes",
        bytes(5000)),
        ("random bytes", rng.randbytes(50_000)), ("without labels", b"".join(line[2:] for line in lines)), ("one line of three million digits",
        b"7" * 3_000_000),
        ("one line of three million tabs", b"\t" * 3_000_000), ("upper case", text.upper()), ("without its last end", text[:-1]), ("two copies",
        text * 2),
        ("rows backwards", b"".join(lines[::-1])), ("HTML", b"<!DOCTYPE html>\n<html><body>404 Not Found</body></html>\n"),
        ("a line of Terabyte's in between", b"".join([*lines[:9], b"1" + b"\t1605001" * 13 + b"\tAD98E872" * 26 + b"\n", *lines[9:]])),
        ("a pointer of Git LFS", b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 12345\n"),
        ("a header of names", b"\t".join([b"label", *(b"c%d" % k for k in range(39))]) + b"\n" + text), ("NumPy's", b"\x93NUMPY\x01\0" + text),
        ("nothing changed", text),
    ][number % 25]  # fmt: skip


def _large(text: bytes, rng: random.Random, number: int) -> tuple[str, bytes]:
    """More than two MiB, so that reading goes over several blocks; the damage lies anywhere."""
    damage = (_flip_bit, _insert, _delete, _line_ends, _cut, _columns, _lines, _gzip)[number % 8]
    name, data = damage(text * 40, rng, number * 7)
    return f"12,000 rows, {name}", data


# kind: (damage, how many of 600)
CLASSES: dict[str, tuple[Damage, int]] = {
    "bit flipped": (_flip_bit, 36), "bytes flipped": (_flip_bytes, 36), "bytes inserted": (_insert, 44), "byte replaced": (_replace, 44),
    "bytes deleted": (_delete, 24), "cut": (_cut, 32), "columns": (_columns, 48), "lines": (_lines, 40), "line ends": (_line_ends, 60),
    "encoding": (_encoding, 30),
    "label": (_label, len(NUMBERS) + 3), "count": (_count, len(NUMBERS)), "id": (_id, len(IDS)), "gzip": (_gzip, 112), "whole file": (_whole,
    25), "large": (_large, 16),
}  # fmt: skip
SPECIALS = ("folder", "dangling", "loop", "null", "locked")


def good_text(rows: int = ROWS) -> bytes:
    """The file before the damage."""
    return make_text(rows, seed=4)


def variants(seed: int = 0, *, share: float = 1.0, rows: int = ROWS) -> list[Variant]:
    """All variants of a seed, class by class; share: only every so many of a class, at least one."""
    text, found = good_text(rows), []
    for kind, (damage, many) in CLASSES.items():
        stride = max(1, round(1 / share))
        for k in range(0, many, stride):
            name, data = damage(text, random.Random(f"{seed} {kind} {k}"), k)
            found.append(Variant(len(found), kind, name, data))
    found += [Variant(len(found) + k, "special", name, b"", name) for k, name in enumerate(SPECIALS)]
    return found
