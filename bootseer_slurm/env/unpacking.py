"""Unpacking a snapshot onto the node's disk: the last resort, where no squashfuse is installed.

A squashfs of a few kilobytes may hold terabytes, and its user may do to unsquashfs what he likes. So the
sizes that it lists must be within bounds, and what is there is measured while it is unpacked.

On disk: <cache>/.unpacked/<job>.<restart>/<blob>/, with the files in tree/, and done once it is whole.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User, out_of_reach
from bootseer_slurm.tail import last_lines

_PATH = "/usr/local/bin:/usr/bin:/bin"
_UNPACK_LIMIT_S = 900.0
_MEASURE_EVERY_S = 0.5
_MEASURE_LIMIT_S = 30.0
_LISTING_LIMIT_BYTES = 256 * 2**20  # of a layer of millions of files
_INODE_SHARE = 4  # of the disk's free inodes, a snapshot may take one in so many
_BLOCK_BYTES = 4096  # what a small file takes of a disk


@dataclass(frozen=True, slots=True)
class DiskBounds:
    """What may be unpacked. max_bytes: of one snapshot. min_free_bytes: must stay free on the disk."""

    max_bytes: int
    min_free_bytes: int


class _Entry(NamedTuple):
    """A line of unsquashfs's listing. kind: as `ls -l` has it."""

    kind: bytes
    size_bytes: int
    path: bytes


class Unpacked:
    """A snapshot as files on the node's disk."""

    def __init__(self, folder: Path, user: User, bounds: DiskBounds) -> None:
        """The snapshot of this user that is unpacked in `folder`; see `unpack`."""
        self.path = folder / "tree"
        self._folder = folder
        self._user = user
        self._bounds = bounds

    @classmethod
    def unpack(cls, images: Sequence[Path], folder: Path, user: User, bounds: DiskBounds) -> Unpacked:
        """Unpack the squashfs `images` below the new folder `folder`, or reattach what is there.

        images: the snapshot, or a layer and the snapshot below it. folder: where only root may enter. All is
        read, so it takes long, and is the user's. Raises BootseerError when unsquashfs is missing or fails,
        or unpacks too much; nothing is left then.
        """
        unpacked = cls(folder, user, bounds)
        done = folder / "done"
        if done.exists():
            return unpacked
        remove(folder)
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
        *layers, snapshot = images
        replaced = [(each.kind == b"c", each.path) for layer in layers for each in self._replaced(layer)]
        self._check_size(images)
        self._unpack(snapshot, [path for _, path in replaced])
        for layer in layers:
            self._unpack(layer, [path for is_whiteout, path in replaced if is_whiteout])

    def _check_size(self, images: Sequence[Path]) -> None:
        """Raises BootseerError when the images hold more than there may be."""
        size_bytes = count = 0
        for image in images:
            for entry in self._entries(image):
                count += 1
                size_bytes += max(entry.size_bytes, _BLOCK_BYTES)
        disk = os.statvfs(self._folder)
        room_bytes = min(self._bounds.max_bytes, disk.f_bavail * disk.f_frsize - self._bounds.min_free_bytes)
        if size_bytes > room_bytes:
            raise BootseerError(f"snapshot is not unpacked: {size_bytes} bytes, with room for {room_bytes}")
        if disk.f_files and count > disk.f_favail // _INODE_SHARE:
            raise BootseerError(f"snapshot is not unpacked: {count} files, with {disk.f_favail} free inodes")

    def _unpack(self, image: Path, without: Sequence[bytes]) -> None:
        """Unpack all but these paths into the tree."""
        with tempfile.TemporaryFile() as listed:
            listed.write(b"".join(path + b"\n" for path in without))
            listed.seek(0)
            os.fchmod(listed.fileno(), 0o444)  # its user opens it
            excluded = ["-no-wildcards", "-excludes", "-exclude-file", "/dev/stdin"] if without else []
            command = [
                *out_of_reach(self._user),
                "nice",
                "unsquashfs",
                "-no-progress",
                "-quiet",
                "-force",
                "-dest",
                ".",
            ]
            process = subprocess.Popen(
                [*command, *excluded, str(image)],
                stdin=listed,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                **self._as_user(),
            )
        try:
            with _Watch(process, self.path, self._bounds) as watch:
                said = last_lines(process, _UNPACK_LIMIT_S)
        except BaseException:
            process.kill()
            raise
        if watch.reason or process.returncode:
            reason = watch.reason or (said or ["it was killed"])[-1][:300]
            raise BootseerError(f"snapshot cannot be unpacked: {reason}")

    def _replaced(self, layer: Path) -> list[_Entry]:
        """The entries of a layer that replace others: files and links, and character devices, by nothing."""
        return [each for each in self._entries(layer) if each.kind in (b"c", b"-", b"l")]

    def _entries(self, image: Path) -> Iterator[_Entry]:
        """All that an image holds, with paths as plain as layer_over has them."""
        with tempfile.TemporaryFile() as listed:
            bounded = [*out_of_reach(self._user), "prlimit", f"--fsize={_LISTING_LIMIT_BYTES}"]
            done = subprocess.run(
                [*bounded, "unsquashfs", "-lln", "-dest", "", str(image)],
                stdout=listed,
                stderr=subprocess.DEVNULL,
                timeout=_UNPACK_LIMIT_S,
                check=False,
                **self._as_user(),
            )
            if done.returncode:
                raise BootseerError("snapshot cannot be unpacked: its files cannot be listed")
            listed.seek(0)
            for line in listed:
                # crw-r--r-- 0/0    0,  0 2026-11-25 16:30 /lib/gone
                match = re.match(rb"([a-z-])\S+ +\d+/\d+ +(?:\d+, *\d+|(\d+)) \S+ \S+ (/.+)", line)
                if match:
                    kind, size, path = match.groups()
                    path = path.partition(b" -> ")[0] if kind == b"l" else path
                    yield _Entry(kind, int(size or 0), path)

    def _as_user(self) -> dict[str, Any]:
        """The arguments of Popen for a program of the user in the tree, which he cannot enter by path."""
        return {
            "cwd": self.path,
            "env": {"PATH": _PATH, "LANG": "C.UTF-8", "TZ": "UTC"},
            "start_new_session": True,
        }

    def close(self) -> None:
        """Remove the files."""
        remove(self._folder)
        with contextlib.suppress(OSError):
            self._folder.parent.rmdir()


