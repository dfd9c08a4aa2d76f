"""Rules between flags: what this version refuses, with the reason, and values that cannot be meant. Each ends in one line that says the way out."""

import re

from dlrm_xla.specs import MAX_INT32, UserError, parse_size

MAX_FLOAT32 = 3.4028234663852886e38
MAX_BATCH_NUMBERS = 2**45  # 140 TB: NumPy's and torch's own messages beyond that do not speak of memory


def check(args, bottom: tuple[int, ...]) -> None:
    """Every rule. bottom: layers of the bottom MLP, its input as the data set has it. Raises UserError."""
    refuse_unsupported(args)
    check_choices(args)
    check_numbers(args)
    check_architecture(args, bottom, ints(args.arch_mlp_top))
    check_data(args)
    check_ranks(args)
    check_compile_for(args)


def ints(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("-"))


def refuse_unsupported(args) -> None:
    """Flags that this version cannot honour, each with the reason. None is ignored."""
    refusals = (
        (
            args.optimizer in ("adam", "adamw", "momentum"),
            f"--optimizer={args.optimizer}: changes every row of every table in every step, and here a step changes the rows that it read; "
            "use sgd, adagrad or rwsadagrad",
        ),
        (
            args.activation_function != "relu",
            f"--activation-function={args.activation_function}: upstream reads this flag nowhere and its MLPs are always "
            "relu; leave it out",
        ),
        (
            args.data_generation == "internal",
            "--data-generation=internal: needs a library that Meta has not published; use random, synthetic or dataset",
        ),
        (args.plot_compute_graph, "--plot-compute-graph: upstream only ends with an error message here; --save-onnx writes the graph"),
        (
            args.dist_backend not in ("", "gloo", "nccl"),
            f"--dist-backend={args.dist_backend}: this version connects ranks by gloo (CPU) or nccl (CUDA), which come with PyTorch; use one",
        ),
        (
            not args.sync_dense_params,
            "--sync-dense-params=False: the MLPs of the ranks would train apart and no checkpoint could hold them; leave it out",
        ),
    )
    for wrong, message in refusals:
        if wrong:
            raise UserError(message)


def check_choices(args) -> None:
    for name, value, allowed in (
        ("loss-function", args.loss_function, ("mse", "bce", "wbce")),
        ("optimizer", args.optimizer, ("sgd", "adagrad", "rwsadagrad")),
        ("qr-operation", args.qr_operation, ("mult", "add", "concat")),
        ("rand-data-dist", args.rand_data_dist, ("uniform", "gaussian")),
        ("data-randomize", args.data_randomize, ("total", "day", "none")),
        ("data-set", args.data_set, ("kaggle", "terabyte", "table")),
        ("multi-hot-distribution", args.multi_hot_distribution, ("uniform", "pareto")),
        ("table-layout", args.table_layout, ("auto", "rows", "packed")),
        ("quantize-mlp-with-bit", args.quantize_mlp_with_bit, (8, 16, 32)),
        ("quantize-emb-with-bit", args.quantize_emb_with_bit, (4, 8, 32)),
    ):
        if value not in allowed:
            raise UserError(f"--{name}={value}: must be one of {', '.join(map(str, allowed))}")


