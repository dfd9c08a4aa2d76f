"""What a sweep found, as a table and a picture: test AUC against honest bytes. python -m compression frontier OUT draws them again.

Honest bytes are those of all tables together: rows, dense parameters, codes, pointers and seeds, of the small tables that stay plain too
(compression/ledger.py), without the optimizer's state. A figure is the mean over seeds, +- the standard deviation between them (n - 1).
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from compression.sweep_plan import BASELINES
from compression.sweep_run import write_text
from data_loaders.command import ended
from dlrm_xla.specs import UserError, size_text

COLUMNS = (
    "method", "asked", "tables", "ratio", "AUC, 1 epoch", "AUC, best", "log loss, 1 epoch", "log loss, best", "gap 1", "gap last", "lookup us",
    "step ms",
)  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """Of some seeds."""

    mean: float
    spread: float | None  # None: of one seed

    def text(self) -> str:
        return f"{self.mean:.4f}" + ("" if self.spread is None else f" ± {self.spread:.4f}")


@dataclass(frozen=True)
class Point:
    """A method at one size. Figures are None where no seed has one.

    auc, log_loss            after one epoch (converted tables: as converted, after the one epoch of the plain model)
    best_auc, best_log_loss  of the tests after each epoch, each seed's best
    gap, last_gap            test log loss minus training loss (sweep_run.read_epochs), after the first and the last epoch that have both
    """

    label: str
    asked: str
    seeds: int
    bytes: int | None
    ratio: float | None
    error: str
    auc: Figure | None = None
    best_auc: Figure | None = None
    log_loss: Figure | None = None
    best_log_loss: Figure | None = None
    gap: Figure | None = None
    last_gap: Figure | None = None
    times: dict | None = None

    @property
    def name(self) -> str:
        return f"{self.label} {self.asked}".strip()


def points(content: dict) -> list[Point]:
    """Of sweep.json: baselines first, then methods by name, each from large to small."""
    groups: dict[tuple[str, str], list[dict]] = {}
    for run in content["runs"]:
        if run["kind"] != "source":
            groups.setdefault((run["label"], run["point"]), []).append(run)
    found = [_point(label, asked, runs, content["times"]) for (label, asked), runs in groups.items()]
    order = list(BASELINES)
    return sorted(
        found, key=lambda p: (order.index(p.label) if p.label in order else len(order), p.label, p.bytes is None, -(p.bytes or 0), p.asked)
    )


def _point(label: str, asked: str, runs: list[dict], times: dict) -> Point:
    good = [run for run in runs if "error" not in run]
    errors = [run["error"] for run in runs if "error" in run]
    if not good:
        return Point(label, asked, 0, None, None, errors[0])
    tests = [run["epochs"] for run in good]
    most = max(len(epochs) for epochs in tests)
    whole = [epochs for epochs in tests if len(epochs) == most]  # a sweep of fewer epochs may add seeds to another
    gaps = [[e["log_loss"] - e["train_loss"] for e in epochs if e["train_loss"] is not None] for epochs in tests]
    return Point(
        label,
        asked,
        len(good),
        good[0]["bytes"],
        good[0]["ratio"],
        errors[0] if errors else "",
        figure(epochs[0]["auc"] for epochs in tests),
        figure(max((e["auc"] for e in epochs if e["auc"] is not None), default=None) for epochs in whole),
        figure(epochs[0]["log_loss"] for epochs in tests),
        figure(min(e["log_loss"] for e in epochs) for epochs in whole),
        figure(gap[0] if gap else None for gap in gaps),
        figure(gap[-1] if gap else None for gap, epochs in zip(gaps, tests, strict=True) if len(epochs) == most),
        times.get(f"{label} {asked}".strip()),
    )


def figure(values) -> Figure | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Figure(float(np.mean(known)), float(np.std(known, ddof=1)) if len(known) > 1 else None)


def markdown(content: dict) -> str:
    """The table, what its columns are, and what failed."""
    found = points(content)
    lines = [f"| {' | '.join(COLUMNS)} |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    lines += [f"| {' | '.join(_cells(point))} |" for point in found if point.seeds]
    test_rows = max((epoch["test_rows"] for run in content["runs"] for epoch in run.get("epochs", ())), default=0)
    seeds = max((point.seeds for point in found), default=0)
    lines += [
        "",
        f"Means over {seeds} seeds ± their standard deviation; {content['epochs']} epochs, a test over {test_rows:,} rows after each; "
        f"best: each seed's best test{_whole(content)}. Bytes are of all tables, the small ones that stay plain included, without optimizer state. "
        "gap: test log loss minus the mean loss of the batches of an epoch's second half as they came (in the first epoch the model has not seen "
        "those rows before), after the first and the last epoch. "
        "convert: tables made of those of a plain model after one epoch; its first figures are before any training goes on. "
        + "; ".join(f"{name}: {text}" for name, text in BASELINES.items())
        + ". Times: medians of the processor's time on one core: lookup of all tables for one batch without gradients, and a whole training step.",
        "",
        "Flags of all runs: `" + " ".join(content["flags"]) + "`",
    ]
    failed = [point for point in found if point.error]
    if failed:
        lines += ["", "Not run or failed:", *(f"- {point.name}: {point.error}" for point in failed)]
    return "\n".join(lines) + "\n"


def _whole(content: dict) -> str:
    """How many seeds have all epochs, where not all have."""
    most = {run["seed"] for run in content["runs"] if len(run.get("epochs", ())) == content["epochs"]}
    every = {run["seed"] for run in content["runs"] if run.get("epochs")}
    return "" if most == every else f" (of seed{'s' * (len(most) > 1)} {', '.join(map(str, sorted(most)))}; the others have fewer epochs)"


def _cells(point: Point) -> list[str]:
    figures = (point.auc, point.best_auc, point.log_loss, point.best_log_loss, point.gap, point.last_gap)
    times = point.times or {}
    shown = [f"{times[name]:.{digits}f}" if name in times else "-" for name, digits in (("lookup_us", 0), ("step_ms", 2))]
    texts = ["-" if one is None else one.text() for one in figures]
    return [point.label, point.asked, size_text(point.bytes), f"{point.ratio:.3g}x", *texts, *shown]


def read(out: Path) -> dict:
    """The sweep.json of a folder."""
    try:
        return json.loads((out / "sweep.json").read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{out}/sweep.json: cannot be read ({error.strerror}); give the folder of a sweep") from None
    except ValueError:
        raise UserError(f"{out}/sweep.json: is no JSON; run the sweep's command again") from None


def merged(contents: list[dict]) -> dict:
    """Several sweeps with the same flags as one: of two runs of the same name the one of more epochs counts, of times the last."""
    first = contents[0]
    best: dict[tuple, dict] = {}
    for content in contents:
        if content["flags"] != first["flags"]:
            raise UserError(f"the sweeps have other flags: {' '.join(first['flags'])} and {' '.join(content['flags'])}; compare equal ones only")
        for run in content["runs"]:
            key = (run["label"], run["point"], run["seed"])
            if key not in best or len(run.get("epochs", ())) > len(best[key].get("epochs", ())):
                best[key] = run
    times = {name: value for content in contents for name, value in content["times"].items()}
    epochs = max(content["epochs"] for content in contents)
    return {**first, "epochs": epochs, "runs": list(best.values()), "times": times}


def write(out: Path, others: list[Path] | None = None) -> list[Path]:
    """Writes frontier.md and frontier.png beside sweep.json, of that and of other sweeps; their paths."""
    content = merged([read(folder) for folder in (out, *(others or ()))])
    paths = [out / "frontier.md", out / "frontier.png"]
    write_text(paths[0], markdown(content))
    return [out / "sweep.json", paths[0], *([paths[1]] if draw(content, paths[1]) else [])]


def draw(content: dict, path: Path) -> bool:
    """The picture, whole or not at all; False where there is no figure to show."""
    from compression.frontier_plot import draw as draw_points

    shown = [point for point in points(content) if point.auc is not None and math.isfinite(point.auc.mean)]
    if not shown:
        return False
    draw_points(shown, path)
    return True


def main(argv: list[str]) -> int:
    def work() -> None:
        if not argv or any(word.startswith("-") for word in argv):
            raise UserError("usage: python -m compression frontier FOLDER [MORE FOLDERS] (of sweeps; the first is written to)")
        for path in write(Path(argv[0]), [Path(word) for word in argv[1:]]):
            print(path)

    return ended(work)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
