"""Reading ahead: threads make the next batches while the step runs."""

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from dlrm_xla.batch import Batch

_END = object()


class Jobs:
    """An iterator of batches that can be made in any order: make(number) for each of the numbers. By itself it makes them one by one, in the
    caller's thread; read_ahead can give them to several threads. make must be safe to call from several threads at once."""

    def __init__(self, make: Callable[[int], Batch], numbers: Iterable[int]):
        self.make, self.numbers = make, iter(numbers)

    def __iter__(self) -> "Jobs":
        return self

    def __next__(self) -> Batch:
        return self.make(next(self.numbers))

    def then(self, change: Callable[[Batch], Batch]) -> "Jobs":
        """The same batches, each changed."""
        return Jobs(lambda number: change(self.make(number)), self.numbers)


def read_ahead(batches: Iterator[Batch], depth: int, threads: int = 1) -> Iterator[Batch]:
    """The same batches in the same order, up to `depth` of them made before they are asked for. depth 0: none, in the caller's own thread.

    threads  make them at the same time, where `batches` is Jobs; any other iterator goes to one thread
    An error in a thread is raised where its batch would have come. Closing the iterator ends the threads.
    """
    if depth == 0:
        yield from batches
    elif isinstance(batches, Jobs):
        yield from _by_jobs(batches, depth, min(threads, depth))
    else:
        yield from _by_one_thread(batches, depth)


def _by_jobs(jobs: Jobs, depth: int, threads: int) -> Iterator[Batch]:
    pool = ThreadPoolExecutor(max(1, threads), thread_name_prefix="read-ahead")
    ahead = deque()
    try:
        for number in jobs.numbers:
            ahead.append(pool.submit(jobs.make, number))
            if len(ahead) > depth:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _by_one_thread(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    closed = threading.Event()

    def put(item) -> bool:
        while not closed.is_set():
            try:
                waiting.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((_END, None))
        except BaseException as error:  # handed to the consumer, which raises it
            put((_END, error))

    thread = threading.Thread(target=work, name="read-ahead", daemon=True)
    thread.start()
    try:
        while True:
            batch, error = waiting.get()
            if error is not None:
                raise error
            if batch is _END:
                return
            yield batch
    finally:
        closed.set()
        thread.join()
