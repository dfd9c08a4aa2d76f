#!/usr/bin/env python3
"""Train and test DLRM: the flags of facebookresearch/dlrm on CPU, CUDA and XLA. From top to bottom, in the order in which things happen.

    python run_dlrm.py --data-generation=dataset --raw-data-file=train.txt --arch-sparse-feature-size=16 \\
        --arch-mlp-bot=13-512-256-64-16 --arch-mlp-top=512-256-1 --loss-function=bce --mini-batch-size=128 --test-freq=1000

Several ranks: torchrun --nproc-per-node=N run_dlrm.py ... on CPU and CUDA; on a TPU host it starts a process for each chip (docs/distributed.md).
"""

import os
import signal
import sys
from pathlib import Path

# before torch is loaded: its sockets warn with a page of addresses of each connection that breaks, and one line of ours says why
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from dlrm_xla import backends, checkpoint, checkpoint_file, flags, launch  # noqa: E402
from dlrm_xla.config import Config  # noqa: E402
from dlrm_xla.rules import check_batches, check_world  # noqa: E402
from dlrm_xla.specs import TableSpec, UserError, one_line, size_text  # noqa: E402

PICTURE = "plan.png"  # of --plan-only, in --log-dir
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "resource_exhausted")  # torch on the CPU, CUDA, XLA


def main(argv: list[str], find_place=launch.find_place) -> int:
    """0, or 2 after one line on stderr that says what is wrong; 130 when interrupted; 1 where --compile-for finds a fault; 3 where another rank is
    gone. Of several ranks the first prints the line. find_place: another one for a process that was spawned for a chip.
    """
    ranks = launch.Ranks()
    try:
        ranks = launch.Ranks(find_place())
        ranks.join()
        args = flags.parse(argv)
        config = Config.from_args(args)
        ranks.agree(flags.resolved(args), "--{name}", without=("local-rank",))
        check_world(config, ranks.world)
        if config.compile_for:
            return compile_only(config)
        if config.ranks.plan_only:
            plan_only(config, ranks, args.log_dir)
        elif ranks.place.launcher != "xla" and launch.spawns(config):
            return backends.spawn(_mp_fn, config.ranks.tpu_cores)
        else:
            run(config, flags.resolved(args), argv, ranks)
        ranks.meet()  # one that dies in its last lines is missed too
        ranks.close()
        return 0
    except UserError as error:
        return ranks.end(2, f"error: {one_line(str(error))}", error)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in OUT_OF_MEMORY):
            return ranks.fault(error)
        first = one_line((str(error).strip().splitlines() or ["no more to be had"])[0][:200])
        return ranks.end(2, f"error: out of memory ({first}); make the tables, the layers or the batches smaller", error)
    except OSError as error:  # of a place that no flag names, such as a full disk under stdout
        message = f"{error.filename or 'output'}: {error.strerror or error}"
        return ranks.end(2, f"error: {one_line(message)}", error)
    except KeyboardInterrupt as error:
        return ranks.end(130, "interrupted", error)
    except SystemExit:  # --help
        ranks.close()
        raise
    except BaseException as error:
        return ranks.fault(error)


def _mp_fn(index: int) -> None:
    """One of the processes that torch_xla starts for the chips of a host: here, or a launcher named xla_spawn. The runtime knows its rank."""
    code = main(sys.argv[1:], lambda: launch.Place(*backends.xla_place(), "xla"))
    if code:
        sys.exit(code)


