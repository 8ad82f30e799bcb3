"""The traces of one start: its touches are recorded until the start is over, and written then.

The start is over at the mark training_started ("mark"), when for `start_quiet_s` nothing new was read and no
read waited ("quiet"), at `start_cap_s` ("cap"), or with the job ("end"). What mounting an image in the prolog
reads is no start yet: it does not end in quiet, and leaves no trace. What steps were shown and did not read
leaves a trace without touches: at the mark, which is exact; else when the job ends, for it may come late.
Owns the recorders of the session's layers and one thread that watches the time. Thread-safe.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.blob.trace import MAX_TOUCHES, Recorder, Trace
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.job.publishing import Publisher
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.userproc.protocol import KeepTrace

_LOOK_EVERY_S = 1.0


@dataclass(slots=True, eq=False)
class _Recorded:
    """A layer that is recorded. mounted_s: what was read before was for mounting it.

    unread: nothing of it was read, as far as is known; when the job ends it is.
    """

    layer: Layer
    recorder: Recorder
    mounted_s: float = 0.0
    unread: bool = False

    @property
    def is_checkpoint(self) -> bool:
        return self.layer.ref.kind == "checkpoint"

    def last_s(self, step_s: float) -> float:
        """When a step last read something new of it; 0 when none did. step_s: when the first step began."""
        last_s = self.recorder.last_s
        return last_s if last_s >= max(step_s, self.mounted_s) else 0.0

    def began_ms(self, step_s: float, begin_s: float) -> int:
        """When a step first read something new of it, in ms since `begin_s`, when the recording began."""
        return self.recorder.first_ms(int((max(step_s, self.mounted_s) - begin_s) * 1000))

    def stop(self) -> None:
        self.layer.handle.reader.remove_recorder(self.recorder)


class TraceWriter:
    """Writes the traces of one job on one node."""

    def __init__(self, job: Job, node: str, job_class: str, publisher: Publisher) -> None:
        self._job = job
        self._node = node
        self._class = job_class
        self._publisher = publisher

    def write(self, layer: Layer, ended: str, touches: tuple[tuple[int, int], ...], *, partial: bool) -> None:
        layout = layer.handle.reader.blob.layout
        trace = Trace(
            blob=layer.trace_key,
            node=self._node,
            job=self._job.job_id,
            restart=self._job.restart,
            made_ns=time.time_ns(),
            blocks=layout.blocks,
            block_bytes=layout.block_bytes,
            partial=partial,
            ended=ended,
            touches=touches,
        )
        self._publisher.write(KeepTrace(self._class, layer.trace_key), trace.encode())


class Recording:
    """The traces of one job on one node."""

    def __init__(
        self, writer: TraceWriter, config: PrefetchConfig, phase: JobPhase, on_over: Callable[[str], None]
    ) -> None:
        """on_over: told, by a thread of its own, that the start is over: "quiet" or "cap"."""
        self._writer = writer
        self._config = config
        self._phase = phase
        self._on_over = on_over
        self._begin_s = time.monotonic()
        self._recorded: list[_Recorded] = []
        self._step_s = math.inf
        self._resumed = False
        self._written = False
        self._lock = threading.Lock()
        self._finishing = threading.Lock()
        self._watcher: threading.Thread | None = None

    def add(self, layer: Layer) -> None:
        """Record this layer too, unless the start is over."""
        with self._lock:
            if not self._phase.is_starting:
                return
            reader = layer.handle.reader
            recorder = Recorder(
                reader.blob.layout.blocks, begin_s=self._begin_s, waited_s=reader.waits.waited_s
            )
            reader.add_recorder(recorder)
            self._recorded.append(_Recorded(layer, recorder))
            if self._watcher is None:
                self._watcher = threading.Thread(target=self._watch, name="recording", daemon=True)
                self._watcher.start()

    def step(self) -> None:
        """A step begins, or wants an image: what is read from now on is the start's."""
        self._step_s = min(self._step_s, time.monotonic())

    def shown(self, layers: Iterable[Layer]) -> None:
        """A step can read these from now on; some may not be recorded yet."""
        for layer in layers:
            layer.is_shown = True

    def resume(self) -> None:
        """An agent before this one was killed, and what it saw is lost: traces are partial."""
        self._resumed = True
        self.step()  # there may have been one

    def mounted(self, layer: Layer) -> None:
        """All reads of this layer until now were for mounting it."""
        for each in self._recorded:
            if each.layer is layer:
                each.mounted_s = time.monotonic()

    def finish(self, ended: str) -> None:
        """The start is over: write what was recorded. A second call only waits until the first is done.

        ended: why it is over, one of blob.trace.ENDED.
        """
        with self._finishing:
            with self._lock:
                if self._written:
                    return
                self._written = True
            self._write(ended)

    def close(self) -> None:
        """The job is over, and `finish` was called: of what it never read it is known now."""
        for each in self._recorded:
            if each.unread:
                each.unread = False
                each.stop()
                if not each.last_s(self._step_s) and each.layer.handle.is_seen:
                    self._writer.write(each.layer, "end", (), partial=self._resumed)

    @property
    def last_new_ns(self) -> int:
        """When something new was last read, in ns since the epoch; 0 when nothing was."""
        last_s = _last_s(self._recorded, self._step_s)
        return time.time_ns() - int((time.monotonic() - last_s) * 1e9) if last_s else 0

    def _write(self, ended: str) -> None:
        used = [each for each in self._recorded if each.last_s(self._step_s)]
        read_checkpoint = any(each.is_checkpoint for each in used)
        began_ms = min((each.began_ms(self._step_s, self._begin_s) for each in used), default=0)
        for each in self._recorded:
            is_partial = self._resumed or not each.layer.handle.is_seen
            unread = each not in used and each.layer.is_shown and not is_partial
            # This node may read of a checkpoint, and nothing of this file of it.
            passed_over = each.is_checkpoint and read_checkpoint
            if unread and ended in ("quiet", "cap") and not passed_over:
                each.unread = True
                continue
            each.stop()
            if each.is_checkpoint and self._is_cut_off(each, ended):
                continue
            if each in used:
                touches = each.recorder.touches_since(began_ms)
                self._writer.write(each.layer, ended, touches, partial=is_partial)
            elif unread and ended != "end":
                self._writer.write(each.layer, ended, (), partial=False)

    def _is_cut_off(self, recorded: _Recorded, ended: str) -> bool:
        """Whether more of a checkpoint was, or may have been, to be read: nothing but its plan is brought."""
        checkpoints = [each for each in self._recorded if each.is_checkpoint]
        quiet_s = time.monotonic() - _last_s(checkpoints, self._step_s)
        loads = quiet_s <= self._config.start_quiet_s or any(map(_is_waited_for, checkpoints))
        return (ended == "cap" and loads) or ended == "end" or recorded.recorder.count >= MAX_TOUCHES

    def _watch(self) -> None:
        waited_s = 0.0
        while not self._phase.wait_start_over(_LOOK_EVERY_S):
            now_s = time.monotonic()
            if any(map(_is_waited_for, self._recorded)):
                waited_s = now_s  # a store that stalls is not quiet
            last_s = _last_s(self._recorded, self._step_s)
            if now_s - self._begin_s > self._config.start_cap_s:
                self._on_over("cap")
            elif last_s and now_s - max(last_s, waited_s) > self._config.start_quiet_s:
                self._on_over("quiet")


def _is_waited_for(recorded: _Recorded) -> bool:
    """Whether some read of it waits for blocks now."""
    return recorded.layer.handle.reader.waits.any_now


def _last_s(recorded: Iterable[_Recorded], step_s: float) -> float:
    """When a step last read something new of any of them; 0 when none did."""
    return max((each.last_s(step_s) for each in recorded), default=0.0)
