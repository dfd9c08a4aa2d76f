"""Damaged raw files: upstream's rows, or one line that names file and line. The whole set, in processes: benchmarks/corrupt.py."""

import gzip
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest

from data_loaders import build, criteo_text, read_stage
from data_loaders.preprocess import preprocess
from dlrm_xla.specs import UserError
from tests.oracles import corrupt, upstream_text

GOOD = corrupt.good_text()
VARIANTS = [variant for variant in corrupt.variants(seed=1, share=0.25) if variant.kind not in ("special", "large")]
FLAGS = ((-1, 0.0), (20, 0.0), (97, 0.4))
SECONDS = 30  # an ordinary variant takes 0.02


@pytest.fixture
def no_hang():
    """A variant that takes too long is a failure, not a wait."""

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"{SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def outcome(raw: Path, flags: tuple[int, float]) -> dict[str, np.ndarray] | str:
    """The processed arrays, or the message of the refusal; the processed file is removed."""
    out, rng = raw.parent / "processed.npz", np.random.RandomState(upstream_text.SEED)
    try:
        preprocess(raw, out, max_ind_range=flags[0], sub_sample_rate=flags[1], rng=rng, progress=False)
    except UserError as error:
        assert not out.exists()
        return str(error)
    with np.load(out) as data:
        arrays = {name: data[name] for name in upstream_text.ARRAYS}
    out.unlink()
    return arrays


@pytest.mark.parametrize("kind", dict.fromkeys(variant.kind for variant in VARIANTS))
def test_variants(tmp_path, monkeypatch, no_hang, kind):
    """Every other variant in blocks of about 15 rows, so that a small file has many."""
    raw = tmp_path / "train.txt"
    failed, names = [], set()
    for number, variant in enumerate(variant for variant in VARIANTS if variant.kind == kind):
        flags = FLAGS[number % len(FLAGS)]
        monkeypatch.setattr(criteo_text, "BLOCK_BYTES", (4000, 1 << 20)[number % 2])
        raw.write_bytes(variant.data)
        no_hang()
        ours = outcome(raw, flags)
        verdict = upstream_text.judge(variant.data, ours, str(raw), *flags, min_rows=0)
        names.add(verdict.name)
        if verdict.failed:
            failed.append((variant.name, flags, verdict))
    assert not failed
    assert names


def test_the_good_file_after_each_bad_one(tmp_path, no_hang):
    """Nothing that a refused run leaves is taken for the mended file's, though name and size be the same."""
    raw = tmp_path / "train.txt"
    wanted = upstream_text.read(GOOD)[0]
    lines = GOOD.splitlines(keepends=True)
    other = lines[0][:-2] + bytes([lines[0][-2] ^ 1]) + b"\n"  # the mended file has another first row too
    for line in (0, 150, 299):
        bad = [other, *lines[1:]]
        bad[line] = bad[line].replace(b"\t", b"x", 1)
        raw.write_bytes(b"".join(bad))
        no_hang()
        assert f"{raw}: line {line + 1}: 39 columns" in outcome(raw, FLAGS[0])
        assert raw.stat().st_size == len(GOOD)
        raw.write_bytes(GOOD)
        ours = outcome(raw, FLAGS[0])
        assert all((ours[name] == wanted[name]).all() for name in upstream_text.ARRAYS)


@pytest.fixture
def small_segments(monkeypatch):
    """What an interrupted run keeps of GOOD * 60 are several segments."""
    monkeypatch.setattr(criteo_text, "BLOCK_BYTES", 1 << 16)
    monkeypatch.setattr(read_stage, "SEGMENT_ROWS", 2000)


def fetched_wrongly(good: bytes) -> tuple[bytes, bytes, int]:
    """Copies of the same size, beginning and end with one and with two faults between the first and the last MiB: a digit that nobody can tell
    is wrong, and behind it a line that is refused; and that line's number."""
    assert len(good) > 3 << 20
    early, late = good.index(b"\n", 5 << 18), good.index(b"\n", 7 << 18)
    one = good[: early - 1] + bytes([good[early - 1] ^ 1]) + good[early:]
    return one, one[:late] + b"\t" + one[late + 1 :], good.count(b"\n", 0, late) + 1


def put_in_place(path: Path, data: bytes, how: str) -> None:
    """The file fetched again."""
    before = path.stat()
    if how == "written in place":
        path.write_bytes(data)
        return
    new = path.with_name("new")
    new.write_bytes(data)
    os.utime(new, ns=(before.st_atime_ns, before.st_mtime_ns))
    new.replace(path)


def same_as_alone(ours: dict[str, np.ndarray], data: bytes, folder: Path) -> bool:
    """Whether these are the arrays of a run that found nothing."""
    folder.mkdir()
    (folder / "train.txt").write_bytes(data)
    wanted = outcome(folder / "train.txt", FLAGS[0])
    return all((ours[name] == wanted[name]).all() for name in upstream_text.ARRAYS)


HOW = ["written in place", "another file of the same time"]


@pytest.mark.parametrize("how", HOW)
def test_a_refused_file_fetched_again(tmp_path, small_segments, how):
    """None of the rows read before may be taken over."""
    raw, good = tmp_path / "train.txt", GOOD * 60
    _, bad, line = fetched_wrongly(good)
    raw.write_bytes(bad)
    assert f"{raw}: line {line}: 80 columns" in outcome(raw, FLAGS[0])
    put_in_place(raw, good, how)
    assert same_as_alone(outcome(raw, FLAGS[0]), good, tmp_path / "alone")


