"""The pictures of a report, drawn from its figures alone."""

import io
import math

import numpy as np

from compression.frontier_plot import spread_out
from dlrm_xla.specs import size_text

# Okabe and Ito's colours, told apart by colour-blind people too; markers and dashes tell apart what they do not
BLUE, RED, GREEN, PINK, SKY, ORANGE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000"
INK, GREY = "#222222", "#8a8a8a"
OF_POWER = {0: (RED, "o"), 1: (GREEN, "s"), 2: (ORANGE, "^")}
MOST_TABLES, MOST_SPECTRA = 3, 8  # of trained tables in a picture, the largest
LINES = {  # of error_against_bytes.png: label, start of what is typed, colour, marker, dash
    "SVD (the optimum of each rank)": ("svd:", BLUE, "o", "-"),
    "TT-SVD": ("tt_svd:", RED, "s", "-"),
    "random projection": ("random_projection:", GREY, "v", ":"),
    "hash, mean of the ids": ("hash:", BLACK, "x", "--"),
    "product quantization, D / 4 chunks": ("pq:bits", GREEN, "^", "-"),
    "codebook for each column": ("pq:chunks", SKY, "D", "-."),
    "int4": ("int4:", PINK, "P", "--"),
    "int8": ("int8:", ORANGE, "*", "--"),
}


def pictures(content: dict) -> dict:
    """File name -> figure. content: as in report.json."""
    made = {"error_against_rank.png": error_against_rank(content["known"])}
    if content["tables"]:
        if any(row["method"] == "svd" for row in content["tables"][0]["results"]):
            made["error_against_rank_trained.png"] = error_against_rank_trained(content["tables"][:MOST_TABLES])
        made["error_against_bytes.png"] = error_against_bytes(content["tables"][:MOST_TABLES])
        made["spectrum.png"] = spectrum(content["tables"][:MOST_SPECTRA])
    if content["times"]:
        made["time_against_rows.png"] = time_against_rows(content["times"])
    return made


def png(figure) -> bytes:
    """With a palette: a third of the bytes."""
    from PIL import Image

    figure.canvas.draw()
    held = io.BytesIO()
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())[..., :3]).quantize(256).save(held, "PNG", optimize=True)
    return held.getvalue()


def error_against_rank(known: list[dict]):
    """Above the errors, below how many times the optimum they are; a column for each spectrum."""
    first = known[0]
    caption = f"tables of {first['rows']:,} x {first['dim']}, one draw for each point; oversampling max(10, rank), so from half of D on it is exact"
    figure = _figure(14, 6, "Randomized SVD beside the optimum, on known spectra", caption)
    grid = figure.add_gridspec(2, len(known), left=0.05, right=0.99, top=0.83, bottom=0.085, hspace=0.13, wspace=0.26, height_ratios=[1.2, 1])
    highest = max(row["bound"] / max(row["optimal"], 1e-12) for one in known for row in one["results"])
    for column, one in enumerate(known):
        above, below = figure.add_subplot(grid[0, column]), figure.add_subplot(grid[1, column])
        by_power = {power: [row for row in one["results"] if row["power"] == power] for power in OF_POWER}
        rows = by_power[0]
        ranks = [row["rank"] for row in rows]
        above.plot(ranks, [row["optimal"] for row in rows], color=BLUE, linewidth=2, label="optimum (Eckart-Young)")
        above.plot(ranks, [row["bound"] for row in rows], color=INK, linewidth=1.1, linestyle="--", label="bound of the randomized mean (HMT)")
        guess = np.sqrt(1 - np.array(ranks) / one["dim"])
        above.plot(ranks, guess, color=GREY, linewidth=1.1, linestyle=":", label="a random projection: sqrt(1 - rank / D)")
        below.plot(ranks, [row["bound"] / max(row["optimal"], 1e-12) for row in rows], color=INK, linewidth=1.1, linestyle="--")
        below.axhline(1, color=BLUE, linewidth=2)
        for power, (colour, marker) in OF_POWER.items():
            style = {"color": colour, "marker": marker, "markersize": 5 if power == 0 else 4, "linestyle": "none", "zorder": 5 - power}
            above.plot(ranks, [row["relative_error"] for row in by_power[power]], label=_power_label(power), **style)
            below.plot(ranks, [row["ratio"] for row in by_power[power]], **{**style, "linestyle": "-", "linewidth": 1})
        above.set_title(f"s_j: {one['spectrum']}", fontsize=10.5, loc="left", color=INK)
        above.set_yscale("log")
        _rank_axes(above, ranks)
        _log_ticks(above.yaxis, (1, 2, 3, 5))
        _rank_axes(below, ranks)
        below.set_ylim(0.97, highest + 0.04)
        below.set_xlabel("rank", fontsize=9, color=INK)
        above.set_xticklabels([])
        if column == 0:
            above.set_ylabel("relative error", fontsize=9, color=INK)
            below.set_ylabel("times the optimum", fontsize=9, color=INK)
            _legend(figure, *above.get_legend_handles_labels(), columns=6)
    return figure


