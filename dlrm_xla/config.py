"""What a run is to do, checked once: frozen values made from the flags, so that nothing below asks argparse or checks again."""

import argparse
from dataclasses import asdict, dataclass, replace

from dlrm_xla.rules import check, chosen_device, ints, multi_hot_sizes, quantized, tpu_cores
from dlrm_xla.specs import parse_size


@dataclass(frozen=True)
class ModelConfig:
    embedding_dim: int  # D of the tables (half of the bottom MLP's last layer with QR concat)
    bottom_layers: tuple[int, ...]  # sizes, input first
    top_layers: tuple[int, ...]  # sizes without the input, which the interaction determines
    interaction: str  # "dot" | "cat"
    interaction_itself: bool
    weighted_pooling: str | None  # None | "fixed" | "learned"
    matmul_precision: str  # "float32" | "bfloat16"

    @property
    def feature_dim(self) -> int:
        """Length of every vector that enters the interaction."""
        return self.bottom_layers[-1]


@dataclass(frozen=True)
class MethodConfig:
    """Upstream's two compression flags, and --compress*."""

    kind: str | None  # None | "qr" | "md" | "compress"
    threshold: int  # for tables with more rows
    qr_operation: str
    qr_collisions: int
    md_temperature: float
    md_round_dims: bool
    compress: str = ""  # "tt:rank=16"
    compress_file: str = ""
    compress_to: str = ""  # "100x" | "5MB"


@dataclass(frozen=True)
class LossConfig:
    function: str  # "mse" | "bce" | "wbce"
    weights: tuple[float, ...]  # wbce: of label 0, of label 1
    threshold: float  # predictions are clamped to [t, 1 - t] where 0 < t < 1


@dataclass(frozen=True)
class DataConfig:
    source: str  # "random" | "trace" | "kaggle" | "terabyte" | "table"
    table_rows: tuple[int, ...]  # random data only
    batch_size: int
    test_batch_size: int
    data_size: int
    num_batches: int
    num_workers: int
    test_num_workers: int
    distribution: str
    rand_min: float
    rand_max: float
    rand_mu: float
    rand_sigma: float
    trace_file: str
    trace_padding: bool
    num_indices_per_lookup: int
    fixed_bags: bool
    round_targets: bool
    raw_data_file: str
    processed_data_file: str
    randomize: str
    max_ind_range: int
    sub_sample_rate: float
    drop_last: bool
    memory_map: bool
    schema_file: str  # tables only
    preprocess_bytes: int
    min_frequency: int
    vocabulary: str
    multi_hot_sizes: tuple[int, ...]  # () : single ids stay single
    multi_hot_distribution: str  # "uniform" | "pareto"
    bin_loader: bool
    bin_shuffle: bool

    @property
    def from_files(self) -> bool:
        """A data set, not drawn at random: nothing that a batch draws comes from the run's stream."""
        return self.source not in ("random", "trace")


@dataclass(frozen=True)
class TrainConfig:
    num_epochs: int
    optimizer: str  # "sgd" | "adagrad" | "rwsadagrad"
    learning_rate: float
    warmup_steps: int
    decay_start_step: int
    decay_steps: int
    accumulate: int  # batches to one step
    seed: int


@dataclass(frozen=True)
class OutputConfig:
    print_freq: int
    test_freq: int
    print_time: bool
    print_wall_time: bool
    print_precision: int
    debug: bool
    profile: bool
    save_onnx: bool
    run_dir: str
    tensorboard_dir: str
    save_model: str
    save_every: int
    load_model: str
    mlperf: bool
    accuracy_threshold: float
    auc_threshold: float
    xla_metrics: bool


@dataclass(frozen=True)
class RanksConfig:
    """What the flags say about ranks; how many there are is the launcher's affair (launch.py)."""

    local_rank: int = -1  # -1: the launcher's variables
    dist_backend: str = ""  # "" | "gloo" | "nccl"
    tpu_cores: int = 0  # 0: all chips of the host
    sharding: str = "auto"  # "auto" | "data" | "table" | "row" | "hybrid"
    rank_bytes: int | None = None  # for tables and their optimizer's state
    plan_only: bool = False
    plan_ranks: int = 0
    spmd: bool = False


