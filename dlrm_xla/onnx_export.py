"""--save-onnx: the trained model as dlrm_s_pytorch.onnx, with upstream's inputs and outputs, checked before it is put in place.

Differs from upstream: opset 16 instead of 11, because from 16 on ScatterElements can add: a bag's sum is one operator where upstream's file
loops over the bags one by one (2048 rows, 4 tables, 3 ids a bag, onnxruntime on one thread: 1.8 ms, upstream's 21 ms). The ids of a table
with bags of different lengths are an axis "num_indices_<table>": upstream calls them all "batch_size", and onnxruntime, told that they are
equally long, reuses one buffer for two of them and fails. The file is tried with onnxruntime on batches of several sizes; it works with
--inference-only too, for compressed tables, and on every device (from copies of the weights on the CPU).
"""

import copy
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dlrm_xla.batch import Batch, to_bags
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.models.dlrm import DLRM
from dlrm_xla.specs import UserError
from dlrm_xla.stores import RowStore
from dlrm_xla.tables import EmbeddingTable
from dlrm_xla.train import Trainer

FILE_NAME = "dlrm_s_pytorch.onnx"  # in the current directory, as upstream
OPSET = 16
TOLERANCE = 1e-5  # between our predictions and onnxruntime's; float32 sums in another order differ by about 1e-7
FILE_LIMIT = 2**31 - 2**20  # bytes: a protobuf message holds less than 2 GiB; a MiB is left for the graph


def require(path: Path) -> None:
    """UserError where the file could not be written or checked; better at the start than after an hour."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise UserError(f"--save-onnx needs the packages onnx and onnxruntime ({error}): pip install onnx onnxruntime") from None
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise UserError(f"--save-onnx: {path.absolute()} cannot be written; start from a folder where it can")


def check_size(trainer: Trainer) -> None:
    """UserError where the weights do not fit into an ONNX file."""
    tensors = [*trainer.model.parameters(), *trainer.tables.parameters()]
    num_bytes = 4 * (sum(tensor.nelement() for tensor in tensors) + sum(store.num_rows * store.width for store in trainer.tables.stores))
    if num_bytes > FILE_LIMIT:
        raise UserError(
            f"--save-onnx: the weights take {num_bytes / 2**30:.2f} GiB and an ONNX file holds less than 2; "
            "leave it out, or make the tables smaller with --max-ind-range, --qr-flag, --md-flag or --arch-sparse-feature-size"
        )


class BagTable(nn.Module):
    """One table over bags: its rows as buffers, and its two functions. pooling_weights: [N] or None."""

    def __init__(self, table: EmbeddingTable, parts: dict[str, Tensor], pooling_weights: Tensor | None):
        super().__init__()
        self.table, self.pools_first, self.names = table, table.pools_before_combine, []
        for name, part in parts.items():
            self.names.append(name.replace(".", "_"))  # torch allows no dot in a buffer's name
            self.register_buffer(self.names[-1], part)
        self.register_buffer("pooling_weights", pooling_weights)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """ids [K] int64, offsets [B] int64 -> [B, D]."""
        bags = bag_numbers(offsets, ids.shape[0])
        vectors = [self.read(name, rows) for name, rows in zip(self.names, self.table.row_ids(ids), strict=True)]
        if self.pools_first:
            return self.table.combine(tuple(self.pool(vector, ids, bags, offsets) for vector in vectors), None)
        return self.pool(self.table.combine(tuple(vectors), ids), ids, bags, offsets)

    def read(self, name: str, rows: Tensor) -> Tensor:
        """rows [K] or [K, k] of a part -> [K, d] or [K, k d]."""
        part = getattr(self, name)
        if rows.dim() == 1:
            return part.index_select(0, rows)
        # -1 as a length would be ambiguous in a batch whose bags are all empty, K = 0
        return part.index_select(0, rows.reshape(-1)).reshape(rows.shape[0], rows.shape[1] * part.shape[1])

    def pool(self, vectors: Tensor, ids: Tensor, bags: Tensor, offsets: Tensor) -> Tensor:
        """vectors [K, d] -> their weighted sums [B, d]."""
        if self.pooling_weights is not None:
            vectors = vectors * self.pooling_weights.index_select(0, ids).unsqueeze(1)
        sums = torch.zeros(offsets.shape[0], vectors.shape[1])
        return sums.scatter_add(0, bags.unsqueeze(1).expand(-1, vectors.shape[1]), vectors)


def bag_numbers(offsets: Tensor, num_ids: int) -> Tensor:
    """[K] which bag each id belongs to: how many bags begin at or before it, less one. Empty bags begin where the next one does."""
    starts = torch.zeros(num_ids + 1, dtype=torch.int64).scatter_add(0, offsets, torch.ones_like(offsets))
    return starts.cumsum(0)[:-1] - 1


class BagModel(nn.Module):
    """The model as upstream's file takes it. stacked: one tensor of indices [T, B] instead of one [K_t] for each table."""

    def __init__(self, model: DLRM, tables: EmbeddingCollection, stacked: bool):
        super().__init__()
        self.model, self.stacked = model, stacked
        bag_tables = []
        for index, (table, segments) in enumerate(zip(tables.tables, tables.segments, strict=True)):
            parts = {
                segment.name.removeprefix(f"{table.spec.name}."): tables.part_rows(segment).contiguous()
                for segment in segments
            }
            bag_tables.append(BagTable(table, parts, None if tables.v_W_l is None else tables.v_W_l[index].data))
        self.emb_l = nn.ModuleList(bag_tables)

    def forward(self, dense_x: Tensor, offsets: Tensor, *indices: Tensor) -> Tensor:
        """dense_x [B, num_dense], offsets [T, B] -> pred [B, 1]."""
        ids = indices[0] if self.stacked else indices
        pooled = [table(ids[index], offsets[index]) for index, table in enumerate(self.emb_l)]
        return self.model(dense_x, torch.stack(pooled, dim=1))


