"""One upstream .pt file of the folder that a run on several ranks has saved: python -m dlrm_xla.export_checkpoint FOLDER OUT.pt

The file is, bit for bit, what one rank would have saved in the same state; upstream's --load-model and python -m compression read it. It is
put together in memory, so this takes about as much as the file's size.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from dlrm_xla import shards
from dlrm_xla.checkpoint_file import Checkpoint, check_writable, write
from dlrm_xla.specs import UserError, one_line


def main(argv: list[str] | None = None) -> int:
    """0, or 2 after one line on stderr that says what is wrong."""
    parser = argparse.ArgumentParser(prog="python -m dlrm_xla.export_checkpoint", description="One .pt file of a checkpoint of several ranks.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="what --save-model named, or one save in it")
    parser.add_argument("out", type=Path, metavar="OUT.pt", help="the file to write; one that is there stays until the new one is whole")
    args = parser.parse_args(argv)
    try:
        export(args.folder, args.out)
    except UserError as error:
        message = str(error).removeprefix("--load-model=").removeprefix("--save-model=")
        print(f"error: {one_line(message)}", file=sys.stderr)
        return 2
    print(f"written to {args.out} ({args.out.stat().st_size:,} bytes)")
    return 0


def export(folder: Path, out: Path) -> None:
    """UserError where the folder cannot be read or the file not written."""
    loaded = shards.read(folder)
    if loaded.shards is None:
        raise UserError(f"--load-model={folder}: is one file already, which upstream and --load-model read as it is")
    check_writable(out)
    write(replace(whole(loaded), path=out))


def whole(loaded: Checkpoint) -> Checkpoint:
    """The same with all numbers in memory."""

    def read(name: str, key: str, shape: Tensor) -> Tensor:
        values = torch.empty(shape.shape, dtype=shape.dtype)
        loaded.copy(name, key, shape, 0, values)
        return values

    weights = {name: read(name, "", value) for name, value in loaded.weights.items()}
    optimizer = loaded.optimizer
    if optimizer is not None:
        states = {
            at: {key: read(loaded.shards.order[at], key, value) if _is_shape(value) else value for key, value in state.items()}
            for at, state in optimizer["state"].items()
        }
        optimizer = {**optimizer, "state": states}
    return replace(loaded, weights=weights, optimizer=optimizer, shards=None)


def _is_shape(value) -> bool:
    return isinstance(value, Tensor) and value.is_meta


if __name__ == "__main__":
    sys.exit(main())
