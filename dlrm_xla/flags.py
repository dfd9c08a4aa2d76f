"""The command line: every flag of upstream's dlrm_s_pytorch.py with its name, default and choices; the TPU port's and ours in groups apart.

Differs from upstream: a true-or-false flag may be given bare or with a value (`--round-targets`, `--round-targets=True`), and `=False`
means False; `--data-generation=synthetic` (trace files), which upstream implements and refuses, is accepted; an error is one line.
"""

import argparse
import difflib
from pathlib import Path

import yaml

from dlrm_xla.specs import UserError


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python run_dlrm.py --help lists the flags)")


class Help(argparse.HelpFormatter):
    """One line for most flags, each with its default unless that is off, empty or none."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=42, width=130)

    def _get_help_string(self, action):
        if action.default in (None, "", argparse.SUPPRESS) or action.default is False:
            return action.help
        return f"{action.help} (default {action.default})".lstrip()


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
    parser = Parser(
        prog="run_dlrm.py",
        usage="python run_dlrm.py [--FLAG=VALUE ...]",
        description="Train and test DLRM on CPU, CUDA or XLA with the flags of facebookresearch/dlrm.",
        epilog="True|False: --flag and --flag=True switch on, --flag=False off. A-B-C: numbers separated by dashes. "
        "A flag may be shortened as far as it stays unique.",
        formatter_class=Help,
    )

    def switch(group, name, text, default=False):
        group.add_argument(name, nargs="?", const=True, default=default, type=parse_bool, metavar="True|False", help=text)

    def option(group, name, kind, default, text, metavar=None, choices=None):
        metavar = metavar or ({int: "N", float: "X", str: "NAME"}.get(kind, "A-B-C") if choices is None else None)
        group.add_argument(name, type=kind, default=default, choices=choices, metavar=metavar, help=text)

    ints, floats = dash_separated(int), dash_separated(float)
    model = parser.add_argument_group("model (upstream)")
    option(model, "--arch-sparse-feature-size", int, 2, "embedding dimension; equal to the last layer of --arch-mlp-bot")
    option(model, "--arch-embedding-size", ints, "4-3-2", "rows of each table; a data set brings its own")
    option(model, "--arch-mlp-bot", ints, "4-3-2", "bottom MLP from its input on; a data set replaces the first number (Criteo: by 13)")
    option(model, "--arch-mlp-top", ints, "4-2-1", "top MLP; the interaction's size is put before it")
    option(model, "--arch-interaction-op", str, "dot", "dot: products of all pairs; cat: vectors side by side", choices=["dot", "cat"])
    switch(model, "--arch-interaction-itself", "with dot: also the product of each vector with itself")
    option(model, "--weighted-pooling", str, None, "fixed: weights of one; learned: a trained weight for each id")
    tables = parser.add_argument_group("embedding tables (upstream)")
    switch(tables, "--md-flag", "mixed dimensions (Ginart et al., arXiv:1909.11810)")
    option(tables, "--md-threshold", int, 200, "for tables with more rows than this")
    option(tables, "--md-temperature", float, 0.3, "0: equal dimensions; larger: less for large tables")
    switch(tables, "--md-round-dims", "round the dimensions to powers of two")
    switch(tables, "--qr-flag", "quotient and remainder tables (Shi et al., arXiv:1909.02107)")
    option(tables, "--qr-threshold", int, 200, "for tables with more rows than this")
    option(tables, "--qr-operation", str, "mult", "mult, add or concat")
    option(tables, "--qr-collisions", int, 4, "rows of the remainder table")
    loss = parser.add_argument_group("activations and loss (upstream)")
    option(loss, "--activation-function", str, "relu", "relu only: upstream reads it nowhere")
    option(loss, "--loss-function", str, "mse", "mse, bce or wbce")
    option(loss, "--loss-weights", floats, "1.0-1.0", "wbce: weight of label 0 and of label 1", "A-B")
    option(loss, "--loss-threshold", float, 0.0, "clamp predictions to [X, 1 - X] where 0 < X < 1")
    switch(loss, "--round-targets", "round random targets to 0 or 1")
    data = parser.add_argument_group("data (upstream)")
    option(data, "--data-size", int, 1, "rows of random data, where --num-batches is 0")
    option(data, "--num-batches", int, 0, "batches in an epoch, of training and of test; 0: all")
    sources = ["random", "dataset", "internal", "synthetic"]
    option(data, "--data-generation", str, "random", "synthetic: from trace files; dataset: --data-set; internal: refused", choices=sources)
    option(data, "--rand-data-dist", str, "uniform", "uniform or gaussian")
    option(data, "--rand-data-min", float, 0, "gaussian: smallest id")
    option(data, "--rand-data-max", float, 1, "gaussian: largest id; below the rows of the smallest table")
    option(data, "--rand-data-mu", float, -1, "gaussian: mean; -1: the middle of min and max")
    option(data, "--rand-data-sigma", float, 1, "gaussian: standard deviation")
    option(data, "--data-trace-file", str, "./input/dist_emb_j.log", "synthetic: a file for each table, j standing for its number", "FILE")
    option(data, "--data-set", str, "kaggle", "kaggle or terabyte (Criteo), or table: any table, described by --schema")
    option(
        data, "--raw-data-file", str, "", "Criteo's text, plain or gzip; terabyte: DIR/day for DIR/day_0 ...; table: files, folder or pattern", "FILE"
    )
    option(data, "--processed-data-file", str, "", "arrays made from it: read where they exist, else written; .npz or a folder", "FILE")
    option(data, "--data-randomize", str, "total", "order of the training rows: total, day (in each day) or none")
    switch(data, "--data-trace-enable-padding", "synthetic: no new ids once all distances of the trace can occur")
    option(data, "--max-ind-range", int, -1, "fold ids modulo N; -1: do not")
    option(data, "--data-sub-sample-rate", float, 0.0, "leave out rows of label 0 with this probability")
    option(data, "--num-indices-per-lookup", int, 10, "random ids in a bag, at most")
    switch(data, "--num-indices-per-lookup-fixed", "exactly that many")
    option(data, "--num-workers", int, 0, "batches read ahead: 2 for each")
    switch(data, "--memory-map", "rows stay in the processed file instead of in memory (Criteo: 160 bytes a row)")
    train = parser.add_argument_group("training (upstream)")
    option(train, "--mini-batch-size", int, 1, "rows in a batch, those of all ranks together")
    option(train, "--nepochs", int, 1, "times through the training data")
    option(train, "--learning-rate", float, 0.01, "of tables and MLPs")
    option(train, "--print-precision", int, 5, "digits of arrays in --debug-mode")
    option(train, "--numpy-rand-seed", int, 123, "seed of everything random")
    switch(train, "--sync-dense-params", "False is refused: MLPs would differ from rank to rank", default=True)
    option(train, "--optimizer", str, "sgd", "sgd, adagrad or rwsadagrad (row-wise)")
    switch(train, "--dataset-multiprocessing", "accepted: preprocessing uses two cores with or without it")
    switch(train, "--inference-only", "one test pass, no training")
    quantize = parser.add_argument_group("quantized inference (upstream)")
    option(quantize, "--quantize-mlp-with-bit", int, 32, "8, 16 or 32")
    option(quantize, "--quantize-emb-with-bit", int, 32, "4, 8 or 32")
    output = parser.add_argument_group("devices and output (upstream)")
    switch(output, "--save-onnx", "write dlrm_s_pytorch.onnx and check it")
    switch(output, "--use-gpu", "the same as --device=cuda")
    option(output, "--local_rank", int, -1, "number of this process on its host; -1: as the launcher's variables say")
    option(output, "--dist-backend", str, "", "gloo or nccl, between ranks; without it nccl on CUDA, else gloo")
    option(output, "--print-freq", int, 1, "batches between two lines of the log")
    option(output, "--test-freq", int, -1, "batches between two tests; 0 or less: none")
    option(output, "--test-mini-batch-size", int, -1, "rows in a test batch; -1: --mini-batch-size")
    option(output, "--test-num-workers", int, -1, "batches read ahead in a test: 2 for each; -1: --num-workers")
    switch(output, "--print-time", "show ms/it, else -1.00")
    switch(output, "--print-wall-time", "show the time of day")
    switch(output, "--debug-mode", "print the model, the data and the parameters")
    switch(output, "--enable-profiling", "write dlrm_s_pytorch<time>{_shape.prof,_total.prof,.json}; keep --num-batches small: 5 MB a batch")
    switch(output, "--plot-compute-graph", "refused, as upstream does at the end of the run")
    option(output, "--tensor-board-filename", str, "run_kaggle_pt", "folder for TensorBoard's files", "DIR")
    option(output, "--save-model", str, "", "write a checkpoint at each test that is the best so far", "FILE")
    option(output, "--load-model", str, "", "go on from a checkpoint, or test it with --inference-only", "FILE")
    mlperf = parser.add_argument_group("MLPerf and learning rate (upstream)")
    switch(mlperf, "--mlperf-logging", "print MLPerf's events and upstream's longer test line")
    option(mlperf, "--mlperf-acc-threshold", float, 0.0, "stop when a test's accuracy is above this")
    option(mlperf, "--mlperf-auc-threshold", float, 0.0, "stop when a test's AUC is above this")
    switch(mlperf, "--mlperf-bin-loader", "terabyte: read <processed>_{train,test}.bin, made first where they are not there")
    switch(mlperf, "--mlperf-bin-shuffle", "with --mlperf-bin-loader: training batches in random order")
    option(mlperf, "--mlperf-grad-accum-iter", int, 1, "with --mlperf-logging: batches whose gradients make one step")
    option(mlperf, "--lr-num-warmup-steps", int, 0, "steps until the full learning rate")
    option(mlperf, "--lr-decay-start-step", int, 0, "first step of the decay; not before the warm-up's end")
    option(mlperf, "--lr-num-decay-steps", int, 0, "steps of the decay, a square; 0: none")
    port = parser.add_argument_group("from the 2020 TPU port")
    switch(port, "--use-tpu", "the same as --device=xla")
    option(port, "--tpu-cores", int, 0, "chips of a TPU host: 1, or all that it has; 0: all")
    switch(port, "--drop-last", "leave out the last training batch where it is short")
    switch(port, "--tpu-metrics-debug", "print torch_xla's metrics report after epochs and tests")
    ours = parser.add_argument_group("of dlrm_xla")
    option(ours, "--device", str, "auto", "auto: a TPU, else CUDA, else the CPU", choices=["auto", "cpu", "cuda", "xla"])
    sharding = ["auto", "data", "table", "row", "hybrid"]
    option(ours, "--sharding", str, "auto", "where tables lie: on all ranks, whole on one, in ranges of rows, or each as suits", choices=sharding)
    switch(ours, "--plan-only", "print what each rank would hold and exchange, and end; --log-dir gets a picture")
    option(ours, "--rank-memory", str, "", "what tables and their optimizer's state may take on a rank, as 14GB: a plan fits or says why not")
    option(ours, "--plan-ranks", int, 0, "--plan-only: for so many ranks; 0: those of this launch, or 4")
    switch(ours, "--spmd", "--device=xla: one process for all devices, tables in parts on them (GSPMD)")
    option(ours, "--tpu_num_cores", int, 0, "the same as --tpu-cores, as launchers named xla_spawn append it")
    option(ours, "--log-dir", str, "", "the run's folder; without it --tensor-board-filename", "DIR")
    option(ours, "--config", str, "", "YAML of these names; flags given beside it win", "FILE")
    option(ours, "--save-every", int, 0, "also write --save-model every N batches; resuming is exact")
    option(ours, "--table-layout", str, "auto", "rows, or packed in lines of 128; auto: packed on a TPU", choices=["auto", "rows", "packed"])
    option(ours, "--compile-for", str, None, "do not train: compile both steps for a TPU that need not be there, and judge them; as v5e:2x2", "TPU")
    option(ours, "--json", str, "", "the figures of --compile-for or --plan-only as JSON", "FILE")
    option(ours, "--matmul-precision", str, "float32", "of the MLPs' matrix products", choices=["float32", "bfloat16"])
    option(ours, "--compress", str, "", "tables above --compress-threshold by this method, as tt:rank=16; python -m compression list", "METHOD")
    option(ours, "--compress-threshold", int, 200, "for tables with more rows than this")
    option(ours, "--compress-config", str, "", "YAML: a method for each table", "FILE")
    option(ours, "--compress-to", str, "", "all tables together: 100x smaller, or a size as 5MB; sets the method's knob", "SIZE")
    option(ours, "--schema", str, "", "--data-set=table: YAML that says what each column is; python -m data_loaders.inspect proposes one", "FILE")
    option(ours, "--preprocess-memory", str, "4GB", "memory that preprocessing may take, that of the whole process", "SIZE")
    option(ours, "--min-frequency", int, 0, "ids seen fewer times than this share id 0, and so do ids unknown later; 0: every id is its own")
    option(ours, "--vocabulary", str, "", "number ids as this processed data set does, instead of anew", "FILE")
    option(ours, "--multi-hot-sizes", str, "", "Criteo: make bags of these sizes from single ids, as 3,2,1,...; mlperf: those of DLRMv2", "A,B,C")
    option(ours, "--multi-hot-distribution", str, "uniform", "of the ids that fill the bags", choices=["uniform", "pareto"])
    switch(ours, "--upstream-compat", "bring back upstream's bugs that change numbers, for reproduction")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The flags of `argv`, those of its --config FILE filled in first. Errors are UserErrors of one line."""
    parser = build_parser()
    files = _config_files(parser, argv)
    if len(files) > 1:
        raise UserError(f"--config is given {len(files)} times; one file is read, so put all flags into it")
    if not files:
        return parser.parse_args(argv)
    from_file = read_config_file(parser, Path(files[0]))
    try:
        parser.parse_args(from_file)
    except UserError as error:
        raise UserError(f"--config={files[0]}: {error}") from None
    return parser.parse_args(from_file + argv)


