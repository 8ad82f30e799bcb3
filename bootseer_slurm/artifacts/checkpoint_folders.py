"""The files of a checkpoint that have no path of their own (of a URI, or striped), as one folder for the job.

    <run>/named/<job>.<restart>/<random>/<path within the checkpoint>     a link to the file that is served

The folders are root's. Others cannot list the job's, and so do not learn what a user's files are called.
Not thread-safe.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from bootseer_slurm.errors import InputError, NotFound

_NAME_LIMIT = 255
_DEPTH_LIMIT = 8


class CheckpointFolders:
    """The folders of one job."""

    def __init__(self, folder: Path) -> None:
        """folder: of this job alone; made when first needed."""
        self._folder = folder
        self._shown: dict[str, Path] = {}
        self._closed = False

    def show(self, checkpoint: str, files: Mapping[str, Path]) -> Path:
        """The folder in which the files of a checkpoint have their names; the same one when asked again.

        files: where each is served, by its path within the checkpoint, which is its user's. Raises InputError
        for a name that cannot be, NotFound once it is closed, OSError; and then leaves nothing behind.
        """
        if self._closed:
            raise NotFound("the job is over")
        if checkpoint not in self._shown:
            checked = {_checked(name): path for name, path in files.items()}
            self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
            folder = self._folder / secrets.token_hex(8)
            folder.mkdir()
            try:
                for name, path in checked.items():
                    (folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (folder / name).symlink_to(path)
            except BaseException:
                shutil.rmtree(folder)  # each step would make another one
                raise
            self._shown[checkpoint] = folder
        return self._shown[checkpoint]

    def close(self) -> None:
        """Take the folders away; none is made after this."""
        self._closed = True
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)


def _checked(name: str) -> str:
    try:
        parts = PurePosixPath(name).parts
        usable = 0 < len(parts) <= _DEPTH_LIMIT and all(
            len(os.fsencode(part)) <= _NAME_LIMIT for part in parts
        )
    except UnicodeEncodeError:  # JSON has characters that no file system has
        usable = False
    if not usable or "/" in parts or ".." in parts or "\0" in name:
        raise InputError(f"a file of the checkpoint is called {name[:80]!r}")
    return name
