"""XLA through torch_xla: TPU, and the same programs on XLA's CPU backend (PJRT_DEVICE=CPU)."""

import gc
import logging
import os
import platform
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import torch
from torch import Tensor

from dlrm_xla.backends.base import Module, StepBatch
from dlrm_xla.backends.collectives import Alone, Collectives, Together
from dlrm_xla.backends.memory import keep_freed_memory
from dlrm_xla.batch import Batch
from dlrm_xla.layouts import Layout, PackedLayout, RowsLayout
from dlrm_xla.ops.inplace import PLAIN_OPERATORS
from dlrm_xla.ops.rows import add_rows_index
from dlrm_xla.specs import UserError

try:
    # without a TPU and without a choice of the user's, the CPU backend: torch_xla would look for a TPU and fail
    from dlrm_xla.backends import tpu_present

    if "PJRT_DEVICE" not in os.environ and not tpu_present():
        os.environ["PJRT_DEVICE"] = "CPU"
    import torch_xla
    import torch_xla.backends
    import torch_xla.core.xla_builder as xb
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met
    import torch_xla.distributed.xla_multiprocessing as xmp
    import torch_xla.runtime as xr
except ImportError as error:
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None


class XlaCollectives(Together):
    """Between the chips of a run: one collective of the program for each call, in the order of the calls.

    torch_xla keeps that order with a token: the number that one collective hands to the next, zero times what came out of it. It is added to what
    goes in, and an all-reduce sums it along: 4 bytes more than the values. Each end_step begins a new chain.
    """

    def __init__(self, rank: int, world: int):
        self.rank, self.world = rank, world

    def all_to_all(self, values: Tensor) -> Tensor:
        return xm.all_to_all(values, 0, 0, self.world)

    def all_gather(self, values: Tensor) -> Tensor:
        # with pinned layouts, the default, it is a sum of values padded by rank: another program on every rank, and world times the bytes
        return xm.all_gather(values, 0, groups=[list(range(self.world))], pin_layout=False)

    def all_reduce(self, values: Tensor) -> Tensor:
        # not xm.all_reduce: it leaves the collective out where this process alone would be the world, as it is when a program is only traced
        return torch_xla._XLAC._xla_all_reduce("sum", values, 1.0, [], True)


def _no_torch_xla() -> UserError:
    return UserError(
        f"--device=xla: torch_xla cannot be imported ({IMPORT_ERROR}); it has wheels for Linux x86-64 and Python 3.9 to 3.13 "
        f"and this is {platform.system()} {platform.machine()} with Python {sys.version_info[0]}.{sys.version_info[1]}; use --device=cpu"
    )


def spawn(fn: Callable[[int], None], num_cores: int) -> int:
    """Runs fn(index) in a process for each chip of this host, or in this process where num_cores is 1. 3 where one of them was killed; what fn
    exits with passes through.
    """
    if IMPORT_ERROR is not None:
        raise _no_torch_xla()
    try:
        xmp.spawn(fn, nprocs=1 if num_cores == 1 else None, start_method="spawn")
    except BrokenProcessPool:  # the others have said which
        return 3
    return 0


def place() -> tuple[int, int, int, int, str]:
    """Of a process that was spawned: rank, world, number on its host, processes on its host, address of rank 0. Starts the runtime."""
    rank, world, local_world = xr.global_ordinal(), xr.world_size(), xr.local_process_count() * xr.addressable_device_count()
    return rank, world, xr.local_ordinal(), min(local_world, world), xr.get_master_ip() if world > local_world else "127.0.0.1"


class XlaBackend:
    name = "xla"
    inplace = PLAIN_OPERATORS

    def __init__(self, collectives: Collectives | None = None):
        if IMPORT_ERROR is not None:
            raise _no_torch_xla()
        try:
            self.device = torch_xla.device()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--device=xla: PJRT_DEVICE={os.environ.get('PJRT_DEVICE')} does not start ({reason}); set it to TPU or CPU") from None
        if collectives is None:
            collectives = XlaCollectives(xr.global_ordinal(), xr.world_size()) if xr.world_size() > 1 else Alone()
        self.collectives = collectives
        # float32 products of float32 numbers: a TPU's own choice is one pass in bfloat16, which --matmul-precision=bfloat16 asks for by itself
        logging.getLogger("torch_xla.backends").setLevel(logging.ERROR)  # it warns of a second setting at the first one
        if torch_xla.backends.get_mat_mul_precision() != "highest":
            torch_xla.backends.set_mat_mul_precision("highest")
        self.hardware = xm.xla_device_hw(self.device)
        if self.hardware == "CPU":
            keep_freed_memory()
        self.console = f"Using XLA:{self.hardware}..."
        self.description = f"XLA:{self.hardware}"

    def layout(self, name: str) -> Layout:
        if name == "auto":
            name = "packed" if self.hardware == "TPU" else "rows"
        return PackedLayout() if name == "packed" else RowsLayout(add_rows_index, ragged=False)

    def place(self, module: Module) -> Module:
        return module.to(self.device)

    def to_device(self, batch: Batch) -> StepBatch:
        # two transfers a batch instead of four or five; ids stay int32 on the way
        floats, ids = (part.to(self.device) for part in batch.pack())
        return StepBatch.from_packed(floats, ids, batch.weights is not None)

    def end_step(self) -> None:
        torch_xla.sync()

    def wait(self) -> None:
        # sync alone waits for the dispatch only
        torch_xla.sync(wait=True)
        xm.wait_device_ops()

    def compiles(self) -> int | None:
        data = met.metric_data("CompileTime")
        return data[0] if data else 0

    def fallbacks(self) -> dict[str, int]:
        # _local_scalar_dense is the reading of a number, .item(), which has to end on the host
        return {name: met.counter_value(name) for name in met.counter_names() if name.startswith("aten::") and name != "aten::_local_scalar_dense"}

    def metrics_report(self) -> str:
        return met.metrics_report()