def check_numbers(args) -> None:
    group = max(args.mlperf_grad_accum_iter, 1)
    at_least = (
        ("mini-batch-size", 1), ("data-size", 1), ("nepochs", 0), ("print-freq", 1), ("num-indices-per-lookup", 1), ("num-workers", 0),
        ("num-batches", 0), ("qr-collisions", 1), ("mlperf-grad-accum-iter", 1), ("lr-num-warmup-steps", 0), ("lr-decay-start-step", 0),
        ("lr-num-decay-steps", 0), ("save-every", 0), ("min-frequency", 0), ("arch-sparse-feature-size", 1), ("print-precision", 0),
        ("numpy-rand-seed", 0), ("compress-threshold", 0),
    )  # fmt: skip
    for name, least in at_least:
        value = getattr(args, name.replace("-", "_"))
        if value < least:
            raise UserError(f"--{name}={value}: must be at least {least}")
    for name in ("test-mini-batch-size", "test-num-workers", "qr-threshold", "md-threshold", *(name for name, _ in at_least)):
        value = getattr(args, name.replace("-", "_"))
        if abs(value) > MAX_INT32 and name != "numpy-rand-seed":
            raise UserError(f"--{name}={value}: must be at most {MAX_INT32}")
    for name in (
        "learning-rate", "rand-data-min", "rand-data-max", "rand-data-mu", "rand-data-sigma", "md-temperature", "loss-threshold",
        "mlperf-acc-threshold", "mlperf-auc-threshold",
    ):  # fmt: skip
        value = getattr(args, name.replace("-", "_"))
        if not abs(value) <= MAX_FLOAT32:
            raise UserError(f"--{name}={value}: must be a finite number, not beyond {MAX_FLOAT32:.1e}")
    rules = (
        (args.learning_rate < 0, f"--learning-rate={args.learning_rate}: must not be negative"),
        (args.numpy_rand_seed >= 2**32, f"--numpy-rand-seed={args.numpy_rand_seed}: must be below 2^32"),
        (
            args.test_mini_batch_size == 0 or args.test_mini_batch_size < -1,
            f"--test-mini-batch-size={args.test_mini_batch_size}: must be -1 (as --mini-batch-size) or at least 1",
        ),
        (not 0 <= args.data_sub_sample_rate < 1, f"--data-sub-sample-rate={args.data_sub_sample_rate}: must be at least 0 and below 1"),
        (
            args.max_ind_range == 0 or args.max_ind_range < -1,
            f"--max-ind-range={args.max_ind_range}: must be -1 (no folding) or at least 1",
        ),
        (args.max_ind_range > 2**32, f"--max-ind-range={args.max_ind_range}: ids have 32 bits; must be at most {2**32}"),
        (args.rand_data_min > args.rand_data_max, f"--rand-data-min={args.rand_data_min} is above --rand-data-max={args.rand_data_max}"),
        (args.rand_data_max > MAX_INT32, f"--rand-data-max={args.rand_data_max}: ids are at most {MAX_INT32}"),
        (args.test_num_workers < -1, f"--test-num-workers={args.test_num_workers}: must be -1 (as --num-workers) or at least 0"),
        (not 0 <= args.md_temperature <= 4, f"--md-temperature={args.md_temperature}: must be from 0 (equal dimensions) to 4"),
        (args.rand_data_sigma < 0, f"--rand-data-sigma={args.rand_data_sigma}: must not be negative"),
        (args.rand_data_min < 0, f"--rand-data-min={args.rand_data_min}: ids start at 0; it must not be negative"),
        (
            args.lr_decay_start_step < args.lr_num_warmup_steps,
            f"--lr-decay-start-step={args.lr_decay_start_step} is before the end of "
            f"--lr-num-warmup-steps={args.lr_num_warmup_steps}; warm-up must end before the decay starts",
        ),
        (
            args.mlperf_grad_accum_iter > 1 and not args.mlperf_logging,
            f"--mlperf-grad-accum-iter={args.mlperf_grad_accum_iter}: works with --mlperf-logging only; add it",
        ),
        (
            # a checkpoint inside a group would lose the gradients that wait for the group's step
            args.save_model != "" and not args.upstream_compat and (args.save_every % group or max(args.test_freq, 0) % group),
            f"--mlperf-grad-accum-iter={group} with --save-model needs --test-freq={args.test_freq} and --save-every={args.save_every} "
            f"to be multiples of {group}: gradients that wait for a step are not saved",
        ),
        (args.mlperf_acc_threshold > 0 and not args.mlperf_logging, "--mlperf-acc-threshold works with --mlperf-logging only; add it"),
        (args.mlperf_auc_threshold > 0 and not args.mlperf_logging, "--mlperf-auc-threshold works with --mlperf-logging only; add it"),
        (args.save_every > 0 and not args.save_model, f"--save-every={args.save_every} needs --save-model=FILE, the checkpoint to write"),
        (args.inference_only and args.save_every > 0, "--save-every has nothing to save with --inference-only; leave one of them out"),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def check_architecture(args, bottom, top) -> None:
    """Shapes that must agree, and methods that exclude each other."""
    dim, last = args.arch_sparse_feature_size, bottom[-1]
    concat = args.qr_flag and args.qr_operation == "concat"
    compress = bool(args.compress or args.compress_config)
    weights = [float(weight) for weight in args.loss_weights.split("-")]
    rows = ints(args.arch_embedding_size)
    slots = sum(args.num_indices_per_lookup if args.num_indices_per_lookup_fixed else min(n, args.num_indices_per_lookup) for n in rows)
    batch_numbers = max(args.mini_batch_size, args.test_mini_batch_size) * (bottom[0] + slots)
    rules = (
        (min(bottom) < 1, f"--arch-mlp-bot={args.arch_mlp_bot}: every layer needs at least one unit"),
        (min(top) < 1, f"--arch-mlp-top={args.arch_mlp_top}: every layer needs at least one unit"),
        (len(bottom) < 2, f"--arch-mlp-bot={args.arch_mlp_bot}: needs an input and at least one layer, as in 13-64-16"),
        (top[-1] != 1, f"--arch-mlp-top={args.arch_mlp_top}: must end in 1, the probability of a click"),
        (
            concat and 2 * dim != last,
            f"--arch-sparse-feature-size={dim} with --qr-operation=concat gives vectors of {2 * dim}, but --arch-mlp-bot ends "
            f"in {last}; make it end in {2 * dim}",
        ),
        (
            not concat and dim != last,
            f"--arch-sparse-feature-size={dim} does not match the last layer {last} of --arch-mlp-bot; make them equal",
        ),
        (
            not all(weight <= MAX_FLOAT32 for weight in weights),
            f"--loss-weights={args.loss_weights}: must be finite numbers, not beyond {MAX_FLOAT32:.1e}",
        ),
        (max(bottom) > MAX_INT32, f"--arch-mlp-bot={args.arch_mlp_bot}: a layer has at most {MAX_INT32} units"),
        (max(top) > MAX_INT32, f"--arch-mlp-top={args.arch_mlp_top}: a layer has at most {MAX_INT32} units"),
        (
            args.data_generation != "dataset" and max(rows) > MAX_INT32,
            f"--arch-embedding-size={args.arch_embedding_size}: a table has at most {MAX_INT32} rows",
        ),
        (
            args.data_generation != "dataset" and batch_numbers > MAX_BATCH_NUMBERS,
            f"--mini-batch-size={args.mini_batch_size} with --num-indices-per-lookup={args.num_indices_per_lookup}: one batch "
            f"would hold {batch_numbers:.1e} numbers; make one of them smaller",
        ),
        (
            args.data_generation != "dataset" and min(rows) < 1,
            f"--arch-embedding-size={args.arch_embedding_size}: every table needs at least one row",
        ),
        (args.qr_flag and args.md_flag, "--qr-flag and --md-flag: a table can be compressed by one of them only"),
        (bool(args.weighted_pooling) and args.qr_flag, "--weighted-pooling with --qr-flag is not supported; leave one of them out"),
        (bool(args.weighted_pooling) and args.md_flag, "--weighted-pooling with --md-flag is not supported; leave one of them out"),
        (
            compress and (args.qr_flag or args.md_flag),
            "--compress and --compress-config do not go with --qr-flag and --md-flag; name those methods in them, as --compress=qr:collisions=4",
        ),
        (
            args.compress_to != "" and not compress,
            f"--compress-to={args.compress_to}: needs a method to size, --compress=METHOD or --compress-config=FILE",
        ),
        (compress and bool(args.weighted_pooling), "--weighted-pooling with --compress is not supported; leave one of them out"),
        (
            args.quantize_emb_with_bit != 32 and compress,
            f"--quantize-emb-with-bit={args.quantize_emb_with_bit} with --compress is not supported; convert the trained tables with "
            "python -m compression convert --method int8",
        ),
        (
            args.loss_function == "wbce" and len(weights) != 2,
            f"--loss-weights={args.loss_weights}: wbce needs two, of label 0 and of label 1",
        ),
        (
            args.quantize_emb_with_bit != 32 and args.qr_flag,
            f"--quantize-emb-with-bit={args.quantize_emb_with_bit} with --qr-flag is not supported; leave one of them out",
        ),
        (
            args.quantize_emb_with_bit != 32 and args.md_flag,
            f"--quantize-emb-with-bit={args.quantize_emb_with_bit} with --md-flag is not supported; leave one of them out",
        ),
        (
            quantized(args) and not args.inference_only,
            "--quantize-mlp-with-bit and --quantize-emb-with-bit quantize a trained model: add --inference-only",
        ),
        (quantized(args) and chosen_device(args) in ("cuda", "xla"), "quantized inference runs on the CPU only: use --device=cpu"),
        (
            quantized(args) and args.save_onnx,
            "--save-onnx writes the weights as they were trained, in float32; leave it or the --quantize flags out",
        ),
    )  # fmt: skip
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def check_data(args) -> None:
    """Which flags go with which --data-set."""
    dataset, table, terabyte = args.data_generation == "dataset", args.data_set == "table", args.data_set == "terabyte"
    rules = (
        (
            dataset and not (args.raw_data_file or args.processed_data_file),
            "--data-generation=dataset needs --raw-data-file (Criteo text) or --processed-data-file",
        ),
        (
            dataset and table and not args.schema,
            "--data-set=table needs --schema=FILE, which says what each column is; python -m data_loaders.inspect FILE proposes one",
        ),
        (args.schema and not (dataset and table), f"--schema={args.schema}: describes a table; add --data-generation=dataset --data-set=table"),
        (
            dataset and table and args.data_sub_sample_rate > 0,
            f"--data-sub-sample-rate={args.data_sub_sample_rate}: is for Criteo's data sets; leave it out with --data-set=table",
        ),
        (
            args.mlperf_bin_loader and not (dataset and terabyte),
            "--mlperf-bin-loader: reads the binary files of the Terabyte set; add --data-generation=dataset --data-set=terabyte",
        ),
        (args.mlperf_bin_shuffle and not args.mlperf_bin_loader, "--mlperf-bin-shuffle: is for --mlperf-bin-loader; add it"),
        (
            args.min_frequency > 0 and args.vocabulary != "",
            f"--min-frequency={args.min_frequency} with --vocabulary: a vocabulary that exists is not counted again; leave one of them out",
        ),
        (
            args.multi_hot_sizes != "" and not (dataset and not table),
            "--multi-hot-sizes: makes bags from Criteo's single ids; add --data-generation=dataset --data-set=kaggle or terabyte",
        ),
    )
    for name in ("min-frequency", "vocabulary", "schema"):
        value = getattr(args, name.replace("-", "_"))
        if value and not dataset:
            raise UserError(f"--{name}={value}: is for files; add --data-generation=dataset")
    for wrong, message in rules:
        if wrong:
            raise UserError(message)
    multi_hot_sizes(args.multi_hot_sizes)
    parse_size("--preprocess-memory", args.preprocess_memory)


MLPERF_MULTI_HOT = (3, 2, 1, 2, 6, 1, 1, 1, 1, 7, 3, 8, 1, 6, 9, 5, 1, 1, 1, 12, 100, 27, 10, 3, 1, 1)  # MLPerf DLRMv2's


def multi_hot_sizes(text: str) -> tuple[int, ...]:
    """Of --multi-hot-sizes: () where it is empty. Commas, as the reference has them, or dashes."""
    if text in ("", "mlperf"):
        return MLPERF_MULTI_HOT if text else ()
    parts = re.split("[,-]", text)
    if not all(re.fullmatch(r"0*[1-9]\d{0,6}", part.strip(), re.ASCII) for part in parts):
        raise UserError(f"--multi-hot-sizes={text}: must be a size from 1 for each table, separated by commas, or mlperf")
    return tuple(int(part) for part in parts)


def check_compile_for(args) -> None:
    """--compile-for builds nothing that lives longer than its report, on no device."""
    if args.compile_for is None:
        if args.json and not args.plan_only:
            raise UserError(f"--json={args.json}: is the report of --compile-for or --plan-only; add --compile-for=v5e:2x2 or leave it out")
        return
    if not re.fullmatch(r"(v4|v5e|v5p|v6e):\d{1,3}x\d{1,3}(x\d{1,3})?", args.compile_for):
        raise UserError(f"--compile-for={args.compile_for}: must be a TPU's name and its chips, as v4:2x2x1, v5e:2x2, v5p:2x2x1 or v6e:2x2")
    given = f"--compile-for={args.compile_for}"
    if chosen_device(args) in ("cpu", "cuda"):
        raise UserError(f"{given} compiles for a TPU and --device={chosen_device(args)} is none; leave --device out")
    for flag, on, reason in (
        ("--save-model", args.save_model, "trains nothing that could be saved"),
        ("--load-model", args.load_model, "reads no weights: the programs do not depend on them"),
        ("--save-onnx", args.save_onnx, "has no weights to export"),
        ("--enable-profiling", args.enable_profiling, "runs no step"),
        ("--tpu-metrics-debug", args.tpu_metrics_debug, "runs no step"),
        ("--debug-mode", args.debug_mode, "has no weights to print"),
        ("--quantize-mlp-with-bit and --quantize-emb-with-bit", quantized(args), "compiles for a TPU, and quantized inference runs on the CPU"),
        ("--mlperf-grad-accum-iter", args.mlperf_grad_accum_iter > 1, "compiles one program for a step, and these steps need two"),
    ):
        if on:
            raise UserError(f"{given} {reason}; leave {flag} out")


def check_ranks(args) -> None:
    """Of the flags that place a run on several devices; what depends on how many ranks there are is in check_world."""
    device = chosen_device(args)
    rules = (
        (args.local_rank < -1, f"--local_rank={args.local_rank}: must be at least 0, or -1 for what the launcher's variables say"),
        (args.dist_backend == "nccl" and device in ("cpu", "xla"), f"--dist-backend=nccl: connects CUDA devices, and --device={device} is none"),
        (
            args.dist_backend == "gloo" and device == "xla",
            "--dist-backend=gloo: leaves tensors on XLA as they are without a word; chips of a TPU exchange by themselves; leave it out",
        ),
        (tpu_cores(args) < 0, f"--tpu-cores={tpu_cores(args)}: must be at least 1, or 0 for all chips of this host"),
        (args.plan_ranks < 0, f"--plan-ranks={args.plan_ranks}: must be at least 1, or 0 for those of this launch, 4 where it is one process"),
        (args.plan_ranks > 0 and not args.plan_only, f"--plan-ranks={args.plan_ranks}: is for --plan-only; add it or leave this out"),
        (args.plan_only and args.compile_for is not None, "--plan-only and --compile-for both end without training; leave one of them out"),
        (args.spmd and device != "xla", "--spmd: one process for all devices is a way of XLA's; add --device=xla"),
        (args.spmd and tpu_cores(args) > 0, f"--spmd: one process takes all devices; leave --tpu-cores={tpu_cores(args)} out"),
        (
            args.spmd and args.weighted_pooling == "learned",
            "--spmd: learned pooling weights are dense, and every step would sum one for each row of each table over the devices; use "
            "--weighted-pooling=fixed, or leave --spmd out",
        ),
        (args.spmd and args.plan_only, "--plan-only: plans ranks, and --spmd is one process; leave one of them out"),
    )
    for wrong, message in rules:
        if wrong:
            raise UserError(message)


def tpu_cores(args) -> int:
    """--tpu-cores, or --tpu_num_cores as launchers append it; 0: all."""
    if args.tpu_cores and args.tpu_num_cores and args.tpu_cores != args.tpu_num_cores:
        raise UserError(f"--tpu-cores={args.tpu_cores} and --tpu_num_cores={args.tpu_num_cores} mean the same and differ; leave one of them out")
    return args.tpu_cores or args.tpu_num_cores


def check_world(config, world: int) -> None:
    """Rules between a Config and how many ranks there are, `world`. Raises UserError."""
    if world == 1:
        return
    check_batches(config, world)
    for flag, on, reason in (
        ("--spmd", config.ranks.spmd, "is one process for all devices"),
        ("--compile-for", config.compile_for, "runs in one process; --tpu-cores says how many chips it compiles for"),
        ("--save-onnx", config.output.save_onnx, "writes a whole model, which no rank has; export in one process with --load-model"),
        ("--debug-mode", config.output.debug, "prints whole tables, which no rank has"),
        ("--quantize-mlp-with-bit or --quantize-emb-with-bit", config.quantized, "quantizes a whole model, which no rank has; test in one process"),
    ):
        if on:
            raise UserError(f"{flag} {reason}; leave it out with {world} ranks")


def check_batches(config, world: int) -> None:
    """UserError for a batch of training that does not divide among the ranks. One of a test is padded: it changes no result."""
    rows = config.data.batch_size
    if rows % world:
        below = rows // world * world
        near = f"{below} or {below + world}" if below else f"{world}"
        raise UserError(f"--mini-batch-size={rows}: is the batch of all {world} ranks together and does not divide among them; use {near}")


def quantized(args) -> bool:
    return args.quantize_emb_with_bit != 32 or args.quantize_mlp_with_bit != 32


def chosen_device(args) -> str:
    asked = {name for name, on in (("cuda", args.use_gpu), ("xla", args.use_tpu), (args.device, args.device != "auto")) if on}
    if len(asked) > 1:
        raise UserError(f"the flags ask for two devices, {' and '.join(sorted(asked))}; keep one of --device, --use-gpu, --use-tpu")
    return asked.pop() if asked else "auto"
