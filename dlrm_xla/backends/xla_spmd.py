"""--spmd: one process drives all chips of the machine. The step is the single-chip one; XLA's partitioner (GSPMD) cuts it up as tensors are marked:

    stores' buffers               by rows (packed: by lines): chip i of n has rows [i V / n, (i + 1) V / n), V rounded up to a multiple of n
    ids, row numbers              whole on every chip: each reads and updates its own rows, and no table travels
    dense features, labels, loss  by rows of the batch, and with them the MLPs' activations
    everything else               whole: dense parameters and their state, codes, the loss meter

What travels in a step is what was read (a sum over chips, of which all but one give zero), its gradients, and the gradients of dense parameters.
A table that is whole on each chip, with ids by rows of the batch, would be summed over the chips in every step; nothing here is marked so.
"""

import os

import numpy as np
import torch
from torch import Tensor

# before torch_xla is loaded: XLA warns at each program that this partitioner will have a successor
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from dlrm_xla.backends.base import Module, StepBatch  # noqa: E402
from dlrm_xla.backends.collectives import Alone  # noqa: E402
from dlrm_xla.backends.xla import IMPORT_ERROR, XlaBackend  # noqa: E402
from dlrm_xla.batch import Batch  # noqa: E402
from dlrm_xla.layouts import Fields, Layout, Region  # noqa: E402
from dlrm_xla.specs import UserError  # noqa: E402

if IMPORT_ERROR is None:
    import torch_xla
    import torch_xla.distributed.spmd as xs
    import torch_xla.runtime as xr


class Chips:
    """Where the parts of tensors lie. `split` and `whole` mark the tensor itself, with a value or in the graph, and return it."""

    def __init__(self, device: torch.device):
        self.count = xr.global_runtime_device_count()
        self.mesh = xs.Mesh(np.arange(self.count), (self.count,))
        # of each type of row numbers: a chip's own number, as data
        self.numbers = {dtype: self.split(torch.arange(self.count, dtype=dtype).to(device)) for dtype in (torch.int32, torch.int64)}

    def split(self, tensor: Tensor) -> Tensor:
        """A part of the rows on each chip."""
        return self._mark(tensor, self._by_rows(tensor))

    def whole(self, tensor: Tensor) -> Tensor:
        """All of it on every chip."""
        return self._mark(tensor, self.mesh.get_op_sharding((None,) * tensor.dim()))

    def enter(self, tensor: Tensor) -> Tensor:
        """Of a tensor that is split: a chip's own part. Operators work on it without a look at the others, until `leave`."""
        return torch_xla._XLAC._spmd_full_to_shard_shape(self.split(tensor))

    def leave(self, part: Tensor) -> Tensor:
        """The tensor that all chips' parts are, split."""
        torch_xla._XLAC._mark_manual_sharding(part, torch_xla._XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL))
        shape = (self.count * part.shape[0], *part.shape[1:])
        return torch_xla._XLAC._spmd_shard_to_full_shape(part, self._by_rows(part), shape, part.dtype)

    def _by_rows(self, tensor: Tensor):
        return self.mesh.get_op_sharding((0, *(None,) * (tensor.dim() - 1)))

    def _mark(self, tensor: Tensor, sharding) -> Tensor:
        torch_xla._XLAC._xla_mark_sharding(tensor, sharding)  # xs.mark_sharding would wrap the tensor in a class of its own
        return tensor


