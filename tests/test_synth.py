"""The generated Criteo file: its format, its bytes by seed, its planted probability, and that it can be learned."""

import gzip
import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from data_loaders import synth, synth_profiles
from data_loaders.criteo import open_criteo
from data_loaders.criteo_npz import read_npz
from data_loaders.criteo_text import parse_block
from data_loaders.preprocess import preprocess
from data_loaders.split import split_days
from data_loaders.synth_profiles import PROFILES, ProfileGenerator, Zipf
from dlrm_xla.specs import UserError
from tests.oracles import criteo as oracle


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(path of 60,000 rows, facts)."""
    path = tmp_path_factory.mktemp("synth") / "train.txt"
    return path, synth.write_file(path, 60_000, 5, progress=False)


def test_bytes_depend_on_seed_and_rows_only(tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "_CHUNK_ROWS", 1000)
    for name, rows, seed in (("a", 2500, 1), ("b", 2500, 1), ("c", 2500, 2), ("d.gz", 2500, 1), ("e.gz", 2500, 1)):
        synth.write_file(tmp_path / name, rows, seed, progress=False)
    a, b, c, d, e = ((tmp_path / name).read_bytes() for name in ("a", "b", "c", "d.gz", "e.gz"))
    assert a == b != c and d == e and gzip.decompress(d) == a
    assert a.count(b"\n") == 2500
    blocks = [a.split(b"\n")[k : k + 1000] for k in (0, 1000)]
    assert blocks[0] != blocks[1], "chunks must not repeat"


def test_rows(written):
    """Every row is good, ids are eight digits, some cells are missing, some of the second counts are negative."""
    path, facts = written
    lines = path.read_bytes().split(b"\n")[:3000]
    rows = oracle.read_text(b"\n".join(lines))
    cells = [line.split(b"\t") for line in lines]
    assert {len(cell) for line in cells for cell in line[14:]} == {0, 8}
    missing = np.array([[cell == b"" for cell in line] for line in cells]).mean(0)
    assert not missing[0] and (missing[1:14] > 0.001).sum() > 8 and (missing[14:] > 0).any()
    assert min(counts[1] for _, counts, _ in rows) < 0
    assert abs(facts["click_rate"] - synth.CLICK_RATE) < 0.01


def test_auc():
    """Against scikit-learn, ties included."""
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, 500), rng.integers(0, 20, 500)
    assert synth.auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores), abs=1e-12)
    assert np.isnan(synth.auc(np.zeros(3, int), np.arange(3)))


def test_bayes_auc(written):
    """The figures are those of the true probability, which is calibrated, over all rows and over the test half."""
    path, facts = written
    assert json.loads((path.parent / "train.txt.bayes.json").read_text()) == facts
    generator = synth.Generator(5)
    logits = generator.rows(0)[2][:60_000]
    labels = np.array([int(line[:1]) for line in path.read_bytes().splitlines()])
    assert facts["bayes_auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-9)
    last_day = 60_000 // 7  # 8571: the test half is its first 4286 rows
    test = slice(60_000 - last_day, 60_000 - last_day + 4286)
    assert facts["bayes_auc_test"] == pytest.approx(roc_auc_score(labels[test], logits[test]), abs=1e-9)
    probability = 1 / (1 + np.exp(-logits))
    for low in np.arange(0, 1, 0.1):
        inside = (probability >= low) & (probability < low + 0.1)
        spread = np.sqrt((probability * (1 - probability))[inside].sum())
        assert abs(labels[inside].sum() - probability[inside].sum()) < 4 * spread


def test_logit_from_the_file_alone(written, tmp_path):
    """The logit of each row, recomputed from the text and the planted effects: nothing hidden enters it."""
    path, _ = written
    rows = oracle.read_text(b"\n".join(path.read_bytes().split(b"\n")[:400]))
    generator = synth.Generator(5)
    effects = []
    for column, spelling in enumerate(generator.spelling):
        names = [0 if name is None else int(name, 16) for name in spelling.to_pylist()]
        assert len(set(names)) == len(names)
        effects.append(dict(zip(names, generator.effects[column], strict=True)))
    expected = generator.rows(0)[2][:400]
    for (_, counts, hashes), logit in zip(rows, expected, strict=True):
        numbers = sum(
            effect * (np.log1p(max(count, 0)) - scale)
            for effect, count, scale in zip(generator.count_effect, counts, generator.count_scale, strict=True)
        )
        ids = sum(effects[column][h] for column, h in enumerate(hashes))
        assert logit == pytest.approx(generator.intercept + numbers + ids, abs=1e-9)


def test_learnable(written, tmp_path):
    """One-hot ids and log counts in a logistic regression reach 90 % of the way to the Bayes AUC with 51,000 train rows."""
    path, _ = written
    rng = np.random.RandomState(0)
    opened = {"data_set": "kaggle", "raw_data_file": str(path), "processed_data_file": str(tmp_path / "p.npz"), "data_randomize": "none"}
    flags = {"max_ind_range": -1, "sub_sample_rate": 0.0, "batch_size": 10**6, "test_batch_size": 10**6, "drop_last": False, "num_batches": 0}
    data = open_criteo(**opened, **flags, rng=rng, preprocess_rng=rng, progress=False, print_line=lambda line: None)
    (train,), (test,) = data.train.batches(), data.test.batches()
    encoder = OneHotEncoder(handle_unknown="ignore", dtype=np.float32, min_frequency=3).fit(train.ids.numpy())

    def features(batch):
        return hstack([encoder.transform(batch.ids.numpy()), csr_matrix(batch.dense.numpy())]).tocsr()

    model = LogisticRegression(C=0.1, solver="liblinear", tol=0.01).fit(features(train), train.labels[:, 0].numpy())
    reached = roc_auc_score(test.labels[:, 0].numpy(), model.decision_function(features(test)))
    assert 0.8 < data.bayes_auc < 0.9
    assert (reached - 0.5) / (data.bayes_auc - 0.5) > 0.9


def test_preprocesses(written, tmp_path):
    preprocess(written[0], tmp_path / "p.npz", max_ind_range=-1, sub_sample_rate=0.0, rng=None, progress=False)
    counts = read_npz(tmp_path / "p.npz").counts
    assert (counts <= np.array(synth.CARDINALITIES)).all() and counts.sum() > 0.8 * sum(synth.CARDINALITIES)


def test_command(tmp_path, capsys):
    out = tmp_path / "x.txt"
    assert synth.main([f"--out={out}", "--rows=100", "--seed=3"]) == 0
    assert f"{out}: 100 rows" in capsys.readouterr().out
    for flags, words in (
        ([f"--out={out}", "--rows=3"], "--rows=3 is too few"),
        ([f"--out={out}", "--seed=-1"], "--seed=-1 is negative"),
        ([f"--out={tmp_path / 'absent' / 'x'}", "--rows=100"], "name another place with --out=PATH"),
    ):
        assert synth.main(flags) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.txt", "x.txt.bayes.json"]


def test_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def fail(self, chunk, logits):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth.Generator, "labels", fail)
    for name in ("x.txt", "x.txt.gz"):
        with pytest.raises(UserError, match="No space left on device; name another place with --out=PATH"):
            synth.write_file(tmp_path / name, 100, 0, progress=False)
    assert list(tmp_path.iterdir()) == []


# ---- profiles ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 1,000 rows, so that small files have many of them."""
    monkeypatch.setattr(synth_profiles, "CHUNK_ROWS", 1000)
    monkeypatch.setattr(ProfileGenerator, "chunk_rows", 1000)


