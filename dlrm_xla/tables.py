"""A table, plain or compressed, as two pure functions: which rows an id reads, and how those rows become a vector."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from dlrm_xla.specs import TableSpec


@dataclass(frozen=True)
class Part:
    """Rows that a table keeps in a store: [num_rows, width].

    fill(rows): writes the starting values into that view, in place and a piece at a time, so that a large table needs its memory once.
    Parts are filled table by table, in order: what a fill draws comes after what the fills before it drew.
    codec: "float32", or "int8": a scale for each row and stochastic rounding of its updates (quantized_store.py)
    """

    num_rows: int
    width: int
    fill: Callable[[Tensor], None]
    codec: str = "float32"


class EmbeddingTable(nn.Module):
    """A table, plain or compressed. Subclasses give `parts` and the two functions; parameters they register are trained as dense ones, and
    persistent buffers (codes, pointers, seeds of hashes) are kept as they are, in checkpoints too.

    parts               the rows that it keeps in stores, by upstream's name: {"weight": Part(V, d, fill)}
    pools_before_combine  True where the rows of a bag are pooled before `combine` sees them, which is the same for a linear combine; an id
                          then reads one row of each part
    state_from          after `reorganize`: for each part, int64 [num_rows], the old row whose optimizer state a row goes on with, -1 for none;
                        None: the state of all rows starts at zero again
    observes            True where `observe` wants to see the ids of training
    made_by             what was chosen for it, for checkpoints and reports
    """

    pools_before_combine = False
    state_from: dict[str, np.ndarray] | None = None
    observes = False
    made_by = None  # compression.method.Choice; None: one row for each id

    def __init__(self, spec: TableSpec, parts: dict[str, Part]):
        super().__init__()
        self.spec, self.parts = spec, parts

    def row_ids(self, ids: Tensor) -> tuple[Tensor, ...]:
        """[...] int64 -> one [..., K_s] or [...] for each part: which rows an id reads."""
        raise NotImplementedError

    def combine(self, rows: tuple[Tensor, ...], ids: Tensor | None) -> Tensor:
        """One [..., K_s x d_s] for each part, an id's rows side by side -> [..., D]. ids: [...] as in row_ids, None where pools_before_combine."""
        raise NotImplementedError

    def fill_buffers(self) -> None:
        """Writes what the buffers hold at the start, where that is work: called before the parts are filled, and not for a table of shapes only."""

    def observe(self, ids: np.ndarray) -> None:
        """ids [n] of a batch of training that count, in the host's memory."""

    def reorganize(self, parts: dict[str, Tensor], epoch: int) -> bool:
        """After epoch number `epoch` (0 is the first): may change its rows, views in the host's memory by the names of `parts`, and its buffers,
        in place. True where it did."""
        return False


class PlainTable(EmbeddingTable):
    """One row for each id."""

    pools_before_combine = True

    def __init__(self, spec: TableSpec, fill: Callable[[Tensor], None]):
        super().__init__(spec, {"weight": Part(spec.num_embeddings, spec.embedding_dim, fill)})

    def row_ids(self, ids):
        return (ids,)

    def combine(self, rows, ids):
        return rows[0]
