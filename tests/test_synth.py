"""The generated Criteo file: its format, its bytes by seed, its planted probability, and that it can be learned."""

import gzip
import json

import numpy as np
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import OneHotEncoder

from data_loaders import synth
from data_loaders.criteo import open_criteo
from data_loaders.criteo_npz import read_npz
from data_loaders.preprocess import preprocess
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
