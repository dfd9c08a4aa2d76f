"""Random batches against draws made one number at a time, against numbers recorded from upstream, and against torch's own workers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from data_loaders.random_data import RandomDataSpec, RandomSplit, WorkerRandomSplit, worker_seed
from data_loaders.trace import TraceDistribution, read_trace, trace_path, walk_stack
from dlrm_xla.batch import to_bags
from dlrm_xla.specs import UserError
from tests.oracles import random_data as oracle

TRACE = ([7, 90, 3, 15, 60, 22], [0, 1, 2, 4, 6], [0.4, 0.6, 0.75, 0.9, 1.0])
GAUSSIAN = {"distribution": "gaussian", "rand_max": 19.0, "rand_sigma": 5.0}


def write_trace(path, lines, distances, shares):
    path.write_text("\n".join(", ".join(map(str, numbers)) for numbers in (lines, distances, shares)) + "\n")
    return path


@pytest.fixture(scope="module")
def trace_file(tmp_path_factory):
    return str(write_trace(tmp_path_factory.mktemp("trace") / "distances.log", *TRACE))


def make_spec(trace_file, **fields):
    return RandomDataSpec(**({"table_rows": (50, 20, 100), "num_dense": 3, "batch_size": 8, "data_size": 19, "trace_file": trace_file} | fields))


def quiet(message):
    """Warnings about a trace's ids have a test of their own."""


def bags_of(batch, spec):
    offsets, indices = to_bags(batch, spec.hotness)
    return [[bag.tolist() for bag in torch.tensor_split(index, offset[1:])] for offset, index in zip(offsets, indices, strict=True)]


def assert_batch(batch, expected, spec):
    """The valid rows are the oracle's; the rest is padding."""
    n = len(expected.labels)
    assert batch.num_valid == n and batch.size == spec.batch_size
    assert batch.dense[:n].numpy().tolist() == expected.dense.tolist()
    assert batch.labels[:n, 0].tolist() == expected.labels.tolist()
    assert bags_of(batch, spec) == expected.bags
    assert batch.dense.dtype == batch.labels.dtype == torch.float32 and batch.ids.dtype == torch.int32
    assert batch.ids.shape == (spec.batch_size, sum(spec.hotness))
    assert not batch.dense[n:].any() and not batch.ids[n:].any() and not batch.labels[n:].any()
    if batch.weights is not None:
        assert batch.weights.dtype == torch.float32
        assert not batch.ids[batch.weights == 0].any() and not batch.weights[n:].any()
        for table in torch.split(batch.weights, spec.hotness, dim=1):
            assert torch.equal(table, table.sort(dim=1, descending=True).values), "a bag fills its first slots"


def state_of(rng):
    name, key, position, has_gauss, gauss = rng.get_state()
    return name, key.tolist(), position, has_gauss, gauss


CASES = {
    "uniform": {},
    "uniform_narrow": {"table_rows": (1, 2, 3, 1), "num_indices_per_lookup": 3},
    "uniform_one_row_tables": {"table_rows": (1, 1)},
    "uniform_wide": {"table_rows": (2**31 - 1, 40, 1), "num_indices_per_lookup": 40, "round_targets": True},
    "one_lookup": {"num_indices_per_lookup": 1, "num_batches": 2, "round_targets": True},
    "one_row": {"batch_size": 1, "data_size": 2, "num_dense": 1},
    "gaussian": GAUSSIAN,
    "gaussian_clipped": GAUSSIAN | {"rand_sigma": 30.0, "rand_mu": 0.0, "num_indices_per_lookup": 5},
    "gaussian_all_alike": GAUSSIAN | {"rand_sigma": 0.0, "rand_min": -0.5},
    "trace": {"distribution": "trace"},
    "trace_padding": {"distribution": "trace", "trace_padding": True, "num_indices_per_lookup": 25, "table_rows": (50, 30)},
}


