"""--config FILE, what a run writes of its configuration, and the rules between flags."""

import pytest
import yaml
from conftest import CRITEO_MODEL, SMALL

from dlrm_xla import flags
from dlrm_xla.config import Config
from dlrm_xla.specs import UserError

DATASET = ("--data-generation=dataset", "--raw-data-file=f")


def config_of(*argv: str) -> Config:
    return Config.from_args(flags.parse(list(argv)))


@pytest.fixture
def config_file(tmp_path):
    """config_file(text or bytes) -> its --config flag."""

    def write(text: str | bytes, name: str = "run.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return f"--config={path}"

    return write


# --config FILE


def test_names_with_dashes_or_underscores(config_file):
    args = flags.parse([config_file("mini-batch-size: 64\nlearning_rate: 0.5\nlocal_rank: 2\n")])
    assert (args.mini_batch_size, args.learning_rate, args.local_rank) == (64, 0.5, 2)
    assert flags.parse([config_file("local-rank: 3")]).local_rank == 3


def test_the_command_line_wins(config_file):
    flag = config_file("mini-batch-size: 64\nround-targets: true\nnepochs: 3\n")
    for argv in ([flag, "--mini-batch-size=8", "--round-targets=False"], ["--mini-batch-size", "8", "--round-targets=no", flag]):
        args = flags.parse(argv)
        assert (args.mini_batch_size, args.round_targets, args.nepochs) == (8, False, 3)


def test_the_file_may_be_named_in_every_way_that_argparse_takes(config_file):
    path = config_file("nepochs: 3").removeprefix("--config=")
    for argv in ([f"--config={path}"], ["--config", path], [f"--conf={path}"], ["--conf", path]):
        assert flags.parse(argv).nepochs == 3


@pytest.mark.parametrize(
    "text, name, value",
    [
        ("arch-mlp-bot: 2024-10-10", "arch_mlp_bot", "2024-10-10"),  # a date to most YAML readers
        ("arch-mlp-top: 1_000-1", "arch_mlp_top", "1_000-1"),
        ("arch-embedding-size: 4", "arch_embedding_size", "4"),
        ("learning-rate: 1e-3", "learning_rate", 1e-3),  # text to YAML 1.1
        ("learning-rate: .5", "learning_rate", 0.5),
        ("nepochs: 010", "nepochs", 10),  # octal to YAML 1.1
        ("data-size: 12:30", None, "invalid int value: '12:30'"),  # base 60 to YAML 1.1
        ("round-targets: yes", "round_targets", True),
        ("round-targets: on", "round_targets", True),
        ("round-targets: off", "round_targets", False),
        ("round-targets: No", "round_targets", False),
        ("sync-dense-params: 'false'", "sync_dense_params", False),
        ("weighted-pooling: null", "weighted_pooling", None),
        ("weighted-pooling: ~", "weighted_pooling", None),
        ("save-model: 'null'", "save_model", "null"),
        ("save-model: no", "save_model", "no"),  # False to YAML 1.1
        ("save-model: 'a: b # c'", "save_model", "a: b # c"),
        ("raw-data-file: день/данные.txt", "raw_data_file", "день/данные.txt"),
        ("raw-data-file: --data-size=3", "raw_data_file", "--data-size=3"),
        ("save-model: ''", "save_model", ""),
        ("weighted-pooling: &a fixed\ndata-randomize: *a", "data_randomize", "fixed"),
        ("# nothing else\nnepochs: 2  # twice", "nepochs", 2),
        ("{nepochs: 4}", "nepochs", 4),
    ],
)
def test_values_are_what_they_are_on_the_command_line(config_file, text, name, value):
    flag = config_file(text)
    if name is None:
        with pytest.raises(UserError, match=value):
            flags.parse([flag])
    else:
        assert getattr(flags.parse([flag]), name) == value


@pytest.mark.parametrize(
    "text, message",
    [
        ("mini-batch-sise: 3", "line 1: no flag is called 'mini-batch-sise'; do you mean mini-batch-size?"),
        ("nepochs: 1\nLearning-Rate: 3", "line 2: no flag is called 'Learning-Rate'; do you mean learning-rate?"),
        ("xyzzy: 3", "line 1: no flag is called 'xyzzy'"),
        ("config: other.yaml", "no flag is called 'config'"),
        ("help: true", "no flag is called 'help'"),
        ("h: true", "no flag is called 'h'"),
        ("? [a, b]\n: 3", "no flag is called a list"),
        ("<<: {nepochs: 2}", "no flag is called '<<'"),
        ("arch-mlp-bot: [4, 3, 2]", "arch-mlp-bot must be one value, as on the command line"),
        ("nepochs: 2\nmodel:\n  arch-mlp-bot: 4-3-2", "line 2: no flag is called 'model'"),
        ("nepochs:\n  value: 2", "nepochs must be one value"),
        ("nepochs: 2\nnepochs: 3", "line 2: nepochs is there twice"),
        ("local_rank: 2\nlocal-rank: 3", "line 2: local-rank is there twice"),
        ("nepochs: two", "argument --nepochs: invalid int value: 'two'"),
        ("nepochs:", "argument --nepochs: invalid int value: ''"),
        ("round-targets: maybe", "'maybe' is neither True nor False"),
        ("device: tpu", "argument --device: invalid choice: 'tpu'"),
        ("- nepochs: 2", "must be lines of the form `name: value`"),
        ("nepochs 2", "must be lines of the form `name: value`"),
        ("", "must be lines of the form `name: value`"),
        ("nepochs: [", "not YAML"),
        ("a: b: c", "not YAML"),
        ("\tnepochs: 2", "not YAML"),
        ("nepochs: 2\n---\nnepochs: 3", "not YAML"),
        ("nepochs: *a", "not YAML"),
        (b"nepochs: \x00", "not YAML"),
        ('save-model: "a\\0b"', "line 1: save-model holds a NUL character"),
        (b"\xff\xfenepochs", "cannot be read: not UTF-8 text"),
        (b"PK\x03\x04\x8f\x90", "cannot be read: not UTF-8 text"),
        ("[" * 5000, "not YAML"),
        ("!!python/object/apply:os.system ['echo run > pwned']", "must be lines of the form"),
        ("nepochs: !!python/object/apply:os.system ['echo run > pwned']", "nepochs must be one value"),
    ],
)
def test_a_wrong_file_is_one_line_with_its_name(cli, config_file, tmp_path, text, message):
    flag = config_file(text)
    error = cli(flag).error
    assert error.startswith(f"{flag}: ") and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_a_file_that_is_not_there_or_no_file(cli, tmp_path):
    assert cli("--config=none.yaml").error == "--config=none.yaml: cannot be read: No such file or directory"
    assert cli("--conf", "none.yaml").error == "--config=none.yaml: cannot be read: No such file or directory"
    assert cli(f"--config={tmp_path}").error.endswith("cannot be read: Is a directory")
    assert cli("--config=run_dlrm.yaml", "--config=b.yaml").error == "--config is given 2 times; one file is read, so put all flags into it"
    assert "argument --config: expected one argument" in cli("--config", device=None).error


def test_a_runs_config_gives_the_same_run_again(cli, tmp_path, criteo_file):
    """config.yaml of a run folder is a --config file; on Criteo-format data, with flags of every kind, and paths with blanks."""
    first = cli(
        *CRITEO_MODEL, f"--raw-data-file={criteo_file}", "--test-freq=5", "--log-dir=первый run", "--optimizer=adagrad", "--qr-flag",
        "--qr-threshold=9", "--save-model=a model.pt", "--print-time=False",
    )  # fmt: skip
    assert first.code == 0, first.err
    saved = tmp_path / "первый run" / "config.yaml"
    assert yaml.safe_load(saved.read_text(encoding="utf-8"))["qr-threshold"] == 9
    again = cli(f"--config={saved}", device=None)
    assert again.code == 0, again.err
    assert again.losses == first.losses and len(first.losses) == 10
    changed = cli(f"--config={saved}", "--learning-rate=0.01", "--log-dir=other", device=None)
    assert changed.losses[0] == first.losses[0] and changed.losses[1:] != first.losses[1:]
    every_flag = {name.replace("_", "-") for name in vars(flags.parse([]))} - {"config"}
    assert set(yaml.safe_load(saved.read_text(encoding="utf-8"))) == every_flag


def test_upstreams_losses_on_the_made_up_criteo_rows(cli, criteo_file):
    """The rows of conftest.py are those that upstream's run was recorded on (--data-randomize=none)."""
    outcome = cli(*CRITEO_MODEL, f"--raw-data-file={criteo_file}", "--data-randomize=none")
    assert outcome.losses[:2] + outcome.losses[-1:] == pytest.approx([0.965961, 0.761979, 0.670544], abs=1e-6)


# rules between flags

CONCAT = ("--arch-mlp-bot=5-16-16", "--qr-flag", "--qr-operation=concat", "--qr-threshold=2")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--arch-sparse-feature-size=4"], "--arch-sparse-feature-size=4 does not match the last layer 8 of --arch-mlp-bot"),
        ([*CONCAT[1:]], "--arch-sparse-feature-size=8 with --qr-operation=concat gives vectors of 16, but --arch-mlp-bot ends in 8"),
        (["--arch-mlp-bot=8"], "--arch-mlp-bot=8: needs an input and at least one layer"),
        (["--arch-mlp-bot=5-0-8"], "--arch-mlp-bot=5-0-8: every layer needs at least one unit"),
        (["--arch-mlp-bot=0-8"], "--arch-mlp-bot=0-8: every layer needs at least one unit"),
        (["--arch-mlp-top=0-1"], "--arch-mlp-top=0-1: every layer needs at least one unit"),
        (["--arch-mlp-top=16-8"], "--arch-mlp-top=16-8: must end in 1"),
        (["--arch-mlp-bot=5-9999999999999-8"], "a layer has at most 2147483647 units"),
        (["--arch-mlp-top=9999999999999-1"], "a layer has at most 2147483647 units"),
        (["--arch-embedding-size=50-0-3"], "--arch-embedding-size=50-0-3: every table needs at least one row"),
        (["--arch-embedding-size=50-2147483648"], "a table has at most 2147483647 rows"),
        (["--qr-flag", "--md-flag"], "--qr-flag and --md-flag"),
        (["--weighted-pooling=fixed", "--qr-flag"], "--weighted-pooling with --qr-flag"),
        (["--weighted-pooling=learned", "--md-flag"], "--weighted-pooling with --md-flag"),
        (["--loss-function=wbce", "--loss-weights=1.0"], "--loss-weights=1.0: wbce needs two"),
        (["--loss-function=wbce", "--loss-weights=1-2-3"], "wbce needs two"),
        (["--quantize-emb-with-bit=8"], "add --inference-only"),
        (["--quantize-mlp-with-bit=16"], "add --inference-only"),
        (["--quantize-emb-with-bit=4", "--inference-only", "--qr-flag"], "--quantize-emb-with-bit=4 with --qr-flag"),
        (["--quantize-emb-with-bit=4", "--inference-only", "--md-flag"], "--quantize-emb-with-bit=4 with --md-flag"),
        (["--quantize-mlp-with-bit=8", "--inference-only", "--use-gpu"], "quantized inference runs on the CPU only"),
        (["--quantize-mlp-with-bit=8", "--inference-only", "--use-tpu"], "quantized inference runs on the CPU only"),
        (["--quantize-mlp-with-bit=8", "--inference-only", "--save-onnx"], "--save-onnx writes the weights"),
        (["--data-generation=dataset"], "--data-generation=dataset needs --raw-data-file (Criteo text) or --processed-data-file"),
        (["--lr-num-warmup-steps=5", "--lr-decay-start-step=4"], "warm-up must end before the decay starts"),
        (["--mlperf-grad-accum-iter=2"], "works with --mlperf-logging only"),
        (["--mlperf-acc-threshold=0.5"], "works with --mlperf-logging only"),
        (["--mlperf-auc-threshold=0.5"], "works with --mlperf-logging only"),
        (["--rand-data-min=3", "--rand-data-max=2"], "--rand-data-min=3.0 is above --rand-data-max=2.0"),
        (["--mlperf-bin-loader"], "add --data-generation=dataset --data-set=terabyte"),
        (["--mlperf-bin-shuffle"], "--mlperf-bin-shuffle: is for --mlperf-bin-loader; add it"),
        (["--schema=s.yaml"], "--schema=s.yaml: is for files; add --data-generation=dataset"),
        (["--min-frequency=2"], "--min-frequency=2: is for files; add --data-generation=dataset"),
        (["--vocabulary=v"], "--vocabulary=v: is for files; add --data-generation=dataset"),
        (["--multi-hot-sizes=mlperf"], "--multi-hot-sizes: makes bags from Criteo's single ids"),
        ([*DATASET, "--schema=s.yaml"], "--schema=s.yaml: describes a table"),
        ([*DATASET, "--data-set=table"], "--data-set=table needs --schema=FILE"),
        ([*DATASET, "--data-set=table", "--schema=s", "--multi-hot-sizes=1"], "--multi-hot-sizes: makes bags from Criteo's single ids"),
        ([*DATASET, "--data-set=table", "--schema=s", "--data-sub-sample-rate=0.5"], "--data-sub-sample-rate=0.5: is for Criteo's data sets"),
        ([*DATASET, "--multi-hot-sizes=3,0,1"], "--multi-hot-sizes=3,0,1: must be a size from 1 for each table"),
        ([*DATASET, "--multi-hot-sizes=3,,1"], "must be a size from 1 for each table"),
        ([*DATASET, "--multi-hot-sizes=a"], "separated by commas, or mlperf"),
        ([*DATASET, "--mlperf-bin-loader"], "reads the binary files of the Terabyte set"),
        ([*DATASET, "--min-frequency=2", "--vocabulary=v"], "leave one of them out"),
        (["--save-every=3"], "--save-every=3 needs --save-model=FILE"),
        (["--save-every=3", "--save-model=m.pt", "--inference-only"], "--save-every has nothing to save with --inference-only"),
        (["--use-gpu", "--use-tpu"], "the flags ask for two devices, cuda and xla"),
        (["--device=cpu", "--use-gpu"], "the flags ask for two devices, cpu and cuda"),
        (["--device=cpu", "--use-tpu"], "the flags ask for two devices, cpu and xla"),
        (["--device=cuda", "--use-tpu"], "the flags ask for two devices, cuda and xla"),
    ],
)
def test_flags_that_do_not_go_together(argv, message):
    with pytest.raises(UserError) as error:
        config_of(*SMALL, *argv)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, num_bytes",
    [("4GB", 4 * 10**9), ("512MB", 512 * 10**6), ("2GiB", 2 * 2**30), ("1.5 g", 1_500_000_000), ("2e9", 2 * 10**9), ("0", 0), ("7kib", 7 * 1024)],
)
def test_sizes_as_people_write_them(text, num_bytes):
    assert config_of(*SMALL, f"--preprocess-memory={text}").data.preprocess_bytes == num_bytes


