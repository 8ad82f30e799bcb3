"""Kernel mounts: a trusted image through the kernel's squashfs driver, as its user's own files.

squashfuse costs a start more than the link does (docs/facts.md); the kernel's driver little.
It may only be given what passed `signing`. Owns: the loop device, the squashfs, and the idmapped mount that
steps get clones of. Does not own: whether an image is trusted, and who may have a clone.

On disk: `folder`, an empty folder below one that only root may enter. The mount on it outlives the agent:
the next agent reattaches what a killed one left there. It is read-only, nosuid and nodev, and *locked* so.
Without the lock, its user could attach it in a user namespace of his and remount it without nodev there (seen
on Linux 6.18); then a device node in an image would be his. The lock comes of copying the mount into a user
namespace (mount_namespaces(7)), and its clones inherit it.

Processes: the agent serves the very file that the loop device reads. A mount(2) in the agent would wait for
the agent; killed at that moment it could not even die, and no successor would come. So a process of its own
makes the mount, which is detached until the agent attaches it, and goes away with whoever dies:

    python -I -m bootseer_slurm.image.kernel_mount <socket fd> <image> <folder> <uid> <gid>

It says each step when it is done, one message each, then {"error": …, "hint": …}, or sends the descriptor.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.blob.squashfs import mksquashfs
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User

_MOUNT_TIMEOUT_S = 30.0
_KILL_WAIT_S = 0.5
_REPLY_BYTES = 4096
_PROBE_ID = 65534  # nobody
# linux/loop.h
_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CHANGE_FD = 0x4C06
_LO_FLAGS_READ_ONLY = 1
_LO_FLAGS_AUTOCLEAR = 4
# struct loop_config: fd, block size, loop_info64 (of which: flags, file name), reserved
_LOOP_CONFIG = struct.Struct("=II 40x12xI64s96x16x 64x")
_LOOP_FLAGS = _LO_FLAGS_READ_ONLY | _LO_FLAGS_AUTOCLEAR
_LOOP_ATTEMPTS = 32  # another process may take the device that was free
_READ_AHEAD_KB = 128  # a block of squashfs
_FSTYPE = "squashfs"
STEPS = ("loop devices", "squashfs driver", "idmapped mounts", "locked mounts")


class MountFailed(BootseerError):
    """The kernel did not mount an image. steps_done: how many of STEPS it came through."""

    def __init__(self, message: str, *, hint: str | None = None, steps_done: int = 0) -> None:
        super().__init__(message, hint=hint)
        self.steps_done = steps_done


class KernelMount:
    """An image that the kernel shows at `folder`, with the files of root being its user's. No state."""

    def __init__(self, folder: Path) -> None:
        """The mount that is at `folder`; see `open_image` and `reattach`."""
        self.folder = folder

    @classmethod
    def open_image(
        cls, image: Path, folder: Path, *, uid: int, gid: int, timeout_s: float = _MOUNT_TIMEOUT_S
    ) -> KernelMount:
        """Mount the squashfs file `image`, which root may open, at `folder`, which is made.

        Waits until the first blocks of the image are there, `timeout_s` at most. Raises MountFailed that
        says what this node lacks or what is wrong with the image; nothing is left then.
        """
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            fd = _detached_mount(image, folder, uid, gid, timeout_s)
            try:
                mounts.move_mount(fd, folder)
            finally:
                os.close(fd)
        except BaseException as error:
            with contextlib.suppress(OSError):
                folder.rmdir()
            if isinstance(error, (OSError, subprocess.SubprocessError)):
                raise MountFailed(f"image {image} cannot be mounted by the kernel: {error}") from error
            raise
        return cls(folder)

    @classmethod
    def reattach(cls, folder: Path) -> KernelMount | None:
        """The mount that an earlier agent left at `folder`, or None. Does not touch the file system on it."""
        if any(entry.fstype == _FSTYPE for entry in mounts.mounts_at(folder)):
            return cls(folder)
        return None

    def clone(self) -> int:
        """The descriptor of a detached mount of the image, for one process to attach. The caller closes it.

        Raises BootseerError when the mount is gone.
        """
        try:
            # A folder that lost its mount would be given out otherwise, empty.
            if not mounts.is_mountpoint(self.folder):
                raise BootseerError(f"nothing is mounted at {self.folder}")
            return mounts.bind_clone(self.folder)
        except OSError as error:
            raise BootseerError(f"mount at {self.folder} cannot be cloned: {error.strerror}") from error

    def read_from(self, file: Path) -> None:
        """Have the kernel read another file of the same bytes from now on. Raises OSError."""
        entries = [entry for entry in mounts.mounts_at(self.folder) if entry.fstype == _FSTYPE]
        if not entries:
            raise FileNotFoundError(errno.ENOENT, "no image is mounted", str(self.folder))
        with contextlib.ExitStack() as opened:
            device = os.open(entries[-1].source, os.O_RDONLY | os.O_CLOEXEC)
            opened.callback(os.close, device)
            backing = _open_backing(file)
            opened.callback(os.close, backing)
            fcntl.ioctl(device, _LOOP_CHANGE_FD, backing)

    def close(self) -> None:
        """Take the mount away; steps that have a clone keep it, and the loop device goes with the last."""
        with contextlib.suppress(OSError):
            mounts.unmount(self.folder)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _detached_mount(image: Path, folder: Path, uid: int, gid: int, timeout_s: float) -> int:
    """Have a process of its own make the mount. Raises MountFailed, OSError or SubprocessError."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with here, there:
        command = [sys.executable, "-I", "-m", "bootseer_slurm.image.kernel_mount"]
        process = subprocess.Popen(
            [*command, str(there.fileno()), str(image), str(folder), str(uid), str(gid)],
            pass_fds=(there.fileno(),),
            stdin=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )
        there.close()
        try:
            return _receive_mount(here, image, time.monotonic() + timeout_s)
        finally:
            # One that waits for the image cannot be killed before that answers; subprocess collects it then.
            process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_KILL_WAIT_S)


def _receive_mount(link: socket.socket, image: Path, deadline_s: float) -> int:
    """The descriptor that the process sends when it has done all steps."""
    done = 0
    while True:
        try:
            link.settimeout(max(0.001, deadline_s - time.monotonic()))
            content, fds, _, _ = socket.recv_fds(link, _REPLY_BYTES, 1)
        except TimeoutError:
            content, fds = b'{"error": "its first blocks did not come in time"}', []
        if fds:
            return fds[0]
        if content == b"{}":
            done += 1
            continue
        reply = json.loads(content or b'{"error": "the process that mounts it died"}')
        message = f"image {image} cannot be mounted by the kernel: {reply['error']}"
        raise MountFailed(message, hint=reply.get("hint"), steps_done=done)


def probe() -> list[tuple[str, bool, str]]:
    """Try it with a small image of our own: for each step its name, whether it works, and why not.

    Needs root. Forks: for a process of one thread.
    """
    with tempfile.TemporaryDirectory(prefix="bootseer-probe-") as scratch:
        home = Path(scratch)
        home.chmod(0o755)
        (home / "tree").mkdir()
        image, folder = home / "image", home / "mount"
        command = mksquashfs.from_rootfs(str(home / "tree"), str(image))
        try:
            subprocess.run(command, check=True, capture_output=True)
            mount = KernelMount.open_image(image, folder, uid=_PROBE_ID, gid=_PROBE_ID)
        except (OSError, subprocess.SubprocessError) as error:
            return [(STEPS[0], False, f"cannot be tried, for no image can be made: {error}")]
        except MountFailed as error:
            done = error.steps_done
            return [(step, True, "") for step in STEPS[:done]] + [
                (step, False, error.message if step == STEPS[done] else "not tried") for step in STEPS[done:]
            ]
        try:
            reason = _attach_as_user(mount, home / "tree")
        finally:
            mount.close()
    return [*((step, True, "") for step in STEPS), ("attached by a user", not reason, reason)]


def _attach_as_user(mount: KernelMount, target: Path) -> str:
    """Attach a clone in a user namespace, as the stand-in for squashfuse does; why not, if it cannot be."""
    fd = mount.clone()
    read_fd, write_fd = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            User(_PROBE_ID, _PROBE_ID, ()).become()
            mounts.unshare_user_namespace()
            mounts.move_mount(fd, target)
            os.listdir(target)
        except BaseException as error:
            os.write(write_fd, str(error).encode(errors="replace")[:1000])
        finally:
            os._exit(0)
    os.close(write_fd)
    os.close(fd)
    with os.fdopen(read_fd, errors="replace") as pipe:
        reason = pipe.read()
    os.waitpid(child, 0)
    return reason


# The process


def main(link_fd: int, image: Path, folder: Path, uid: int, gid: int) -> None:
    """Make the mount and send its descriptor, or say why not."""
    with socket.socket(fileno=link_fd) as link:
        try:
            fd = _make(image, folder, uid, gid, lambda: link.send(b"{}"))
        except (BootseerError, OSError) as error:
            reply = {"error": str(error)[:2000], "hint": getattr(error, "hint", None)}
            link.send(json.dumps(reply).encode())
        else:
            socket.send_fds(link, [b"mount"], [fd])


def _make(image: Path, folder: Path, uid: int, gid: int, done: Callable[[], object]) -> int:
    """The way to the mount, `done` being told after each of STEPS. Raises BootseerError or OSError."""
    mounts.unshare_mount_namespace()
    loop_fd = _set_up_loop(image)
    done()
    try:
        _mount_squashfs(f"/dev/loop{os.minor(os.fstat(loop_fd).st_rdev)}", folder)
    finally:
        os.close(loop_fd)  # the mount holds the device from here on
    done()
    fd = _idmapped(folder, uid, gid)
    done()
    mounts.unmount(folder)
    mounts.move_mount(fd, folder)
    os.close(fd)
    mounts.unshare_user_namespace()
    fd = mounts.bind_clone(folder)
    done()
    return fd


def _open_backing(image: Path) -> int:
    """A descriptor of the file for a loop device to read."""
    backing = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # its user may have a lease on it
    # squashfs asks for whole blocks. What the file's own read-ahead adds is fetched in vain: imports read 365
    # instead of 219 MB. Buffered all the same (no LO_FLAGS_DIRECT_IO): so pushed blocks are found
    # (FUSE_NOTIFY_STORE), and pieces of tables are read once.
    os.posix_fadvise(backing, 0, 0, os.POSIX_FADV_RANDOM)
    return backing


def _set_up_loop(image: Path) -> int:
    """A free loop device over the file, read-only, which ends with its last user."""
    backing = _open_backing(image)
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        os.close(backing)
        raise BootseerError(f"no loop devices: {error}", hint="modprobe loop") from None
    config = _LOOP_CONFIG.pack(backing, 0, _LOOP_FLAGS, os.fsencode(image)[-63:])
    try:
        for _ in range(_LOOP_ATTEMPTS):
            device = os.open(
                f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}", os.O_RDONLY | os.O_CLOEXEC
            )
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
                _bound_read_ahead(device)
                return device
            except OSError as error:
                os.close(device)
                if error.errno != errno.EBUSY:
                    raise BootseerError(
                        f"loop device cannot be set up: {error.strerror}", hint="it needs Linux 5.8"
                    ) from None
        raise BootseerError("no free loop device: others were faster each time")
    finally:
        os.close(control)
        os.close(backing)


def _bound_read_ahead(device: int) -> None:
    """Have page faults bring a block or two. Loop devices may come with 2.5 MiB: 313 instead of 243 MB."""
    number = os.fstat(device).st_rdev
    with contextlib.suppress(OSError):  # /sys may be read-only: it costs bytes, no more
        path = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/queue/read_ahead_kb")
        path.write_text(f"{_READ_AHEAD_KB}\n")


def _mount_squashfs(device: str, folder: Path) -> None:
    flags = mounts.MS_RDONLY | mounts.MS_NOSUID | mounts.MS_NODEV
    try:
        mounts.mount(device, folder, _FSTYPE, flags)
    except OSError as error:
        if error.errno == errno.ENODEV:
            raise BootseerError("this kernel has no squashfs driver", hint="modprobe squashfs") from None
        raise BootseerError(f"squashfs: {error.strerror}: is the image damaged?") from None


def _idmapped(folder: Path, uid: int, gid: int) -> int:
    """A detached mount of what is at folder, with root's files being the user's."""
    namespace = mounts.map_root_to(uid, gid)
    fd = mounts.open_tree_clone(folder)
    try:
        mounts.set_attributes(fd, user_namespace=namespace)
    except OSError as error:
        os.close(fd)
        raise BootseerError(
            f"this kernel cannot map the owners of a squashfs: {error.strerror}", hint="it needs Linux 6.2"
        ) from None
    finally:
        os.close(namespace)
    return fd


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5]))
