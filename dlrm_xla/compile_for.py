"""--compile-for: the training step and the test step of a run, compiled by the real TPU compiler on a machine without a TPU, and judged.

The steps are traced with placeholders instead of tables, so tables of any size need no memory here. It fails where a program does not fit
into the chip's memory, or makes a copy of a table's size: then a step costs as much as the tables are large. Of several chips one is traced, for
all run the same program; what they send each other must be what the plan says.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, no_grad

from dlrm_xla import hlo, tpu_compiler
from dlrm_xla.batch import Batch, rank_part
from dlrm_xla.layouts import LANES
from dlrm_xla.sharding import EVERYWHERE
from dlrm_xla.stores import RowStore
from dlrm_xla.tpu_compiler import Compiled
from dlrm_xla.train import Trainer

if TYPE_CHECKING:  # backends.make_tracer chooses the device first
    from dlrm_xla.backends.xla import TracedStep, XlaTracer

# GiB that the compiler lets a program use on one chip: Y of its message "Used X of Y hbm", asked of libtpu 0.0.21 with a program too large
USABLE_GIB = {"v4": 30.75, "v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
LEAST_BYTES = 1 << 20  # a smaller buffer is no table: copying it costs a microsecond, and its size says little about whose copy it is
MEMORY = ("tables", "row state", "codes", "dense", "dense state", "batch and constants", "outputs", "temporaries", "code", "beside the program")

Counts = dict[str, tuple[int, dict[str, int]]]  # kind of collective -> how many, and bytes by type

# names of Plan.volumes
IDS, VECTORS, GRADIENTS = "ids, all-to-all", "vectors, all-to-all", "gradients of vectors, all-to-all"
SUMS, COPIES, COPY_GRADIENTS = "sums of gradients, all-reduce", "row numbers of copies, all-gather", "gradients of copies, all-gather"


@dataclass(frozen=True)
class StepReport:
    """One program.

    error        "" or why it does not compile;  used, usable: GiB, from the compiler's message where memory is the reason
    memory       bytes by MEMORY: parameters by what they are, padding included; outputs that take over no input's memory; what else lies on the chip.
                 Of a program that does not fit: parameters without padding, and the temporaries that the compiler's message names
    layouts      buffer name -> its type in the compiled program;  padding: bytes of buffers beyond their numbers
    copies       what it makes of a table's size in the chip's large memory;  moved: bytes through on-chip memory
    collectives  what one chip hands to the others, by kind
    not_donated  buffers that the step changes and that got other memory for their new contents
    planned      of several chips what the plan says of `collectives`: kind -> how many, and bytes by type; None: there is no plan
    """

    error: str
    used: float | None
    usable: float
    seconds: float
    memory: dict[str, int]
    layouts: dict[str, str]
    padding: int
    copies: list[hlo.Made]
    moved: int
    collectives: dict[str, hlo.Sent]
    not_donated: list[str]
    planned: dict[str, tuple[int, dict[str, int]]] | None

    @property
    def sent(self) -> "Counts":
        return {kind: (one.count, one.bytes) for kind, one in self.collectives.items()}

    @property
    def unplanned(self) -> list[str]:
        """The kinds of collectives that are not as planned."""
        if self.error or self.planned is None:
            return []
        sent = _with_gathers(self.sent, self.planned)
        return sorted(kind for kind in sent.keys() | self.planned.keys() if sent.get(kind) != self.planned.get(kind))

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def passes(self) -> bool:
        sound = not self.copies and not self.not_donated and not self.unplanned
        return not self.error and sound and self.total <= self.usable * 2**30


def _with_gathers(sent: Counts, planned: Counts) -> Counts:
    """`sent` with an all-gather where libtpu has made a small one an all-reduce of zeros and each chip's share: as many times the bytes as chips."""
    (gathers, wanted), (sums, wanted_sums) = (planned.get(kind, (0, {})) for kind in ("all-gather", "all-reduce"))
    (num_gathers, gathered), (num_sums, summed) = (sent.get(kind, (0, {})) for kind in ("all-gather", "all-reduce"))
    gathered, summed = dict(gathered), dict(summed)
    for dtype, size in wanted.items():
        missing, more = size - gathered.get(dtype, 0), summed.get(dtype, 0) - wanted_sums.get(dtype, 0)
        if 0 < missing < more and more % missing == 0 and num_sums > sums and num_gathers < gathers:
            gathered[dtype], summed[dtype] = size, summed[dtype] - more
            num_gathers, num_sums = num_gathers + 1, num_sums - 1
    found = dict(sent) | {"all-gather": (num_gathers, gathered), "all-reduce": (num_sums, {dtype: size for dtype, size in summed.items() if size})}
    return {kind: what for kind, what in found.items() if what[0]}


