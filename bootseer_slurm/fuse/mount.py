"""A FUSE mount that outlives the processes that serve it.

Owns: the mount, its /dev/fuse descriptor and the descriptor of its ledger; all three live as long as one
process holds them and nobody closes the Mount. Does not own: the answers (server.py), nor who serves.

Processes: one, the supervisor, opens and closes. Its child, forked or started with `fds` and `to_argument`,
serves; when it dies, requests wait in the kernel and in the ledger for the next child. There must be one at a
time: a killed process may still be about to die when its next one starts, but none of its threads may run.
Threads: none are made, and none is needed.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import select
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import ledger, protocol

_log = logging.getLogger(__name__)

_FSTYPE = "fuse.bootseer"
_ANSWER_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Mount:
    """A mounted file system, which `Server` serves.

    point: where. fd: of /dev/fuse. device: "major:minor", as under /sys/class/bdi. flags: what was agreed on
    at INIT. ledger_fd, readers: the ledger's memory, and for how many reader threads it is. key: tells this
    mount from any other.
    """

    point: Path
    fd: int
    readers: int
    key: str
    ledger_fd: int = -1
    device: str = ""
    flags: protocol.InitFlag = protocol.InitFlag(0)

    @classmethod
    def open(cls, point: Path, *, read_ahead_kb: int = 1024, readers: int = 2) -> Mount:
        """Mount at point, which is made when it is missing; from here on, requests wait for a server.

        A dead mount that an earlier supervisor left there is taken away first.
        read_ahead_kb: the kernel's readahead, and so the size of its largest buffered read.
        readers: how many threads of a server take requests. Raises BootseerError.
        """
        # As the kernel names it in mountinfo, without asking what is mounted there now.
        point = Path(os.path.realpath(point.parent), point.name)
        try:
            _remove_dead_mount(point)
            point.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BootseerError(f"cannot use {point} as mount point: {error.strerror}") from error
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise BootseerError(
                f"cannot open /dev/fuse: {error.strerror}", hint="be root, and load it: modprobe fuse"
            ) from error
        mount = cls(point, fd, readers, key=secrets.token_hex(8))
        try:
            mount.ledger_fd = ledger.create(readers)
            mount._mount()
            mount._negotiate()
        except OSError as error:
            mount.close()
            raise BootseerError(
                f"cannot mount FUSE at {point}: {error.strerror}",
                hint="mounting needs CAP_SYS_ADMIN; a container needs --privileged or --cap-add SYS_ADMIN",
            ) from error
        mount._set_read_ahead(read_ahead_kb)
        return mount

    @property
    def fds(self) -> tuple[int, int]:
        """The descriptors that a process needs beside `to_argument`, under the same numbers."""
        return self.fd, self.ledger_fd

    def to_argument(self) -> str:
        """Return all of it as one text (JSON), for a process that has the `fds`."""
        fields = vars(self) | {"point": os.fspath(self.point), "flags": int(self.flags)}
        return json.dumps(fields)

    @classmethod
    def from_argument(cls, text: str, fds: tuple[int, int] | None = None) -> Mount:
        """Take over what `to_argument` gave; processes started from here on do not inherit the descriptors.

        fds: the descriptors, where they have other numbers now.
        Raises ValueError or OSError when it is not that, or a descriptor is not there.
        """
        try:
            fields = json.loads(text)
            fields |= {"point": Path(fields["point"]), "flags": protocol.InitFlag(fields["flags"])}
            if fds is not None:
                fields["fd"], fields["ledger_fd"] = fds
            mount = cls(**fields)
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a mount: {text!r}") from error
        for fd in mount.fds:
            os.set_inheritable(fd, False)
        return mount

    def close(self) -> None:
        """Unmount, even while files are open, and let go of the descriptors; reads under way fail.

        To be called once the serving process has ended, or before `Server.stop` in the same process.
        """
        if self.fd < 0:
            return
        if self.device:
            try:
                mounts.unmount(self.point, force=True)
            except OSError as error:
                _log.warning("cannot unmount %s: %s", self.point, error.strerror)
            if not self._broken():
                self._abort()
        for fd in self.fds:
            if fd >= 0:
                os.close(fd)
        self.fd = self.ledger_fd = -1

    def _mount(self) -> None:
        options = (
            f"fd={self.fd},rootmode=40000,user_id=0,group_id=0,allow_other,default_permissions,"
            f"max_read={protocol.MAX_READ_BYTES}"
        )
        flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
        mounts.mount("bootseer", self.point, _FSTYPE, flags, options)
        # Not by stat(2): that would wait for a server.
        self.device = mounts.mounts_at(self.point)[-1].device

    def _negotiate(self) -> None:
        inbox = memoryview(bytearray(protocol.REQUEST_BUFFER_BYTES))
        request = protocol.parse(inbox[: os.readv(self.fd, [inbox])])
        self.flags, payload = protocol.init_reply(request.body)
        os.writev(self.fd, [protocol.reply_header(request.unique, len(payload)), payload])

    def _set_read_ahead(self, read_ahead_kb: int) -> None:
        control = Path("/sys/class/bdi", self.device, "read_ahead_kb")
        try:
            control.write_text(f"{read_ahead_kb}\n")
        except OSError as error:
            _log.warning("%s: %s: sequential reads will be slower", control, error.strerror)

    def _broken(self) -> bool:
        """Tell whether the connection is at an end: then poll(2) of /dev/fuse says POLLERR."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        return any(events & select.POLLERR for _, events in poll.poll(0))

    def _abort(self) -> None:
        """Break the connection when its mount was no longer ours to unmount; needs fusectl to be mounted."""
        control = Path("/sys/fs/fuse/connections", self.device.partition(":")[2], "abort")
        try:
            control.write_text("1\n")
        except OSError as error:
            _log.error("%s: %s: what has %s open waits on", control, error.strerror, self.point)


def _remove_dead_mount(point: Path) -> None:
    """Unmount what a killed supervisor left at point; raises BootseerError when something there is alive."""
    while there := mounts.mounts_at(point):
        if there[-1].fstype != _FSTYPE or _is_served(point):
            raise BootseerError(
                f"{point} is in use: {there[-1].source} ({there[-1].fstype}) is mounted there",
                hint="stop the agent that serves it, or choose another folder",
            )
        _log.warning("%s: taking away the mount of an agent that is gone", point)
        mounts.unmount(point, force=True)


def _is_served(point: Path) -> bool:
    """Ask the server of a mount, in a process: nobody may be reading what somebody holds open.

    By statvfs(3), since the kernel may answer stat(2) from memory; it says ENOTCONN when nobody has the
    descriptor.
    """
    code = "import os, sys\ntry: os.statvfs(sys.argv[1])\nexcept OSError: sys.exit(1)"
    # Not waited for once it is killed: who waits for a server that took the request cannot be.
    asking = subprocess.Popen([sys.executable, "-IS", "-c", code, point], stdin=subprocess.DEVNULL)
    try:
        return asking.wait(_ANSWER_TIMEOUT_S) == 0
    except subprocess.TimeoutExpired:
        asking.kill()
        return False