def test_multi_hot_sizes_by_commas_dashes_or_name():
    assert config_of(*SMALL, *DATASET, "--multi-hot-sizes=3,2,1").data.multi_hot_sizes == (3, 2, 1)
    assert config_of(*SMALL, *DATASET, "--multi-hot-sizes=3-2-1").data.multi_hot_sizes == (3, 2, 1)
    sizes = config_of(*SMALL, *DATASET, "--multi-hot-sizes=mlperf").data.multi_hot_sizes
    assert len(sizes) == 26 and sum(sizes) == 214 and max(sizes) == 100
    assert config_of(*SMALL).data.multi_hot_sizes == ()


@pytest.mark.parametrize(
    "flag, reason",
    [
        ("--activation-function=gelu", "always relu"),
        ("--optimizer=adam", "changes every row of every table in every step"),
        ("--optimizer=momentum", "use sgd, adagrad or rwsadagrad"),
        ("--data-generation=internal", "a library that Meta has not published"),
        ("--plot-compute-graph", "--save-onnx writes the graph"),
        ("--dist-backend=mpi", "connects ranks by gloo (CPU) or nccl (CUDA)"),
        ("--sync-dense-params=False", "the MLPs of the ranks would train apart"),
    ],
)
def test_a_flag_that_cannot_be_honoured_is_refused_with_the_reason(flag, reason):
    with pytest.raises(UserError) as error:
        config_of(*SMALL, flag)
    assert str(error.value).startswith(flag) and reason in str(error.value)


