"""Preprocessing against a naive restatement and against arrays recorded from upstream; bad files; interrupted and repeated runs."""

import gzip
import os
import random
import resource
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest

from data_loaders import criteo_text
from data_loaders.criteo_npz import read_npz
from data_loaders.criteo_set import PROCESSED_NAME
from data_loaders.preprocess import main, preprocess
from data_loaders.split import split_days
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle

ROOT = Path(__file__).resolve().parent.parent
TEXT = oracle.make_text(500)
# (max_ind_range, sub_sample_rate): CRC-32 of upstream's X_cat (as int32), X_int, y, counts of TEXT after seed 123, and its rows per day
UPSTREAM = {
    (-1, 0.0): ([3046697848, 926074072, 3593518547, 3345193038], [72, 72, 72, 71, 71, 71, 71]),
    (20, 0.0): ([1316493040, 926074072, 3593518547, 291058307], [72, 72, 72, 71, 71, 71, 71]),
    (-1, 0.4): ([381079142, 2500963588, 3475742132, 4064338958], [53, 49, 56, 41, 49, 55, 45]),
    (97, 0.4): ([3618007339, 2500963588, 3475742132, 3227685629], [53, 49, 56, 41, 49, 55, 45]),
}
ROW = [b"1", *[b"5"] * 13, *[b"0a1b2c3d"] * 26]


@pytest.fixture
def small_blocks(monkeypatch):
    """Many blocks in a small file: about 15 rows each."""
    monkeypatch.setattr(criteo_text, "BLOCK_BYTES", 4000)


def run(text: bytes, folder: Path, name: str = "train.txt", *, max_ind_range=-1, sub_sample_rate=0.0, seed=0) -> dict[str, np.ndarray]:
    raw, out = folder / name, folder / "processed.npz"
    raw.write_bytes(text)
    rng = np.random.RandomState(seed)
    preprocess(raw, out, max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, rng=rng, progress=False)
    return load(out)


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as data:
        return {name: data[name] for name in data.files}


def message(text: bytes, folder: Path, name: str = "train.txt") -> str:
    with pytest.raises(UserError) as caught:
        run(text, folder, name)
    assert [path.name for path in folder.iterdir()] == [name], "something half-written was left behind"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_cell(column: int, cell: bytes, line: int = 30) -> bytes:
    """100 good rows but for one cell. column counts from 1."""
    rows = [list(ROW) for _ in range(100)]
    rows[line - 1][column - 1] = cell
    return b"".join(b"\t".join(row) + b"\n" for row in rows)


def same(ours: dict[str, np.ndarray], wanted: dict[str, list]) -> None:
    for name, values in wanted.items():
        np.testing.assert_array_equal(ours[name], values, err_msg=name)


@pytest.mark.parametrize("max_ind_range, sub_sample_rate", UPSTREAM)
def test_recorded_from_upstream(tmp_path, small_blocks, max_ind_range, sub_sample_rate):
    ours = run(TEXT, tmp_path, max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, seed=123)
    sums, total_per_file = UPSTREAM[max_ind_range, sub_sample_rate]
    assert [zlib.crc32(ours[name].astype("<i4").tobytes()) for name in ("X_cat", "X_int", "y", "counts")] == sums
    assert ours["total_per_file"].tolist() == total_per_file
    with np.load(tmp_path / "train_day_count.npz") as upstream_reads:
        assert upstream_reads["total_per_file"].tolist() == total_per_file