def run(config: Config, resolved: dict, argv: list[str], ranks: launch.Ranks) -> None:
    # slow to import, so the flags are checked first
    import numpy as np
    import torch

    from compression.choose import check_wish, choices_and_counts, ratio_text
    from compression.ledger import LEDGER_FILE, write_ledger
    from compression.registry import mixed_dimensions, recorded
    from data_loaders.open import open_dataset
    from data_loaders.prefetch import read_ahead
    from dlrm_xla import debug, onnx_export, shards
    from dlrm_xla.console import Console, SilentConsole
    from dlrm_xla.mlperf import MLPerfLog
    from dlrm_xla.profile import profiled
    from dlrm_xla.quantize import quantized_forward
    from dlrm_xla.session import Session, save_paths
    from dlrm_xla.tracking import SilentTracker, Tracker, describe_environment, make_folder

    output, compat = config.output, config.upstream_compat
    check_wish(config.method, config.train.optimizer, bool(output.load_model))
    console = Console(output.print_time, output.print_wall_time) if ranks.first else SilentConsole()
    mlperf = MLPerfLog(output.mlperf and ranks.first, emit=console.line)
    mlperf.init_start()

    # the device, and upstream's seeds
    np.set_printoptions(precision=output.print_precision)
    torch.set_printoptions(precision=output.print_precision)
    torch.manual_seed(config.train.seed)
    rng = np.random.RandomState(config.train.seed)
    device = launch.device_of(config, ranks)
    ranks.agree({"device": device}, "--{name}")
    dist_backend = ranks.connect(config, device)
    backend = backends.make(device, ranks.collectives, ranks.local_rank, config.ranks.spmd)
    if output.xla_metrics:
        backend.metrics_report()  # refused where there is none
    if dist_backend:
        console.ranks(ranks.world, dist_backend)
    if not output.debug:
        console.world(ranks.world, ranks.rank, ranks.local_rank)
    console.line(backend.console)
    mlperf.init_stop()
    mlperf.run_start()
    ranks.advise(launch.how_to_go_on(output.save_model))
    loaded = shards.read(Path(output.load_model)) if output.load_model else None
    if loaded is not None:
        read = {"position": f"epoch {loaded.progress.epoch}, batch {loaded.progress.batch}", "content": shards.identity(loaded)}
        ranks.agree(read, f"--load-model={output.load_model}: {{name}}")
    for path in save_paths(output) if output.save_model else ():
        shards.check_writable(path, shards.writers_of(backend))
    onnx_path = Path(onnx_export.FILE_NAME)
    if output.save_onnx:
        onnx_export.require(onnx_path)
    if ranks.first:
        make_folder(Path(output.run_dir))

    # the data
    data = open_dataset(config, rng, console.line, ranks.rank, ranks.world, ranks.local_rank, ranks.meet)
    ranks.agree(launch.facts_of(data), "the data: {name}")
    config = config.with_num_dense(data.num_dense)
    table_rows = [int(rows) for rows in data.table_rows]
    if output.mlperf:
        console.arguments({**flags.upstream_values(resolved), "ln_emb": table_rows})

    # the model: tables 0..T-1, bottom MLP, top MLP, as upstream draws them
    specs = table_specs(config, data)
    if output.debug:
        widths = mixed_dimensions(specs, config.method) if config.method.kind == "md" else None
        debug.print_architecture(console.line, config, table_rows, widths)
        if compat and (config.data.from_files or config.data.num_workers == 0):
            torch.empty((), dtype=torch.int64).random_()  # upstream's loader draws a seed for each pass; QR and MD tables come after it
        debug.print_data(console.line, data.train, data.hotness)
    saved = recorded(loaded.tables) if loaded is not None and loaded.tables else None
    choices, counts = choices_and_counts(specs, config.method, counter(config, data, specs, backend), saved)
    check_loaded(config, specs, loaded, saved, choices)
    trainer = build(config, specs, rng, backend, choices=choices, counts=counts, to_load=loaded is not None, note=console.note)
    del counts
    if any(choice.method != "plain" for choice in choices):
        console.note(f"compressed: {ratio_text(specs, choices)}; table by table in {Path(output.run_dir) / LEDGER_FILE}")
        if ranks.first:
            write_ledger(Path(output.run_dir), trainer)
    console.note(f"tables: {trainer.tables.describe()}{', the choice of --table-layout=auto' if config.table_layout == 'auto' else ''}")
    if output.save_onnx:
        onnx_export.check_size(trainer)
    if output.debug:
        debug.print_parameters(console.line, "initial", trainer)
    mlperf.submission(config.train.seed, config.data.batch_size, Path(output.run_dir))
    if config.data.bin_loader:
        mlperf.samples(data.train.num_rows, data.test.num_rows)

    # a checkpoint's weights and position
    progress = checkpoint_file.Progress()
    if loaded is not None:
        console.loading(output.load_model)
        progress = checkpoint.resume(trainer, loaded, config)
        saved = loaded.progress
        console.loaded(
            saved.epoch, saved.num_epochs, saved.batch, saved.num_batches, saved.num_test_batches, saved.train_loss, saved.test_accuracy,
            (saved.test_auc or 0.0) if output.mlperf else None,
        )  # fmt: skip

    ranks.meet()

    # training or a test
    console.header()
    train = config.train
    mlperf.hyperparameters(train.learning_rate, train.warmup_steps, train.decay_start_step, train.decay_steps)
    resumed = loaded is not None and not config.inference_only
    loaded = saved = None  # the file is mapped, and a newer save will remove it
    folders = Path(output.run_dir), Path(output.tensorboard_dir)
    environment = describe_environment(backend.description, argv, ranks.world, dist_backend)
    first_step = progress.epoch * data.train.num_batches + progress.batch
    tracker = Tracker(*folders, resolved, environment, resumed, first_step, data.bayes_auc) if ranks.first else SilentTracker(*folders)
    # upstream's train and test data share a stream when compatible: a batch drawn early would change the next test
    shared_stream = compat and not config.data.from_files

    def reader(num_workers: int):
        depth = 0 if shared_stream else 2 * max(1, num_workers)
        return lambda batches: read_ahead(batches, depth, max(1, num_workers))

    session = Session(
        config, trainer, data, console, tracker, mlperf, reader(config.data.num_workers), reader(config.data.test_num_workers), resolved,
        progress,
    )  # fmt: skip
    if output.save_model and output.test_freq < 1 and not output.save_every and not config.inference_only:
        console.note("warning: no checkpoint will be written: --save-model needs --test-freq=N (the best test's) or --save-every=N")
    with tracker:
        num_batches = data.test.num_batches if config.inference_only else data.train.num_batches * train.num_epochs
        with profiled(output.profile and ranks.first, backend.name, num_batches, Path(), console.note):
            if config.inference_only:
                console.testing_only()
                bits = (config.quantize_mlp_bits, config.quantize_embedding_bits)
                session.evaluate(-1, None, quantized_forward(trainer, *bits, console.line if compat else None) if bits != (32, 32) else None)
            else:
                session.fit()
                if output.save_model and session.last_saved == (output.load_model or None):
                    console.note(f"nothing was saved to --save-model={output.save_model}: no test was the best so far; --save-every=N always saves")
        if output.debug and not config.inference_only:
            debug.print_parameters(console.line, "updated", trainer)
        paths = tracker.close(session.final_figures())
    try:
        if output.save_onnx:
            first_batch = next(data.train.batches())
            onnx_export.save_onnx(trainer, first_batch, config.data.from_files and max(data.hotness) == 1, onnx_path, console.line)
    finally:
        session.print_summary(paths)


