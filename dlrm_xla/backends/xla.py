"""XLA through torch_xla: TPU, and the same programs on XLA's CPU backend (PJRT_DEVICE=CPU)."""

import gc
import logging
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from dlrm_xla.backends.base import Module, StepBatch
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
except ImportError as error:
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None


class XlaBackend:
    name = "xla"
    inplace = PLAIN_OPERATORS

    def __init__(self):
        if IMPORT_ERROR is not None:
            raise UserError(
                f"--device=xla: torch_xla cannot be imported ({IMPORT_ERROR}); it has wheels for Linux x86-64 and Python 3.9 to 3.13 "
                f"and this is {platform.system()} {platform.machine()} with Python {sys.version_info[0]}.{sys.version_info[1]}; use --device=cpu"
            )
        try:
            self.device = torch_xla.device()
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"--device=xla: PJRT_DEVICE={os.environ.get('PJRT_DEVICE')} does not start ({reason}); set it to TPU or CPU") from None
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
    """

    hlo: str
    parameters: tuple[str, ...]
    donated: tuple[int, ...]


class XlaTracer(XlaBackend):
    """Hands out the programs of steps instead of running them. Tensors on "meta" become placeholders without memory; all others are real.

    It stands for a TPU: --table-layout=auto is the TPU's. Make it by backends.make_tracer.
    """

    def __init__(self):
        super().__init__()
        self._names: dict[int, str] | None = None  # while a step is traced: data's number in torch_xla -> name
        self._state: dict[str, Tensor] = {}
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
            torch_xla._XLAC._xla_sync_multi(_waiting_tensors(), devices=[], wait=True, sync_xla_data=True)
            return
        outputs = _waiting_tensors()
        ids = torch_xla._XLAC._get_tensors_xla_device_data_node(outputs)[0]
        parameters = tuple(self._names.get(number, "") for number in ids)
        names = list(self._state)
        replaced = torch_xla._XLAC._check_tensor_need_materialization(list(self._state.values()))
        changed = {name for name, new in zip(names, replaced, strict=True) if new}
        donated = tuple(number for number, name in enumerate(parameters) if name in changed)
        self._traced = TracedStep(torch_xla._XLAC._get_xla_tensors_hlo(outputs), parameters, donated)
        for tensor in outputs:  # nothing can compute it: without this, any later end_step in this process would crash
            torch_xla._XLAC._replace_xla_tensor(tensor, xb.create_placeholder_tensor(tensor.shape, tensor.dtype))

    def trace(self, step: Callable[[], object], state: dict[str, Tensor]) -> TracedStep:
        """The program of `step`, which calls end_step once. state: every tensor that lives from step to step, by a name for it.

        Afterwards what the step changed is a placeholder.
        """
        self.end_step()  # whatever waits has a value now, and is no part of the step
        numbers = [torch_xla._XLAC._get_tensors_xla_device_data_node([tensor])[0][0] for tensor in state.values()]
        self._names, self._state = dict(zip(numbers, state, strict=True)), state
        try:
            step()
        finally:
            self._names, self._state = None, {}
        return self._traced


def _waiting_tensors() -> list[Tensor]:
    """Every tensor alive that has no value yet, in the order of their numbers: the runtime computes exactly these at the end of a step."""
    alive = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor) and thing.device.type == "xla"]
    waiting = torch_xla._XLAC._check_tensor_need_materialization(alive)
    by_number = {torch_xla._XLAC._xla_get_tensor_id(tensor): tensor for tensor, wait in zip(alive, waiting, strict=True) if wait}
    return [by_number[number] for number in sorted(by_number)]
