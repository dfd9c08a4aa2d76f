"""Which files --raw-data-file names: one, several between commas, a folder, or a pattern."""

import glob
import re
from collections.abc import Sequence
from pathlib import Path

from data_loaders.schema import Schema
from dlrm_xla.specs import UserError

# what lies beside data: success marks, checksums, notes, schemas, unfinished copies
_NOT_DATA = (".crc", ".md5", ".sha256", ".yaml", ".yml", ".json", ".md", ".pdf", ".py", ".tmp", ".part", ".npz")


def find_files(raw_data_file: str) -> tuple[Path, ...]:
    """The files in reading order: between commas as they are written, in a folder (with its folders) and of a pattern by name, numbers in
    names by value: part-2 before part-10. Raises UserError where there is none, or one twice."""
    files, flag = [], f"--raw-data-file={raw_data_file}"
    if not raw_data_file:
        raise UserError("no data: name the table's files with --raw-data-file=FILE[,FILE...], a folder or a pattern")
    for text in [raw_data_file] if Path(raw_data_file).exists() else raw_data_file.split(","):
        text = text.strip()
        if not text:
            raise UserError(f"{flag}: nothing between two commas; name files as A,B,C")
        files += _expand(text, flag)
    seen = set()
    for file in files:
        real = file.resolve()
        if real in seen:
            raise UserError(f"{flag}: {file} is named twice, so its rows would be read twice; name it once")
        seen.add(real)
    return tuple(files)


def part_names(files: tuple[Path, ...]) -> tuple[str, ...]:
    """A name for each file, all different: its own name, with the folders that tell it from the others."""
    names, depth = [file.name for file in files], 1
    while len(set(names)) < len(names) and depth < 32:
        depth += 1
        twice = {name for name in names if names.count(name) > 1} if len(names) < 2000 else set(names)
        names = ["/".join(file.parts[-depth:]) if name in twice else name for file, name in zip(files, names, strict=True)]
    return tuple(names) if len(set(names)) == len(names) else tuple(str(file.resolve()) for file in files)


def default_folder(raw_data_file: str) -> Path:
    """Where the arrays go without --processed-data-file: beside the file, the folder, or the first one named."""
    first = Path(raw_data_file) if Path(raw_data_file).exists() else Path(raw_data_file.split(",")[0].strip())
    if glob.has_magic(str(first)) and not first.exists():
        while glob.has_magic(str(first)):
            first = first.parent
        return first / "table.processed" if str(first) == "." else first.with_name(f"{first.name}.processed")
    if first.name in ("", ".", ".."):
        first = first.resolve()
    return first.with_name(f"{first.name}.processed")


def same_columns(names: Sequence[str], others: Sequence[str]) -> bool:
    """Whether two headers are of the same columns, which may stand in another order where every one has a name of its own."""
    return list(names) == list(others) or ("" not in names and len(set(names)) == len(names) == len(others) and set(names) == set(others))


def header_difference(cells: list[str], names: list[str]) -> str:
    """What tells a header from the first file's, in words."""
    if len(cells) != len(names):
        return f"{len(cells)} columns instead of {len(names)}"
    number = next(number for number, pair in enumerate(zip(cells, names, strict=True)) if pair[0] != pair[1])
    return f"column {number + 1} is called {ascii(cells[number][:60])} instead of {ascii(names[number][:60])}"


def file_format(files: tuple[Path, ...], schema: Schema) -> str:
    """ "parquet" or "text", told by content; all files alike, and as the schema says."""
    found = []
    for path in files:
        try:
            with open(path, "rb") as file:
                found.append("parquet" if file.read(4) == b"PAR1" else "text")
        except OSError as error:
            raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None
    if len(set(found)) > 1:
        text, other = files[found.index("text")], files[found.index("parquet")]
        raise UserError(f"--raw-data-file: {other} is Parquet and {text} is not; the files of one table must be of one format")
    if schema.format is not None and (schema.format == "parquet") != (found[0] == "parquet"):
        what = "is Parquet" if found[0] == "parquet" else "is not Parquet (its first four bytes are not PAR1)"
        raise UserError(f"{schema.path}: format: {schema.format}, but {files[0]} {what}; correct format: or leave it out")
    return found[0]


def table_names(columns: tuple[str, ...]) -> tuple[str, ...]:
    """Names for people and files: other characters than letters, digits, _ . - become _; all different, in upper and lower case too."""
    names: list[str] = []
    for column in columns:
        plain = re.sub(r"[^A-Za-z0-9_.-]", "_", column)[:60] or "_"
        name, number = plain, 1
        while name.lower() in (other.lower() for other in names):
            number += 1
            name = f"{plain}_{number}"
        names.append(name)
    return tuple(names)


def natural(path: Path) -> list:
    """Sorting key: digits as numbers."""
    return [(1, int(piece), "") if piece.isdigit() else (0, 0, piece) for piece in re.split(r"([0-9]+)", str(path)) if piece]


def _expand(text: str, flag: str) -> list[Path]:
    path = Path(text)
    if path.is_dir():
        found = _in_folder(path)
        if not found:
            raise UserError(f"{flag}: the folder {path} holds no data file (names that begin with . or _ do not count)")
        return found
    if path.exists():
        return [path]
    if not glob.has_magic(text):
        raise UserError(f"{flag}: {path}: no such file; name files, a folder, or a pattern as 'day_*.csv'")
    found = []
    for match in sorted(map(Path, glob.glob(text, recursive=True)), key=natural):
        if match.is_dir():
            found += _in_folder(match) if _is_data_folder(match) else []
        elif _is_data(match):
            found.append(match)
    if not found:
        raise UserError(f"{flag}: no file matches the pattern {text!r}")
    return list(dict.fromkeys(found))  # ** finds a file by its folder, too


def _in_folder(folder: Path) -> list[Path]:
    found = []
    try:
        for entry in sorted(folder.iterdir(), key=natural):
            if entry.is_dir():
                found += _in_folder(entry) if _is_data_folder(entry) else []
            elif _is_data(entry):
                found.append(entry)
    except OSError as error:
        raise UserError(f"--raw-data-file={folder}: cannot read the folder: {error.strerror}") from None
    return found


def _is_data(path: Path) -> bool:
    return path.is_file() and not path.name.startswith((".", "_")) and not path.name.endswith("~") and path.suffix.lower() not in _NOT_DATA


def _is_data_folder(path: Path) -> bool:
    """Not one of ours (its arrays, or the parts of unfinished ones), nor a hidden one; links to folders might run in a circle."""
    return not path.name.startswith((".", "_")) and not path.is_symlink() and path.suffix not in (".processed", ".parts")