@pytest.mark.parametrize("bags", ["varying", "fixed", "fixed_unique"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", [0, 123, 2**32 - 1])
def test_batches_and_states_are_those_of_single_draws(case, bags, seed, trace_file):
    spec = make_spec(trace_file, seed=seed, fixed=bags != "varying", keep_duplicates=bags == "fixed", **CASES[case])
    ours, theirs = np.random.RandomState(5), np.random.RandomState(6)
    split = RandomSplit(spec, ours, warn=quiet)
    for _ in range(2):  # the second epoch repeats the first
        num_batches = num_rows = 0
        for batch, expected in zip(split.batches(), oracle.epoch(spec, theirs, TRACE), strict=True):
            assert_batch(batch, expected, spec)
            assert state_of(ours) == state_of(theirs)
            num_batches, num_rows = num_batches + 1, num_rows + batch.num_valid
        assert (num_batches, num_rows) == (split.num_batches, split.num_rows)


@pytest.mark.parametrize("seed", range(12))
def test_any_spec(seed, tmp_path):
    """Sizes drawn at random; a trace file of its own."""
    pick = np.random.RandomState(seed)
    distances = [0, *sorted(pick.choice(np.arange(1, 31), size=pick.randint(1, 9), replace=False).tolist())]
    shares = np.cumsum(pick.random_sample(len(distances)))
    trace = (pick.randint(0, 400, size=30).tolist(), distances, (shares / shares[-1]).tolist())
    rows = tuple(int(pick.choice([2, 3, 9, 64, 1000, 10**8])) for _ in range(pick.randint(1, 6)))
    for distribution in ("uniform", "gaussian", "trace"):
        spec = RandomDataSpec(
            table_rows=rows,
            num_dense=int(pick.randint(1, 7)),
            batch_size=int(pick.choice([1, 5, 16])),
            data_size=int(pick.randint(1, 40)),
            num_indices_per_lookup=int(pick.choice([1, 2, 7, 30])),
            fixed=bool(pick.randint(2)),
            distribution=distribution,
            rand_sigma=float(pick.choice([1e-17, 1.0, 9.0])),
            trace_file=str(write_trace(tmp_path / "t.log", *trace)),
            trace_padding=bool(pick.randint(2)),
            seed=int(pick.randint(2**31)),
            keep_duplicates=bool(pick.randint(2)),
        )
        ours, theirs = np.random.RandomState(1), np.random.RandomState(1)
        for batch, expected in zip(RandomSplit(spec, ours, quiet).batches(), oracle.epoch(spec, theirs, trace), strict=True):
            assert_batch(batch, expected, spec)
            assert state_of(ours) == state_of(theirs)


# Second batch (3 rows) of 11 rows in batches of 8, tables of 50, 20 and 100 rows, up to or exactly 6 ids, seed 123: bags and last label.
UPSTREAM = {
    ("uniform", False): (
        [
            [[4, 5, 10, 21, 22, 27], [28, 45], [2, 36, 37]],
            [[3, 5, 15, 16], [2, 13], [8, 13, 17]],
            [[8, 33, 56, 58, 81], [8, 57, 74, 81, 85], [8, 13, 14, 40, 42]],
        ],
        0.2014,
    ),
    ("uniform", True): (
        [
            [[0, 10, 27, 29, 40, 46], [1, 2, 19, 31, 33, 35], [3, 6, 23, 27, 32, 36]],
            [[2, 11, 13, 15, 19], [1, 8, 10, 15], [3, 4, 6, 8, 9, 16]],
            [[9, 23, 46, 91, 98], [5, 9, 24, 31, 50], [4, 30, 53, 80, 89, 97]],
        ],
        0.484909,
    ),
    ("gaussian", False): (
        [
            [[5, 7, 17], [6, 10, 14], [8, 10, 10, 10, 11, 17]],
            [[0, 4, 8, 8, 17], [7, 8, 8, 9, 16], [2, 5, 9, 9, 11, 16]],
            [[4, 5, 9, 9], [4, 10, 14, 15], [9]],
        ],
        0.411569,
    ),
    ("gaussian", True): (
        [
            [[0, 2, 7, 9, 12, 16], [3, 5, 7, 7, 9, 13], [0, 7, 8, 8, 9, 9]],
            [[5, 8, 9, 9, 11, 11], [6, 6, 9, 12, 12, 15], [3, 7, 7, 9, 10, 18]],
            [[0, 2, 6, 8, 8, 9], [0, 2, 4, 5, 12, 13], [2, 3, 11, 11, 12, 14]],
        ],
        0.872879,
    ),
    ("trace", False): (
        [[[3, 7, 15, 10, 40], [7, 40], [7, 40]], [[3, 7, 10], [7, 10], [3, 7, 10]], [[3, 7, 90], [3, 7, 90], [3, 7, 15, 60, 90]]],
        0.2014,
    ),
    ("trace", True): (
        [
            [[3, 7, 40], [3, 7, 15, 40], [3, 7, 15, 40]],
            [[3, 7, 10], [3, 7, 15, 10], [3, 7, 15, 0, 10]],
            [[3, 7, 15, 90], [3, 7, 15, 22, 60, 90], [3, 7, 90]],
        ],
        0.484909,
    ),
}


@pytest.mark.parametrize(("distribution", "fixed"), UPSTREAM)
def test_recorded_from_upstream(distribution, fixed, trace_file):
    fields = GAUSSIAN | {"distribution": distribution, "fixed": fixed, "data_size": 11, "num_indices_per_lookup": 6, "keep_duplicates": False}
    spec = make_spec(trace_file, **fields)
    _, batch = RandomSplit(spec, np.random.RandomState(), warn=quiet).batches()
    bags, label = UPSTREAM[distribution, fixed]
    assert bags_of(batch, spec) == bags
    assert round(batch.labels[2].item(), 6) == label


@pytest.mark.parametrize("distribution", ["uniform", "gaussian"])
def test_start_skips_batches_but_not_their_draws(distribution, trace_file):
    spec = make_spec(trace_file, **(GAUSSIAN | {"distribution": distribution}))
    whole = list(RandomSplit(spec, np.random.RandomState(1)).batches())
    for start in range(len(whole) + 1):
        rest = list(RandomSplit(spec, np.random.RandomState(2)).batches(start))
        assert len(rest) == len(whole) - start
        for a, b in zip(rest, whole[start:], strict=True):
            assert torch.equal(a.dense, b.dense) and torch.equal(a.ids, b.ids) and torch.equal(a.labels, b.labels)


def test_splits_that_share_a_generator_move_each_other(trace_file):
    """A test pass in the middle of an epoch reseeds what the training batches after it are drawn from."""
    spec = make_spec(trace_file)
    ours, theirs = np.random.RandomState(0), np.random.RandomState(0)
    train, test = RandomSplit(spec, ours).batches(), RandomSplit(spec, ours).batches()
    expected_train, expected_test = oracle.epoch(spec, theirs), oracle.epoch(spec, theirs)
    for ours_next, theirs_next in [(train, expected_train), (train, expected_train), (test, expected_test), (train, expected_train)]:
        assert_batch(next(ours_next), next(theirs_next), spec)
        assert state_of(ours) == state_of(theirs), "a batch is drawn when it is asked for, and nothing after it"


@pytest.mark.parametrize(
    ("fields", "needs_weights"),
    [
        ({"fixed": True}, False),
        ({"fixed": True, "keep_duplicates": False}, True),
        ({"fixed": True, "keep_duplicates": False, "num_indices_per_lookup": 1}, False),
        ({"num_indices_per_lookup": 1}, False),
        ({"table_rows": (1, 1)}, False),
        ({"num_indices_per_lookup": 2, "table_rows": (10**9, 1)}, True),
    ],
)
def test_weights_depend_on_the_spec_alone(fields, needs_weights, trace_file):
    batches = list(RandomSplit(make_spec(trace_file, batch_size=1, data_size=20, **fields), np.random.RandomState()).batches())
    assert {batch.weights is not None for batch in batches} == {needs_weights}


class GlobalDraws(Dataset):
    """Batches from NumPy's global generator, as a worker of upstream's draws them."""

    def __init__(self, spec):
        self.spec, self.num_batches = spec, spec.num_batches

    def __len__(self):
        return self.num_batches

    def __getitem__(self, index):
        rng = np.random.mtrand._rand
        if index == 0:
            rng.seed(self.spec.seed)
        return oracle.draw(self.spec, rng, self.spec.batch_size)


def as_drawn(batch):
    return batch


@pytest.mark.filterwarnings("ignore:This DataLoader will create", "ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers(num_workers, trace_file):
    """Three iterators in a row from the same torch seed: torch's worker processes and ours give the same batches."""
    spec = make_spec(trace_file, num_batches=5, batch_size=4)
    torch.manual_seed(123)
    loader = DataLoader(GlobalDraws(spec), batch_size=None, num_workers=num_workers, collate_fn=as_drawn)
    expected = [list(loader) for _ in range(3)]
    torch_state = torch.random.get_rng_state()

    torch.manual_seed(123)
    split = WorkerRandomSplit(spec, num_workers)
    epochs = [list(split.batches()) for _ in range(3)]
    assert torch.equal(torch.random.get_rng_state(), torch_state)
    for ours, theirs in zip(epochs, expected, strict=True):
        for batch, other in zip(ours, theirs, strict=True):
            assert_batch(batch, other, spec)
    assert torch.equal(epochs[0][1].dense, epochs[1][1].dense) == (num_workers == 1), "other workers are seeded anew by every iterator"

    torch.manual_seed(123)
    for batch, other in zip(split.batches(start=2), epochs[0][2:], strict=True):
        assert torch.equal(batch.ids, other.ids)


def test_worker_seed_is_torchs():
    from torch.utils.data._utils.worker import _generate_state

    for base_seed in (0, 1, 2**32 - 1, 2**32, 2**63 - 1):
        for worker in (0, 1, 17):
            assert worker_seed(base_seed, worker).tolist() == list(_generate_state(base_seed, worker))


def test_stack_by_hand():
    trace = TraceDistribution(np.array([10, 11, 12]), np.array([0, 1, 2]), np.array([0.5, 0.75, 1.0]))
    # The list is oldest first. While fewer than 2 ids are seen, draws shrink so that only distances up to those seen come out:
    # 0.9 * 0.5 new 10; 0.9 * 0.75 distance 1, 10; 0.5 * 0.75 new 11: 12, 10, 11.
    # Then as drawn: 0.9 distance 2, 10: 12, 11, 10; 0.6 distance 1, 10; 0.2 new 12.
    # With padding moved into 0.5..1: 0.95 distance 2, 10: 12, 11, 10; 0.8 distance 2, 11: 12, 10, 11; 0.6 distance 1, 11.
    bag = np.array([[0.9, 0.9, 0.5, 0.9, 0.6, 0.2]])
    assert walk_stack(trace, bag, padding=False).tolist() == [[10, 10, 11, 10, 10, 12]]
    assert walk_stack(trace, bag, padding=True).tolist() == [[10, 10, 11, 10, 11, 11]]
    # A draw that equals a share belongs to it: 0.75 is distance 1; with padding 0 becomes 0.5, a new id.
    assert walk_stack(trace, np.array([[0.9, 0.9, 0.5, 0.75]]), padding=False).tolist() == [[10, 10, 11, 11]]
    assert walk_stack(trace, np.array([[0.9, 0.9, 0.5, 0.0]]), padding=True).tolist() == [[10, 10, 11, 12]]


def test_trace_path():
    assert str(trace_path("/jobs/j/dist_emb_j.log", 12)) == "/jobs/j/dist_emb_12.log"
    assert str(trace_path("/jobs/j/dist_emb_j.log", 12, replace_every_j=True)) == "/12obs/12/dist_emb_12.log"


def test_ids_beyond_the_table_are_wrapped_with_one_warning_per_table(trace_file):
    messages = []
    spec = make_spec(trace_file, distribution="trace", table_rows=(91, 90, 1), data_size=40)
    split = RandomSplit(spec, np.random.RandomState(), warn=messages.append)
    batches = list(split.batches())
    assert [message.split(":")[0] for message in messages] == ["table 1", "table 2"]
    assert "up to 90" in messages[0] and "90 rows" in messages[0] and trace_file in messages[0]
    for batch in batches:
        for bags, rows in zip(bags_of(batch, spec), spec.table_rows, strict=True):
            assert all(0 <= id < rows for bag in bags for id in bag)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1, 2\n0, 1\n", ["2 lines"]),
        ("1, x\n0, 1\n.5, 1\n", ["line 1", "'x'", "integer"]),
        ("1, -2\n0, 1\n.5, 1\n", ["line 1", "-2"]),
        ("\n0, 1\n.5, 1\n", ["line 1", "''"]),
        ("1, 2\n1, 2\n.5, 1\n", ["line 2", "must be 0"]),
        ("1, 2\n0, 2, 1\n.5, .6, 1\n", ["line 2", "2, 1", "rise"]),
        ("1, 2\n0, 3\n.5, 1\n", ["line 2", "3", "2 ids"]),
        ("1, 2\n0, 1\n.5, .6, 1\n", ["line 3", "3 cumulative", "2 stack"]),
        ("1, 2, 3\n0, 1, 2\n.5, .4, 1\n", ["line 3", "0.5, 0.4", "fall"]),
        ("1, 2\n0, 1\n.5, .9\n", ["line 3", "0.9", "end at 1"]),
        ("1, 2\n0, 1\nnan, 1\n", ["line 3", "'nan'", "finite"]),
    ],
)
def test_bad_trace_file(text, words, tmp_path):
    path = tmp_path / "broken.log"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_trace(path)
    assert_one_line(error, [str(path), *words])


def test_missing_trace_file(tmp_path):
    spec = make_spec(str(tmp_path / "none_j.log"), distribution="trace")
    with pytest.raises(UserError) as error:
        RandomSplit(spec, np.random.RandomState())
    assert_one_line(error, ["none_0.log", "No such file", "--data-trace-file"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_indices_per_lookup": 0}, ["--num-indices-per-lookup is 0"]),
        ({"batch_size": 0}, ["--mini-batch-size is 0"]),
        ({"data_size": 0}, ["--data-size is 0"]),
        ({"num_batches": -1}, ["--num-batches is -1"]),
        ({"distribution": "zipf"}, ["--rand-data-dist is zipf", "uniform or gaussian"]),
        ({"seed": -1}, ["--numpy-rand-seed is -1"]),
        ({"table_rows": (3, 0)}, ["--arch-embedding-size is 0"]),
        ({"table_rows": (3, 2**31)}, ["--arch-embedding-size is 2147483648"]),
        (GAUSSIAN | {"rand_min": 20.0}, ["--rand-data-min is 20", "--rand-data-max=19"]),
        (GAUSSIAN | {"rand_sigma": -1.0}, ["--rand-data-sigma is -1"]),
        (GAUSSIAN | {"rand_mu": float("nan")}, ["--rand-data-mu is nan"]),
    ],
)
def test_bad_spec(fields, words, trace_file):
    with pytest.raises(UserError) as error:
        make_spec(trace_file, **fields)
    assert_one_line(error, words)


@pytest.mark.parametrize("fixed", [False, True])
def test_gaussian_id_outside_its_table(fixed, trace_file):
    def first_batch(**fields):
        return next(RandomSplit(make_spec(trace_file, fixed=fixed, **(GAUSSIAN | fields)), np.random.RandomState()).batches())

    assert first_batch(table_rows=(50, 20))
    with pytest.raises(UserError) as error:
        first_batch(table_rows=(50, 20), rand_max=20.0, rand_sigma=90.0)
    assert_one_line(error, ["table 1", "id 20", "20 rows", "--rand-data-max=20"])
    with pytest.raises(UserError) as error:
        first_batch(rand_min=-3.0, rand_sigma=90.0)
    assert_one_line(error, ["table 0", "id -3", "--rand-data-min=-3"])


def test_size_of_an_epoch(trace_file):
    by_size = RandomSplit(make_spec(trace_file), np.random.RandomState())
    assert (by_size.num_rows, by_size.num_batches, by_size.batch_size) == (19, 3, 8)
    by_batches = RandomSplit(replace(by_size.spec, num_batches=2), np.random.RandomState())
    assert (by_batches.num_rows, by_batches.num_batches, by_batches.batch_size) == (16, 2, 8)


def assert_one_line(error, words):
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
