"""What a conversion has done, table by table: bytes and errors, as text for people and as JSON."""

from dataclasses import dataclass

from compression.method import PLAIN, Choice
from dlrm_xla.specs import TableSpec, size_text


@dataclass(frozen=True)
class Row:
    """One converted table.

    before, after  bytes of rows, dense parameters, codes, pointers and seeds, without optimizer state (compression.registry.num_bytes)
    facts          "relative_error" as measured on the result; what the method says of the optimum and of bounds
    """

    spec: TableSpec
    choice: Choice
    before: int
    after: int
    facts: dict[str, float]


def lines(rows: list[Row], others: list[tuple[str, Choice, int]]) -> list[str]:
    """A line for each converted table, the largest first, and the totals. others: (name, choice, bytes) of the tables that stay as they are."""
    columns = ["table", "rows", "before", "after", "ratio", "error", "optimal", "bound"]
    weighted = any("relative_error_weighted" in row.facts for row in rows)
    columns += ["error*", "optimal*"] * weighted
    cells = [[*columns, "method"]]
    for row in sorted(rows, key=lambda row: -row.before):
        sizes = [f"{row.spec.num_embeddings:,}", size_text(row.before), size_text(row.after), f"{row.before / row.after:.4g}x"]
        errors = [*_errors(row.facts, ""), _number(row.facts, "bound", "upper"), *(_errors(row.facts, "_weighted") if weighted else [])]
        cells.append([row.spec.name, *sizes, *errors, row.choice.text()])
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    forms = [f"{{:{'<' if i == 0 else '>'}{width}}}" for i, width in enumerate(widths)] + ["{}"]
    found = ["  ".join(form.format(cell) for form, cell in zip(forms, line, strict=True)) for line in cells]
    found.append("error: |new - old| / |old| over all its vectors; optimal: the least that the form allows, and how many times that it is")
    if weighted:
        found.append("*: ids count as often as training looks them up")
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    found.append(f"converted: {len(rows)} tables, {size_text(before)} -> {size_text(after)} ({before / after:.4g}x)")
    plain = sum(held for _, choice, held in others if choice == PLAIN)
    compressed = sum(held for _, choice, held in others if choice != PLAIN)
    if others:
        kinds = [f"{size_text(plain)} plain"] * bool(plain) + [f"{size_text(compressed)} compressed before"] * bool(compressed)
        found.append(f"as they were: {len(others)} tables, {' and '.join(kinds)}")
    if plain and not compressed:
        found.append(f"all tables: {size_text(before + plain)} -> {size_text(after + plain)} ({(before + plain) / (after + plain):.4g}x)")
    return found


def _errors(facts: dict[str, float], suffix: str) -> tuple[str, str]:
    error, optimal = facts.get("relative_error" + suffix), facts.get("optimal" + suffix, facts.get("lower" + suffix))
    shown = "" if error is None else f"{error:.4g}"
    if optimal is None:
        return shown, ""
    times = f" ({error / optimal:.4g}x)" if error is not None and optimal > 1e-12 else ""
    return shown, f"{optimal:.4g}{times}"


def _number(facts: dict[str, float], *names: str) -> str:
    found = [facts[name] for name in names if name in facts]
    return f"{found[0]:.4g}" if found else ""


def json_of(rows: list[Row], others_bytes: int) -> dict:
    tables = [
        {
            "table": row.spec.name, "rows": row.spec.num_embeddings, "dim": row.spec.embedding_dim, "method": row.choice.method,
            "knobs": row.choice.knobs, "bytes_before": row.before, "bytes_after": row.after, "ratio": row.before / row.after, **row.facts,
        }
        for row in rows
    ]  # fmt: skip
    before, after = sum(row.before for row in rows), sum(row.after for row in rows)
    totals = {"bytes_before": before, "bytes_after": after, "ratio": before / after, "bytes_of_other_tables": others_bytes}
    return {"tables": tables, "totals": totals}
