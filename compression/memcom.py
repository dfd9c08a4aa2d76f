"""MEmCom: ids share rows, and each id has a number of its own that its row is multiplied by. "memcom".

    e(i) = U[i mod m] v[i]  (+ b[i])

Pansare et al., "Learning Compressed Embeddings for On-Device Inference", MLSys 2022, arXiv:2203.10135.
Differs from the paper: nothing known; v and b of an id lie side by side in one row. The table keeps 4 or 8 bytes for each id, so it cannot become
smaller than 1/D, or 2/D, of a plain one.
Starting values: v = 1, b = 0 and U a plain table's, U(-sqrt(1/N), sqrt(1/N)) with standard deviation 1/sqrt(3N): the ids of a row start equal.
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor

from compression.fitting import WEIGHTED, converted, fit_rows, id_weights
from compression.hashing import ROWS, shared_rows
from compression.method import Converted, Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec
from dlrm_xla.tables import EmbeddingTable, Part

SWEEPS = 10  # of alternating least squares in a conversion


class MEmComTable(EmbeddingTable):
    """num_rows shared rows of D; for each id one number, or with bias two."""

    def __init__(self, spec: TableSpec, num_rows: int, bias: bool, rng: np.random.RandomState):
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(1 / spec.num_embeddings))
        own = Part(spec.num_embeddings, 2 if bias else 1, _fill_own)
        super().__init__(spec, {"weight": Part(num_rows, spec.embedding_dim, fill), "scale": own})
        self.num_rows, self.bias = num_rows, bias

    def row_ids(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return torch.fmod(ids, self.num_rows), ids

    def combine(self, rows: tuple[Tensor, Tensor], ids: Tensor | None) -> Tensor:
        shared, own = rows
        return shared * own[..., :1] + own[..., 1:] if self.bias else shared * own


def _fill_own(rows: Tensor) -> None:
    rows.copy_(torch.eye(1, rows.shape[1]).expand(rows.shape))  # scale 1, bias 0


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    return 4 * (shared_rows(spec, knobs) * spec.embedding_dim + spec.num_embeddings * (1 + knobs["bias"]))


def _create(spec: TableSpec, knobs: dict, making: Making) -> MEmComTable:
    return MEmComTable(spec, shared_rows(spec, knobs), knobs["bias"], making.rng)


def _convert(spec: TableSpec, knobs: dict, weight: np.ndarray, making: Making) -> Converted:
    """Alternating least squares from v = 1, b = 0: the shared rows given v and b, then each id's v and b by a regression on its row."""
    table, weights = _create(spec, knobs, making), id_weights("memcom", spec, knobs, making)
    rows, _ = table.row_ids(torch.arange(spec.num_embeddings))
    exact = torch.from_numpy(weight)
    own = torch.zeros(spec.num_embeddings, 1 + knobs["bias"])
    _fill_own(own)
    shared = _fit_shared(exact, own, rows, table.num_rows, weights)
    for _ in range(SWEEPS if table.num_rows < spec.num_embeddings else 0):
        own = _regress(exact, shared, rows, knobs["bias"])
        shared = _fit_shared(exact, own, rows, table.num_rows, weights)
    return converted(table, {"weight": shared, "scale": own}, weight, making)


def _fit_shared(exact: Tensor, own: Tensor, rows: Tensor, num_rows: int, weights: np.ndarray | None) -> Tensor:
    """[num_rows, D]: the shared rows that are best for each id's v and b."""

    def wanted(ids: slice) -> Tensor:
        return exact[ids].double() - own[ids, 1:].double().sum(1, keepdim=True)

    return fit_rows(rows, num_rows, wanted, weights, lambda ids: own[ids, :1].double())


def _regress(exact: Tensor, shared: Tensor, rows: Tensor, bias: bool) -> Tensor:
    """[N, 1 or 2]: v, or v and b, that bring shared[rows] v + b closest to the exact vectors [N, D]."""
    own = torch.zeros(len(exact), 1 + bias)
    for start in range(0, len(exact), 1 << 17):
        ids = slice(start, start + (1 << 17))
        base, wanted = shared[rows[ids]].double(), exact[ids].double()
        middle = base.mean(1, keepdim=True) if bias else 0.0
        centred = base - middle
        scale = (centred * wanted).sum(1, keepdim=True) / centred.square().sum(1, keepdim=True).clamp(min=1e-300)
        own[ids, :1] = scale.float()
        if bias:
            own[ids, 1:] = (wanted.mean(1, keepdim=True) - scale * middle).float()
    return own


METHOD = Method(
    name="memcom",
    title="MEmCom: shared rows, times a number that each id has of its own",
    paper="Pansare et al., Learning Compressed Embeddings for On-Device Inference, MLSys 2022, arXiv:2203.10135",
    knobs=(ROWS, Knob("bias", bool, False, "each id also has a number that is added"), WEIGHTED),
    bytes_formula="4 (rows D + N); with bias 4 (rows D + 2 N)",
    num_bytes=_num_bytes,
    create=_create,
    convert=_convert,
    sized_by="rows",
    sized_most=lambda spec, knobs: spec.num_embeddings,
    exact_at=lambda spec: {"rows": spec.num_embeddings},
    weighted=True,
)
