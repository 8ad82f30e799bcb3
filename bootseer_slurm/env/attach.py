"""Mounting a snapshot: squashfuse, run as the job's user over a mount that the agent made.

A user's squashfs is never given to the kernel's driver. squashfuse cannot mount without privilege either, so
the agent mounts with an open /dev/fuse and hands that descriptor over as the mount point "/dev/fd/N"
(libfuse 3.3, fuse_session_mount). The mount point lies in a folder that only root may enter; jobs see the
mount through their shadow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import subprocess
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError

_log = logging.getLogger(__name__)

_PROGRAMS = ("squashfuse_ll", "squashfuse")
_PATH = "/usr/local/bin:/usr/bin:/bin"
_STOP_TIMEOUT_S = 2.0


class Snapshot:
    """A mounted snapshot."""

    def __init__(self, image: Path, target: Path, *, uid: int, gid: int) -> None:
        """Mount the squashfs `image`, a file that this user may open, at the new folder `target`.

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
        program = next(filter(None, (shutil.which(name, path=_PATH) for name in _PROGRAMS)), None)
        if program is None:
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
                    [program, "-f", str(image), f"/dev/fd/{fd}"],
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


def unmount_left(folder: Path) -> None:
    """Take a job's folder of mounts away, with those that an agent made which was killed."""
    for mount in reversed(mounts.mounts_below(folder)):
        with contextlib.suppress(OSError):
            mounts.unmount(mount.point)
        with contextlib.suppress(OSError):
            mount.point.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
