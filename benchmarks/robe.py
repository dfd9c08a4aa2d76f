"""ROBE on a TPU: traffic of aligned lookups against the published element-wise form, by the TPU compiler's estimate. No TPU is needed.

    OMP_NUM_THREADS=1 python benchmarks/robe.py [--topology v5e:2x2] [--dims 16 64 128] [--lookups 16384] [--numbers 25000000 128000000]
        [--step 8] [--update] [--whole] [--out FILE]

All read one array of so many numbers; 25M are the 100 MB of the paper.
aligned    the whole table: hashes, gather of lines, picking, signs
gather     the published form's gather by itself, A[(h + t) mod S] with h given
published  with --whole: the published form as a whole table, robe:aligned=false, in the same layout (minutes to compile)
Bar: aligned at most 1/20 of `gather`, which has no choice of ours in it.
--update: also the row update by plain SGD, of `aligned` and `gather` (the compiler takes minutes for the latter).
The estimate counts 4 KB, a tile, for each row that a gather reads, a number or a line: a vector of 16 cannot come below 1/16. It counts passes over
on-chip memory too. An array that fits there is moved there before a program that only reads it (`moved`), which is counted twice: read and written.
The last line is JSON.
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


def table(tracer, dim: int, lookups: int, lines: int, update: bool, **given: str):
    method = robe.METHOD
    knobs = method.knob_values({"lines": str(lines), **given})
    made = method.create(TableSpec("emb_l.0", ROWS, dim), knobs, Making(np.random.RandomState(0)))
    tables = tracer.place(EmbeddingCollection([made], None, RULES["sgd"](), PackedLayout(), "meta"))
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


def bare_gather(tracer, dim: int, lookups: int, numbers: int, update: bool):
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
    parser.add_argument("--dims", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--lookups", type=int, default=16_384)
    parser.add_argument("--numbers", type=int, nargs="+", default=[25_000_000, 128_000_000])
    parser.add_argument("--step", type=int, default=8)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    tpu_compiler.require()
    tracer, programs = backends.make_tracer(), {}
    wanted = [(update, numbers, dim) for update in (False, True)[: 1 + args.update] for numbers in args.numbers for dim in args.dims]
    for update, numbers, dim in wanted:
        lines = numbers // LANES
        traced = {
            "aligned": table(tracer, dim, args.lookups, lines, update, step=str(args.step)),
            "gather": bare_gather(tracer, dim, args.lookups, lines * LANES, update),
        }
        if args.whole and not update:
            traced["published"] = table(tracer, dim, args.lookups, lines, update, aligned="false")
        programs |= {f"{form} {name_of(update, numbers, dim)}": (step.hlo, step.donated) for form, step in traced.items()}
    compiled = tpu_compiler.compile_programs(args.topology, programs, say)
    cases = [case(compiled, *one) for one in wanted]
    finish({**heading("robe"), "topology": args.topology, "lookups": args.lookups, "step": args.step, "bar": BAR, "cases": cases}, args.out)


def name_of(update: bool, numbers: int, dim: int) -> str:
    return f"{'update' if update else 'lookup'} of {dim} in {numbers / 1e6:.0f}M"


def case(compiled: dict, update: bool, numbers: int, dim: int) -> dict:
    name = name_of(update, numbers, dim)
    found = {form: compiled[f"{form} {name}"] for form in ("aligned", "gather", "published") if f"{form} {name}" in compiled}
    failed = {form: program.error[:200] for form, program in found.items() if program.error}
    found = {form: program for form, program in found.items() if not program.error}
    times = {form: found[form].traffic / found["aligned"].traffic for form in found if form != "aligned"}
    kept = times.get("gather", 0) >= 1 / BAR
    say(
        f"{'kept  ' if kept else 'MISSED'} {name}: {', '.join(f'{form} {program.traffic / 1e6:.0f} MB' for form, program in found.items())}; "
        f"aligned is {', '.join(f'1/{ratio:.1f} of {form}' for form, ratio in times.items())}{f'; failed: {failed}' if failed else ''}"
    )
    return {
        "case": name, "kept": kept, "times": times, "failed": failed,
        "traffic": {form: program.traffic for form, program in found.items()},
        "temporaries": {form: program.temporaries for form, program in found.items()},
        "moved": {form: "cross_program_prefetch" in program.text for form, program in found.items()},
    }  # fmt: skip


if __name__ == "__main__":
    main()
