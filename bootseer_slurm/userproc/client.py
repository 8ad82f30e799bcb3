"""The agent's end of a user's process: one typed method for each operation (protocol.py)."""

from __future__ import annotations

import contextlib
import os
import pwd
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

from bootseer_slurm.blob import trace
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.manifest import CHUNK_BYTES
from bootseer_slurm.blob.trace import Plan, decode_plan
from bootseer_slurm.errors import StoreError
from bootseer_slurm.identity import User
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.channel import Channel
from bootseer_slurm.userproc.link import Link
from bootseer_slurm.userproc.memory_file import make_memory_file, read_memory_file
from bootseer_slurm.userproc.protocol import CheckpointFolder, Order, Reply, Request, Resolve, Resolved
from bootseer_slurm.userproc.ring import Ring
from bootseer_slurm.userproc.spare import Started, start

_TIMEOUT_S = 20.0
# Of a read that somebody waits for: then another source is asked, before the one who waits gives up
# (cache.reader.MOUNTED_PATIENCE_S).
_DEMAND_TIMEOUT_S = 15.0
_AnyReply = TypeVar("_AnyReply", bound=Reply)


@dataclass(slots=True)
class Found:
    """The answer to Resolve, with its descriptors: `close` closes those that nobody took."""

    reply: Resolved
    _fds: list[int] = field(default_factory=list)

    def take_original(self) -> int | None:
        """The original's descriptor, now the caller's; None where it has none."""
        if not self.reply.has_original:
            return None
        fd, self._fds[0] = self._fds[0], -1
        return fd

    @property
    def manifest_fds(self) -> list[int]:
        """Of memory files that hold the manifests, one for each blob; they stay ours."""
        return self._fds[self.reply.has_original :]

    def close(self) -> None:
        for fd in self._fds:
            if fd >= 0:
                os.close(fd)
        self._fds.clear()


