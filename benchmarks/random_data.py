"""Drawing random batches: ours against upstream's RandomDataset, on the same stream of draws, with equal batches (checked before timing).

Bound: a batch cannot cost less than its Mersenne Twister draws, about 3 ns each on a 2.5 GHz x86 core (measured here as `draws_ms`): the 26 x 2048
ids of a fixed bag size of 1 with 13 dense features take 82 thousand draws, a quarter of a millisecond. Upstream pays several NumPy calls per bag.

    python benchmarks/random_data.py --upstream PATH [--batch-size 2048] [--repeats 3]

Times are process CPU time per batch, best of the repeats, the two sides taking turns in one process. The last line is JSON.
"""

import argparse
import contextlib
import io
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data_loaders.random_data import RandomDataSpec, RandomSplit  # noqa: E402
from dlrm_xla.batch import to_bags  # noqa: E402

ROWS_PER_TABLE = 1_000_000
CASES = {
    "uniform_fixed_1": {"num_indices_per_lookup": 1, "fixed": True},
    "uniform_fixed_10": {"fixed": True},
    "uniform_up_to_1": {"num_indices_per_lookup": 1},
    "uniform_up_to_10": {},
    "uniform_up_to_100": {"num_indices_per_lookup": 100},
    "gaussian_fixed_1": {"num_indices_per_lookup": 1, "fixed": True, "distribution": "gaussian", "rand_max": 1000.0, "rand_sigma": 100.0},
    "gaussian_up_to_10": {"distribution": "gaussian", "rand_max": 1000.0, "rand_sigma": 100.0},
    "trace_fixed_1": {"num_indices_per_lookup": 1, "fixed": True, "distribution": "trace"},
    "trace_up_to_10": {"distribution": "trace"},
}


def upstream_batches(module, spec: RandomDataSpec):
    """Upstream's data set for a spec, and its collation of one batch."""
    data = module.RandomDataset(
        spec.num_dense, np.array(spec.table_rows), spec.data_size, spec.num_batches, spec.batch_size, spec.num_indices_per_lookup, spec.fixed,
        round_targets=spec.round_targets, data_generation="synthetic" if spec.distribution == "trace" else "random", trace_file=spec.trace_file,
        enable_padding=spec.trace_padding, reset_seed_on_access=True, rand_data_dist=spec.distribution, rand_data_min=spec.rand_min,
        rand_data_max=spec.rand_max, rand_data_mu=spec.rand_mu, rand_data_sigma=spec.rand_sigma, rand_seed=spec.seed,
    )  # fmt: skip
    return lambda: module.collate_wrapper_random_offset([data[0]])


def check_equal(theirs, batch, spec: RandomDataSpec) -> None:
    dense, offsets, indices, labels = theirs
    our_offsets, our_indices = to_bags(batch, spec.hotness)
    same = torch.equal(dense, batch.dense) and torch.equal(labels, batch.labels) and torch.equal(offsets, torch.stack(our_offsets))
    if not same or not all(map(torch.equal, indices, our_indices)):
        raise SystemExit("error: the batches differ from upstream's; a comparison of their speed would mean nothing")


def timed(action) -> float:
    """Milliseconds of process CPU time."""
    start = time.process_time()
    action()
    return (time.process_time() - start) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--upstream", required=True, help="a checkout of facebookresearch/dlrm")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--tables", type=int, default=26)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    if not (Path(args.upstream) / "dlrm_data_pytorch.py").is_file():
        parser.error(f"--upstream {args.upstream} holds no dlrm_data_pytorch.py")
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True  # the checkout is the user's
    sys.path.append(str(Path(args.upstream).resolve()))
    import dlrm_data_pytorch as upstream

    results = {}
    # A relative path, because upstream replaces every letter j of a trace's path, and a temporary folder's name may hold one.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        trace_file = Path("distances.log")
        shares = np.cumsum(1 / np.arange(1, 101))
        lines = (range(1000), range(100), (shares / shares[-1]).tolist())
        trace_file.write_text("\n".join(", ".join(map(str, numbers)) for numbers in lines) + "\n")
        for name, case in CASES.items():
            common = {"trace_file": str(trace_file), "keep_duplicates": False} | case
            spec = RandomDataSpec((ROWS_PER_TABLE,) * args.tables, num_dense=13, batch_size=args.batch_size, num_batches=1, **common)
            theirs = upstream_batches(upstream, spec)
            ours = RandomSplit(spec, np.random.RandomState())
            kept = RandomSplit(RandomDataSpec(**{**vars(spec), "keep_duplicates": True}), np.random.RandomState())
            with contextlib.redirect_stdout(io.StringIO()):
                check_equal(theirs(), next(ours.batches()), spec)
            times = {"upstream_ms": [], "same_bags_ms": [], "default_ms": [], "draws_ms": []}
            lookups = spec.num_indices_per_lookup
            numbers_per_bag = lookups if spec.fixed else 1 + (lookups + 1) // 2
            num_draws = args.batch_size * (14 + args.tables * numbers_per_bag)
            for _ in range(args.repeats):
                times["upstream_ms"].append(timed(theirs))
                times["same_bags_ms"].append(timed(lambda: [next(ours.batches()) for _ in range(5)]) / 5)  # noqa: B023
                times["default_ms"].append(timed(lambda: [next(kept.batches()) for _ in range(5)]) / 5)  # noqa: B023
                times["draws_ms"].append(timed(lambda: ours.rng.random_sample(num_draws)))  # noqa: B023
            best = {key: round(min(values), 3) for key, values in times.items()}
            best["ratio_same_bags"] = round(best["upstream_ms"] / best["same_bags_ms"], 1)
            best["ratio_default"] = round(best["upstream_ms"] / best["default_ms"], 1)
            results[name] = best
            print(
                f"{name:18s} upstream {best['upstream_ms']:8.1f} ms, same bags {best['same_bags_ms']:7.2f} ms ({best['ratio_same_bags']:6.1f}x), "
                f"default {best['default_ms']:7.2f} ms ({best['ratio_default']:6.1f}x), draws alone {best['draws_ms']:.2f} ms",
                flush=True,
            )
    print(json.dumps({"benchmark": "random_data", "tables": args.tables, "batch_size": args.batch_size, "cases": results}))


if __name__ == "__main__":
    main()
