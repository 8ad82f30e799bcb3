"""What one start of a job touched: recorded until the start is over, then written as traces.

The start is over at the mark training_started ("mark"), when for `start_quiet_s` nothing new was read and no
read waited ("quiet"), at `start_cap_s` ("cap"), or with the job ("end"). What mounting an image in the prolog
reads is no start yet: it does not end in quiet, and leaves no trace. What steps were shown and did not read
leaves a trace without touches: at the mark, which is exact; else when the job ends, for it may come late.
Owns the recorders of the session's parts and one thread that watches the time. Thread-safe.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from bootseer_slurm.agent.part import Part
from bootseer_slurm.agent.publish import Publisher
from bootseer_slurm.agent.request import Job
from bootseer_slurm.blob.trace import MAX_TOUCHES, Recorder, Trace
from bootseer_slurm.config import PrefetchConfig

_LOOK_EVERY_S = 1.0


class Recording:
    """The traces of one job on one node."""

    def __init__(
        self,
        job: Job,
        node: str,
        job_class: str,
        config: PrefetchConfig,
        *,
        publisher: Publisher,
        on_over: Callable[[str], None],
    ) -> None:
        """on_over: told, by a thread of its own, why the start is over; not when `finish` said so."""
        self._job = job
        self._node = node
        self._class = job_class
        self._config = config
        self._publisher = publisher
        self._on_over = on_over
        self._begin_s = time.monotonic()
        self._parts: list[Part] = []
        self._shown: set[Part] = set()
        self._unread: list[Part] = []  # as far as is known; when the job ends it is
        self._step_s = math.inf
        self._resumed = False
        self._mounted_s: dict[Part, float] = {}
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._finishing = threading.Lock()
        self._watcher: threading.Thread | None = None

    def add(self, part: Part) -> None:
        """Record this part too, unless the start is over."""
        with self._lock:
            if self._over.is_set():
                return
            part.recorder = Recorder(
                part.reader.blob.layout.blocks, begin_s=self._begin_s, waited_s=part.reader.waited_s
            )
            part.reader.add_recorder(part.recorder)
            self._parts.append(part)
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="recording", daemon=True)
                self._watcher.start()

    def step(self) -> None:
        """A step begins, or wants an image: what is read from now on is the start's."""
        self._step_s = min(self._step_s, time.monotonic())

    def shown(self, parts: Iterable[Part]) -> None:
        """A step can read these from now on."""
        with self._lock:
            self._shown.update(parts)

    def resume(self) -> None:
        """An agent before this one was killed, and what it saw is lost: traces are partial."""
        self._resumed = True
        self.step()  # there may have been one

    def mounted(self, part: Part) -> None:
        """What was read of this part until now was for mounting it."""
        self._mounted_s[part] = time.monotonic()

    def finish(self, ended: str) -> None:
        """The start is over: write what was recorded. A second call only waits until the first is done."""
        with self._finishing:
            with self._lock:
                if self._over.is_set():
                    return
                self._over.set()
                parts = list(self._parts)
            self._write(parts, ended)

    def close(self) -> None:
        """The job is over, and `finish` was called: of what it never read it is known now."""
        unread, self._unread = self._unread, []
        for part in unread:
            part.reader.remove_recorder(_recorder(part))
            if not self._last_s(part) and not part.partial:
                self._write_trace(part, "end", ())

    def _write(self, parts: list[Part], ended: str) -> None:
        used = [part for part in parts if self._last_s(part)]
        began_ms = min(map(self._began_ms, used), default=0)
        for part in parts:
            unread = part not in used and self._can_be_unread(part)
            if unread and ended in ("quiet", "cap") and not _is_passed_over(part, used):
                self._unread.append(part)
                continue
            part.reader.remove_recorder(_recorder(part))
            if self._is_cut_off(part, ended):
                continue
            if part in used:
                self._write_trace(part, ended, _recorder(part).touches_since(began_ms))
            elif unread and ended != "end":
                self._write_trace(part, ended, ())

    def _write_trace(self, part: Part, ended: str, touches: tuple[tuple[int, int], ...]) -> None:
        trace = Trace(
            blob=part.trace_key,
            node=self._node,
            job=self._job.job_id,
            restart=self._job.restart,
            made_ns=time.time_ns(),
            blocks=part.reader.blob.layout.blocks,
            block_bytes=part.reader.blob.layout.block_bytes,
            partial=self._resumed or part.partial,
            ended=ended,
            touches=touches,
        )
        fields: dict[str, Any] = {"class": self._class, "blob": part.trace_key}
        self._publisher.write("trace", trace.encode(), **fields)

    @property
    def last_new_ns(self) -> int:
        """When something new was last read, in ns since the epoch; 0 when nothing was."""
        last_s = max(map(self._last_s, self._parts), default=0.0)
        return time.time_ns() - int((time.monotonic() - last_s) * 1e9) if last_s else 0

    def _watch(self) -> None:
        waited_s = 0.0
        while not self._over.wait(_LOOK_EVERY_S):
            now_s = time.monotonic()
            if any(part.reader.is_waited_for for part in self._parts):
                waited_s = now_s  # a store that stalls is not quiet
            last_s = max(map(self._last_s, self._parts), default=0.0)
            if now_s - self._begin_s > self._config.start_cap_s:
                self._on_over("cap")
            elif last_s and now_s - max(last_s, waited_s) > self._config.start_quiet_s:
                self._on_over("quiet")

    def _last_s(self, part: Part) -> float:
        """When a step last read something new of a part; 0 when none did."""
        last_s = _recorder(part).last_s
        return last_s if last_s >= self._from_s(part) else 0.0

    def _began_ms(self, part: Part) -> int:
        """When a step first read something new of a part that was used, as its recorder tells the time."""
        from_ms = int((self._from_s(part) - self._begin_s) * 1000)
        return _recorder(part).first_ms(from_ms)

    def _from_s(self, part: Part) -> float:
        """From when on what is read of a part is the start's."""
        return max(self._step_s, self._mounted_s.get(part, 0.0))

    def _can_be_unread(self, part: Part) -> bool:
        """Whether a step was shown this, and every read of it would have been seen."""
        with self._lock:
            return part in self._shown and not (self._resumed or part.partial)

    def _is_cut_off(self, part: Part, ended: str) -> bool:
        """Whether more of a checkpoint was, or may have been, to be read: nothing but its plan is brought."""
        if part.wish.kind != "checkpoint":
            return False
        checkpoints = [each for each in self._parts if each.wish.kind == "checkpoint"]
        quiet_s = time.monotonic() - max(map(self._last_s, checkpoints))
        loads = quiet_s <= self._config.start_quiet_s or any(
            each.reader.is_waited_for for each in checkpoints
        )
        return (ended == "cap" and loads) or ended == "end" or _recorder(part).count >= MAX_TOUCHES


def _is_passed_over(part: Part, used: list[Part]) -> bool:
    """Whether this node read of a checkpoint, but nothing of this file of it."""
    return part.wish.kind == "checkpoint" and any(other.wish.kind == "checkpoint" for other in used)


def _recorder(part: Part) -> Recorder:
    assert part.recorder is not None  # all in the recording have one
    return part.recorder