CHOICES = {
    "loss-function": "hinge", "optimizer": "ftrl", "qr-operation": "sub", "rand-data-dist": "zipf", "data-randomize": "week",
    "data-set": "avazu", "multi-hot-distribution": "normal", "quantize-mlp-with-bit": "4", "quantize-emb-with-bit": "16",
}  # fmt: skip


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", [None, "", "MSE"])
def test_an_unknown_choice_names_the_known_ones(name, value):
    value = CHOICES[name] if value is None else value
    with pytest.raises(UserError, match=f"--{name}") as error:
        config_of(*SMALL, f"--{name}={value}")
    assert any(words in str(error.value) for words in ("must be one of", "invalid int value", "invalid choice"))


LEAST = {
    "mini-batch-size": 1, "data-size": 1, "nepochs": 0, "print-freq": 1, "num-indices-per-lookup": 1, "num-workers": 0, "num-batches": 0,
    "qr-collisions": 1, "lr-num-warmup-steps": 0, "lr-decay-start-step": 0, "lr-num-decay-steps": 0, "save-every": 0,
    "min-frequency": 0, "arch-sparse-feature-size": 1, "print-precision": 0, "numpy-rand-seed": 0, "test-num-workers": -1,
    "mlperf-grad-accum-iter": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_whole_numbers_have_a_least_and_a_largest_value(name):
    for value in (LEAST[name] - 1, -(10**30), 10**30):
        with pytest.raises(UserError, match=f"^--{name}={value}: must be"):
            config_of(*SMALL, *DATASET, "--mlperf-logging", "--save-model=m.pt", f"--{name}={value}")


@pytest.mark.parametrize("name", ["learning-rate", "rand-data-min", "rand-data-max", "rand-data-mu", "rand-data-sigma", "md-temperature",
                                  "loss-threshold", "mlperf-acc-threshold", "mlperf-auc-threshold", "data-sub-sample-rate"])  # fmt: skip
@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "1e39", "1e400"])
def test_numbers_are_finite(name, value):
    with pytest.raises(UserError, match=f"^--{name}=.*: must be"):
        config_of(*SMALL, "--mlperf-logging", f"--{name}={value}")


