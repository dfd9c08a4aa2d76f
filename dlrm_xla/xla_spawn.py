"""Starts a script's _mp_fn(index) in a process for each chip of a TPU host, as the launchers of this name in Hugging Face's examples do.

    python -m dlrm_xla.xla_spawn --num_cores 8 run_dlrm.py --mini-batch-size=2048 ...

`python run_dlrm.py --device=xla` starts them by itself; this is for those whose scripts call a launcher. On a pod: the same on every host.
"""

import argparse
import sys
from pathlib import Path

from dlrm_xla import backends, launch
from dlrm_xla.specs import UserError, one_line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python -m dlrm_xla.xla_spawn --num_cores N SCRIPT [FLAGS])")


def main(argv: list[str]) -> int:
    parser = Parser(prog="python -m dlrm_xla.xla_spawn", description="Run a script's _mp_fn in a process for each TPU chip of this host.")
    parser.add_argument("--num_cores", "--num-cores", type=int, default=0, metavar="N", help="chips: 1, or all of the host; left out: all")
    parser.add_argument("script", help="a Python file with a function _mp_fn(index)")
    parser.add_argument("flags", nargs=argparse.REMAINDER, help="for the script; --tpu_num_cores N is added at their end")
    try:
        args = parser.parse_args(argv)
        if args.num_cores < 0:
            raise UserError(f"--num_cores={args.num_cores}: must be at least 1, or left out for all chips of this host")
        launch.check_cores("--num_cores", args.num_cores)
        fn = _function(Path(args.script))
        sys.argv = [args.script, *args.flags, *(["--tpu_num_cores", str(args.num_cores)] if args.num_cores else [])]
        return backends.spawn(fn, args.num_cores if backends.runs_on_tpu() else 1)
    except UserError as error:
        launch.tell(f"error: {one_line(str(error))}")
        return 2


def _function(script: Path):
    """_mp_fn of the script, imported by its name, by which the processes find it again."""
    if not script.is_file():
        raise UserError(f"{script}: is not there; name a Python file")
    if script.suffix != ".py" or not script.stem.isidentifier():
        raise UserError(f"{script}: must be a Python file whose name is one of a module, as run_dlrm.py")
    sys.path.insert(0, str(script.resolve().parent))
    module = __import__(script.stem)
    if not hasattr(module, "_mp_fn"):
        raise UserError(f"{script}: has no function _mp_fn(index), which this launcher starts")
    return module._mp_fn


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
