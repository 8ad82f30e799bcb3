"""The files of an environment, by path within it, and the properties of each that must stay the same.

Runs as the environment's user. Byte code, which Python keeps in __pycache__ beside its sources, follows from
them: it is told apart here, for a run must not make a snapshot of its own environment stale.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from bootseer_slurm.errors import BootseerError, InputError

_CACHE = "__pycache__"


class FileState(NamedTuple):
    """A file, folder or link, as lstat(2) tells. Size and times are a file's only; link: what a link says.

    digest: the sha256 of a file's content, where that was read; b"" else.
    """

    mode: int
    size_bytes: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    link: str = ""
    digest: bytes = b""

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    @property
    def is_folder(self) -> bool:
        return stat.S_ISDIR(self.mode)

    @property
    def is_special(self) -> bool:
        """Whether it is a socket, a pipe or a device node, which no environment needs."""
        return not (self.is_file or self.is_folder or stat.S_ISLNK(self.mode))

    @property
    def as_installed(self) -> tuple[int, int, int, str]:
        """The properties that an installer or editor changes; times in seconds, as all file systems have."""
        return self.mode, self.size_bytes, self.mtime_ns // 10**9, self.link


Tree = Mapping[str, FileState]  # a folder before what lies in it


def survey(root: Path) -> dict[str, FileState]:
    """All that lies in a folder. Raises InputError that names what cannot be read."""
    found = {}

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename}: cannot be read: {error.strerror}") from error

    for folder, folders, files in os.walk(root, onerror=fail):
        folders.sort()
        for name in (*folders, *sorted(files)):
            path = os.path.join(folder, name)
            try:
                state = state_of(path)
            except OSError as error:
                raise changed(path) from error
            if state.is_file and not os.access(path, os.R_OK):
                raise InputError(f"{path}: cannot be read", hint="a snapshot would lack this file")
            found[os.path.relpath(path, root)] = state
    return found


def state_of(path: str | Path) -> FileState:
    """The state of a path now. A folder's own size and time change with its files. Raises OSError."""
    status = os.lstat(path)
    if stat.S_ISREG(status.st_mode):
        return FileState(status.st_mode, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return FileState(status.st_mode, link=os.readlink(path) if stat.S_ISLNK(status.st_mode) else "")


def changed(path: str | Path) -> BootseerError:
    """The error for what is not any more what it was a moment ago."""
    return BootseerError(f"{path}: was changed while it was saved", hint="save it again when it is complete")


def is_unchanged(before: Tree, after: Tree) -> bool:
    """Whether nothing was changed between two surveys; a run that starts meanwhile leaves byte code."""

    def content(tree: Tree) -> dict[str, tuple[int, int, int, str]]:
        return {
            path: (state.mode, state.size_bytes, state.mtime_ns, state.link)
            for path, state in tree.items()
            if _CACHE not in path.split("/")
        }

    return content(before) == content(after)


def source_of(path: str) -> str | None:
    """The source that a file of byte code was compiled from; None for any other file (PEP 3147)."""
    folder, _, name = path.rpartition("/")
    if not is_cache(folder) or not name.endswith(".pyc"):  # others keep theirs there too, such as numba
        return None
    return os.path.join(os.path.dirname(folder), f"{name.partition('.')[0]}.py")


def is_cache(folder: str) -> bool:
    """Whether a folder is one of byte code."""
    return os.path.basename(folder) == _CACHE
