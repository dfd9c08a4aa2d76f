"""A picture of a run, drawn from its folder alone: loss, AUC and log loss at the tests, the flags that matter, the last figures.

python -m dlrm_xla.summary RUN_DIR      draws RUN_DIR/summary.png again
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dlrm_xla.specs import UserError

SMOOTH_FROM = 60  # points from which a running mean is drawn over the raw losses
FLAGS = (  # what tells one run from another, in the caption's order; a flag without a value or at a value of OFF is left out
    "device", "data-generation", "data-set", "mini-batch-size", "nepochs", "num-batches", "optimizer", "learning-rate", "loss-function",
    "arch-sparse-feature-size", "arch-embedding-size", "arch-mlp-bot", "arch-mlp-top", "arch-interaction-op", "num-indices-per-lookup",
    "qr-flag", "qr-collisions", "md-flag", "weighted-pooling", "matmul-precision", "numpy-rand-seed", "upstream-compat",
)  # fmt: skip
OFF = ("", "0", "None", "null", "false", "False")
NEEDS = {  # a flag that says something only where another has this value
    "data-set": ("data-generation", "dataset"),
    "arch-embedding-size": ("data-generation", "random"),
    "num-indices-per-lookup": ("data-generation", "random"),
    "qr-collisions": ("qr-flag", "true"),
}
INK, GREY, BLUE, ORANGE, GREEN = "#222222", "#8a8a8a", "#2166ac", "#d6604d", "#1b7837"


@dataclass
class Run:
    """What metrics.jsonl and config.yaml say about the last run in a folder and the resumes that belong to it.

    train, test   rows of metrics.jsonl, oldest first, without those that a resumed run went over again
    resumed_at    steps at which it was resumed
    """

    name: str
    config: dict[str, str]
    train: list[dict] = field(default_factory=list)
    test: list[dict] = field(default_factory=list)
    resumed_at: list[int] = field(default_factory=list)
    bayes_auc: float | None = None


def read_run(run_dir: Path) -> Run:
    """Raises UserError for a folder that holds no run. Lines that are not JSON (cut off by a kill) are passed over."""
    path = Path(run_dir) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{run_dir}: no run to draw: metrics.jsonl cannot be read ({error.strerror}); give a run's folder") from None
    run = Run(Path(run_dir).resolve().name, _read_config(Path(run_dir) / "config.yaml"))
    num_rows = 0
    for line in text.splitlines():
        try:
            row = json.loads(line)
            kind, step = row["kind"], row["step"]
        except (ValueError, KeyError, TypeError):
            continue
        if kind != "end" and not isinstance(step, int):
            continue
        num_rows += 1
        if kind == "start":
            if row.get("resumed"):
                run.train = [earlier for earlier in run.train if earlier["step"] <= step]
                run.test = [earlier for earlier in run.test if earlier["step"] <= step]
                run.resumed_at.append(step)
            else:
                run.train, run.test, run.resumed_at = [], [], []
            run.bayes_auc = row.get("bayes_auc")
        elif kind == "train" and row.get("loss") is not None:  # a loss that is not a number stands as null
            run.train.append(row)
        elif kind == "test":
            run.test.append(row)
    if num_rows == 0:
        raise UserError(f"{path}: holds no line of a run; give a run's folder")
    return run


def draw(run_dir: Path) -> Path:
    """Writes `run_dir`/summary.png, whole or not at all, and returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second; no window, no global state of pyplot
    from matplotlib.figure import Figure

    run = read_run(run_dir)
    tests = [row for row in run.test if row["step"] >= 0]
    with_auc = [row for row in tests if row.get("auc") is not None]
    panels = [_draw_loss] * bool(run.train or tests) + [_draw_auc] * bool(with_auc)
    caption = _caption(run)
    text_height = 0.25 + 0.2 * len(caption)  # inches
    height = (4.8 if panels else 0.6) + text_height
    figure = Figure(figsize=(11, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    if panels:
        top, bottom = 1 - 0.85 / height, (0.4 + text_height) / height
        grid = figure.add_gridspec(1, len(panels), width_ratios=[1.35, 1][: len(panels)], left=0.07, right=0.975, top=top, bottom=bottom)
        for column, panel in enumerate(panels):
            axes = figure.add_subplot(grid[0, column])
            panel(axes, run, tests if panel is _draw_loss else with_auc)
            _finish(axes, run, legend="best" if panel is _draw_loss else "lower right")
    title = 1 - 0.3 / height
    name = run.name if len(run.name) <= 40 else run.name[:37] + "..."
    figure.text(0.07, title, name, fontsize=14, fontweight="bold", color=INK, va="center", parse_math=False)
    figure.text(0.975, title, _last_figures(run), fontsize=10.5, color=INK, ha="right", va="center")
    for number, line in enumerate(reversed(caption)):
        figure.text(0.07, (0.18 + 0.2 * number) / height, line, fontsize=8.5, color="#555555", va="center", parse_math=False)
    path = Path(run_dir) / "summary.png"
    beside = path.with_name("summary.png.tmp")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise
    return path


def _draw_loss(axes, run: Run, tests: list[dict]) -> None:
    """Training loss and, where it is the same function, log loss at the tests."""
    steps, losses = np.array([row["step"] for row in run.train]), np.array([row["loss"] for row in run.train], dtype=np.float64)
    log_loss = [(row["step"], row["log_loss"]) for row in tests if row.get("log_loss") is not None]
    function = run.config.get("loss-function", "")
    if len(losses) >= SMOOTH_FROM:
        axes.plot(steps, losses, color=BLUE, alpha=0.22, linewidth=0.7, label="_")
        axes.plot(
            steps,
            running_mean(losses),
            color=BLUE,
            linewidth=1.8,
            label=f"training loss{f' ({function})' if function else ''}, running mean",
        )
        low, high = np.percentile(losses, [0.2, 99.5])  # single outliers may leave the picture
        axes.set_ylim(low - 0.06 * (high - low or 1), high + 0.06 * (high - low or 1))
    elif len(losses):
        axes.plot(
            steps,
            losses,
            color=BLUE,
            linewidth=1.5,
            marker="o",
            markersize=3.5,
            label=f"training loss{f' ({function})' if function else ''}",
        )
    if log_loss:
        axes.plot(*zip(*log_loss, strict=True), color=ORANGE, linewidth=1.5, marker="o", markersize=4, label="test log loss")
        if len(losses) >= SMOOTH_FROM:
            bottom, top = axes.get_ylim()
            values = [value for _, value in log_loss]
            axes.set_ylim(min(bottom, min(values) - 0.02 * (top - bottom)), max(top, max(values) + 0.02 * (top - bottom)))
    every = np.concatenate([losses, [value for _, value in log_loss]])
    if every.min() > 0 and every.max() > 40 * every.min():
        axes.set_autoscaley_on(True)
        axes.set_yscale("log")
    axes.set_title("Loss", fontsize=11, loc="left", color=INK)


def _draw_auc(axes, run: Run, tests: list[dict]) -> None:
    auc = [row["auc"] for row in tests]
    axes.plot([row["step"] for row in tests], auc, color=GREEN, linewidth=1.6, marker="o", markersize=4, label="test AUC")
    best = int(np.argmax(auc))
    axes.annotate(
        f"{auc[best]:.4f}", (tests[best]["step"], auc[best]), xytext=(4, -8), textcoords="offset points", ha="right", va="top", fontsize=9,
        color=GREEN,
    )  # fmt: skip
    if run.bayes_auc is not None:
        axes.axhline(run.bayes_auc, color=INK, linewidth=1.1, linestyle="--", label=f"best any model can reach, {run.bayes_auc:.4f}")
    axes.margins(y=0.18)
    axes.set_title("AUC at the tests", fontsize=11, loc="left", color=INK)


def _finish(axes, run: Run, legend: str) -> None:
    """What both panels share."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for number, step in enumerate(run.resumed_at):
        axes.axvline(step, color=GREY, linewidth=0.9, linestyle=":", label="resumed" if number == 0 else "_")
    last = max(row["step"] for row in [*run.train, *run.test])
    axes.set_xlim(-0.02 * last, 1.03 * last)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("batches", fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors="#444444")
    axes.grid(True, color="#e6e6e6", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b0b0b0")
    axes.legend(fontsize=8.5, frameon=False, loc=legend)


def running_mean(values: np.ndarray) -> np.ndarray:
    """[n] -> [n]: mean over a centred window of a twentieth of the points, shorter at the ends."""
    half = max(1, len(values) // 40)
    total = np.concatenate([[0.0], np.cumsum(values)])
    place = np.arange(len(values))
    first, last = np.maximum(place - half, 0), np.minimum(place + half + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def _last_figures(run: Run) -> str:
    parts = []
    if run.test:
        last = run.test[-1]
        named = (("AUC", "auc"), ("log loss", "log_loss"), ("NE", "normalized_entropy"), ("calibration", "calibration"))
        parts = [f"{name} {last[key]:.4f}" for name, key in named if last.get(key) is not None]
        if last.get("accuracy") is not None:
            parts.append(f"accuracy {100 * last['accuracy']:.2f} %")
        return "last test:  " + "   ".join(parts)
    if run.train:
        return f"last training loss {run.train[-1]['loss']:.4f}, not tested"
    return "no figures"


def _caption(run: Run) -> list[str]:
    """Flags, then size and speed, in lines of up to 150 letters."""
    values = {name: run.config[name] for name in FLAGS if run.config.get(name, "") not in OFF}
    flags = [
        f"--{name}={value if len(value) <= 40 else value[:37] + '...'}"
        for name, value in values.items()
        if name not in NEEDS or run.config.get(NEEDS[name][0]) == NEEDS[name][1]
    ]
    facts = []
    if run.train:
        speeds = [row["samples_per_s"] for row in run.train if row.get("samples_per_s")]
        waits = [row["data_wait_share"] for row in run.train if row.get("data_wait_share") is not None]
        facts.append(f"{run.train[-1]['step']:,} batches trained")
        if speeds:
            facts.append(f"median {np.median(speeds):,.0f} samples/s")
        if waits:
            facts.append(f"median {100 * np.median(waits):.1f} % of time waiting for data")
        if run.train[-1].get("compiles") is not None:
            facts.append(f"{run.train[-1]['compiles']} XLA compiles")
    if run.test and run.test[-1].get("num_rows"):
        facts.append(f"{run.test[-1]['num_rows']:,} rows tested")
    lines = [""]
    for flag in flags:
        if len(lines[-1]) + len(flag) > 148:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + flag
    return [line for line in [*lines, ", ".join(facts)] if line]


def _read_config(path: Path) -> dict[str, str]:
    """config.yaml as flag name: text; {} if it is missing or broken, because the figures can be drawn without it."""
    import yaml

    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {str(name).replace("_", "-"): str(value) for name, value in values.items()} if isinstance(values, dict) else {}


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0].startswith("-"):
        print("error: usage: python -m dlrm_xla.summary RUN_DIR", file=sys.stderr)
        return 2
    try:
        print(draw(Path(argv[0])))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {argv[0]}/summary.png: cannot be written ({error.strerror})", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