def state_of(trainer: Trainer) -> dict[str, Tensor]:
    """Every tensor that lives on the device from step to step: "KIND:NAME" with the kinds of MEMORY."""
    state = {}
    for index, store in enumerate(trainer.tables.stores):
        for name, buffer in store.named_buffers(recurse=False):
            state[f"{'tables' if name in ('data', 'scale', 'floats') else 'row state'}:store{index}.{name}"] = buffer
    for table in trainer.tables.tables:
        trained = {name for name, _ in table.named_parameters()}
        kept = table.state_dict(keep_vars=True)
        state |= {f"codes:{table.spec.name}.{name}": buffer for name, buffer in kept.items() if name not in trained}
    names = {id(parameter): name for module in (trainer.model, trainer.tables) for name, parameter in module.named_parameters()}
    for parameter, parts in zip(trainer.dense.parameters, trainer.dense.state, strict=True):
        state[f"dense:{names[id(parameter)]}"] = parameter
        state |= {f"dense state:{names[id(parameter)]}.{name}": value for name, value in parts.items()}
    return state


def trace_steps(
    trainer: Trainer, tracer: "XlaTracer", train: Batch | None, test: Batch | None, results: dict[str, Callable[[], Tensor]] | None = None
) -> dict[str, "TracedStep"]:
    """The programs "test step" and "training step" of the batches that are there. The trainer is spent afterwards.

    results: of XlaTracer.trace, for programs that will be run
    """
    steps = {}
    if test is not None:

        @no_grad()
        def test_step():
            # as evaluate.predict, which would wait for the values
            batch = tracer.to_device(test)
            prediction = trainer.forward(batch)
            if tracer.collectives.world > 1:
                prediction = tracer.collectives.all_gather(torch.cat([prediction, batch.labels, batch.valid], 1))
            tracer.end_step()
            return prediction

        steps["test step"] = tracer.trace(test_step, state_of(trainer), results)
    if train is not None:

        def training_step():
            trainer.step(tracer.to_device(train), 0, last_of_epoch=False)

        steps["training step"] = tracer.trace(training_step, state_of(trainer), results)
    return steps


def compile_steps(
    trainer: Trainer, tracer: "XlaTracer", train: Batch | None, test: Batch | None, topology: str, note: Callable[[str], None]
) -> dict[str, StepReport]:
    """By step. UserError for a topology that the compiler does not know. train, test: whole batches; of several chips the first one is traced."""
    world, state = tracer.collectives.world, state_of(trainer)
    train, test = (batch if batch is None or world == 1 else rank_part(batch, 0, world) for batch in (train, test))
    sizes = {name: tensor.nelement() * tensor.element_size() for name, tensor in state.items()}
    stores = list(trainer.tables.stores)
    steps = trace_steps(trainer, tracer, train, test)
    programs = {name: (step.hlo, step.donated) for name, step in steps.items()}
    compiled = tpu_compiler.compile_programs(topology, programs, note, replicas=world)
    usable = USABLE_GIB[topology.split(":")[0]]
    planned = planned_collectives(trainer, None if train is None else world * train.size, None if test is None else world * test.size)
    return {name: judge(step, compiled[name], stores, sizes, usable, planned[name]) for name, step in steps.items()}


