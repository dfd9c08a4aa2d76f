"""Tensor-train tables: the prefix form against the direct one, where one overtakes the other, hit rates of the cache of hot rows, and bytes.

    python benchmarks/tt.py [--device xla] [--rounds 7] [--parts forms crossover init convert hits bytes tpu] [--out FILE]

forms       10,131,227 x 16 (Criteo Kaggle's largest table), rank 32, 65,536 lookups: direct and prefix take turns, forward alone and with gradients
            of all cores; bars 4x and 3.5x. `ratio` is of the same round, the median of all rounds, of process CPU time (wall time beside it).
crossover   every form over lookups, ranks and tables: what compression/tt_forms.py's cost rule was fitted to, and the time of the form that the
            rule picks over that of the fastest (`regret`)
init        standard deviation of the rebuilt table over a plain table's 1 / sqrt(3 N), by float64 sums over all rows, and seconds
convert     TT-SVD of 1,000,000 x 16: seconds and the bracket
hits        share of lookups that find a cached row: a Zipf-1.2 trace over 1,000,000 ids, 0.1 % of them cached; counts of one epoch, hits of the next
bytes       of the 26 tables of DLRM-DCNv2 (204,184,588 rows x 128), those above 10,000 rows as tensor trains, by rank
tpu         what the TPU compiler makes of both forms at rank 32, with the sum written out and with a batched product (tt_forms.product): the bytes
            that all operations read and write by its estimate, and temporaries. No TPU is needed. Not among the parts that run unasked: three minutes

A block ends when the device has finished (on XLA checked first). The last line is JSON.
"""

import argparse
import itertools
import math
import time
from pathlib import Path

import numpy as np
import torch
from embedding_contenders import check_barrier
from report import finish, heading, median, say

from compression import tt_forms
from compression.hot_cache import HotCache
from compression.hot_counts import most_frequent
from compression.method import Making
from compression.tt import METHOD, SVD_METHOD, TTTable, gaussian_cores, sum_of_squares
from compression.tt_forms import choose, cost, forms
from compression.tt_shapes import shape_of, split_dim
from dlrm_xla import backends, tpu_compiler
from dlrm_xla.specs import TableSpec, size_text

KAGGLE = 10_131_227
BARS = {"forward": 4.0, "gradient": 3.5}
DCNV2 = (
    40000000, 39060, 17295, 7424, 20265, 3, 7122, 1543, 63, 40000000, 3067956, 405282, 10, 2209, 11938, 155, 4, 976, 14, 40000000, 40000000, 40000000,
    590152, 12973, 108, 36,
)  # fmt: skip
SWEEP = [
    (rows, dim, cores, rank, lookups)
    for rows, dim, cores, ranks in ((KAGGLE, 16, 3, (8, 32)), (KAGGLE, 16, 4, (16,)), (142_572, 64, 3, (8, 32)))
    for rank in ranks
    for lookups in (512, 2048, 8192, 32768)
]


def knobs(**given) -> dict:
    return {**{knob.name: knob.default for knob in METHOD.knobs}, **given}


def make(rows: int, dim: int, rank: int, cores: int = 3, **more) -> TTTable:
    spec = TableSpec("t", rows, dim)
    return METHOD.create(spec, knobs(rank=rank, cores=cores, **more), Making(np.random.RandomState(0)))


class Case:
    """One table, one form; lookups of uniform ids."""

    def __init__(self, backend, table: TTTable, form, lookups: int):
        self.backend, self.table, self.form = backend, table, form
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, table.spec.num_embeddings, (lookups,), generator=generator)
        self.ids = ids.to(backend.layout("auto").index_dtype).to(backend.device)
        self.direction = torch.randn(lookups, table.spec.embedding_dim, generator=generator).to(backend.device)

    def run(self, kind: str) -> tuple[float, float]:
        """Milliseconds: of the process's CPU, and passed."""
        self.table.form = self.form
        self.backend.wait()
        cpu, wall = time.process_time(), time.perf_counter()
        if kind == "forward":
            with torch.no_grad():
                kept = self.table.combine((), self.ids)
        else:
            (self.table.combine((), self.ids) * self.direction).sum().backward()
            kept = [core.grad for core in self.table.cores]
            for core in self.table.cores:
                core.grad = None
        self.backend.wait()
        del kept
        return (time.process_time() - cpu) * 1e3, (time.perf_counter() - wall) * 1e3


