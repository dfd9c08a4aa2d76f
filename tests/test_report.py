"""python -m compression report: the figures beside NumPy's, what the errors say, and that the pictures are pictures."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from test_methods import counts_of

from compression import report
from compression.against_optimal import known_spectrum
from compression.choose import parse_asked
from compression.registry import METHODS, num_bytes
from compression.report_plots import LINES, of_lines
from compression.report_text import holding, markdown
from compression.svd import oversampling_of
from dlrm_xla.specs import TableSpec

ROWS = (300, 20, 100, 3)
MODEL = [*SMALL, f"--arch-embedding-size={'-'.join(map(str, ROWS))}"]
DRAWN = ("error_against_rank.png", "error_against_rank_trained.png", "error_against_bytes.png", "spectrum.png", "time_against_rows.png")
DIM, KNOWN_ROWS, KNOWN_DIM = 8, 500, 16


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint of a few steps."""
    import run_dlrm

    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run_dlrm.main([*MODEL, "--save-model=m.pt", "--save-every=12", "--device=cpu"]) == 0
    return folder / "m.pt"


@pytest.fixture(scope="module")
def made(trained, tmp_path_factory):
    """(folder, report.json) of a report over tables 0 and 2, with counts that are made up: random data has none."""
    out = tmp_path_factory.mktemp("report") / "made"
    flags = [f"--load-model={trained}", "--tables=2,0", "--ranks=1,2,4", f"--rows={KNOWN_ROWS}", f"--dim={KNOWN_DIM}", f"--out={out}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "training_counts", lambda loaded, given, specs, why: [counts_of(rows) for rows in ROWS])
        assert report.main([*flags, "--raw-data-file=made-up"]) == 0
    return out, json.loads((out / "report.json").read_text())


@pytest.fixture
def run(capsys, tmp_path):
    """run(*flags, code=0) -> stdout, or the error's line."""

    def run(*flags, code=0) -> str:
        capsys.readouterr()
        flags = [str(flag) for flag in flags]
        out = [] if any(flag.startswith("--out") for flag in flags) else [f"--out={tmp_path / 'out'}"]
        assert report.main([*flags, *out]) == code
        captured = capsys.readouterr()
        if code == 0:
            return captured.out
        assert captured.err.startswith("error: ") and captured.err.count("\n") == 1, captured.err
        return captured.err.removeprefix("error: ").rstrip("\n")

    return run


def weight_of(path, table: str) -> np.ndarray:
    return torch.load(path, weights_only=True)["state_dict"][f"{table}.weight"].numpy()


def scaled(values: np.ndarray, rank: int) -> float:
    return math.sqrt((values[rank:] ** 2).sum() / (values**2).sum())


def test_known_spectra_are_as_the_formulas_say(made):
    content = made[1]
    assert [one["spectrum"] for one in content["known"]] == [name for name, *_ in report.KNOWN]
    for one, (_, kind, parameter) in zip(content["known"], report.KNOWN, strict=True):
        values = known_spectrum(kind, parameter, KNOWN_DIM)
        assert {row["power"] for row in one["results"]} == {0, 1, 2}
        for row in one["results"]:
            rank, p = row["rank"], oversampling_of(row["rank"])
            optimal = scaled(values, rank)
            assert row["optimal"] == pytest.approx(optimal, rel=1e-5)
            assert row["bound"] == pytest.approx(optimal * (math.sqrt(1 + rank / (p - 1)) if rank + p < KNOWN_DIM else 1), rel=1e-5)
            assert optimal * (1 - 1e-5) <= row["relative_error"]
            assert row["ratio"] == pytest.approx(row["relative_error"] / optimal, rel=1e-5)
            assert row["bound_slack"] == pytest.approx(row["bound"] / row["relative_error"], rel=1e-5)


def test_trained_tables_are_as_numpy_says(made, trained):
    tables = made[1]["tables"]
    assert [table["table"] for table in tables] == ["emb_l.0", "emb_l.2"]  # the largest first
    for table in tables:
        weight, counts = weight_of(trained, table["table"]).astype(np.float64), counts_of(table["rows"])
        spectra = {"": weight, "_weighted": np.sqrt(counts)[:, None] * weight}
        for suffix, matrix in spectra.items():
            values = np.linalg.svd(matrix, compute_uv=False)
            np.testing.assert_allclose(table["spectrum" + suffix], values / np.linalg.norm(values), atol=1e-6)
            for row in table["results"]:
                if row["method"] in ("svd", "rsvd", "random_projection"):
                    optimal = scaled(values, row["knobs"]["rank"])
                    assert row["optimal" + suffix] == pytest.approx(optimal, rel=1e-4, abs=1e-6)
                    assert row["relative_error" + suffix] >= optimal * (1 - 1e-4)
                    if row["method"] == "svd" and row["knobs"]["weighted"] == bool(suffix):
                        assert row["ratio" + suffix] == pytest.approx(1, rel=1e-4)
        assert table["lookups"] == counts.sum() and table["never_looked_up"] == (counts == 0).mean()


def test_every_method_is_there_with_honest_bytes(made):
    for table in made[1]["tables"]:
        spec = TableSpec(table["table"], table["rows"], DIM)
        assert {row["method"] for row in table["results"]} == {"svd", "rsvd", "random_projection", "tt_svd", "hash", "pq", "int4", "int8"}
        for row in table["results"]:
            assert row["bytes"] == num_bytes(spec, parse_asked(row["typed"]).choice()) < table["bytes"] == 4 * table["rows"] * DIM
            assert row["compression"] == table["bytes"] / row["bytes"]


def test_brackets_optima_and_bounds_hold(made):
    seen = set()
    for row in (row for table in made[1]["tables"] for row in table["results"]):
        error = row["relative_error"]
        if row["method"] == "tt_svd":
            seen.add("bracket")
            assert row["lower"] - 1e-6 <= error <= row["upper"] + 1e-6
        if row["method"] == "pq" and "optimal" in row:
            seen.add("codebook")
            assert row["optimal"] <= error * (1 + 1e-6)
        if row["method"] == "pq" and "optimal_weighted" in row:
            seen.add("weighted codebook")
            assert row["knobs"]["weighted"] and row["optimal_weighted"] <= row["relative_error_weighted"] * (1 + 1e-6)
        if row["method"].startswith("int") and "bound" in row:
            seen.add("half a step")
            assert error <= row["bound"]
        if "expected" in row:
            seen.add("expected")
            assert row["expected"] == math.sqrt(1 - row["knobs"]["rank"] / DIM)
    assert seen == {"bracket", "codebook", "weighted codebook", "half a step", "expected"}


def test_pictures_are_pictures(made):
    out = made[0]
    assert {path.name for path in out.iterdir()} == {*report.RESULTS, *report.PICTURES}
    for name in report.PICTURES:
        data = (out / name).read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n") and data.endswith(b"IEND\xaeB`\x82")
        assert 5_000 < len(data) < 150_000


def test_the_text_has_a_line_for_each_figure(made):
    text = (made[0] / "report.md").read_text()
    for table in made[1]["tables"]:
        assert f"### {table['table']}: {table['rows']} x {DIM}" in text
        for row in table["results"]:
            assert f"| {row['typed']} |" in text
    assert text == markdown(made[1], [name for name in DRAWN if name in text])
    rows = [line for line in text.splitlines() if line.startswith("| tt_svd")]
    assert rows and all("[" in line for line in rows)


def test_lines_of_the_picture(made):
    """Below, the variant that minimizes the weighted error stands for its method; each line rises in bytes."""
    results = made[1]["tables"][0]["results"]
    assert set(of_lines(results, "")) == set(of_lines(results, "_weighted")) == set(LINES)
    for suffix in ("", "_weighted"):
        for label, rows in of_lines(results, suffix).items():
            sizes = [row["bytes"] for row in rows]
            assert sizes == sorted(set(sizes)), label
            can = METHODS[rows[0]["method"]].weighted and label not in ("int4", "int8")
            assert all(bool(row["knobs"].get("weighted")) == (can and bool(suffix)) for row in rows if can)


def test_same_seed_same_figures_whatever_else_is_made(made, trained, run, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "training_counts", lambda loaded, given, specs, why: [counts_of(rows) for rows in ROWS])
    flags = [f"--load-model={trained}", "--ranks=2", f"--rows={KNOWN_ROWS}", f"--dim={KNOWN_DIM}", "--no-times", "--raw-data-file=made-up"]
    run(*flags, "--tables=2", f"--out={tmp_path / 'one'}")
    found = json.loads((tmp_path / "one" / "report.json").read_text())
    before = {row["typed"]: row for row in made[1]["tables"][1]["results"]}
    assert found["times"] == [] and not (tmp_path / "one" / "time_against_rows.png").exists()
    assert found["tables"][0]["results"] == [before[row["typed"]] for row in found["tables"][0]["results"]]


def test_without_a_model_and_over_another_report(run, tmp_path):
    out, flags = tmp_path / "new" / "out", ("--rows=100", "--dim=4", "--no-times")
    printed = run(*flags, f"--out={out}")
    assert printed == f"written to {out}: report.md, report.json, error_against_rank.png\n"
    content = json.loads((out / "report.json").read_text())
    assert content["tables"] == [] and {row["rank"] for row in content["known"][0]["results"]} == {1, 2, 3}
    (out / "spectrum.png").write_bytes(b"of a report before")
    assert run(*flags, f"--out={out}", code=2) == f"--out={out}: holds a report (report.md); name another folder, or add --force"
    first = (out / "report.json").read_bytes()
    run(*flags, f"--out={out}", "--force")
    assert (out / "report.json").read_bytes() == first
    assert {path.name for path in out.iterdir()} == {*report.RESULTS, "error_against_rank.png"}


def test_without_counts(trained, tmp_path, capsys):
    """Random data names no data set; --no-counts asks for none."""
    flags = (f"--load-model={trained}", "--ranks=1", "--rows=50", "--dim=4", "--no-times", f"--out={tmp_path}")
    capsys.readouterr()
    assert report.main([*flags, "--compress-threshold=99"]) == 0
    assert "names no data set, so nothing is weighted" in capsys.readouterr().err
    (table, other) = json.loads((tmp_path / "report.json").read_text())["tables"]
    assert (table["table"], other["table"]) == ("emb_l.0", "emb_l.2")
    assert "spectrum_weighted" not in table and not any("weighted" in row["typed"] for row in table["results"])
    assert report.main([*flags, "--tables=3", "--no-counts", "--force"]) == 0
    assert capsys.readouterr().err == ""
    assert [table["table"] for table in json.loads((tmp_path / "report.json").read_text())["tables"]] == ["emb_l.3"]


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--dim=1"], "--dim=1: must be at least 2"),
        (["--rows=10"], "--rows=10: must be at least 64 (--dim)"),
        (["--rows=many"], "argument --rows: invalid int value: 'many'"),
        (["--ranks=0"], "--ranks=0: must be whole numbers of at least 1"),
        (["--ranks=1,x"], "--ranks=1,x: must be whole numbers of at least 1"),
        (["--ranks=64,99"], "--ranks=64,99: none is below --dim=64"),
        (["--tables=1"], "--tables: says something of trained tables only; give --load-model too"),
        (["--raw-data-file=x"], "--raw-data-file: says something of trained tables only; give --load-model too"),
        (["--numpy-rand-seed=-1"], "--numpy-rand-seed=-1: must be at least 0"),
        (["--load-model=missing.pt"], "missing.pt"),
        (["--load-model=x", "--no-counts", "--raw-data-file=x"], "--no-counts: reads no data"),
        (["--ranking=1"], "unrecognized argument --ranking (python -m compression report --help lists them)"),
        (["--out"], "argument --out: expected one argument"),
    ],
)
def test_bad_flags(run, flags, says):
    assert says in run(*flags, code=2)


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--tables=9"], "--tables=9: the checkpoint has tables 0 to 3"),
        (["--compress-threshold=5000"], "--compress-threshold=5000: the largest table has 300 rows"),
        (["--compress-threshold=-1"], "--compress-threshold=-1: must be at least 0"),
        ([f"--out={ROOT / 'README.md'}"], "is no folder; choose another --out"),
    ],
)
def test_bad_flags_of_a_model(run, trained, flags, says):
    assert says in run(f"--load-model={trained}", *flags, code=2)


def test_a_table_that_is_not_finite(run, trained, tmp_path):
    content = torch.load(trained, weights_only=True)
    content["state_dict"]["emb_l.0.weight"][3, 1] = math.nan
    torch.save(content, tmp_path / "bad.pt")
    said = run(f"--load-model={tmp_path / 'bad.pt'}", "--tables=0", "--no-counts", "--rows=50", "--dim=4", "--no-times", code=2)
    assert said.startswith("table emb_l.0: some of its numbers are not finite")


def test_rank_that_holds_a_share():
    assert [holding([0.8, 0.6], share) for share in (0.5, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]
    assert holding([1.0, 0.0, 0.0], 0.9) == 1