def planned_collectives(trainer: Trainer, batch: int | None, test_batch: int | None) -> dict[str, dict[str, tuple[int, dict[str, int]]] | None]:
    """By step, then as StepReport.planned. batch, test_batch: rows of the whole batches."""
    plan, found = trainer.tables.plan, {}
    if plan is None:
        return {"training step": None, "test step": None}
    exchanged = 1 if any(place != EVERYWHERE for place in plan.where) else 0
    if batch is not None:
        sizes = plan.volumes(sum(parameter.nelement() for parameter in trainer.dense.parameters), batch)
        gathered = [store for store in range(plan.num_stores) if plan.replicated(store) and not plan.sums_densely(store)]
        found["training step"] = {
            "all-to-all": (3 * exchanged, {"s32": sizes[IDS], "f32": sizes[VECTORS] + sizes[GRADIENTS]}),
            "all-reduce": (1, {"f32": sizes[SUMS]}),
            "all-gather": (2 * len(gathered), {"s32": sizes[COPIES], "f32": sizes[COPY_GRADIENTS]}),
        }
    if test_batch is not None:
        sizes = plan.volumes(0, test_batch)
        found["test step"] = {
            "all-to-all": (2 * exchanged, {"s32": sizes[IDS], "f32": sizes[VECTORS]}),
            "all-gather": (1, {"f32": 3 * 4 * (test_batch // plan.world)}),  # predictions, labels, which of them count
        }
    return {name: {kind: what for kind, what in kinds.items() if what[0]} for name, kinds in found.items()}


def judge(
    step: "TracedStep",
    compiled: Compiled,
    stores: list[RowStore],
    sizes: dict[str, int],
    usable: float,
    planned: dict[str, tuple[int, dict[str, int]]] | None = None,
) -> StepReport:
    """sizes: bytes of every tensor of state_of, without padding; planned: of StepReport, None for one chip alone."""
    if compiled.error:
        return _without_program(step, compiled, stores, sizes, usable)
    types = hlo.parameters(compiled.text)
    arrays = dict(zip(step.parameters, types, strict=True))
    layouts, padding = {}, 0
    for name, array in arrays.items():
        kind, _, short = name.partition(":")
        if kind in ("tables", "row state"):
            layouts[short] = str(array)
            padding += array.padded_bytes - 4 * sum(_numbers(short, stores))
        elif kind == "codes":
            padding += array.padded_bytes - array.bytes
    padded = _by_kind({name: array.padded_bytes for name, array in arrays.items() if name}, stores)
    padded["batch and constants"] = compiled.arguments - sum(padded.values())
    padded["outputs"] = compiled.outputs - compiled.aliased
    padded["temporaries"], padded["code"] = compiled.temporaries, compiled.code
    padded["beside the program"] = sum(size for name, size in sizes.items() if name not in step.parameters)
    buffers = [(sizes[name] // 4, sizes[name]) for name in sizes if name.startswith(("tables", "row state", "codes"))]
    large = {elements for elements, size in buffers if size >= LEAST_BYTES}
    batch = max(array.elements for name, array in zip(step.parameters, types, strict=True) if not name) * LANES
    limit = max(max((elements for elements, _ in buffers), default=0) // 4, 4 * batch, LEAST_BYTES // 4)
    copies, moved = hlo.table_sized(compiled.text, large, limit)
    kept = hlo.donated(compiled.text)
    lost = [step.parameters[number].partition(":")[2] for number in step.donated if number not in kept]
    lost = [name for name in lost if name in layouts]
    sent = hlo.collectives(compiled.text)
    return StepReport("", None, usable, compiled.seconds, padded, layouts, padding, copies, moved, sent, lost, planned)


def _without_program(step: "TracedStep", compiled: Compiled, stores: list[RowStore], sizes: dict[str, int], usable: float) -> StepReport:
    """Of a program that does not compile, from the compiler's message."""
    numbers = re.search(r"Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm", compiled.error)
    used, memory = None, {}
    if numbers:
        used, usable = _gib(numbers[1], numbers[2]), _gib(numbers[3], numbers[4])
        memory = _by_kind({name: sizes[name] for name in step.parameters if name}, stores)
        temporaries = re.search(r"HLO temp +([\d.]+)([KMGT]?)", compiled.error)
        memory["temporaries"] = int(_gib(temporaries[1], temporaries[2]) * 2**30) if temporaries else 0
    return StepReport(" ".join(compiled.error.split())[:300], used, usable, compiled.seconds, memory, {}, 0, [], 0, {}, [], None)


def _by_kind(sizes: dict[str, int], stores: list[RowStore]) -> dict[str, int]:
    """Bytes of a program's parameters, by their names in state_of, added up by MEMORY. A record and a packed buffer hold the rows' state too."""
    found = dict.fromkeys(MEMORY, 0)
    for name, size in sizes.items():
        kind, _, short = name.partition(":")
        if kind == "tables":
            weights, others = _numbers(short, stores)
            found["row state"] += size - size * weights // (weights + others)
            size = size * weights // (weights + others)
        found[kind] += size
    return found


def _numbers(short: str, stores: list[RowStore]) -> tuple[int, int]:
    """Weights and other numbers of the buffer "storeI.NAME"."""
    store, _, buffer = short.partition(".")
    return stores[int(store.removeprefix("store"))].numbers(buffer)


def _gib(number: str, unit: str) -> float:
    return float(number) * {"": 2**-30, "K": 2**-20, "M": 2**-10, "G": 1.0, "T": 2.0**10}[unit]
