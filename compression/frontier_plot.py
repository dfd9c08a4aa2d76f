"""The picture of a sweep: a line for each method, AUC against bytes; left after one epoch, right the best epoch."""

import os
from pathlib import Path

import numpy as np

from dlrm_xla.specs import size_text

# Okabe and Ito's colours, told apart by colour-blind people too; marker and dash tell lines of one colour apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
SHAPES = (("o", "-"), ("s", "--"), ("^", ":"), ("D", "-."))
AS_PLAIN = ("plain", "slow", "rwsadagrad")  # of the full size: the first is a band, the others are in the table
INK, GREY = "#222222", "#8a8a8a"
LABEL_HEIGHT = 0.165  # inches of a label


def draw(points: list, path: Path) -> None:
    """points: of frontier.points, those with figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = [point for point in points if point.label == "plain" or point.label not in AS_PLAIN]
    plain = next((point for point in points if point.label == "plain"), None)
    lines: dict[str, list] = {}
    for point in points:
        if point.label != "plain":
            lines.setdefault(point.label, []).append(point)
    height = max(6.2, 3.2 + LABEL_HEIGHT * len(lines))
    figure = Figure(figsize=(15, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    bottom, top = 0.75 / height, 1 - 0.95 / height
    panels = (("AUC after one epoch", lambda point: point.auc), ("AUC, best of the epochs", lambda point: point.best_auc))
    low, high = _limits([value(point) for _, value in panels for point in points])
    sizes = [point.bytes for point in points]
    for number, (title, value) in enumerate(panels):
        axes = figure.add_axes([0.105 + 0.495 * number, bottom, 0.355, top - bottom])
        axes.set_ylim(low, high)
        axes.set_xscale("log")
        axes.set_xlim(min(sizes) / 1.25, max(sizes) * 1.25)
        if plain is not None:
            _band(axes, value(plain))
        for index, (label, of_line) in enumerate(lines.items()):
            _line(axes, index, label, of_line, value)
        _labels(axes, lines, value, (top - bottom) * height)
        _finish(axes, title, plain)
    seeds = max(point.seeds for point in points)
    caption = f"mean of {seeds} seeds; bars and the grey band: ± one standard deviation between seeds" if seeds > 1 else "one seed"
    figure.text(0.02, 1 - 0.28 / height, "Test AUC against the bytes of all embedding tables", fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(
        0.98, 1 - 0.28 / height, caption, fontsize=9.5, color=INK, ha="right",
        va="center",
    )  # fmt: skip
    beside = path.with_name(path.name + ".tmp")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _limits(figures: list) -> tuple[float, float]:
    """All means; a single model that learnt nothing does not flatten the others."""
    means = np.array([one.mean for one in figures])
    low, high = max(means.min(), np.median(means) - 0.025), means.max()
    room = 0.08 * (high - low) or 0.01
    return low - room, high + room


def _style(index: int) -> dict:
    marker, dash = SHAPES[(index // len(COLOURS)) % len(SHAPES)]
    return {"color": COLOURS[index % len(COLOURS)], "marker": marker, "linestyle": dash}


def _band(axes, figure) -> None:
    spread = figure.spread or 0.0
    axes.axhspan(figure.mean - spread, figure.mean + spread, color="#d9d9d9", zorder=0, linewidth=0)
    axes.axhline(figure.mean, color=GREY, linewidth=1.0, zorder=1)
    axes.annotate(
        f"plain {figure.mean:.4f}", (0.94, figure.mean + spread), xycoords=("axes fraction", "data"), xytext=(0, 2), textcoords="offset points",
        ha="right", va="bottom", fontsize=8.5, color="#555555",
    )  # fmt: skip


def _line(axes, index: int, label: str, points: list, value) -> None:
    spreads = [value(point).spread or 0.0 for point in points]
    axes.errorbar(
        [point.bytes for point in points], [value(point).mean for point in points], yerr=spreads, linewidth=1.3, markersize=4.5, capsize=2,
        elinewidth=0.8, alpha=0.9, **_style(index),
    )  # fmt: skip


def _short(label: str) -> str:
    """"convert:pq:weighted=true,chunks=1" -> "pq:chunks=1 *": conversions are marked, and all that can go by traffic do."""
    name = label.removeprefix("convert:")
    short = name.replace("weighted=true,", "").replace(":weighted=true", "")
    return short + (" *" if name != label else "")


def _labels(axes, lines: dict, value, height: float) -> None:
    """Names in a column left of the axes, each joined to the small end of its line."""
    low, high = axes.get_ylim()
    ends = sorted(((value(of_line[-1]).mean, index, label) for index, (label, of_line) in enumerate(lines.items())))
    step = min(LABEL_HEIGHT / height, 1 / max(1, len(ends)))  # in fractions of the axes
    wanted = [min(max((mean - low) / (high - low), 0.0), 1.0) for mean, _, _ in ends]
    places = spread_out(wanted, step)
    for (mean, index, label), place in zip(ends, places, strict=True):
        style = _style(index)
        end = list(lines.values())[index][-1]
        axes.annotate(
            _short(label), (end.bytes, min(max(mean, low), high)), xytext=(-0.02, place), textcoords="axes fraction", ha="right", va="center",
            fontsize=8.5,
            color=style["color"], annotation_clip=False, arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.5, "alpha": 0.55,
            "shrinkA": 1, "shrinkB": 3, "relpos": (1, 0.5)},
        )  # fmt: skip


def spread_out(wanted: list[float], step: float) -> list[float]:
    """Rising places at least `step` apart, in 0..1 where that has room, and in the mean as little as can be from the wanted ones (rising too)."""
    groups: list[list[float]] = []  # neighbours that touch: where their first would be in the mean, how many
    for index, place in enumerate(wanted):
        groups.append([place - index * step, 1])
        while len(groups) > 1 and groups[-2][0] >= groups[-1][0]:
            (first, many), (second, more) = groups[-2:]
            groups[-2:] = [[(first * many + second * more) / (many + more), many + more]]
    firsts = [min(max(first, 0.0), 1 - (len(wanted) - 1) * step) for first, many in groups for _ in range(many)]
    return [first + index * step for index, first in enumerate(firsts)]


def _finish(axes, title: str, plain) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_title(title, fontsize=11, loc="left", color=INK, pad=22)
    axes.set_xlabel("bytes of all tables, without optimizer state;  * converted after one epoch", fontsize=9, color=INK)
    axes.xaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    if plain is not None:
        _ratios(axes, plain.bytes)
    axes.tick_params(labelsize=8.5, colors="#444444")
    axes.yaxis.tick_right()  # the names are on the left
    axes.grid(True, color="#e9e9e9", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "left"):
        axes.spines[side].set_visible(False)
    for side in ("right", "bottom"):
        axes.spines[side].set_color("#b0b0b0")


def _ratios(axes, plain_bytes: int) -> None:
    """How many times smaller than the plain tables, above the axes."""
    low, high = axes.get_xlim()
    for ratio in (1, 3, 10, 30, 100, 300, 1000, 3000):
        place = plain_bytes / ratio
        if low <= place <= high:
            axes.axvline(place, color="#c8c8c8", linewidth=0.6, linestyle=":", zorder=0)
            axes.text(place, 1.012, f"{ratio}x", transform=axes.get_xaxis_transform(), fontsize=8.5, color="#444444", ha="center", va="bottom")
