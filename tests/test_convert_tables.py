"""python -m compression convert: trained tables become smaller ones that run_dlrm.py tests and trains on. Every method that has `convert`."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CRITEO_MODEL, SMALL
from test_methods import counts_of, knobs_of
from test_resume import stopped_after

from compression import convert
from compression.method import Choice, Making
from compression.registry import METHODS, create_table
from compression.show_ledger import ledger_of
from dlrm_xla import checkpoint, checkpoint_file
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec

ROWS, DIM = (50, 20, 100, 3), 8  # of SMALL's tables; the last stays plain
FLAGS = (*SMALL, "--optimizer=rwsadagrad", "--test-freq=12")
NAMES = sorted(name for name, method in METHODS.items() if method.convert is not None)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of two epochs, written once."""
    import run_dlrm

    folder = tmp_path_factory.mktemp("trained")
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run_dlrm.main([*FLAGS, "--nepochs=2", "--save-model=m.pt", "--save-every=12", "--device=cpu"]) == 0
    finally:
        os.chdir(before)
    return folder / "m.pt"


@pytest.fixture
def run_convert(capsys, tmp_path, monkeypatch):
    """run_convert(*flags) -> (stdout, report as JSON). Random data has no counts worth the name: they are made up."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "training_counts", lambda loaded, given, specs, why: [counts_of(rows) for rows in ROWS])

    def run(*flags) -> tuple[str, dict]:
        capsys.readouterr()
        code = convert.main([*map(str, flags), f"--json={tmp_path / 'report.json'}"])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return captured.out, json.loads((tmp_path / "report.json").read_text())

    return run


def typed(name: str, spec: TableSpec, **given) -> str:
    """A method as users type it, the knobs that differ from the defaults written out."""
    knobs, defaults = knobs_of(name, spec, **given), METHODS[name].knob_values({})
    given = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in knobs.items() if value != defaults[key]]
    return name + (":" if given else "") + ",".join(given)


def weights_of(path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def rebuilt(path, index: int) -> EmbeddingCollection:
    """One table of a checkpoint by itself."""
    loaded = checkpoint_file.read(path)
    said = loaded.tables[index]
    spec = TableSpec(f"emb_l.{index}", said["rows"], said["dim"])
    table = create_table(spec, Choice(said["method"], said["knobs"]), Making(np.random.RandomState(1)), to_load=True)
    collection = EmbeddingCollection([table], None, RULES["sgd"](), RowsLayout(add_rows_scatter, ragged=False))
    with torch.no_grad():
        held = [(name, value) for name, value, _ in checkpoint.table_parameters(collection, lambda parameter: {})]
        for name, value in [*held, *checkpoint.kept(collection)]:
            value.copy_(loaded.weights[name])
    return collection


def test_figures(cli, *flags) -> tuple[float, float]:
    """AUC and log loss of --inference-only, to six digits."""
    outcome = cli(*FLAGS, "--inference-only", *flags)
    assert outcome.code == 0, outcome.err
    auc, loss = re.findall(r"AUC (\S+), log loss (\S+),", outcome.err)[-1]
    return float(auc), float(loss)


test_figures.__test__ = False


@pytest.mark.parametrize("name", NAMES)
def test_what_is_converted_is_tested_as_its_vectors_are(cli, run_convert, trained, tmp_path, name):
    """The compressed model's test equals that of plain tables with its vectors; the report's error is theirs; bytes on disk are the ledger's."""
    _, report = run_convert(
        f"--load-model={trained}", "--save-model=c.pt", f"--method={typed(name, TableSpec('emb_l.1', 20, DIM))}", "--compress-threshold=10"
    )
    assert [table["table"] for table in report["tables"]] == ["emb_l.0", "emb_l.1", "emb_l.2"]
    content, compressed = torch.load(trained, weights_only=True), weights_of("c.pt")
    del content["dlrm_xla"]
    entries = {entry.table: entry for entry in ledger_of(checkpoint_file.read(tmp_path / "c.pt"), tpu=False).entries}
    for index, table in enumerate(report["tables"]):
        key = f"emb_l.{index}.weight"
        vectors = rebuilt(tmp_path / "c.pt", index).materialize(0, torch.arange(ROWS[index]))
        exact = content["state_dict"][key].double()
        error = float((vectors.double() - exact).norm() / exact.norm())
        assert table["relative_error"] == pytest.approx(error, rel=1e-5, abs=1e-7)
        if name in ("svd", "low_rank"):
            assert table["relative_error"] == pytest.approx(table["optimal"], rel=1e-4, abs=1e-6)
        content["state_dict"][key] = vectors
        held = sum(value.nelement() * value.element_size() for part, value in compressed.items() if part.startswith(f"emb_l.{index}."))
        assert held == table["bytes_after"] == entries[f"emb_l.{index}"].stored
        assert table["bytes_before"] == 4 * ROWS[index] * DIM == entries[f"emb_l.{index}"].plain
    torch.save(content, "plain.pt")
    auc, loss = test_figures(cli, "--load-model=c.pt")
    assert (auc, loss) == pytest.approx(test_figures(cli, "--load-model=plain.pt"), abs=1e-5)
    assert 0 <= auc <= 1 and np.isfinite(loss)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].exact_at is not None])
