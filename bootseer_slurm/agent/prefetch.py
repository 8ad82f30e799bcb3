"""The prefetch of one job on this node: brings the blocks of its targets, with several reads in flight.

Order: a checkpoint first, for all of it will be read; then what nobody has asked for yet of an environment
and an image, for a start reads a part of these, and reads that wait go before any prefetch (fetch/turns.py).
Threads: `streams` of its own, started with the first target.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from bootseer_slurm.agent.target import Target
from bootseer_slurm.blob.reader import OnFault
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.turns import Turns

_ATTEMPTS = 5
_ORDER = ("checkpoint", "environment", "image")


@dataclass(slots=True)
class _Work:
    """One target and how far it is."""

    target: Target
    in_flight: int = 0
    exhausted: bool = False
    start_s: float = field(default_factory=time.monotonic)


class Prefetch:
    """Brings targets until it is stopped. Thread-safe."""

    def __init__(self, turns: Turns, streams: int, *, log: EventLog, on_fault: OnFault) -> None:
        """turns: of the fetch process that reads. on_fault(name, message): told of what cannot be read."""
        self._turns = turns
        self._streams = streams
        self._log = log
        self._on_fault = on_fault
        self._works: list[_Work] = []
        self._changed = threading.Condition()
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []

    def add(self, target: Target) -> None:
        """Bring this target's blocks too."""
        wish, size_bytes = target.wish, target.reader.size_bytes
        self._log.emit("prefetch", "begin", bytes=size_bytes, target=wish.name, what=wish.kind)
        with self._changed:
            self._works.append(_Work(target))
            self._works.sort(key=lambda work: _ORDER.index(work.target.wish.kind))
            while len(self._threads) < self._streams:
                self._threads.append(threading.Thread(target=self._stream, name="prefetch", daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Begin no more reads; those in flight end with their fetch process."""
        with self._changed:
            if self._over.is_set():
                return
            self._over.set()
            self._changed.notify_all()
            for work in self._works:
                if work.in_flight or not work.exhausted:
                    self._tell(work, "stopped")

    def join(self, timeout_s: float) -> None:
        """Wait for the streams, each at most `timeout_s`."""
        for thread in self._threads:
            thread.join(timeout_s)

    def _stream(self) -> None:
        retrying = Retrying(
            retry=retry_if_exception_type(StoreError),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=0.2, max=5),
            sleep=self._pause,
            reraise=True,
        )
        while work := self._next():
            more = False
            try:
                more = retrying(self._run, work)
            except BootseerError as error:
                if not self._over.is_set():
                    self._on_fault("prefetch_failed", f"{work.target.wish.name}: {error.message}")
            self._done(work, more=more)

    def _pause(self, pause_s: float) -> None:
        self._over.wait(pause_s)

    def _run(self, work: _Work) -> bool:
        with self._turns.prefetch() as limit_bytes:
            return not self._over.is_set() and work.target.reader.prefetch_run(limit_bytes)

    def _next(self) -> _Work | None:
        with self._changed:
            while not self._over.is_set():
                for work in self._works:
                    if not work.exhausted:
                        work.in_flight += 1
                        return work
                self._changed.wait()
        return None

    def _done(self, work: _Work, *, more: bool) -> None:
        with self._changed:
            work.in_flight -= 1
            work.exhausted = work.exhausted or not more
            if work.exhausted and work.in_flight == 0 and not self._over.is_set():
                self._tell(work, "end")

    def _tell(self, work: _Work, name: str) -> None:
        usage, before = work.target.reader.usage, work.target.before
        self._log.emit(
            "prefetch",
            name,
            bytes=usage.store_bytes + usage.origin_bytes - before.store_bytes - before.origin_bytes,
            bytes_cached=work.target.cached_bytes,
            dur_s=time.monotonic() - work.start_s,
            source="store" if usage.store_bytes > before.store_bytes else "origin",
            target=work.target.wish.name,
            what=work.target.wish.kind,
        )
