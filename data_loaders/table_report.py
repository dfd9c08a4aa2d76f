"""What data_loaders.inspect prints and writes: the table of columns, remarks, the schema with its reasons, the next command, the figures."""

import shlex
from pathlib import Path

from data_loaders.table_profile import ESTIMATOR, Profile, number_text
from data_loaders.table_roles import NO_LABEL, Proposal, Role
from data_loaders.table_sample import Sample
from dlrm_xla.specs import size_text

MODEL = "--arch-sparse-feature-size=16", "--arch-mlp-bot={}-512-256-64-16", "--arch-mlp-top=512-256-1"
TRAINING = (
    "--loss-function=bce", "--optimizer=adagrad", "--learning-rate=0.01", "--mini-batch-size=2048", "--print-freq=100", "--test-freq=1000",
)  # fmt: skip
_DELIMITERS = {"\t": "tabs", ",": "commas", ";": "semicolons", "|": "bars", " ": "blanks", "\x01": "\\x01"}
_RIGHT = {2, 3, 4, 6, 7}  # columns of figures


def describe(sample: Sample, proposal: Proposal) -> list[str]:
    """The file and a table of its columns."""
    dialect = sample.dialect
    kind = dialect.format.upper() if dialect.format != "parquet" else "Parquet"
    parts = [kind + (", gzip" if dialect.gzip else "")]
    if dialect.format != "parquet":
        parts += [f"separated by {_DELIMITERS.get(dialect.delimiter, dialect.delimiter)}", "a header" if dialect.header else "no header"]
        parts += ["quotes" if dialect.quote else "no quotes", dialect.encoding]
    names = str(sample.files[0]) if len(sample.files) == 1 else f"{sample.files[0]} and {len(sample.files) - 1} more"
    rows = f"{sample.total_rows:,} rows" if sample.exact else f"about {sample.total_rows:,} rows (estimated from the bytes of the sample's)"
    lines = [f"{names}: {', '.join(parts)}; {size_text(sample.num_bytes)}", f"{rows}, {len(sample.columns)} columns"]
    lines.append(f"sample: {sample.num_rows:,} rows, {sample.how}")
    if not sample.complete:
        lines.append(f"in all: distinct values of the whole table, estimated by {ESTIMATOR}: values seen once count sqrt(rows / sampled rows) times")
    table = [("column", "kind", "missing", "distinct", "in all", "top value", "Zipf", "top 1%", "values", "proposed")]
    table += [_line(role, sample) for role in proposal.roles]
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    lines.append("")
    for row in table:
        cells = [cell.rjust(widths[i]) if i in _RIGHT else cell.ljust(widths[i]) for i, cell in enumerate(row)]
        lines.append("  ".join(cells).rstrip())
    return lines


def _line(role: Role, sample: Sample) -> tuple[str, ...]:
    column = role.column
    missing = f"{100 * column.missing / max(1, column.cells):.1f}%" if column.missing else "-"
    total = "-"
    if column.distinct:
        total = f"{column.distinct_total:,}" if sample.complete or column.distinct_total == column.distinct else f"~{_short(column.distinct_total)}"
    top = f"{_clip(column.top[0], 10)} {column.top[1]:.0%}" if column.distinct and column.top[1] >= 0.005 else "-"
    zipf = f"{column.zipf:.2f}" if column.zipf is not None else "-"
    percent = f"{column.top_percent:.0%}" if column.distinct >= 100 else "-"
    what = role.role
    if role.entry is not None:
        what = getattr(role.entry, "transform", "") or role.entry.type
        what = f"{role.role} {what}"
    kind = column.shape or column.kind
    return (_clip(column.name, 24), kind, missing, f"{column.distinct:,}", total, top, zipf, percent, _values(column), what)


def _values(column: Profile) -> str:
    """Lengths of bags, first and last time, least, median and largest number, or the values where these are few."""
    if column.lengths:
        return f"{column.lengths[0]} to {column.lengths[3]} ids, {column.lengths[1]:.2g} on average"
    if column.times:
        return f"{column.times.first} to {column.times.last}"
    if column.numbers:
        return "  ".join(map(number_text, column.numbers))
    if column.values is None or not column.distinct:
        return ""
    order = sorted(range(column.distinct), key=lambda i: -column.counts[i])[:3] if column.distinct <= 12 else range(2)
    return _clip(", ".join(_clip(column.values[i].as_py(), 14) for i in order), 34)


def _clip(text: str, most: int) -> str:
    shown = "".join(character if character.isprintable() else "?" for character in text)
    return shown if len(shown) <= most else shown[: most - 2] + ".."


def _short(number: float) -> str:
    """Two digits: 12,345 is 12,000."""
    digits = len(str(int(number)))
    return f"{round(number, 2 - digits):,.0f}" if digits > 2 else f"{number:.0f}"