def _config_files(parser: Parser, argv: list[str]) -> list[str]:
    """The values of --config, or of a beginning of it that no other flag shares."""
    names = [option for action in parser._actions for option in action.option_strings]
    short = [name for name in ("--c", "--co", "--con", "--conf", "--confi") if sum(other.startswith(name) for other in names) == 1]
    only = Parser(add_help=False, allow_abbrev=False)
    only.add_argument("--config", *short, action="append", default=[])
    try:
        return [path for path in only.parse_known_args(argv)[0].config if path]
    except UserError:  # the real parser has the better words
        return []


def read_config_file(parser: Parser, path: Path) -> list[str]:
    """The YAML file as command line arguments, so that they are checked like the ones typed."""
    try:
        # BaseLoader leaves every scalar a string: the default one reads 1024-10-10 as a date
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config={path}: cannot be read: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(f"--config={path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"--config={path}: must be lines of the form `name: value`")
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    known = {option.lstrip("-").replace("_", "-"): option for option in options}
    arguments: dict[str, str] = {}
    for key, value in root.value:
        where = f"--config={path}: line {key.start_mark.line + 1}"
        name = key.value.replace("_", "-") if isinstance(key, yaml.ScalarNode) else ""
        if name not in known or name in ("config", "help"):
            near = difflib.get_close_matches(name, [other for other in known if other not in ("config", "help")], n=1)
            shown = repr(key.value) if isinstance(key, yaml.ScalarNode) else "a list"
            raise UserError(f"{where}: no flag is called {shown}" + (f"; do you mean {near[0]}?" if near else ""))
        if known[name] in arguments:
            raise UserError(f"{where}: {key.value} is there twice; keep one of them")
        if not isinstance(value, yaml.ScalarNode):
            raise UserError(f"{where}: {key.value} must be one value, as on the command line (1024-10-10, not a list)")
        if "\0" in value.value:
            raise UserError(f"{where}: {key.value} holds a NUL character")
        arguments[known[name]] = value.value
        if value.style is None and value.value in ("null", "~"):  # not quoted: no value
            del arguments[known[name]]
    return [f"{option}={value}" for option, value in arguments.items()]


def resolved(flags: argparse.Namespace) -> dict:
    """Every flag's name and value, as --config reads them."""
    return {name.replace("_", "-"): value for name, value in vars(flags).items() if name != "config"}


def upstream_values(values: dict) -> dict:
    """Upstream's flags by their Python names, in upstream's order, the two defaults that stand for another flag filled in."""
    groups = [group for group in build_parser()._action_groups if "(upstream)" in (group.title or "")]
    chosen = {action.dest: values[action.dest.replace("_", "-")] for group in groups for action in group._group_actions}
    for name, other in (("test_mini_batch_size", "mini_batch_size"), ("test_num_workers", "num_workers")):
        if chosen[name] < 0:
            chosen[name] = chosen[other]
    return chosen


def markdown_table() -> str:
    """The flags as README shows them: python -m dlrm_xla.flags"""
    lines = ["| flag | default | of | meaning |", "|---|---|---|---|"]
    for group in build_parser()._action_groups:
        title = group.title or ""
        origin = "upstream" if "(upstream)" in title else "TPU port" if "port" in title else "ours" if "dlrm_xla" in title else None
        for action in group._group_actions if origin else ():
            default = f"`{action.default}`" if action.default not in (None, "") else ""
            if isinstance(action.default, bool):
                default = "on" if action.default else "off"
            lines.append(f"| `{action.option_strings[0]}` | {default} | {origin} | {action.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(markdown_table())
