"""Every way to number ids against a dictionary; that memory and the size of pieces play no part; what is too little memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_loaders import numbering
from data_loaders.numbering import Keys, RankedBitmap, Runs, TooLittleMemory, enough_bytes, number_ids, whole_bytes
from data_loaders.vocabulary import count_ids, share_rare

TOP = 2**32 - 1
BOUND = 1 << 16  # of the bitmap in tests: 2^32 keys would take 0.6 GB


class Files:
    """ids_file and keys_file of one call."""

    def __init__(self, folder):
        self.ids, self.keys, self.out = (open(folder / name, "w+b", buffering=0) for name in ("ids", "keys", "out"))

    def close(self):
        for file in (self.ids, self.keys, self.out):
            file.close()


@pytest.fixture
def files(tmp_path):
    made = Files(tmp_path)
    yield made
    made.close()


def keys_of(values: np.ndarray, piece: int, bound: int = 2**32) -> Keys:
    def pieces(first):
        for start in range(first, len(values), piece):
            yield values[start : start + piece]

    return Keys(len(values), values.dtype.type, bound, pieces)


def oracle(values) -> tuple[list[int], list[int]]:
    """Ids and keys."""
    ids = {}
    return [ids.setdefault(value, len(ids)) for value in values.tolist()], list(ids)


def run(values, files, *, piece, memory, bound=2**32):
    for file in (files.ids, files.keys):
        file.seek(0)
        file.truncate()
    files.keys.write(b"before")
    count = number_ids(keys_of(values, piece, bound), memory, files.ids, files.keys, 6)
    files.ids.seek(0)
    files.keys.seek(6)
    return np.frombuffer(files.ids.read(), np.int32).tolist(), np.frombuffer(files.keys.read(), values.dtype).tolist(), count


WAYS = ("whole", "runs", "bitmap", "runs, then bitmap")


def number_by(way, values, files, *, piece, bound):
    """What run gives, where number_ids must take this way; which ways it may take is a matter of memory, and of far more keys than tests have."""
    runs_hold = {"whole": 0, "runs": 10**9, "bitmap": 0, "runs, then bitmap": len(values) // 2}[way]
    used = []

    class Watched(RankedBitmap):
        def __init__(self, bound):
            used.append(bound)
            super().__init__(bound)

    with pytest.MonkeyPatch.context() as patch:
        if way != "whole":
            patch.setattr(numbering, "whole_bytes", lambda total, key_bytes: 10**15)
        patch.setattr(Runs, "bytes_with", lambda self, more: 10**14 if len(self) + more > runs_hold else 0)
        patch.setattr(numbering, "RankedBitmap", Watched)
        found = run(values, files, piece=piece, memory=10**12, bound=bound)
    # keys that repeat may leave the runs half empty to the end
    assert used == ([bound] if way == "bitmap" else []) or (way == "runs, then bitmap" and used in ([], [bound]))
    return found


def ways_for(values) -> tuple[str, ...]:
    """64-bit keys have no bitmap; that of all 32-bit keys has a test of its own below."""
    return WAYS if values.dtype == np.uint32 and values.max() < BOUND else WAYS[:2]


INPUTS = {
    "one key": [5], "zero": [0], "the last key": [TOP], "all equal": [7] * 40, "all distinct": list(range(100, 140)), 
    "falling": list(range(60, 20, -1)),
    "0 and the last key": [0, TOP, 0, TOP, 1, TOP - 1] * 5, "neighbours in words": [63, 64, 255, 256, 257, 511, 512, 65535, 65536, 64, 63, 0] * 3,
    "new ones late": [1] * 30 + list(range(50)),
}  # fmt: skip


@pytest.mark.parametrize("kind", [np.uint32, np.uint64])
@pytest.mark.parametrize("case", INPUTS)
def test_every_way(files, case, kind):
    values = np.array(INPUTS[case], kind)
    if kind == np.uint64:
        values = values << np.uint64(32) | values
    ids, keys = oracle(values)
    for piece in (1, 7, 1000):
        for way in ways_for(values):
            assert number_by(way, values, files, piece=piece, bound=BOUND) == (ids, keys, len(keys)), (way, piece)


def test_the_top_of_the_real_bitmap():
    """All of 2^32 bits once: key 0, the last key, and the edges of words and blocks."""
    bitmap = RankedBitmap(2**32)
    keys = np.array([TOP, 0, 2**31, 255, 256, 2**31 - 1, TOP - 1, 64, 63], np.uint32)
    assert not bitmap.holds(keys).any()
    bitmap.mark(keys)
    assert bitmap.holds(keys).all() and not bitmap.holds(keys[[2]] + np.uint32(1)).any()
    bitmap.number(iter([keys[:4], keys[4:]]), len(keys))
    assert bitmap.ids(keys).tolist() == list(range(len(keys)))
    assert bitmap.find(np.array([1, TOP, 65, 63], np.uint32)).tolist() == [-1, 0, -1, 8]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 600), min_size=1, max_size=200), st.integers(1, 50), st.booleans())
def test_any_keys(tmp_path_factory, values, piece, wide):
    values = np.array(values, np.uint64 if wide else np.uint32)
    files = Files(tmp_path_factory.mktemp("any"))
    ids, keys = oracle(values)
    for way in ways_for(values):
        assert number_by(way, values, files, piece=piece, bound=1024) == (ids, keys, len(keys)), way
    files.close()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), max_size=30), max_size=12), st.lists(st.integers(0, 320), max_size=30))
def test_runs(pieces, asked):
    runs, known = Runs(np.uint64), {}
    for piece in pieces:
        new = [key for key in dict.fromkeys(piece) if key not in known]
        if new:
            ids = range(len(known), len(known) + len(new))
            runs.add(np.array(new, np.uint64), np.array(ids, np.int32))
            known |= dict(zip(new, ids, strict=True))
    assert runs.find(np.array(asked, np.uint64)).tolist() == [known.get(key, -1) for key in asked]
    sizes = [len(keys) for keys, _ in runs.runs]
    assert len(runs) == len(known) and all(a >= 2 * b for a, b in zip(sizes, sizes[1:], strict=False))


def test_too_little_memory(files):
    """The error says how much is enough, and so much is."""
    for kind in (np.uint32, np.uint64):
        values = np.arange(4000, dtype=kind)
        with pytest.raises(TooLittleMemory) as caught:
            run(values, files, piece=100, memory=1000)
        need = caught.value.args[0]
        assert need == enough_bytes(keys_of(values, 100)) and run(values, files, piece=100, memory=need)[2] == 4000
        with pytest.raises(TooLittleMemory):
            run(values, files, piece=100, memory=need - 1)


@pytest.mark.parametrize("memory", [10, 10**9])
def test_counts_in_ranges_of_ids(files, memory):
    ids = np.random.default_rng(0).integers(0, 200_000, 300_000).astype(np.int32)
    count_ids(lambda: iter(np.array_split(ids, 7)), 200_000, memory, files.out)
    files.out.seek(0)
    assert np.frombuffer(files.out.read(), np.int64).tolist() == np.bincount(ids, minlength=200_000).tolist()


@pytest.mark.parametrize("least", [1, 2, 3, 100])
def test_rare_ids_are_shared(files, least):
    values = np.random.default_rng(1).geometric(0.05, 3000).astype(np.uint32)
    count = run(values, files, piece=100, memory=10**9)[2]
    ids, keys = oracle(values)
    counts = np.bincount(ids)
    with open(files.keys.name, "rb") as whole, open(files.keys.name + ".alone", "w+b", buffering=0) as alone:
        alone.write(whole.read()[6:])
        with open(files.keys.name + ".counts", "w+b", buffering=0) as counts_file:
            counts_file.write(counts.astype(np.int64).tobytes())
            rows = share_rare(files.ids, 0, len(values), (alone, np.uint32), counts_file, count, least, 10**9, files.out)
    kept = [place for place in range(count) if counts[place] >= least]
    files.ids.seek(0)
    files.out.seek(0)
    assert rows == 1 + len(kept)
    assert np.frombuffer(files.ids.read(), np.int32).tolist() == [kept.index(old) + 1 if old in kept else 0 for old in ids]
    assert np.frombuffer(files.out.read(4 * rows), np.uint32).tolist() == [0, *(keys[place] for place in kept)]
    assert np.frombuffer(files.out.read(), np.int64).tolist() == [len(values) - sum(counts[kept]), *counts[kept]]


def test_the_memory_that_whole_columns_take_is_bounded():
    """As measured: 45, 173, 34 and 156 bytes a key beside the keys themselves."""
    for total, measured in ((262_143, 45), (262_145, 173), (4_194_303, 34), (4_200_000, 156)):
        assert whole_bytes(total, 4) >= (measured + 4) * total * 0.97
