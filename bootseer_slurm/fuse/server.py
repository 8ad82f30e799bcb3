"""The server of a FUSE mount: takes the kernel's requests from /dev/fuse and answers them.

Owns: the threads, the node table's file, and when a waiting read is answered. Does not own: the mount and the
descriptors (mount.py), the tree (nodes.py), the layout of messages (protocol.py) and of shared memory
(ledger.py), and where bytes come from (File).

Threads: `mount.readers` readers take requests. What is local they answer themselves: one pread, one writev,
no lock. A read that has to wait goes to one of `blocking_threads` fetchers, so that nothing a store does can
hold up a reader; when all of these wait, further such reads queue, and everything else goes on. One user
occupies a quarter of them at most, and of the memory for what waits an eighth: beyond that his readahead
fails, and the kernel asks again, page by page, when somebody needs a page. All are daemon threads: a fetch
that never comes back does not keep the process from ending.

The process may be killed at any moment. The next server of the mount finds the nodes in the state file, and
in the ledger the reads that waited and the requests that were just taken; it answers these again, as if they
came now. Reads of a file wait until `add` has brought it or `settle` has said that it will not come.
On disk: the state file, JSON, replaced atomically with every new name. It is of use only with its mount.

Deadlocks to know of: a notification may wait in the kernel until a request for the same directory or page is
answered, so the caller of `add`, `remove`, `settle` or `store` sends it, never a server thread, and no lock
that a server thread takes is held meanwhile. The process that serves must not touch a mapping (mmap) of its
own files: the page fault holds the interpreter lock that the answer needs. Nor may it start a process while
it has one of them open, other than O_PATH: the new process closes it, which may ask.
A thread that waits for a notification, or for any request to this mount, cannot be killed before the next
server has answered: who starts that one must not wait until the last one is gone, only until its other
threads are. A child forked from the process that does not exec keeps the mount alive after it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import ledger, protocol
from bootseer_slurm.fuse.answers import Answers
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.fair import FairQueue
from bootseer_slurm.fuse.ledger import Ledger, Parked
from bootseer_slurm.fuse.mount import Mount
from bootseer_slurm.fuse.nodes import File, Node, NodeTable, State
from bootseer_slurm.fuse.protocol import Opcode, Request
from bootseer_slurm.fuse.waiting import Waiting

_log = logging.getLogger(__name__)

_STOP_TIMEOUT_S = 2.0
_USERS = 4  # that together may occupy all fetchers
_USER_PARKED = 1 << 12  # reads of one user that wait; more than the pages that his threads can wait for
_PAGE_BYTES = os.sysconf("SC_PAGESIZE")
_FETCH_OUTBOXES = 4  # a fetcher needs one only while it answers


class _Turn(NamedTuple):
    """A parked read whose File is there. asked: the File's `ready` was, and said no."""

    parked: Parked
    file: File
    asked: bool


