"""CPU and CUDA: PyTorch as it is."""

import platform

import torch

from dlrm_xla.backends.base import Module, StepBatch
from dlrm_xla.backends.collectives import Alone, Collectives
from dlrm_xla.backends.memory import keep_freed_memory
from dlrm_xla.batch import Batch
from dlrm_xla.layouts import Layout, PackedLayout, RowsLayout
from dlrm_xla.ops.inplace import ONE_KERNEL
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.specs import UserError


class EagerBackend:
    inplace = ONE_KERNEL

    def __init__(self, name: str, collectives: Collectives | None = None, device_number: int = 0):
        self.collectives = collectives or Alone()
        if name == "cuda" and not torch.cuda.is_available():
            raise UserError("--device=cuda: this PyTorch sees no CUDA device; use --device=cpu, or --device=auto to take what there is")
        self.name = name
        self.device = torch.device(name, device_number) if name == "cuda" else torch.device(name)
        if name == "cpu":
            keep_freed_memory()
        else:
            torch.backends.cudnn.deterministic = True
        self.console = "Using 1 GPU(s)..." if name == "cuda" else "Using CPU..."
        self.description = torch.cuda.get_device_name(self.device) if name == "cuda" else platform.processor() or platform.machine()

    def layout(self, name: str) -> Layout:
        # on CUDA every shape that depends on the data is a wait for the device
        return PackedLayout() if name == "packed" else RowsLayout(add_rows_scatter, ragged=self.name == "cpu")

    def place(self, module: Module) -> Module:
        return module.to(self.device)

    def to_device(self, batch: Batch) -> StepBatch:
        if self.name == "cpu":
            return StepBatch.from_host(batch)
        floats, ids = (part.pin_memory().to(self.device, non_blocking=True) for part in batch.pack())
        return StepBatch.from_packed(floats, ids, batch.weights is not None)

    def end_step(self) -> None:
        pass

    def wait(self) -> None:
        if self.name == "cuda":
            torch.cuda.synchronize()

    def compiles(self) -> int | None:
        return None

    def fallbacks(self) -> dict[str, int]:
        return {}

    def metrics_report(self) -> str:
        raise UserError("--tpu-metrics-debug: torch_xla's metrics exist on --device=xla only; leave it out")
