"""A table's profile and a schema proposed for it, from a sample: python -m data_loaders.inspect log.csv --schema log.yaml

Prints a line for each column, what was found out about the label, the split and leaks, and the command that trains on the table. Without
--schema the schema comes last on stdout and all before it as YAML comments, so that the output is a schema file as it stands.
What it needs does not grow with the file (data_loaders.table_sample): 1.2 s of CPU and 302 MB for 1.5 GB of Criteo rows. Upstream has nothing
like it.
"""

import argparse
import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

from data_loaders.command import ended
from data_loaders.criteo_npz import atomic_write
from data_loaders.criteo_text import COLUMNS, NUM_DENSE, NUM_SPARSE
from data_loaders.table_files import find_files
from data_loaders.table_label import Label, as_label, guess_label
from data_loaders.table_profile import Profile, profile
from data_loaders.table_report import MODEL, TRAINING, describe, figures, next_command, remarks, schema_text, wrapped
from data_loaders.table_roles import propose
from data_loaders.table_sample import Sample, take_sample
from dlrm_xla.specs import UserError

ROWS = 100_000


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status (data_loaders.command)."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.inspect", description="Profile a table and propose a schema for --data-set=table.")
    parser.add_argument("files", nargs="+", metavar="F", help="files (CSV, TSV, Parquet; plain or gzip), a folder or a pattern")
    parser.add_argument("--rows", type=int, default=ROWS, help=f"size of the sample ({ROWS:,})")
    parser.add_argument("--schema", type=Path, help="write the schema here (not over a file that exists)", metavar="OUT.yaml")
    parser.add_argument("--label", default="", help="the label's column, where the guess is wrong", metavar="COLUMN")
    parser.add_argument("--json", type=Path, help="write the figures here", metavar="FILE")
    args = parser.parse_args(argv)
    return ended(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    if args.rows < 10:
        raise UserError(f"--rows={args.rows}: a sample needs at least 10 rows")
    if args.schema and args.schema.exists():
        raise UserError(f"--schema={args.schema} exists and may hold your changes; name another file, or remove it")
    inspect(",".join(args.files), args.rows, args.schema, args.label, args.json)


def inspect(raw_data_file: str, rows: int, schema_file: Path | None, label_name: str, json_file: Path | None) -> None:
    sample = take_sample(find_files(raw_data_file), rows)
    criteo = criteo_kind(sample)
    if criteo:
        sample.dialect = replace(sample.dialect, columns=tuple(COLUMNS))
    columns = profile(sample)
    label = named_label(columns, label_name) if label_name else guess_label(columns)
    proposal = propose(sample, columns, label)
    lines = describe(sample, proposal) + remarks(sample, proposal)
    command = next_command(raw_data_file, schema_file, proposal)
    ending = criteo_advice(criteo, raw_data_file, sample) + ["", "Then:" if label else "Then, once the label is named:", *command]
    schema = schema_text(proposal, raw_data_file)
    if schema_file:
        with atomic_write(schema_file, "name another place with --schema=OUT.yaml") as file:
            file.write(schema.encode())
        print("\n".join([*lines, "", f"Schema: {schema_file}", *ending]))
    else:
        ending = [*ending, "", "The schema (this output is one as it stands; --schema=OUT.yaml writes it):", ""]
        print("\n".join(f"# {line}".rstrip() for line in [*lines, *ending]))
        print(schema, end="")
    sys.stdout.flush()
    if json_file:
        with atomic_write(json_file, "name another place with --json=FILE") as file:
            file.write((json.dumps(figures(sample, proposal), indent=1) + "\n").encode())


def named_label(columns: list[Profile], name: str) -> Label:
    column = next((column for column in columns if column.name == name), None)
    if column is None:
        raise UserError(f"--label={name}: no column is called so; there are {', '.join(c.name for c in columns)[:300]}")
    label = as_label(column, "by --label")
    if label is None:
        values = ", ".join(ascii(value[:20]) for value in column.values[:5].to_pylist()) if column.values is not None else ""
        way_out = f"write label: {{column: {name}, positive: ...}} into a schema"
        raise UserError(f"--label={name}: its cells do not say what counts as 1 ({values}); {way_out}")
    return label


# ---- Criteo


def criteo_kind(sample: Sample) -> str:
    """ "kaggle", "terabyte" or "", by the columns: a label, 13 counts, 26 hashes; tabs, no header. Of Terabyte files by the name, day_0."""
    dialect = sample.dialect
    if dialect.format != "tsv" or dialect.header or len(sample.columns) != len(COLUMNS):
        return ""
    patterns = [r"^[01]$", *[r"^-?\d*$"] * NUM_DENSE, *[r"^[0-9a-f]{0,8}$"] * NUM_SPARSE]
    for column, pattern in zip(sample.columns, patterns, strict=True):
        matcher = re.compile(pattern)
        if not all(matcher.search(cell) for cell in column[:1000].to_pylist()):
            return ""
    return "terabyte" if re.fullmatch(r"day_\d+(\.gz)?", sample.files[0].name) else "kaggle"


def criteo_advice(kind: str, raw_data_file: str, sample: Sample) -> list[str]:
    if not kind:
        return []
    where = shlex.quote(raw_data_file if kind == "kaggle" else str(sample.files[0].with_name("day")))
    model = [flag.format(NUM_DENSE) for flag in MODEL]
    flags = ["--data-generation=dataset", f"--data-set={kind}", f"--raw-data-file={where}", *model, *TRAINING]
    name = "Criteo Kaggle's" if kind == "kaggle" else "Criteo Terabyte's"
    return ["", f"This is {name} format. Its own reader is faster than a schema and gives the ids of upstream:", *wrapped(flags)]


if __name__ == "__main__":
    sys.exit(main())