class _Watch:
    """Kills a process that writes more than it may. reason: why it was killed."""

    def __init__(self, process: subprocess.Popen[bytes], tree: Path, bounds: DiskBounds) -> None:
        self.reason = ""
        self._process = process
        self._tree = tree
        self._bounds = bounds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Look once more: it may have written all within one period."""
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        is_last = False
        while not is_last and not self.reason:
            is_last = self._ended.wait(_MEASURE_EVERY_S)
            try:
                self.reason = self._excess()
            except (OSError, ValueError, subprocess.SubprocessError) as error:
                self.reason = f"what is unpacked cannot be measured: {error}"
        if self.reason:
            self._process.kill()

    def _excess(self) -> str:
        """What is too much of it, "" when nothing is."""
        disk = os.statvfs(self._tree)
        if disk.f_bavail * disk.f_frsize < self._bounds.min_free_bytes:
            return "the disk is full"
        if disk.f_files and disk.f_favail < disk.f_files // (2 * _INODE_SHARE):
            return "the disk has no more inodes for it"
        measured = subprocess.run(
            ["nice", "du", "-sx", "-B1", "--", self._tree],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,  # of files that come and go
            timeout=_MEASURE_LIMIT_S,
            check=False,
        )
        if int(measured.stdout.partition(b"\t")[0]) > self._bounds.max_bytes:
            return f"it is more than {self._bounds.max_bytes} bytes"
        return ""


def unpacked_folder(cache: Path) -> Path:
    """The folder of unpacked snapshots in the cache's, with a folder for each job, <job>.<restart>."""
    return cache / ".unpacked"


def remove(folder: Path) -> None:
    """Remove a folder of unpacked files, however deep its user made it; what cannot be removed stays."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", folder], stderr=subprocess.DEVNULL, check=False)
