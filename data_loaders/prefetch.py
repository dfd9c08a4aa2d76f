"""Reading ahead: a thread makes the next batches while the step runs."""

import queue
import threading
from collections.abc import Iterator

from dlrm_xla.batch import Batch

_END = object()


def read_ahead(batches: Iterator[Batch], depth: int) -> Iterator[Batch]:
    """The same batches, up to `depth` of them made before they are asked for. depth 0: none, in the caller's own thread.

    An error in the thread is raised where the batch would have come. Closing the iterator ends the thread.
    """
    if depth == 0:
        yield from batches
        return
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
