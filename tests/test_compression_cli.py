"""python -m compression: the commands as they are typed, and how they end when something is wrong."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SMALL

from compression import catalogue, convert, show_ledger
from compression.registry import METHODS


def ended(capsys, main, *argv) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main([str(one) for one in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def process(*command, cwd=ROOT) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=60)


def test_list_fits_the_page_and_leaves_nothing_out(capsys):
    code, out, err = ended(capsys, catalogue.main)
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 150
    words = " ".join(out.split())
    for name, method in METHODS.items():
        assert any(line.startswith(f"{name} ") for line in out.splitlines())
        assert method.title.split()[0] in words
        assert all(catalogue.knob_text(knob).split()[0] in words for knob in method.knobs), name


@pytest.mark.parametrize("name", sorted(METHODS))
def test_one_in_full(capsys, name):
    code, out, _ = ended(capsys, catalogue.main, name)
    method = METHODS[name]
    assert code == 0 and all(text in out for text in (method.title, method.paper, method.bytes_formula))
    assert all(knob.name in out for knob in method.knobs)
    assert max(map(len, out.splitlines())) <= 150
    found = json.loads(ended(capsys, catalogue.main, name, "--json")[1])
    assert found["name"] == name and [knob["name"] for knob in found["knobs"]] == [knob.name for knob in method.knobs]
    assert found["from_start"] == (method.create is not None) and found["from_trained"] == (method.convert is not None)


def test_what_is_converted_can_be_loaded():
    """A checkpoint brings the values; `create` or `shell` brings what they are put into."""
    assert [name for name, method in METHODS.items() if method.convert and not (method.create or method.shell)] == []


def test_as_a_module_and_as_a_file(tmp_path):
    here = process("-m", "compression", "list", "--json")
    assert here.returncode == 0 and [one["name"] for one in json.loads(here.stdout)] == list(METHODS), here.stderr
    away = process(ROOT / "compression" / "__main__.py", "list", "lpt", cwd=tmp_path)
    assert away.returncode == 0 and away.stdout.startswith("lpt\n"), away.stderr


def test_no_command_and_an_unknown_one():
    none, wrong = process("-m", "compression"), process("-m", "compression", "lits")
    assert none.returncode == 2 and "convert" in none.stdout
    assert wrong.returncode == 2 and len(wrong.stderr.splitlines()) == 1 and "list, convert, ledger" in wrong.stderr
    assert process("-m", "compression", "--help").returncode == 0


def test_list_of_an_unknown_method(capsys):
    code, _, err = ended(capsys, catalogue.main, "svq")
    assert code == 2 and len(err.splitlines()) == 1 and "'svq' is no compression method" in err


@pytest.fixture
def model(cli):
    assert cli(*SMALL, "--save-model=m.pt", "--save-every=12").code == 0
    return "m.pt"


def test_ledger(cli, capsys, model):
    code, out, _ = ended(capsys, show_ledger.main, "--load-model=m.pt", "--json=l.json")
    assert code == 0 and "5.54 kB as plain tables, 5.54 kB as stored (1x)" in out
    found = json.loads(Path("l.json").read_text())
    assert [table["parameters"] for table in found["tables"]] == [4 * rows * 8 for rows in (50, 20, 100, 3)]
    code, out, _ = ended(capsys, show_ledger.main, "--load-model=m.pt", "--tpu", "--json=l.json")
    assert code == 0 and "on a TPU" in out
    assert json.loads(Path("l.json").read_text())["shared"] == 16 * 512 - 4 * 173 * 8  # 173 rows of 8 in 11 lines of 128, tiles of 8 lines
    assert cli(*SMALL, "--qr-flag", "--qr-threshold=10", "--save-model=q.pt", "--save-every=12").code == 0
    code, out, _ = ended(capsys, show_ledger.main, "--load-model=q.pt")
    assert code == 0 and "qr" in out


METHOD = ("--method=low_rank:rank=2", "--compress-threshold=10")
WRONG = {
    "an unknown method": (("--method=svq", "--compress-threshold=10"), "'svq' is no compression method"),
    "no such knob": (("--method=low_rank:rnk=2", "--compress-threshold=10"), "--method=low_rank:rnk=2: low_rank:rnk"),
    "a rank too large": (("--method=low_rank:rank=9", "--compress-threshold=10"), "its rank is at most 8"),
    "no method": (("--compress-threshold=10",), "--method or --compress-config is needed"),
    "one that cannot convert": (("--method=dhe", "--compress-threshold=10"), "cannot be made from a trained table; methods that can are"),
    "no such file": ((*METHOD, "--load-model=none.pt"), "--load-model=none.pt: cannot be read"),
    "no checkpoint": ((*METHOD, "--load-model=text"), "--load-model=text: not a readable checkpoint"),
    "no tables": ((*METHOD, "--load-model=bare.pt"), "holds no table"),
    "damaged": ((*METHOD, "--load-model=damaged.pt"), "not a readable checkpoint"),
    "not finite": ((*METHOD, "--load-model=nan.pt"), "table emb_l.1 holds numbers that are not finite"),
    "upstream's QR": ((*METHOD, "--load-model=qr.pt"), "does not say how"),
    "the same file": ((*METHOD, "--save-model=./m.pt"), "is the file of --load-model"),
    "there already": ((*METHOD, "--save-model=text"), "exists; name another file, or add --force"),
    "no such folder": ((*METHOD, "--save-model=none/c.pt"), "the folder none does not exist"),
    "a folder": ((*METHOD, "--save-model=folder"), "is a folder"),
    "no room": ((*METHOD, "--save-model=/proc/c.pt"), "cannot write in /proc"),
    "no folder for the report": ((*METHOD, "--json=none/r.json"), "--json=none/r.json"),
    "compressed already": ((*METHOD, "--load-model=c.pt"), "compressed already; convert the checkpoint that they were made from"),
    "too small a budget": ((*METHOD, "--compress-to=1000x"), "--compress-to=1000x"),
    "no table large enough": (("--method=low_rank:rank=2",), "the largest plain one has 100 rows and --compress-threshold is 200"),
    "a negative threshold": (("--method=lpt", "--compress-threshold=-1"), "--compress-threshold=-1"),
    "no counts": (("--method=hash:weighted=true", "--compress-threshold=10"), "the checkpoint names no data set; give --raw-data-file"),
    "another program's flag": ((*METHOD, "--learning-rate=1"), "unrecognized argument --learning-rate"),
    "a stray word": ((*METHOD, "more"), "unrecognized argument more"),
    "no such data": ((*METHOD, "--raw-data-file=none.txt"), "none.txt"),
}


@pytest.fixture
def files(model, tmp_path, capsys):
    """What wrong command lines name."""
    (tmp_path / "text").write_text("not a checkpoint\n")
    (tmp_path / "folder").mkdir()
    content = torch.load("m.pt", weights_only=True)
    bare = {**content, "state_dict": {name: value for name, value in content["state_dict"].items() if not name.startswith("emb_l.")}}
    torch.save(bare, "bare.pt")
    quotient = dict(content["state_dict"])
    quotient["emb_l.0.weight_q"] = quotient.pop("emb_l.0.weight")
    torch.save({**content, "state_dict": quotient}, "qr.pt")
    content["state_dict"]["emb_l.1.weight"][3, 3] = float("nan")
    torch.save(content, "nan.pt")
    data = bytearray((tmp_path / "m.pt").read_bytes())
    weights = torch.load("m.pt", weights_only=True)["state_dict"]["emb_l.2.weight"].numpy().tobytes()
    data[data.index(weights) + 100] ^= 1
    (tmp_path / "damaged.pt").write_bytes(data)
    assert convert.main(["--load-model=m.pt", "--method=low_rank:rank=2", "--compress-threshold=0", "--save-model=c.pt"]) == 0


def test_what_is_wrong_gets_one_line(files, capsys, tmp_path):
    there = {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")}
    for what, (flags, message) in WRONG.items():
        code, out, err = ended(capsys, convert.main, "--load-model=m.pt", "--save-model=new.pt", *flags)
        lines = [line for line in err.splitlines() if not line.startswith(("note: ", "Reading raw data"))]
        assert code == 2 and len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0], (what, err)
        assert out == "", what
        assert {path.name: path.read_bytes() for path in tmp_path.glob("*.pt")} == there, what
    code, _, err = ended(capsys, show_ledger.main, "--load-model=qr.pt")
    assert code == 2 and "does not say what made table emb_l.0" in err


RANDOM = (
    "--arch-sparse-feature-size=8", "--arch-embedding-size=500-300-3", "--arch-mlp-bot=5-16-8", "--arch-mlp-top=16-8-1", "--mini-batch-size=32",
    "--num-batches=4", "--loss-function=bce", "--round-targets=True", "--optimizer=rwsadagrad",
)  # fmt: skip


@pytest.mark.parametrize(
    "more, message",
    [
        (["--compress=hash:rows=0"], "--compress=hash:rows=0: hash:rows=0: must be at least 1"),
        (["--compress=hot_cold:hot=inf"], "hot_cold:hot=inf: must be a number"),
        (["--compress=hash:rows=5", "--compress-to=10x"], "--compress-to=10x: sets rows of hash, and hash:rows=5 does too"),
        (["--compress=hash", "--compress-to=10"], "--compress-to=10: must be a ratio, as 100x, or a size, as 5MB"),
        (["--compress=hash", "--compress-to=100000x"], "no knob makes them smaller than"),
        (["--compress=lpt", "--optimizer=adagrad"], "lpt keeps no number for every weight, and --optimizer=adagrad would; use sgd or rwsadagrad"),
        (["--compress=pq"], "pq is made from a trained table"),
        (["--compress=hot_cold"], "hot_cold: goes by how often training looks ids up"),
        (["--compress=tt:rank=100000"], "tt:rank=100000: table emb_l.0"),
        (["--compress-to=10x"], "needs a method to size"),
        (["--compress=hash", "--qr-flag"], "do not go with --qr-flag"),
    ],
)
def test_wrong_wishes_of_a_run(cli, more, message):
    assert message in cli(*RANDOM, *more).error


def test_a_checkpoint_and_the_flags_beside_it(cli):
    """Flags that say something else than the file, or that plain tables be compressed, are refused; the same flags go on."""
    assert cli(*RANDOM, "--save-model=plain.pt", "--save-every=2").code == 0
    assert "its tables are plain, and hash" in cli(*RANDOM, "--load-model=plain.pt", "--compress=hash").error
    assert cli(*RANDOM, "--compress=hash:rows=30", "--save-model=hash.pt", "--save-every=2").code == 0
    for more in ((), ("--compress=hash:rows=30",), ("--compress=hash",)):
        assert cli(*RANDOM, "--load-model=hash.pt", "--nepochs=2", *more).code == 0
    for more in ("--compress=hash:rows=40", "--compress=tt"):
        assert "table 0 of the checkpoint was made by hash:rows=30" in cli(*RANDOM, "--load-model=hash.pt", more).error
    assert "quantizes plain tables" in cli(*RANDOM, "--load-model=hash.pt", "--inference-only", "--quantize-emb-with-bit=8").error


def test_a_yaml_and_a_flag_beside_it(cli, tmp_path):
    (tmp_path / "t.yaml").write_text("threshold: 400\ntables:\n  1: qr:operation=add\n")
    assert "1 by hash, 1 by qr, 1 plain" in cli(*RANDOM, "--compress=hash", "--compress-config=t.yaml").err
    (tmp_path / "t.yaml").write_text("default: qr\n")
    assert "has a default of its own" in cli(*RANDOM, "--compress=hash", "--compress-config=t.yaml").error
