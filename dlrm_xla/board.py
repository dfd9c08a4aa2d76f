"""What ranks tell each other outside of a step: facts that must be equal, and why one ended, so that one line says it and none is left waiting.

A board is a key-value store that all ranks reach (torch's TCPStore; torchrun serves it, else rank 0). Each rank counts up a number on it; a thread
reads those of all. A rank that fails leaves its reason. The others find it there, or find a number that stands still.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from dlrm_xla.specs import UserError, one_line

BEAT = 0.5  # seconds between two beats of a rank
SILENT = 20.0  # seconds without a beat after which a rank that nobody heard ending counts as lost: stopped, or its host is gone
DEAD = 4.0  # the same, once something has failed: a rank that is only a witness leaves its reason within this time
GRACE = 2.0  # for the training thread to end by itself, before the watching thread ends the process
LINGER = 6.0  # the host of the store stays this long at most for those who still read it

CAUSES = ("error", "crash", "interrupted")  # reasons that explain themselves; ranks with others are witnesses
LOST, TERMINATED, INTERRUPTED, WRONG = 3, 143, 130, 2  # exit codes


@dataclass(frozen=True)
class Reason:
    """Why a rank ended. text: one line.

    kind  one of CAUSES; "broken": a collective failed; "lost": the board tells of another rank; "terminated": SIGTERM; "done": nothing failed
    """

    kind: str
    text: str = ""


class RankFailed(Exception):
    """Another rank has ended, or says nothing; the board knows more."""


class Board:
    """
    store   reached already; what lies under `beat/`, `reason/`, `fact/` and `told` in it is the board's
    host    the rank that serves the store: when it ends, the others lose it; None: the launcher does
    """

    def __init__(self, store, rank: int, world: int, host: int | None):
        self.store, self._mine = store, store.clone()  # a connection for each thread: a store waits for one answer at a time
        self.rank, self.world = rank, world
        self._host, self._hosts = host, host == rank
        self._facts = 0
        self._lock, self._beating = threading.Lock(), threading.Lock()
        self._beats = [""] * world
        self._still = [0] * world  # own beats since a rank's last one: while this process is stopped itself, none is counted
        self._reasons: list[Reason | None] = [None] * world
        self._store_lost = False
        self._signalled = self._ending = self._left = False
        self.advice = ""  # how to go on after a rank was lost
        self._main = threading.get_ident() if threading.current_thread() is threading.main_thread() else None
        if self._main is not None:
            signal.signal(signal.SIGTERM, self._on_signal)
        self._set(f"reason/{rank}", "")
        self._set(f"beat/{rank}", "0")
        self._unanswered = 0  # looks of the guard since the store's last answer

    def start(self) -> None:
        """From now on a failure elsewhere interrupts this process: by an exception, so whoever handles it must know the board by then."""
        for work in (self._watch, self._guard):
            threading.Thread(target=work, daemon=True).start()

    # before anything fails

    def facts(self, mine: dict) -> list[dict]:
        """What each rank says at this point of the run, rank after rank. All ranks call it at the same points. RankFailed if one has ended."""
        self._facts += 1
        keys = [f"fact/{self._facts}/{rank}" for rank in range(self.world)]
        self.store.set(keys[self.rank], json.dumps(mine, default=str))
        pause = 0.001
        while not self.store.check(keys):
            if self.trouble():
                raise RankFailed
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        return [json.loads(text) for text in self.store.multi_get(keys)]

    def trouble(self) -> bool:
        """Whether another rank failed or fell silent, or the store is gone."""
        with self._lock:
            failed = any(reason is not None and reason.kind != "done" for reason in self._reasons)
            return failed or self._store_lost or bool(self._silent(SILENT))

    # the end

    def close(self) -> None:
        """The end of a run in which nothing failed; where this process serves the store it waits for the others."""
        self._ending = True
        self._set(f"reason/{self.rank}", json.dumps(["done", ""]))
        self.leave(SILENT, math.inf)

    def end(self, reason: Reason) -> tuple[int, str]:
        """After this rank has failed: its exit code, and the line that it has to print or "". Call leave() after printing."""
        self._ending = True
        if self._main == threading.get_ident():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C
        with self._lock:
            self._reasons[self.rank] = reason
        self._set(f"reason/{self.rank}", json.dumps([reason.kind, reason.text]))
        code, text = self._verdict(reason)
        return code, text if self._tells(reason.kind in CAUSES) else ""

    def leave(self, silent: float = DEAD, longest: float = LINGER) -> None:
        """The last call. The host of the store stays until the others have left or are silent, for `longest` seconds at most."""
        with self._beating:  # the last beat
            self._left = True
            if not self._store_lost:
                self._mine.set(f"beat/{self.rank}", "bye")
        until = time.monotonic() + longest
        while self._hosts and time.monotonic() < until and not self._store_lost:
            with self._lock:
                if all(r == self.rank or self._beats[r] == "bye" or self._still[r] * BEAT > silent for r in range(self.world)):
                    return
            time.sleep(BEAT / 10)

    def _verdict(self, own: Reason) -> tuple[int, str]:
        """Exit code and line, the same on all ranks. Waits until each rank has given its reason or is silent."""
        until = time.monotonic() + DEAD + GRACE
        while True:
            with self._lock:
                reasons, silent, store_lost = list(self._reasons), self._silent(DEAD), self._store_lost
                stopped = self._silent(SILENT)
            causes = [rank for rank, reason in enumerate(reasons) if reason is not None and reason.kind in CAUSES]
            if causes:
                rank = self.rank if own.kind in CAUSES else causes[0]
                return _blame(rank, reasons[rank])
            if store_lost and not self._hosts and (self._host is None or reasons[self._host] is None):
                lost = "the launcher is gone" if self._host is None else f"rank {self._host} has died or does not answer"
                return LOST, f"error: {lost}, and with it the store where ranks meet{self.advice}"
            dead = [rank for rank in silent if reasons[rank] is None]
            waiting = [rank for rank in range(self.world) if reasons[rank] is None and rank not in silent]
            if not waiting or store_lost or time.monotonic() > until:
                break
            time.sleep(BEAT / 10)
        if dead:
            names = f"rank {dead[0]} has" if len(dead) == 1 else f"ranks {', '.join(map(str, dead))} have"
            if own.kind != "broken" and set(dead) <= set(stopped):
                return LOST, f"error: {names} said nothing for {SILENT:.0f} s (stopped or killed, or the host is gone){self.advice}"
            return LOST, f"error: {names} died (killed, or out of memory, or the host is gone){self.advice}"
        ended = [rank for rank, reason in enumerate(reasons) if reason is not None and reason.kind == "terminated"]
        if own.kind == "terminated":
            return TERMINATED, f"terminated{self.advice}"
        if ended:
            return LOST, f"error: rank {ended[0]} was terminated{self.advice}"
        said = next((reason.text for reason in (own, *reasons) if reason is not None and reason.text), "no rank says why")
        return LOST, f"error: the connection between ranks broke ({said}){self.advice}"

    def _tells(self, at_once: bool) -> bool:
        """Whether this rank prints the line: the lowest one alive. Exactly one where the store is still there. at_once: others may wait for this
        one inside a collective, so it does not stay to see what they print.
        """
        until = time.monotonic() + DEAD + GRACE
        while time.monotonic() < until:
            with self._lock:
                lower = [r for r in range(self.rank) if self._beats[r] != "bye" and self._still[r] * BEAT <= DEAD]
                if self._store_lost:
                    alive = [r for r in range(self.world) if r != self._host and self._still[r] * BEAT <= DEAD]
                    return self.rank == min(alive, default=self.rank)
            try:
                if self.store.check(["told"]):
                    return False
                if not lower:
                    break
                if at_once:
                    return False
            except RuntimeError:
                self._store_lost = True
                continue
            time.sleep(BEAT / 10)
        try:
            return self.store.add("told", 1) == 1
        except RuntimeError:
            return self.rank == 0

    # two threads: one beats and reads, and may wait for the store; the other draws the conclusions

    def _watch(self) -> None:
        keys = [f"{what}/{rank}" for what in ("beat", "reason") for rank in range(self.world)]
        number, everyone = 0, False
        while not self._store_lost and not (self._left and not self._hosts):
            number += 1
            try:
                with self._beating:
                    if not self._left:
                        self._mine.set(f"beat/{self.rank}", str(number))
                everyone = everyone or self._mine.check(keys)
                if everyone:
                    self._read([text.decode() for text in self._mine.multi_get(keys)])
                self._unanswered = 0
            except RuntimeError:
                self._store_lost = True
            time.sleep(BEAT)

    def _guard(self) -> None:
        troubled = 0
        while not self._ending:
            self._unanswered += 1  # counted, not timed, like the others' beats
            if self._unanswered * BEAT > SILENT:
                self._store_lost = True
            if self.trouble():
                troubled += 1
                if self._main is not None:
                    signal.pthread_kill(self._main, signal.SIGTERM)  # out of a wait in Python; a wait inside a collective goes on
                if troubled * BEAT > GRACE:
                    self._end_process()
            time.sleep(BEAT)

    def _read(self, values: list[str]) -> None:
        with self._lock:
            for rank, (beat, reason) in enumerate(zip(values[: self.world], values[self.world :], strict=True)):
                same = beat == self._beats[rank] and rank != self.rank
                self._still[rank] = self._still[rank] + 1 if same else 0
                self._beats[rank] = beat
                if reason and self._reasons[rank] is None:
                    self._reasons[rank] = Reason(*json.loads(reason))

    def _silent(self, seconds: float) -> list[int]:
        """Ranks without a beat for so long that have not ended. Under the lock."""
        return [r for r, still in enumerate(self._still) if still * BEAT > seconds and self._beats[r] != "bye" and self._reasons[r] is None]

    def _end_process(self) -> None:
        """The training thread waits for a rank that will not answer, where no exception reaches it."""
        if self._ending:
            return
        code, text = self.end(Reason("lost"))
        tell(text)
        self.leave()
        leave_process(code)

    def _on_signal(self, number, frame) -> None:
        if not self._signalled and not self._ending:  # a second signal says nothing new
            self._signalled = True
            raise RankFailed if self.trouble() else Terminated

    def _set(self, key: str, text: str) -> None:
        if self._store_lost:
            return
        try:
            self.store.set(key, text)
        except RuntimeError:
            self._store_lost = True


def _blame(rank: int, reason: Reason) -> tuple[int, str]:
    """Exit code and line for a reason that explains itself."""
    if reason.kind == "interrupted":
        return INTERRUPTED, "interrupted" if rank == 0 else f"interrupted (rank {rank})"
    return WRONG if reason.kind == "error" else LOST, f"error: {reason.text}" if rank == 0 else f"error: rank {rank}: {reason.text}"


class Terminated(BaseException):
    """SIGTERM, from the launcher when another rank has ended or from whoever ends the job."""


def tell(text: str) -> None:
    if text:
        print(one_line(text), file=sys.stderr, flush=True)


def leave_process(code: int) -> None:
    """At once: threads that still read data, and a process group whose peers are gone, would hold up a usual end."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, AttributeError, ValueError):
            pass
    os._exit(code)


def differing(facts: list[dict], what: str, without: tuple[str, ...] = ()) -> UserError | None:
    """The first fact that ranks do not agree on, as one line; what: "{name}" is its name, as "--{name}"."""
    for name in facts[0]:
        if name in without:
            continue
        values = [rank_facts.get(name) for rank_facts in facts]
        other = next((rank for rank, value in enumerate(values) if value != values[0]), None)
        if other is not None:
            flag = what.format(name=name)
            return UserError(f"{flag}={values[0]} on rank 0 and {flag}={values[other]} on rank {other}: must be the same on all ranks")
    return None
