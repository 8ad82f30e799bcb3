"""The agent's end of the socket to a user's process: requests go out, and each waits for its answer.

Owns the process, and one thread that takes its answers. The process is its user's: descriptors that come with
an answer are closed, unless the reply has some to give. And its user can stop it: who waits for an answer
looks from time to time whether the process is stopped, or does not even answer a Ping. Such a process is
killed. One whose store is silent goes on: it answers a Ping.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import subprocess
import threading
import time
from array import array
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.protocol import Ping, Request
from bootseer_slurm.userproc.spare import Started

_log = logging.getLogger(__name__)

_END_S = 5.0  # for a killed process; one held by a file system ends when that answers

_LOOK_S = 2.0  # after so long without an answer, and as often from then on
_SILENT_S = 10.0  # the process answers a Ping within this, however busy its node is


class NoAnswer(StoreError):
    """A file system or store did not answer in time."""


@dataclass(slots=True)
class Answer:
    """The fields of a reply, not checked, and its descriptors, which the receiver closes."""

    fields: dict[str, Any]
    fds: list[int]


class Channel:
    """The requests to one process. Thread-safe."""

    def __init__(self, started: Started, uid: int) -> None:
        self._uid = uid
        self._process, self._socket = started.process, started.socket
        self._numbers = itertools.count()
        self._waiting: dict[int, tuple[Request, Future[Answer]]] = {}
        self._lock = threading.Lock()
        self._ping: Future[Answer] | None = None  # the last one, of this time
        self._ping_s = 0.0
        self._looking = threading.Lock()
        self.ended = False
        name = f"userproc-{self._process.pid}"
        self._receiver = threading.Thread(target=self._receive, name=name, daemon=True)
        self._receiver.start()

    def ask(self, request: Request, *, fds: tuple[int, ...] = (), timeout_s: float) -> Answer:
        """Send a request and wait. Raises the error that it ended with, NoAnswer on a timeout."""
        number, future = self._send(request, fds)
        try:
            return self.wait(future, timeout_s)
        except NoAnswer:
            self._waiting.pop(number, None)
            if future.cancel():
                raise
            return future.result(_END_S)  # it comes this very moment

    def send(self, request: Request) -> Future[Answer]:
        """Send a request; the future gets its answer, or the error, however late."""
        return self._send(request, ())[1]

    def wait(self, future: Future[Answer], timeout_s: float) -> Answer:
        """Wait for the answer to a request. Raises the error that it ended with, NoAnswer on a timeout."""
        deadline_s = time.monotonic() + timeout_s
        while (left_s := deadline_s - time.monotonic()) > _LOOK_S:
            with contextlib.suppress(FutureTimeout):
                return future.result(_LOOK_S)
            self._end_if_silent()
        try:
            return future.result(max(0.0, left_s))
        except FutureTimeout:
            raise NoAnswer(f"no answer from the file system in {timeout_s:g} s") from None

    def _end_if_silent(self) -> None:
        """Kill the process if it is stopped, or has not answered a Ping for long."""
        if not self._looking.acquire(blocking=False):
            return  # another thread does
        try:
            now_s = time.monotonic()
            if self._ping is None or self._ping.done():
                was_answered = self._ping is None or self._ping.exception() is None
                self._ping = self.send(Ping())
                # One that is not sent, for want of room, counts as not answered. Where the next one is sent,
                # the process has taken others meanwhile.
                was_sent = not self._ping.done() or self._ping.exception() is None
                if was_answered or was_sent:
                    self._ping_s = now_s
            if _is_stopped(self._process.pid) or now_s - self._ping_s > _SILENT_S:
                _log.warning("process of uid %d: is stopped, or does not answer: killed", self._uid)
                self._process.kill()
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)
        finally:
            self._looking.release()

    def _send(self, request: Request, fds: tuple[int, ...]) -> tuple[int, Future[Answer]]:
        number = next(self._numbers)
        future: Future[Answer] = Future()
        message = protocol.encode_request(number, request)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))]
        with self._lock:
            try:
                # A stopped process takes no requests: the agent must not wait for it with the lock held.
                self._socket.sendmsg([message], rights, socket.MSG_DONTWAIT)
                self._waiting[number] = request, future
            except OSError as error:
                future.set_exception(StoreError(f"the user's process takes no requests: {error.strerror}"))
        return number, future

    def kill(self) -> None:
        """End the process at once; requests under way fail with StoreError."""
        self._process.kill()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        # It ends with the shutdown, even if the process does not. But it closes the descriptors that came,
        # and a user's file system or connection can hold it there for as long as he likes.
        self._receiver.join(_END_S)
        with self._lock:
            self._socket.close()
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            _log.warning("process of uid %d does not end: a file system holds it", self._uid)
            threading.Thread(target=self._process.wait, daemon=True).start()

    def _receive(self) -> None:
        try:
            while self._take_answer():
                pass
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            _log.warning("process of uid %d: %s", self._uid, error)
        self._process.kill()
        with self._lock:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # nobody would take the answers to further requests
            waiting, self._waiting = self._waiting, {}
            self.ended = True
        for _, future in waiting.values():
            if future.set_running_or_notify_cancel():
                future.set_exception(StoreError("the user's process ended"))

    def _take_answer(self) -> bool:
        """Wait for an answer and give it to whoever waits for it; False at the end."""
        message, fds, _, _ = socket.recv_fds(
            self._socket, protocol.MESSAGE_BYTES, protocol.MESSAGE_DESCRIPTORS
        )
        kept = 0
        try:
            if not message:
                return False
            number, content = protocol.decode_answer(message)
            with self._lock:
                waiting = self._waiting.pop(number, None)
            if waiting is None or not waiting[1].set_running_or_notify_cancel():
                return True  # it is late
            request, future = waiting
            if isinstance(content, BootseerError):
                future.set_exception(content)
            else:
                kept = request.most_descriptors
                future.set_result(Answer(content, fds[:kept]))
        finally:
            for fd in fds[kept:]:
                os.close(fd)
        return True


def _is_stopped(pid: int) -> bool:
    """Whether a process was stopped by a signal or a tracer (proc_pid_stat(5))."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False