def test_at_its_exact_setting_nothing_is_lost(cli, run_convert, trained, name):
    tables = {index: METHODS[name].exact_at(TableSpec(f"emb_l.{index}", ROWS[index], DIM)) for index in range(3)}
    lines = [f"  {index}: {typed(name, TableSpec(f'emb_l.{index}', ROWS[index], DIM), **knobs)}\n" for index, knobs in tables.items()]
    with open("tables.yaml", "w") as file:
        file.write("tables:\n" + "".join(lines))
    _, report = run_convert(f"--load-model={trained}", "--save-model=c.pt", "--compress-config=tables.yaml")
    assert len(report["tables"]) == 3 and max(table["relative_error"] for table in report["tables"]) < 1e-5
    before, after = (test_figures(cli, f"--load-model={path}") for path in (trained, "c.pt"))
    assert after == pytest.approx(before, abs=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_and_resumes_bitwise(cli, run_convert, trained, capsys, name):
    run_convert(f"--load-model={trained}", "--save-model=c.pt", f"--method={typed(name, TableSpec('emb_l.1', 20, DIM))}", "--compress-threshold=10")
    more = (*FLAGS, "--nepochs=4", "--save-every=6")
    whole = cli(*more, "--load-model=c.pt", "--save-model=whole.pt")
    assert whole.code == 0 and len(whole.losses) == 24 and np.isfinite(whole.losses).all(), whole.err
    stopped_after(cli, (*more, "--load-model=c.pt", "--save-model=cut.pt"), 30, "cpu", capsys)
    resumed = cli(*more, "--load-model=cut.pt", "--save-model=end.pt")
    assert resumed.code == 0, resumed.err
    final, end = weights_of("whole.pt"), weights_of("end.pt")
    assert final.keys() == end.keys()
    for key, value in final.items():
        assert torch.equal(value, end[key]), key
    changed = [key for key, value in weights_of("c.pt").items() if key.startswith("emb_l.0.") and not torch.equal(value, final[key])]
    assert bool(changed) == METHODS[name].trainable


@pytest.mark.parametrize("optimizer, key", [("adagrad", "sum"), ("rwsadagrad", "momentum")])
def test_sums_start_at_the_old_tables_mean_and_the_rest_stays(cli, run_convert, optimizer, key):
    assert cli(*SMALL, f"--optimizer={optimizer}", "--save-model=m.pt", "--save-every=12").code == 0
    source = Path("m.pt").read_bytes()
    run_convert("--load-model=m.pt", "--save-model=c.pt", "--method=low_rank:rank=3", "--compress-threshold=10")
    assert Path("m.pt").read_bytes() == source
    old, new = (torch.load(path, weights_only=True) for path in ("m.pt", "c.pt"))
    names = [list(content["state_dict"]) for content in (old, new)]
    states = [{name: content["opt_state_dict"]["state"].get(at) for at, name in enumerate(of)} for content, of in zip((old, new), names, strict=True)]
    for index in range(3):
        mean = states[0][f"emb_l.{index}.weight"][key].double().mean()
        assert mean > 0
        parts = [name for name in names[1] if name.startswith(f"emb_l.{index}.")]
        assert len(parts) == 2
        for part in parts:
            (sums,) = [value for kind, value in states[1][part].items() if kind != "step"]
            torch.testing.assert_close(sums, torch.full_like(sums, float(mean)))
            assert states[1][part]["step"] == states[0][f"emb_l.{index}.weight"]["step"]
    for name in names[0]:
        if name not in ("emb_l.0.weight", "emb_l.1.weight", "emb_l.2.weight"):
            assert torch.equal(old["state_dict"][name], new["state_dict"][name]), name
            for kind, value in states[0][name].items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][name][kind])), (name, kind)
    for kind in ("progress", "flags"):
        assert old["dlrm_xla"][kind] == new["dlrm_xla"][kind]