@pytest.mark.parametrize(
    "flag, message",
    [
        ("--learning-rate=-0.1", "must not be negative"),
        ("--data-sub-sample-rate=1", "must be at least 0 and below 1"),
        ("--data-sub-sample-rate=-0.1", "must be at least 0 and below 1"),
        ("--max-ind-range=0", "must be -1 (no folding) or at least 1"),
        ("--max-ind-range=4294967297", "ids have 32 bits"),
        ("--max-ind-range=-7", "must be -1 (no folding) or at least 1"),
        ("--test-mini-batch-size=0", "must be -1 (as --mini-batch-size) or at least 1"),
        ("--test-mini-batch-size=-2", "must be -1 (as --mini-batch-size) or at least 1"),
        ("--test-mini-batch-size=2147483648", "must be at most 2147483647"),
        ("--rand-data-sigma=-1", "must not be negative"),
        ("--rand-data-min=-1", "ids start at 0"),
        ("--rand-data-max=1e12", "ids are at most 2147483647"),
        ("--md-temperature=-0.5", "must be from 0 (equal dimensions) to 4"),
        ("--md-temperature=40", "must be from 0 (equal dimensions) to 4"),
        ("--numpy-rand-seed=4294967296", "must be below 2^32"),
        ("--loss-weights=nan-1", "must be finite numbers"),
        ("--preprocess-memory=", "must be a size, as 4GB, 512MB or 2GiB"),
        ("--preprocess-memory=-1GB", "must be a size"),
        *((f"--preprocess-memory={text}", "must be a size") for text in ("4 gigs", "GB", "4XB", "four", "4GB2", "inf", "i", "4ib", "1e999")),
        ("--loss-weights=1e39-1", "must be finite numbers"),
    ],
)
def test_numbers_out_of_range(flag, message):
    with pytest.raises(UserError) as error:
        config_of(*SMALL, flag)
    assert str(error.value).startswith(flag.split("=")[0]) and message in str(error.value)


