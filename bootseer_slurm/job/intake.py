"""All that one job asks for: by its options, in its steps, by pyxis's importer, and as its class did before.

Of each kind: what the options and pyxis ask for; else what this job class asked for at its last start
(blob/jobclass.py), which is shown as if it had been asked for now. An image of a registry has no path to be
shown at: of one that was learned no more is brought once tasks start without it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.resolved import ResolvedArtifact
from bootseer_slurm.artifacts.table import Artifacts
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.job.class_record import ClassRecord
from bootseer_slurm.job.context import JobContext, Threads
from bootseer_slurm.job.loading import Loader, prefetch_layer
from bootseer_slurm.job.request import Request
from bootseer_slurm.prefetch.scheduler import Scheduler


class Intake:
    """The requests of one job, each thing loaded once. Thread-safe."""

    def __init__(
        self,
        context: JobContext,
        artifacts: Artifacts,
        loader: Loader,
        scheduler: Scheduler,
        threads: Threads,
        record: ClassRecord,
    ) -> None:
        self.only_observes = False
        self._by_site = False  # the job did not ask, and may still do so in a step
        self._context = context
        self._artifacts = artifacts
        self._loader = loader
        self._scheduler = scheduler
        self._threads = threads
        self._record = record
        self._recalled = threading.Event()  # the class's record is read
        self._recalled.set()

    def begin(self, request: Request) -> None:
        """Load what a job asks for at its begin, and what its class asked for before."""
        self.only_observes, self._by_site = request.observe, not request.asked
        self.add(request)
        if not request.observe:
            self._begin_recall(request)

    def wants(self, request: Request) -> bool:
        """Whether a request has anything new."""
        return self._artifacts.has_new(request.wanted)

    def add(self, request: Request) -> None:
        """Load these too; what was asked for already is not asked for twice."""
        if request.observe or (self.only_observes and not self._by_site):
            return
        if self._by_site:
            self.only_observes = self._by_site = False
            self._context.log.emit("session", "mode", mode="prefetch")
            self._begin_recall(request)
        self._loader.writable = self._loader.writable or request.writable
        other_kinds = {ref.kind for ref in request.wanted if self._artifacts.find(ref) is None}
        for ref in sorted(request.wanted, key=lambda ref: ref.kind != "image"):  # environments ask for it
            self.request(Artifact(ref, by_job=True))
        self.drop(lambda ref: ref.kind in other_kinds)  # this job does not ask for what the last one did

    def request(self, wanted: Artifact) -> Artifact:
        """The artifact of this reference, loaded from now on if it is new."""
        artifact, is_new = self._artifacts.request(wanted)
        if is_new and not self._threads.start(self.load, artifact):
            artifact.finish()
        return artifact

    def load(self, artifact: Artifact, digest: str = "") -> ResolvedArtifact | None:
        """Load an artifact now; see Loader.load."""
        return self._loader.load(artifact, self._scheduler, self._request_file, digest)

    def _request_file(self, ref: ArtifactRef, folder: Artifact, role: str) -> None:
        self.request(Artifact(ref, by_job=False, folder=folder, role=role))

    def drop(self, which: Callable[[ArtifactRef], bool]) -> None:
        """Bring and show no more of what was only learned."""
        for layer in self._artifacts.drop(which):
            self._scheduler.drop(layer)

    def take_back(self, artifact: Artifact) -> None:
        """A container wants an image after all that was dropped."""
        if artifact.dropped and artifact.resolved:
            artifact.dropped = False
            for layer in artifact.resolved.layers:
                prefetch_layer(self._scheduler, artifact.resolved, layer)

    def wait_looked_up(self, deadline_s: float) -> bool:
        """Wait until all is looked up, or time.monotonic() is `deadline_s`; False where it was that."""
        recalled = self._recalled.wait(max(0.0, deadline_s - time.monotonic()))
        return self._artifacts.wait_looked_up(deadline_s) and recalled

    def _begin_recall(self, request: Request) -> None:
        self._recalled.clear()
        if not self._threads.start(self._recall, {ref.kind for ref in request.wanted}):
            self._recalled.set()

    def _recall(self, kinds: set[str]) -> None:
        """Load what this class asked for at its last start, of kinds that are not asked for now."""
        try:
            for ref, owner in self._record.read():
                if ref.kind not in kinds:
                    self._context.log.emit("plan", "learned", target=ref.name, what=ref.kind)
                    self.request(Artifact(ref, by_job=False, owner=owner))
        finally:
            self._recalled.set()
