"""Reading ahead: the same batches in the same order, errors in their place, no thread left behind. No test measures time."""

import threading

import pytest
import torch

from data_loaders.prefetch import Jobs, read_ahead
from dlrm_xla.batch import Batch


def batch_of(number: int) -> Batch:
    return Batch(torch.full((2, 1), float(number)), torch.full((2, 3), number, dtype=torch.int32), None, torch.zeros(2, 1), 2)


def numbers_of(batches) -> list[int]:
    return [int(batch.ids[0, 0]) for batch in batches]


def reading_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("read-ahead")]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert not reading_threads()
    yield
    assert not reading_threads()


def as_iterator(make, numbers):
    return (make(number) for number in numbers)


KINDS = {"iterator": as_iterator, "jobs": Jobs}
WAYS = [(0, 1), (1, 1), (2, 1), (4, 2), (8, 4), (3, 9)]  # depth, threads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth, threads", WAYS)
@pytest.mark.parametrize("length", [0, 1, 30])
def test_same_batches_in_order(kind, depth, threads, length):
    assert numbers_of(read_ahead(KINDS[kind](batch_of, range(length)), depth, threads)) == list(range(length))


def test_order_does_not_depend_on_who_is_first():
    """Even batches are finished only when the odd one after them is."""
    finished = [threading.Event() for _ in range(20)]

    def make(number):
        if number % 2 == 0:
            assert finished[number + 1].wait(30)
        finished[number].set()
        return batch_of(number)

    assert numbers_of(read_ahead(Jobs(make, range(20)), 4, 2)) == list(range(20))


def test_threads_work_at_the_same_time():
    together = threading.Barrier(3, timeout=30)

    def make(number):
        together.wait()
        return batch_of(number)

    assert numbers_of(read_ahead(Jobs(make, range(9)), 6, 3)) == list(range(9))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth, threads", WAYS)
def test_error_comes_where_its_batch_would_have(kind, depth, threads):
    def make(number):
        if number == 7:
            raise ValueError("bad row")
        return batch_of(number)

    batches, seen = read_ahead(KINDS[kind](make, range(20)), depth, threads), []
    with pytest.raises(ValueError, match="bad row"):
        for batch in batches:
            seen.extend(numbers_of([batch]))
    assert seen == list(range(7))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth, threads", [way for way in WAYS if way[0]])
def test_how_far_ahead(kind, depth, threads):
    """Never more than `depth` batches ahead of the one in the caller's hand and the ones that are being made; closing ends it at once."""
    lock, made = threading.Lock(), []

    def make(number):
        with lock:
            made.append(number)
        return batch_of(number)

    batches = read_ahead(KINDS[kind](make, range(1000)), depth, threads)
    for taken in range(1, 20):
        next(batches)
        with lock:
            assert len(made) <= taken + depth + 1
    batches.close()
    assert not reading_threads() and len(made) <= 19 + depth + 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_starts_before_the_first_batch_is_asked_for(kind):
    batches = read_ahead(KINDS[kind](batch_of, range(5)), 2, 2)
    assert not reading_threads()
    batches.close()


def test_changed_jobs():
    jobs = Jobs(batch_of, iter([3, 1, 2])).then(lambda batch: batch_of(10 * int(batch.ids[0, 0])))
    assert numbers_of(read_ahead(jobs, 4, 2)) == [30, 10, 20]
    assert next(Jobs(batch_of, range(3))).ids[0, 0] == 0


def test_jobs_through_the_multi_hot_split(tmp_path):
    from data_loaders.multi_hot import MultiHotSplit, MultiHotTables

    class Inner:
        num_rows, num_batches, batch_size = 20, 10, 2

        def batches(self, start=0, epoch=0):
            return Jobs(batch_of, range(start, 10))

    tables = MultiHotTables.make((2, 1, 3), (50, 50, 50), "uniform", tmp_path, 1 << 20, False)
    split = MultiHotSplit(Inner(), tables)
    alone = list(split.batches(2))
    together = list(read_ahead(split.batches(2), 4, 2))
    assert len(alone) == 8 and all(torch.equal(a.ids, b.ids) for a, b in zip(alone, together, strict=True))