def check_loaded(config: Config, specs: list[TableSpec], loaded, saved, choices) -> None:
    """UserError where tables of a checkpoint are of another kind than those that are asked for. saved: what it says of them, or None."""
    output = config.output
    shapes = {} if loaded is None or saved else {name: tuple(weight.shape) for name, weight in loaded.weights.items()}
    asked = [choice.text() for choice in choices if choice.method != "plain"]
    if config.method.kind == "compress" and asked and all(shapes.get(f"{s.name}.weight") == (s.num_embeddings, s.embedding_dim) for s in specs):
        raise UserError(
            f"--load-model={output.load_model}: its tables are plain, and {asked[0]} is asked for; convert it first: python -m compression convert"
        )
    if config.quantize_embedding_bits != 32 and any(choice.method != "plain" for choice in choices):
        raise UserError(
            f"--quantize-emb-with-bit={config.quantize_embedding_bits}: quantizes plain tables, and some of {output.load_model} are compressed; "
            "leave it out, or make int8 tables of a plain checkpoint with python -m compression convert --method int8"
        )


def table_specs(config: Config, data) -> list[TableSpec]:
    return [
        TableSpec(f"emb_l.{index}", int(rows), config.model.feature_dim, hotness)
        for index, (rows, hotness) in enumerate(zip(data.table_rows, data.hotness, strict=True))
    ]


