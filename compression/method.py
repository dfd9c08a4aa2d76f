"""What a compression method is to the rest: its name, knobs, size and the functions that make a table by it. The file to read before a method's."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dlrm_xla.specs import TableSpec, UserError
from dlrm_xla.tables import EmbeddingTable


@dataclass(frozen=True)
class Knob:
    """One number or word that the user may set: "tt:rank=16".

    kind     int, float, str or bool
    default  None: the method derives it from the table
    """

    name: str
    kind: type
    default: object
    help: str
    least: float | None = None
    most: float | None = None
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Making:
    """What making a table may use.

    rng             draws everything random, in the order of the tables
    counts          [N] float64, how often training looks each id up; None: not known
    replay_torch    also draw from torch's stream what upstream draws and discards (dlrm_xla/init.py)
    upstream_compat upstream's bugs that change numbers
    """

    rng: np.random.RandomState
    counts: np.ndarray | None = None
    replay_torch: bool = False
    upstream_compat: bool = False


@dataclass(frozen=True)
class Converted:
    """A table made of a trained one: its fills write the converted values. facts: of the conversion, "relative_error", "optimal" and so on."""

    table: EmbeddingTable
    facts: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """One way to make a table smaller, as data.

    name           what users type, the field's term
    title, paper   a line each
    bytes_formula  for people;  num_bytes: (spec, knobs) -> bytes of rows, dense parameters, codes, pointers and seeds, without optimizer state
    create         (spec, knobs, making) -> a table with starting values, to be trained; None: a trained table is needed
    shell          (spec, knobs, making) -> a table whose values a checkpoint will bring; None: what `create` makes
    convert        (spec, knobs, weight [N, D] float32, making) -> Converted; None: there is none
    sized_by       the knob that a byte budget sets: bytes rise, or fall, all the way with it;  sized_most: its largest useful value for a table
    spread         (specs, knobs) -> knobs of each table, where they depend on all tables together; sized_by is then one number for all
    exact_at       knobs at which `convert` gives any table back, up to float32 rounding
    check          raises UserError where knobs do not go with a table
    needs_counts   `create` cannot do without Making.counts
    uses_counts    knobs -> `create` makes use of them where they are known
    optimizers     the only ones that go with it; (): all
    weighted       `convert` weights ids by Making.counts where its knob `weighted` says so
    trainable      training changes the converted table
    """

    name: str
    title: str
    paper: str
    knobs: tuple[Knob, ...]
    bytes_formula: str
    num_bytes: Callable[[TableSpec, dict], int]
    create: Callable[[TableSpec, dict, Making], EmbeddingTable] | None = None
    shell: Callable[[TableSpec, dict, Making], EmbeddingTable] | None = None
    convert: Callable[[TableSpec, dict, np.ndarray, Making], Converted] | None = None
    sized_by: str = ""
    sized_most: Callable[[TableSpec, dict], int] | None = None
    spread: Callable[[list[TableSpec], dict], list[dict]] | None = None
    exact_at: Callable[[TableSpec], dict] | None = None
    check: Callable[[TableSpec, dict], None] | None = None
    needs_counts: bool = False
    uses_counts: Callable[[dict], bool] = lambda knobs: False
    optimizers: tuple[str, ...] = ()
    weighted: bool = False
    trainable: bool = True

    def knob(self, name: str) -> Knob:
        found = [knob for knob in self.knobs if knob.name == name]
        if not found:
            names = ", ".join(knob.name for knob in self.knobs) or "none"
            raise UserError(f"{self.name}:{name}: {self.name} has no knob of that name; it has {names}")
        return found[0]

    def knob_values(self, given: dict[str, str]) -> dict:
        """All knobs with their values: texts as typed, defaults for the others. UserError for a name or a value that is none."""
        values = {knob.name: knob.default for knob in self.knobs}
        for name, text in given.items():
            values[name] = _value(self.name, self.knob(name), text)
        return values


def _value(method: str, knob: Knob, text: str):
    where = f"{method}:{knob.name}={text}"
    if knob.choices:
        if text not in knob.choices:
            raise UserError(f"{where}: must be one of {', '.join(knob.choices)}")
        return text
    if knob.kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{where}: must be true or false")
        return text.lower() == "true"
    if knob.kind is str:
        return text
    try:
        value = knob.kind(text)
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"{where}: must be {'a whole number' if knob.kind is int else 'a number'}") from None
    low = knob.least is not None and not value >= knob.least
    if low or (knob.most is not None and not value <= knob.most):
        limits = [f"{word} {limit:g}" for word, limit in (("at least", knob.least), ("at most", knob.most)) if limit is not None]
        raise UserError(f"{where}: must be {' and '.join(limits)}")
    return value


@dataclass(frozen=True)
class Choice:
    """What one table is made by: a method's name, or "plain", and all its knobs."""

    method: str = "plain"
    knobs: dict = field(default_factory=dict)

    def text(self) -> str:
        """As users type it; what the method derives from the table is left out."""
        knobs = {name: str(value).lower() if isinstance(value, bool) else value for name, value in self.knobs.items() if value not in (None, "")}
        return self.method + (":" if knobs else "") + ",".join(f"{name}={value}" for name, value in knobs.items())


PLAIN = Choice()
