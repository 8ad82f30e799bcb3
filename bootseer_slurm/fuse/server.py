"""The server of the node's FUSE mount: takes the kernel's requests from /dev/fuse and answers them.

Owns: the mount, the /dev/fuse descriptor, and the threads. Does not own: the tree (tree.py), the layout of
messages (kernel.py), and where bytes come from (File).

Threads: `threads` readers take requests. What is local they answer themselves: one pread, one writev, no
lock. A read that has to wait goes to one of `blocking_threads` fetchers, so that nothing a store does can
hold up a reader; when all of these wait, further such reads queue, and everything else goes on. All are
daemon threads: a fetch that never comes back does not keep the process from ending.

Deadlocks to know of: a notification may wait in the kernel until a request for the same directory is
answered, so the caller of `add` or `remove` sends it, never a server thread, and no lock that a server thread
takes is held meanwhile. The process that serves must not touch a mapping (mmap) of its own files: the page
fault holds the interpreter lock that the answer needs. A child forked from it that does not exec keeps the
mount alive after it.
"""

from __future__ import annotations

import errno
import logging
import mmap
import os
import queue
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import kernel
from bootseer_slurm.fuse.kernel import Opcode, Request
from bootseer_slurm.fuse.tree import File, Tree

_log = logging.getLogger(__name__)

_FSTYPE = "fuse.bootseer"
_VALID_S = 86400  # names and attributes never change without a notification
_ANSWER_TIMEOUT_S = 5.0
_STOP_TIMEOUT_S = 2.0
# The positions of a listing begin with these; a child's is its node id and their number.
_DOTS = ((1, b"."), (2, b".."))
_ENTRY_BYTES = kernel.ENTRY_OUT.size + kernel.ATTR.size
# What a write to /dev/fuse says when nobody waits for it: not known, taken back, or the mount is gone.
_NOBODY_WAITS = frozenset({errno.ENOENT, errno.ENODEV, errno.ENOTCONN, errno.ECONNABORTED, errno.EPERM})
_Waiting = tuple[int, File, int, int]  # unique, file, offset, size


