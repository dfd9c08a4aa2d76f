"""What a table is: the words and shapes that every other file uses. Read this file first.

Shape legend, used in comments throughout: B rows in a batch (static; the last batch is padded), T tables, H hotness (most ids in
one bag), S = sum of H over the tables (slots), D embedding dimension, N rows of a table, V rows of a store, F features that interact.
"""

import re
from dataclasses import dataclass

MAX_INT32 = 2**31 - 1  # ids travel as int32; nothing that is counted here needs to be larger


@dataclass(frozen=True)
class TableSpec:
    """One embedding table as the data and the model see it, whatever stands behind it.

    name            upstream's name of the table, "emb_l.0"
    num_embeddings  N, how many different ids it answers for
    embedding_dim   D, length of the vector that an id becomes
    hotness         H, most ids in one bag
    pooling         "sum" | "mean" of a bag's vectors; of an empty bag zeros
    """

    name: str
    num_embeddings: int
    embedding_dim: int
    hotness: int = 1
    pooling: str = "sum"

    def __post_init__(self):
        for field in ("num_embeddings", "embedding_dim", "hotness"):
            if getattr(self, field) < 1:
                raise ValueError(f"table {self.name}: {field} is {getattr(self, field)}; it must be at least 1")
        if self.pooling not in ("sum", "mean"):
            raise ValueError(f"table {self.name}: pooling is {self.pooling!r}; it must be sum or mean")


class UserError(ValueError):
    """A mistake of the caller's that one line can explain: what, where, its value, the rule, the way out. run_dlrm.py exits with 2."""


def one_line(message: str) -> str:
    """A message as one line, whatever is quoted in it: what cannot be printed becomes an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in message)


def size_text(num_bytes: float) -> str:
    """Bytes as people read them, in powers of ten: "2.16 GB"."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while num_bytes >= 999.5 and len(units) > 1:
        num_bytes /= 1000
        del units[0]
    return f"{num_bytes:.0f} {units[0]}" if units[0] == "bytes" or num_bytes >= 99.95 else f"{num_bytes:.3g} {units[0]}"


def parse_size(flag: str, text: str) -> int:
    """Bytes of "4GB", "512 MB", "2GiB", "1.5e9": powers of ten, or of 1024 with an i. Raises UserError, which names the flag."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\+?\d{1,2})?)\s*([kKmMgGtT]?)(i?)[bB]?\s*", text, re.ASCII)
    if not found or (found[3] and not found[2]):
        raise UserError(f"{flag}={text}: must be a size, as 4GB, 512MB or 2GiB")
    exponent = "kmgt".index(found[2].lower()) + 1 if found[2] else 0
    return int(float(found[1]) * (1024 if found[3] else 1000) ** exponent)
