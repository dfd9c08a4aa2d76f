"""Which rows of a batch one of several ranks reads: the arithmetic of dlrm_xla.batch.rank_part, told before anything is read.

A batch of B rows, padded ones included, is cut into `world` shares of ceil(B / world) rows; rank r has share r. The rows that count come first,
so the last shares may have fewer of them, or none; every share has the same shape.
"""

from dataclasses import dataclass

from dlrm_xla.batch import Batch, rank_part


@dataclass(frozen=True)
class Cut:
    """Rows [begin, end) of the split, which count, to be padded to `size`; total_valid: rows that count on all ranks (Batch.total_valid)."""

    begin: int
    end: int
    size: int
    total_valid: int | None


@dataclass(frozen=True)
class Part:
    """Of each batch, what rank `rank` of `world` has."""

    rank: int = 0
    world: int = 1

    def cut(self, begin: int, end: int, size: int) -> Cut:
        """This rank's rows of a batch that has the rows [begin, end) of the split, padded to `size`."""
        if self.world == 1:
            return Cut(begin, end, size, None)
        share = -(-size // self.world)
        first = min(begin + self.rank * share, end)
        return Cut(first, min(first + share, end), share, end - begin)

    def of(self, batch: Batch) -> Batch:
        """This rank's part of a batch that had to be made whole, because its numbers come from one stream."""
        return batch if self.world == 1 else rank_part(batch, self.rank, self.world)


WHOLE = Part()
