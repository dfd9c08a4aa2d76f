"""The tables of a checkpoint, without a model around them: what each is, and which tensors hold it."""

import re
from dataclasses import dataclass

from compression.method import PLAIN, Choice
from compression.registry import recorded
from dlrm_xla.checkpoint_file import Checkpoint
from dlrm_xla.specs import TableSpec, UserError


@dataclass(frozen=True)
class StoredTable:
    """
    names   of its tensors in the checkpoint's state_dict, in order
    choice  what made it; None: the file does not say
    spec    None where the file does not say how many ids it has
    """

    name: str
    names: tuple[str, ...]
    choice: Choice | None
    spec: TableSpec | None


def stored_tables(loaded: Checkpoint) -> list[StoredTable]:
    """UserError where the tables are not numbered from 0, or were made by methods that are not known here."""
    names: dict[int, list[str]] = {}
    for name in loaded.weights:
        found = re.match(r"emb_l\.(\d{1,6})\.", name)
        if found:
            names.setdefault(int(found[1]), []).append(name)
    flag = f"--load-model={loaded.path}"
    if not names or sorted(names) != list(range(len(names))):
        raise UserError(f"{flag}: {'holds no table' if not names else 'does not hold tables 0, 1, 2 and so on'}; is it a checkpoint of DLRM?")
    if loaded.tables is not None and len(loaded.tables) != len(names):
        raise UserError(f"{flag}: holds {len(names)} tables and says what {len(loaded.tables)} are")
    choices = recorded(loaded.tables) if loaded.tables is not None else [None] * len(names)
    return [_stored(loaded, index, tuple(names[index]), choices[index]) for index in range(len(names))]


def _stored(loaded: Checkpoint, index: int, names: tuple[str, ...], choice: Choice | None) -> StoredTable:
    name = f"emb_l.{index}"
    shape = tuple(loaded.weights[names[0]].shape)
    if choice in (None, PLAIN) and names == (f"{name}.weight",) and len(shape) == 2 and min(shape) > 0:
        return StoredTable(name, names, PLAIN, TableSpec(name, *shape))
    said = loaded.tables[index] if loaded.tables is not None else {}
    spec = TableSpec(name, said["rows"], said["dim"]) if said.keys() >= {"rows", "dim"} else None
    return StoredTable(name, names, choice, spec)
