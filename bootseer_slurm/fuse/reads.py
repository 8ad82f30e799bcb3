"""Reads that cannot be answered at once: parked, and given to a fetcher as soon as their File is there.

Owns: the reads whose node has no File yet, and until when they wait for one: the recovery, which begins with
the server and ends with `end_recovery`. Thread-safe; the lock is held for a moment.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Iterable

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.fetchers import Fetchers
from bootseer_slurm.fuse.ledger import Parked
from bootseer_slurm.fuse.nodes import File, Node, NodeTable
from bootseer_slurm.fuse.protocol import Request
from bootseer_slurm.fuse.waiting import WaitingReads

_log = logging.getLogger(__name__)

_LOOK_EVERY_S, _HURRIED_LOOK_S = 1.0, 0.1


class PendingReads:
    """Reads on their way to a fetcher."""

    def __init__(self, waiting: WaitingReads, fetchers: Fetchers) -> None:
        self._waiting = waiting
        self._fetchers = fetchers
        self._recovering = True
        self._without_file: dict[int, dict[int, Parked]] = {}  # by node id, and the kernel's number
        self._lock = threading.Lock()  # for these two

    def take_over(self, left: Iterable[Parked], nodes: NodeTable) -> None:
        """Have the reads wait again that the last server left; one of an unknown node gets ESTALE."""
        for parked in left:
            try:
                node = nodes.get(parked.node_id)
            except OSError as error:
                self._waiting.add(parked, None)
                self._waiting.finish(parked, error)
                continue
            known = parked._replace(uid=node.uid)
            self._waiting.add(known, node)
            self._wait_for_file(node, known)

    def park(self, request: Request, node: Node, file: File | None, offset: int, size: int) -> None:
        """Have a read wait for its bytes. file: the node's, whose `ready` said no; None without one."""
        parked = self._waiting.park(request, node, offset, size)
        if file is not None:
            self._fetchers.put(parked, file, asked=True)
        else:
            self._wait_for_file(node, parked)
        self._forget(self._waiting.drop_one_too_many())

    def interrupt(self, request: Request) -> None:
        """Let go of a process that is being killed."""
        self._forget(self._waiting.interrupt(request))

    def fail_overdue(self, stop: threading.Event) -> None:
        """Fail reads that have waited for too long, until told to stop (a thread of its own)."""
        while not stop.wait(_HURRIED_LOOK_S if self._waiting.hurries else _LOOK_EVERY_S):
            overdue = self._waiting.fail_overdue()
            for parked in overdue:
                self._forget(parked)
            if overdue:
                uids = ", ".join(map(str, sorted({parked.uid for parked in overdue})))
                _log.warning("%d reads failed that have waited for too long, of user %s", len(overdue), uids)

    def fail(self, node: Node, before_s: float) -> bool:
        """Fail the reads of a node that wait since before then; tells whether there were any."""
        failed = self._waiting.fail(node.id, before_s)
        for parked in failed:
            self._forget(parked)
        return bool(failed)

    def file_came(self, node: Node, file: File) -> None:
        """Go on with the reads that waited for the File of a node."""
        for parked in self._taken(node):
            self._fetchers.put(parked, file, asked=False)

    def give_up(self, node: Node) -> None:
        """Fail the reads that wait for the File of a node that will not get one any more."""
        for parked in self._taken(node):
            self._waiting.finish(parked, protocol.failure(errno.EIO))

    def end_recovery(self) -> None:
        """Fail the reads that wait for a File, now and later."""
        with self._lock:
            self._recovering = False
            left = [parked for each in self._without_file.values() for parked in each.values()]
            self._without_file.clear()
        if left:
            _log.warning("%d reads failed of files that no job has any more", len(left))
        for parked in left:
            self._waiting.finish(parked, protocol.failure(errno.EIO))

    def _forget(self, parked: Parked | None) -> None:
        """Keep nothing of a read that was answered though its bytes did not come."""
        if parked is not None:
            self._fetchers.forget(parked)
            with self._lock:
                self._without_file.get(parked.node_id, {}).pop(parked.unique, None)

    def _taken(self, node: Node) -> list[Parked]:
        with self._lock:
            return list(self._without_file.pop(node.id, {}).values())

    def _wait_for_file(self, node: Node, parked: Parked) -> None:
        """Have a read wait until its node has a File, if it still may get one."""
        with self._lock:
            file = node.file
            if file is None and node.linked and self._recovering:
                self._without_file.setdefault(node.id, {})[parked.unique] = parked
                return
        if file is None:
            self._waiting.finish(parked, protocol.failure(errno.EIO))
        else:
            self._fetchers.put(parked, file, asked=False)
