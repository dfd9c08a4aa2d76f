"""Any raw format to what a run reads: rows spilled to disk, ids numbered a column at a time, rows written. Resumable, in bounded memory.

read    blocks of the source become segments in the folder <out>.parts, each written whole or not at all (data_loaders.spill)
number  a column's keys become ids in order of first appearance (data_loaders.numbering), with its vocabulary
write   an arrays folder (data_loaders.arrays), or an .npz where `out` ends so (Criteo only)
What is finished lies in <out>.parts until the result gets its name, so whatever kills a run, the next one goes on from the last whole piece.
key.json there says what the work is for, state.json how far it has come.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_loaders import spill
from data_loaders.arrays_writer import write_arrays
from data_loaders.blocks import Source
from data_loaders.criteo_npz import RawFingerprint
from data_loaders.manifest import is_only_arrays  # not from arrays, which imports torch: 0.5 GB of the memory that is allowed
from data_loaders.npz_writer import check_npz, meta_of, write_criteo_npz
from data_loaders.number_stage import number_columns
from data_loaders.read_stage import MIN_FREE, enough, read_rows, resident_bytes
from data_loaders.spilled import IDS, VOCABULARY, Numbered, Spilled
from data_loaders.split import split_rows
from data_loaders.vocabulary import OldVocabularies
from dlrm_xla.files import sync_folder
from dlrm_xla.specs import UserError

FORMAT = 1  # of the parts folder
_KEY, _RESULT, _OLD = "key.json", "result", "old"


@dataclass(frozen=True)
class Options:
    """How a result is made. The bytes of the result do not depend on memory_bytes.

    memory_bytes   for the peak of the process' resident memory, what it held at the start included
    min_frequency  0: every key has an id of its own, from 0. F >= 1: keys seen fewer than F times share id 0, and so do keys unknown to a later
                   result that is encoded with this vocabulary; the others are numbered from 1
    vocabulary     an older result (arrays folder, or npz of ours): its keys keep their ids, keys that it lacks share its id 0 where it has a
                   shared one and are an error otherwise. Not together with min_frequency
    way_out        ends the messages of failed writes
    memory_flag    the flag that stands for memory_bytes, for messages
    """

    memory_bytes: int = 4 * 10**9
    min_frequency: int = 0
    vocabulary: Path | None = None
    way_out: str = "name another place with --processed-data-file=PATH"
    memory_flag: str = "--preprocess-memory"


@dataclass(frozen=True)
class Built:
    """A finished result. raw_rows: rows of the raw files, left-out ones included; part_rows: rows of each part; table_rows: ids of each column."""

    rows: int
    raw_rows: int
    part_rows: tuple[int, ...]
    table_rows: tuple[int, ...]


def build(
    source: Source, out: Path, options: Options, *, progress: bool, before_naming: Callable[[Built], None] = lambda built: None
) -> Built:
    """Makes `out` from the source: an arrays folder, or an .npz where its name ends in .npz. An older `out` is replaced when the new one is whole.

    before_naming is called when the result is whole and has not got its name. It may be called again by the next run where this one is killed.
    Raises UserError for bad input (naming file and line), too little memory, a full disk, and where another run is making `out`.
    """
    if options.min_frequency < 0:
        raise UserError(f"--min-frequency={options.min_frequency} is negative; it must be 0 (off) or above")
    if options.min_frequency and options.vocabulary is not None:
        raise UserError(f"--min-frequency={options.min_frequency} makes a vocabulary and --vocabulary={options.vocabulary} takes one; leave one out")
    if out.suffix == ".npz":
        check_npz(source, out)
    raws = [_fingerprint(path) for path in source.files]
    if options.vocabulary is not None and options.vocabulary.resolve() == out.resolve():
        raise UserError(f"--vocabulary={options.vocabulary} is also what would be written; {options.way_out}")
    old = OldVocabularies.of(options.vocabulary) if options.vocabulary is not None else None
    folder = spill.parts_folder(out)
    try:
        _check_place(out, options)
        with spill.locked_folder(folder, str(out)):
            try:
                return _Build(source, out, folder, options, raws, old, progress).run(before_naming)
            except BaseException:
                if not spill.segment_path(folder, 0).exists() and not (folder / spill.STATE).exists():
                    spill.remove(folder)  # nothing in it that a later run could use
                raise
    except OSError as error:
        kept = f"; what is finished is kept in {folder}: make room and run again to go on" if folder.exists() else ""
        raise UserError(f"cannot write {out}: {error.strerror or error}{kept}; {options.way_out}") from None


def _fingerprint(path: Path) -> RawFingerprint:
    try:
        return RawFingerprint.of(path)
    except OSError as error:
        raise UserError(f"--raw-data-file={path}: cannot read it: {error.strerror}") from None


def _check_place(out: Path, options: Options) -> None:
    """A folder that is not a result is not replaced by one; nor is a file by a folder."""
    wrong = None
    if out.suffix == ".npz":
        wrong = "it is a folder" if out.is_dir() else None
    elif out.is_dir():
        wrong = "it is a folder that holds other things" if any(out.iterdir()) and not is_only_arrays(out) else None
    elif out.exists():
        wrong = "it is a file"
    if wrong:
        raise UserError(f"cannot write {out}: {wrong}; {options.way_out}")


class _Build:
    """One run of build, which has the folder for itself. state.json: stage by stage, what is done."""

    def __init__(
        self, source: Source, out: Path, folder: Path, options: Options, raws: list[RawFingerprint], old: OldVocabularies | None, progress: bool
    ):
        self.source, self.out, self.folder, self.options, self.raws, self.old, self.progress = source, out, folder, options, raws, old, progress
        self.result = folder / (f"{_RESULT}.npz" if out.suffix == ".npz" else _RESULT)
        self.state: dict[str, Any] = {}
        described = source.describe()
        self.facts = {"source": described, "flags": {**described.get("flags", {}), "min_frequency": options.min_frequency, "vocabulary": None}}
        if old is not None:
            self.facts["flags"]["vocabulary"] = asdict(old.fingerprint)

    def run(self, before_naming: Callable[[Built], None]) -> Built:
        self._take_up()
        if "built" not in self.state:
            numbered, raw_rows = self._numbered()
            self._write(numbered, raw_rows)
            n = sum(numbered.split.part_rows)
            self._save(built=[n, raw_rows, numbered.split.part_rows, [entry.rows for entry in numbered.vocabularies]])
        rows, raw_rows, part_rows, table_rows = self.state["built"]
        built = Built(rows, raw_rows, tuple(part_rows), tuple(table_rows))
        if self.result.exists():
            before_naming(built)
            self._name_result()
        spill.remove(self.folder)
        sync_folder(self.out.parent)
        return built

    def _take_up(self) -> None:
        """Keeps what an earlier run left for the same purpose, as far as the raw files are still the same; throws away the rest."""
        files = [asdict(raw) | {"stamp": _stamp(path)} for raw, path in zip(self.raws, self.source.files, strict=True)]
        key = {"format": FORMAT, "name": self.result.name, **self.facts, "columns": repr((self.source.categorical, self.source.dense))}
        key |= {"split": repr(self.source.split), "parts": list(self.source.part_names), "files": files}
        found = spill.read_json(self.folder / _KEY)
        if isinstance(found, dict) and found | {"files": key["files"]} == key:
            same = 0
            for then, now in zip(found["files"], key["files"], strict=False):
                if {**then, "name": ""} != {**now, "name": ""}:
                    break
                same += 1
            if same == len(self.raws) == len(found["files"]):
                state = spill.read_json(self.folder / spill.STATE)
                self.state = state if isinstance(state, dict) else {}
                if "built" not in self.state or self.result.exists() or self.out.exists():
                    return
                self.state = {}
            marks = [(segment.path, segment.mark) for segment in spill.read_segments(self.folder)]
            kept = {path for path, mark in marks if mark.file < same or (mark.file, mark.byte) == (same, 0)}
        else:
            kept = set()
        spill.remove(self.folder / spill.STATE)
        for path in set(self.folder.iterdir()) - kept - {self.folder / _KEY}:
            spill.remove(path)
        sync_folder(self.folder)
        spill.write_json(self.folder / _KEY, key)

    def _save(self, **changes: Any) -> None:
        self.state |= changes
        spill.write_json(self.folder / spill.STATE, self.state)

    def _numbered(self) -> tuple[Numbered, int]:
        """Reading and numbering, as far as they are not done; and the number of raw rows."""
        segments = spill.read_segments(self.folder)
        if self.state.get("segments") is None:
            self.state, memory = {}, self._memory()
            for path in set(self.folder.glob("segment_*")) - {segment.path for segment in segments}:
                spill.remove(path)  # unfinished, or behind one that is damaged
            try:
                segments = read_rows(self.source, self.folder, segments, memory, self.progress)
            except UserError as error:
                if len(self.source.files) == 1 or not (segments or spill.read_segments(self.folder)):
                    for path in self.folder.iterdir():
                        spill.remove(path)
                    raise
                raise UserError(f"{error}; the files read before it need not be read again, they are kept in {self.folder}") from None
            self._save(segments=len(segments))
        if len(segments) < self.state["segments"]:
            raise UserError(f"{self.folder}: damaged on the disk; delete it and run again")
        segments = segments[: self.state["segments"]]
        spilled = Spilled(self.folder, self.source, segments)
        split = split_rows(self.source, segments)
        done = self.state.get("columns", [])
        numbered = number_columns(spilled, split, self.options, self.old, done, lambda done: self._save(columns=done), self.progress)
        last = segments[-1].mark
        return numbered, last.rows + last.left_out

    def _memory(self) -> int:
        free = self.options.memory_bytes - resident_bytes()
        if free < MIN_FREE:
            raise enough(self.options, MIN_FREE - free, "reading rows")
        return free

    def _write(self, numbered: Numbered, raw_rows: int) -> None:
        n, written = sum(numbered.split.part_rows), self.state.get("written")
        with self._bar(n * (2 if self.out.suffix == ".npz" else 1), numbered, written) as bar:
            if self.out.suffix != ".npz":
                facts = {**self.facts, "raw_rows": raw_rows}
                write_arrays(self.result, numbered, facts, self.raws, written, lambda done: self._save(written=done), bar)
                return
            meta = meta_of(self.facts["flags"], len(self.source.part_names), self.raws, raw_rows)
            temporary = self.result.with_name(f"{self.result.name}.tmp")
            with open(temporary, "wb") as file:
                write_criteo_npz(file, numbered, meta, bar)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.result)
            sync_folder(self.folder)

    @contextlib.contextmanager
    def _bar(self, total: int, numbered: Numbered, written: dict | None) -> Iterator[tqdm]:
        done = sum(segment.rows for segment in numbered.spilled.segments[: written["segments"]]) if written else 0
        with tqdm(total=total, initial=done, desc=f"Writing {self.out.name}", unit="row", unit_scale=True, disable=not self.progress) as bar:
            yield bar

    def _name_result(self) -> None:
        """The spilled rows go first: their room may be needed, and a kill after it leaves little behind."""
        for path in [*self.folder.glob("segment_*"), self.folder / IDS, self.folder / VOCABULARY]:
            spill.remove(path)
        if self.out.is_dir():  # by rename: a folder must not lie under this name half removed
            os.replace(self.out, self.folder / _OLD)
            spill.remove(self.folder / _OLD)  # now, because a run that is killed behind the next line leaves the folder to nobody
        os.replace(self.result, self.out)
        sync_folder(self.out.parent)


def _stamp(path: Path) -> list[int]:
    """What changes when a raw file is fetched again, though its size and its ends stay."""
    found = path.stat()
    return [found.st_mtime_ns, found.st_ctime_ns, found.st_ino]
