"""Scratch folders: where large things are made, gone with the process that makes them.

On disk: bootseer-<what>-<uid>-<random>, locked (flock(2)) as long as its process lives. What a killed process
left, the user's next one of the same sort removes.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bootseer_slurm.errors import BootseerError


@contextlib.contextmanager
def folder(what: str, base: Path, *, hint: str) -> Iterator[Path]:
    """A folder of this process in `base` for the time of a block; what killed ones left is removed first.

    Raises BootseerError with this hint when none can be made.
    """
    prefix = f"bootseer-{what}-{os.geteuid()}-"
    _remove_left(base, prefix)
    path, fd = _locked(base, prefix, hint)
    try:
        yield path
    finally:
        remove_tree(path)
        os.close(fd)


def _remove_left(base: Path, prefix: str) -> None:
    """Remove this user's scratch folders whose process is gone."""
    for path in base.glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if os.fstat(fd).st_uid == os.geteuid():
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    remove_tree(path)
            finally:
                os.close(fd)


def _locked(base: Path, prefix: str, hint: str) -> tuple[Path, int]:
    while True:
        try:
            path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        except OSError as error:
            raise BootseerError(f"{base}: no place for scratch files: {error.strerror}", hint=hint) from error
        # Before it is locked, another process may take it for a left one.
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if path.exists():
                return path, fd
            os.close(fd)


def mark_finished(file: Path) -> None:
    """Give a file that nobody writes any more an old time; storing it waits with a young one."""
    os.utime(file, (0, 0))


def remove_tree(path: Path) -> None:
    """Remove a folder of this user, with those in it that he may not enter; what cannot go stays."""
    with contextlib.suppress(OSError):
        make_readable(path)
    shutil.rmtree(path, ignore_errors=True)


def make_readable(tree: Path) -> None:
    """Let the owner read all files of a tree and enter and change all its folders."""
    os.chmod(tree, stat.S_IMODE(os.lstat(tree).st_mode) | 0o700)
    for folder, folders, files in os.walk(tree):
        for name, needed in (*((each, 0o700) for each in folders), *((each, 0o400) for each in files)):
            path = os.path.join(folder, name)
            mode = os.lstat(path).st_mode
            if not stat.S_ISLNK(mode) and mode & needed != needed:
                os.chmod(path, stat.S_IMODE(mode) | needed)
