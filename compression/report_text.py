"""A report's figures as markdown, for people."""

from collections.abc import Callable

import numpy as np

from dlrm_xla.specs import size_text

NOTES = """\
Errors are relative: |approximation - table| / |table|, Frobenius norms, of the vectors as lookups give them. Columns with *: an id counts as often
as training looks it up.

- optimal: the least error that the form allows. svd, rsvd, random_projection: any table of that rank (Eckart and Young 1936). pq with chunks of one
  number: any codebooks of that size (exact one-dimensional k-means; left out above 1e8 units of work). int4 with shared scales: any codebook for
  each group of rows, over a sample of 500 groups. hash: a row is the mean of its ids, the best for these hashes; over all hashes the optimum is
  k-means, which is NP-hard.
- bound: rsvd: what its mean error is at most (Halko, Martinsson and Tropp 2011, theorem 10.5), where it minimized that norm; it is the optimum where
  rank and oversampling together reach the width. int4, int8: half a step for each number. tt_svd: [a, b], the error of any tensor train of these
  ranks is at least a, and that of TT-SVD at most b (Oseledets 2011). random_projection: ~ the root of the mean square over draws, sqrt(1 - rank / D).
- slack: bound / measured. Bytes: rows, codes, codebooks, scales and seeds, without optimizer state."""


def markdown(content: dict, pictures: list[str]) -> str:
    parts = ["# Compression: error beside the optimum", NOTES]
    parts.append(f"Seed {content['seed']}. Pictures: {', '.join(f'[{name}]({name})' for name in pictures)}.")
    if content["tables"]:
        parts += ["## Trained tables", _spectra(content["tables"])]
    for table in content["tables"]:
        parts += [f"### {table['table']}: {table['rows']:,} x {table['dim']}, {size_text(table['bytes'])}", _results(table)]
    first = content["known"][0]
    parts.append(f"## Known spectra, {first['rows']:,} x {first['dim']}: randomized SVD")
    for one in content["known"]:
        parts += [f"### {one['spectrum']}", _known(one["results"])]
    if content["times"]:
        parts += ["## Time until the right singular vectors are known", _times(content["times"])]
    return "\n\n".join(parts) + "\n"


def table_of(header: list[str], rows: list[list[str]]) -> str:
    """Numbers to the right; the first column to the left."""
    lines = [header, [":--", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def holding(spectrum: list[float], share: float) -> int:
    """The least rank that holds this share of the squared norm."""
    return int(np.searchsorted(np.cumsum(np.square(spectrum)), share * (1 - 1e-12)) + 1)


def _spectra(tables: list[dict]) -> str:
    """How flat each spectrum is: what the first direction holds of the squared norm, and the rank that holds 90 % of it."""
    weighted = "spectrum_weighted" in tables[0]
    header = ["table", "rows", "D", "first direction", "rank for 90 %"]
    header += ["never looked up", "first direction*", "rank for 90 %*"] * weighted
    rows = []
    for table in tables:
        cells = [table["table"], f"{table['rows']:,}", str(table["dim"])]
        for suffix in ("", "_weighted") if weighted else ("",):
            spectrum = table["spectrum" + suffix]
            cells += [f"{100 * table['never_looked_up']:.1f} %"] if suffix else []
            cells += [f"{100 * spectrum[0] ** 2:.1f} %", str(holding(spectrum, 0.9))]
        rows.append(cells)
    return table_of(header, rows)


def _results(table: dict) -> str:
    suffixes = ("", "_weighted") if "spectrum_weighted" in table else ("",)
    header = ["method", "bytes", "ratio"]
    for star in ("", "*")[: len(suffixes)]:
        header += [name + star for name in ("error", "optimal", "error / optimal", "bound", "slack")]
    rows = []
    for row in table["results"]:
        cells = [row["typed"], size_text(row["bytes"]), f"{row['compression']:.4g}x"]
        for suffix in suffixes:
            cells += _cells(row.get, suffix)
        rows.append(cells)
    return table_of(header, rows)


def _cells(get: Callable, suffix: str) -> list[str]:
    bound = number(get("bound" + suffix))
    if not suffix and get("lower") is not None:
        bound = f"[{number(get('lower'))}, {number(get('upper'))}]"
    if not suffix and get("expected") is not None:
        bound = f"~ {number(get('expected'))}"
    return [*(number(get(name + suffix)) for name in ("relative_error", "optimal", "ratio")), bound, number(get("bound_slack" + suffix))]


def _known(results: list[dict]) -> str:
    """A line for each rank: what the powers give beside each other."""
    powers = sorted({row["power"] for row in results})
    header = ["rank", "ratio", "optimal", "bound"]
    header += [f"{name}, power {power}" for power in powers for name in ("error", "error / optimal", "slack")]
    rows = []
    for rank in sorted({row["rank"] for row in results}):
        found = [row for row in results if row["rank"] == rank]
        cells = [str(rank), f"{found[0]['compression']:.4g}x", number(found[0]["optimal"]), number(found[0]["bound"])]
        for row in found:
            cells += [number(row[name]) for name in ("relative_error", "ratio", "bound_slack")]
        rows.append(cells)
    return table_of(header, rows)


def _times(rows: list[dict]) -> str:
    header = ["D", "rows", "rank", "oversampling", "power", "exact, ms", "randomized, ms", "randomized / exact", "error / optimal"]
    lines = []
    for row in rows:
        sizes = [str(row["width"]), f"{row['rows']:,}", *(str(row[name]) for name in ("rank", "oversampling", "power"))]
        lines.append([*sizes, *(f"{row[name]:.3g}" for name in ("exact_ms", "randomized_ms", "ratio_of_times")), number(row["ratio"])])
    return table_of(header, lines)
