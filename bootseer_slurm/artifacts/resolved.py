"""An artifact that was resolved: its original, the layers that stand for it, and the mounts for steps.

Owns the original's descriptor. All reading is done by the process of the job's user.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bootseer_slurm import mounts
from bootseer_slurm.artifacts.environment import EnvironmentMount, View
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.artifacts.source import ProcessOfJob
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.userproc.channel import NoAnswer
from bootseer_slurm.userproc.protocol import IsSame, Resolved

# A step waits for the check that an original is still the same.
_SAME_TIMEOUT_S = 4.0
# On a full link the check of an environment is slow: it asks for a hundred small files, one after the other.
# A step that was left with the original read all of it over that link: its start took twice as long. So one
# that was looked up this recently counts as the same when there is no answer. Of a checkpoint or an image one
# question tells, and an old checkpoint would lose work.
_RECENT_S = 60.0
_RECENT_TIMEOUT_S = 1.0
_FRESH_S = 5.0


class Bind(NamedTuple):
    """A mount to be shown over the original: the plugin checks that it still is this file."""

    fd: int
    device: int
    inode: int
    path: str


class Original:
    """The file or folder that a user named, where it lies, held open. path: as the kernel has it."""

    def __init__(self, fd: int) -> None:
        """Takes the descriptor. What the user's process says of the path is not believed."""
        self._fd = fd
        try:
            self.path = os.readlink(f"/proc/self/fd/{fd}")
        except BaseException:  # a path may be too long for the kernel to say
            os.close(fd)
            raise

    @functools.cached_property
    def status(self) -> os.stat_result:
        """Its status when first asked: a user's own file system may never answer, so after `is_below`."""
        return os.fstat(self._fd)

    @property
    def has_its_owner(self) -> bool:
        """Whether its owner still is who it was then. Never waits."""
        return mounts.owner_of(self._fd).uid == self.status.st_uid

    def is_below(self, roots: tuple[Path, ...]) -> bool:
        """Whether it lies below one of these folders, and is none of them."""
        path = Path(self.path)
        return any(path.is_relative_to(root) and path != root for root in roots)

    def close(self) -> None:
        os.close(self._fd)


@dataclass(slots=True, eq=False)
class ResolvedArtifact:
    """The layers and mounts that stand for an artifact until the job ends.

    reply: as the user's process gave it. asked_s: of time.monotonic(), when the process was asked: what it
    says is of then or later, and a slow store may have kept it long. layers: the topmost first. original:
    None where it has no path. environment: its mount, if it is one. path: of the original, "" without one;
    known when it is closed too.
    """

    ref: ArtifactRef
    process: ProcessOfJob
    reply: Resolved
    asked_s: float
    original: Original | None
    layers: list[Layer]
    environment: EnvironmentMount | None = None
    path: str = field(init=False)

    def __post_init__(self) -> None:
        self.path = self.original.path if self.original else ""

    @property
    def owner(self) -> int | None:
        """The user id that the original belongs to; None without one."""
        return self.original.status.st_uid if self.original else None

    @property
    def store_folder(self) -> str:
        """The folder in the store of what is shown; "" when it is closed."""
        return self.layers[0].description.folder if self.layers else ""

    @property
    def is_writable(self) -> bool:
        """Whether it is an environment that steps may install to."""
        return self.environment is not None and self.environment.is_writable

    @property
    def served_path(self) -> Path:
        """Where the blob can be opened by its user, for artifacts that have no path of their own.

        Raises NotFound when it is closed.
        """
        if not self.layers:
            raise NotFound(f"{self.ref.name}: the job is over")
        return self.layers[0].handle.served_path

    def bind(self, *, is_first: bool = False) -> Bind | None:
        """A fresh mount of the blob for one step; the caller closes its descriptor.

        is_first: nothing of the job ran before this step on any node: what was just looked up is the same.

        Of a checkpoint without a path of its own: over its FUSE file, once all of it is in the cache, whose
        file is read without a detour. None where there is nothing to be shown.
        Raises InputError when the original changed, NoAnswer when nobody says whether it did, BootseerError
        or OSError when the mount cannot be made.
        """
        served, original, environment = self.served_path, self.original, self.environment
        if original is None:
            path = self.layers[0].bind_path
            if self.ref.kind != "checkpoint" or path == served:
                return None
            status = os.stat(served)
            return Bind(mounts.bind_clone(path), status.st_dev, status.st_ino, str(served))
        if not (is_first and time.monotonic() - self.asked_s < _FRESH_S):
            self._check_same(original)
        if not original.has_its_owner:  # who may show what over it was decided for that one
            raise InputError(f"{original.path}: was given to another user after it was looked up")
        fd = environment.clone() if environment else mounts.bind_clone(self.layers[0].bind_path)
        return Bind(fd, original.status.st_dev, original.status.st_ino, original.path)

    def _check_same(self, original: Original) -> None:
        is_recent = self.ref.kind == "environment" and time.monotonic() - self.asked_s < _RECENT_S
        timeout_s = _RECENT_TIMEOUT_S if is_recent else _SAME_TIMEOUT_S
        # The process that was asked before may be gone: the question says all that the next one needs.
        question = IsSame(self.ref.kind, original.path, self.reply.fingerprint, self.reply.image)
        try:
            is_same = self.process().is_same(question, timeout_s=timeout_s)
        except NoAnswer:
            if not is_recent:
                raise
            return
        if not is_same:
            raise InputError(f"{original.path}: was changed after it was looked up")

    def installed_view(self) -> View:
        """The snapshot with what was installed over it, read-only, and the original that it is shown at.

        Raises NotFound when it is closed, OSError when it cannot be made. The caller closes its descriptor.
        """
        overlay, original = self.environment.overlay if self.environment else None, self.original
        if overlay is None or original is None:
            raise NotFound(f"{self.ref.name}: the job is over")
        status = original.status
        return View(overlay.clone(), status.st_dev, status.st_ino)

    def close(self) -> None:
        """Let go of the mounts, the blobs and the original."""
        if self.environment:
            self.environment.close()
            self.environment = None
        while self.layers:
            self.layers.pop().close()
        if self.original:
            self.original.close()
            self.original = None
