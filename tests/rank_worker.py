"""A rank without a model, for test_launch.py: meets the others and adds up numbers with them until something happens.

    python rank_worker.py WHAT    "forever": until a signal; "sleep": rank 1 stays in Python; "error", "crash": of rank 1; "xla": a tensor on XLA
"""

import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dlrm_xla import board, flags, launch  # noqa: E402
from dlrm_xla.config import Config  # noqa: E402
from dlrm_xla.specs import UserError  # noqa: E402

board.SILENT, board.DEAD = 6.0, 2.0  # instead of 20 and 4 s


def main(what: str) -> None:
    ranks = launch.Ranks(launch.find_place())
    try:
        ranks.join()
        ranks.connect(Config.from_args(flags.parse([])), "cpu")
        ranks.advise("go on with X")
        import torch

        if what == "xla":
            import torch_xla

            ranks.collectives.all_reduce(torch.ones(3, device=torch_xla.device()))
        print("ready", flush=True)
        number = torch.ones(4)
        for step in range(100_000):
            if step == 50 and ranks.rank == 1 and what in ("error", "crash"):
                raise UserError("its disk is full") if what == "error" else KeyError("no such thing")
            while what == "sleep" and ranks.rank == 1:
                time.sleep(0.01)
            ranks.collectives.all_reduce(number)
            time.sleep(0.01)
        ranks.close()
    except UserError as error:
        sys.exit(ranks.end(2, f"error: {error}", error))
    except KeyboardInterrupt as error:
        sys.exit(ranks.end(130, "interrupted", error))
    except BaseException as error:
        sys.exit(ranks.fault(error))


main(sys.argv[1])
