"""The server of a FUSE mount: takes the kernel's requests from /dev/fuse and answers them.

Owns: the life of its parts, and the order in which they learn of a file that comes or goes. Does not own: the
mount and the descriptors (mount.py), names and nodes (names.py, nodes.py), the threads and what they answer
(requests.py, answers.py, fetchers.py), the reads that wait (reads.py, waiting.py), and where bytes come from
(File).

Threads: `mount.readers` readers take requests. What is local they answer themselves: one pread, one writev,
no lock. A read that has to wait goes to one of `blocking_threads` fetchers, so that nothing a store does can
hold up a reader; when all of these wait, further such reads queue, and everything else goes on. One user
occupies a quarter of them at most, and where too many reads wait, readahead fails of the user who has the
most (waiting.py). All are daemon threads: a fetch that never comes back does not keep the process from
ending.

The process may be killed at any moment. The next server of the mount finds the nodes in the state file, and
in the ledger the reads that waited and the requests that were just taken; it answers these again, as if they
came now. Reads of a file wait until `add` has brought it or `end_recovery` has said that it will not come.

Deadlocks to know of: a notification may wait in the kernel until a request for the same directory or page is
answered. So the caller of `add`, `remove`, `end_recovery` or `store` sends it, never a server thread, and no
lock that a server thread takes is held meanwhile. The process that serves must not touch a mapping (mmap) of
its own files: the page fault holds the interpreter lock that the answer needs. Nor may it start a process
while it has one of them open, other than O_PATH: the new process closes it, which may ask.
A thread that waits for a notification, or for any request to this mount, cannot be killed before the next
server has answered: who starts that one must not wait until the last one is gone, only until its other
threads are. A child forked from the process that does not exec keeps the mount alive after it.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.answers import Answers
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.fetchers import Fetchers
from bootseer_slurm.fuse.ledger import Ledger
from bootseer_slurm.fuse.mount import Mount
from bootseer_slurm.fuse.names import Names, StateFile
from bootseer_slurm.fuse.nodes import File, NodeTable
from bootseer_slurm.fuse.protocol import InitFlag, Opcode
from bootseer_slurm.fuse.reads import PendingReads
from bootseer_slurm.fuse.requests import RequestThreads
from bootseer_slurm.fuse.waiting import WaitingReads

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 2.0


class Server:
    """Serves files read-only below mount.point, for one start and one stop. A mount has one at a time."""

    def __init__(self, mount: Mount, state: Path, *, blocking_threads: int = 64) -> None:
        """state: the file that keeps names and nodes.

        blocking_threads: how many reads may wait for the store at a time.
        """
        self._point = mount.point
        self._device = Device(mount.fd, mount.point)
        self._ledger = Ledger(mount.ledger_fd, mount.readers)
        self._nodes = NodeTable(self._ledger.lookups)
        self._state = StateFile(state, mount.key)
        self._names = Names(self._nodes, self._state.write)
        self._waiting = WaitingReads(self._device, self._ledger)
        self._fetchers = Fetchers(self._waiting, blocking_threads)
        self._reads = PendingReads(self._waiting, self._fetchers)
        self._stopped = threading.Event()
        zero_message_open = InitFlag.NO_OPEN_SUPPORT in mount.flags
        answers = Answers(self._nodes, self._device, zero_message_open=zero_message_open)
        handlers = answers.handlers | {Opcode.INTERRUPT: self._reads.interrupt}
        self._requests = RequestThreads(self._device, self._ledger, self._nodes, self._reads, handlers)

    def start(self) -> None:
        """Take over from the last server of this mount, if there was one, and serve.

        What had a name has it still, and waits for `add`, until `end_recovery`, which has to be called.
        """
        self._state.restore(self._names)
        self._reads.take_over(self._ledger.found(), self._nodes)
        self._requests.start()
        self._fetchers.start()
        threading.Thread(
            target=self._reads.fail_overdue, args=(self._stopped,), name="bootseer-fuse-overdue", daemon=True
        ).start()

    def add(self, path: str, file: File) -> Path:
        """Show file at path, "<uid>/<name>"; return its absolute path, which is usable at once.

        A name of the last server goes on with this file, and so do the reads that wait, if size and owner
        are the same. Otherwise the name gets this file anew, and what has the other one open gets EIO.
        Raises ValueError (path has another form), FileExistsError or BootseerError.
        """
        added = self._names.add(path, file)
        self._reads.file_came(added.node, file)
        if added.replaced is not None:
            self._reads.give_up(added.replaced)
        self._tell_gone(added.gone)
        if added.changed is not None:
            self._device.send(protocol.notify_inval_inode(added.changed))
        return self._point / path

    def remove(self, path: str) -> None:
        """Take the name away; what has the file open, mapped or bound elsewhere goes on reading it.

        Not to be called by a File. Raises ValueError or FileNotFoundError.
        """
        node, gone = self._names.remove(path)
        self._reads.give_up(node)
        self._tell_gone(gone)
        self._names.save()

    def end_recovery(self) -> None:
        """Take the names away that no file came for; reads that wait for one get EIO, now and later."""
        gone = self._names.remove_without_file()
        self._reads.end_recovery()
        self._tell_gone(gone)
        self._names.save()

    def known(self, path: str) -> bool:
        """Tell whether the kernel has looked the file up, and so may have pages of it.

        False when there is no such name. Raises ValueError.
        """
        node = self._names.find(path)
        return node is not None and node.lookups > 0

    def fail_reads(self, path: str, before_s: float) -> bool:
        """Fail the reads of a file that wait since before a time.monotonic(); tells whether there were any.

        Raises ValueError.
        """
        node = self._names.find(path)
        return node is not None and self._reads.fail(node, before_s)

    def store(self, path: str, offset: int, data: bytes | memoryview) -> bool:
        """Put bytes of a file into the kernel's page cache; reads of them do not come to the server.

        offset: at a multiple of the page size, and so should the end be, unless it is the file's.
        False when the kernel does not have the file (see `known`) or will not take them. May wait for reads
        of these bytes to be answered: `ready` must say yes to them before, and the caller may hold no lock
        that `ready` or `fetch` takes. Not to be called by a File.
        Raises ValueError when the bytes reach beyond the end of the file.
        """
        node = self._names.find(path)
        if node is None or node.file is None or node.lookups <= 0:
            return False
        view = memoryview(data).cast("B")
        if offset < 0 or offset + len(view) > node.size_bytes:
            raise ValueError(f"{path} ends at {node.size_bytes}, before {offset + len(view)}")
        for start in range(0, len(view), protocol.MAX_READ_BYTES):
            part = view[start : start + protocol.MAX_READ_BYTES]
            header = protocol.notify_store_header(node.id, offset + start, len(part))
            if not self._device.send(header, part):
                return False
        return True

    def stop(self) -> None:
        """End the threads; to be called after `Mount.close` in the same process.

        Not needed where the process ends: threads, and requests that they took, are left to the next server.
        """
        self._stopped.set()
        self._requests.stop()
        if not _join(self._requests.threads):
            _log.warning("%s: still mounted; its threads end with their next request", self._point)
        self._waiting.clear()
        self._fetchers.close()
        if not _join(self._fetchers.threads):
            _log.warning("%s: some reads still wait for the store", self._point)
        self._device.close()

    def _tell_gone(self, gone: list[tuple[int, bytes]]) -> None:
        for parent_id, name in gone:
            self._device.send(protocol.notify_inval_entry(parent_id, name))


def _join(threads: list[threading.Thread]) -> bool:
    """Wait a while for threads to end; True when none is left."""
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline_s - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)
