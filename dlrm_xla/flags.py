"""The command line: every flag of upstream's dlrm_s_pytorch.py with its name, default and choices, the TPU port's, and ours in groups of their own.

Differs from upstream: a true-or-false flag may be given bare or with a value (`--round-targets`, `--round-targets=True`), and `=False` means
False; `--data-generation=synthetic` (trace files), which upstream implements and refuses, is accepted; an error is one line.
"""

import argparse
import difflib
from pathlib import Path

import yaml

from dlrm_xla.specs import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python run_dlrm.py --help lists the flags)")


def parse_bool(text: str) -> bool:
    """"True", "yes", "1" or "False", "no", "0", "" in any case."""
    word = text.strip().lower()
    if word in ("true", "yes", "1", "on"):
        return True
    if word in ("false", "no", "0", "off", ""):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither True nor False")


def dash_separated(kind: type):
    def check(text: str) -> str:
        try:
            [kind(part) for part in text.split("-")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of {kind.__name__}s separated by dashes, as in 4-3-2") from None
        return text

    return check


def build_parser() -> Parser:
    parser = Parser(prog="run_dlrm.py", description="Train and test DLRM on CPU, CUDA or XLA with the flags of facebookresearch/dlrm.")

    def switch(group, name, default=False, text=""):
        group.add_argument(name, nargs="?", const=True, default=default, type=parse_bool, metavar="True|False", help=text)

    ints, floats = dash_separated(int), dash_separated(float)
    model = parser.add_argument_group("model (upstream)")
    model.add_argument("--arch-sparse-feature-size", type=int, default=2, help="embedding dimension")
    model.add_argument("--arch-embedding-size", type=ints, default="4-3-2", help="rows of each table (random data)")
    model.add_argument("--arch-mlp-bot", type=ints, default="4-3-2", help="bottom MLP; the first number is overwritten by a data set's")
    model.add_argument("--arch-mlp-top", type=ints, default="4-2-1", help="top MLP; the interaction's size is put before it")
    model.add_argument("--arch-interaction-op", type=str, choices=["dot", "cat"], default="dot")
    switch(model, "--arch-interaction-itself", text="with dot: keep the products of a feature with itself")
    model.add_argument("--weighted-pooling", type=str, default=None, help='"fixed": weights of one; "learned": a trained weight for each id')
    tables = parser.add_argument_group("embedding tables (upstream)")
    switch(tables, "--md-flag", text="mixed dimensions (Ginart et al., arXiv:1909.11810)")
    tables.add_argument("--md-threshold", type=int, default=200, help="for tables with more rows than this")
    tables.add_argument("--md-temperature", type=float, default=0.3)
    switch(tables, "--md-round-dims", text="round the dimensions to powers of two")
    switch(tables, "--qr-flag", text="quotient and remainder tables (Shi et al., arXiv:1909.02107)")
    tables.add_argument("--qr-threshold", type=int, default=200, help="for tables with more rows than this")
    tables.add_argument("--qr-operation", type=str, default="mult", help="mult, add or concat")
    tables.add_argument("--qr-collisions", type=int, default=4, help="rows of the remainder table")
    loss = parser.add_argument_group("activations and loss (upstream)")
    loss.add_argument("--activation-function", type=str, default="relu")
    loss.add_argument("--loss-function", type=str, default="mse", help="mse, bce or wbce")
    loss.add_argument("--loss-weights", type=floats, default="1.0-1.0", help="wbce: weight of label 0 and of label 1")
    loss.add_argument("--loss-threshold", type=float, default=0.0, help="clamp predictions to [t, 1 - t]")
    switch(loss, "--round-targets", text="round random targets to 0 or 1")
    data = parser.add_argument_group("data (upstream)")
    data.add_argument("--data-size", type=int, default=1, help="rows of random data")
    data.add_argument("--num-batches", type=int, default=0, help="batches in an epoch, of training and of test; 0: all")
    data.add_argument("--data-generation", type=str, choices=["random", "dataset", "internal", "synthetic"], default="random")
    data.add_argument("--rand-data-dist", type=str, default="uniform", help="uniform or gaussian")
    data.add_argument("--rand-data-min", type=float, default=0)
    data.add_argument("--rand-data-max", type=float, default=1)
    data.add_argument("--rand-data-mu", type=float, default=-1, help="-1: the middle of min and max")
    data.add_argument("--rand-data-sigma", type=float, default=1)
    data.add_argument("--data-trace-file", type=str, default="./input/dist_emb_j.log", help="synthetic: j stands for the table's number")
    data.add_argument("--data-set", type=str, default="kaggle", help="kaggle")
    data.add_argument("--raw-data-file", type=str, default="", help="Criteo text, plain or gzip")
    data.add_argument("--processed-data-file", type=str, default="", help="arrays made from it; read where it exists, else written")
    data.add_argument("--data-randomize", type=str, default="total", help="total, day or none")
    switch(data, "--data-trace-enable-padding")
    data.add_argument("--max-ind-range", type=int, default=-1, help="fold ids modulo this")
    data.add_argument("--data-sub-sample-rate", type=float, default=0.0, help="leave out rows of label 0 with this probability")
    data.add_argument("--num-indices-per-lookup", type=int, default=10, help="ids in a random bag, at most")
    switch(data, "--num-indices-per-lookup-fixed", text="exactly that many")
    data.add_argument("--num-workers", type=int, default=0, help="batches read ahead: 2 for each")
    switch(data, "--memory-map")
    train = parser.add_argument_group("training (upstream)")
    train.add_argument("--mini-batch-size", type=int, default=1)
    train.add_argument("--nepochs", type=int, default=1)
    train.add_argument("--learning-rate", type=float, default=0.01)
    train.add_argument("--print-precision", type=int, default=5)
    train.add_argument("--numpy-rand-seed", type=int, default=123)
    switch(train, "--sync-dense-params", default=True)
    train.add_argument("--optimizer", type=str, default="sgd", help="sgd, adagrad or rwsadagrad (row-wise)")
    switch(train, "--dataset-multiprocessing", text="preprocessing uses all cores with or without it")
    switch(train, "--inference-only")
    quantize = parser.add_argument_group("quantized inference (upstream)")
    quantize.add_argument("--quantize-mlp-with-bit", type=int, default=32, help="8, 16 or 32")
    quantize.add_argument("--quantize-emb-with-bit", type=int, default=32, help="4, 8 or 32")
    output = parser.add_argument_group("devices and output (upstream)")
    switch(output, "--save-onnx", text="write dlrm_s_pytorch.onnx and check it")
    switch(output, "--use-gpu", text="the same as --device=cuda")
    output.add_argument("--local_rank", type=int, default=-1)
    output.add_argument("--dist-backend", type=str, default="")
    output.add_argument("--print-freq", type=int, default=1, help="batches between two lines of the log")
    output.add_argument("--test-freq", type=int, default=-1, help="batches between two tests; 0 or less: none")
    output.add_argument("--test-mini-batch-size", type=int, default=-1, help="-1: --mini-batch-size")
    output.add_argument("--test-num-workers", type=int, default=-1, help="-1: --num-workers")
    switch(output, "--print-time")
    switch(output, "--print-wall-time")
    switch(output, "--debug-mode", text="print the model, the data and the parameters")
    switch(output, "--enable-profiling", text="write dlrm_s_pytorch<time>{_shape.prof,_total.prof,.json}")
    switch(output, "--plot-compute-graph")
    output.add_argument("--tensor-board-filename", type=str, default="run_kaggle_pt", help="folder for TensorBoard's files")
    output.add_argument("--save-model", type=str, default="", help="write a checkpoint at each test that is the best so far")
    output.add_argument("--load-model", type=str, default="", help="go on from a checkpoint, or test it with --inference-only")
    mlperf = parser.add_argument_group("MLPerf and learning rate (upstream)")
    switch(mlperf, "--mlperf-logging")
    mlperf.add_argument("--mlperf-acc-threshold", type=float, default=0.0, help="stop when a test's accuracy is above this")
    mlperf.add_argument("--mlperf-auc-threshold", type=float, default=0.0, help="stop when a test's AUC is above this")
    switch(mlperf, "--mlperf-bin-loader")
    switch(mlperf, "--mlperf-bin-shuffle")
    mlperf.add_argument("--mlperf-grad-accum-iter", type=int, default=1, help="batches whose gradients are added up before a step")
    mlperf.add_argument("--lr-num-warmup-steps", type=int, default=0)
    mlperf.add_argument("--lr-decay-start-step", type=int, default=0)
    mlperf.add_argument("--lr-num-decay-steps", type=int, default=0)
    port = parser.add_argument_group("from the 2020 TPU port")
    switch(port, "--use-tpu", text="the same as --device=xla")
    port.add_argument("--tpu-cores", type=int, default=1, choices=[1, 8])
    switch(port, "--drop-last", text="leave out the last training batch where it is short")
    switch(port, "--tpu-metrics-debug", text="print torch_xla's metrics report after epochs and tests")
    ours = parser.add_argument_group("of dlrm_xla")
    ours.add_argument("--device", type=str, choices=["auto", "cpu", "cuda", "xla"], default="auto", help="auto: TPU, else CUDA, else CPU")
    ours.add_argument("--log-dir", type=str, default="", help="the run's folder; default: the one of --tensor-board-filename")
    ours.add_argument("--config", type=str, default="", metavar="FILE", help="YAML of the same names; flags given beside it win")
    ours.add_argument("--save-every", type=int, default=0, metavar="N", help="also write --save-model every N batches; resuming is exact")
    ours.add_argument("--matmul-precision", choices=["float32", "bfloat16"], default="float32", help="matrix products of the MLPs")
    switch(ours, "--upstream-compat", text="bring back upstream's bugs that change numbers, for reproduction")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of `argv`, those of its --config FILE filled in first. Errors are UserErrors of one line."""
    parser = build_parser()
    only_config = Parser(add_help=False, allow_abbrev=False)
    only_config.add_argument("--config", default="")
    path = only_config.parse_known_args(argv)[0].config
    from_file = read_config_file(parser, Path(path)) if path else []
    return parser.parse_args(from_file + argv)


def read_config_file(parser: Parser, path: Path) -> list[str]:
    """The YAML file as command line arguments, so that they are checked like the ones typed."""
    try:
        # BaseLoader leaves every scalar a string: the default one reads 1024-10-10 as a date
        content = yaml.load(path.read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config={path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config={path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config={path}: must be a list of `name: value` lines")
    known = {option.lstrip("-").replace("_", "-"): option for action in parser._actions for option in action.option_strings if option[:2] == "--"}
    arguments = []
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in known or name in ("config", "help"):
            near = difflib.get_close_matches(name, known, n=1)
            raise UserError(f"--config={path}: no flag is called {key!r}" + (f"; do you mean {near[0]}?" if near else ""))
        if not isinstance(value, str):
            raise UserError(f"--config={path}: {key} must be one value, as on the command line")
        if value not in ("null", "~"):
            arguments.append(f"{known[name]}={value}")
    return arguments


def resolved(flags: argparse.Namespace) -> dict:
    """Every flag's name and value, as --config reads them."""
    return {name.replace("_", "-"): value for name, value in vars(flags).items() if name != "config"}


def upstream_names() -> list[str]:
    """Upstream's flags by their Python names, in upstream's order."""
    groups = [group for group in build_parser()._action_groups if "(upstream)" in (group.title or "")]
    return [action.dest for group in groups for action in group._group_actions]
