"""Which table stands behind a spec: the methods as data, and the one function that builds them."""

from functools import partial

import numpy as np

from compression.mixed_dim import MixedDimTable, dimensions
from compression.qr import QRTable
from dlrm_xla.config import MethodConfig
from dlrm_xla.embeddings import EmbeddingTable, PlainTable
from dlrm_xla.init import fill_table
from dlrm_xla.specs import TableSpec, UserError

METHODS = {"qr": QRTable, "md": MixedDimTable}


def create_tables(
    specs: list[TableSpec], method: MethodConfig, rng: np.random.RandomState, replay_torch: bool, upstream_compat: bool
) -> list[EmbeddingTable]:
    """A table for each spec, in order, drawing from `rng` and from torch's stream as upstream does.

    replay_torch: also make the torch draws that upstream makes and discards (dlrm_xla/init.py).
    """
    widths = mixed_dimensions(specs, method) if method.kind == "md" else None
    tables: list[EmbeddingTable] = []
    for index, spec in enumerate(specs):
        if widths is not None:
            tables.append(MixedDimTable(spec, widths[index], rng))
        elif method.kind == "qr" and spec.num_embeddings > method.threshold:
            tables.append(QRTable(spec, method.qr_operation, method.qr_collisions, upstream_compat))
        elif method.kind == "qr" and method.qr_operation == "concat":
            raise UserError(
                f"--qr-operation=concat: table {spec.name} has {spec.num_embeddings} rows, not more than --qr-threshold={method.threshold}, "
                f"and would give vectors of half the length; use --qr-threshold={min(s.num_embeddings for s in specs) - 1} or another operation"
            )
        else:
            tables.append(PlainTable(spec, partial(fill_table, rng=rng, replay_torch=replay_torch)))
    return tables


def mixed_dimensions(specs: list[TableSpec], method: MethodConfig) -> list[int]:
    """The width of every table; those at or below the threshold keep the full one."""
    dim = specs[0].embedding_dim
    widths = dimensions([spec.num_embeddings for spec in specs], method.md_temperature, dim, method.md_round_dims)
    widths = [width if spec.num_embeddings > method.threshold else dim for spec, width in zip(specs, widths, strict=True)]
    if max(widths) > dim:
        raise UserError(
            f"--md-round-dims rounds a table's dimension up to {max(widths)}, above --arch-sparse-feature-size={dim}; "
            "make that a power of two, or leave --md-round-dims out"
        )
    return widths
