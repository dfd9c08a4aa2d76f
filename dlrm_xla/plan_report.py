"""What a plan comes to: a page for the terminal (--plan-only), the same as JSON, a picture of who holds what."""

import os
import re
import textwrap
from pathlib import Path

from dlrm_xla.planner import exact_size, imbalance, loads, padded_bytes
from dlrm_xla.sharding import EVERYWHERE, SPLIT, Plan, TablePart
from dlrm_xla.specs import size_text

WIDTH = 120
BAR = 20  # letters
MOST_RANKS = 16  # with a line each; of more, the fullest and the emptiest
MOST_NAMES = 400  # letters of a list of tables
INK, GREY = "#222222", "#8a8a8a"
COLOURS = (
    "#4477aa", "#ee8866", "#44aa77", "#cc6677", "#8a6fb0", "#ddcc77", "#66bbdd", "#997755", "#99bb44", "#dd99bb", "#336688", "#bb5533",
)  # fmt: skip
DARK = {"#4477aa", "#8a6fb0", "#336688", "#bb5533", "#997755", "#cc6677"}  # white numbers are read more easily on them


def as_json(plan: Plan, dense_parameters: int) -> dict:
    """Facts of a plan. dense_parameters: numbers of the model's dense parameters, which are on every rank."""
    held, allocated = loads(plan), padded_bytes(plan)
    names = {place: [part.name for part, where in zip(plan.parts, plan.where, strict=True) if where == place] for place in set(plan.where)}
    volumes = plan.volumes(dense_parameters)
    ids, vectors = volumes["ids, all-to-all"] // 4, volumes["vectors, all-to-all"] // 4
    return {
        "ranks": plan.world,
        "batch_size": plan.batch_size,
        "parts": len(plan.parts),
        "bytes": sum(part.num_bytes for part in plan.parts),
        "allocated_bytes_per_rank": allocated,
        "per_rank": [
            {
                "bytes": load.bytes, "lookups": load.lookups, "gathered": load.gathered, "ids_bytes": 4 * load.ids,
                "vectors_bytes": 4 * load.vectors, "whole": names.get(rank, []),
            }
            for rank, load in enumerate(held)
        ],
        "copied": names.get(EVERYWHERE, []),
        "split": names.get(SPLIT, []),
        "exchange_bytes_per_rank": volumes if plan.world > 1 else dict.fromkeys(volumes, 0),
        "imbalance": {
            "bytes": imbalance([load.bytes for load in held]),
            "lookups": imbalance([load.lookups for load in held]),
            "gathered": imbalance([load.gathered for load in held]),
        },
        "padding": {
            "bytes": allocated * plan.world - sum(load.bytes for load in held),
            "ids_share": _share(ids * plan.world, sum(load.ids for load in held)),
            "vectors_share": _share(vectors * plan.world, sum(load.vectors for load in held)),
        },
    }  # fmt: skip


def _share(whole: int, used: int) -> float:
    return 1 - used / whole if whole else 0.0


def summary(plan: Plan) -> str:
    """One line for the log."""
    held = loads(plan)
    counts = {place: sum(where == place for where in plan.where) for place in (SPLIT, EVERYWHERE)}
    whole = len(plan.parts) - sum(counts.values())
    return (
        f"plan: tables whole on one rank: {whole}, split over all {plan.world}: {counts[SPLIT]}, copied to all: {counts[EVERYWHERE]}; "
        f"{size_text(padded_bytes(plan))} on each rank; max / mean of bytes "
        f"{imbalance([load.bytes for load in held]):.3f}, of lookups {imbalance([load.lookups for load in held]):.3f} (--plan-only shows more)"
    )


