"""A rank that trains small models, for test_gloo.py: python rank_steps.py OUT STEPS. Rank 0 writes OUT: {case: losses of every step}."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from rank_models import batches_of, config_of, specs_of, spread, train  # noqa: E402

from dlrm_xla import backends, flags, launch  # noqa: E402
from dlrm_xla.config import Config  # noqa: E402

CASES = [(kind, rule, hotness) for kind in ("plain", "qr", "hash", "tt") for rule in ("sgd", "rwsadagrad") for hotness in (1, 3)]


def main(out: str, steps: int) -> None:
    ranks = launch.Ranks(launch.find_place())
    ranks.join()
    ranks.connect(Config.from_args(flags.parse([])), "cpu")
    backend = backends.make("cpu", ranks.collectives)
    losses = {}
    for kind, rule, hotness in CASES:
        specs = specs_of(hotness)
        plan_of = spread(ranks.world, seed=5) if ranks.world > 1 else None
        losses[f"{kind} {rule} {hotness}"], _ = train(backend, config_of(kind, rule), specs, batches_of(specs, steps), plan_of)
    if ranks.first:
        Path(out).write_text(json.dumps(losses))
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
