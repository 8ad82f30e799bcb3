"""The tar that a squashfs is made of: files, links, byte code, and whiteouts for what is gone.

Nothing is copied for it. Only what is the same on every node goes in. A whiteout, as overlayfs(5) has it in a
layer, is a character device 0, 0 in the place of what is not to be seen any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO

from bootseer_slurm.blob.squashfs import mksquashfs
from bootseer_slurm.env.tree import FileState, Tree, changed, state_of
from bootseer_slurm.errors import BootseerError

# Of 3.8 GB of packages zstd at level 3 makes 1.05 GB, lz4 1.50 GB in 7 s, lz4 at its slowest 1.21 GB in two
# minutes (2 cores); imports from the kernel's mount of these take 2.72, 2.39 and 2.25 s, from ext4 2.39 s. So
# zstd costs a node 0.4 s and saves it 160 MB, and N nodes share the store's link. When a start has shown what
# is touched, and how fast the link is, the snapshot is packed again (repack), by what is measured then.
_COMPRESSION = "zstd"


def write_tar(
    out: IO[bytes],
    root: Path,
    tree: Tree,
    *,
    made: Iterable[tuple[str, Path]] = (),
    gone: Sequence[str] = (),
    special: bool = False,
) -> dict[str, FileState]:
    """Write what is in `tree`, in its order; gives what was written, with digests.

    root: where it lies. made: more files, their paths within and where they are. gone: paths to white out.
    special: pipes and device nodes too. Sockets are left out. Raises BootseerError when a file is not any
    more what it was.
    """
    written: dict[str, FileState] = {}
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        for path, state in tree.items():
            if not state.is_special or (special and not stat.S_ISSOCK(state.mode)):
                written[path] = state._replace(digest=_add(tar, root / path, path, written))
        for path, file in made:
            _add_folder_of(tar, root, path, written)
            written[path] = state_of(file)._replace(digest=_add(tar, file, path, written))
        for path in gone:
            if path in written:  # byte code that was made anew
                continue
            _add_folder_of(tar, root, path, written)
            whiteout = tarfile.TarInfo(path)
            whiteout.type = tarfile.CHRTYPE
            tar.addfile(whiteout)
    return written


def squash(write: Callable[[int], None], target: Path, compression: str = _COMPRESSION) -> None:
    """Make the squashfs `target` of a tar, which `write` writes to a descriptor. Raises BootseerError."""
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        command = mksquashfs.from_tar(str(target), compression)
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=said, stderr=said) as process:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):  # it has failed, and says why
                write(process.stdin.fileno())
                process.stdin.close()
        said.seek(0)
        lines = said.read().strip().splitlines() or ["no message"]
    if process.returncode:
        raise BootseerError(f"mksquashfs failed: {lines[-1]}")


def _add(tar: tarfile.TarFile, file: Path, path: str, written: Tree) -> bytes:
    """Add a file, folder or link under this path; gives a file's digest."""
    try:
        info = tar.gettarinfo(file, arcname=path)
        info.mtime, info.uname, info.gname = int(info.mtime), "", ""
        if info.isreg():
            with file.open("rb") as stream:
                content = _Content(file, stream)
                tar.addfile(info, content)
                return content.digest
    except BrokenPipeError:  # who reads the tar has failed, and says why
        raise
    except OSError as error:
        raise changed(file) from error
    tar.addfile(info)
    return written[info.linkname].digest if info.islnk() else b""


def _add_folder_of(tar: tarfile.TarFile, root: Path, path: str, written: dict[str, FileState]) -> None:
    """Add the folder of byte code that this file is the first in, with its parent's time."""
    folder = os.path.dirname(path)
    if not folder or folder in written:
        return
    info = tarfile.TarInfo(folder)
    info.type, info.mode = tarfile.DIRTYPE, 0o755
    info.uid, info.gid = os.getuid(), os.getgid()
    info.mtime = int(os.stat(root / os.path.dirname(folder)).st_mtime)
    tar.addfile(info)
    written[folder] = FileState(0o040755)


class _Content:
    """A file as the tar reads it, with its digest. Raises BootseerError when it has become shorter."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self._path = path
        self._stream = stream
        self._hash = hashlib.sha256()

    @property
    def digest(self) -> bytes:
        return self._hash.digest()

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(size)
        if len(content) < size:
            raise changed(self._path)
        self._hash.update(content)
        return content