def race(cases: dict, kind: str, rounds: int) -> dict:
    """name -> [(CPU ms, wall ms)], interleaved. Of two runs in a turn the second counts: XLA gives the memory of a program back after `wait`, in the
    time of what comes next (90 MB of a form before made 1 ms 9)."""
    times = {name: [] for name in cases}
    for number in range(rounds + 1):
        for name in list(cases)[:: 1 if number % 2 else -1]:
            cases[name].run(kind)
            taken = cases[name].run(kind)
            if number >= 1:
                times[name].append(taken)
    return times


def compare_forms(backend, rounds: int) -> dict:
    table = backend.place(make(KAGGLE, 16, 32))
    cases = {form: Case(backend, table, form, 65536) for form in ((1, 1, 1), (2, 1))}
    result = {"chosen": choose(table.shape, 65536)}
    for kind, bar in BARS.items():
        times = race(cases, kind, rounds)
        direct, prefix = times.values()
        ratio, wall = (median([a[i] / b[i] for a, b in zip(direct, prefix, strict=True)]) for i in (0, 1))
        both = {"direct": direct, "prefix": prefix}
        milliseconds = {name: [round(median([pair[i] for pair in pairs]), 1) for i in (0, 1)] for name, pairs in both.items()}
        say(f"{kind:<9} {milliseconds} ms (CPU, wall)  ratio {ratio:.2f} ({wall:.2f})  bar {bar}")
        result[kind] = {"ms": milliseconds, "ratio": round(ratio, 2), "wall_ratio": round(wall, 2), "bar": bar}
    return result


def crossover(backend, rounds: int) -> list[dict]:
    results = []
    for rows, dim, cores, rank, lookups in SWEEP:
        table = backend.place(make(rows, dim, rank, cores))
        cases = {form: Case(backend, table, form, lookups) for form in forms(cores)}
        for kind in BARS:
            times = {form: round(median([pair[0] for pair in pairs]), 3) for form, pairs in race(cases, kind, rounds).items()}
            chosen = choose(table.shape, lookups)
            regret = times[chosen] / min(times.values())
            costs = {str(form): round(cost(table.shape, form, lookups) / 1e6, 3) for form in times}
            results.append({
                "rows": rows, "dim": dim, "cores": cores, "rank": rank, "lookups": lookups, "kind": kind,
                "cpu_ms": {str(form): taken for form, taken in times.items()}, "cost": costs, "chosen": str(chosen), "regret": round(regret, 2),
            })  # fmt: skip
            say(f"{rows:>10} x {dim:<3} R {rank:<3} {lookups:>6} {kind:<9} {times}  cost {list(costs.values())} -> {chosen} regret {regret:.2f}")
    say(f"regret: median {median([one['regret'] for one in results]):.2f}, most {max(one['regret'] for one in results):.2f}")
    return results


def check_init() -> list[dict]:
    results = []
    for cores in (2, 3, 4):
        for rank in (4, 16, 64, 128):
            shape = shape_of("tt", TableSpec("t", KAGGLE, 16), knobs(rank=rank, cores=cores))
            start = time.perf_counter()
            drawn = gaussian_cores(shape, KAGGLE, np.random.RandomState(1))
            seconds = time.perf_counter() - start
            ratio = math.sqrt(3 * sum_of_squares([core.double().numpy() for core in drawn], KAGGLE) / 16)
            results.append({"cores": cores, "rank": rank, "std_over_target": round(ratio, 6), "seconds": round(seconds, 3)})
            say(f"init d {cores} R {rank}: {ratio:.6f} of the target, {seconds:.2f} s")
    return results


def convert() -> list[dict]:
    results, rng = [], np.random.RandomState(0)
    spec = TableSpec("t", 1_000_000, 16)
    weight = rng.standard_normal((spec.num_embeddings, 16)).astype(np.float32)
    smooth = gaussian_cores(shape_of("tt", spec, knobs(rank=24)), spec.num_embeddings, rng)
    near = TTTable(spec, shape_of("tt", spec, knobs(rank=24)), smooth).values(np.arange(spec.num_embeddings)).numpy()
    for name, table in (("white noise", weight), ("rank 24 and 10 % noise", near / near.std() + 0.1 * weight)):
        start = time.perf_counter()
        facts = SVD_METHOD.convert(spec, knobs(rank=16), table, Making(rng)).facts
        seconds = time.perf_counter() - start
        results.append({"table": name, "seconds": round(seconds, 2), **{key: round(value, 5) for key, value in facts.items()}})
        say(f"TT-SVD {name}: {results[-1]}")
    return results