class Server:
    """Serves files read-only below mount.point; for one start and one stop.

    state: the file that keeps the node table. blocking_threads: how many reads may wait for the store at a
    time. One server of a mount at a time.
    """

    def __init__(self, mount: Mount, state: Path, *, blocking_threads: int = 64) -> None:
        self._mount = mount
        self._state = state
        self._device = Device(mount.fd, mount.point)
        self._ledger = Ledger(mount.ledger_fd, mount.readers)
        self._tree = NodeTable(self._ledger.lookups, self._write_state)
        self._stopping = False
        self._turns: FairQueue[_Turn] = FairQueue(max(1, blocking_threads // _USERS))
        self._outboxes: queue.SimpleQueue[memoryview] = queue.SimpleQueue()
        self._waiting = Waiting()
        self._recovering = True
        self._without_file: dict[int, list[Parked]] = {}  # by node id
        self._file_lock = threading.Lock()  # for these two: held for a moment
        self._readers = [self._thread("fuse", self._serve, number) for number in range(mount.readers)]
        self._fetchers = [self._thread("fuse-fetch", self._fetch) for _ in range(blocking_threads)]
        answers = Answers(
            self._tree,
            self._device,
            zero_message_open=protocol.InitFlag.NO_OPEN_SUPPORT in mount.flags,
        )
        self._handlers = answers.handlers | {Opcode.INTERRUPT: self._interrupt}

    def start(self) -> None:
        """Take over from the last server of this mount, if there was one, and serve.

        What had a name has it still, and waits for `add` or `settle`, which has to be called in the end.
        """
        self._read_state()
        for parked in self._ledger.found():
            try:
                node = self._tree.get(parked.node_id)
            except OSError as error:
                self._waiting.add(parked)
                self._finish(parked, error)
                continue
            known = parked._replace(uid=node.uid)
            self._waiting.add(known)
            self._wait_for_file(node, known)
        for _ in range(_FETCH_OUTBOXES):
            self._outboxes.put(ledger.outbox())
        for thread in (*self._readers, *self._fetchers):
            thread.start()

    def add(self, path: str, file: File) -> Path:
        """Show file at path, "<uid>/<name>"; return its absolute path, which is usable at once.

        A name of the last server goes on with this file, and so do the reads that wait, if size and owner
        are the same. Otherwise the name gets this file anew, and what has the other one open gets EIO.
        Raises ValueError (path has another form), FileExistsError or BootseerError.
        """
        added = self._tree.add(path, file)
        with self._file_lock:
            waiting = self._without_file.pop(added.node.id, [])
        for parked in waiting:
            self._turns.put(parked.uid, _Turn(parked, file, asked=False))
        if added.replaced is not None:
            self._give_up(added.replaced)
        self._tell_gone(added.gone)
        if added.changed is not None:
            self._device.send(protocol.notify_inval_inode(added.changed))
        return self._mount.point / path

    def remove(self, path: str) -> None:
        """Take the name away; what has the file open, mapped or bound elsewhere goes on reading it.

        Not to be called by a File. Raises ValueError or FileNotFoundError.
        """
        node, gone = self._tree.remove(path)
        self._give_up(node)
        self._tell_gone(gone)
        self._save()

    def settle(self) -> None:
        """End the recovery: names without a file go, reads that wait for one get EIO, now and later."""
        gone = self._tree.settle()
        with self._file_lock:
            self._recovering = False
            waiting = [parked for each in self._without_file.values() for parked in each]
            self._without_file.clear()
        for parked in waiting:
            self._finish(parked, protocol.failure(errno.EIO))
        self._tell_gone(gone)
        self._save()

    def known(self, path: str) -> bool:
        """Tell whether the kernel has looked the file up, and so may have pages of it.

        False when there is no such name. Raises ValueError.
        """
        node = self._tree.find(path)
        return node is not None and node.lookups > 0

    def store(self, path: str, offset: int, data: bytes | memoryview) -> bool:
        """Put bytes of a file into the kernel's page cache; reads of them do not come to the server.

        offset: at a multiple of the page size, and so should the end be, unless it is the file's.
        False when the kernel does not have the file (see `known`) or will not take them. May wait for reads
        of these bytes to be answered: `ready` must say yes to them before, and the caller may hold no lock
        that `ready` or `fetch` takes. Not to be called by a File.
        Raises ValueError when the bytes reach beyond the end of the file.
        """
        node = self._tree.find(path)
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
        self._stopping = True
        if not _join(self._readers):
            _log.warning("%s: still mounted; its threads end with their next request", self._mount.point)
        self._waiting.clear()  # from here on, what a fetch brings is dropped
        self._turns.close()
        if not _join(self._fetchers):
            _log.warning("%s: some reads still wait for the store", self._mount.point)
        self._device.close()

    # The state file

    def _write_state(self, state: State) -> None:
        new = self._state.with_name(f"{self._state.name}.new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "w", encoding="ascii") as stream:
                stream.write(json.dumps(state | {"mount": self._mount.key}))
            os.replace(new, self._state)
        except OSError as error:
            raise BootseerError(f"{self._state}: cannot be written: {error.strerror}") from error

    def _read_state(self) -> None:
        """Take over the nodes of this mount's last server; a file of another mount means nothing."""
        try:
            state = json.loads(self._state.read_bytes())
            if state["mount"] == self._mount.key:
                self._tree.restore(state)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("%s: not usable, open files are lost: %r", self._state, error)

    def _save(self) -> None:
        try:
            self._tree.save()
        except BootseerError as error:  # an old state names more than there is, which the next `settle` mends
            _log.warning("%s", error.message)

    # The threads

    def _thread(self, name: str, life: Callable[..., None], *arguments: object) -> threading.Thread:
        return threading.Thread(target=life, args=arguments, name=f"bootseer-{name}", daemon=True)

    def _serve(self, number: int) -> None:
        """Life of a reader: answer what the last server left in its inbox, then requests until the end."""
        inbox, outbox = self._ledger.inboxes[number], ledger.outbox()
        left = self._ledger.unanswered(number)
        if left is not None:
            self._answer(protocol.parse(left), outbox)
        while True:
            self._ledger.clear(number)
            message = self._device.take(inbox)
            if message is None or self._stopping:
                return
            if message:
                self._answer(protocol.parse(message), outbox)

    def _answer(self, request: Request, outbox: memoryview) -> None:
        try:
            payload: memoryview | bytes | None
            if request.opcode == Opcode.READ:
                payload = self._read(request, outbox)
            elif request.opcode in self._handlers:
                payload = self._handlers[request.opcode](request)
            else:  # ENOSYS: the kernel does not ask again
                raise protocol.failure(errno.EROFS if request.opcode in protocol.WRITING else errno.ENOSYS)
            if payload is not None:
                self._device.reply(request.unique, payload)
        except BaseException as error:  # some extension modules raise past Exception; the thread must live
            self._device.fail(request.unique, error)

    def _fetch(self) -> None:
        """Life of a fetcher."""
        while self._fetch_next():
            pass

    def _fetch_next(self) -> bool:
        """Answer one waiting read; False at the end. Has its own frame: an idle thread holds no File."""
        taken = self._turns.take()
        if taken is None:
            return False
        uid, turn = taken
        try:
            self._fetch_turn(turn)
        finally:
            self._turns.done(uid)
        return True

    def _fetch_turn(self, turn: _Turn) -> None:
        parked = turn.parked
        if self._waiting.get(parked.unique) is None:
            return
        try:
            fd = None if turn.asked else turn.file.ready(parked.offset, parked.size)
            data = None
            if fd is None:
                data = memoryview(turn.file.fetch(parked.offset, parked.size)).cast("B")
                if len(data) != parked.size:
                    raise ValueError(f"{len(data)} bytes came instead of {parked.size} at {parked.offset}")
            with self._outbox() as outbox:
                part = outbox[: parked.size]
                if fd is not None:
                    _read_local(turn.file, fd, parked.offset, part)
                elif data is not None:
                    part[:] = data
                self._finish(parked, part)
        except BaseException as error:
            self._finish(parked, error)

    @contextlib.contextmanager
    def _outbox(self) -> Iterator[memoryview]:
        outbox = self._outboxes.get()
        try:
            yield outbox
        finally:
            self._outboxes.put(outbox)

    def _finish(self, parked: Parked, result: memoryview | BaseException) -> None:
        """Answer a parked read, unless that was done; only then it leaves the ledger."""
        if not self._waiting.take(parked):
            return
        if isinstance(result, BaseException):
            self._device.fail(parked.unique, result)
        else:
            self._device.reply(parked.unique, result)
        self._ledger.release(parked)

    def _tell_gone(self, gone: list[tuple[int, bytes]]) -> None:
        for parent_id, name in gone:
            self._device.send(protocol.notify_inval_entry(parent_id, name))

    # Requests

    def _read(self, request: Request, outbox: memoryview) -> memoryview | None:
        _fh, offset, asked, _, _, _, _ = protocol.READ_IN.unpack_from(request.body)
        node = self._tree.get(request.node_id)
        if not node.is_file:
            raise protocol.failure(errno.EISDIR)
        size = max(0, min(asked, node.size_bytes - offset))
        part = outbox[:size]
        if size == 0:
            return part
        file = node.file
        if file is not None:
            fd = file.ready(offset, size)
            if fd is not None:
                _read_local(file, fd, offset, part)
                return part
        if self._waiting.count(node.uid) >= _USER_PARKED and size > _PAGE_BYTES:
            raise protocol.failure(errno.EAGAIN)
        parked = self._ledger.park(request.unique, node.id, offset, size, request.pid, node.uid)
        self._waiting.add(parked)
        if file is not None:
            self._turns.put(node.uid, _Turn(parked, file, asked=True))
        else:
            self._wait_for_file(node, parked)
        return None

    def _wait_for_file(self, node: Node, parked: Parked) -> None:
        """Have a read wait until its node has a File, if it still may get one."""
        with self._file_lock:
            file = node.file
            if file is None and node.linked and self._recovering:
                self._without_file.setdefault(node.id, []).append(parked)
                return
        if file is None:
            self._finish(parked, protocol.failure(errno.EIO))
        else:
            self._turns.put(parked.uid, _Turn(parked, file, asked=False))

    def _give_up(self, node: Node) -> None:
        """Fail the reads that wait for the File of a node that will not get one any more."""
        with self._file_lock:
            waiting = self._without_file.pop(node.id, [])
        for parked in waiting:
            self._finish(parked, protocol.failure(errno.EIO))

    def _interrupt(self, request: Request) -> None:
        """Let go of a process that is being killed and waits in O_DIRECT or for a single page.

        Who waits for readahead needs no help. Other signals do not count: a read of an ordinary file does not
        end with EINTR.
        """
        (unique,) = protocol.INTERRUPT_IN.unpack_from(request.body)
        parked = self._waiting.get(unique)
        if parked is None:  # not here yet: the kernel asks again; answered meanwhile: it takes no notice
            self._device.send(protocol.error_reply(request.unique, errno.EAGAIN))
        elif _is_being_killed(parked.pid):
            self._finish(parked, protocol.failure(errno.EINTR))


def _read_local(file: File, fd: int, offset: int, part: memoryview) -> None:
    """Fill part from the descriptor that the file's `ready` gave."""
    if os.preadv(fd, [part], offset) != len(part):
        raise ValueError(f"the local copy of {file!r} ends before {offset + len(part)}")


def _join(threads: list[threading.Thread]) -> bool:
    """Wait a while for threads to end; True when none is left."""
    deadline_s = time.monotonic() + _STOP_TIMEOUT_S
    for thread in threads:
        if thread.is_alive():
            thread.join(max(0.0, deadline_s - time.monotonic()))
    return not any(thread.is_alive() for thread in threads)


def _is_being_killed(pid: int) -> bool:
    """Tell whether SIGKILL is pending for a thread, as it is after any fatal signal (proc_pid_status(5))."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    pending = next((int(line.split()[1], 16) for line in lines if line.startswith("SigPnd:")), 0)
    return bool(pending & 1 << (signal.SIGKILL - 1))
