"""--enable-profiling: upstream's three files, whole, with the operators of the run."""

import json
import os
import re
from pathlib import Path

import pytest

from dlrm_xla import profile
from dlrm_xla.specs import UserError
from tests.conftest import SMALL

SHORT = (*SMALL, "--num-batches=2")
NAME = r"dlrm_s_pytorch\d{4}-\d\d-\d\d_\d\d:\d\d:\d\d\.\d{6}"


def files(folder: Path) -> dict[str, str]:
    """What follows the common name -> text, of the only three files."""
    found = [path for path in folder.iterdir() if path.name.lstrip(".").startswith("dlrm_s_pytorch")]
    stems = {re.fullmatch(f"({NAME})(_shape.prof|_total.prof|.json)", path.name).group(1) for path in found}
    assert len(found) == 3 and len(stems) == 1
    return {path.name.removeprefix(*stems): path.read_text() for path in found}


def calls(table: str, operator: str) -> list[int]:
    """The column "# of Calls" of an operator's rows."""
    lines = [line for line in table.splitlines() if line.strip()]
    header = next(line for line in lines if "# of Calls" in line)
    column = re.split(r"\s{2,}", header.strip()).index("# of Calls")
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if line.split()[0] == operator]
    return [int(row[column]) for row in rows]


@pytest.mark.parametrize("flags, passes", [((), 2), (("--inference-only",), 2), (("--test-freq=1",), 6)])
def test_three_files(cli, tmp_path, flags, passes):
    outcome = cli(*SHORT, "--enable-profiling", *flags)
    assert outcome.code == 0, outcome.err
    by_suffix = files(tmp_path)
    # five linear layers in every forward pass: 2 batches, and 2 for each test
    assert calls(by_suffix["_total.prof"], "aten::addmm") == [5 * passes]
    by_shape = calls(by_suffix["_shape.prof"], "aten::addmm")
    assert sorted(by_shape) == [passes] * 3 + [2 * passes]  # two of the five are of 16 numbers to 8
    assert "[32, 5]" in by_suffix["_shape.prof"]
    events = json.loads(by_suffix[".json"])["traceEvents"]
    assert sum(event.get("name") == "aten::addmm" for event in events) == 5 * passes


def test_changes_no_number(cli):
    assert cli(*SHORT, "--enable-profiling").losses == cli(*SHORT).losses


def test_nothing_without_the_flag(cli, tmp_path):
    assert cli(*SHORT).code == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("dlrm_s_pytorch")]


def test_xla_says_that_it_shows_the_host(cli, tmp_path):
    pytest.importorskip("torch_xla")
    outcome = cli(*SHORT, "--enable-profiling", "--mini-batch-size=8", device="xla")
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if line.startswith("profiling:")] == [
        "profiling: the files will show what the host does; XLA's own work on the device is not in them"
    ]
    assert len(files(tmp_path)) == 3


def test_a_long_run_draws_a_warning(tmp_path):
    notes = []
    with profile.profiled(True, "cpu", 1_000_000, tmp_path, notes.append):
        pass
    assert "1,000,000 batches" in notes[0] and "4492 GiB" in notes[0] and "--num-batches" in notes[0]


def test_a_full_disk_leaves_no_part_of_a_file(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(profile.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"), profile.profiled(True, "cpu", 1, tmp_path, str):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(profile.os, "access", lambda *arguments: False)
    with pytest.raises(UserError, match="no permission"), profile.profiled(True, "cpu", 1, tmp_path, str):
        pytest.fail("the block ran")


def test_a_run_that_fails_keeps_its_own_error(tmp_path):
    with pytest.raises(UserError, match="^of the run$"), profile.profiled(True, "cpu", 1, tmp_path, str):
        raise UserError("of the run")
    assert list(tmp_path.iterdir()) == []


def test_says_nothing_about_the_library(cli_process):
    outcome = cli_process(*SHORT, "--enable-profiling", before="import warnings; warnings.simplefilter('always')")
    assert outcome.code == 0
    assert "arning" not in outcome.err and "ERROR" not in outcome.err