class SplitLayout:
    """A layout whose buffers are split by rows."""

    def __init__(self, inner: Layout, chips: Chips):
        self.inner, self.chips = inner, chips
        self.name, self.index_dtype, self.ragged, self.sorts = inner.name, inner.index_dtype, inner.ragged, inner.sorts

    def regions(self, num_rows: int, fields: Fields) -> tuple[dict[str, tuple[int, ...]], dict[str, Region]]:
        return self.inner.regions(num_rows, fields)

    def gather(self, buffer: Tensor, region: Region, rows: Tensor) -> Tensor:
        """Every chip is asked for all rows and gives zero for those it has not.

        Left to itself the partitioner sums what index_select reads over the chips: whole lines of 128 lanes where the layout is packed, 8 times
        the bytes at width 16. So each chip picks the lanes first.
        """
        chips = self.chips
        asked = chips.split(chips.whole(rows).expand(chips.count, -1).reshape(-1))  # [n K]
        found = self.inner.gather(_OwnRows(buffer, chips), region, asked)
        return chips.whole(found.view(chips.count, rows.shape[0], *found.shape[1:]).sum(0, dtype=found.dtype))

    def add(self, buffer: Tensor, region: Region, rows: Tensor, values: Tensor) -> None:
        # values by rows of the batch would make each chip add to a whole table, and a sum of tables over the chips
        self.inner.add(buffer, region, self.chips.whole(rows), self.chips.whole(values))

    def add_rows(self, target: Tensor, rows: Tensor, values: Tensor) -> None:
        self.inner.add_rows(target, rows, self.chips.whole(values))
        self.chips.whole(target)

    def as_rows(self, buffer: Tensor, region: Region, num_rows: int) -> Tensor:
        return self.inner.as_rows(buffer, region, num_rows)

    def to_host(self, buffer: Tensor) -> Tensor:
        """Part by part: reading the tensor itself is a program that puts all of it on every chip."""
        if buffer.device.type == "cpu":
            return buffer
        (parts,) = torch_xla._XLAC._get_local_shards([buffer])
        return torch.cat([part for part, _ in parts])[: buffer.shape[0]]

    def from_host(self, buffer: Tensor, values: Tensor) -> None:
        """By a tensor that is split on its way: copy_ sends all of it to every chip, and there it stays."""
        torch_xla._XLAC._replace_xla_tensor(buffer, self.chips.split(values.to(buffer.device)))


class _OwnRows:
    """A split buffer as far as a layout's gather goes, on each chip for itself."""

    def __init__(self, buffer: Tensor, chips: Chips):
        self.buffer, self.chips = buffer, chips

    def index_select(self, dim: int, rows: Tensor) -> Tensor:
        """rows [n K] split, K of them on each chip -> [n K, ...] split: zero where a row is not the chip's.

        Between enter and leave is as little as can be: with the choice of lanes there too, libtpu 0.0.21 died of a division by zero.
        """
        part, rows, number = (self.chips.enter(tensor) for tensor in (self.buffer, rows, self.chips.numbers[rows.dtype]))
        own = rows - number * part.shape[0]
        mine = (own >= 0) & (own < part.shape[0])
        found = part.index_select(dim, own.clamp(0, part.shape[0] - 1))
        return self.chips.leave(torch.where(mine.view(-1, *(1,) * (found.dim() - 1)), found, 0))


class SpmdBackend(XlaBackend):
    """Make it before anything else uses XLA in this process."""

    def __init__(self):
        if IMPORT_ERROR is None:
            xr.use_spmd()
        super().__init__(Alone())
        self.chips = Chips(self.device)
        if self.chips.count == 1:
            way_out = "set CPU_NUM_DEVICES=4 for four of XLA's CPU backend, or leave it out" if self.hardware == "CPU" else "leave it out"
            raise UserError(f"--spmd: splits tables over several devices and there is one here; {way_out}")
        self.console = f"Using {self.chips.count} x XLA:{self.hardware}..."
        self.description = f"{self.chips.count} x XLA:{self.hardware}"

    def layout(self, name: str) -> Layout:
        return SplitLayout(super().layout(name), self.chips)

    def place(self, module: Module) -> Module:
        module = super().place(module)
        for part in module.modules():
            of_rows = hasattr(part, "buffer_names")  # a store: what it has of more than one number is rows
            for buffer in part.buffers(recurse=False):
                (self.chips.split if of_rows and buffer.dim() else self.chips.whole)(buffer)
            for parameter in part.parameters(recurse=False):
                self.chips.whole(parameter.data)
        chips = self.chips

        def gather_prediction(module, arguments, output):
            # torch_xla reads a split tensor by a program that it compiles anew for every read
            return output if torch.is_grad_enabled() else chips.whole(output)

        module.register_forward_hook(gather_prediction)
        return module

    def to_device(self, batch: Batch) -> StepBatch:
        floats, ids = (part.to(self.device) for part in batch.pack())
        return StepBatch.from_packed(self.chips.split(floats), self.chips.whole(ids), batch.weights is not None)
