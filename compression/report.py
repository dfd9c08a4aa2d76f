"""How near every method comes to the best that its form allows: python -m compression report --out=FOLDER [--load-model=m.pt]

On tables of known spectra: the Eckart-Young optimum, the randomized SVD, its bound, and the time of both as tables grow. With a checkpoint also on
its trained tables: every method that starts from one, each at several sizes, weighted by lookups and not, beside its optimum, bound or bracket.

FOLDER gets report.md, report.json and pictures: figures alone, no ids and no rows. All but times are the same for the same seed, and a
figure does not depend on which others are made.
"""

import argparse
import json
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from compression.against_optimal import known_spectrum, known_table, rank_rows, time_rows
from compression.choose import parse_asked
from compression.convert import measured_errors
from compression.method import PLAIN, Making
from compression.optimal import decompose, importance, ratio
from compression.registry import METHODS, num_bytes
from compression.report_text import markdown
from compression.stored import StoredTable, stored_tables
from compression.training_data import DATA_FLAGS, check_data_flags, training_counts
from compression.tt_shapes import shape_of, useful_ranks
from data_loaders.command import ended
from data_loaders.criteo_npz import atomic_write
from dlrm_xla.checkpoint_file import Checkpoint, read
from dlrm_xla.embeddings import EmbeddingCollection
from dlrm_xla.layouts import RowsLayout
from dlrm_xla.ops.rows import add_rows_scatter
from dlrm_xla.optim import RULES
from dlrm_xla.specs import TableSpec, UserError

KNOWN = (("1/sqrt j", "power", 0.5), ("1/j", "power", 1.0), ("0.9^j", "exponential", 0.9), ("step to 0.1", "step", 0.1), ("flat", "power", 0.0))
RANKS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)
POWERS = (0, 1, 2)
TIME_WIDTHS, TIME_POWERS = (16, 64, 128), (0, 1)
TIME_SIZES = (1_000, 3_000, 10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000)
WEIGHTED = (("svd", ""), ("rsvd", ",power=1"), ("rsvd", ",oversampling=2,power=0"))
TT_RANKS = (2, 4, 8, 16, 32, 64, 128)
SHARES = (2, 4, 8, 16, 32, 64, 128)  # ids that share a row in the hash trick
PQ_BITS, PQ_BITS_OF_NUMBERS = (1, 2, 4, 6, 8, 10), (1, 2, 3, 4, 6)
THRESHOLD = 10_000  # of --compress-threshold
RESULTS = ("report.md", "report.json")
PICTURES = ("error_against_rank.png", "error_against_rank_trained.png", "error_against_bytes.png", "spectrum.png", "time_against_rows.png")
WAY_OUT = "choose another --out"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (python -m compression report --help lists the flags)")