def remarks(sample: Sample, proposal: Proposal) -> list[str]:
    """On the label, the split, what is left out, and what will go wrong."""
    label, lines = proposal.label, [""]

    def say(what: str, text: str) -> None:
        lines.append(f"{what:<9} {text}")

    if label:
        ones = label.positive if isinstance(label.positive, str) else " or ".join(label.positive or ())
        say("label", f"{label.column.name}: CTR {label.rate:.4%} ({label.why}){f'; 1 where it is {ones}' if ones else ''}")
        if label.column.missing:
            say("warning", f"the label is missing in {label.column.missing:,} rows of the sample: take such rows out, training refuses them")
        if label.rate in (0, 1):
            say("warning", "all rows of the sample have the same label: is this the right column, or are the rows sorted by it?")
    else:
        say("label", f"none: no column looks like one. Put its name in place of {NO_LABEL}, or give --label=COLUMN")
        two = [role.column.name for role in proposal.roles if role.column.codes is not None and role.column.distinct == 2]
        if two:
            say("", f"columns of two values: {', '.join(two)[:100]}")
    say("split", proposal.split_why)
    for leak in proposal.leaks:
        say("warning", f"{leak.column.name} gives the label away: {leak.how}; left out")
    for role in proposal.roles:
        if role.role == "left out" and not role.why.startswith("leak"):
            say("left out", f"{role.column.name}: {role.why}")
        elif role.column.odd and role.role == "categorical":
            say("warning", f"{role.column.name}: {role.column.odd}; taken as text")
    if sample.skipped:
        say("warning", f"{sample.skipped:,} rows have another number of columns than {len(sample.columns)}; reading stops at the first of them")
    if sample.damage:
        say("warning", f"damaged or cut off: {sample.damage}; reading stops there, so fetch it again")
    if not proposal.schema.categorical:
        say("warning", "no column is categorical, and DLRM needs one: move one from dense: to categorical: in the schema")
    return lines


def schema_text(proposal: Proposal, raw_data_file: str) -> str:
    """The YAML, with the reasons behind each line and those for what is left out at the end."""
    first, *rest = f"Proposed for {raw_data_file} by python -m data_loaders.inspect; change what you know better".splitlines()
    lines = proposal.schema.to_yaml(proposal.comments).splitlines()
    lines[-1] += f"  # {proposal.split_why}"
    if not proposal.schema.categorical:
        lines.insert(-1, "categorical: []  # none was found, and DLRM needs one")
    out = [role for role in proposal.roles if role.role == "left out"]
    lines += [f"# left out: {' '.join(_clip(role.column.name, 60).split())}: {' '.join(role.why.split())}" for role in out]
    return "\n".join([f"# {' '.join([first, *rest])}", *lines]) + "\n"


def next_command(raw_data_file: str, schema_file: Path | None, proposal: Proposal) -> list[str]:
    schema = shlex.quote(str(schema_file)) if schema_file else "OUT.yaml"
    model = [flag.format(max(1, len(proposal.schema.dense))) for flag in MODEL]
    data = ["--data-generation=dataset", "--data-set=table", f"--schema={schema}", f"--raw-data-file={shlex.quote(raw_data_file)}"]
    flags = [*data, *model, *TRAINING]
    return wrapped(flags)


def wrapped(flags: list[str]) -> list[str]:
    """A command over several lines that a shell takes as one."""
    lines = ["python run_dlrm.py"]
    for flag in flags:
        if len(lines[-1]) + len(flag) > 116:
            lines[-1] += " \\"
            lines.append("   ")
        lines[-1] += f" {flag}"
    return lines


def figures(sample: Sample, proposal: Proposal) -> dict:
    """What --json writes: numbers as they are, not rounded for people."""
    label = proposal.label
    keys = ("kind", "cells", "missing", "distinct", "distinct_total", "zipf", "top_percent", "numbers", "lengths", "shape", "native", "odd")
    return {
        "files": [str(path) for path in sample.files],
        "format": sample.dialect.format,
        "bytes": sample.num_bytes,
        "rows": sample.total_rows,
        "rows_exact": sample.exact,
        "sample_rows": sample.num_rows,
        "sample_of": sample.how,
        "skipped_rows": sample.skipped,
        "estimator": ESTIMATOR,
        "label": {"column": label.column.name, "ctr": label.rate, "positive": label.positive} if label else None,
        "leaks": {leak.column.name: leak.how for leak in proposal.leaks},
        "schema": proposal.schema.canonical(),
        "columns": {
            role.column.name: {
                **{key: getattr(role.column, key) for key in keys},
                "top": {"value": role.column.top[0], "share": role.column.top[1]},
                "times": [role.column.times.unit, role.column.times.first, role.column.times.last] if role.column.times else None,
                "role": role.role,
                "why": role.why,
            }
            for role in proposal.roles
        },
    }
