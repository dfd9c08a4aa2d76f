"""Low-precision training: rows of int8 numbers with a scale, read by multiplying, written by rounding stochastically. "lpt".

Li et al., "Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction", AAAI 2023, arXiv:2212.05735 (its LPT, after Xu et al.,
SIGMOD 2021; its ALPT learns the scales by gradients).
Differs from the paper: a scale for each row instead of one for the table, starting at the range of the row's first values and growing where an
update would leave it; the noise of the rounding is a hash of row, column and the number of updates, so runs repeat. The rows live in
dlrm_xla/quantized_store.py.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.method import Converted, Making, Method
from dlrm_xla.init import fill_table
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable, Part


class Int8Table(EmbeddingTable):
    """One int8 row for each id. fill: starting values in float32."""

    def __init__(self, spec: TableSpec, fill):
        super().__init__(spec, {"weight": Part(spec.num_embeddings, spec.embedding_dim, fill, codec="int8")})

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        return (ids,)

    def combine(self, rows: tuple[Tensor], ids: Tensor) -> Tensor:
        return rows[0]


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    return spec.num_embeddings * (4 * math.ceil(spec.embedding_dim / 4) + 4)


def _create(spec: TableSpec, knobs: dict, making: Making) -> EmbeddingTable:
    return Int8Table(spec, partial(fill_table, rng=making.rng, replay_torch=making.replay_torch))


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    scale = np.maximum(np.abs(weight).max(1, keepdims=True) / 127, 1e-12)
    rounded = np.round(weight / scale) * scale
    error = float(np.linalg.norm(rounded - weight) / max(np.linalg.norm(weight), 1e-30))
    return Converted(Int8Table(spec, lambda rows: rows.copy_(torch.from_numpy(weight))), {"relative_error": error})


METHOD = Method(
    name="lpt",
    title="int8 rows trained with stochastic rounding (low-precision training)",
    paper="Li et al., Adaptive Low-Precision Training for Embeddings in Click-Through Rate Prediction, AAAI 2023, arXiv:2212.05735",
    knobs=(),
    bytes_formula="N (D + 4)",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    optimizers=("sgd", "rwsadagrad"),
)
