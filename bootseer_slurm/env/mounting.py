"""Mounting a snapshot that the kernel's driver may not or cannot mount, and layers over one.

A user's squashfs is never given to the kernel's driver, but to squashfuse, run as the job's user; his other
processes cannot reach into it, for it may show what another user published. That cannot
mount without privilege either, so the agent mounts with an open /dev/fuse and hands that descriptor over as
the mount point "/dev/fd/N" (libfuse 3.3, fuse_session_mount).

All mounts lie in a namespace of their own, and jobs get copies: who asks a squashfuse that its user has
stopped waits for ever, and on the host that would be root's `df`. squashfuse itself is not in the namespace,
which would live as long as it does otherwise. The mount points lie in a folder that only root may enter.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import psutil

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User, out_of_reach

_log = logging.getLogger(__name__)

_LOW_LEVEL, _HIGH_LEVEL = "squashfuse_ll", "squashfuse"
_PATH = "/usr/local/bin:/usr/bin:/bin"
_BEGIN_LIMIT_S = 60.0  # a step does not wait that long; the store may be slow
_STOP_TIMEOUT_S = 2.0
_MEMORY_SHARE = 8
_NO_OVERLAY = {errno.ENODEV, errno.EINVAL, errno.EOPNOTSUPP}


class NoOverlay(BootseerError):
    """This kernel cannot mount layers."""


class PrivateMount:
    """A mount in a namespace, at `path`."""

    def __init__(self, namespace: mounts.Namespace, path: Path) -> None:
        self.path = path
        self._namespace = namespace

    @classmethod
    def attach(cls, namespace: mounts.Namespace, fd: int, target: Path) -> PrivateMount:
        """Attach a detached mount at the new folder `target`, if nothing is there; takes the descriptor.

        Raises BootseerError.
        """
        mount = cls(namespace, target)
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not mount._is_there():
                namespace.run(lambda: mounts.move_mount(fd, target))
        except OSError as error:
            raise BootseerError(f"snapshot cannot be attached: {error}") from error
        finally:
            os.close(fd)
        return mount

    def clone(self, *, read_only: bool = True) -> int:
        """A detached mount of it; the caller closes the descriptor. Asks no server. Raises OSError."""
        return self._namespace.run(lambda: mounts.bind_clone(self.path, read_only=read_only))

    def close(self) -> None:
        """Take it away; steps that still run keep theirs."""
        _take_away(self._namespace, self.path)

    def _is_there(self) -> bool:
        return self._namespace.run(lambda: mounts.is_mountpoint(self.path))

    def _is_reattached(self) -> bool:
        """Whether an earlier agent's mount goes on; one whose server died is taken away."""
        return self._namespace.run(lambda: _is_alive(self.path))


class Snapshot(PrivateMount):
    """A snapshot that squashfuse serves."""

    _process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """Of its squashfuse; None of one that an earlier agent began."""
        return self._process.pid if self._process else None

    @classmethod
    def mount(
        cls, namespace: mounts.Namespace, image: Path, target: Path, user: User, *, all_root: bool = False
    ) -> Snapshot:
        """Mount the squashfs `image`, a file that this user may open, at the new folder `target`.

        all_root: all in it is root's, and to be shown as the user's.
        The mount of an agent that was killed is reattached: squashfuse does not end with the agent, but may
        have ended. Raises BootseerError when squashfuse is missing or the mount fails.
        """
        snapshot = cls(namespace, target)
        if snapshot._is_reattached():
            return snapshot
        command = squashfuse(user.uid, user.gid, all_root=all_root)
        if not command:
            raise BootseerError("squashfuse is not installed on this node", hint="apt-get install squashfuse")
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            process = snapshot._serve(command, image, user)
            too_late = threading.Timer(_BEGIN_LIMIT_S, process.kill)  # its user may have stopped it
            too_late.start()
            try:
                namespace.run(lambda: os.listdir(target))  # fails when the image is none
            finally:
                too_late.cancel()
        except (OSError, subprocess.SubprocessError) as error:
            snapshot.close()
            raise BootseerError(f"snapshot cannot be mounted: {error}") from error
        return snapshot

    def _serve(self, command: Sequence[str], image: Path, user: User) -> subprocess.Popen[bytes]:
        """Mount, and have squashfuse serve the mount."""
        fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        try:
            ids = f"user_id={user.uid},group_id={user.gid}"
            options = f"fd={fd},rootmode=40000,{ids},allow_other,default_permissions"
            flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
            self._namespace.run(
                lambda: mounts.mount("squashfuse", self.path, "fuse.squashfuse", flags, options)
            )
            self._process = subprocess.Popen(
                [*out_of_reach(user), *command, "-f", str(image), f"/dev/fd/{fd}"],
                pass_fds=(fd,),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={"LANG": "C.UTF-8", "PATH": _PATH},
                start_new_session=True,
            )
        finally:
            os.close(fd)
        return self._process

    def close(self) -> None:
        """Unmount, and end squashfuse when the last step that uses it is gone (at once if it has to)."""
        super().close()
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # One that a file system holds goes when that answers; subprocess collects it then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)