def save_onnx(trainer: Trainer, batch: Batch, stacked: bool, path: Path, print_line: Callable[[str], None]) -> None:
    """Writes `path` whole and checked or not at all. UserError where it cannot be written or does not predict what the model does.

    batch       a batch of training data; upstream's lines about its shapes are printed
    stacked     the input "indices" [T, B] that upstream's Criteo data have, for bags of one id; else "indices_0", "indices_1", ... [K_t]
    """
    model, tables = cpu_twin(trainer.model), cpu_twin(trainer.tables)
    model.half_products = False  # the file computes in float32: onnxruntime has no bfloat16 product on the CPU
    batch = take_rows(batch, torch.arange(batch.num_valid))
    inputs = model_inputs(batch, tables, stacked)
    names, axes = input_names(inputs, stacked)
    print_shapes(inputs, stacked, names, axes, print_line)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(BagModel(model, tables, stacked).eval(), inputs, names, axes, beside)
        check(beside, path, model, tables, batch, stacked, names)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except OSError as error:
        raise UserError(f"--save-onnx: {path} cannot be written ({error.strerror or error}); free some space or start in another folder") from None
    finally:
        with suppress(OSError):
            beside.unlink(missing_ok=True)


def cpu_twin(module: nn.Module) -> nn.Module:
    """A copy on the CPU; of what is there already the same tensors. The optimizer's state is left out."""
    memo: dict[int, object] = {}
    for child in module.modules():
        for name in child.state_buffers() if isinstance(child, RowStore) else ():
            memo[id(getattr(child, name))] = torch.empty(0)
    for parameter in module.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().cpu(), requires_grad=False)
    for buffer in module.buffers():
        memo.setdefault(id(buffer), buffer.cpu())
    return copy.deepcopy(module, memo)


def take_rows(batch: Batch, rows: Tensor) -> Batch:
    weights = None if batch.weights is None else batch.weights[rows]
    return Batch(batch.dense[rows], batch.ids[rows], weights, batch.labels[rows], len(rows))


