"""Showing a snapshot that the kernel's driver may not or cannot mount, and layers over one.

A user's squashfs is never given to the kernel's driver, but to squashfuse, run as the job's user; his other
processes cannot reach into it, for it may show what another user published. That cannot
mount without privilege either, so the agent mounts with an open /dev/fuse and hands that descriptor over as
the mount point "/dev/fd/N" (libfuse 3.3, fuse_session_mount). The mount point lies in a folder that only root
may enter; jobs see the mount through their shadow.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from bootseer_slurm import mounts
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User, out_of_reach
from bootseer_slurm.tail import last_lines

_log = logging.getLogger(__name__)

_LOW_LEVEL, _HIGH_LEVEL = "squashfuse_ll", "squashfuse"
_PATH = "/usr/local/bin:/usr/bin:/bin"
_STOP_TIMEOUT_S = 2.0
_MEMORY_SHARE = 8
_UNPACK_LIMIT_S = 900.0
_LISTING_LIMIT_BYTES = 256 * 2**20  # of a layer of millions of files


class Snapshot:
    """A mounted snapshot, at `path`."""

    def __init__(self, path: Path) -> None:
        """The snapshot that is mounted at `path`; see `mount`."""
        self.path = path
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def mount(cls, image: Path, target: Path, *, uid: int, gid: int, all_root: bool = False) -> Snapshot:
        """Mount the squashfs `image`, a file that this user may open, at the new folder `target`.

        all_root: all in it is root's, and to be shown as the user's.
        The mount of an agent that was killed is reattached: squashfuse does not end with the agent, but may
        have ended. Raises BootseerError when squashfuse is missing or the mount fails.
        """
        snapshot = cls(target)
        if _reattached(target):
            return snapshot
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
                snapshot._process = subprocess.Popen(
                    [*out_of_reach(User(uid, gid, ())), *command, "-f", str(image), f"/dev/fd/{fd}"],
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
            os.listdir(target)  # waits for squashfuse; fails when the image is none
        except (OSError, subprocess.SubprocessError) as error:
            snapshot.close()
            raise BootseerError(f"snapshot cannot be mounted: {error}") from error
        return snapshot

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

    def __init__(self, folder: Path, user: User) -> None:
        """The snapshot of this user that is unpacked in `folder`; see `unpack`."""
        self.path = folder / "tree"
        self._folder = folder
        self._user = user

    @classmethod
    def unpack(cls, images: Sequence[Path], folder: Path, *, uid: int, gid: int) -> Unpacked:
        """Unpack the squashfs `images` below the new folder `folder`, or reattach what is there.

        images: the snapshot, or a layer and the snapshot below it. folder: where only root may enter. All is
        read, so it takes long, and is the user's. Raises BootseerError when unsquashfs is missing or fails;
        nothing is left then.
        """
        unpacked = cls(folder, User(uid, gid, ()))
        done = folder / "done"
        if done.exists():
            return unpacked
        shutil.rmtree(folder, ignore_errors=True)
        try:
            unpacked._make(images)
            done.touch()
        except (OSError, subprocess.SubprocessError) as error:
            raise BootseerError(f"snapshot cannot be unpacked: {error}") from error
        finally:
            if not done.exists():
                unpacked.close()
        return unpacked

    def _make(self, images: Sequence[Path]) -> None:
        self.path.mkdir(mode=0o755, parents=True)
        os.chown(self.path, self._user.uid, self._user.gid)
        replaced = [path for image in images[:-1] for path in self._contents(image)]
        *layers, snapshot = images
        self._unpack(snapshot, [path for _, path in replaced])
        for layer in layers:
            self._unpack(layer, [path for is_whiteout, path in replaced if is_whiteout])

    def _unpack(self, image: Path, without: Sequence[bytes]) -> None:
        """Unpack all but these paths into the tree."""
        with tempfile.TemporaryFile() as listed:
            listed.write(b"".join(path + b"\n" for path in without))
            listed.seek(0)
            os.fchmod(listed.fileno(), 0o444)  # its user opens it
            excluded = ["-no-wildcards", "-excludes", "-exclude-file", "/dev/stdin"] if without else []
            command = ["nice", "unsquashfs", "-no-progress", "-quiet", "-force", "-dest", "."]
            process = subprocess.Popen(
                [*command, *excluded, str(image)],
                stdin=listed,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **self._as_user(),
            )
            try:
                said = last_lines(process, _UNPACK_LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
            if process.returncode:
                raise BootseerError(f"snapshot cannot be unpacked: {(said or ['it was killed'])[-1][:300]}")

    def _contents(self, layer: Path) -> list[tuple[bool, bytes]]:
        """The paths that a layer replaces, as plain as layer_over has them, each with whether by nothing."""
        found = []
        with tempfile.TemporaryFile() as listed:
            done = subprocess.run(
                ["prlimit", f"--fsize={_LISTING_LIMIT_BYTES}", "unsquashfs", "-lln", "-dest", "", str(layer)],
                stdout=listed,
                stderr=subprocess.DEVNULL,
                timeout=_UNPACK_LIMIT_S,
                check=False,
                **self._as_user(),
            )
            if done.returncode:
                raise BootseerError("snapshot cannot be unpacked: what its layer holds cannot be listed")
            listed.seek(0)
            for line in listed:
                # crw-r--r-- 0/0    0,  0 2026-11-25 16:30 /lib/gone
                match = re.match(rb"([cl-])\S+ +\d+/\d+ +(?:\d+, *\d+|\d+) \S+ \S+ (/.+)", line)
                if match:
                    kind, path = match.groups()
                    found.append((kind == b"c", path.partition(b" -> ")[0] if kind == b"l" else path))
        return found

    def _as_user(self) -> dict[str, Any]:
        """The arguments of Popen for a program of the user in the tree, which he cannot enter by path."""
        return {
            "cwd": self.path,
            "env": {"PATH": _PATH, "LANG": "C.UTF-8", "TZ": "UTC"},
            "start_new_session": True,
            **self._user.popen_arguments(),
        }

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self._folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()


class Overlay:
    """Layers over a mounted snapshot: one that was saved, and one to write to.

    The latter is in memory, of the steps that write (their cgroup's), an eighth of the node's at most. It
    goes with the job.
    """

    def __init__(self, path: Path, *, writable: bool) -> None:
        """The layers that are mounted at `path`; see `mount`."""
        self.path = path
        self.writable = writable
        self._memory = path.with_name(f"{path.name}.new")

    @classmethod
    def mount(cls, lower: Sequence[Path], target: Path, *, uid: int, gid: int, writable: bool) -> Overlay:
        """Show these mounts, the topmost first, at the new folder `target`; or reattach what is there.

        writable: for its user. Raises BootseerError where the kernel has no overlay for these mounts.
        """
        overlay = cls(target, writable=writable)
        if _reattached(target):
            return overlay
        flags = mounts.MS_NOSUID | mounts.MS_NODEV
        options = f"lowerdir={':'.join(map(str, lower))}"
        try:
            target.mkdir(mode=0o700, parents=True, exist_ok=True)
            if writable:
                options += overlay._upper(flags, uid, gid)
            else:
                flags |= mounts.MS_RDONLY
            mounts.mount("overlay", target, "overlay", flags, options)
        except OSError as error:
            overlay.close()
            raise BootseerError(f"layers of a snapshot cannot be mounted: {error}") from error
        return overlay

    def _upper(self, flags: int, uid: int, gid: int) -> str:
        """Make the layer to write to, or reattach the one there; gives overlayfs's options for it."""
        size_bytes = psutil.virtual_memory().total // _MEMORY_SHARE
        upper, work = self._memory / "upper", self._memory / "work"
        if not mounts.is_mountpoint(self._memory):  # else what was written there is still wanted
            self._memory.mkdir(mode=0o700, exist_ok=True)
            mounts.mount("tmpfs", self._memory, "tmpfs", flags, f"size={size_bytes},mode=0755")
            upper.mkdir(mode=0o755)
            work.mkdir()
            os.chown(upper, uid, gid)
        return f",upperdir={upper},workdir={work}"

    def close(self) -> None:
        """Take it away; steps that still run keep it."""
        for path in (self.path, self._memory):
            with contextlib.suppress(OSError):
                mounts.unmount(path)
            with contextlib.suppress(OSError):
                path.rmdir()


def _reattached(target: Path) -> bool:
    """Whether an earlier agent's mount at `target` goes on; one whose server died is taken away."""
    while mounts.is_mountpoint(target):
        try:
            os.listdir(target)
            return True
        except OSError as error:
            _log.warning("%s: mounted anew: %s", target, error.strerror)
            mounts.unmount(target)
    return False


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
    """The folder of unpacked snapshots in the cache's, with a folder for each job, <job>.<restart>."""
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
