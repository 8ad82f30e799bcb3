"""Showing a snapshot that the kernel's driver may not or cannot mount, and writing over one.

A user's squashfs is never given to the kernel's driver, but to squashfuse, run as the job's user. That cannot
mount without privilege either, so the agent mounts with an open /dev/fuse and hands that descriptor over as
the mount point "/dev/fd/N" (libfuse 3.3, fuse_session_mount). The mount point lies in a folder that only root
may enter; jobs see the mount through their shadow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

import psutil

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError

_log = logging.getLogger(__name__)

_LOW_LEVEL, _HIGH_LEVEL = "squashfuse_ll", "squashfuse"
_PATH = "/usr/local/bin:/usr/bin:/bin"
_STOP_TIMEOUT_S = 2.0
_MEMORY_SHARE = 8
_UNPACK_LIMIT_S = 900.0


class Snapshot:
    """A mounted snapshot."""

    def __init__(self, image: Path, target: Path, *, uid: int, gid: int, all_root: bool = False) -> None:
        """Mount the squashfs `image`, a file that this user may open, at the new folder `target`.

        all_root: all in it is root's, and to be shown as the user's.
        Where an agent that was killed mounted it already, that mount goes on being used: squashfuse does not
        end with the agent, but may have ended. Raises BootseerError when squashfuse is missing or the mount
        fails.
        """
        self.path = target
        self._process: subprocess.Popen[bytes] | None = None
        while mounts.is_mountpoint(target):
            try:
                os.listdir(target)
                return
            except OSError as error:
                _log.warning("%s: mounted anew: %s", target, error.strerror)
                mounts.unmount(target)
        command = squashfuse(uid, gid, all_root=all_root)
        if not command:
            raise BootseerError("squashfuse is not installed on this node", hint="apt-get install squashfuse")
        options = f"rootmode=40000,user_id={uid},group_id={gid},allow_other,default_permissions"
        flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise BootseerError(f"snapshot cannot be mounted: {error}") from error
        try:
            fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
            try:
                mounts.mount("squashfuse", target, "fuse.squashfuse", flags, f"fd={fd},{options}")
                self._process = subprocess.Popen(
                    [*command, "-f", str(image), f"/dev/fd/{fd}"],
                    pass_fds=(fd,),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    env={"LANG": "C.UTF-8"},
                    user=uid,
                    group=gid,
                    extra_groups=[],
                    start_new_session=True,
                )
            finally:
                os.close(fd)
            os.listdir(target)  # waits for squashfuse; fails when the image is none
        except (OSError, subprocess.SubprocessError) as error:
            self.close()
            raise BootseerError(f"snapshot cannot be mounted: {error}") from error

    def close(self) -> None:
        """Unmount, and end squashfuse when the last step that uses it is gone (at once if it has to)."""
        with contextlib.suppress(OSError):
            mounts.unmount(self.path)
        with contextlib.suppress(OSError):
            self.path.rmdir()
        if self._process is None:
            return
        try:
            self._process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            # One that a file system holds goes when that answers; subprocess collects it then.
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)


class Unpacked:
    """A snapshot as files on the node's disk: the last resort, where no squashfuse is installed."""

    def __init__(self, image: Path, folder: Path, *, uid: int, gid: int) -> None:
        """Unpack the squashfs `image` below the new folder `folder`, as its user; or take up what is there.

        folder: where only root may enter. Reads all of the image, so it takes long. Raises BootseerError when
        unsquashfs is missing or fails; nothing is left then.
        """
        self.path = folder / "tree"
        self._folder = folder
        done = folder / "done"
        if done.exists():
            return
        shutil.rmtree(folder, ignore_errors=True)
        try:
            self.path.mkdir(mode=0o755, parents=True)
            os.chown(self.path, uid, gid)
            unpacking = subprocess.run(
                ["nice", "unsquashfs", "-no-progress", "-quiet", "-force", "-dest", ".", str(image)],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                cwd=self.path,  # entered as root: its user could not by path
                env={"PATH": _PATH, "LANG": "C.UTF-8"},
                user=uid,
                group=gid,
                extra_groups=[],
                start_new_session=True,
                timeout=_UNPACK_LIMIT_S,
                check=False,
            )
            if unpacking.returncode:
                said = unpacking.stderr.strip().splitlines() or ["unsquashfs failed"]
                raise BootseerError(f"snapshot cannot be unpacked: {said[-1]}")
            done.touch()
        except (OSError, subprocess.SubprocessError) as error:
            raise BootseerError(f"snapshot cannot be unpacked: {error}") from error
        finally:
            if not done.exists():
                self.close()

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()


class Layer:
    """A place to write over a mounted snapshot, in memory, and gone with the job.

    The memory is that of the steps that write (their cgroup's), an eighth of the node's at most.
    """

    def __init__(self, lower: Path, target: Path, *, uid: int, gid: int) -> None:
        """Show the mount `lower` at the new folder `target`, writable for its user; or take up what is there.

        Raises BootseerError where the kernel has no overlay for this mount.
        """
        self.path = target
        self._memory = target.with_name(f"{target.name}.new")
        if mounts.is_mountpoint(target):
            return
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        size_bytes = psutil.virtual_memory().total // _MEMORY_SHARE
        try:
            for folder in (target, self._memory):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mounts.mount("tmpfs", self._memory, "tmpfs", flags, f"size={size_bytes},mode=0755")
            upper, work = self._memory / "upper", self._memory / "work"
            upper.mkdir(mode=0o755)
            work.mkdir()
            os.chown(upper, uid, gid)
            options = f"lowerdir={lower},upperdir={upper},workdir={work}"
            mounts.mount("overlay", target, "overlay", flags, options)
        except OSError as error:
            self.close()
            raise BootseerError(f"snapshot cannot be made writable: {error}") from error

    def close(self) -> None:
        """Take it away; steps that still run keep it."""
        for path in (self.path, self._memory):
            with contextlib.suppress(OSError):
                mounts.unmount(path)
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


def unpacked_folder(cache: Path) -> Path:
    """Where in the cache's folder unpacked snapshots lie, each in the folder of its job, <job>.<restart>."""
    return cache / ".unpacked"


def unmount_left(folder: Path) -> None:
    """Take a job's folder of mounts away, with those that an agent made which was killed."""
    for mount in reversed(mounts.mounts_below(folder)):
        with contextlib.suppress(OSError):
            mounts.unmount(mount.point)
        with contextlib.suppress(OSError):
            mount.point.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