def error_against_rank_trained(tables: list[dict]):
    """A column for each table: above the error, below the weighted error, with the methods that minimize it."""
    figure, panels = _panels(tables, "Trained tables: error against rank", 2.7, 7)
    handles = {}
    for axes, table, suffix in panels:
        _trained_panel(axes, table, suffix, "spectrum_weighted" in table)
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.set_title(f"{table['table']}, {table['rows']:,} x {table['dim']}" * (not suffix), fontsize=10.5, loc="left", color=INK)
    _finish_panels(panels, "rank")
    _legend(figure, list(handles.values()), list(handles), columns=_columns(figure))
    return figure


def _trained_panel(axes, table: dict, suffix: str, weighted: bool) -> None:
    mine, others = (",weighted=true", "") if suffix else ("", ",weighted=true")

    def points(method: str, knobs: str, name: str = "relative_error") -> tuple[list, list]:
        rows = [row for row in table["results"] if row["typed"] == f"{method}:rank={row['knobs'].get('rank')}{knobs}"]
        return [row["knobs"]["rank"] for row in rows], [row[name + suffix] for row in rows]

    ranks, optimal = points("svd", mine, "optimal")
    axes.plot(ranks, optimal, color=BLUE, linewidth=2, label="optimum (Eckart-Young) of this norm")
    if weighted:
        axes.plot(*points("svd", others), color=PINK, linewidth=1.4, linestyle="-.", label="SVD that minimizes the other norm")
    few = ",oversampling=2,power=0" + mine
    axes.plot(*points("rsvd", few, "bound"), color=INK, linewidth=1.1, linestyle="--", label="bound of the mean, rank + 2 directions")
    axes.plot(*points("rsvd", few), color=RED, marker="o", markersize=5, linestyle="none", fillstyle="none",
              label="randomized, rank + 2 directions, power 0")  # fmt: skip
    axes.plot(*points("rsvd", ",power=1" + mine), color=GREEN, marker="s", markersize=4, linestyle="none", label="randomized, default, power 1")
    axes.plot(*points("random_projection", ""), color=GREY, marker="v", markersize=4, linewidth=1, linestyle=":", label="random projection")
    axes.set_ylim(0, None)
    _rank_axes(axes, ranks)


def error_against_bytes(tables: list[dict]):
    """A column for each table; below, ids weighted by lookups, each method then minimizing that where it can."""
    figure, panels = _panels(tables, "Trained tables: error against bytes, without training on", 3.0, len(LINES))
    handles = {}
    least = max(min(row["relative_error" + suffix] for _, table, suffix in panels for row in table["results"]) / 1.3, 1e-4)
    for axes, table, suffix in panels:
        for label, found in of_lines(table["results"], suffix).items():
            _, colour, marker, dash = LINES[label]
            errors = [row["relative_error" + suffix] for row in found]
            (handles[label],) = axes.plot([row["bytes"] for row in found], errors, color=colour, marker=marker, markersize=5, linewidth=1.3,
                                          linestyle=dash)  # fmt: skip
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(least, 1.5)
        axes.set_xlim(table["bytes"] / 300, table["bytes"] * 1.15)
        _byte_axes(axes, table["bytes"])
        axes.set_title(f"{table['table']}, {table['rows']:,} x {table['dim']}" * (not suffix), fontsize=10.5, loc="left", color=INK, pad=18)
    _finish_panels(panels, "bytes")
    _legend(figure, list(handles.values()), list(handles), columns=_columns(figure))
    return figure


def _panels(tables: list[dict], title: str, panel_height: float, labels: int):
    """(figure, (axes, table, suffix of the errors) of each panel): a column for each table, a line for each norm."""
    suffixes = ("", "_weighted") if "spectrum_weighted" in tables[0] else ("",)
    width = max(4.6 * len(tables) + 0.8, 10)
    legend = 0.2 * math.ceil(labels / (4 if width > 12 else 3))
    height = panel_height * len(suffixes) + 1.5 + legend
    figure = _figure(width, height, title, "")
    grid = figure.add_gridspec(len(suffixes), len(tables), left=0.75 / width, right=1 - 0.15 / width, top=1 - (0.95 + legend) / height,
                               bottom=0.5 / height, hspace=0.2, wspace=0.16)  # fmt: skip
    panels = [
        (figure.add_subplot(grid[line, column]), table, suffix) for column, table in enumerate(tables) for line, suffix in enumerate(suffixes)
    ]
    return figure, panels


