"""Opening an arrays folder: rows and bags, in memory and mapped; every damage is one line with the way out."""

import json
import os
import re

import numpy as np
import pytest
import torch

from data_loaders import arrays, manifest
from data_loaders.arrays import STAMP, is_arrays, open_arrays, read_manifest
from data_loaders.arrays_writer import checksums
from data_loaders.blocks import SplitRule
from data_loaders.build import Options, build
from data_loaders.manifest import NAME, ROWS, Manifest, bag_files, vocabulary_files
from data_loaders.spill import crc32
from dlrm_xla.specs import UserError
from tests.made_source import make_source

N = 200


@pytest.fixture(params=["float32", "int32"])
def folder(tmp_path, request):
    (tmp_path / "raw").mkdir()
    source = make_source(tmp_path / "raw", N, 3, floats=request.param == "float32", split=SplitRule("fraction", test=0.1))
    build(source, tmp_path / "out", Options(), progress=False)
    return tmp_path / "out"


def refused(folder, mapped: bool, act=lambda opened: None) -> str:
    with pytest.raises(UserError) as caught:
        act(open_arrays(folder, mapped))
    said = str(caught.value)
    assert "\n" not in said and said.endswith("delete the folder out to have it made again, or name another --processed-data-file")
    return said


def rewrite(folder, name: str, change) -> None:
    """Changes a file and its checksum in the manifest: what is wrong is a value, not a byte."""
    path = folder / name
    data = bytearray(path.read_bytes())
    change(data)
    path.write_bytes(data)
    fields = json.loads((folder / NAME).read_text())
    fields["files"][name] = {"bytes": len(data), "crc32": [crc32(data)] if data else []}
    (folder / NAME).write_text(signed(fields))


def signed(fields) -> str:
    """A manifest's text with the checksum that belongs to it."""
    rest = {name: value for name, value in fields.items() if name != "crc32"}
    return json.dumps({"crc32": manifest.checksum_of(rest), **rest})


def put(at: int, value: int, kind=np.int32):
    """A change of one number of an array."""

    def in_place(data):
        size = np.dtype(kind).itemsize
        data[at * size : (at + 1) * size] = np.array([value], kind).tobytes()

    return in_place


def test_in_memory_and_mapped_are_the_same(folder):
    memory, mapped = (open_arrays(folder, way) for way in (False, True))
    assert is_arrays(folder) and not is_arrays(folder.parent)
    assert isinstance(memory.rows, torch.Tensor) and memory.rows.dtype == torch.int32 and len(mapped.rows) == N
    chosen = torch.tensor([5, N - 1, 0, 5])
    for first, end in ((0, N), (3, 4), (N - 1, N + 5)):
        assert torch.equal(memory.rows[first:end], mapped.rows[first:end])
    assert torch.equal(memory.rows.index_select(0, chosen), mapped.rows.index_select(0, chosen))
    for name in ("many", "some"):
        for rows in (chosen.numpy(), np.array([], np.int64), np.arange(N)):
            for a, b in zip(memory.bags[name].take(rows), mapped.bags[name].take(rows), strict=True):
                assert a.dtype == np.int32 and a.tolist() == b.tolist()
    with pytest.raises(IndexError):
        mapped.rows.index_select(0, torch.tensor([N]))


def test_the_manifest_comes_back(folder):
    found = read_manifest(folder)
    assert Manifest.from_json(found.to_json()) == found
    assert set(found.files) == {path.name for path in folder.iterdir()} - {NAME}
    for name, entry in found.files.items():
        assert entry == checksums(folder / name)


def test_checksums_of_chunks(tmp_path, monkeypatch):
    data = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "x").write_bytes(data)
    for chunk, read in ((1000, 300), (1000, 1000), (999, 10_000), (10_000, 7), (20_000, 999)):
        monkeypatch.setattr("data_loaders.arrays_writer.CHUNK_BYTES", chunk)
        monkeypatch.setattr("data_loaders.arrays_writer._READ_BYTES", read)
        wanted = tuple(crc32(data[at : at + chunk]) for at in range(0, len(data), chunk))
        assert checksums(tmp_path / "x") == manifest.File(len(data), wanted)


@pytest.mark.parametrize("mapped", [False, True])
def test_damaged_files(folder, mapped):
    """Each file missing, cut, longer, or with one bit flipped."""
    for name in sorted(read_manifest(folder).files):
        path, stamp = folder / name, folder / STAMP
        whole = path.read_bytes()
        path.unlink()
        assert f"cannot read {name}: No such file" in refused(folder, mapped)
        path.mkdir()
        assert name in refused(folder, mapped)
        path.rmdir()
        for damaged in (whole[:-1], whole + b"\0", b""):
            if damaged != whole:
                path.write_bytes(damaged)
                assert f"{path}: {len(damaged)} bytes, not the {len(whole)} that were written" in refused(folder, mapped)
        if whole:
            path.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
            assert f"{path}: damaged between bytes 0 and {len(whole)}: its checksum is wrong" in refused(folder, mapped)
        path.write_bytes(whole)
        assert not stamp.exists()


def test_the_chunk_that_is_damaged_is_named(folder, monkeypatch):
    monkeypatch.setattr(arrays, "CHUNK_BYTES", 1000)
    monkeypatch.setattr("data_loaders.arrays_writer.CHUNK_BYTES", 1000)
    monkeypatch.setattr(manifest, "CHUNK_BYTES", 1000)
    fields = json.loads((folder / NAME).read_text())
    for name in fields["files"]:
        entry = checksums(folder / name)
        fields["files"][name] = {"bytes": entry.bytes, "crc32": entry.crc32}
    (folder / NAME).write_text(signed(fields))
    open_arrays(folder, False)
    rewritten = bytearray((folder / ROWS).read_bytes())
    rewritten[2500] ^= 8
    (folder / ROWS).write_bytes(rewritten)
    assert "damaged between bytes 2000 and 3000" in refused(folder, False)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("place, value", [(0, 2), (0, -1), (2, "bad"), (4, 10**6), (4, -1), (7, 30)])
