"""The methods for people: python -m compression list [NAME] [--json]"""

import argparse
import json
import textwrap

from compression.method import Knob, Method
from compression.registry import METHODS, method_named
from data_loaders.command import ended

WIDTH = 150


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compression list", description="The compression methods, or one of them in full.")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them in full")
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    args = parser.parse_args(argv)
    return ended(lambda: print(_text(args)))


def _text(args: argparse.Namespace) -> str:
    methods = [method_named(args.name)] if args.name else list(METHODS.values())
    if args.json:
        found = [as_json(method) for method in methods]
        return json.dumps(found[0] if args.name else found, indent=2)
    return "\n".join(in_full(methods[0]) if args.name else table(methods))


def made_from(method: Method) -> str:
    return " or ".join(["the start"] * (method.create is not None) + ["a trained table"] * (method.convert is not None))


def needs(method: Method) -> str:
    """What it wants to know of how often ids are looked up."""
    return "needed" if method.needs_counts else "may weight" if method.weighted else ""


def knob_text(knob: Knob) -> str:
    """As in rank=4 (1..); without a default it is derived from the table."""
    default = "" if knob.default is None else f"={knob.default:g}" if knob.kind is float else f"={knob.default}".lower()
    return knob.name + default + (f" ({_range(knob)})" if _range(knob) else "")


def _range(knob: Knob) -> str:
    if knob.choices:
        return "|".join(knob.choices)
    if knob.kind is bool:
        return "true|false"
    if knob.least is None and knob.most is None:
        return ""
    return f"{'' if knob.least is None else f'{knob.least:g}'}..{'' if knob.most is None else f'{knob.most:g}'}"


def table(methods: list[Method]) -> list[str]:
    """A few lines for each method, none longer than 150 characters."""
    columns = ("method", "trainable", "from", "counts", "bytes of a table", "title; knobs (a knob without a value is derived from the table); paper")
    rows = []
    for method in methods:
        sources = ["start"] * (method.create is not None) + ["trained"] * (method.convert is not None)
        knobs = "; ".join(knob_text(knob) for knob in method.knobs) or "no knobs"
        cells = [method.name, "yes" if method.trainable else "no", "\n".join(sources), needs(method), method.bytes_formula]
        rows.append((cells, [method.title, knobs, method.paper]))
    limits = (30, 9, 8, 10, 32)
    widths = [min(limit, max(len(column), *(len(line) for cells, _ in rows for line in cells[i].splitlines() or [""])))
              for i, (limit, column) in enumerate(zip(limits, columns[:-1], strict=True))]  # fmt: skip
    last = WIDTH - sum(widths) - 2 * len(widths)
    found = _side_by_side([[column] for column in columns[:-1]] + [textwrap.wrap(columns[-1], last)], widths)
    for cells, texts in rows:
        wrapped = [[line for part in cell.splitlines() for line in textwrap.wrap(part, width)] for cell, width in zip(cells, widths, strict=True)]
        found.append("")
        found += _side_by_side([*wrapped, [line for text in texts for line in textwrap.wrap(text, last)]], widths)
    return found


def _side_by_side(columns: list[list[str]], widths: list[int]) -> list[str]:
    height = max(len(column) for column in columns)
    padded = [column + [""] * (height - len(column)) for column in columns]
    return ["".join(f"{cell:{width}}  " for cell, width in zip(line[:-1], widths, strict=True)) + line[-1] for line in zip(*padded, strict=True)]


def in_full(method: Method) -> list[str]:
    counts = {"needed": "needed: a data set must be given", "may weight": "used where the knob `weighted` says so", "": "not used"}[needs(method)]
    facts = [
        ("title", method.title), ("paper", method.paper), ("made from", made_from(method)),
        ("trainable", "yes" if method.trainable else "no: training leaves it as it is"),
        ("bytes", f"{method.bytes_formula}, without optimizer state"),
        ("counts of ids", counts),
        ("--compress-to", f"sets {method.sized_by}" if method.sized_by else "cannot size it"),
    ]  # fmt: skip
    lines = [method.name, *(f"  {name:14} {value}" for name, value in facts), "  knobs" + ("" if method.knobs else "          none")]
    for knob in method.knobs:
        lines += textwrap.wrap(f"{knob_text(knob)}: {knob.help}", WIDTH, initial_indent="    ", subsequent_indent="      ")
    example = next((f":{knob.name}={knob.default}" for knob in method.knobs if knob.default not in (None, "", 0) and knob.kind is not bool), "")
    if method.create is not None:
        lines.append(f"  train: python run_dlrm.py --compress={method.name}{example} ...")
    if method.convert is not None:
        lines.append(f"  convert: python -m compression convert --load-model m.pt --method={method.name}{example} --save-model c.pt")
    return lines


def as_json(method: Method) -> dict:
    knobs = [
        {
            "name": knob.name, "kind": knob.kind.__name__, "default": knob.default, "help": knob.help, "least": knob.least, "most": knob.most,
            "choices": list(knob.choices),
        }
        for knob in method.knobs
    ]  # fmt: skip
    return {
        "name": method.name, "title": method.title, "paper": method.paper, "knobs": knobs, "bytes_formula": method.bytes_formula,
        "from_start": method.create is not None, "from_trained": method.convert is not None, "trainable": method.trainable,
        "needs_counts": method.needs_counts, "weighted": method.weighted, "sized_by": method.sized_by or None,
    }  # fmt: skip
