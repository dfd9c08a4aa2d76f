"""What a sweep is made of: a run for every method, ratio and seed, and the baselines that the methods are to beat. Nothing is run here."""

import re
from dataclasses import dataclass

from compression.choose import parse_asked
from compression.method import Method
from compression.registry import METHODS
from dlrm_xla.specs import UserError

# The model, the optimizer and the batches of every run. On 137,139 real rows, one epoch, seeds 123, 7 and 1: AUC 0.7703, 0.7707, 0.7691 and 6.9 s of
# CPU a process; upstream's recorded model (13-512-256-64-16, 512-256-1, learning rate 0.01) 0.7712, 0.7688, 0.7666 and 15.7 s.
PROTOCOL = (
    "--device=cpu", "--data-generation=dataset", "--data-set=kaggle", "--arch-sparse-feature-size=16", "--arch-mlp-bot=13-64-16",
    "--arch-mlp-top=64-1", "--loss-function=bce", "--round-targets=True", "--optimizer=adagrad", "--learning-rate=0.02",
    "--mini-batch-size=128", "--test-mini-batch-size=16384",
)  # fmt: skip
RATIOS = "3,10,30,100,300"
FIRST_SEED = 123  # upstream's

# Baselines: flags of plain tables. rare: ids seen less often than that in training share one row, the regularized full table that existing flags
# allow; slow: smaller steps, which fit the rows less; folded: upstream's hash trick, ids modulo a number.
# rwsadagrad: the full tables with the optimizer that int8 rows must have.
RARE, FOLDED, SLOW = (2, 5, 10, 30, 100), (10_000, 1_000, 100), (0.5, 0.25)
OPTIMIZERS = {"lpt": "rwsadagrad"}  # of a method that --optimizer=adagrad does not go with
BASELINES = {
    "plain": "the full tables",
    "slow": f"the full tables at {' and '.join(f'{share:g}' for share in SLOW)} of the learning rate",
    "rwsadagrad": "the full tables with row-wise Adagrad",
    "rare": f"ids seen less than {', '.join(map(str, RARE))} times share a row (--min-frequency)",
    "folded": f"ids modulo {', '.join(map(str, FOLDED))} (--max-ind-range)",
}
CONVERT = "convert:"
# other forms of a method: narrow rows, and pointers or codes of which one for an id is left
FORMS = {"hot_cold": ("width=4", "width=2"), "cce": ("chunks=1",), "pq": ("chunks=1",), "robe": ("aligned=false",)}


@dataclass(frozen=True)
class Run:
    """One line of the plan.

    label   what the table calls it: "qr", "tt:cores=3", "convert:svd", "rare"
    point   where on its line: "10x", "K=5"; "" for a method whose size nothing sets
    kind    "source": a plain model of one epoch that conversions start from; "train": from the start; "convert": from the source, then on
    method  for --compress; "" for plain tables
    budget  for --compress-to; "" for none
    data    flags that change the processed data: another file for each
    """

    label: str
    point: str
    seed: int
    kind: str = "train"
    method: str = ""
    budget: str = ""
    data: tuple[str, ...] = ()
    rate_share: float = 1.0
    optimizer: str = ""

    @property
    def group(self) -> str:
        """The same for all seeds."""
        return f"{self.label} {self.point}".strip()

    @property
    def key(self) -> str:
        """A file's name."""
        return re.sub(r"[^\w.=,+-]", "_", f"{self.group}-s{self.seed}")

    def flags(self, learning_rate: float) -> tuple[str, ...]:
        """Those that tell this run from the others, without folders and files."""
        compress = ((f"--compress={self.method}",) if self.method else ()) + ((f"--compress-to={self.budget}",) if self.budget else ())
        rate = (f"--learning-rate={learning_rate * self.rate_share:g}",) if self.rate_share != 1 else ()
        optimizer = (f"--optimizer={self.optimizer}",) if self.optimizer else ()
        return (f"--numpy-rand-seed={self.seed}", *compress, *self.data, *rate, *optimizer)


def parse_methods(text: str) -> list[str]:
    """"tt:rank=4,cores=3,qr,convert:svd" -> three labels; "": all. UserError for names and knobs that are none."""
    labels: list[str] = []
    for piece in (piece.strip() for piece in text.split(",")):
        if not piece:
            continue
        if "=" in piece and ":" not in piece and labels:  # a further knob of the label before
            labels[-1] += f",{piece}"
        else:
            labels.append(piece)
    if not labels:
        return [*BASELINES, *(label for name, method in sorted(METHODS.items()) for label in _labels(method))]
    for label in labels:
        if label in BASELINES:
            continue
        try:
            method = METHODS[parse_asked(label.removeprefix(CONVERT)).method]
        except UserError as error:
            raise UserError(f"--methods: {error}; and the baselines {', '.join(BASELINES)}") from None
        converts = label.startswith(CONVERT)
        if converts and method.convert is None:
            raise UserError(f"--methods: {label}: {method.name} is not made from a trained table; leave out {CONVERT}")
        if not converts and method.create is None:
            raise UserError(f"--methods: {label}: {method.name} is made from a trained table; write {CONVERT}{label}")
    return list(dict.fromkeys(["plain", *labels]))


def _labels(method: Method) -> list[str]:
    """How a sweep of everything has a method: conversions go by traffic, and some methods come in other forms too."""
    name = method.name
    if method.create is None:
        name = CONVERT + name + (":weighted=true" if method.weighted else "")
    return [name, *(f"{name}{',' if ':' in name.removeprefix(CONVERT) else ':'}{knobs}" for knobs in FORMS.get(method.name, ()))]


def parse_ratios(text: str) -> list[str]:
    """"3,10" -> ["3x", "10x"]"""
    ratios = []
    for piece in text.split(","):
        try:
            value = float(piece)
        except ValueError:
            value = 0.0
        if not 1 <= value < 1e6:
            raise UserError(f"--ratios={text}: {piece.strip()!r} is not a number from 1 to 999999; as {RATIOS}")
        ratios.append(f"{value:g}x")
    return list(dict.fromkeys(ratios))


def plan(labels: list[str], ratios: list[str], num_seeds: int) -> list[Run]:
    """Every run, sources first; a seed is done for all methods before the next, so that a sweep that is cut short can be read."""
    seeds = range(FIRST_SEED, FIRST_SEED + num_seeds)
    converting = any(label.startswith(CONVERT) for label in labels)
    runs = [Run("source", "", seed, "source") for seed in seeds] if converting else []
    for seed in seeds:
        for label in labels:
            runs += _baseline(label, seed) if label in BASELINES else _method(label, ratios, seed)
    return runs


def _baseline(label: str, seed: int) -> list[Run]:
    if label == "rare":
        return [Run(label, f"K={number}", seed, data=(f"--min-frequency={number}",)) for number in RARE]
    if label == "folded":
        return [Run(label, f"N={number}", seed, data=(f"--max-ind-range={number}",)) for number in FOLDED]
    if label == "slow":
        return [Run(label, f"{share:g}", seed, rate_share=share) for share in SLOW]
    return [Run(label, "", seed, optimizer=label if label == "rwsadagrad" else "")]


def _method(label: str, ratios: list[str], seed: int) -> list[Run]:
    kind = "convert" if label.startswith(CONVERT) else "train"
    asked = label.removeprefix(CONVERT)
    method = METHODS[parse_asked(asked).method]
    optimizer = OPTIMIZERS.get(method.name, "") if kind == "train" else ""
    budgets = ratios if method.sized_by else [""]
    return [Run(label, budget, seed, kind, asked, budget, optimizer=optimizer) for budget in budgets]