@pytest.mark.parametrize("form", ["{}.weight", "{}.embtable.weight"])  # upstream's, the 2020 TPU port's
@pytest.mark.parametrize("zipped", [True, False])
def test_upstreams_files(cli, run_convert, trained, form, zipped):
    content = torch.load(trained, weights_only=True)
    del content["dlrm_xla"]
    content["test_acc"] = np.float64(content["test_acc"])
    tables = {f"emb_l.{index}.weight": form.format(f"emb_l.{index}") for index in range(4)}
    content["state_dict"] = {tables.get(name, name): value for name, value in content["state_dict"].items()}
    torch.save(content, "upstream.pt", _use_new_zipfile_serialization=zipped)
    run_convert("--load-model=upstream.pt", "--save-model=c.pt", "--method=low_rank:rank=8", "--compress-threshold=60")
    assert test_figures(cli, "--load-model=c.pt") == pytest.approx(test_figures(cli, "--load-model=upstream.pt"), abs=2e-6)
    outcome = cli(*FLAGS, "--nepochs=3", "--load-model=c.pt")
    assert outcome.code == 0 and len(outcome.losses) == 12
    made = checkpoint_file.read(Path("c.pt"))
    assert not made.exact and [table["method"] for table in made.tables] == ["plain", "plain", "low_rank", "plain"]


def test_one_after_the_other(cli, run_convert, trained, capsys):
    """What is compressed already stays, and is said to; the clock of int8 rows stays with them."""
    run_convert(f"--load-model={trained}", "--save-model=a.pt", "--method=lpt", "--compress-threshold=60")
    assert cli(*FLAGS, "--nepochs=3", "--load-model=a.pt", "--save-model=b.pt", "--save-every=12").code == 0
    clock = weights_of("b.pt")[f"int8_clock.{DIM}"]
    assert clock == 12
    code = convert.main(["--load-model=b.pt", "--save-model=c.pt", "--method=lpt", "--compress-threshold=30"])
    captured = capsys.readouterr()
    assert code == 0 and "note: compressed already, and left as they are: emb_l.2" in captured.err
    assert weights_of("c.pt")[f"int8_clock.{DIM}"] == clock
    assert [table["method"] for table in checkpoint_file.read(Path("c.pt")).tables] == ["lpt", "plain", "lpt", "plain"]
    assert cli(*FLAGS, "--nepochs=4", "--load-model=c.pt").code == 0


def test_counts_come_from_the_checkpoints_data_set(cli, criteo_file, capsys, tmp_path):
    """hot_cold needs counts: from the data set that the flags in the checkpoint name, then from one that is named, then from none."""
    assert cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}", "--save-model=m.pt", "--save-every=5", "--num-batches=5").code == 0
    method = ("--method=hash:rows=8,weighted=true", "--compress-threshold=30", "--load-model=m.pt")
    for number, flags in enumerate([(), (f"--raw-data-file={criteo_file}",)]):
        capsys.readouterr()
        assert convert.main([*method, f"--save-model=c{number}.pt", f"--json={tmp_path / 'r.json'}", *flags]) == 0
        out = capsys.readouterr().out
        assert "error*" in out and "ids count as often" in out
        tables = json.loads((tmp_path / "r.json").read_text())["tables"]
        assert tables and all(0 < table["relative_error_weighted"] <= table["relative_error"] * 1.5 for table in tables)
    assert all(torch.equal(value, weights_of("c1.pt")[name]) for name, value in weights_of("c0.pt").items())
    flags = ("--max-ind-range=7", f"--processed-data-file={tmp_path / 'other.npz'}")
    assert convert.main([*method, "--save-model=d.pt", *flags]) == 2
    assert "ids in the data set and" in capsys.readouterr().err


def test_killed_while_it_writes(cli, run_convert, trained, monkeypatch, tmp_path):
    """Nothing half, the file that was there stays, and the next run removes what is left."""

    class Killed(BaseException):
        pass

    flags = (f"--load-model={trained}", "--save-model=c.pt", "--method=low_rank:rank=2", "--compress-threshold=30", "--force")
    run_convert(*flags)
    before = Path("c.pt").read_bytes()
    original = torch.save

    def half(content, file):
        original(content, file)
        file.truncate(1000)
        raise Killed

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(Killed):
        convert.main([*flags[:2], "--method=low_rank:rank=3", "--force", "--compress-threshold=30"])
    monkeypatch.setattr(torch, "save", original)
    assert Path("c.pt").read_bytes() == before
    (left,) = tmp_path.glob(".c.pt.*.tmp")
    left.rename(tmp_path / ".c.pt.999999999.tmp")  # of a process that is no more
    run_convert(*flags)
    assert not list(tmp_path.glob(".c.pt.*")) and Path("c.pt").read_bytes() == before


def test_budget(run_convert, trained):
    out, report = run_convert(f"--load-model={trained}", "--save-model=c.pt", "--method=low_rank", "--compress-to=2x", "--compress-threshold=10")
    totals = report["totals"]
    whole = 4 * sum(ROWS) * DIM
    assert 0.8 * whole / 2 < totals["bytes_after"] + totals["bytes_of_other_tables"] <= whole / 2
    assert "all tables: 5.54 kB -> " in out