def test_a_batch_that_no_machine_holds():
    with pytest.raises(UserError, match="one batch would hold"):
        config_of(*SMALL, "--mini-batch-size=2147483647", "--num-indices-per-lookup=2147483647", "--num-indices-per-lookup-fixed")


def test_everything_that_is_asked_for_is_in_the_config():
    config = config_of(*SMALL, "--use-tpu", "--weighted-pooling=anything", "--log-dir=a", "--tensor-board-filename=b")
    assert config.device == "xla" and config.model.weighted_pooling == "learned" and config.data.test_batch_size == 32
    assert (config.output.run_dir, config.output.tensorboard_dir) == ("a", "b")
    assert config_of(*SMALL, "--log-dir=a").output.tensorboard_dir == "a"
    assert config_of(*SMALL, "--tensor-board-filename=b").output.run_dir == "b"
    dataset = config_of(*CRITEO_MODEL, "--raw-data-file=x", "--arch-mlp-bot=5-16")
    assert dataset.model.bottom_layers == (13, 16) and dataset.data.table_rows == ()
    assert config_of(*SMALL, "--num-workers=3").data.test_num_workers == 3
    assert config_of(*SMALL, "--num-workers=3", "--test-num-workers=0").data.test_num_workers == 0
    assert config.to_json()["data"]["table_rows"] == (50, 20, 100, 3)
