"""python -m data_loaders.convert: the same rows in every form, and what it refuses."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import ROOT

from data_loaders import convert
from data_loaders.arrays import open_arrays, read_manifest
from data_loaders.criteo import open_criteo
from data_loaders.vocabulary import npz_member
from dlrm_xla.specs import UserError
from tests.oracles import criteo as kaggle_oracle
from tests.oracles import terabyte as oracle
from tests.oracles.reorder import reordered

SIZES = [10 + 3 * (day % 4) for day in range(24)]
DAYS = oracle.make_days(SIZES)
WANTED = oracle.process_days(DAYS)
KAGGLE = kaggle_oracle.process(b"".join(DAYS))


def open_it(raw, processed, **fields):
    rng = np.random.RandomState(123)
    flags = {
        "data_set": "terabyte", "raw_data_file": str(raw), "processed_data_file": str(processed), "data_randomize": "total", "max_ind_range": -1,
        "sub_sample_rate": 0.0, "batch_size": 50, "test_batch_size": 50, "drop_last": False, "num_batches": 0, "rng": rng, "preprocess_rng": rng,
        "progress": False, "print_line": lambda line: None, "seed": 123,
    }  # fmt: skip
    return open_criteo(**(flags | fields))


@pytest.fixture
def kaggle(tmp_path):
    """Our .npz of the rows as Kaggle's."""
    (tmp_path / "K").mkdir()
    (tmp_path / "K" / "train.txt").write_bytes(b"".join(DAYS))
    open_it(tmp_path / "K" / "train.txt", tmp_path / "K" / "made.npz", data_set="kaggle")
    return tmp_path / "K" / "made.npz"


@pytest.fixture
def run(capsys):
    """run(*arguments) -> what was printed, or the error's line."""

    def run(*arguments, code=0):
        capsys.readouterr()
        assert convert.main([str(argument) for argument in arguments]) == code
        captured = capsys.readouterr()
        if code == 0:
            return captured.out
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


def ids_of(data, half):
    return [row for batch in getattr(data, half).batches() for row in batch.ids[: batch.num_valid].tolist()]


@pytest.mark.parametrize("mappable", [False, True])
def test_npz_of_upstreams_npz(run, tmp_path, mappable):
    source = oracle.save_upstreams(tmp_path, WANTED, mappable=mappable)
    printed = run(source, "--to=npz", "--out", tmp_path / "p.npz", "--data-set=terabyte")
    assert printed == f"{sum(SIZES)} rows of terabyte, 24 days: {tmp_path / 'p.npz'}\n"
    with np.load(tmp_path / "p.npz") as data:
        for name in ("X_cat", "X_int", "y", "counts", "total_per_file"):
            assert data[name].dtype.kind == "i" and data[name].tolist() == WANTED[name]
    for half in ("train", "test"):
        assert ids_of(open_it("", tmp_path / "p.npz"), half) == ids_of(open_it(tmp_path / "day", source), half)


def test_ours_to_ours_and_back(run, kaggle):
    """The same files as from the raw text, but for what the manifest says of where they are from."""
    run(kaggle, "--to=npz", "--out", kaggle.with_name("q.npz"))
    assert kaggle.with_name("q.npz").read_bytes() == kaggle.read_bytes()
    open_it(kaggle.with_name("train.txt"), kaggle.with_name("folder"), data_set="kaggle")
    run(kaggle, "--to=arrays", "--out", kaggle.with_name("folder2"))
    made, wanted = (read_manifest(kaggle.with_name(name)) for name in ("folder2", "folder"))
    assert made.files == wanted.files and made == replace(wanted, source=made.source)
    for name in ("folder", "folder2"):
        run(kaggle.with_name(name), "--to=npz", "--out", kaggle.with_name(f"{name}.npz"))
        assert kaggle.with_name(f"{name}.npz").read_bytes() == kaggle.read_bytes()
    asked = (kaggle, "--to=arrays", "--out", kaggle.with_name("folder2"))
    assert "exists; --force overwrites it" in run(*asked, code=2)
    run(*asked, "--force")
    open_it(kaggle.with_name("train.txt"), kaggle.with_name("folder2"), data_set="kaggle")
    assert sorted(path.name for path in kaggle.parent.iterdir() if path.name.startswith(".")) == []


