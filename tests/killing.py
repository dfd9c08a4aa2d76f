"""A process that dies by kill -9 at one of its own steps. Nothing else is imported: whoever forks wants no threads."""

import os
import signal
from collections.abc import Callable


class Steps:
    """Dies before step number `step`, counted from 0, of those that `at` and `half` count."""

    def __init__(self, step: int):
        self.left = step

    def due(self) -> bool:
        self.left -= 1
        return self.left < 0

    def at(self, names: tuple[str, ...]) -> None:
        """Each call of these functions of `os` is a step."""
        for name in names:
            setattr(os, name, self._before(getattr(os, name)))

    def half(self, whole: Callable, write_half: Callable) -> Callable:
        """Each call of whole(...) is a step, of which write_half(...) is done when it is the last."""

        def stepped(*args):
            if self.due():
                write_half(*args)
                die()
            return whole(*args)

        return stepped

    def _before(self, call: Callable) -> Callable:
        def stepped(*args, **kwargs):
            if self.due():
                die()
            return call(*args, **kwargs)

        return stepped


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
