"""Several ranks in one process, a thread each, for tests of what they compute together: no process is started and nothing travels."""

import threading
from collections.abc import Callable

import torch
from torch import Tensor

from dlrm_xla.backends.collectives import Together
from dlrm_xla.backends.eager import EagerBackend


class _Meeting:
    """Where threads lay down a tensor each and take what the others laid down."""

    def __init__(self, world: int):
        self.world, self.barrier, self.given = world, threading.Barrier(world, timeout=60), [None] * world

    def swap(self, rank: int, values: Tensor) -> list[Tensor]:
        self.given[rank] = values
        self.barrier.wait()
        taken = [given.clone() for given in self.given]
        self.barrier.wait()
        return taken


class InThreads(Together):
    """calls: the name and the bytes of every collective."""

    def __init__(self, rank: int, meeting: _Meeting):
        self.rank, self.world, self.meeting = rank, meeting.world, meeting
        self.calls: list[tuple[str, int]] = []

    def _swap(self, name: str, values: Tensor) -> list[Tensor]:
        self.calls.append((name, values.nelement() * values.element_size()))
        return self.meeting.swap(self.rank, values.detach())

    def all_to_all(self, values: Tensor) -> Tensor:
        assert values.shape[0] == self.world
        return torch.stack([given[self.rank] for given in self._swap("all-to-all", values)])

    def all_gather(self, values: Tensor) -> Tensor:
        return torch.cat(self._swap("all-gather", values))

    def all_reduce(self, values: Tensor) -> Tensor:
        return torch.stack(self._swap("all-reduce", values)).sum(0)


def run_ranks(world: int, work: Callable[[EagerBackend], object], layout=None) -> list:
    """work(backend) in `world` threads, each with its own backend; their results, rank after rank. The first error is raised.

    layout: instead of the backend's
    """
    meeting, results, errors = _Meeting(world), [None] * world, []

    def rank_work(rank: int) -> None:
        backend = EagerBackend("cpu", InThreads(rank, meeting))
        if layout is not None:
            backend.layout = lambda name: layout
        try:
            results[rank] = work(backend)
        except BaseException as error:
            if not isinstance(error, threading.BrokenBarrierError):
                errors.append(error)
            meeting.barrier.abort()

    threads = [threading.Thread(target=rank_work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
