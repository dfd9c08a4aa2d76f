"""The command line is upstream's: names, kinds, defaults and choices against a snapshot of its parser, and what ours adds."""

import argparse
import json
from pathlib import Path

import pytest
from conftest import SMALL

from dlrm_xla import flags
from dlrm_xla.specs import UserError

SNAPSHOT = json.loads((Path(__file__).parent / "snapshots" / "upstream_flags.json").read_text())["flags"]
BY_NAME = {flag["name"]: flag for flag in SNAPSHOT}
SWITCHES = [flag["name"] for flag in SNAPSHOT if flag["kind"] in ("bool", "store_true")]
PORT = {"--use-tpu": False, "--tpu-cores": 0, "--drop-last": False, "--tpu-metrics-debug": False}
OURS = {
    "--sharding": "auto", "--rank-memory": "", "--plan-only": False, "--plan-ranks": 0, "--spmd": False, "--tpu_num_cores": 0,
    "--device": "auto", "--log-dir": "", "--config": "", "--save-every": 0, "--table-layout": "auto", "--compile-for": None, "--json": "",
    "--matmul-precision": "float32", "--compress": "", "--compress-threshold": 200, "--compress-config": "",
    "--compress-to": "", "--schema": "", "--preprocess-memory": "4GB", "--min-frequency": 0, "--vocabulary": "",
    "--multi-hot-sizes": "", "--multi-hot-distribution": "uniform", "--upstream-compat": False,
}  # fmt: skip
# one value of each kind that the flag's default is not, and what it is read as
OTHER_VALUE = {
    "int": ("7", 7), "float": ("0.25", 0.25), "str": ("other", "other"), "dash-separated ints": ("5-6-7", "5-6-7"),
    "dash-separated floats": ("0.5-2.0", "0.5-2.0"), "bool": ("True", True), "store_true": ("True", True),
}  # fmt: skip