@pytest.mark.parametrize("rows", [14, 97, 700])
@pytest.mark.parametrize("max_ind_range, sub_sample_rate", [(-1, 0.0), (0, 1.0), (1, 0.3), (2**31 - 1, 0.0), (2**33, 0.5)])
def test_equals_naive(tmp_path, small_blocks, rows, max_ind_range, sub_sample_rate):
    text = oracle.make_text(rows, seed=rows)
    ours = run(text, tmp_path, max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, seed=7)
    same(ours, oracle.process(text, max_ind_range, sub_sample_rate, seed=7))
    assert {name: ours[name].dtype for name in ("X_cat", "X_int", "y", "counts")} == dict.fromkeys(("X_cat", "X_int", "y", "counts"), np.int32)
    assert ours["total_per_file"].dtype == np.int64


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.rstrip(b"\n"),
        lambda text: text.replace(b"\n", b"\r\n")[:-2],
        lambda text: text.replace(b"\n", b"\r\n")[:-1],
        bytes.upper,
        lambda text: b"\n".join(b"\t".join(c.lstrip(b"0") or c for c in line.split(b"\t")) for line in text.split(b"\n")),  # short ids
        lambda text: text.replace(b"\t00", b"\t0x"),
        lambda text: gzip.compress(text),
        lambda text: gzip.compress(text[:5000]) + gzip.compress(text[5000:]),  # two members, cut in the middle of a line
    ],
    ids=["crlf", "no_last_end", "crlf_no_last_end", "last_cr_only", "upper_case", "short", "0x", "gzip", "gzip_members"],
)
def test_accepted_spellings(tmp_path, small_blocks, change):
    text = change(TEXT)
    assert text != TEXT
    same(run(text, tmp_path), oracle.process(gzip.decompress(text) if text[:2] == b"\x1f\x8b" else text))


def test_spellings_of_one_id_are_one_id(tmp_path):
    cells = (b"0a1b2c3d", b"0A1B2C3D", b"a1b2c3d", b"0xA1b2c3d", b"00000000", b"", b"0", b"0x0")
    rows = [[*ROW[:14], cell, *ROW[15:]] for cell in cells] * 2
    ours = run(b"".join(b"\t".join(row) + b"\n" for row in rows), tmp_path)
    assert ours["X_cat"][:, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1] * 2


def test_days():
    assert split_days(16, 7).tolist() == [3, 3, 2, 2, 2, 2, 2]
    assert split_days(3, 7).tolist() == [1, 1, 1, 0, 0, 0, 0]


BAD_CELLS = [
    (1, b"2", "(label): '2' is not 0 or 1"), (1, b"-1", "(label): '-1'"), (1, b"", "(label): ''"), (1, b"1.0", "(label): '1.0'"),
    (2, b"3.5", "column 2 (count I1): '3.5' is not a whole number"), (14, b"12a", "column 14 (count I13): '12a'"), (5, b"-", "'-'"),
    (3, b"0x1F", "(count I2): '0x1F'"), (3, b" 5", "' 5'"), (3, b"+5", "'+5'"), (3, b"1_0", "'1_0'"), (3, b"3000000000", "does not fit 32 bits"),
    (15, b"0a1b2c3g", "column 15 (id C1): '0a1b2c3g' is not a hexadecimal id"), (40, b"xyz", "column 40 (id C26): 'xyz'"),
    (16, b"0a1b2c3d4", "1 to 8 digits"), (16, b"-a1b2c3d", "'-a1b2c3d'"), (16, b" ", "' '"), (16, b"0x", "'0x'"), (16, b"\xc3\xa9", "'\\xe9'"),
    (16, b"q" * 60, "'" + "q" * 40 + "'..."), (9, b"1\t2", "41 columns; a row has 40"), (40, b"ab\rcd", "'ab\\rcd'"), (7, b"\0", "NUL"),
    (7, b"9" * 5000, "does not fit"), (1, b"0" * 5000 + b"2", "is not 0 or 1"),
]  # fmt: skip


@pytest.mark.parametrize("column, cell, words", BAD_CELLS, ids=range(len(BAD_CELLS)))
def test_bad_cell(tmp_path, column, cell, words):
    said = message(with_cell(column, cell), tmp_path)
    assert f"{tmp_path / 'train.txt'}: line 30" in said and words in said