def write(name, out, rows=2500, seed=1, threads=1, **more):
    return synth.write_profile(PROFILES[name], out, rows, seed, progress=False, threads=threads, **more)


def test_small_is_as_ever(tmp_path):
    """The default profile's bytes: README's figures are of them."""
    assert synth.main([f"--out={tmp_path / 'a'}", "--rows=3000", "--seed=7"]) == 0
    assert synth.main([f"--out={tmp_path / 'b'}", "--rows=3000", "--seed=7", "--profile=small", "--threads=3"]) == 0
    digests = {hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab"}
    assert digests == {"e666f36b2bdb6ebb4f65bde95907b099619698115b70dfaa5b1fcc5ec6655be6"}


@pytest.mark.parametrize("n, exponent", [(1, 1.1), (2, 1.1), (3, 0.5), (10, 1.02), (50, 2.5), (1000, 1.02), (1000, 0.0)])
def test_zipf_against_exact_probabilities(n, exponent):
    draws = np.empty(400_000, dtype=np.int64)
    Zipf(n, exponent).draw(np.random.default_rng(0), draws)
    exact = (np.arange(n) + 1.0) ** -exponent
    exact /= exact.sum()
    seen = np.bincount(draws, minlength=n)
    assert len(seen) == n
    expected = exact * len(draws)
    chi2 = ((seen - expected) ** 2 / expected)[expected > 5].sum()
    assert chi2 < (expected > 5).sum() + 5 * np.sqrt(2 * n) + 1


def test_zipf_of_the_largest_table():
    """Bins of ranks of a table with 2**32 - 1 ids against the sum over its ranks (Euler-Maclaurin in the tail)."""
    n, exponent = synth_profiles.MAX_CARDINALITY, 1.02
    draws = np.empty(300_000, dtype=np.int64)
    Zipf(n, exponent).draw(np.random.default_rng(1), draws)
    assert draws.min() == 0 and 2**31 < draws.max() < n
    edges = np.array([1, 2, 3, 10, 1000, 10**6, 10**8, n + 1], dtype=np.float64)  # rank + 1

    def mass(a, b):
        head = np.arange(a, min(b, 10**5 + 1)) ** -exponent
        low = max(a, 10**5 + 1)
        tail = ((b - 0.5) ** (1 - exponent) - (low - 0.5) ** (1 - exponent)) / (1 - exponent) if b > low else 0.0
        return head.sum() + tail

    exact = np.array([mass(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)])
    exact /= exact.sum()
    seen = np.histogram(draws + 1, edges)[0] / len(draws)
    assert (abs(seen - exact) < 5 * np.sqrt(exact / len(draws))).all()


def test_hashes_are_distinct_and_never_zero():
    """Of the first, the last and some ranks between, in every column; another map in each column."""
    some = np.random.default_rng(0).integers(0, synth_profiles.MAX_CARDINALITY, 10_000)
    ranks = np.unique(np.concatenate([np.arange(20_000), synth_profiles.MAX_CARDINALITY - 1 - np.arange(20_000), some]))
    columns = [synth_profiles.hashes(column, ranks) for column in range(26)]
    for found in columns:
        assert found.dtype == np.uint32 and len(np.unique(found)) == len(ranks) and found.min() > 0
    assert not any((columns[0] == other).any() for other in columns[1:2])
    assert synth_profiles.hex_digits(np.array([0, 0xDEADBEEF, 2**32 - 1], dtype=np.uint32)).tobytes() == b"00000000deadbeefffffffff"


def test_effects_are_normal_and_shrink():
    ranks = np.arange(200_000)
    flat = synth_profiles.effects(3, 5, ranks, 0) / synth_profiles.ID_EFFECT
    assert abs(flat.mean()) < 0.01 and abs(flat.std() - 1) < 0.01 and 0.67 < (abs(flat) < 1).mean() < 0.70
    assert np.array_equal(synth_profiles.effects(3, 5, ranks, 20), flat * synth_profiles.ID_EFFECT / (1 + ranks / 20))
    for other in (synth_profiles.effects(4, 5, ranks, 0), synth_profiles.effects(3, 6, ranks, 0)):
        assert abs(np.corrcoef(flat, other)[0, 1]) < 0.01


@pytest.mark.parametrize("name", PROFILES)
def test_profile_bytes_depend_on_seed_and_rows_only(name, tmp_path, short_chunks):
    found = []
    for k, (seed, threads, zipped) in enumerate([(1, 1, False), (1, 3, False), (2, 2, False), (1, 2, True)]):
        folder = tmp_path / str(k)
        folder.mkdir()
        days = PROFILES[name].day_files
        facts = write(name, folder / ("day" if days else "x.gz" if zipped else "x"), seed=seed, threads=threads, zipped=zipped and days)
        texts = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".json"}
        assert facts["raw_bytes"] == sum(map(len, texts.values())) and facts["profile"] == name
        found.append({key.removesuffix(".gz"): gzip.decompress(text) if zipped else text for key, text in texts.items()})
    assert found[0] == found[1] == found[3] != found[2]
    assert sum(text.count(b"\n") for text in found[0].values()) == 2500


