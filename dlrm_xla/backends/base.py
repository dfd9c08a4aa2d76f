"""What the training loop asks of a device. A later backend (a successor of torch_xla) is one more file with these methods."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from dlrm_xla.backends.collectives import Collectives
from dlrm_xla.batch import Batch
from dlrm_xla.layouts import Layout
from dlrm_xla.ops.inplace import InPlace

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class StepBatch:
    """A batch on the device: the fields of Batch; valid [B, 1] float32, 1 for rows that count; num_counted, 0-D float32, how many of them
    the whole batch has, on all ranks together."""

    dense: Tensor
    ids: Tensor
    weights: Tensor | None
    labels: Tensor
    valid: Tensor
    num_counted: Tensor

    @classmethod
    def from_host(cls, batch: Batch) -> "StepBatch":
        """Of a batch that stays where it is."""
        return cls(batch.dense, batch.ids, batch.weights, batch.labels, batch.valid_mask(), torch.tensor(float(batch.num_counted)))

    @classmethod
    def from_packed(cls, floats: Tensor, ids: Tensor, weighted: bool) -> "StepBatch":
        """The slices of what Batch.pack made, wherever it has been sent since."""
        slots = ids.shape[1] if weighted else 0
        num_dense = floats.shape[1] - 2 - slots
        weights = floats[:, num_dense + 2 :] if weighted else None
        counts = floats[:, num_dense + 1 : num_dense + 2]
        labels, num_counted = floats[:, num_dense : num_dense + 1], counts.abs().max()  # amax() gives all numbers back on XLA
        return cls(floats[:, :num_dense], ids, weights, labels, counts.clamp(0, 1), num_counted)


class Backend(Protocol):
    """
    name         "cpu" | "cuda" | "xla"
    device       where tensors live
    collectives  what ranks tell each other (collectives.py)
    inplace      in-place arithmetic of dense parameters (ops/inplace.py)
    console      upstream's line about the device
    description  the hardware, for the run's records
    """

    name: str
    device: torch.device
    collectives: Collectives
    inplace: InPlace
    console: str
    description: str

    def layout(self, name: str) -> Layout:
        """name: "rows" | "packed", or "auto" for what suits the device."""

    def place(self, module: Module) -> Module:
        """The module with its parameters and buffers on the device."""

    def to_device(self, batch: Batch) -> StepBatch: ...

    def end_step(self) -> None:
        """Everything recorded since the last call may run now; returns without waiting for it."""

    def wait(self) -> None:
        """Returns when all work handed over so far is done."""

    def compiles(self) -> int | None:
        """Programs compiled so far; None where nothing compiles."""

    def fallbacks(self) -> dict[str, int]:
        """Operators that ran on the host instead, and how often."""

    def metrics_report(self) -> str:
        """--tpu-metrics-debug."""