def _columns(figure) -> int:
    return 4 if figure.get_figwidth() > 12 else 3


def _finish_panels(panels: list, x: str) -> None:
    for axes, table, suffix in panels:
        if suffix == panels[-1][2]:
            axes.set_xlabel(x, fontsize=9, color=INK)
        if table is panels[0][1]:
            axes.set_ylabel("error, ids weighted by lookups" if suffix else "error, all ids alike", fontsize=9, color=INK)


def of_lines(results: list[dict], suffix: str) -> dict[str, list[dict]]:
    """The results of each line of LINES, by bytes; suffix "_weighted": those that minimize the weighted error, where a method has them."""
    lines = {}
    for label, (start, *_) in LINES.items():
        found = [row for row in results if row["typed"].startswith(start) and "range=minmax" not in row["typed"]]
        minimizes = [row for row in found if row["typed"].endswith("weighted=true")]
        plain = [row for row in found if row not in minimizes]
        if suffix and minimizes:
            sizes = {row["bytes"] for row in minimizes}
            plain = [*minimizes, *(row for row in plain if row["bytes"] not in sizes)]
        if plain:
            lines[label] = sorted(plain, key=lambda row: row["bytes"])
    return lines


def spectrum(tables: list[dict]):
    """Singular values over the norm; a panel for each table."""
    from matplotlib.ticker import MaxNLocator

    columns = min(4, len(tables))
    lines = math.ceil(len(tables) / columns)
    weighted = "spectrum_weighted" in tables[0]
    figure = _figure(3.55 * columns + 0.8, 1.45 + 2.4 * lines, "Spectra of trained tables", "")
    height = figure.get_figheight()
    grid = figure.add_gridspec(lines, columns, left=0.75 / figure.get_figwidth(), right=0.985, top=1 - 1.15 / height, bottom=0.5 / height, hspace=0.4,
                               wspace=0.2)  # fmt: skip
    highest = max(value for table in tables for key in ("spectrum", "spectrum_weighted") for value in table.get(key, ()))
    for place, table in enumerate(tables):
        axes = figure.add_subplot(grid[place // columns, place % columns])
        for key, colour, marker, label in (("spectrum", BLUE, "o", "all ids alike"), ("spectrum_weighted", RED, "s", "ids weighted by lookups")):
            if key in table:
                axes.plot(range(1, len(table[key]) + 1), table[key], color=colour, marker=marker, markersize=3.5, linewidth=1.3, label=label)
        count = len(table["spectrum"])
        axes.axhline(1 / math.sqrt(count), color=GREY, linewidth=1.1, linestyle=":", label="flat: as random numbers")
        axes.set_ylim(0, 1.08 * highest)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        axes.set_title(f"{table['table']}, {table['rows']:,} rows", fontsize=10, loc="left", color=INK)
        shares = [f"{100 * table[key][0] ** 2:.0f} %" for key in ("spectrum", "spectrum_weighted") if key in table]
        note = f"first direction: {' / '.join(shares)}\nof the squared norm"
        axes.text(0.97, 0.93, note, transform=axes.transAxes, ha="right", va="top", fontsize=8.5, color="#444444")
        _finish(axes)
        if place // columns == lines - 1:
            axes.set_xlabel("j", fontsize=9, color=INK)
        if place % columns == 0:
            axes.set_ylabel("s_j / |W|", fontsize=9, color=INK)
        if place == 0:
            _legend(figure, *axes.get_legend_handles_labels(), columns=2 + weighted)
    return figure


def time_against_rows(times: list[dict]):
    """Left the times, right randomized / exact; a colour for each width."""
    figure = _figure(12.5, 5.2, "Randomized against exact SVD as tables grow", "CPU time until the right singular vectors are known, rank D / 8")
    grid = figure.add_gridspec(1, 2, left=0.065, right=0.9, top=0.78, bottom=0.11, wspace=0.33)
    left, right = (figure.add_subplot(grid[0, column]) for column in range(2))
    colours = dict(zip(sorted({row["width"] for row in times}), (BLUE, RED, GREEN), strict=False))
    ends = []
    for width, colour in colours.items():
        of_width = [row for row in times if row["width"] == width]
        for power, dash in ((0, ":"), (1, "--")):
            rows = [row for row in of_width if row["power"] == power]
            sizes = [row["rows"] for row in rows]
            if power == 0:
                left.plot(sizes, [row["exact_ms"] for row in rows], color=colour, linewidth=2, marker="o", markersize=4)
                left.annotate(f"D {width}", (sizes[-1], rows[-1]["exact_ms"]), xytext=(7, 0), textcoords="offset points", va="center", fontsize=8.5,
                              color=colour, annotation_clip=False)  # fmt: skip
            left.plot(sizes, [row["randomized_ms"] for row in rows], color=colour, linewidth=1.2, linestyle=dash, marker="os"[power], markersize=3)
            found = [row["ratio_of_times"] for row in rows]
            right.plot(sizes, found, color=colour, linewidth=1.4, linestyle=dash, marker="os"[power], markersize=4)
            ends.append((found[-1], sizes[-1], f"D {width}, power {power}", colour))
    for axes, title in ((left, "ms"), (right, "randomized / exact: below 1 random numbers pay")):
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(title, fontsize=10.5, loc="left", color=INK)
        axes.set_xlabel("rows", fontsize=9, color=INK)
        _finish(axes)
        _log_ticks(axes.xaxis, (1,), ",.0f")
    _log_ticks(left.yaxis, (1,))
    _log_ticks(right.yaxis, (1, 2, 5))
    right.axhline(1, color=INK, linewidth=1)
    _name_ends(right, sorted(ends))
    line = _line_of()
    handles = [line(INK, "-", 2, "o"), line(INK, ":", 1.2, "o"), line(INK, "--", 1.2, "s")]
    _legend(figure, handles, ["exact", "randomized, power 0", "randomized, power 1"], columns=3)
    return figure


def _line_of():
    from matplotlib.lines import Line2D

    return lambda colour, dash, width, marker: Line2D([], [], color=colour, linestyle=dash, linewidth=width, marker=marker, markersize=4)


def _name_ends(axes, ends: list[tuple]) -> None:
    """Names right of a panel with a logarithmic axis, none over another. ends: (y, x, name, colour), rising."""
    low, high = np.log(axes.get_ylim())
    places = spread_out([(math.log(y) - low) / (high - low) for y, *_ in ends], 0.045)
    for (y, x, name, colour), place in zip(ends, places, strict=True):
        axes.annotate(name, (x, y), xytext=(1.02, place), textcoords="axes fraction", va="center", fontsize=8.5, color=colour, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3, "relpos": (0, 0.5)})  # fmt: skip


def _power_label(power: int) -> str:
    return f"randomized, power {power}"


def _figure(width: float, height: float, title: str, caption: str):
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second; no window, no global state of pyplot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")
    FigureCanvasAgg(figure)
    left, line = 0.18 / width, 1 - 0.28 / height
    figure.text(left, line, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(1 - left, line, caption, fontsize=9.5, color="#444444", ha="right", va="center")
    return figure


def _legend(figure, handles: list, labels: list[str], columns: int) -> None:
    """In lines under the title."""
    width, height = figure.get_figwidth(), figure.get_figheight()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(0.1 / width, 1 - 0.42 / height), ncols=columns, fontsize=8.5, frameon=False,
                  handlelength=2.6, columnspacing=1.8)  # fmt: skip


def _finish(axes) -> None:
    axes.tick_params(labelsize=8.5, colors="#444444")
    axes.grid(True, color="#e9e9e9", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#b0b0b0")


def _rank_axes(axes, ranks: list[int]) -> None:
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

    axes.set_xscale("log", base=2)
    powers = [rank for rank in ranks if rank & (rank - 1) == 0] or ranks
    axes.xaxis.set_major_locator(FixedLocator(powers))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([str(rank) for rank in powers])
    axes.yaxis.set_minor_formatter(NullFormatter())
    _finish(axes)


def _byte_axes(axes, plain: int) -> None:
    """Bytes below, how many times smaller above."""
    from matplotlib.ticker import FuncFormatter

    _log_ticks(axes.xaxis, (1, 3))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: size_text(value)))
    _log_ticks(axes.yaxis, (1, 3))
    for times in (1, 4, 16, 64, 256):
        axes.axvline(plain / times, color="#c8c8c8", linewidth=0.6, linestyle=":", zorder=0)
        axes.text(plain / times, 1.015, f"{times}x", transform=axes.get_xaxis_transform(), fontsize=8, color="#444444", ha="center", va="bottom")
    _finish(axes)


def _log_ticks(axis, digits: tuple[int, ...], form: str = "g") -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=digits))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format(value, form)))
    axis.set_minor_locator(NullLocator())