@pytest.mark.parametrize("how", HOW)
def test_a_file_fetched_again_after_an_interruption(tmp_path, monkeypatch, small_segments, how):
    """The run has read all rows when it is interrupted; then the file is found to be damaged, and fetched again."""
    raw, good = tmp_path / "train.txt", GOOD * 60
    raw.write_bytes(fetched_wrongly(good)[0])

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(build, "number_columns", interrupt)
        outcome(raw, FLAGS[0])
    put_in_place(raw, good, how)
    assert same_as_alone(outcome(raw, FLAGS[0]), good, tmp_path / "alone")


@pytest.mark.parametrize("how", HOW)
def test_a_day_of_terabyte_fetched_again(tmp_path, small_segments, how):
    """Segments of the days before are kept after a refusal; the refused day's own may not be."""
    good = GOOD * 60
    _, bad, line = fetched_wrongly(good)
    for day in range(24):
        (tmp_path / f"day_{day}").write_bytes(GOOD if day else bad)

    def run() -> None:
        preprocess(tmp_path / "day", tmp_path / "out.npz", max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False, data_set="terabyte")

    with pytest.raises(UserError, match=f"{tmp_path}/day_0: line {line}: 80 columns"):
        run()
    put_in_place(tmp_path / "day_0", good, how)
    run()
    with np.load(tmp_path / "out.npz") as ours:
        assert same_as_alone({name: ours[name] for name in upstream_text.ARRAYS}, good + GOOD * 23, tmp_path / "alone")


@pytest.mark.parametrize("rows", [1, 6])
def test_fewer_rows_than_days(tmp_path, rows):
    """A run needs a row in the last day; a result without one would stand in the way of the whole file."""
    raw = tmp_path / "train.txt"
    raw.write_bytes(b"".join(GOOD.splitlines(keepends=True)[:rows]))
    assert re.match(f"{raw}: {rows} rows? .*too few", outcome(raw, FLAGS[0]))


def test_what_is_no_file(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "dangling").symlink_to("absent")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("folder", "dangling", "loop", "absent", "n" * 300):
        assert re.match(f"--raw-data-file={tmp_path}/{name}: cannot read it: [A-Z]", outcome(tmp_path / name, FLAGS[0]))
    (tmp_path / "null").symlink_to(os.devnull)
    assert re.match(f"(--raw-data-file=)?{tmp_path}/null: ", outcome(tmp_path / "null", FLAGS[0]))


@pytest.mark.parametrize("reason", upstream_text.REASONS)
def test_each_reason_is_met(reason):
    """The reasons for which we refuse what upstream reads; benchmarks/corrupt.py meets each of them too."""
    line = GOOD.splitlines()[0].decode().split("\t")
    line[1:] = [cell or "0" for cell in line[1:]]
    cells = {
        "label not 0 or 1": ["2", *line[1:]],
        "lone carriage return": [*line[:39], line[39] + "\r" + line[0], *line[1:]],
        "one id for all columns": line[:15],
        "blanks in a number": [line[0], " 5", *line[2:]],
        "plus sign": [line[0], "+5", *line[2:]],
        "underscore": [line[0], "1_0", *line[2:]],
        "digits of another script": [line[0], "\u0665", *line[2:]],
        "negative id": [*line[:20], "-1f", *line[21:]],
        "id of more than 8 digits": [*line[:20], "0" * 9, *line[21:]],
        "damage in a row that sub-sampling drops": ["0", "damaged"],
    }[reason]
    data = GOOD + "\t".join(cells).encode() + b"\n"
    rate = 1.0 if "sub-sampling" in reason else 0.0
    message = f"train.txt: line {len(GOOD.splitlines()) + 1}: refused"
    assert upstream_text.judge(data, message, "train.txt", -1, rate).name == f"refused by us: {reason}"


def test_the_judge_sees_what_is_wrong():
    """Losses and changes that a careless reader would make are failures here."""
    wanted = upstream_text.read(GOOD)[0]
    assert upstream_text.judge(GOOD, wanted, "").name == "same rows"
    assert upstream_text.judge(gzip.compress(GOOD), wanted, "").name == "same rows"
    lost = {name: values[:-1] if name != "counts" else values for name, values in wanted.items()}
    assert upstream_text.judge(GOOD, lost, "").name == "FAIL: rows lost"
    changed = wanted | {"X_int": wanted["X_int"] + (np.arange(300) == 7)[:, None]}
    assert upstream_text.judge(GOOD, changed, "").name == "FAIL: other rows"
    assert upstream_text.judge(GOOD + b"1\t2\n", wanted, "").name == "FAIL: accepted what upstream refuses"
    assert upstream_text.judge(GOOD, "train.txt: line 5: refused", "train.txt").name == "FAIL: message"
    assert upstream_text.judge(GOOD + b"1\t2\n", "train.txt: line 5: refused", "train.txt").name == "FAIL: message"
    assert upstream_text.judge(GOOD + b"1\t2\n", "train.txt: line 301: refused", "train.txt").name == "refused by both"