@dataclass(frozen=True)
class TracedStep:
    """A step as the program that a run would hand to the compiler.

    hlo         its text, before any optimization
    parameters  for each parameter its name in the state that was traced, "" for what the step itself sent
    donated     numbers of the parameters that the step replaces, whose memory the runtime gives to the program
    outputs     for each output the name in the state of what it replaces, "" for others
    arguments   for each parameter its value, in the host's memory; empty where they were not asked for
    """

    hlo: str
    parameters: tuple[str, ...]
    donated: tuple[int, ...]
    outputs: tuple[str, ...] = ()
    arguments: tuple[Tensor, ...] = ()


class XlaTracer(XlaBackend):
    """Hands out the programs of steps instead of running them. Tensors on "meta" become placeholders without memory; all others are real.

    It stands for a TPU: --table-layout=auto is the TPU's. Make it by backends.make_tracer. Replicas that are threads of one process must be traced
    one after the other: while one looks for what waits, it holds on to the others' tensors.

    collectives: XlaCollectives(0, W) makes it the first of W chips
    """

    def __init__(self, collectives: Collectives | None = None):
        super().__init__(collectives)
        self._names: dict[int, str] | None = None  # while a step is traced: data's number in torch_xla -> name
        self._state: dict[str, Tensor] = {}
        self._results: dict[str, Callable[[], Tensor]] | None = None
        self._traced: TracedStep | None = None

    def layout(self, name: str) -> Layout:
        return super().layout("packed" if name == "auto" else name)

    def place(self, module: Module) -> Module:
        for part in module.modules():
            for name, buffer in part.named_buffers(recurse=False):
                if buffer.is_meta:
                    setattr(part, name, xb.create_placeholder_tensor(buffer.shape, buffer.dtype))
        return super().place(module)

    def end_step(self) -> None:
        """Runs what has been recorded; while a step is traced: takes it down."""
        if self._names is None:
            # not torch_xla.sync(): of a step that was traced before, it would meet values that only C++ still holds, and crash on a placeholder
            torch_xla._XLAC._xla_sync_multi(_waiting_tensors(self.device), devices=[], wait=True, sync_xla_data=True)
            return
        outputs = _waiting_tensors(self.device)
        ids, data = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)
        parameters = tuple(self._names.get(number, "") for number in ids)
        names = list(self._state)
        replaced = torch_xla._XLAC._check_tensor_need_materialization(list(self._state.values()))
        changed = {name for name, new in zip(names, replaced, strict=True) if new}
        donated = tuple(number for number, name in enumerate(parameters) if name in changed)
        results = {name: get() for name, get in (self._results or {}).items()}
        by_identity = {id(tensor): name for name, tensor in (self._state | results).items()}
        replacing = tuple(by_identity.get(id(tensor), "") for tensor in outputs)
        arguments = () if self._results is None else tuple(tensor.cpu() for tensor in data)
        self._traced = TracedStep(torch_xla._XLAC._get_xla_tensors_hlo(outputs), parameters, donated, replacing, arguments)
        torch_xla._XLAC._set_all_reduce_token(str(self.device), None)  # as torch_xla.sync does: the next step's chain begins anew
        for tensor in outputs:  # nothing can compute it: without this, any later end_step in this process would crash
            torch_xla._XLAC._replace_xla_tensor(tensor, xb.create_placeholder_tensor(tensor.shape, tensor.dtype))

    def trace(
        self, step: Callable[[], object], state: dict[str, Tensor], results: dict[str, Callable[[], Tensor]] | None = None
    ) -> TracedStep:
        """The program of `step`, which calls end_step once. state: every tensor that lives from step to step, by a name for it.

        results: by name, what lives on as another tensor after each step. Given (it may be empty), the arguments' values are taken down too.
        Afterwards what the step changed is a placeholder.
        """
        self.end_step()  # whatever waits has a value now, and is no part of the step
        state, self._results = state | {name: get() for name, get in (results or {}).items()}, results
        numbers = [torch_xla._XLAC._get_tensors_xla_device_data_node([tensor])[0][0] for tensor in state.values()]
        self._names, self._state = dict(zip(numbers, state, strict=True)), state
        try:
            step()
        finally:
            self._names, self._state, self._results = None, {}, None
        return self._traced


def _waiting_tensors(device: torch.device) -> list[Tensor]:
    """Every tensor alive that has no value yet, in the order of their numbers: the runtime computes exactly these at the end of a step."""
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device == device]
    waiting = torch_xla._XLAC._check_tensor_need_materialization(alive)
    by_number = {torch_xla._XLAC._xla_get_tensor_id(tensor): tensor for tensor, wait in zip(alive, waiting, strict=True) if wait}
    return [by_number[number] for number in sorted(by_number)]
