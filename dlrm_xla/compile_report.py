"""What --compile-for says: a page for people, the same as JSON."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from dlrm_xla import hlo
from dlrm_xla.compile_for import LEAST_BYTES, MEMORY, StepReport
from dlrm_xla.config import Config
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import LANES, lane_stride
from dlrm_xla.specs import UserError, size_text
from dlrm_xla.stores import RowStore
from dlrm_xla.tpu_compiler import VERSIONS

LINE_BYTES = 4 * LANES  # the least of a float32 table that a TPU's memory hands over: one line of a tile of 8 x 128
SHARE_BYTES = 100e6  # temporaries are compared with tables from this size on: beside smaller ones a batch is large, whatever the program does
MOVES = 3  # of a row in a training step: read to look it up, read and written to update it
WORDS = {
    "tables": "tables", "row state": "optimizer state of rows", "codes": "codes, pointers, seeds", "dense": "dense parameters",
    "dense state": "optimizer state of dense",
    "batch and constants": "batch and constants", "outputs": "outputs not in place", "temporaries": "temporaries", "code": "code",
    "beside the program": "on the chip, not used",
}  # fmt: skip

TYPE_WORDS = {"s32": "ids", "f32": "numbers"}


def check_writable(path: Path) -> None:
    """UserError before minutes of compiling are lost."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "is a folder")
        if path.exists() and not path.is_file():
            raise OSError(0, "is no ordinary file")
        beside = _beside(path)
        beside.write_text("")
        beside.unlink()
    except OSError as error:
        raise UserError(f"--json={path}: cannot be written ({error.strerror}); name a file in a folder that exists") from None


def write_json(path: Path, report: dict) -> None:
    """Whole or not at all."""
    _beside(path).write_text(json.dumps(report, indent=1) + "\n")
    os.replace(_beside(path), path.resolve())


def _beside(path: Path) -> Path:
    """In the folder where the file itself lies, should `path` be a link to it."""
    path = path.resolve()
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def lines(config: Config, tables: EmbeddingCollection, steps: dict[str, StepReport]) -> list[str]:
    """The page."""
    data, auto, plan = config.data, config.table_layout == "auto", tables.plan
    chips = "one chip" if plan is None else f"{plan.world} chips, all figures of one of them"
    batches = f"{config.train.optimizer}, batches of {data.batch_size} (test {data.test_batch_size})"
    if config.inference_only:
        batches = f"test batches of {data.test_batch_size}"
    page = [
        f"compiled for {config.compile_for}, {chips}, by libtpu {VERSIONS['libtpu']}: {batches}",
        f"tables: {tables.describe()}{', the choice of --table-layout=auto for a TPU' if auto else ''}",
        "",
    ]
    failed = {name: step for name, step in steps.items() if step.error}
    for name, step in failed.items():
        if step.used is not None:
            page += [_does_not_fit(name, step.used, step.usable), _largest(step)]
        else:
            page.append(f"{name}: DOES NOT COMPILE: {step.error}")
    good = {name: step for name, step in steps.items() if not step.error}
    if good:
        page += _memory(good)
    for name, step in good.items():
        page += _faults(name, step)
    layouts = {name: text for step in good.values() for name, text in step.layouts.items()}
    if layouts:
        page += ["", "bytes that one lookup moves between the chip and its memory (512 bytes at a time):"]
        page += [_lookup_line(index, store, layouts[f"store{index}.data"], config.inference_only) for index, store in enumerate(tables.stores)]
    if any(step.used is not None or step.total > step.usable * 2**30 for step in steps.values()):
        page += ["", f"to make it fit: {_ways_out(config, tables, steps)}"]
    passed = all(step.passes for step in steps.values())
    page += ["", "result: " + ("it fits and no step copies a table" if passed else "FAILED, see above")]
    return page


def _does_not_fit(name: str, needed: float, usable: float) -> str:
    return f"{name}: DOES NOT FIT: needs {needed:.2f} GiB and {usable:.2f} GiB can be used"


def _largest(step: StepReport) -> str:
    """Of a program that does not fit."""
    kinds = [kind for kind in MEMORY if step.memory[kind] or kind in ("tables", "row state", "temporaries")]
    return f"  {', '.join(f'{WORDS[kind]} {size_text(step.memory[kind])}' for kind in kinds)}; {size_text(step.usable * 2**30)} can be used"


def _ways_out(config: Config, tables: EmbeddingCollection, steps: dict[str, StepReport]) -> str:
    """Flags, those first that keep every number."""
    ways = ["--table-layout=packed (rows are padded or copied without it)"] if tables.layout.name == "rows" else []
    if any(step.memory.get("temporaries", 0) > step.memory.get("tables", 0) for step in steps.values()):
        ways.append("smaller batches (--mini-batch-size, --test-mini-batch-size)")
    ways.append(f"fewer rows ({'--max-ind-range' if config.data.from_files else '--arch-embedding-size'}, --qr-flag)")
    ways.append("shorter rows (--arch-sparse-feature-size, --md-flag)")
    if config.train.optimizer != "sgd":
        ways.append(f"less state a row (--optimizer={'rwsadagrad or sgd' if config.train.optimizer == 'adagrad' else 'sgd'})")
    return ", ".join(ways)


