"""Criteo's raw text to what a run reads, with upstream's ids, counts, days and sub-sampling: python -m data_loaders.preprocess --help

An id is the rank of its hash (taken modulo max_ind_range first, where that is above 0) in order of first appearance over all days. Upstream
fills 26 Python dictionaries and writes 60 intermediate files; here rows are spilled once and numbered a column at a time (data_loaders.build), in the
memory that --preprocess-memory allows, and one result is written, atomically. A run that was interrupted is taken up where it stopped.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

from data_loaders import spill
from data_loaders.build import Built, Options, build
from data_loaders.command import ended
from data_loaders.criteo_set import SETS, Asked, check_meta, write_count_file
from data_loaders.criteo_source import CriteoSource, draws_of, skip_draws
from dlrm_xla.specs import UserError, parse_size

MEMORY_BYTES = 4 * 10**9


def preprocess(
    raw: Path,
    out: Path,
    *,
    max_ind_range: int,
    sub_sample_rate: float,
    rng: np.random.RandomState | None,
    progress: bool,
    data_set: str = "kaggle",
    memory_bytes: int = MEMORY_BYTES,
    min_frequency: int = 0,
    vocabulary: Path | None = None,
) -> Built:
    """Makes `out`, an .npz or an arrays folder, of Criteo's raw text, plain or gzip.

    raw              kaggle: the file; terabyte: the prefix DIR/day of DIR/day_0 .. DIR/day_23
    max_ind_range    above 0: ids are hash modulo this
    sub_sample_rate  above 0: a row with label 0 is dropped with this probability; one rng.uniform is drawn for every raw row
    progress         bars on stderr
    memory_bytes, min_frequency, vocabulary: see data_loaders.build.Options
    Raises UserError for a bad line (with its number), an unreadable raw file, too few rows, or an `out` that cannot be written.
    """
    open_source = CriteoSource.kaggle if data_set == "kaggle" else CriteoSource.terabyte
    source = open_source(raw, max_ind_range=max_ind_range, sub_sample_rate=sub_sample_rate, rng=rng)

    def before_naming(built: Built) -> None:
        # upstream looks for this file where it finds an .npz beside the raw file
        if out.suffix == ".npz" and out.parent.resolve() == raw.parent.resolve():
            way_out = "name a place outside the raw file's folder with --processed-data-file=PATH"
            write_count_file(SETS[data_set].day_count_file(raw), "total_per_file", np.array(built.part_rows, np.int64), way_out)

    built = build(source, out, Options(memory_bytes, min_frequency, vocabulary), progress=progress, before_naming=before_naming)
    if sub_sample_rate > 0:
        skip_draws(rng, built.raw_rows)  # the source drew from a copy, which may have begun in the middle
    return built


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status (data_loaders.command)."""
    parser = argparse.ArgumentParser(prog="python -m data_loaders.preprocess", description="Number the ids of Criteo's raw text.")
    parser.add_argument("--data-set", choices=("kaggle", "terabyte"), default="kaggle")
    parser.add_argument("--raw-data-file", required=True, metavar="PATH", help="Kaggle's text, or DIR/day for DIR/day_0 .. DIR/day_23; plain or gzip")
    parser.add_argument("--processed-data-file", default="", metavar="PATH", help="what is made: an .npz, or a folder of arrays")
    parser.add_argument("--max-ind-range", type=int, default=-1, help="above 0: ids are hash modulo this")
    parser.add_argument("--data-sub-sample-rate", type=float, default=0.0, help="rows with label 0 are dropped with this probability")
    parser.add_argument("--preprocess-memory", default="4GB", metavar="SIZE", help="for the process' peak of resident memory")
    parser.add_argument("--min-frequency", type=int, default=0, help="ids seen less often share id 0; 0: every id has its own")
    parser.add_argument("--vocabulary", default="", metavar="PATH", help="an older result, whose ids are used")
    parser.add_argument("--numpy-rand-seed", type=int, default=123, help="of the sub-sampling")
    parser.add_argument("--force", action="store_true", help="replace a result that is there")
    args = parser.parse_args(argv)
    return ended(lambda: _run(args), "interrupted; run again to go on where it stopped")


def _run(args: argparse.Namespace) -> None:
    out = _out(args)
    if out.exists() and not args.force and not (out.is_dir() and not any(out.iterdir())):
        _check_there(args, out)
        print(f"{out}: is there already, made from these files with these flags")
        return
    built = preprocess(
        Path(args.raw_data_file),
        out,
        data_set=args.data_set,
        max_ind_range=args.max_ind_range,
        sub_sample_rate=args.data_sub_sample_rate,
        rng=np.random.RandomState(args.numpy_rand_seed),
        progress=sys.stderr.isatty(),
        memory_bytes=parse_size("--preprocess-memory", args.preprocess_memory),
        min_frequency=args.min_frequency,
        vocabulary=Path(args.vocabulary) if args.vocabulary else None,
    )
    print(f"{out}: {built.rows:,} rows of {built.raw_rows:,}, {sum(built.table_rows):,} ids in {len(built.table_rows)} columns")


def _out(args: argparse.Namespace) -> Path:
    """Where the result goes, the flags checked."""
    if not 0 <= args.data_sub_sample_rate <= 1:
        raise UserError(f"--data-sub-sample-rate={args.data_sub_sample_rate} is not a probability from 0 to 1")
    if not 0 <= args.numpy_rand_seed < 2**32:
        raise UserError(f"--numpy-rand-seed={args.numpy_rand_seed} is not a seed; it must be from 0 to {2**32 - 1}")
    parse_size("--preprocess-memory", args.preprocess_memory)
    return Path(args.processed_data_file) if args.processed_data_file else SETS[args.data_set].processed(Path(args.raw_data_file))


def _check_there(args: argparse.Namespace, out: Path) -> None:
    """Refuses a result that was made with other flags or from other files, and what is no result at all: days of work are not replaced unasked."""
    from data_loaders.criteo_map import read_processed  # torch, whose 0.5 GB would count against --preprocess-memory

    meta = read_processed(out, mapped=True, progress=sys.stderr.isatty()).meta
    way_out = "name another --processed-data-file, or add --force to replace it"
    if meta is None:
        raise UserError(f"{out}: was made by upstream, which does not say from what; {way_out}")
    draws = draws_of(np.random.RandomState(args.numpy_rand_seed).get_state(legacy=True)) if args.data_sub_sample_rate > 0 else None
    asked = Asked(args.max_ind_range, args.data_sub_sample_rate, args.min_frequency, args.vocabulary, draws)
    check_meta(SETS[args.data_set], meta, out, Path(args.raw_data_file), asked, way_out)
    if spill.parts_folder(out).exists():  # of a run that was killed when the result had its name
        with spill.locked_folder(spill.parts_folder(out), str(out)):
            spill.remove(spill.parts_folder(out))


if __name__ == "__main__":
    sys.exit(main())
