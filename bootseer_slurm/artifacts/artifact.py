"""One thing that a job starts from, from its request to the job's end.

    REQUESTED → RESOLVING → READY → CLOSED
                   ↓ ↑        ↓
                  FAILED   RESOLVING

An image that an importer just made is resolved once more; where that fails, it stays what it was.
Thread-safe: who resolves an artifact changes its state, others look and wait.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from enum import Enum

from bootseer_slurm.artifacts.resolved import ResolvedArtifact
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import InputError


class State(Enum):
    """How far an artifact is."""

    REQUESTED = "requested"
    RESOLVING = "resolving"
    READY = "ready"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class Artifact:
    """An artifact of one job.

    by_job: the job asked for it, it was not only learned from its class. owner: of what was learned, whose it
    was at the last start, where that is known. folder: the checkpoint that this is a file of. role: of a
    file of a checkpoint, what it is whatever step that is of. files: of a checkpoint without paths, by name
    within it. dropped: it was learned, and the job does not want it any more, or cannot use it.
    """

    ref: ArtifactRef
    by_job: bool
    owner: int | None = None
    folder: Artifact | None = None
    role: str = ""
    files: dict[str, ArtifactRef] = field(default_factory=dict)
    state: State = State.REQUESTED
    resolved: ResolvedArtifact | None = None
    dropped: bool = False
    reason: str = ""  # of a failure
    looked_up: threading.Event = field(default_factory=threading.Event)  # READY, FAILED, or a folder
    begun: threading.Event = field(default_factory=threading.Event)  # its prefetch, or it is not used

    @property
    def is_learned(self) -> bool:
        """Whether the job itself asked neither for it, nor for what it is a part of."""
        return not (self.by_job or (self.folder is not None and self.folder.by_job))

    def set_owner(self, owner: int | None) -> None:
        """Note whose it is now. Raises InputError when it was learned, and was another user's."""
        whole = self.folder or self
        if whole.is_learned and whole.owner is not None and owner not in (None, whole.owner):
            raise InputError(f"belongs to user {owner}, at the last start it was user {whole.owner}'s")
        whole.owner = owner

    def begin_resolving(self) -> None:
        self.state = State.RESOLVING

    def become_ready(self, resolved: ResolvedArtifact | None) -> None:
        """It can be shown to steps. resolved: None of a checkpoint that is a folder."""
        self.resolved = resolved or self.resolved
        self.state, self.reason = State.READY, ""
        self.looked_up.set()

    def fail(self, reason: str) -> None:
        """It cannot be used, for this reason; what it was before stays in use."""
        self.reason = reason
        self.state = State.READY if self.resolved else State.FAILED

    def finish(self) -> None:
        """Nobody need wait for it any longer."""
        self.looked_up.set()
        self.begun.set()