def test_terabyte_days(tmp_path, short_chunks):
    """24 files that share the rows, each readable, gzip or not; the sidecar is of all of them, and its test half is of the last one."""
    facts = write("criteo-terabyte", tmp_path / "day", rows=5000, zipped=True)
    files = [tmp_path / f"day_{d}.gz" for d in range(24)]
    labels = [parse_block(gzip.decompress(file.read_bytes()), 1, file).labels for file in files]
    assert [len(day) for day in labels] == split_days(5000, 24).tolist()
    assert json.loads((tmp_path / "day.bayes.json").read_text()) == facts and facts["raw_bytes"] == sum(
        (tmp_path / f"day_{d}.gz").stat().st_size for d in range(24)
    )
    generator = ProfileGenerator(PROFILES["criteo-terabyte"], 1)
    logits = np.concatenate([generator.rows(chunk)[2] for chunk in range(5)])
    labels = np.concatenate(labels)
    assert facts["bayes_auc"] == pytest.approx(roc_auc_score(labels, logits), abs=1e-12)
    last = 5000 // 24
    test = slice(5000 - last, 5000 - last // 2)
    assert facts["bayes_auc_test"] == pytest.approx(roc_auc_score(labels[test], logits[test]), abs=1e-12)
    with pytest.raises(UserError, match="day_0.gz exists, and day 0 would be there twice"):
        write("criteo-terabyte", tmp_path / "day")


@pytest.mark.parametrize("name", PROFILES)
def test_profile_logits_from_the_text_alone(name, tmp_path):
    """Each row's logit from its cells, where a cell's effect is found by its hash; the click rate and the calibration are as stated."""
    chosen = PROFILES[name]
    out = tmp_path / "x"
    synth.write_profile(replace(chosen, day_files=False), out, 30_000, 4, progress=False, threads=2)
    rows = oracle.read_text(b"\n".join(out.read_bytes().split(b"\n")[:200]))
    generator = ProfileGenerator(chosen, 4)
    ranks, _, logits = generator.rows(0)
    labels = generator.labels(0, logits)
    known = [dict() for _ in range(26)]
    for column in range(26):
        cells = synth_profiles.hashes(column, ranks[column])
        if chosen.cardinalities[column] > 100:
            cells = np.where(ranks[column] == synth_profiles.MISSING_ID, 0, cells)
        values = synth_profiles.effects(4, column, ranks[column], chosen.half_rank)
        known[column] = dict(zip(cells.tolist(), values, strict=True))
        assert len(known[column]) == len(np.unique(ranks[column])) and ranks[column].max() < chosen.cardinalities[column]
    for k, (label, counts, cells) in enumerate(rows):
        numbers = (np.log1p(np.maximum(counts, 0)) - generator.count_scale) @ generator.count_effect
        ids = sum(known[column][cell] for column, cell in enumerate(cells))
        assert logits[k] == pytest.approx(generator.intercept + numbers + ids, abs=1e-9) and label == labels[k]
    probability = 1 / (1 + np.exp(-logits))
    assert abs(probability.mean() - chosen.click_rate) < 0.01
    for low in np.arange(0, 1, 0.2):
        inside = (probability >= low) & (probability < low + 0.2)
        spread = np.sqrt((probability * (1 - probability))[inside].sum())
        assert abs(labels[inside].sum() - probability[inside].sum()) < 4 * spread + 1


def test_profiles_have_the_published_sizes():
    """Sums that papers and MLPerf state: 33.8 M and 882.8 M ids."""
    assert [sum(PROFILES[name].cardinalities) for name in ("criteo-kaggle", "criteo-terabyte")] == [33_762_577, 882_774_559]
    assert all(len(chosen.cardinalities) == 26 for chosen in PROFILES.values())


def test_auc_in_bounded_memory(monkeypatch):
    """Beyond EXACT_ROWS the AUC is that of rounded logits, within the error that it states."""
    rng = np.random.default_rng(0)
    logits = rng.normal(-1, 1.5, 40_000)
    labels = (rng.random(40_000) < 1 / (1 + np.exp(-logits))).astype(np.int32)
    exact = roc_auc_score(labels, logits)
    for limit, bins in ((50_000, 1 << 20), (10_000, 1 << 20), (1, 1 << 10)):
        monkeypatch.setattr(synth.AucMeter, "EXACT_ROWS", limit)
        monkeypatch.setattr(synth.AucMeter, "BINS", bins)
        meter = synth.AucMeter()
        for first in range(0, 40_000, 7000):
            meter.add(labels[first : first + 7000], logits[first : first + 7000])
        found, error = meter.auc()
        assert abs(found - exact) <= error + 1e-12 and error < 0.01 and (error == 0) == (limit == 50_000)
        assert len(meter._kept) < 10 if limit == 50_000 else not meter._kept
    empty = synth.AucMeter()
    empty.add(np.zeros(3, np.int32), np.zeros(3))
    assert np.isnan(empty.auc()[0])


def test_profile_command(tmp_path, capsys):
    out = tmp_path / "day"
    assert synth.main([f"--out={out}", "--rows=100", "--profile=criteo-terabyte", "--gzip"]) == 0
    assert f"{out}: 100 rows" in capsys.readouterr().out and len(list(tmp_path.iterdir())) == 25
    assert synth.main([f"--out={tmp_path / 'u'}", "--rows=100", "--profile=uniform", "--cardinality=5"]) == 0
    capsys.readouterr()
    for flags, words in (
        (["--profile=criteo-terabyte", "--rows=47"], "--rows=47 is too few: it needs at least 48"),
        (["--profile=criteo-kaggle", "--cardinality=3"], "--cardinality=3: is for --profile=uniform"),
        (["--cardinality=3"], "--cardinality=3: is for --profile=uniform"),
        (["--profile=uniform", "--cardinality=0"], "--cardinality=0: must be from 1 to 4294967295"),
        (["--profile=criteo-kaggle", "--gzip"], "--gzip: is for the day files"),
        (["--profile=criteo-terabyte", f"--out={tmp_path / 'x.gz'}"], "it is a prefix, as DIR/day"),
        (["--profile=criteo-terabyte", f"--out={tmp_path / 'absent' / 'day'}", "--rows=100"], "name another place with --out=PATH"),
        (["--threads=0"], "--threads=0 must be from 1 to 256"),
    ):
        assert synth.main([f"--out={tmp_path / 'no'}", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1