def counter(config: Config, data, specs: list[TableSpec], backend=None):
    """A function that counts how often training looks each id up; None for data that is drawn and tells nothing.

    backend: of several ranks, each of which counts its part of the data
    """
    import torch

    from compression.traffic import count_ids

    def count():
        counts = count_ids(data.train, specs)
        if backend is None or backend.collectives.world == 1:
            return counts
        return [backend.collectives.all_reduce(torch.from_numpy(of_table).to(backend.device)).cpu().numpy() for of_table in counts]

    return count if config.data.from_files else None


def build(
    config: Config, specs: list[TableSpec], rng, backend, device="cpu", choices=None, counts=None, to_load=False, plan_of=None, note=None
):
    """The trainer. Tables 0..T-1, bottom MLP, top MLP, as upstream draws them; device "meta": tables without numbers, nothing drawn for them.

    choices, counts, to_load: of compression.registry.create_tables;  plan_of: from the tables' parts to a Plan; None: make_plan
    note: gets a line about the plan of several ranks, before anything is allocated
    """
    from compression.choose import choose
    from compression.registry import create_tables
    from dlrm_xla.embeddings import EmbeddingCollection
    from dlrm_xla.models.dlrm import DLRM
    from dlrm_xla.optim import RULES
    from dlrm_xla.plan_report import summary
    from dlrm_xla.planner import make_plan
    from dlrm_xla.segments import table_parts
    from dlrm_xla.train import Trainer

    compat = config.upstream_compat
    replay_torch = config.method.kind in ("qr", "md") or (compat and (config.data.num_workers > 0 or config.data.bin_shuffle))
    created = create_tables(specs, config.method, rng, replay_torch, compat, choices or choose(specs, config.method), counts, to_load)
    layout, rule, plan = backend.layout(config.table_layout), RULES[config.train.optimizer](), None
    world = backend.collectives.world
    if world > 1:
        parts = table_parts(created, rule, config.model.weighted_pooling, world)
        plan = plan_of(parts) if plan_of else make_plan(parts, world, config.data.batch_size, config.ranks.sharding, room(config, created, rule))
        if note is not None:
            note(summary(plan))
    tables = EmbeddingCollection(created, config.model.weighted_pooling, rule, layout, device, plan, backend.collectives)
    model = DLRM(config.model, len(specs), config.loss.threshold, rng)
    return Trainer(config, backend.place(model), backend.place(tables), backend, frozen_pooling=compat and config.output.debug)


def beside(tables, rule) -> int:
    """Bytes of what tables have beside rows, optimizer state included: every rank has all of it."""
    trained = sum(parameter.nelement() for table in tables for parameter in table.parameters())
    kept = sum(buffer.nelement() * buffer.element_size() for table in tables for buffer in table.buffers())
    return 4 * trained * (1 + len(rule.dense_state)) + kept


def room(config: Config, tables, rule) -> int | None:
    """Bytes of --rank-memory that are left for rows. UserError where none are."""
    if config.ranks.rank_bytes is None:
        return None
    left = config.ranks.rank_bytes - beside(tables, rule)
    if left <= 0:
        raise UserError(f"--rank-memory={config.ranks.rank_bytes}: tables have {beside(tables, rule)} bytes beside rows on every rank; allow more")
    return left