def dest(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def groups() -> dict[str, dict[str, argparse.Action]]:
    """Options of each group by title."""
    return {
        group.title: {option: action for action in group._group_actions for option in action.option_strings}
        for group in flags.build_parser()._action_groups
        if group._group_actions
    }


def test_every_flag_is_upstreams_or_in_a_group_of_its_own():
    by_title = groups()
    upstream = {name for title, options in by_title.items() if title.endswith("(upstream)") for name in options}
    assert upstream == set(BY_NAME)
    assert set(by_title["from the 2020 TPU port"]) == set(PORT)
    assert set(by_title["of dlrm_xla"]) == set(OURS)
    others = [title for title in by_title if not title.endswith("(upstream)")]
    assert sorted(others) == ["from the 2020 TPU port", "of dlrm_xla", "options"]  # "options" holds --help


@pytest.mark.parametrize("flag", SNAPSHOT, ids=lambda flag: flag["name"])
def test_default_kind_and_choices_are_upstreams(flag):
    name, attribute = flag["name"], dest(flag["name"])
    value = getattr(flags.parse([]), attribute)
    assert value == flag["default"] and isinstance(value, type(flag["default"]))
    text, read = OTHER_VALUE[flag["kind"]]
    if flag["choices"]:
        assert [getattr(flags.parse([f"{name}={choice}"]), attribute) for choice in flag["choices"]] == flag["choices"]
        with pytest.raises(UserError, match="invalid choice: 'other'"):
            flags.parse([f"{name}=other"])
    else:
        for argv in ([f"{name}={text}"], [name, text]):
            value = getattr(flags.parse(argv), attribute)
            assert value == read and type(value) is type(read)
    if flag["kind"] not in ("str", "bool", "store_true"):
        for bad in ("x", "", "1.5.5"):
            with pytest.raises(UserError, match=name):
                flags.parse([f"{name}={bad}"])


def test_only_one_choice_is_wider_than_upstreams():
    actions = {option: action for options in groups().values() for option, action in options.items()}
    added = {name: set(actions[name].choices or ()) - set(flag["choices"] or ()) for name, flag in BY_NAME.items()}
    assert {name: more for name, more in added.items() if more} == {"--data-generation": {"synthetic"}}


def test_defaults_of_the_flags_that_upstream_lacks():
    args = flags.parse([])
    assert {name: getattr(args, dest(name)) for name in PORT | OURS} == PORT | OURS
    assert flags.parse(["--tpu-cores=8"]).tpu_cores == 8
    for bad in ("--sharding=columns", "--device=tpu", "--matmul-precision=float16"):
        with pytest.raises(UserError, match="invalid choice"):
            flags.parse([bad])


@pytest.mark.parametrize("name", [*SWITCHES, "--use-tpu", "--drop-last", "--tpu-metrics-debug", "--upstream-compat"])
def test_both_spellings_of_true_and_false(name):
    """type=bool takes a value and store_true takes none; here all flags take both, and False means False."""
    for argv in ([name], [f"{name}=True"], [name, "True"], [f"{name}=true"], [f"{name}=1"], [f"{name}=yes"], [name, "--nepochs=2"]):
        assert getattr(flags.parse(argv), dest(name)) is True, argv
    off = [[f"{name}={text}"] for text in ("False", "false", "0", "no", "")]
    for argv in (*off, [name, "False"], [name, f"{name}=False"]):
        assert getattr(flags.parse(argv), dest(name)) is False, argv
    with pytest.raises(UserError, match="neither True nor False"):
        flags.parse([f"{name}=maybe"])


def test_unique_beginnings_are_enough():
    args = flags.parse(["--arch-mlp-b=7-2", "--md-f", "--learning=0.5", "--dev", "cpu", "--loc=-1"])
    assert (args.arch_mlp_bot, args.md_flag, args.learning_rate, args.device) == ("7-2", True, 0.5, "cpu")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--arch-mlp=4-2"], "ambiguous option: --arch-mlp=4-2 could match --arch-mlp-bot, --arch-mlp-top"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--pred-threshold=0.4"], "unrecognized arguments"),
        (["stray"], "unrecognized arguments: stray"),
        (["--nepochs"], "argument --nepochs: expected one argument"),
        (["--nepochs=two"], "argument --nepochs: invalid int value: 'two'"),
        (["--learning-rate=fast"], "argument --learning-rate: invalid float value: 'fast'"),
        (["--arch-mlp-bot=4,2"], "argument --arch-mlp-bot: '4,2' is not a list of ints separated by dashes, as in 4-3-2"),
        (["--loss-weights=1-x"], "argument --loss-weights: '1-x' is not a list of floats separated by dashes"),
        (["--qr-flag", "stray"], "argument --qr-flag: 'stray' is neither True nor False"),
        (["--two\nlines"], "unrecognized arguments: --two\\nlines"),
    ],
)
def test_a_wrong_command_line_is_one_line(cli, tmp_path, argv, message):
    outcome = cli(*argv)
    assert message in outcome.error
    assert len(outcome.err.splitlines()) == 1 and outcome.out == ""
    assert not list(tmp_path.iterdir())


def test_help_names_every_flag_and_its_default(cli):
    outcome = cli("--help", device=None)
    assert outcome.code == 0 and outcome.err == ""
    entries = {entry.split()[0]: " ".join(entry.split()) for entry in outcome.out.split("\n  -")}
    for flag in SNAPSHOT:
        entry = entries[flag["name"].removeprefix("-")]
        if flag["default"] is not None and flag["default"] is not False and flag["default"] != "":
            assert f"(default {flag['default']})" in entry
    for action in flags.build_parser()._actions:
        assert action.help, action.option_strings
    assert max(map(len, outcome.out.splitlines())) <= 130


def test_upstream_values_come_in_upstreams_order_with_its_names():
    """What upstream's "command line args" line holds."""
    values = flags.upstream_values(flags.resolved(flags.parse(["--mini-batch-size=9", "--num-workers=2"])))
    assert list(values) == [dest(flag["name"]) for flag in SNAPSHOT]
    assert (values["test_mini_batch_size"], values["test_num_workers"]) == (9, 2)


def test_the_small_model_of_these_tests_runs_and_gives_upstreams_losses(cli):
    outcome = cli(*SMALL)
    assert outcome.code == 0
    assert outcome.losses[:2] + outcome.losses[-1:] == pytest.approx([1.233527, 1.331114, 0.912615], abs=1e-6)
