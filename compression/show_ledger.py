"""What every table of a checkpoint costs, to the byte: python -m compression ledger --load-model m.pt [--tpu] [--json FILE]

Nothing but the shapes is needed, so no table is read.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from compression.ledger import Ledger, ledger, lines
from compression.method import PLAIN, Making
from compression.registry import create_table
from compression.stored import stored_tables
from data_loaders.command import ended
from dlrm_xla.checkpoint import optimizer_name
from dlrm_xla.checkpoint_file import Checkpoint, read
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import PackedLayout, RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import UserError, size_text
from dlrm_xla.tables import PlainTable


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m compression ledger", description="What every table of a checkpoint costs, to the byte, optimizer state included."
    )
    parser.add_argument("--load-model", required=True, type=Path, metavar="FILE", help="a checkpoint of ours or upstream's")
    parser.add_argument("--tpu", action="store_true", help="as a TPU holds them: the packed layout, and the padding of tiles")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    args = parser.parse_args(argv)
    return ended(lambda: _run(args))


def _run(args: argparse.Namespace) -> None:
    found = ledger_of(read(args.load_model, mapped=True), args.tpu)
    if args.json:
        args.json.write_text(json.dumps(found.to_json(), indent=2) + "\n", encoding="utf-8")
    print("\n".join(lines(found)))
    state = sum(entry.state for entry in found.entries)
    rest = found.total - found.stored - state
    print(
        f"{size_text(found.plain)} as plain tables, {size_text(found.stored)} as stored ({found.ratio:.4g}x); {size_text(found.total)} in memory "
        f"{'on a TPU' if args.tpu else 'here'}, {size_text(state)} of that the optimizer's state and {size_text(rest)} padding and scratch"
    )


def ledger_of(loaded: Checkpoint, tpu: bool) -> Ledger:
    """UserError for tables that the file does not describe."""
    tables = []
    for stored in stored_tables(loaded):
        if stored.choice is None or stored.spec is None:
            raise UserError(
                f"--load-model={loaded.path}: does not say what made table {stored.name}, or how many ids it has; load it with run_dlrm.py "
                "--load-model and its --qr-* or --md-* flags, and save it again"
            )
        if stored.choice == PLAIN:
            tables.append(PlainTable(stored.spec, lambda rows: None))
        else:
            tables.append(create_table(stored.spec, stored.choice, Making(np.random.RandomState(0)), to_load=True))
    rule = RULES[optimizer_name(loaded.optimizer) if loaded.optimizer is not None else "sgd"]()
    layout = PackedLayout() if tpu else RowsLayout(add_rows_scatter, ragged=True)
    collection = EmbeddingCollection(tables, None, rule, layout, device="meta")
    return ledger(collection, lambda parameter: {name: torch.empty_like(parameter) for name in rule.dense_state}, tiles=tpu)