def lines(plan: Plan, dense_parameters: int) -> list[str]:
    """The page, at most 120 letters wide. dense_parameters: as in as_json."""
    facts = as_json(plan, dense_parameters)
    ranks = f"{plan.world:,} ranks" if plan.world > 1 else "1 rank"
    batch = f"{plan.batch_size:,} rows, {plan.batch_size // plan.world:,} on each rank" if plan.world > 1 else f"{plan.batch_size:,} rows"
    tables = len({part.table for part in plan.parts})
    rows = sum(part.num_rows for part in plan.parts)
    page = _wrapped(f"plan: {_count(tables, 'table')} of {_count(rows, 'row')}, {exact_size(facts['bytes'])}, on {ranks}; a batch is {batch}")
    for place, text in ((SPLIT, "split by rows, a range on each rank"), (EVERYWHERE, "copied to every rank")):
        parts = [part for part, where in zip(plan.parts, plan.where, strict=True) if where == place]
        if parts:
            page += _wrapped(f"{text} ({size_text(sum(part.num_bytes for part in parts))}): {_names(parts)}")
    page += ["", *_rank_lines(plan, facts)]
    uneven = facts["imbalance"]
    page += ["", f"imbalance, max / mean: bytes {uneven['bytes']:.3f}, lookups {uneven['lookups']:.3f}, gathered {uneven['gathered']:.3f}"]
    if facts["split"]:
        page.append("  lookups: ids of split tables spread evenly; gathered: rows that the program reads, with room on every rank for all ids")
    return page + _padding_lines(plan, facts) + _exchange_lines(plan, facts)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def _rank_lines(plan: Plan, facts: dict) -> list[str]:
    """A rank's bytes, what it does, and what it alone holds."""
    per_rank, most = facts["per_rank"], max(rank["bytes"] for rank in facts["per_rank"]) or 1
    shown = list(range(plan.world))
    if plan.world > MOST_RANKS:
        by_bytes = sorted(shown, key=lambda rank: (-per_rank[rank]["bytes"], rank))
        shown = sorted(by_bytes[: MOST_RANKS // 2] + by_bytes[-MOST_RANKS // 2 :])
    page = [f"rank  {'holds':>8} {'':{BAR}} {'lookups':>11} {'gathered':>11} {'ids in':>8} {'vectors out':>11}  whole tables"]
    for rank in shown:
        row = per_rank[rank]
        bar = _bar(row["bytes"], most)
        whole = [part for part, where in zip(plan.parts, plan.where, strict=True) if where == rank]
        start = (
            f"{rank:>4}  {size_text(row['bytes']):>8} {bar:{BAR}} {row['lookups']:>11,} {row['gathered']:>11,} "
            f"{size_text(row['ids_bytes']):>8} {size_text(row['vectors_bytes']):>11}  "
        )
        room = max(20, WIDTH - len(start))
        page.append(start + textwrap.shorten(_names(whole) or "-", room, placeholder=" ..."))
    if len(shown) < plan.world:
        page.append(f"      and {plan.world - len(shown)} ranks between the fullest and the emptiest of these")
    return page


def _bar(value: int, most: int) -> str:
    """Eighths of a letter."""
    eighths = -(-8 * BAR * value // most)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def _padding_lines(plan: Plan, facts: dict) -> list[str]:
    padding, allocated = facts["padding"], facts["allocated_bytes_per_rank"]
    share = padding["bytes"] / (allocated * plan.world) if allocated else 0.0
    waste = f"padding is {size_text(padding['bytes'])} on all ranks together ({share:.1%})"
    text = f"every rank allocates {exact_size(allocated)}, as the fullest needs; {waste}"
    if padding["ids_share"] or padding["vectors_share"]:
        text += f", {padding['ids_share']:.1%} of the ids and {padding['vectors_share']:.1%} of the vectors exchanged"
    return _wrapped(text)


def _exchange_lines(plan: Plan, facts: dict) -> list[str]:
    if plan.world == 1:
        return ["", "one rank: nothing is exchanged"]
    volumes = facts["exchange_bytes_per_rank"]
    width = max(map(len, volumes)) + 1
    page = ["", "in a training step every rank hands to its collectives, its own share and padding included:"]
    page += [f"  {name + ':':{width}} {exact_size(volume)}" for name, volume in volumes.items()]
    return [*page, f"  {'together:':{width}} {exact_size(sum(volumes.values()))}"]


def _label(part: TablePart) -> int | str:
    """emb_l.3.weight -> 3, a part of a compressed table by its name: emb_l.3.weight_q -> "3.weight_q"."""
    found = re.fullmatch(r"emb_l\.(\d+)(\.weight)?", part.name)
    return int(found[1]) if found else part.name.removeprefix("emb_l.")


def _names(parts: list[TablePart]) -> str:
    """ "0, 4-7, 9", then names of other parts; cut off after 400 letters."""
    labels = [_label(part) for part in parts]
    numbers, found = sorted(label for label in labels if isinstance(label, int)), []
    first = 0
    for i, number in enumerate(numbers):
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            run = numbers[first : i + 1]
            found += [f"{run[0]}-{run[-1]}"] if len(run) > 2 else map(str, run)
            first = i + 1
    text = ", ".join([*found, *(label for label in labels if isinstance(label, str))])
    return text if len(text) <= MOST_NAMES else text[:MOST_NAMES].rpartition(",")[0] + f", ... ({len(parts):,} in all)"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ")


def draw(plan: Plan, path: Path) -> Path:
    """Writes a picture (PNG) of who holds what, whole or not at all: of each rank its bytes and its lookups, by table."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # half a second; no window, no global state of pyplot
    from matplotlib.figure import Figure

    bar = max(0.16, min(0.5, 8 / plan.world))  # inches a rank
    height = 2.1 + bar * plan.world
    figure = Figure(figsize=(12, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(1, 2, left=0.06, right=0.98, top=1 - 0.8 / height, bottom=1.2 / height, wspace=0.13)
    colours = _colours(plan)
    held = loads(plan)
    of_bytes = [[_bytes_on(plan, n, rank) for n in range(len(plan.parts))] for rank in range(plan.world)]
    of_lookups = [[_lookups_on(plan, n, rank) for n in range(len(plan.parts))] for rank in range(plan.world)]
    panels = (
        ("bytes held", of_bytes, imbalance([load.bytes for load in held]), size_text),
        ("lookups for a global batch", of_lookups, imbalance([load.lookups for load in held]), lambda value: f"{value:,.0f}"),
    )
    for column, (title, values, uneven, text) in enumerate(panels):
        axes = figure.add_subplot(grid[0, column])
        _draw_bars(axes, plan, values, colours, text)
        axes.set_title(f"{title}: max / mean {uneven:.3f}", fontsize=11, loc="left", color=INK)
    total = size_text(sum(part.num_bytes for part in plan.parts))
    tables = len({part.table for part in plan.parts})
    title = f"Who holds what: {_count(tables, 'table')}, {total}, {_count(plan.world, 'rank')}, batches of {plan.batch_size:,}"
    figure.text(0.06, 1 - 0.3 / height, title, fontsize=13.5, fontweight="bold", color=INK, va="center")
    _draw_legend(figure, plan, colours)
    beside = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.part")
    try:
        figure.savefig(beside, format="png")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
    return Path(path)


def _bytes_on(plan: Plan, number: int, rank: int) -> int:
    part, place = plan.parts[number], plan.where[number]
    if place == SPLIT:
        first, last = plan.range_of(number, rank)
        return (last - first) * part.row_bytes
    return part.num_bytes if place in (EVERYWHERE, rank) else 0


def _lookups_on(plan: Plan, number: int, rank: int) -> int:
    """As planner.loads counts them."""
    place, columns = plan.where[number], plan.parts[number].columns
    return columns * (plan.batch_size if place == rank else plan.batch_size // plan.world if place < 0 else 0)


def _colours(plan: Plan) -> dict[int, str]:
    """Of tables: those with the largest share of bytes or lookups have one of their own; {table: colour}, the largest first."""
    total_bytes, total_columns = sum(part.num_bytes for part in plan.parts) or 1, sum(part.columns for part in plan.parts) or 1
    share: dict[int, float] = {}
    for part in plan.parts:
        share[part.table] = share.get(part.table, 0) + part.num_bytes / total_bytes + part.columns / total_columns
    return dict(zip(sorted(share, key=lambda table: (-share[table], table)), COLOURS, strict=False))


def _draw_bars(axes, plan: Plan, values: list[list[int]], colours: dict[int, str], text) -> None:
    """Split tables first, whole ones, copies; a number where there is room for it."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    kind = {SPLIT: 0, EVERYWHERE: 2}
    most = max(sum(row) for row in values) or 1
    for rank, row in enumerate(values):
        start = 0
        order = sorted(range(len(row)), key=lambda n: (kind.get(plan.where[n], 1), -plan.parts[n].num_bytes, n))
        for n in order:
            if not row[n]:
                continue
            colour = colours.get(plan.parts[n].table, "#c9c9c9")
            hatch = {SPLIT: "", EVERYWHERE: "/////"}.get(plan.where[n], "")
            axes.barh(
                rank, row[n], left=start, height=0.78, color=colour, alpha=0.5 if hatch else 1.0, hatch=hatch, edgecolor="white", linewidth=0.5
            )
            if plan.where[n] == SPLIT:
                axes.barh(rank + 0.27, row[n], left=start, height=0.09, color="white", alpha=0.75, linewidth=0)
            label = str(_label(plan.parts[n]))
            if row[n] > (0.012 + 0.008 * len(label)) * most and plan.world <= 24:
                ink = "white" if colour in DARK and not hatch else INK
                axes.text(start + row[n] / 2, rank - 0.04, label, fontsize=7.5, color=ink, ha="center", va="center")
            start += row[n]
        if plan.world <= 32:
            axes.text(start + 0.01 * most, rank, text(start), fontsize=8, color=INK, va="center")
    axes.set_ylim(plan.world - 0.45, -0.55)
    axes.set_xlim(0, 1.13 * most)
    axes.set_yticks(range(0, plan.world, -(-plan.world // 16)))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value) if value else "0"))
    axes.set_ylabel("rank", fontsize=9, color=INK)
    axes.tick_params(labelsize=8.5, colors="#444444", length=0)
    axes.set_axisbelow(True)
    axes.grid(True, axis="x", color="#e6e6e6", linewidth=0.7)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#b0b0b0")


def _draw_legend(figure, plan: Plan, colours: dict[int, str]) -> None:
    from matplotlib.patches import Patch

    rows = {table: sum(part.num_rows for part in plan.parts if part.table == table) for table in colours}
    handles = [Patch(facecolor=colour, label=f"table {table}: {rows[table]:,} rows") for table, colour in colours.items()]
    if len({part.table for part in plan.parts}) > len(colours):
        handles.append(Patch(facecolor="#c9c9c9", label="other tables"))
    height = figure.get_figheight()
    figure.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0.05, 0.28 / height), ncols=5, fontsize=8.5, frameon=False, columnspacing=1.6
    )
    note = "white line: split by rows over all ranks;   plain: whole on one rank;   hatched and pale: a copy on every rank"
    figure.text(0.06, 0.17 / height, note, fontsize=8.5, color="#555555", va="center")