def _memory(steps: dict[str, StepReport]) -> list[str]:
    width = 26
    rows = [" " * width + "".join(f"{name:>16}" for name in steps)]
    for kind in MEMORY:
        rows.append(f"{WORDS[kind]:<{width}}" + "".join(f"{size_text(step.memory[kind]):>16}" for step in steps.values()))
    rows.append(f"{'total':<{width}}" + "".join(f"{size_text(step.total):>16}" for step in steps.values()))
    limit = next(iter(steps.values())).usable
    share = f"{f'of {limit:.2f} GiB to use':<{width}}"
    rows.append(share + "".join(f"{100 * step.total / (step.usable * 2**30):>14.1f} %" for step in steps.values()))
    if all(step.memory["tables"] >= SHARE_BYTES for step in steps.values()):
        shares = [100 * step.memory["temporaries"] / step.memory["tables"] for step in steps.values()]
        rows.append(f"{'temporaries / tables':<{width}}" + "".join(f"{share:>14.1f} %" for share in shares))
    rows.append(f"{'padding of tables, state':<{width}}" + "".join(f"{size_text(step.padding):>16}" for step in steps.values()))
    rows.append(f"{'through on-chip memory':<{width}}" + "".join(f"{size_text(step.moved):>16}" for step in steps.values()))
    rows.append(f"{'seconds to compile':<{width}}" + "".join(f"{step.seconds:>16.1f}" for step in steps.values()))
    return rows


def _faults(name: str, step: StepReport) -> list[str]:
    made = [f"{copy.op} {copy.name} {copy.array} {size_text(copy.array.padded_bytes)}" for copy in step.copies]
    more = [f"and {len(made) - 3} more"] if len(made) > 3 else []
    page = [f"{name}: copies of a table's size: {'; '.join(made[:3] + more) or f'none of {LEAST_BYTES >> 20} MiB or more'}"]
    if step.not_donated:
        page.append(f"{name}: NOT UPDATED IN PLACE: {', '.join(step.not_donated)}")
    if step.total > step.usable * 2**30:
        page.append(_does_not_fit(name, step.total / 2**30, step.usable))
    sent = ", ".join(_sent(kind, one) for kind, one in step.collectives.items())
    return [*page, f"{name}: sent to other chips: {sent or 'nothing'}", *_plan_lines(name, step)]


def _sent(kind: str, one: hlo.Sent) -> str:
    sizes = " and ".join(f"{size_text(size)} of {TYPE_WORDS.get(dtype, dtype)}" for dtype, size in one.bytes.items())
    return f"{one.count} {kind} ({sizes}{f', {one.tokens} bytes that keep order' if one.tokens else ''})"


def _plan_lines(name: str, step: StepReport) -> list[str]:
    """Of several chips whether they send each other what the plan says."""
    if step.planned is None:
        return []
    if not step.unplanned:
        same = step.sent == step.planned
        return [f"{name}: as the plan says, {'to the byte' if same else 'but for small all-gathers that libtpu has made all-reduces'}"]
    kinds = []
    for kind in step.unplanned:
        count, sizes = step.planned.get(kind, (0, {}))
        kinds.append(f"{count} {kind} of {', '.join(f'{size:,} bytes of {dtype}' for dtype, size in sizes.items()) or '0 bytes'}")
    return [f"{name}: NOT AS PLANNED: the plan has {'; '.join(kinds)}"]


def bytes_a_lookup(store: RowStore, layout: str, array: hlo.Array | None) -> int:
    """Of one row's record, from the compiled type of its buffer, or (None) as the compiler lays out such a buffer of its own choice.

    A buffer whose fastest dimension is the rows has each number of a record in another line. The compiler chooses that for records of
    fewer than 128 numbers, which would fill up lines otherwise.
    """
    record = store.record_width
    if layout == "packed":
        return LINE_BYTES * max(1, lane_stride(record) // LANES)
    across = record < LANES if array is None else array.order[0] == 0
    return LINE_BYTES * (record if across else -(-record // LANES))


def _lookup_line(index: int, store: RowStore, text: str, inference_only: bool) -> str:
    here, other = _moves(store, text)
    name = "rows" if store.layout.name == "packed" else "packed"
    update, of_other = ("", "") if inference_only else (f" ({MOVES * here:,} with the update)", f" ({MOVES * other:,})")
    return f"  store {index}: {store.num_rows:,} x {store.record_width} {text}: {here:,}{update}; with --table-layout={name}: {other:,}{of_other}"


def _moves(store: RowStore, text: str) -> tuple[int, int]:
    """By the compiled layout, and by the other one."""
    layout = store.layout.name
    return bytes_a_lookup(store, layout, hlo.arrays(text)[0]), bytes_a_lookup(store, "rows" if layout == "packed" else "packed", None)


def as_json(config: Config, tables: EmbeddingCollection, steps: dict[str, StepReport]) -> dict:
    """Bytes; GiB for used and usable, as the compiler speaks."""
    report = {
        "compile_for": config.compile_for, "chips": tables.plan.world if tables.plan else 1, "versions": VERSIONS,
        "optimizer": config.train.optimizer, "batch_size": config.data.batch_size, "test_batch_size": config.data.test_batch_size,
        "table_layout": tables.layout.name, "passes": all(step.passes for step in steps.values()), "steps": {}, "stores": [],
    }  # fmt: skip
    for name, step in steps.items():
        report["steps"][name] = {**asdict(step), "total": step.total, "passes": step.passes}
        for copy, made in zip(report["steps"][name]["copies"], step.copies, strict=True):
            copy |= {"array": str(made.array), "bytes": made.array.padded_bytes}
    layouts = {name: text for step in steps.values() for name, text in step.layouts.items()}
    for index, store in enumerate(tables.stores):
        here, other = _moves(store, layouts[f"store{index}.data"]) if layouts else (None, None)
        report["stores"].append(
            {"rows": store.num_rows, "width": store.width, "record_width": store.record_width, "bytes_a_lookup": here, "other_layout": other}
        )
    return report