@dataclass(frozen=True)
class Config:
    model: ModelConfig
    method: MethodConfig
    loss: LossConfig
    data: DataConfig
    train: TrainConfig
    output: OutputConfig
    device: str  # "auto" | "cpu" | "cuda" | "xla"
    table_layout: str  # "auto" | "rows" | "packed"
    inference_only: bool
    quantize_mlp_bits: int
    quantize_embedding_bits: int
    upstream_compat: bool
    compile_for: str  # "" or a TPU topology, "v5e:2x2"
    json_file: str
    ranks: RanksConfig = RanksConfig()  # noqa: RUF009 (frozen)

    @property
    def quantized(self) -> bool:
        return self.quantize_mlp_bits != 32 or self.quantize_embedding_bits != 32

    def with_num_dense(self, num_dense: int) -> "Config":
        """The bottom MLP's input as wide as the data's dense columns, which a table's schema says and no flag."""
        return replace(self, model=replace(self.model, bottom_layers=(num_dense, *self.model.bottom_layers[1:])))

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> "Config":
        """Checks every rule between flags. Raises UserError with the flag, its value and the way out."""
        dataset = args.data_generation == "dataset"
        bottom, top = ints(args.arch_mlp_bot), ints(args.arch_mlp_top)
        if dataset and args.data_set != "table":
            bottom = (13, *bottom[1:])
        check(args, bottom)
        pooling = args.weighted_pooling and ("fixed" if args.weighted_pooling == "fixed" else "learned")
        batch = args.mini_batch_size
        # --log-dir holds TensorBoard's files too, unless their flag was given a place of its own
        tensorboard_dir = args.log_dir if args.log_dir and args.tensor_board_filename == "run_kaggle_pt" else args.tensor_board_filename
        return cls(
            model=ModelConfig(
                args.arch_sparse_feature_size, bottom, top, args.arch_interaction_op, args.arch_interaction_itself, pooling or None,
                args.matmul_precision,
            ),
            method=MethodConfig(
                "qr" if args.qr_flag else "md" if args.md_flag else "compress" if args.compress or args.compress_config else None,
                args.qr_threshold if args.qr_flag else args.md_threshold if args.md_flag else args.compress_threshold,
                args.qr_operation, args.qr_collisions, args.md_temperature, args.md_round_dims,
                args.compress, args.compress_config, args.compress_to,
            ),
            loss=LossConfig(args.loss_function, tuple(map(float, args.loss_weights.split("-"))), args.loss_threshold),
            data=DataConfig(
                source=args.data_set if dataset else "trace" if args.data_generation == "synthetic" else "random",
                table_rows=() if dataset else ints(args.arch_embedding_size),
                batch_size=batch,
                test_batch_size=args.test_mini_batch_size if args.test_mini_batch_size > 0 else batch,
                data_size=args.data_size,
                num_batches=args.num_batches,
                num_workers=args.num_workers,
                test_num_workers=args.test_num_workers if args.test_num_workers >= 0 else args.num_workers,
                distribution=args.rand_data_dist,
                rand_min=args.rand_data_min, rand_max=args.rand_data_max, rand_mu=args.rand_data_mu, rand_sigma=args.rand_data_sigma,
                trace_file=args.data_trace_file,
                trace_padding=args.data_trace_enable_padding,
                num_indices_per_lookup=args.num_indices_per_lookup,
                fixed_bags=args.num_indices_per_lookup_fixed,
                round_targets=args.round_targets,
                raw_data_file=args.raw_data_file,
                processed_data_file=args.processed_data_file,
                randomize=args.data_randomize,
                max_ind_range=args.max_ind_range,
                sub_sample_rate=args.data_sub_sample_rate,
                drop_last=args.drop_last,
                memory_map=args.memory_map,
                schema_file=args.schema,
                preprocess_bytes=parse_size("--preprocess-memory", args.preprocess_memory),
                min_frequency=args.min_frequency,
                vocabulary=args.vocabulary,
                multi_hot_sizes=multi_hot_sizes(args.multi_hot_sizes),
                multi_hot_distribution=args.multi_hot_distribution,
                bin_loader=args.mlperf_bin_loader,
                bin_shuffle=args.mlperf_bin_shuffle,
            ),
            train=TrainConfig(
                args.nepochs, args.optimizer, args.learning_rate, args.lr_num_warmup_steps, args.lr_decay_start_step,
                args.lr_num_decay_steps, args.mlperf_grad_accum_iter if args.mlperf_logging else 1, args.numpy_rand_seed,
            ),
            output=OutputConfig(
                args.print_freq, args.test_freq, args.print_time, args.print_wall_time, args.print_precision, args.debug_mode,
                args.enable_profiling, args.save_onnx, args.log_dir or args.tensor_board_filename, tensorboard_dir,
                args.save_model, args.save_every, args.load_model, args.mlperf_logging, args.mlperf_acc_threshold,
                args.mlperf_auc_threshold, args.tpu_metrics_debug,
            ),
            device="cpu" if quantized(args) else chosen_device(args),
            table_layout=args.table_layout,
            inference_only=args.inference_only,
            quantize_mlp_bits=args.quantize_mlp_with_bit,
            quantize_embedding_bits=args.quantize_emb_with_bit,
            upstream_compat=args.upstream_compat,
            compile_for=args.compile_for or "",
            json_file=args.json,
            ranks=RanksConfig(
                args.local_rank, args.dist_backend, tpu_cores(args), args.sharding,
                parse_size("--rank-memory", args.rank_memory) if args.rank_memory else None, args.plan_only, args.plan_ranks, args.spmd,
            ),
        )