class Server:
    """Serves files read-only below mountpoint; for one start and one stop.

    threads: readers of /dev/fuse. blocking_threads: how many reads may wait for the store at a time.
    read_ahead_kb: the kernel's readahead, and so the size of its largest buffered read.
    """

    def __init__(
        self, mountpoint: Path, *, threads: int = 2, blocking_threads: int = 64, read_ahead_kb: int = 1024
    ) -> None:
        # As the kernel names it in mountinfo, without asking what is mounted there now.
        self._mountpoint = Path(os.path.realpath(mountpoint.parent), mountpoint.name)
        self._read_ahead_kb = read_ahead_kb
        self._tree = Tree()
        self._device = -1
        self._device_lock = threading.Lock()  # notifications against close; server threads do not take it
        self._number = ""  # "major:minor" of the mount, once there is one
        self._zero_message_open = False
        self._waiting: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._waiting_pids: dict[int, int] = {}  # unique -> who waits; whoever pops it answers the request
        self._readers = [self._thread("fuse", self._serve) for _ in range(threads)]
        self._fetchers = [self._thread("fuse-fetch", self._fetch) for _ in range(blocking_threads)]
        self._handlers: dict[int, Callable[[Request], bytes | None]] = {
            Opcode.LOOKUP: self._look_up,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._get_attributes,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: lambda request: kernel.open_reply(),
            Opcode.READDIR: lambda request: self._list(request, plus=False),
            Opcode.READDIRPLUS: lambda request: self._list(request, plus=True),
            Opcode.STATFS: lambda request: kernel.statfs_reply(*self._tree.totals()),
            Opcode.INTERRUPT: self._interrupt,
            **dict.fromkeys((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.DESTROY), lambda request: b""),
        }

    def start(self) -> None:
        """Mount and serve; the mountpoint is made when it is missing.

        A dead mount that an earlier server left there is taken away first. Raises BootseerError.
        """
        try:
            _remove_dead_mount(self._mountpoint)
            self._mountpoint.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BootseerError(f"cannot use {self._mountpoint} as mount point: {error.strerror}") from error
        try:
            self._device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BootseerError(
                f"cannot open /dev/fuse: {error.strerror}", hint="be root, and load it: modprobe fuse"
            ) from error
        try:
            self._mount()
            self._negotiate()
        except OSError as error:
            self.stop()
            raise BootseerError(
                f"cannot mount FUSE at {self._mountpoint}: {error.strerror}",
                hint="mounting needs CAP_SYS_ADMIN; a container needs --privileged or --cap-add SYS_ADMIN",
            ) from error
        self._set_read_ahead()
        for thread in (*self._readers, *self._fetchers):
            thread.start()

    def add(self, path: str, file: File) -> Path:
        """Show file at path, "<uid>/<name>"; return its absolute path, which is usable at once.

        Raises ValueError (path has another form) or FileExistsError.
        """
        directory_id = self._tree.add(path, file)
        self._notify(kernel.notify_inval_inode(directory_id))
        return self._mountpoint / path

    def remove(self, path: str) -> None:
        """Take the name away; what has the file open, mapped or bound elsewhere goes on reading it.

        Not to be called by a File. Raises ValueError or FileNotFoundError.
        """
        for parent_id, name in self._tree.remove(path):
            self._notify(kernel.notify_inval_entry(parent_id, name))

    def stop(self) -> None:
        """Unmount, even while files are open, and end the threads; reads under way fail."""
        if self._device < 0:
            return
        if self._number:
            try:
                mounts.unmount(self._mountpoint, force=True)
            except OSError as error:
                _log.warning("cannot unmount %s: %s", self._mountpoint, error.strerror)
        if not _join(self._readers):
            self._abort()
        self._waiting_pids.clear()  # from here on, what a fetch brings is dropped
        for _ in self._fetchers:
            self._waiting.put(None)
        if not _join(self._fetchers):
            _log.warning("%s: some reads still wait for the store", self._mountpoint)
        if _join(self._readers):
            with self._device_lock:
                os.close(self._device)
                self._device = -1

    # The mount

    def _mount(self) -> None:
        options = (
            f"fd={self._device},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
            f"max_read={kernel.MAX_READ_BYTES}"
        )
        flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("bootseer", self._mountpoint, _FSTYPE, flags, options)
        # Not by stat(2): that would ask this very server, which does not run yet.
        self._number = mounts.mounts_at(self._mountpoint)[-1].device

    def _negotiate(self) -> None:
        inbox = memoryview(bytearray(kernel.REQUEST_BUFFER_BYTES))
        request = kernel.parse(inbox[: os.readv(self._device, [inbox])])
        agreed, payload = kernel.init_reply(request.body)
        self._zero_message_open = kernel.InitFlag.NO_OPEN_SUPPORT in agreed
        self._reply(request.unique, payload)

    def _set_read_ahead(self) -> None:
        control = Path("/sys/class/bdi", self._number, "read_ahead_kb")
        try:
            control.write_text(f"{self._read_ahead_kb}\n")
        except OSError as error:
            _log.warning("%s: %s: sequential reads will be slower", control, error.strerror)

    def _abort(self) -> None:
        """Break the connection when its mount was no longer ours to unmount; needs fusectl to be mounted."""
        control = Path("/sys/fs/fuse/connections", self._number.partition(":")[2], "abort")
        try:
            control.write_text("1\n")
        except OSError as error:
            _log.error("%s: %s: the threads of %s go on", control, error.strerror, self._mountpoint)

    # The threads

    def _thread(self, name: str, step: Callable[[], None]) -> threading.Thread:
        return threading.Thread(target=step, name=f"bootseer-{name}", daemon=True)

    def _serve(self) -> None:
        """Life of a reader: answer requests until the file system is gone."""
        inbox = memoryview(bytearray(kernel.REQUEST_BUFFER_BYTES))
        outbox = memoryview(mmap.mmap(-1, kernel.MAX_READ_BYTES))
        while True:
            try:
                message = inbox[: os.readv(self._device, [inbox])]
            except OSError as error:
                if error.errno in (errno.ENODEV, errno.ECONNABORTED):
                    return
                if error.errno != errno.ENOENT:  # the request was taken back
                    _log.error("/dev/fuse of %s: %s", self._mountpoint, error.strerror)
                    time.sleep(0.1)
                continue
            self._answer(kernel.parse(message), outbox)

    def _answer(self, request: Request, outbox: memoryview) -> None:
        try:
            payload: memoryview | bytes | None
            if request.opcode == Opcode.READ:
                payload = self._read(request, outbox)
            elif request.opcode in self._handlers:
                payload = self._handlers[request.opcode](request)
            else:  # ENOSYS: the kernel does not ask again
                raise kernel.failure(errno.EROFS if request.opcode in kernel.WRITING else errno.ENOSYS)
            if payload is not None:
                self._reply(request.unique, payload)
        except BaseException as error:  # some extension modules raise past Exception; the thread must live
            self._fail(request.unique, error)

    def _fetch(self) -> None:
        """Life of a fetcher."""
        while self._fetch_next():
            pass

    def _fetch_next(self) -> bool:
        """Answer one waiting read; False at the end. Has its own frame: an idle thread holds no File."""
        waiting = self._waiting.get()
        if waiting is None:
            return False
        unique, file, offset, size = waiting
        if unique not in self._waiting_pids:
            return True
        try:
            data = memoryview(file.fetch(offset, size)).cast("B")
            if len(data) != size:
                raise ValueError(f"{len(data)} bytes came instead of {size} at {offset}")
        except BaseException as error:
            if self._waiting_pids.pop(unique, None) is not None:
                self._fail(unique, error)
        else:
            if self._waiting_pids.pop(unique, None) is not None:
                self._reply(unique, data)
        return True

    # Messages to the kernel

    def _send(self, *parts: bytes | memoryview) -> bool:
        """Write one message; False when the kernel has no use for it."""
        try:
            os.writev(self._device, parts)
        except OSError as error:
            if error.errno not in _NOBODY_WAITS:
                _log.error("/dev/fuse of %s: cannot write: %s", self._mountpoint, error.strerror)
            return False
        return True

    def _reply(self, unique: int, payload: bytes | memoryview) -> bool:
        return self._send(kernel.reply_header(unique, len(payload)), payload)

    def _fail(self, unique: int, error: BaseException) -> None:
        number = errno.EIO
        if not isinstance(error, OSError):
            _log.error("%s: a request failed", self._mountpoint, exc_info=error)
        elif error.errno and error.errno in errno.errorcode:  # the kernel ignores replies with other numbers
            number = error.errno
        self._send(kernel.error_reply(unique, number))

    def _notify(self, message: bytes) -> None:
        with self._device_lock:
            if self._number and self._device >= 0:
                self._send(message)

    # Requests

    def _read(self, request: Request, outbox: memoryview) -> memoryview | None:
        _fh, offset, asked, _, _, _, _ = kernel.READ_IN.unpack_from(request.body)
        file = self._tree.get(request.node_id).file
        if file is None:
            raise kernel.failure(errno.EISDIR)
        size = max(0, min(asked, file.size_bytes - offset))
        part = outbox[:size]
        if size == 0:
            return part
        fd = file.ready(offset, size)
        if fd is None:
            self._waiting_pids[request.unique] = request.pid
            self._waiting.put((request.unique, file, offset, size))
            return None
        if os.preadv(fd, [part], offset) != size:
            raise ValueError(f"the local copy of {file!r} ends before {offset + size}")
        return part

    def _interrupt(self, request: Request) -> None:
        """Let go of a process that is being killed and waits in O_DIRECT; buffered readers need no help.

        Other signals do not count: a read of an ordinary file does not end with EINTR.
        """
        (unique,) = kernel.INTERRUPT_IN.unpack_from(request.body)
        pid = self._waiting_pids.get(unique)
        if pid is None:  # not here yet: the kernel asks again; answered meanwhile: it takes no notice
            self._send(kernel.error_reply(request.unique, errno.EAGAIN))
        elif _is_being_killed(pid) and self._waiting_pids.pop(unique, None) is not None:
            self._send(kernel.error_reply(unique, errno.EINTR))

    def _look_up(self, request: Request) -> None:
        node = self._tree.look_up(request.node_id, bytes(request.body).partition(b"\0")[0])
        if not self._reply(request.unique, kernel.entry_reply(node.id, node.attr, _VALID_S)):
            self._tree.forget(node.id, 1)

    def _forget(self, request: Request) -> None:
        self._tree.forget(request.node_id, *kernel.FORGET_IN.unpack_from(request.body))

    def _batch_forget(self, request: Request) -> None:
        for node_id, lookups in kernel.forgets(request.body):
            self._tree.forget(node_id, lookups)

    def _get_attributes(self, request: Request) -> bytes:
        return kernel.attr_reply(self._tree.get(request.node_id).attr, _VALID_S)

    def _open(self, request: Request) -> bytes:
        if self._zero_message_open:
            raise kernel.failure(errno.ENOSYS)
        return kernel.open_reply(kernel.FOPEN_KEEP_CACHE)

    def _list(self, request: Request, *, plus: bool) -> None:
        _fh, offset, room, _, _, _, _ = kernel.READ_IN.unpack_from(request.body)
        this = self._tree.get(request.node_id)
        entries = [(position, name, this) for position, name in _DOTS if position > offset]
        children = self._tree.entries(this.id, after_id=offset - len(_DOTS))
        entries += [(node.id + len(_DOTS), name, node) for name, node in children]
        records: list[bytes] = []
        looked_up: list[int] = []
        for position, name, node in entries:
            record = kernel.directory_entry(node.id, position, node.mode, name)
            room -= len(record) + (_ENTRY_BYTES if plus else 0)
            if room < 0:
                break
            if plus:  # node id 0 says: only a name
                counted = node is not this and self._tree.count_lookup(node)
                if counted:
                    looked_up.append(node.id)
                records.append(kernel.entry_reply(node.id if counted else 0, node.attr, _VALID_S))
            records.append(record)
        if not self._reply(request.unique, b"".join(records)):
            for node_id in looked_up:
                self._tree.forget(node_id, 1)


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


def _remove_dead_mount(mountpoint: Path) -> None:
    """Unmount what a killed server left at mountpoint; raises BootseerError when something there is alive."""
    while there := mounts.mounts_at(mountpoint):
        if there[-1].fstype != _FSTYPE or _is_served(mountpoint):
            raise BootseerError(
                f"{mountpoint} is in use: {there[-1].source} ({there[-1].fstype}) is mounted there",
                hint="stop the agent that serves it, or choose another folder",
            )
        _log.warning("%s: taking away the mount of a server that is gone", mountpoint)
        mounts.unmount(mountpoint, force=True)


def _is_served(mountpoint: Path) -> bool:
    """Ask the server of a mount. statvfs(3), since the kernel may answer stat(2) from memory."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            os.statvfs(mountpoint)
            answers.append(True)
        except OSError:  # ENOTCONN: nobody has /dev/fuse open
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # nobody may be reading what somebody holds open
    thread.start()
    thread.join(_ANSWER_TIMEOUT_S)
    return bool(answers) and answers[0]