def plan_only(config: Config, ranks: launch.Ranks, folder: str) -> None:
    """--plan-only: what each rank would hold and exchange. Tables are not allocated; of folders only --log-dir is made, for a picture."""
    if not ranks.first:
        return
    import numpy as np
    import torch

    from compression.choose import check_wish, choices_and_counts
    from compression.registry import create_tables
    from data_loaders.open import open_dataset
    from dlrm_xla import compile_report
    from dlrm_xla.console import Console
    from dlrm_xla.models.dlrm import DLRM
    from dlrm_xla.optim import RULES
    from dlrm_xla.plan_report import as_json, draw, lines
    from dlrm_xla.planner import make_plan
    from dlrm_xla.segments import table_parts
    from dlrm_xla.tracking import make_folder, writing

    if config.json_file:
        compile_report.check_writable(Path(config.json_file))
    world = config.ranks.plan_ranks or (ranks.world if ranks.world > 1 else launch.PLANNED)
    check_world(config, world)
    check_wish(config.method, config.train.optimizer, loading=True)
    torch.manual_seed(config.train.seed)
    rng = np.random.RandomState(config.train.seed)
    console = Console()
    data = open_dataset(config, rng, console.note)
    config = config.with_num_dense(data.num_dense)
    specs = table_specs(config, data)
    choices, counts = choices_and_counts(specs, config.method, counter(config, data, specs))
    tables = create_tables(specs, config.method, rng, False, config.upstream_compat, choices, counts, to_load=True)
    parts = table_parts(tables, RULES[config.train.optimizer](), config.model.weighted_pooling, world)
    model = DLRM(config.model, len(specs), config.loss.threshold, rng)
    dense = sum(parameter.numel() for module in (model, *tables) for parameter in module.parameters())
    rule = RULES[config.train.optimizer]()
    plan = make_plan(parts, world, config.data.batch_size, config.ranks.sharding, room(config, tables, rule))
    console.line("\n".join(lines(plan, dense)))
    if beside(tables, rule):
        console.line(f"beside rows, on every rank: {size_text(beside(tables, rule))} of dense parameters and codes of tables")
    if config.json_file:
        compile_report.write_json(Path(config.json_file), as_json(plan, dense))
    if folder:
        make_folder(Path(folder))
        with writing(Path(folder) / PICTURE):
            console.note(f"picture: {draw(plan, Path(folder) / PICTURE)}")


def compile_only(config: Config) -> int:
    """--compile-for: 0, or 1 where a step does not fit or copies what has a table's size. No folder is made and nothing runs."""
    import numpy as np
    import torch

    from compression.choose import check_wish, choices_and_counts
    from data_loaders.open import open_dataset
    from dlrm_xla import compile_for, compile_report, tpu_compiler
    from dlrm_xla.console import Console

    check_wish(config.method, config.train.optimizer, loading=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # the compiler's process and its files go with this one
    tpu_compiler.require()
    world = max(config.ranks.tpu_cores, 1)
    tpu_compiler.check_topology(config.compile_for, world)
    check_batches(config, world)
    if config.json_file:
        compile_report.check_writable(Path(config.json_file))
    torch.manual_seed(config.train.seed)
    rng = np.random.RandomState(config.train.seed)
    tracer = backends.make_tracer(world)
    console = Console()  # goes on where nobody reads stdout any more
    data = open_dataset(config, rng, console.note)
    config = config.with_num_dense(data.num_dense)
    specs = table_specs(config, data)
    choices, _ = choices_and_counts(specs, config.method, counter(config, data, specs))
    trainer = build(config, specs, rng, tracer, device="meta", choices=choices, to_load=True)
    train = None if config.inference_only else next(data.train.batches())
    steps = compile_for.compile_steps(trainer, tracer, train, next(data.test.batches(), None), config.compile_for, console.note)
    if config.json_file:
        compile_report.write_json(Path(config.json_file), compile_report.as_json(config, trainer.tables, steps))
    console.line("\n".join(compile_report.lines(config, trainer.tables, steps)))
    return 0 if all(step.passes for step in steps.values()) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
