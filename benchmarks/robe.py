"""ROBE on a TPU: traffic of aligned lookups against the published element-wise form, by the TPU compiler's estimate. No TPU is needed.

    OMP_NUM_THREADS=1 python benchmarks/robe.py [--topology v5e:2x2] [--dims 16 64] [--lookups 16384] [--numbers 25000000] [--step 8] [--update]
        [--out FILE]

Both read one array of so many numbers (25M, the 100 MB of the paper). The published form is traced by itself, A[(h + t) mod S] with h given, so
nothing but its gather counts; the aligned form is the whole table's: hashes, gather of lines, masks and signs. --update: also the row update by
plain SGD (the compiler takes minutes for the published one). The estimate counts 4 KB, a tile, for each row that a gather reads, a number or
a line, and every pass over on-chip memory. Bar: the aligned form at most 1/20. The last line is JSON.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from report import finish, heading, say

from compression import robe
from compression.method import Making
from dlrm_xla import backends, tpu_compiler
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import LANES, PackedLayout
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec

BAR = 1 / 20
ROWS = 10_000_000


def aligned(tracer, dim: int, lookups: int, lines: int, step: int, update: bool):
    method = robe.METHOD
    knobs = method.knob_values({"lines": str(lines), "step": str(step)})
    table = method.create(TableSpec("emb_l.0", ROWS, dim), knobs, Making(np.random.RandomState(0)))
    tables = tracer.place(EmbeddingCollection([table], None, RULES["sgd"](), PackedLayout(), "meta"))
    ids, grads = torch.zeros(lookups, 1, dtype=torch.int32).to(tracer.device), torch.zeros(lookups, 1, dim).to(tracer.device)
    rate = torch.tensor(-0.1).to(tracer.device)

    def run():
        lookup = tables.lookup(ids, None)
        if update:
            lookup.pooled.backward(grads)
            tables.update([lookup], rate)
        pooled = None if update else lookup.pooled.detach()
        del lookup
        tracer.end_step()
        return pooled

    return tracer.trace(run, {"array": tables.stores[0].data})


def published(tracer, dim: int, lookups: int, numbers: int, update: bool):
    array = tracer.place(_Array(numbers)).data
    starts, lanes = torch.zeros(lookups, dtype=torch.int32).to(tracer.device), torch.arange(dim, dtype=torch.int32).to(tracer.device)
    changes = torch.zeros(lookups * dim).to(tracer.device)

    def run():
        places = torch.fmod(starts[:, None] + lanes, numbers).reshape(-1)
        if update:
            array.index_add_(0, places, changes)
        found = None if update else array.index_select(0, places)
        tracer.end_step()
        return found

    return tracer.trace(run, {"array": array})


class _Array(torch.nn.Module):
    def __init__(self, numbers: int):
        super().__init__()
        self.register_buffer("data", torch.empty(numbers, device="meta"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topology", default="v5e:2x2")
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--lookups", type=int, default=16_384)
    parser.add_argument("--numbers", type=int, default=25_000_000)
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    tpu_compiler.require()
    lines = args.numbers // LANES
    tracer, programs = backends.make_tracer(), {}
    for dim in args.dims:
        for update in (False, True) if args.update else (False,):
            kind = f"{'update' if update else 'lookup'} of {dim}"
            for form, step in (
                ("aligned", aligned(tracer, dim, args.lookups, lines, args.step, update)),
                ("published", published(tracer, dim, args.lookups, lines * LANES, update)),
            ):
                programs[f"{form} {kind}"] = (step.hlo, step.donated)
    compiled = tpu_compiler.compile_programs(args.topology, programs, say)
    cases = []
    for name in (name.removeprefix("aligned ") for name in programs if name.startswith("aligned ")):
        ours, theirs = compiled[f"aligned {name}"], compiled[f"published {name}"]
        share = ours.traffic / theirs.traffic
        cases.append({
            "case": name, "aligned": ours.traffic, "published": theirs.traffic, "times": 1 / share, "kept": share <= BAR,
            "aligned_temporaries": ours.temporaries, "published_temporaries": theirs.temporaries,
        })  # fmt: skip
        verdict = "kept " if share <= BAR else "MISSED"
        say(f"{verdict} {name}: {ours.traffic / 1e6:.0f} MB aligned, {theirs.traffic / 1e6:.0f} MB published, 1/{1 / share:.1f}")
    finish({**heading("robe"), "lookups": args.lookups, "numbers": args.numbers, "step": args.step, "cases": cases}, args.out)


if __name__ == "__main__":
    main()