def hits(num_ids: int = 1_000_000, epoch: int = 2_000_000) -> dict:
    """ids in random places, frequencies proportional to rank^-1.2, cut off at num_ids."""
    rng, capacity = np.random.RandomState(0), num_ids // 1000
    frequencies = np.arange(1, num_ids + 1) ** -1.2
    frequencies /= frequencies.sum()
    names, cache = rng.permutation(num_ids), HotCache(capacity, 1, num_ids)
    bounds, rates = frequencies.cumsum(), []
    rows = torch.zeros(cache.num_slots, 1)
    for _ in range(4):
        trace = names[np.minimum(np.searchsorted(bounds, rng.random_sample(epoch)), num_ids - 1)]
        found = cache.ids.find(torch.from_numpy(trace))[0]
        rates.append(round(float(found.float().mean()), 4))
        for start in range(0, epoch, 65536):
            cache.seen.add(trace[start : start + 65536])
        cache.refresh(rows, cache.seen.hottest(), lambda ids: torch.zeros(len(ids), 1), lambda ids, deltas: None)
    best = float(frequencies[most_frequent(frequencies, capacity)].sum())
    say(f"hit rate by epoch {rates}, {best:.4f} if the frequencies were known; bar 0.60")
    return {"ids": num_ids, "cached": capacity, "exponent": 1.2, "hit_rate_by_epoch": rates, "known_frequencies": round(best, 4), "bar": 0.6}


def dcnv2_bytes() -> dict:
    results = {}
    for rank in (16, 32, 64, 128):
        total = 0
        for rows in DCNV2:
            spec = TableSpec("t", rows, 128)
            total += METHOD.num_bytes(spec, knobs(rank=rank)) if rows > 10_000 else 4 * rows * 128
        results[rank] = total
        say(f"DCNv2 tables, {sum(DCNV2):,} x 128, {size_text(sum(DCNV2) * 512)}: rank {rank} {size_text(total)} ({sum(DCNV2) * 512 / total:.0f}x)")
    return {"rows": sum(DCNV2), "dims": split_dim(128, 3), "bytes_by_rank": results}


def tpu() -> list[dict]:
    """Lookups of 10.1M x 16 at rank 32, alone and with gradients of the cores, compiled for one chip."""
    tracer, programs, ours = backends.make_tracer(), {}, tt_forms.product

    def batched(left, right, rank):
        return torch.bmm(left.view(len(left), -1, rank), right.view(len(left), rank, -1)).view(len(left), -1)

    def trace(form, lookups: int, kind: str):
        table = tracer.place(make(KAGGLE, 16, 32))
        table.form = form
        ids, direction = torch.zeros(lookups, dtype=torch.int32).to(tracer.device), torch.zeros(lookups, 16).to(tracer.device)

        def run():
            vectors = table.combine((), ids)
            results = [vectors.detach()]
            if kind == "gradient":
                vectors.backward(direction)
                results = [core.grad for core in table.cores]
                for core in table.cores:
                    core.grad = None
            del vectors
            tracer.end_step()
            return results

        return tracer.trace(run, {f"core{k}": core.data for k, core in enumerate(table.cores)})

    for lookups, form, product, kind in itertools.product((2048, 65536), ((2, 1), (1, 1, 1)), ("sum", "batched"), BARS):
        tt_forms.product = ours if product == "sum" else batched
        step = trace(form, lookups, kind)
        programs[lookups, form, product, kind] = (step.hlo, step.donated)
    tt_forms.product = ours
    compiled = tpu_compiler.compile_programs("v5e:2x2", {str(name): program for name, program in programs.items()}, lambda line: None)
    results = []
    for (lookups, form, product, kind), found in zip(programs, compiled.values(), strict=True):
        results.append({
            "lookups": lookups, "form": str(form), "product": product, "kind": kind, "traffic": found.traffic, "temporaries": found.temporaries,
            "error": found.error[:200],
        })  # fmt: skip
        traffic, temporaries = found.traffic / 1e6, found.temporaries / 1e6
        say(f"v5e {lookups:>6} {form!s:<9} {product:<7} {kind:<9} traffic {traffic:>8.0f} MB, temporaries {temporaries:.1f} MB {found.error[:100]}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="xla", choices=["cpu", "xla"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--parts", nargs="+", default=["forms", "crossover", "init", "convert", "hits", "bytes"])
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the JSON here too")
    args = parser.parse_args()
    backend = backends.make(args.device)
    result = {**heading("tt"), "device": args.device, "rounds": args.rounds, "barrier": check_barrier(backend) if args.device == "xla" else {}}
    parts = {
        "forms": lambda: compare_forms(backend, args.rounds), "crossover": lambda: crossover(backend, min(args.rounds, 5)), "init": check_init,
        "convert": convert, "hits": hits, "bytes": dcnv2_bytes, "tpu": tpu,
    }  # fmt: skip
    for part in args.parts:
        result[part] = parts[part]()
    finish(result, args.out)


if __name__ == "__main__":
    main()
