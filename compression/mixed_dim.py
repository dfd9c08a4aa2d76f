"""Mixed-dimension embedding: popular small tables keep the full width, large ones get fewer numbers and a projection.

Ginart et al., "Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems", arXiv:1909.11810.
Differs from upstream: tables at or below the threshold are plain (upstream crashes on them), and rounded dimensions are integers
(upstream crashes on floats).
"""

import math
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compression.method import Knob, Making, Method
from dlrm_xla.init import fill_uniform
from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable, Part


def dimensions(table_rows: list[int], temperature: float, base_dim: int, round_dims: bool) -> list[int]:
    """The dimension of each table by the power rule d_i = lambda n_i^-alpha, in float32 as upstream computes it.

    The smallest table gets base_dim; no table gets less than 1. With round_dims, the nearest power of two.
    """
    rows = torch.tensor(table_rows, dtype=torch.float32)
    scale = base_dim * rows.min() ** temperature
    dims = torch.round(torch.clamp(torch.ones(len(rows)) * scale * rows**-temperature, min=1))
    # the first of the smallest tables gets exactly base_dim
    dims[int(torch.sort(torch.tensor(table_rows)).indices[0])] = base_dim
    if round_dims:
        dims = 2 ** torch.round(torch.log2(dims))
    return [int(dim) for dim in dims]


class MixedDimTable(EmbeddingTable):
    """N rows of `width` numbers and a projection [D, width]; with width == D no projection.

    rng draws the rows; torch's stream draws the projection, with replay_torch after what upstream's layers draw and overwrite.
    """

    # the projection is linear: projecting the pooled rows is the same and cheaper
    pools_before_combine = True

    def __init__(self, spec: TableSpec, width: int, rng: np.random.RandomState, replay_torch: bool = True):
        if replay_torch:
            nn.init.xavier_uniform_(torch.empty(spec.num_embeddings, width).normal_())
        projection = nn.Linear(width, spec.embedding_dim, bias=False) if width < spec.embedding_dim else nn.Identity()
        if isinstance(projection, nn.Linear):
            nn.init.xavier_uniform_(projection.weight)
        fill = partial(fill_uniform, rng=rng, bound=math.sqrt(1 / spec.num_embeddings))
        super().__init__(spec, {"embs.weight": Part(spec.num_embeddings, width, fill)})
        self.proj = projection

    def row_ids(self, ids: Tensor) -> tuple[Tensor]:
        return (ids,)

    def combine(self, rows: tuple[Tensor], ids: Tensor | None) -> Tensor:
        return self.proj(rows[0])


def _check(spec: TableSpec, knobs: dict) -> None:
    if knobs["width"] > spec.embedding_dim:
        raise UserError(f"md:width={knobs['width']}: table {spec.name} has vectors of {spec.embedding_dim}; use at most that")


def _num_bytes(spec: TableSpec, knobs: dict) -> int:
    width = knobs["width"]
    return 4 * spec.num_embeddings * width + (4 * width * spec.embedding_dim if width < spec.embedding_dim else 0)


def _create(spec: TableSpec, knobs: dict, making: Making) -> EmbeddingTable:
    return MixedDimTable(spec, knobs["width"], making.rng, making.replay_torch)


def _spread(specs: list[TableSpec], knobs: dict) -> list[dict]:
    """The widths by the power rule over the tables together."""
    if knobs["width"]:
        return [knobs for _ in specs]
    dim = specs[0].embedding_dim
    widths = dimensions([spec.num_embeddings for spec in specs], knobs["temperature"], dim, knobs["round_dims"])
    return [{**knobs, "width": min(width, dim)} for width in widths]


METHOD = Method(
    name="md",
    title="mixed dimensions: the more ids, the shorter the rows, and a projection (upstream's --md-flag)",
    paper="Ginart et al., Mixed Dimension Embeddings with Application to Memory-Efficient Recommendation Systems, arXiv:1909.11810",
    knobs=(
        Knob("temperature", float, 0.3, "alpha of the power rule over all tables; 0: equal widths", least=0, most=4),
        Knob("round_dims", bool, False, "round widths to powers of two"),
        Knob("width", int, 0, "numbers in a row; 0: by the power rule", least=0),
    ),
    bytes_formula="4 (N width + width D)",
    num_bytes=_num_bytes,
    create=_create,
    sized_by="temperature",
    spread=_spread,
    check=_check,
)
