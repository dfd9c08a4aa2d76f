"""Quantized inference: MLPs in int8 or float16, tables in 8 or 4 bits, by the same PyTorch operators as upstream, so the numbers are upstream's.

Differs from upstream: the trained model stays as it is, and the sizes that upstream prints for every table and batch are printed on request.
"""

import copy
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dlrm_xla.backends.base import StepBatch
from dlrm_xla.batch import Batch, to_bags
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.specs import UserError
from dlrm_xla.train import Trainer

_BITS_TO_OPERATORS = {
    8: (torch.ops.quantized.embedding_bag_byte_prepack, torch.ops.quantized.embedding_bag_byte_rowwise_offsets),
    4: (torch.ops.quantized.embedding_bag_4bit_prepack, torch.ops.quantized.embedding_bag_4bit_rowwise_offsets),
}


class QuantizedTables:
    """Plain tables with a scale and a bias for each row. bits: 8 or 4.

    emit: takes upstream's line of sizes for each table at each batch; None leaves it out.
    """

    def __init__(self, tables: EmbeddingCollection, bits: int, emit: Callable[[str], None] | None):
        prepack, self.bag_sums = _BITS_TO_OPERATORS[bits]
        dim = tables.stores[0].width
        if bits == 4 and dim % 2:
            raise UserError(f"--quantize-emb-with-bit=4 puts two numbers into a byte, so --arch-sparse-feature-size={dim} must be even; use 8 bits")
        self.hotness, self.pooling_weights, self.emit = tables.hotness, tables.v_W_l, emit
        self.packed = []
        for (segment,) in tables.segments:  # a plain table has one part
            self.packed.append(prepack(tables.part_rows(segment).contiguous()))

    def lookup(self, batch: StepBatch, num_valid: int) -> Tensor:
        """[num_valid, T, D] pooled vectors."""
        offsets, indices = to_bags(Batch(batch.dense, batch.ids, batch.weights, batch.labels, num_valid), self.hotness)
        pooled = []
        for table, packed in enumerate(self.packed):
            if self.emit is not None:
                size = packed.element_size() * packed.nelement()
                self.emit(f"quantized emb sizes: {size} {size}")
            weights = None if self.pooling_weights is None else self.pooling_weights[table].gather(0, indices[table])
            pooled.append(self.bag_sums(packed, indices[table], offsets[table], per_sample_weights=weights))
        return torch.stack(pooled, dim=1)


def quantized_forward(
    trainer: Trainer, mlp_bits: int, embedding_bits: int, emit: Callable[[str], None] | None = None
) -> Callable[[StepBatch], Tensor]:
    """A function from a batch to click probabilities [n, 1] of its n valid rows, with the weights that the trainer has now.

    mlp_bits        8, 16 or 32, which leaves the layers as they are; with 8 the activations are quantized too, by their range in the batch,
                    so that padded rows would change the result and are cut off first
    embedding_bits  4, 8 or 32
    emit            QuantizedTables
    """
    if trainer.backend.name != "cpu":
        raise UserError(f"quantized inference runs on the CPU only, and this is {trainer.backend.name}: use --device=cpu")
    model, tables = trainer.model, trainer.tables
    if mlp_bits != 32:
        model = quantize_layers(model, mlp_bits)
        tables = quantize_layers(tables, mlp_bits) if any(isinstance(module, nn.Linear) for module in tables.modules()) else tables
    packed = QuantizedTables(tables, embedding_bits, emit) if embedding_bits != 32 else None

    def forward(batch: StepBatch) -> Tensor:
        num_valid = int(batch.valid.sum())
        dense = batch.dense[:num_valid]
        if packed is not None:
            return model(dense, packed.lookup(batch, num_valid))
        weights = None if batch.weights is None else batch.weights[:num_valid]
        return model(dense, tables.lookup(batch.ids[:num_valid], weights).pooled)

    return forward


def quantize_layers(module: nn.Module, bits: int) -> nn.Module:
    """A copy whose linear layers hold int8 or float16 weights; buffers, embedding rows among them, are shared with the original."""
    twin = copy.deepcopy(module, {id(buffer): buffer for buffer in module.buffers()})
    with warnings.catch_warnings():
        # meant for us: the call goes away in PyTorch 2.10, and requirements.txt pins the version
        warnings.filterwarnings("ignore", r"torch\.ao\.quantization is deprecated", DeprecationWarning)
        try:
            return torch.ao.quantization.quantize_dynamic(twin, {nn.Linear}, torch.qint8 if bits == 8 else torch.float16, inplace=True)
        except RuntimeError as error:
            engine = torch.backends.quantized.engine
            raise UserError(
                f"--quantize-mlp-with-bit={bits}: PyTorch on this processor (quantization engine {engine}) cannot do it "
                f"({str(error).strip().splitlines()[0][:100]}); leave it out"
            ) from None