def test_first_bad_line_wins(tmp_path, small_blocks):
    lines = TEXT.split(b"\n")
    lines[333] = lines[400] = lines[333].replace(b"\t", b"\tz", 1)
    assert "line 334, column 2" in message(b"\n".join(lines), tmp_path)
    zipped = gzip.compress(b"\n".join(lines[:400]))
    assert "line 334, column 2" in message(zipped[:-3], tmp_path), "a bad line comes before the end that is cut off"


@pytest.mark.parametrize("where", [0, 250, 499, 500])
def test_blank_line(tmp_path, small_blocks, where):
    lines = TEXT.split(b"\n")
    lines.insert(where, b"")
    assert f"line {where + 1}: the line is blank" in message(b"\n".join(lines), tmp_path)


BAD_FILES = {
    "empty": (b"", "the file is empty"),
    "empty gzip": (gzip.compress(b""), "the file is empty"),
    "missing column": (TEXT + b"1\t2\n", "line 501: 2 columns; a row has 40"),
    "cut-off row": (TEXT[:-30], "line 500: "),
    "cut-off gzip": (gzip.compress(TEXT)[:-500], "is cut off; fetch it again"),
    "gzip without its last bytes": (gzip.compress(TEXT)[:-4], "line 501: the file ends before the end of its gzip data: it is cut off"),
    "wrong checksum": (gzip.compress(TEXT)[:-8] + b"01234567", "is damaged"),
    "garbage after gzip": (gzip.compress(TEXT) + b"garbage", "is damaged"),
    "UTF-16": (TEXT.decode().encode("utf-16"), "line 1: NUL bytes or a UTF-16 mark"),
    "UTF-16 without mark": (TEXT.decode().encode("utf-16-le"), "line 1: NUL bytes"),
    "UTF-8 mark": (b"\xef\xbb\xbf" + TEXT, "line 1: a UTF-8 byte order mark"),
    "binary": (bytes(range(256)) * 40, "line 1: NUL bytes"),
    "commas": (TEXT.replace(b"\t", b","), "line 1: 1 columns; a row has 40"),
    "old Mac line ends": (TEXT.replace(b"\n", b"\r"), "line 1: "),
    "test file without labels": (b"\n".join(line[2:] for line in TEXT.split(b"\n")), "line 1: 39 columns; a row has 40"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_file(tmp_path, case):
    text, words = BAD_FILES[case]
    said = message(text, tmp_path)
    assert str(tmp_path / "train.txt") in said and words in said


def test_a_file_without_lines_is_not_read_whole(tmp_path, small_blocks):
    assert "line 1: no line end within" in message(b"0" * 100_000, tmp_path)


def test_unreadable_and_unwritable(tmp_path):
    arguments = {"max_ind_range": -1, "sub_sample_rate": 0.0, "rng": np.random.RandomState(0), "progress": False}
    for raw in (tmp_path / "absent.txt", tmp_path):
        with pytest.raises(UserError, match=f"--raw-data-file={raw}: cannot read it: "):
            preprocess(raw, tmp_path / "out.npz", **arguments)
    raw = tmp_path / "train.txt"
    raw.write_bytes(TEXT)
    for out in (tmp_path / "absent" / "out.npz", raw / "out.npz", tmp_path):
        with pytest.raises(UserError, match=r"cannot write .*; name another place with --processed-data-file=PATH$"):
            preprocess(raw, out, **arguments)
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(UserError, match="Permission denied; name another place"):
            preprocess(raw, locked / "out.npz", **arguments)
        raw.chmod(0)
        with pytest.raises(UserError, match="cannot read it: Permission denied"):
            preprocess(raw, tmp_path / "out.npz", **arguments)
        raw.chmod(0o600)
    with pytest.raises(UserError, match="leaves no row"):
        raw.write_bytes(b"".join(b"0" + line[1:] for line in TEXT.splitlines(keepends=True)))
        preprocess(raw, tmp_path / "out.npz", **(arguments | {"sub_sample_rate": 1.0}))


def in_a_process(raw: Path, out: Path, before: str = "") -> list[str]:
    """A command that preprocesses; `before` is Python to run there first."""
    call = "preprocess(Path(sys.argv[1]), Path(sys.argv[2]), max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False)"
    code = f"import sys; from pathlib import Path; from data_loaders.preprocess import preprocess; {before}\n{call}"
    return [sys.executable, "-c", code, str(raw), str(out)]


@pytest.mark.parametrize("limit", [1, 20_000, 60_000, 79_000])
def test_full_disk(tmp_path, limit):
    """A limit on the size of files stands for a full disk: the write fails in the same place and way."""
    raw, out = tmp_path / "train.txt", tmp_path / "out.npz"
    raw.write_bytes(TEXT)

    def small_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    done = subprocess.run(in_a_process(raw, out), cwd=ROOT, preexec_fn=small_disk, capture_output=True, text=True)  # noqa: PLW1509
    assert f"UserError: cannot write {out}: File too large; name another place with --processed-data-file=PATH" in done.stderr
    assert list(tmp_path.iterdir()) == [raw]


# Where a run dies; tests/test_kill.py tries every step that reaches the disk
KILLED_AT = {
    "start": "import data_loaders.spill as m, os; m.read_json = lambda path: os.kill(os.getpid(), 9)",
    "first block": "import data_loaders.criteo_source as m, os; m.parse_block = lambda *a: os.kill(os.getpid(), 9)",
    "numbering": "import data_loaders.number_stage as m, os; m.number_ids = lambda *a: os.kill(os.getpid(), 9)",
    "writing": "import data_loaders.npz_writer as m, os; m._ids = lambda *a: os.kill(os.getpid(), 9)",
    "renaming": "import os; old = os.replace; os.replace = lambda a, b: os.kill(os.getpid(), 9) if b.name == 'out.npz' else old(a, b)",
    "day count": "import data_loaders.preprocess as m, os; m.write_count_file = lambda *a: os.kill(os.getpid(), 9)",
}


def test_killed_at_any_moment(tmp_path):
    raw, out = tmp_path / "train.txt", tmp_path / "out.npz"
    raw.write_bytes(TEXT)
    for moment, before in KILLED_AT.items():
        assert subprocess.run(in_a_process(raw, out, before), cwd=ROOT).returncode == -9, moment
        assert not out.exists(), moment
        assert {path.name for path in tmp_path.iterdir()} <= {"out.npz.parts", "train.txt", "train_day_count.npz"}, moment
    preprocess(raw, out, max_ind_range=-1, sub_sample_rate=0.0, rng=np.random.RandomState(0), progress=False)
    same(load(out), oracle.process(TEXT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npz", "train.txt", "train_day_count.npz"]


def test_two_runs_at_once(tmp_path):
    """The second is refused, and the first is not disturbed."""
    raw, out = tmp_path / "train.txt", tmp_path / "out.npz"
    raw.write_bytes(TEXT)
    wait = "import data_loaders.number_stage as m; old = m.number_ids; m.number_ids = lambda *a: (print('ready', flush=True), input(), old(*a))[2]"
    with subprocess.Popen(in_a_process(raw, out, wait), cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout.readline() == "ready\n"
        with pytest.raises(UserError, match="another run is making it .*; wait for that run, or name another place$"):
            preprocess(raw, out, max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False)
        first.communicate("go\n" * 26)
    assert first.returncode == 0
    same(load(out), oracle.process(TEXT))


def test_same_bytes_when_repeated(tmp_path):
    run(TEXT, tmp_path)
    first = (tmp_path / "processed.npz").read_bytes()
    run(TEXT, tmp_path)
    assert (tmp_path / "processed.npz").read_bytes() == first


def test_day_count_of_upstream_is_left_alone(tmp_path):
    path = tmp_path / "train_day_count.npz"
    np.savez(path, total_per_file=np.arange(7))
    run(TEXT, tmp_path)
    with np.load(path) as data:
        assert data["total_per_file"].tolist() == list(range(7))
    path.unlink()
    run(TEXT, tmp_path)
    ours = run(TEXT, tmp_path, sub_sample_rate=0.5)
    with np.load(path) as data:
        assert data["total_per_file"].tolist() == ours["total_per_file"].tolist()


def test_day_count_of_a_prefix_with_a_dot(tmp_path):
    """Upstream cuts Kaggle's name at its first dot, Terabyte's prefix not at all."""
    for day in range(24):
        (tmp_path / f"tb.v1_day_{day}").write_bytes(oracle.make_text(3 + day, seed=day))
    flags = {"max_ind_range": -1, "sub_sample_rate": 0.0, "rng": None, "progress": False}
    preprocess(tmp_path / "tb.v1_day", tmp_path / "out.npz", **flags, data_set="terabyte")
    with np.load(tmp_path / "tb.v1_day_day_count.npz") as data:
        assert data["total_per_file"].tolist() == [3 + day for day in range(24)]
    (tmp_path / "train.v1.txt").write_bytes(TEXT)
    preprocess(tmp_path / "train.v1.txt", tmp_path / "k.npz", **flags)
    assert sorted(path.name for path in tmp_path.glob("*_day_count.npz")) == ["tb.v1_day_day_count.npz", "train_day_count.npz"]


def test_the_callers_stream_stands_where_upstreams_does(tmp_path):
    """After a run, and after one that found everything but the result's name done by another that was killed."""
    raw, out = tmp_path / "train.txt", tmp_path / "out.npz"
    raw.write_bytes(TEXT)
    rename = "import os; os.replace = lambda a, b, old=os.replace: os.kill(os.getpid(), 9) if b.name == 'out.npz' else old(a, b)"
    call = "preprocess(Path(sys.argv[1]), Path(sys.argv[2]), max_ind_range=-1, sub_sample_rate=0.4, rng=np.random.RandomState(3), progress=False)"
    code = f"import sys; from pathlib import Path; import numpy as np; from data_loaders.preprocess import preprocess; {rename}\n{call}"
    assert subprocess.run([sys.executable, "-c", code, str(raw), str(out)], cwd=ROOT).returncode == -9
    wanted = np.random.RandomState(3)
    wanted.uniform(size=500)
    wanted = wanted.randint(2**31)
    for _ in range(2):
        rng = np.random.RandomState(3)
        preprocess(raw, out, max_ind_range=-1, sub_sample_rate=0.4, rng=rng, progress=False)
        same(load(out), oracle.process(TEXT, sub_sample_rate=0.4, seed=3))
        assert rng.randint(2**31) == wanted


def test_command_line(tmp_path, capsys):
    raw = tmp_path / "train.txt"
    raw.write_bytes(TEXT)
    assert main([f"--raw-data-file={raw}", "--data-sub-sample-rate=0.4", "--numpy-rand-seed=5"]) == 0
    same(load(tmp_path / PROCESSED_NAME), oracle.process(TEXT, sub_sample_rate=0.4, seed=5))
    for flags, words in {
        "--preprocess-memory=9QB": "--preprocess-memory=9QB: must be a size",
        "--preprocess-memory=1MB": "is too little for reading rows: ",
        "--data-set=terabyte": f"{raw}_0 is missing",
        "--min-frequency=-1": "--min-frequency=-1 is negative",
        "--vocabulary=absent": "--vocabulary=absent: cannot read it: No such file",
        "--data-sub-sample-rate=2": "is not a probability",
    }.items():
        assert main([f"--raw-data-file={raw}", flags, "--force"]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_a_result_is_not_replaced_unasked(tmp_path, capsys, name):
    raw, out = tmp_path / "train.txt", tmp_path / name
    raw.write_bytes(TEXT)
    flags = [f"--raw-data-file={raw}", f"--processed-data-file={out}", "--data-sub-sample-rate=0.4"]
    assert main(flags) == 0
    before = out.stat().st_ino
    (tmp_path / f"{name}.parts").mkdir()  # of a run that was killed when the result had its name
    assert main(flags) == 0
    assert "is there already" in capsys.readouterr().out and not (tmp_path / f"{name}.parts").exists()
    raw.write_bytes(TEXT + TEXT)
    for more, words in (
        ([], "made from another raw file"),
        (["--max-ind-range=5"], "made with --max-ind-range=-1, but 5 is asked for"),
        (["--numpy-rand-seed=9"], "sampled with another --numpy-rand-seed"),
    ):
        assert main(flags + more) == 2
        said = capsys.readouterr().err
        assert words in said and said.endswith("name another --processed-data-file, or add --force to replace it\n") and out.stat().st_ino == before
    assert main([*flags, "--max-ind-range=5", "--force"]) == 0 and out.stat().st_ino != before


def test_no_day_count_away_from_the_raw_file(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "train.txt").write_bytes(TEXT)
    preprocess(tmp_path / "raw" / "train.txt", tmp_path / "x.npz", max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False)
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["train.txt"]


ALPHABET = [*(bytes([c]) for c in b"\t\n\r-0179afAFgxX +._,\"'\\\0\x1a\x7f\x80\xff"), b"\r\n", b"\n\n", b"\t\t", b"\xef\xbb\xbf"]


@pytest.mark.parametrize("seed", range(150))
def test_damaged_text(tmp_path, small_blocks, seed):
    """Random damage: the first bad line is named, or every row is what the naive reader makes of it."""
    rng = random.Random(seed)
    text = bytearray(oracle.make_text(60, seed=1))
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(text))
        action = rng.randrange(5)
        if action == 0:
            del text[at : at + rng.choice([1, 1, 3, 200])]
        elif action == 1:
            text[at:at] = rng.choice(ALPHABET)
        elif action == 2:
            text[at : at + 1] = rng.choice(ALPHABET)
        elif action == 3:
            text[at:at] = text[at : at + rng.choice([1, 9, 300])]
        else:
            del text[at:]
            text += b"0"
    text = bytes(text)
    try:
        wanted = oracle.process(text)
    except oracle.BadLine as bad:
        (tmp_path / "x").mkdir()
        assert f"train.txt: line {bad.args[0]}" in message(text, tmp_path / "x")
    else:
        same(run(text, tmp_path), wanted)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_gzip(tmp_path, seed):
    """A byte of the packed file changed, or its end cut off: an error that names the file and a line, or the same rows as before."""
    rng = random.Random(seed)
    packed = bytearray(gzip.compress(TEXT, mtime=0))
    at = rng.randrange(2, len(packed))
    if seed % 2:
        del packed[at:]
    else:
        packed[at] ^= 1 << rng.randrange(8)
    try:
        ours = run(bytes(packed), tmp_path)
    except UserError as error:
        assert "train.txt: line " in str(error)
    else:
        same(ours, oracle.process(TEXT))


def test_real_rows(tmp_path, real_criteo):
    """Table sizes as upstream counts them; the day split; ids in order of first appearance."""
    out = tmp_path / "out.npz"
    preprocess(real_criteo, out, max_ind_range=-1, sub_sample_rate=0.0, rng=np.random.RandomState(0), progress=False)
    data = read_npz(out)
    sizes = "616 528 61764 32223 154 12 8634 292 3 13982 4087 56397 2944 26 5897 46382 10 2827 1342 4 52250 13 14 14596 55 11139"
    assert data.counts.tolist() == [int(size) for size in sizes.split()]
    assert data.total_per_file.tolist() == [19592, 19592, 19591, 19591, 19591, 19591, 19591]
    for column in range(26):
        ids, first = np.unique(data.packed[:, 14 + column], return_index=True)
        assert (np.diff(first) > 0).all() and len(ids) == data.counts[column]
    with gzip.open(real_criteo) as file:
        head = b"".join(next(file) for _ in range(2000))
    wanted = oracle.process(head)
    for name, columns in (("y", 0), ("X_int", slice(1, 14)), ("X_cat", slice(14, 40))):
        np.testing.assert_array_equal(data.packed[:2000, columns], wanted[name])