def test_arrays_need_vocabularies(run, tmp_path):
    source = oracle.save_upstreams(tmp_path, WANTED)
    assert "says of no id what it stands for" in run(source, "--to=arrays", "--out", tmp_path / "a", "--data-set=terabyte", code=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("")
    assert "holds other things" in run(source, "--to=arrays", "--out", tmp_path / "full", "--force", "--data-set=terabyte", code=2)


def test_sampled_rows_say_so_in_every_form(run, kaggle, tmp_path):
    """Where their random numbers came from goes with them."""
    raw = kaggle.with_name("train.txt")
    open_it(raw, tmp_path / "s.npz", data_set="kaggle", sub_sample_rate=0.4)
    run(tmp_path / "s.npz", "--to=arrays", "--out", tmp_path / "s")
    run(tmp_path / "s", "--to=npz", "--out", tmp_path / "s2.npz")
    assert (tmp_path / "s2.npz").read_bytes() == (tmp_path / "s.npz").read_bytes()
    for name in ("s.npz", "s", "s2.npz"):
        open_it(raw, tmp_path / name, data_set="kaggle", sub_sample_rate=0.4)
        with pytest.raises(UserError, match="sampled with another --numpy-rand-seed"):
            open_it(raw, tmp_path / name, data_set="kaggle", sub_sample_rate=0.4, preprocess_rng=np.random.RandomState(5))


def test_force_removes_only_what_is_ours(run, kaggle, tmp_path):
    out = tmp_path / "a"
    asked = (kaggle, "--to=arrays", "--out", out, "--force")
    run(*asked)
    (out / "thesis.tex").write_text("mine")
    assert "is a folder that holds other things" in run(*asked, code=2) and (out / "thesis.tex").read_text() == "mine"
    (out / "thesis.tex").unlink()
    manifest = (out / "manifest.json").read_text()
    (out / "manifest.json").write_text('{"manifest_version": 3}')
    assert "is a folder that holds other things" in run(*asked, code=2) and len(list(out.iterdir())) == 54
    (out / "manifest.json").write_text(manifest)
    run(*asked)
    (tmp_path / "f").write_text("mine")
    asked = (kaggle, "--to=arrays", "--out", tmp_path / "f", "--force")
    assert "is a file" in run(*asked, code=2) and (tmp_path / "f").read_text() == "mine"
    (tmp_path / "link.npz").symlink_to(kaggle)
    assert "is what is to be read" in run(kaggle, "--to=npz", "--out", tmp_path / "link.npz", "--force", code=2)


KILLED = """
import os, sys
from data_loaders import convert
number, real = [0], {{name: getattr(os, name) for name in ("rename", "unlink", "rmdir", "fsync")}}

def dying(name):
    def call(*arguments, **options):
        number[0] += 1
        if number[0] > {calls}:
            os.kill(os.getpid(), 9)
        return real[name](*arguments, **options)
    return call

for name in real:
    setattr(os, name, dying(name))
sys.exit(convert.main([{source!r}, "--to=arrays", "--out", {out!r}, "--force"]))
"""


def test_killed_while_replacing(run, kaggle, tmp_path):
    """At every step that changes a folder: what lies under the name is the old folder or the new one, whole, or (a moment) none."""
    out = tmp_path / "a"
    run(kaggle, "--to=arrays", "--out", out)
    whole = read_manifest(out)
    # 54 files are made safe, then folder, old and new name, folder; then the old one goes
    for calls in (0, 54, 55, 56, 57, 80):
        code = KILLED.format(calls=calls, source=str(kaggle), out=str(out))
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
        assert done.returncode == -9, (calls, done.stderr)
        if out.exists():
            assert open_arrays(out, False).manifest == whole, calls
        else:
            assert calls == 56
        assert len(list(tmp_path.glob(".a.*"))) == 1
        run(kaggle, "--to=arrays", "--out", out, "--force")
        assert open_arrays(out, False).manifest == whole and not list(tmp_path.glob(".a.*"))


def test_the_folder_of_a_run_at_work_is_left_alone(run, kaggle, tmp_path):
    with convert._folder_of_its_own(tmp_path / "a") as theirs:
        (theirs / "half").write_text("")
        run(kaggle, "--to=arrays", "--out", tmp_path / "a")
        assert (theirs / "half").exists()
    assert not theirs.exists() and open_arrays(tmp_path / "a", False)


def test_vocabularies_that_do_not_fit(run, kaggle, tmp_path):
    with np.load(kaggle) as data:
        arrays = {name: data[name] for name in data.files}
    np.savez(kaggle, **arrays | {npz_member(3): arrays[npz_member(3)][1:]})
    for form, name in (("npz", "b.npz"), ("arrays", "b")):
        assert "its vocabularies cannot be read (column 3: keys are uint32 [" in run(kaggle, f"--to={form}", "--out", tmp_path / name, code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["K"]


@pytest.mark.parametrize("randomize", ["total", "day", "none"])
@pytest.mark.parametrize("data_set", ["kaggle", "terabyte"])
def test_days_are_upstreams(run, tmp_path, kaggle, data_set, randomize):
    """Names, arrays and order of the files of upstream's --memory-map."""
    wanted = KAGGLE if data_set == "kaggle" else WANTED
    source = kaggle if data_set == "kaggle" else oracle.save_upstreams(tmp_path, WANTED)
    out = tmp_path / ("train.txt" if data_set == "kaggle" else "day2")
    more = () if data_set == "kaggle" else ("--data-set=terabyte",)
    run(source, "--to=days", "--out", out, f"--data-randomize={randomize}", "--numpy-rand-seed=7", *more)
    stem = "train" if data_set == "kaggle" else "day2"
    days, rows = wanted["total_per_file"], []
    for day, size in enumerate(days):
        with np.load(tmp_path / f"{stem}{'_day' if data_set == 'kaggle' else ''}_{day}_reordered.npz") as data:
            assert data["X_cat"].shape == (size, 26) and data["X_int"].shape == (size, 13) and data["y"].shape == (size,)
            rows += np.concatenate([data["y"][:, None], data["X_int"], data["X_cat"]], axis=1).tolist()
    order = reordered(days, randomize, np.random.RandomState(7))
    assert rows == [[wanted["y"][row], *wanted["X_int"][row], *wanted["X_cat"][row]] for row in order]
    with np.load(tmp_path / f"{stem}_day_count.npz") as data:
        assert data["total_per_file"].tolist() == list(days)
    with np.load(tmp_path / f"{stem}_fea_count.npz") as data:
        assert data["counts"].tolist() == wanted["counts"]


def test_bins_are_those_of_a_run(run, tmp_path):
    source = oracle.save_upstreams(tmp_path, WANTED, mappable=True)
    run(source, "--to=bin", "--out", tmp_path / "X.npz", "--data-set=terabyte", "--raw-data-file", tmp_path / "day")
    open_it(tmp_path / "day", source, bin_loader=True)
    for split in ("train", "test", "val"):
        assert (tmp_path / f"X_{split}.bin").read_bytes() == (tmp_path / f"terabyte_processed_{split}.bin").read_bytes()
    data = open_it(tmp_path / "day", tmp_path / "X.npz", bin_loader=True)  # they are read without the set that they were made from
    assert data.train.num_rows == sum(SIZES[:-1]) and list(data.table_rows) == WANTED["counts"]


def test_nothing_is_overwritten_without_force(run, kaggle, tmp_path):
    out = tmp_path / "train.txt"
    run(kaggle, "--to=days", "--out", out)
    first = tmp_path / "train_day_0_reordered.npz"
    whole = first.read_bytes()
    assert run(kaggle, "--to=days", "--out", out, code=2).startswith(f"{first}: exists; --force overwrites it and 6 more, or name another place")
    first.write_bytes(b"other")
    assert "exists; --force" in run(kaggle, "--to=days", "--out", out, code=2) and first.read_bytes() == b"other"
    run(kaggle, "--to=days", "--out", out, "--force")
    assert first.read_bytes() == whole
    for file in tmp_path.glob("train_day_?_reordered.npz"):
        file.unlink()
    np.savez(tmp_path / "train_fea_count.npz", counts=np.array(KAGGLE["counts"]) + 1)
    assert "is not ours, and of other data; --force" in run(kaggle, "--to=days", "--out", out, code=2)
    np.savez(tmp_path / "train_fea_count.npz", counts=np.array(KAGGLE["counts"]))
    run(kaggle, "--to=days", "--out", out)


def test_refusals(run, kaggle, tmp_path):
    assert "no such file or folder" in run(tmp_path / "none", "--to=npz", "--out", tmp_path / "a.npz", code=2)
    assert "without manifest.json" in run(tmp_path, "--to=npz", "--out", tmp_path / "a.npz", code=2)
    assert "must end in .npz" in run(kaggle, "--to=npz", "--out", tmp_path / "a", code=2)
    assert "does not end in .npz" in run(kaggle, "--to=arrays", "--out", tmp_path / "a.npz", code=2)
    assert "is Kaggle's; MLPerf's binary files are of the Terabyte set" in run(kaggle, "--to=bin", "--out", tmp_path / "a", code=2)
    assert "is what is to be read" in run(kaggle, "--to=npz", "--out", kaggle, "--force", code=2)
    assert "is of 7 days, so it is kaggle" in run(kaggle, "--to=npz", "--out", tmp_path / "a.npz", "--data-set=terabyte", code=2)
    assert "--numpy-rand-seed=-1" in run(kaggle, "--to=days", "--out", tmp_path / "a", "--numpy-rand-seed=-1", code=2)
    assert "cannot write" in run(kaggle, "--to=npz", "--out", tmp_path / "none" / "a.npz", code=2)
    theirs = oracle.save_upstreams(tmp_path, WANTED)
    assert "does not say whether it is Kaggle's or the Terabyte set" in run(theirs, "--to=npz", "--out", tmp_path / "a.npz", code=2)
    (tmp_path / "day_day_count.npz").unlink()
    asked = ("--to=npz", "--out", tmp_path / "a.npz", "--data-set=terabyte")
    assert "does not say how many rows each day has" in run(theirs, *asked, code=2)
    kaggle.write_bytes(kaggle.read_bytes()[:5000])
    assert "damaged, or not a processed Criteo file" in run(kaggle, "--to=npz", "--out", tmp_path / "a.npz", code=2)
    assert not (tmp_path / "a.npz").exists()


def test_as_a_command(kaggle):
    command = [sys.executable, "-m", "data_loaders.convert", str(kaggle), "--to=npz", "--out", str(kaggle.with_name("q.npz"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.endswith("q.npz\n")
