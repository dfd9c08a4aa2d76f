"""XLA through torch_xla: TPU, and the same programs on XLA's CPU backend (PJRT_DEVICE=CPU)."""

import logging
import os
import platform
import sys

from dlrm_xla.backends.base import Module, StepBatch
from dlrm_xla.backends.memory import keep_freed_memory
from dlrm_xla.batch import Batch
from dlrm_xla.layouts import Layout, PackedLayout, RowsLayout
from dlrm_xla.ops.rows import add_rows_index
from dlrm_xla.specs import UserError

try:
    # without a TPU and without a choice of the user's, the CPU backend: torch_xla would look for a TPU and fail
    from dlrm_xla.backends import tpu_present

    if "PJRT_DEVICE" not in os.environ and not tpu_present():
        os.environ["PJRT_DEVICE"] = "CPU"
    import torch_xla
    import torch_xla.backends
    import torch_xla.core.xla_model as xm
    import torch_xla.debug.metrics as met
except ImportError as error:
    IMPORT_ERROR: ImportError | None = error
else:
    IMPORT_ERROR = None


class XlaBackend:
    name = "xla"

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


