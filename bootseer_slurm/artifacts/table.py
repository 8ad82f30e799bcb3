"""The artifacts of one job: each in the table once, and no more than one job may ask for. Thread-safe."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from bootseer_slurm.artifacts.artifact import Artifact, State
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.artifacts.resolved import ResolvedArtifact
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import InputError
from bootseer_slurm.shares import NodeShares, Share

_log = logging.getLogger(__name__)

_LOOK_UPS = 64  # of one job on one node: each costs the agent memory and a thread
_DIGESTS_LIMIT_BYTES = 256 * 2**20  # of one job: of blobs of 2 TB
_PLANNED_LIMIT_BLOCKS = 2**20  # of one job: 256 GiB, and some 250 bytes of memory each


class Quota:
    """How much memory and work the artifacts of one job may cost, and the jobs of its user. Thread-safe."""

    def __init__(self, shares: NodeShares, uid: int) -> None:
        self._shares = shares
        self._uid = uid
        self._look_ups = 0
        self._digest_bytes = 0
        self._planned_blocks = 0
        self._closed = False
        self._lock = threading.Lock()

    @property
    def has_look_ups(self) -> bool:
        """Whether one more artifact may be looked up."""
        return self._look_ups < _LOOK_UPS

    def count_look_up(self, ref: ArtifactRef) -> None:
        """One look-up more. Raises InputError when they are too many."""
        with self._lock:
            if self._look_ups >= _LOOK_UPS:
                raise InputError(f"{ref.kind} {ref.name}: this job asked for too much")
            self._take(self._shares.artifacts, 1)
            self._look_ups += 1

    def allow_digests(self, size_bytes: int) -> None:
        """So many bytes of digests more. Raises InputError when they are too many."""
        with self._lock:
            if self._digest_bytes + size_bytes > _DIGESTS_LIMIT_BYTES:
                raise InputError("this job asked for too much: its blobs have too many blocks")
            self._take(self._shares.digests, size_bytes)
            self._digest_bytes += size_bytes

    def allow_plan(self, blocks: int) -> None:
        """A plan of so many blocks more. Raises InputError when they are too many."""
        with self._lock:
            if self._planned_blocks + blocks > _PLANNED_LIMIT_BLOCKS:
                raise InputError(f"the plans of this job would have more than {_PLANNED_LIMIT_BLOCKS} blocks")
            self._take(self._shares.plans, blocks)
            self._planned_blocks += blocks

    def close(self) -> None:
        """Give all back; nothing is allowed after this."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._shares.artifacts.give_back(self._uid, self._look_ups)
        self._shares.digests.give_back(self._uid, self._digest_bytes)
        self._shares.plans.give_back(self._uid, self._planned_blocks)

    def _take(self, share: Share, count: int) -> None:
        """Take of what the node's users share; the caller holds the lock."""
        if self._closed:
            raise InputError("the job is over")
        share.take(self._uid, count)


class Artifacts:
    """The table of one job."""

    def __init__(self, shares: NodeShares, uid: int) -> None:
        """shares: the node's. uid: the job's user."""
        self.quota = Quota(shares, uid)
        self._artifacts: dict[ArtifactRef, Artifact] = {}
        self._resolved: list[ResolvedArtifact] = []  # all, those too that another one took the place of
        self._closed = False
        self._lock = threading.Lock()

    def all(self) -> list[Artifact]:
        """All artifacts, learned ones too."""
        with self._lock:
            return list(self._artifacts.values())

    def find(self, ref: ArtifactRef) -> Artifact | None:
        with self._lock:
            return self._artifacts.get(ref)

    def has_new(self, refs: tuple[ArtifactRef, ...]) -> bool:
        """Whether one of these was not asked for, and can still be."""
        with self._lock:
            if len(self._artifacts) >= _LOOK_UPS:
                return False
            return any(ref not in self._artifacts or not self._artifacts[ref].by_job for ref in refs)

    def request(self, wanted: Artifact) -> tuple[Artifact, bool]:
        """The table's artifact of this reference, and whether it is to be resolved.

        It is when it is new and there is room for it. wanted: says what is known of one that is new; of one
        that is there already, it adds to that.
        """
        with self._lock:
            artifact = self._artifacts.get(wanted.ref)
            if artifact is not None:
                artifact.by_job = artifact.by_job or wanted.by_job
                artifact.folder = artifact.folder or wanted.folder
                artifact.role = artifact.role or wanted.role
                return artifact, False
            if len(self._artifacts) < _LOOK_UPS:
                self._artifacts[wanted.ref] = wanted
                return wanted, True
        wanted.finish()
        return wanted, False

    def can_come(self, artifact: Artifact) -> bool:
        """Whether an artifact is there, or may still be looked up."""
        is_ours = self.find(artifact.ref) is artifact
        return artifact.resolved is not None or (is_ours and self.quota.has_look_ups)

    def add_resolved(self, artifact: Artifact, resolved: ResolvedArtifact) -> bool:
        """Own what an artifact was resolved to; False, and it is closed, when the job is over."""
        with self._lock:
            if not self._closed:
                self._resolved.append(resolved)
                artifact.resolved = resolved
                return True
        resolved.close()
        return False

    def layers(self) -> list[Layer]:
        """All layers that are open by now."""
        with self._lock:
            return [layer for resolved in self._resolved for layer in resolved.layers]

    def drop(self, which: Callable[[ArtifactRef], bool]) -> list[Layer]:
        """Drop what was learned and the job itself did not ask for; gives the layers of it."""
        dropped = [each for each in self.all() if each.is_learned and not each.dropped and which(each.ref)]
        for artifact in dropped:
            artifact.dropped = True
        return [layer for each in dropped if each.resolved for layer in each.resolved.layers]

    def wait_looked_up(self, deadline_s: float) -> bool:
        """Wait until all are looked up, or time.monotonic() is `deadline_s`; False where it was that."""
        while waiting := [each for each in self.all() if not each.looked_up.is_set()]:
            if not waiting[0].looked_up.wait(max(0.0, deadline_s - time.monotonic())):
                return False
        return True

    def refuse_more(self) -> None:
        """The job is over: what is resolved from now on is closed at once."""
        with self._lock:
            self._closed = True

    def close(self) -> None:
        """Close all that was resolved; one that fails holds up no other."""
        with self._lock:
            self._closed = True
            resolved, self._resolved = self._resolved, []
        for each in resolved:
            try:
                each.close()
            except Exception:
                _log.exception("%s %s is not closed", each.ref.kind, each.ref.name)
        for artifact in self.all():
            artifact.state = State.CLOSED
        self.quota.close()


def remembered(artifacts: Artifacts) -> list[Remembered]:
    """All that the next start of the class learns: this one asked for it, or learned and used it."""
    return [
        Remembered(each.ref.kind, each.ref.name, each.owner)
        for each in artifacts.all()
        if each.folder is None and (each.by_job or not each.dropped)
    ]


def image_name(artifacts: Artifacts) -> str:
    """The first image of the job's, "" when it has none."""
    return next((each.ref.name for each in artifacts.all() if each.ref.kind == "image"), "")