class UserProcess:  # size: a method for each operation
    """A running process with a job user's rights. Thread-safe."""

    def __init__(self, channel: Channel, ring: Ring, link: Link, *, timeout_s: float) -> None:
        """timeout_s: when a read has failed."""
        self.link = link
        self._channel = channel
        self._ring = ring
        self._timeout_s = timeout_s

    def resolve(self, request: Resolve) -> Found | CheckpointFolder:
        """Look an artifact up; the caller closes it. Raises BootseerError."""
        # Of a checkpoint that may be a folder the newest is found first, in which a slow store takes as long.
        timeout_s = 2 * _TIMEOUT_S if request.nodes else _TIMEOUT_S
        reply, fds = self._ask(request, Resolved, CheckpointFolder, timeout_s=timeout_s)
        if isinstance(reply, CheckpointFolder):
            return reply
        assert isinstance(reply, Resolved)
        return Found(reply, fds)

    def is_same(self, request: protocol.IsSame, *, timeout_s: float) -> bool:
        """Whether an original is what it was. Raises NoAnswer, BootseerError."""
        return self._ask(request, protocol.Same, timeout_s=timeout_s)[0].same

    def reopen(self, blob: str, folder: str) -> int:
        """The handle of a blob of the store. Raises BootseerError."""
        return self._ask(protocol.Reopen(blob, folder), protocol.Opened)[0].handle

    def make_plan(self, request: protocol.MakePlan) -> tuple[Plan, str]:
        """The plan, and a warning of traces that could not be used. Raises BootseerError."""
        reply, fds = self._ask(request, protocol.Planned)
        try:
            content = read_memory_file(fds[0], limit_bytes=trace.LIMIT_BYTES)
        finally:
            os.close(fds[0])
        return decode_plan(content, blocks=request.blocks), reply.warning

    def recall(self, job_class: str) -> list[Remembered]:
        """The things that the last start of a class asked for. Raises BootseerError."""
        return self._ask(protocol.Recall(job_class), protocol.Recalled)[0].usable()

    def clock(self, path: str, *, timeout_s: float) -> tuple[float, float]:
        """How this node's clock differs from the store's, and by how much that is wrong, in seconds."""
        reply, _ = self._ask(protocol.AskClock(path), protocol.Clock, timeout_s=timeout_s)
        return reply.offset_s, reply.error_s

    def write(self, request: Request, content: bytes, *, timeout_s: float) -> None:
        """Have a Write, KeepTrace or Remember write its content. Raises BootseerError."""
        fd = make_memory_file(content)
        try:
            self._ask(request, Reply, fds=(fd,), timeout_s=timeout_s)
        finally:
            os.close(fd)

    def _ask(
        self,
        request: Request,
        *replies: type[_AnyReply],
        fds: tuple[int, ...] = (),
        timeout_s: float = _TIMEOUT_S,
    ) -> tuple[_AnyReply, list[int]]:
        """The reply, of one of these types, and as many descriptors as it says; the prefetch holds."""
        with self.link.demand():
            answer = self._channel.ask(request, fds=fds, timeout_s=timeout_s)
        kept = 0
        try:
            reply = protocol.decode_reply(answer.fields, *replies)
            if len(answer.fds) < reply.descriptors:
                raise StoreError("the user's process gave too few descriptors")
            kept = reply.descriptors
        finally:
            for fd in answer.fds[kept:]:
                os.close(fd)
        return reply, answer.fds[:kept]

    @contextlib.contextmanager
    def read(
        self, handle: int, index: int, offset: int, size_bytes: int, *, demand: bool, fixed: bool = True
    ) -> Iterator[memoryview]:
        """A range of an object, at most CHUNK_BYTES; the bytes are valid inside the block only.

        fixed: they do not change any more. Else they lie in the ring, where the process can write to them.
        Raises StoreError when it fails, takes too long, or ends early.
        """
        where: dict[str, Any] = {"handle": handle, "object": index, "offset": offset}
        if demand:
            reading = self._read(where, size_bytes, size_bytes, demand=True, fixed=fixed)
            with self.link.demand(), reading as view:
                yield view
        else:
            step_bytes, start_s = self.link.step_bytes, time.monotonic()
            with self._read(where, size_bytes, step_bytes, demand=False, fixed=fixed) as view:
                self.link.measured(size_bytes, -(-size_bytes // step_bytes), time.monotonic() - start_s)
                yield view

    @contextlib.contextmanager
    def _read(
        self, where: dict[str, Any], size_bytes: int, step_bytes: int, *, demand: bool, fixed: bool
    ) -> Iterator[memoryview]:
        timeout_s = min(self._timeout_s, _DEMAND_TIMEOUT_S) if demand else self._timeout_s
        slot = self._ring.take(demand=demand, timeout_s=timeout_s)
        request = protocol.Read(
            **where, size_bytes=size_bytes, slot=slot, step_bytes=step_bytes, demand=demand
        )
        future = self._channel.send(request)
        try:
            answer = self._channel.wait(future, timeout_s)
            count = protocol.decode_reply(answer.fields, protocol.Count).count
            if count != size_bytes:
                raise StoreError(f"a read ended after {count} of {size_bytes} bytes")
            yield self._ring.view(slot, size_bytes, fixed=fixed)
        finally:
            # Now, or when the late reply comes: until then the process may write to the slot.
            future.add_done_callback(lambda _: self._ring.give_back(slot))

    @property
    def ended(self) -> bool:
        """Whether the process is gone, or was killed since it was silent: all calls fail."""
        return self._channel.ended

    def kill(self) -> None:
        """End the process at once; calls under way fail with StoreError."""
        self._channel.kill()
        self._ring.close()

    def close(self) -> None:
        """Give back what it shared, once it was killed and nobody reads any more."""
        self._ring.close()


def start_user_process(
    user: User,
    store_uri: str,
    *,
    streams: int,
    timeout_s: float,
    take: Callable[[], Started] = start,
    link: Link | None = None,
) -> UserProcess:
    """Give a user a process of his own.

    streams: parallel prefetch reads. timeout_s: when a read has failed. take: gives one that has no user yet.
    link: of the job. Raises StoreError.
    """
    ring = Ring(streams)
    home = ""
    with contextlib.suppress(KeyError):  # where clients of stores look for that user's credentials
        home = pwd.getpwuid(user.uid).pw_dir
    order = Order(user.uid, user.gid, user.groups, home, store_uri, ring.slots, CHUNK_BYTES)
    started: Started | None = None
    try:
        started = take()
        started.give_order(protocol.encode_order(order), ring.fd)
    except (OSError, subprocess.SubprocessError) as error:
        if started is not None:
            started.end()
        raise StoreError(f"process of uid {user.uid} cannot be started: {error}") from error
    finally:
        os.close(ring.fd)
    return UserProcess(Channel(started, user.uid), ring, link or Link(), timeout_s=timeout_s)