def test_values_out_of_range(folder, mapped, place, value):
    """With checksums that are right: whoever wrote this did not know what a row may be."""
    found = read_manifest(folder)
    if value == "bad":
        value = -1 if found.number_type == "int32" else int(np.array([np.inf], np.float32).view(np.int32)[0])
    rewrite(folder, ROWS, put(50 * found.width + place, value))
    for act in (lambda opened: opened.rows[0:N], lambda opened: opened.rows.index_select(0, torch.tensor([3, 50]))):
        assert re.search(rf"{ROWS}: holds a label, a number or an id that is out of range \(.*: {value}\)", refused(folder, mapped, act))
    if mapped:
        assert len(open_arrays(folder, True).rows[0:50]) == 50, "other rows can be read"


@pytest.mark.parametrize("mapped", [False, True])
def test_bags_out_of_range(folder, mapped):
    offsets, ids = bag_files("many")
    whole = {name: (folder / name).read_bytes() for name in (offsets, ids, NAME)}
    changes = [
        (ids, put(3, -1)), (ids, put(3, 1000)), (offsets, put(50, 10**9, np.int64)), (offsets, put(50, -5, np.int64)), (offsets, put(0, 1, np.int64)),
        (offsets, put(N, 2, np.int64)), (ids, lambda data: data.extend(bytes(4))),
    ]  # fmt: skip
    for name, change in changes:
        rewrite(folder, name, change)
        if mapped and (name, change) in (changes[4], changes[6]):
            continue  # ids before the first bag and behind the last: nothing reads them
        assert "bags of many are damaged" in refused(folder, mapped, lambda opened: opened.bags["many"].take(np.arange(N)))
        for path, data in whole.items():
            (folder / path).write_bytes(data)


BAD_MANIFESTS = {
    "no JSON": lambda fields: "{",
    "a list": lambda fields: "[]",
    "empty": lambda fields: "",
    "a number changed": lambda fields: json.dumps(fields | {"num_train": fields["num_train"] - 1}),
    "format": lambda fields: signed(fields | {"format": 2}),
    "no format": lambda fields: signed({name: value for name, value in fields.items() if name != "format"}),
    "a field more": lambda fields: signed(fields | {"color": 1}),
    "a field less": lambda fields: signed({name: value for name, value in fields.items() if name != "rows"}),
    "rows": lambda fields: signed(fields | {"rows": N + 1}),
    "rows are text": lambda fields: signed(fields | {"rows": "200"}),
    "num_test": lambda fields: signed(fields | {"num_test": N}),
    "number_type": lambda fields: signed(fields | {"number_type": "int8"}),
    "a table's rows": lambda fields: signed(fields | {"tables": [fields["tables"][0] | {"rows": 0}, *fields["tables"][1:]]}),
    "a table less": lambda fields: signed(fields | {"tables": fields["tables"][1:]}),
    "a file less": lambda fields: signed(fields | {"files": {name: entry for name, entry in fields["files"].items() if name != ROWS}}),
    "a file more": lambda fields: signed(fields | {"files": fields["files"] | {"../x": {"bytes": 1, "crc32": [0]}}}),
    "no checksum": lambda fields: signed(fields | {"files": fields["files"] | {ROWS: fields["files"][ROWS] | {"crc32": []}}}),
    "files are numbers": lambda fields: signed(fields | {"files": 5}),
    "parts": lambda fields: signed(fields | {"parts": []}),
}


@pytest.mark.parametrize("case", BAD_MANIFESTS)
def test_bad_manifest(folder, case):
    path = folder / NAME
    path.write_text(BAD_MANIFESTS[case](json.loads(path.read_text())))
    assert f"{path}: damaged, or of another version (" in refused(folder, False)


def test_no_manifest(folder):
    (folder / NAME).unlink()
    assert "cannot read its manifest.json: No such file" in refused(folder, True)
    (folder / NAME).write_bytes(b"\xff\xfe")
    assert "damaged" in refused(folder, True)


def test_checksums_are_compared_once(folder, monkeypatch):
    """Mapped: the stamp spares the next open as long as the files are the same; in memory every open compares what it reads."""
    compared = []
    original = arrays._checked_chunks
    monkeypatch.setattr(arrays, "_checked_chunks", lambda folder, name, *rest: (compared.append(name), original(folder, name, *rest))[1])
    names = sorted(read_manifest(folder).files)

    def opened(mapped: bool) -> list[str]:
        compared.clear()
        open_arrays(folder, mapped)
        return sorted(compared)

    loaded = sorted([ROWS, *bag_files("many"), *bag_files("some")])
    assert opened(True) == names and opened(True) == []
    assert opened(False) == loaded
    assert opened(True) == [], "what was compared before still is"
    os.utime(folder / ROWS, ns=(0, 0))
    assert opened(True) == [ROWS]
    keys = folder / vocabulary_files("a")[0]
    keys.rename(folder / "x")
    keys.write_bytes((folder / "x").read_bytes())
    assert opened(True) == [keys.name]
    for damage in (b"", b"[]", b"{", b'{"rows.bin": 1}'):
        (folder / STAMP).write_bytes(damage)
        assert opened(True) == names
    (folder / STAMP).unlink()
    assert opened(False) == names and opened(False) == loaded


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written(folder, capsys):
    folder.chmod(0o500)
    open_arrays(folder, True)
    assert "every open reads all of it" in capsys.readouterr().err
    folder.chmod(0o700)