def parser() -> argparse.ArgumentParser:
    made = _Parser(
        prog="python -m compression report",
        description="How near every compression method comes to the best that its form allows: tables of figures and pictures.",
        epilog="Further flags name the training data as for run_dlrm.py (--raw-data-file, --processed-data-file, --data-set and so on), to count "
        "lookups; without them it is the data set that the checkpoint names.",
        allow_abbrev=False,
    )
    made.add_argument("--out", required=True, type=Path, metavar="FOLDER", help="for report.md, report.json and pictures")
    made.add_argument("--load-model", type=Path, metavar="FILE", help="a checkpoint with plain trained tables; without it known spectra only")
    made.add_argument("--tables", default="", metavar="2,3", help="of the checkpoint, by number; without it all above --compress-threshold rows")
    made.add_argument("--compress-threshold", type=int, default=THRESHOLD, metavar="N", help=f"rows (default {THRESHOLD})")
    made.add_argument("--ranks", default="", metavar="1,2,4", help=f"those below a table's width are used (default {','.join(map(str, RANKS))})")
    made.add_argument("--rows", type=int, default=200_000, metavar="N", help="of the tables of known spectra (default 200000)")
    made.add_argument("--dim", type=int, default=64, metavar="D", help="of the tables of known spectra (default 64)")
    made.add_argument("--no-times", action="store_true", help="leave out the times of randomized against exact")
    made.add_argument("--no-counts", action="store_true", help="read no data: nothing is weighted by lookups")
    made.add_argument("--numpy-rand-seed", type=int, default=123, metavar="N", help="seed of everything random (default 123)")
    made.add_argument("--force", action="store_true", help="replace a report that is there")
    return made


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status (data_loaders.command)."""
    return ended(lambda: _run(argv))


def _run(argv: list[str] | None) -> None:
    args, data_flags = parser().parse_known_args(argv)
    ranks = _check(args, data_flags)
    loaded = None if args.load_model is None else read(args.load_model, mapped=True)
    chosen = [] if loaded is None else _chosen(args, loaded)
    counts = None if loaded is None else _counts(args, loaded, data_flags)
    seed = args.numpy_rand_seed
    content = {"seed": seed, "known": known(args.rows, args.dim, [rank for rank in ranks if rank < args.dim], seed), "tables": [], "times": []}
    work = [(index, table, wanted(table.spec, ranks, counts is not None)) for index, table in chosen]
    with _bar(sum(len(texts) for _, _, texts in work), "conversions") as bar:
        for index, table, texts in work:
            bar.set_postfix_str(table.name)
            weight = loaded.weights[table.names[0]].float().numpy()
            content["tables"].append(measured(table.spec, weight, counts[index] if counts else None, texts, seed, bar))
    if not args.no_times:
        content["times"] = times(args.rows, seed)
    _write(args.out, content)
    print(f"written to {args.out}: {', '.join(name for name in (*RESULTS, *PICTURES) if (args.out / name).exists())}")


def _check(args: argparse.Namespace, data_flags: list[str]) -> list[int]:
    """Everything that can be wrong before anything is read; makes the folder. The ranks."""
    try:
        check_data_flags(data_flags)
    except UserError as error:
        raise UserError(str(error).replace("compression convert", "compression report")) from None
    of_model = {"--tables": args.tables, "--no-counts": args.no_counts, "--compress-threshold": args.compress_threshold != THRESHOLD}
    needless = [*data_flags, *(name for name, given in of_model.items() if given)]
    if args.load_model is None and needless:
        raise UserError(f"{needless[0].partition('=')[0]}: says something of trained tables only; give --load-model too")
    if args.no_counts and data_flags:
        raise UserError(f"--no-counts: reads no data, and {data_flags[0].partition('=')[0]} names some; leave one of them out")
    for name, value, least in (("dim", args.dim, 2), ("rows", args.rows, args.dim), ("compress-threshold", args.compress_threshold, 0)):
        if value < least:
            raise UserError(f"--{name}={value}: must be at least {least}{' (--dim)' * (name == 'rows')}")
    if not 0 <= args.numpy_rand_seed < 2**32:
        raise UserError(f"--numpy-rand-seed={args.numpy_rand_seed}: must be at least 0 and below 2^32")
    ranks = numbers("--ranks", args.ranks, 1) or list(RANKS)
    if min(ranks) >= args.dim:
        raise UserError(f"--ranks={args.ranks}: none is below --dim={args.dim}; at the full rank every table is exact")
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"--out={args.out}: is no folder; {WAY_OUT}")
    old = [name for name in RESULTS if (args.out / name).exists()]
    if old and not args.force:
        raise UserError(f"--out={args.out}: holds a report ({old[0]}); name another folder, or add --force")
    args.out.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.out / ".writable", WAY_OUT):  # better now than after minutes
        pass
    (args.out / ".writable").unlink()
    return ranks


def numbers(flag: str, text: str, least: int) -> list[int]:
    """ "1,2,4" -> [1, 2, 4], each once, rising; "" -> []."""
    pieces = [piece.strip() for piece in text.split(",")] if text else []
    if not all(piece.isascii() and piece.isdigit() and int(piece) >= least for piece in pieces):
        raise UserError(f"{flag}={text}: must be whole numbers of at least {least} with commas between them, as {least},{least + 1}")
    return sorted({int(piece) for piece in pieces})


def _chosen(args: argparse.Namespace, loaded: Checkpoint) -> list[tuple[int, StoredTable]]:
    """The tables that are looked at, the largest first."""
    stored = stored_tables(loaded)
    plain = [index for index, table in enumerate(stored) if table.choice == PLAIN]
    if not plain:
        raise UserError(f"--load-model={loaded.path}: all its tables are compressed; give the checkpoint that they were made from")
    asked = numbers("--tables", args.tables, 0)
    for index in asked:
        if index >= len(stored):
            raise UserError(f"--tables={args.tables}: the checkpoint has tables 0 to {len(stored) - 1}")
        if index not in plain:
            raise UserError(f"--tables={args.tables}: table {index} is compressed; the plain ones are {', '.join(map(str, plain))}")
    found = asked or [index for index in plain if stored[index].spec.num_embeddings > args.compress_threshold]
    if not found:
        largest = max(stored[index].spec.num_embeddings for index in plain)
        raise UserError(f"--compress-threshold={args.compress_threshold}: the largest table has {largest:,} rows; lower it, or name --tables")
    return [(index, stored[index]) for index in sorted(found, key=lambda index: (-stored[index].spec.num_embeddings, index))]


def _counts(args: argparse.Namespace, loaded: Checkpoint, data_flags: list[str]) -> list[np.ndarray] | None:
    """Of each table how often training looks each id up; None where no data set is named."""
    if args.no_counts:
        return None
    if not data_flags and loaded.flags.get("data-generation") != "dataset":
        flags = f"--{DATA_FLAGS[2]} or --{DATA_FLAGS[3]}"
        print(f"note: {loaded.path} names no data set, so nothing is weighted by lookups; {flags} would name one", file=sys.stderr)
        return None
    return training_counts(loaded, data_flags, [table.spec for table in stored_tables(loaded)], "the weighted errors")


def stream(seed: int, name: str) -> np.random.RandomState:
    """Its own for each figure."""
    return np.random.RandomState([seed, zlib.crc32(name.encode())])


def known(num_rows: int, width: int, ranks: list[int], seed: int) -> list[dict]:
    """{"spectrum", "rows", "dim", "norm", "results": those of rank_rows, with "power"} for each of KNOWN."""
    found = []
    with _bar(len(KNOWN) * len(POWERS), "known spectra") as bar:
        for name, kind, parameter in KNOWN:
            table = known_table(num_rows, width, known_spectrum(kind, parameter, width), stream(seed, name))
            results = []
            for power in POWERS:
                results += [{"power": power, **row} for row in rank_rows(table, ranks, stream(seed, f"{name} {power}"), power=power)]
                bar.update()
            found.append({"spectrum": name, "rows": num_rows, "dim": width, "results": results})
    return found


def times(most_rows: int, seed: int) -> list[dict]:
    """Rows of time_rows, at a rank of an eighth of the width."""
    found = []
    time_rows([min(most_rows, 1000)], 2, 1, stream(seed, "times"), rounds=1)  # what is loaded at the first call is not timed
    with _bar(len(TIME_WIDTHS) * len(TIME_POWERS), "times") as bar:
        for width in TIME_WIDTHS:
            sizes = [size for size in TIME_SIZES if size <= most_rows] or [most_rows]
            for power in TIME_POWERS:
                if sizes[-1] >= width:
                    found += time_rows(sizes, width, width // 8, stream(seed, f"times {width}"), power=power, rounds=3)
                bar.update()
    return found


def wanted(spec: TableSpec, ranks: list[int], weighted: bool) -> list[str]:
    """Methods for one table as users type them, those that make it smaller."""
    rows, dim = spec.num_embeddings, spec.embedding_dim
    texts = []
    for rank in (rank for rank in ranks if rank < min(rows, dim)):
        texts += [f"svd:rank={rank}", *(f"rsvd:rank={rank},power={power}" for power in POWERS), f"rsvd:rank={rank},oversampling=2,power=0"]
        if weighted:
            texts += [f"{method}:rank={rank}{knobs},weighted=true" for method, knobs in WEIGHTED]
        texts.append(f"random_projection:rank={rank}")
    shape = shape_of("tt_svd", spec, METHODS["tt_svd"].knob_values({"rank": "1"}))
    texts += [f"tt_svd:rank={rank}" for rank in TT_RANKS if rank <= max(useful_ranks(shape.rows, shape.dims))]
    others = [f"hash:rows={rows // share}" for share in SHARES if rows >= share]
    others += [f"pq:bits={bits}" for bits in PQ_BITS] + [f"pq:chunks={dim},bits={bits}" for bits in PQ_BITS_OF_NUMBERS]
    for bits in (4, 8):
        texts += [f"int{bits}:range=minmax", f"int{bits}:range=greedy"]
        # int4: twice as many numbers as codes, so that there is an optimum to compute; int8: as many as codes, because it would take 22 s
        shared = max((32 if bits == 4 else 256) // dim, 2)
        others.append(f"int{bits}:rows_per_scale={1 << shared.bit_length() - 1}")
    texts += [text + more for text in others for more in ("", *[",weighted=true"] * weighted)]
    return [text for text in dict.fromkeys(texts) if num_bytes(spec, parse_asked(text).choice()) < 4 * rows * dim]


def measured(spec: TableSpec, weight: np.ndarray, counts: np.ndarray | None, texts: list[str], seed: int, bar) -> dict:
    """{"table", "rows", "dim", "bytes", "spectrum", "results"}; with counts also "lookups", "never_looked_up" and "spectrum_weighted".

    spectrum: singular values over the table's norm
    """
    found = {"table": spec.name, "rows": spec.num_embeddings, "dim": spec.embedding_dim, "bytes": num_bytes(spec, PLAIN)}
    found["spectrum"] = _spectrum(spec, weight, None)
    if counts is not None:
        found |= {"lookups": int(counts.sum()), "never_looked_up": float((counts == 0).mean())}
        found["spectrum_weighted"] = _spectrum(spec, weight, importance(counts))
    found["results"] = []
    for text in texts:
        found["results"].append(result(spec, weight, counts, text, stream(seed, f"{spec.name} {text}")))
        bar.update()
    return found


def _spectrum(spec: TableSpec, weight: np.ndarray, weights: np.ndarray | None) -> list[float]:
    exact = decompose(weight, weights, spec.name)
    return (exact.values / (exact.norm or 1.0)).tolist()


def result(spec: TableSpec, weight: np.ndarray, counts: np.ndarray | None, text: str, rng: np.random.RandomState) -> dict:
    """One conversion: {"method", "typed", "knobs", "bytes", "compression"}, the method's facts, and what is measured on the lookups of the result,
    "relative_error" and, with counts, "relative_error_weighted"; "ratio" is measured / optimal, "bound_slack" bound / measured."""
    choice = parse_asked(text).choice()
    made = METHODS[choice.method].convert(spec, choice.knobs, weight, Making(rng, counts))
    collection = EmbeddingCollection([made.table], None, RULES["sgd"](), RowsLayout(add_rows_scatter, ragged=False))
    size = num_bytes(spec, choice)
    row = {"method": choice.method, "typed": text, "knobs": choice.knobs, "bytes": size, "compression": num_bytes(spec, PLAIN) / size}
    row |= made.facts | measured_errors(collection, weight, counts)
    for suffix in ("", "_weighted"):
        error = row.get("relative_error" + suffix)
        if "optimal" + suffix in row:
            row["ratio" + suffix] = ratio(error, row["optimal" + suffix])
        if "bound" + suffix in row:
            row["bound_slack" + suffix] = ratio(row["bound" + suffix], error)
    return row


def _bar(total: int, title: str) -> tqdm:
    return tqdm(total=total, desc=title, disable=not sys.stderr.isatty() or not total, leave=False)


def _write(out: Path, content: dict) -> None:
    """All is made before the first file is written; each is there whole or not at all. Pictures of a report before that this one lacks go."""
    from compression.report_plots import pictures, png  # matplotlib takes half a second

    made = {name: png(figure) for name, figure in pictures(content).items()}
    made["report.md"] = markdown(content, list(made)).encode()
    made["report.json"] = (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()
    for name, data in made.items():
        with atomic_write(out / name, WAY_OUT) as file:
            file.write(data)
    for name in PICTURES:
        if name not in made:
            (out / name).unlink(missing_ok=True)