def reason(error: Exception) -> str:
    """The message without onnxruntime's chain of codes and places before it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(" : ")[-1][:300]


def trial_batches(batch: Batch, stacked: bool) -> list[Batch]:
    """The batch, its rows backwards and the last once more, its last row alone, and, where bags may be empty, that row without ids."""
    last = batch.num_valid - 1
    one = take_rows(batch, torch.tensor([last]))
    trials = [batch, take_rows(batch, torch.tensor([*range(last, -1, -1), last])), one]
    return trials if stacked else [*trials, replace(one, weights=torch.zeros(one.ids.shape))]


def model_inputs(batch: Batch, tables: EmbeddingCollection, stacked: bool) -> tuple[Tensor, ...]:
    offsets, indices = to_bags(batch, tables.hotness)
    return batch.dense, torch.stack(offsets), *([torch.stack(indices)] if stacked else indices)


def input_names(inputs: tuple[Tensor, ...], stacked: bool) -> tuple[list[str], dict[str, dict[int, str]]]:
    """The inputs' names, and the axes whose length may change, pred's among them."""
    axes = {"dense_x": {0: "batch_size"}, "pred": {0: "batch_size"}, "offsets": {1: "batch_size"}}
    if stacked:
        return ["dense_x", "offsets", "indices"], {**axes, "indices": {1: "batch_size"}}
    names = [f"indices_{table}" for table in range(len(inputs) - 2)]
    return ["dense_x", "offsets", *names], {**axes, **{name: {0: f"num_{name}"} for name in names}}


def print_shapes(inputs: tuple[Tensor, ...], stacked: bool, names: list[str], axes: dict, print_line: Callable[[str], None]) -> None:
    """Upstream's lines."""
    dense, offsets, *indices = inputs
    print_line(f"X_onnx.shape {dense.shape}")
    print_line(f"lS_o_onnx.shape {offsets.shape}")
    for index in indices:
        print_line(f"{'lS_i_onnx' if stacked else 'ii'}.shape {index.shape}")
    print_line(f"inputs {names}")
    print_line(str(axes))


def write(model: nn.Module, inputs: tuple[Tensor, ...], names: list[str], axes: dict, path: Path) -> None:
    with warnings.catch_warnings():
        # the exporter that needs no package beyond torch is the older one, and says so, twice
        warnings.filterwarnings("ignore", "You are using the legacy TorchScript-based ONNX export", DeprecationWarning)
        warnings.filterwarnings("ignore", "The feature will be removed", DeprecationWarning)
        try:
            torch.onnx.export(
                model, inputs, str(path), input_names=names, output_names=["pred"], dynamic_axes=axes, opset_version=OPSET, dynamo=False,
            )  # fmt: skip
        except (RuntimeError, torch.onnx.errors.OnnxExporterError) as error:
            raise UserError(f"--save-onnx: this model cannot be exported ({reason(error)})") from None


@torch.no_grad()
def check(
    written: Path, path: Path, model: DLRM, tables: EmbeddingCollection, batch: Batch, stacked: bool, names: list[str]
) -> None:
    """UserError unless the file is valid and predicts as the model does on batches of several sizes."""
    import onnx
    import onnxruntime

    try:
        onnx.checker.check_model(onnx.load(written), full_check=True)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        session = onnxruntime.InferenceSession(str(written), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # the packages' own classes have nothing else in common
        if isinstance(error, OSError):
            raise
        raise UserError(f"--save-onnx: {path} is not written, for onnx does not accept it ({reason(error)})") from None
    for some in trial_batches(batch, stacked):
        num_rows = some.num_valid
        inputs = model_inputs(some, tables, stacked)
        expected = model(some.dense, tables.lookup(some.ids, some.weights).pooled).numpy()
        try:
            (found,) = session.run(["pred"], {name: tensor.numpy() for name, tensor in zip(names, inputs, strict=True)})
        except Exception as error:
            raise UserError(
                f"--save-onnx: {path} is not written, for onnxruntime fails on {num_rows} rows ({reason(error)})"
            ) from None
        difference = float(np.abs(found - expected).max()) if found.shape == expected.shape else float("inf")
        if not difference <= TOLERANCE:
            raise UserError(
                f"--save-onnx: {path} is not written, for on {num_rows} rows onnxruntime's predictions differ from the model's by "
                f"{difference:.2g}, and {TOLERANCE:g} is allowed"
            )