class Overlay(PrivateMount):
    """Layers over a mounted snapshot: one that was saved, and one to write to.

    The latter is in memory, of the steps that write (their cgroup's), an eighth of the node's at most. It
    goes with the job.
    """

    def __init__(self, namespace: mounts.Namespace, path: Path, *, writable: bool) -> None:
        """The layers that are mounted at `path`; see `mount`."""
        super().__init__(namespace, path)
        self.writable = writable
        self._memory = path.with_name(f"{path.name}.new")

    @classmethod
    def mount(cls, lower: Sequence[PrivateMount], target: Path, user: User, *, writable: bool) -> Overlay:
        """Show these mounts, the topmost first, at the new folder `target`; or reattach what is there.

        writable: for its user. Raises NoOverlay where the kernel has none for these mounts, BootseerError
        where one of these does not answer.
        """
        namespace = lower[0]._namespace
        overlay = cls(namespace, target, writable=writable)
        if overlay._is_reattached():
            return overlay
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            namespace.run(lambda: overlay._mount([each.path for each in lower], user))
        except OSError as error:
            overlay.close()
            kind = NoOverlay if error.errno in _NO_OVERLAY else BootseerError
            raise kind(f"layers of a snapshot cannot be mounted: {error}") from error
        return overlay

    def _mount(self, lower: Sequence[Path], user: User) -> None:
        """Mount it, in the namespace."""
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        options = f"lowerdir={':'.join(map(str, lower))}"
        if self.writable:
            options += self._upper(flags, user)
        else:
            flags |= mounts.MS_RDONLY
        mounts.mount("overlay", self.path, "overlay", flags, options)

    def _upper(self, flags: int, user: User) -> str:
        """Make the layer to write to, or reattach the one there; gives overlayfs's options for it."""
        size_bytes = psutil.virtual_memory().total // _MEMORY_SHARE
        upper, work = self._memory / "upper", self._memory / "work"
        if not mounts.is_mountpoint(self._memory):  # else what was written there is still wanted
            self._memory.mkdir(mode=0o700, exist_ok=True)
            mounts.mount("tmpfs", self._memory, "tmpfs", flags, f"size={size_bytes},mode=0755")
            upper.mkdir(mode=0o755)
            work.mkdir()
            os.chown(upper, user.uid, user.gid)
        return f",upperdir={upper},workdir={work}"

    def close(self) -> None:
        """Take it away; steps that still run keep it."""
        super().close()
        _take_away(self._namespace, self._memory)


def _is_alive(target: Path) -> bool:
    while mounts.is_mountpoint(target):
        try:
            os.listdir(target)
            return True
        except OSError as error:
            _log.warning("%s: mounted anew: %s", target, error.strerror)
            mounts.unmount(target)
    return False


def _take_away(namespace: mounts.Namespace, path: Path) -> None:
    with contextlib.suppress(OSError):
        namespace.run(lambda: mounts.unmount(path))
    with contextlib.suppress(OSError):
        path.rmdir()


def squashfuse(uid: int, gid: int, *, all_root: bool) -> list[str]:
    """The fastest squashfuse of this node, with options; empty when there is none.

    all_root: see Snapshot; the low-level one cannot do that.
    """
    programs = [_HIGH_LEVEL] if all_root else [_LOW_LEVEL, _HIGH_LEVEL]
    program = next(filter(None, (shutil.which(name, path=_PATH) for name in programs)), None)
    if program is None:
        return []
    return [program, "-o", f"uid={uid},gid={gid}"] if all_root else [program]


def unmount_left(namespace: mounts.Namespace, folder: Path) -> None:
    """Take a job's folder of mounts away, with those that an agent made which was killed."""
    for mount in reversed(namespace.run(lambda: mounts.mounts_below(folder))):
        _take_away(namespace, mount.point)
    with contextlib.suppress(OSError):
        folder.rmdir()
