"""Packing: a squashfs that the agent makes of a user's tar, so that its structure is no user's work.

The user gives content only: a tar stream through a pipe. mksquashfs reads it as a *packer*, a user id that
nobody has, one for each packing at a time, without groups, capabilities or a way to get any. It has a network
namespace of its own and a filter of system calls. The agent takes the result away from the packer, when no
process of it is left, before it reads the digests that get signed. Set-user-id bits and device nodes go into
the image as they come: all files are root's there, and the mounts that steps get are nosuid and nodev, locked
(see `kernel_mount`).

On disk: `folder`, below the cache's, only for root to enter; in it <ticket>/, 0700, the packer's: image, log.
A result is an open file without a name, and no user has two: the next packing waits until the last one's
result is closed, and when the user's last job ends it is emptied. What a killed agent left is removed, and
its packers are killed, by the next one.

Thread-safe. One packing for each user, one for each of PACKER_UIDS on a node; each has a time limit.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import pwd
import secrets
import shutil
import stat
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import psutil

from bootseer_slurm.blob.digest import PREFERRED
from bootseer_slurm.blob.manifest import SQUASHFS_BLOCK_BYTES, Layout, Manifest
from bootseer_slurm.blob.squashfs import mksquashfs
from bootseer_slurm.blob.squashfs.compression import COMPRESSIONS
from bootseer_slurm.blob.squashfs.superblock import check_squashfs
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.identity import without_rights
from bootseer_slurm.seccomp import with_files_only

_log = logging.getLogger(__name__)

# Of the range that distributions leave to services without a fixed id (systemd's UIDS-GIDS.md).
PACKER_UIDS = range(61872, 61875)
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_COMPRESSION = "zstd"
_QUICK = frozenset({"image"})  # a job waits for its image; none waits for a snapshot: see env/archive.py
_MEMORY_MIB = 1024
_ADDRESS_SPACE_BYTES = 8 * 2**30  # mksquashfs has some stacks and buffers for each thread
_OPEN_FILES = 64
_THREADS = 256
_LOG_TAIL_BYTES = 2000
_KILL_TIMEOUT_S = 5.0
_CLAIM_S = 60.0  # for who packs to ask for the result, once it is there
_HASH_THREADS = 2
_HASH_RUN_BLOCKS = 256


@dataclass(frozen=True, slots=True)
class Packed:
    """A finished image: a read-only descriptor of a file of root without a name, and what its bytes are."""

    fd: int
    manifest: Manifest

    @property
    def size_bytes(self) -> int:
        return self.manifest.layout.size_bytes


@dataclass(slots=True)
class _Run:
    ticket: str
    kind: str
    uid: int
    packer_uid: int
    folder: Path
    process: subprocess.Popen[bytes]
    log: BinaryIO
    claimed: threading.Event = field(default_factory=threading.Event)
    ended: str = ""  # why it was killed


class Packer:
    """Packs for the users of this node."""

    def __init__(
        self, folder: Path, *, max_bytes: int, min_free_bytes: int = 0, time_limit_s: float = 3600.0
    ) -> None:
        """Use `folder`, whose parent only root may enter; what is in it and its processes are removed.

        max_bytes: of one image. min_free_bytes: what the disk keeps free. time_limit_s: from `start` to the
        end of the stream. Raises BootseerError when the folder cannot be used.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        self._min_free_bytes = min_free_bytes
        self._time_limit_s = time_limit_s
        self._packings: dict[str, _Run] = {}
        self._results: dict[int, int] = {}  # of each user, as a descriptor of our own
        self._lock = threading.Lock()
        self._packers = [uid for uid in PACKER_UIDS if not _is_user(uid)]
        for uid in list(self._packers):
            try:
                _kill_processes(uid)
            except BootseerError as error:
                _log.warning("%s: it packs no more", error.message)
                self._packers.remove(uid)
        try:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise BootseerError(f"{folder}: cannot be used for packing: {error.strerror}") from error

    def start(self, uid: int, kind: str = "image", compression: str = "") -> tuple[int, str]:
        """Begin to pack for a user: the write end of a pipe for the tar, and a ticket. The caller closes it.

        kind: "image" or "environment", of the blob that it becomes. compression: one of COMPRESSIONS, "" for
        what is usual for the kind. Raises InputError for another one; BootseerError when another packing of
        the user or too many run, or mksquashfs cannot be started.
        """
        if compression and compression not in COMPRESSIONS:
            raise InputError(f"{compression[:40]!r} is no compression")
        quick = not compression and kind in _QUICK
        squash = mksquashfs.from_tar("image", compression or _COMPRESSION, quick=quick, all_root=True)
        with self._lock:
            if any(packing.uid == uid for packing in self._packings.values()):
                raise BootseerError(f"an image of uid {uid} is being packed on this node", hint="wait for it")
            if not self._is_closed(uid):
                raise BootseerError(f"an image that was packed for uid {uid} is still open on this node")
            taken = {packing.packer_uid for packing in self._packings.values()}
            free = [packer for packer in self._packers if packer not in taken]
            if not free:
                raise BootseerError("too many images are being packed on this node", hint="try again later")
            free_bytes = psutil.disk_usage(str(self._folder)).free - self._min_free_bytes
            limit_bytes = min(self._max_bytes, free_bytes // len(PACKER_UIDS))
            if limit_bytes <= 0:
                raise BootseerError(f"{self._folder}: the disk has no room for packing")
            ticket = secrets.token_hex(16)
            command = _command(squash, free[0], limit_bytes)
            packing, fd = self._launch(ticket, kind, uid, free[0], command)
            self._packings[ticket] = packing
            threading.Thread(target=self._watch, args=(packing,), name="packing", daemon=True).start()
            return fd, ticket

    def _launch(
        self, ticket: str, kind: str, uid: int, packer_uid: int, command: list[str]
    ) -> tuple[_Run, int]:
        folder = self._folder / ticket
        read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
        try:
            folder.mkdir(mode=0o700)
            log = (folder / "log").open("w+b")
            os.chown(folder, packer_uid, packer_uid)
            process = subprocess.Popen(
                command,
                stdin=read_fd,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={"PATH": _PATH, "LANG": "C.UTF-8"},
                start_new_session=True,
            )
        except (OSError, subprocess.SubprocessError) as error:
            os.close(write_fd)
            shutil.rmtree(folder, ignore_errors=True)
            raise BootseerError(f"packing cannot be started: {error}") from error
        finally:
            os.close(read_fd)
        return _Run(ticket, kind, uid, packer_uid, folder, process, log), write_fd

    def _watch(self, packing: _Run) -> None:
        """End a packing that takes too long, or whose result nobody asks for (a thread of its own)."""
        try:
            packing.process.wait(self._time_limit_s)
        except subprocess.TimeoutExpired:
            self._end(packing.ticket, "it took too long")
        else:
            if not packing.claimed.wait(_CLAIM_S):
                self._end(packing.ticket, "nobody asked for it")

    def _is_closed(self, uid: int) -> bool:
        """Whether nobody has this user's last result open, as a lease says (F_SETLEASE, fcntl(2))."""
        fd = self._results.get(uid)
        if fd is None:
            return True
        try:
            fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        except BlockingIOError:
            return False
        except OSError as error:  # a file system that has no leases
            _log.debug("%s: %s", self._folder, error)
        os.close(self._results.pop(uid))
        return True

    def finish(self, uid: int, ticket: str, *, timeout_s: float) -> Packed:
        """Wait until the image of this user's ticket is whole, and take it. The caller closes its descriptor.

        timeout_s: for mksquashfs after the stream's end. Raises NotFound for a ticket that is not the
        user's, BootseerError with what mksquashfs said, or what is wrong with its result; nothing is left.
        """
        with self._lock:
            packing = self._packings.get(ticket)
            if packing is None or packing.uid != uid or packing.claimed.is_set():
                raise NotFound("no such packing on this node")
            packing.claimed.set()
        try:
            packing.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._end(ticket, "its stream did not end")
        try:
            _kill_processes(packing.packer_uid)
            if packing.ended or packing.process.returncode != 0:
                raise BootseerError(f"image was not packed: {packing.ended or _last_words(packing.log)}")
            fd = _take(packing.folder, self._max_bytes)
        finally:
            self._forget(packing)
        try:
            packed = Packed(fd, Manifest(packing.kind, *_digest(fd)))
            with self._lock:
                self._results[uid] = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
            return packed
        except BaseException:
            os.close(fd)
            raise

    def cancel(self, uid: int) -> None:
        """Kill the packing of a user, if there is one, and empty his last result: his last job has ended."""
        with self._lock:
            tickets = [packing.ticket for packing in self._packings.values() if packing.uid == uid]
            result = self._results.pop(uid, None)
        for ticket in tickets:
            self._end(ticket, "the job ended")
        if result is not None:
            os.ftruncate(result, 0)
            os.close(result)

    def close(self) -> None:
        """Kill all packings."""
        with self._lock:
            tickets = list(self._packings)
            users = list(self._results)
        for ticket in tickets:
            self._end(ticket, "the agent stopped")
        for uid in users:
            self.cancel(uid)

    def _end(self, ticket: str, reason: str) -> None:
        """Kill a packing and forget it; `finish`, which may be waiting for it, says the reason."""
        with self._lock:
            packing = self._packings.get(ticket)
            if packing is None or packing.ended:
                return
            packing.ended = reason
        packing.process.kill()  # which is root's for its first moments
        try:
            _kill_processes(packing.packer_uid)
        finally:
            packing.claimed.set()
            self._forget(packing)

    def _forget(self, packing: _Run) -> None:
        packing.log.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            packing.process.wait(_KILL_TIMEOUT_S)
        shutil.rmtree(packing.folder, ignore_errors=True)
        with self._lock:
            self._packings.pop(packing.ticket, None)


def _command(squash: list[str], packer_uid: int, limit_bytes: int) -> list[str]:
    """mksquashfs as a packer, with nothing to gain."""
    processors = max(1, (os.cpu_count() or 1) // 2)  # jobs run beside it
    return [
        *("unshare", "--net", "--"),
        *with_files_only(without_rights(packer_uid)),
        *("prlimit", f"--fsize={limit_bytes}", f"--nofile={_OPEN_FILES}", f"--nproc={_THREADS}", "--core=0"),
        *(f"--as={_ADDRESS_SPACE_BYTES}", "--"),
        *("nice", "-n", "5", *squash),
        *("-processors", str(processors), "-mem", f"{_MEMORY_MIB}M"),
    ]


def _is_user(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    _log.warning("uid %d is a user of this node: not used for packing", uid)
    return True


def _kill_processes(uid: int) -> None:
    """Kill all processes of a packer and wait until none is left. Raises BootseerError."""
    deadline_s = time.monotonic() + _KILL_TIMEOUT_S
    while True:
        alive = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess):
                if uid in process.uids() and process.status() != psutil.STATUS_ZOMBIE:
                    process.kill()
                    alive.append(process.pid)
        if not alive:
            return
        if time.monotonic() > deadline_s:
            raise BootseerError(f"processes of packer {uid} cannot be killed: {alive[:5]}")
        time.sleep(0.01)


def _last_words(log: BinaryIO) -> str:
    """The last line of mksquashfs that can be shown. log: as we opened it, whatever has its name."""
    try:
        log.seek(max(0, os.fstat(log.fileno()).st_size - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    except (OSError, ValueError):  # ValueError: it was ended meanwhile
        lines = []
    line = next((line for line in reversed(lines) if line.strip()), "mksquashfs was killed")
    return "".join(c if c.isprintable() else "?" for c in line)[:300]


def _take(folder: Path, max_bytes: int) -> int:
    """Take the image away from its packer, of whom no process is left; a descriptor to read it.

    Raises BootseerError when there is something else in its place.
    """
    os.chown(folder, 0, 0)
    try:
        fd = os.open(folder / "image", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise BootseerError(f"image was not packed: {error.strerror}") from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise BootseerError("image was not packed: its packer left no plain file")
        if status.st_size > max_bytes:
            raise BootseerError(f"image was not packed: {status.st_size} bytes are too many")
        os.fchown(fd, 0, 0)
        os.fchmod(fd, 0o400)
        check_squashfs(_Image(fd, status.st_size), "of the packer")
    except BaseException as error:
        os.close(fd)
        if isinstance(error, InputError):
            raise BootseerError(error.message) from error
        raise
    return fd


@dataclass(slots=True)
class _Image:
    """An open file, as the superblock is read from."""

    fd: int
    size_bytes: int

    def read_into(self, offset: int, view: memoryview) -> int:
        return os.preadv(self.fd, [view], offset)

    def close(self) -> None:
        """The file belongs to the caller."""


def _digest(fd: int) -> tuple[Layout, bytes]:
    """Layout and digests of a file, by some threads."""
    layout = Layout(os.fstat(fd).st_size, SQUASHFS_BLOCK_BYTES, digest=PREFERRED)

    def digest_run(first: int) -> bytes:
        digests = bytearray()
        for block in range(first, min(first + _HASH_RUN_BLOCKS, layout.blocks)):
            content = os.pread(fd, layout.block_bytes, block * layout.block_bytes)
            if len(content) != layout.block_size(block):
                raise BootseerError("the packed image became shorter while it was read")
            digests += layout.digests_of(memoryview(content))
        return bytes(digests)

    with ThreadPoolExecutor(_HASH_THREADS, "bootseer-pack") as pool:
        return layout, b"".join(pool.map(digest_run, range(0, layout.blocks, _HASH_RUN_BLOCKS)))
