"""The bar of several ranks, by real processes over gloo: 1, 2, 3 and 4 of them give the same losses in each of 50 steps."""

import json

import pytest
from conftest import ROOT
from jobs import Job
from rank_steps import CASES

STEPS = 50


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """By the number of ranks: case -> losses of every step."""
    found, folder = {}, tmp_path_factory.mktemp("gloo")
    for world in (1, 2, 3, 4):
        out = folder / f"losses{world}.json"
        ended = Job(folder, world, [str(ROOT / "tests" / "rank_steps.py"), str(out), str(STEPS)]).ended()
        assert ended.codes == [0] * world, ended.err
        found[world] = json.loads(out.read_text())
    return found


@pytest.mark.parametrize("case", [" ".join(map(str, case)) for case in CASES])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_losses_are_those_of_one_rank(losses, world, case):
    assert len(losses[world][case]) == STEPS and losses[1][case][0] != losses[1][case][-1]
    assert losses[world][case] == pytest.approx(losses[1][case], rel=0, abs=1e-6)
