"""Loading the artifacts of one job: each is resolved, shown to steps, planned and prefetched, in this order.

A checkpoint that is a folder is loaded file by file. Everything here is slow, and runs in threads of the job.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.environment import MountPlace, mount_environment
from bootseer_slurm.artifacts.layer import Layer, fetch_plan
from bootseer_slurm.artifacts.resolve import Context, ShadowRefused, resolve_artifact
from bootseer_slurm.artifacts.resolved import ResolvedArtifact
from bootseer_slurm.artifacts.table import Artifacts, image_name
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.env.mounting import unmount_left
from bootseer_slurm.env.unpacking import DiskBounds, remove, unpacked_folder
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.identity import User
from bootseer_slurm.image.signing import Key
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.job.journal import Journal
from bootseer_slurm.job.recording import Recording
from bootseer_slurm.job.request import learned_refs
from bootseer_slurm.prefetch.order import both_ends
from bootseer_slurm.prefetch.scheduler import Scheduler
from bootseer_slurm.userproc.protocol import FILES_LIMIT, CheckpointFolder, Resolve

_log = logging.getLogger(__name__)

_WHOLE_TRACE_EVERY = 8
_UNREAD = "not brought: the last start of this class was shown it and did not read it"

# Has the files of a checkpoint loaded: each a reference with its role, for the folder.
RequestFile = Callable[[ArtifactRef, Artifact, str], None]


class Loader:
    """Loads for one job. Thread-safe."""

    def __init__(
        self,
        context: JobContext,
        artifacts: Artifacts,
        surroundings: Context,
        recording: Recording,
        journal: Journal,
    ) -> None:
        job, config = context.job, context.config
        self._context = context
        self._artifacts = artifacts
        self._surroundings = surroundings
        self._blobs = surroundings.blobs
        self._recording = recording
        self._journal = journal
        no_key = Key(b"", "kernel_mount is off")
        self._key = no_key if config.image.kernel_mount == "off" else surroundings.key
        self._folder = config.agent.mounts / "env" / job.folder_name
        self._disk = unpacked_folder(config.cache.path) / job.folder_name
        self.writable = False  # environments get a layer to write to

    def load(
        self, artifact: Artifact, scheduler: Scheduler, request_file: RequestFile, digest: str = ""
    ) -> ResolvedArtifact | None:
        """Load an artifact; None when it cannot be used, or is a folder, whose files are requested.

        digest: of an image, what its tag means now.
        """
        ref, job = artifact.ref, self._context.job
        try:
            artifact.begin_resolving()
            self._artifacts.quota.count_look_up(ref)
            resolved = self._resolve(artifact, digest)
            if isinstance(resolved, CheckpointFolder):
                self._take_folder(artifact, resolved, request_file)
                return None
            if not self._artifacts.add_resolved(artifact, resolved):
                return None
            for layer in resolved.layers:
                self._journal.add(job.job_id, layer.found)
            artifact.become_ready(resolved)
            if not artifact.dropped:
                self._begin_prefetch(artifact, resolved, scheduler)
            return resolved
        except (BootseerError, OSError) as error:
            is_refused = isinstance(error, ShadowRefused)
            artifact.dropped = is_refused or (artifact.is_learned and isinstance(error, InputError))
            artifact.fail(str(error))
            if is_refused:
                self._context.fault("shadow_refused", str(error))
            elif isinstance(error, NotFound) and (artifact.is_learned or ref.can_be_imported):
                pass
            elif artifact.is_learned:
                self._context.log.emit("plan", "not_used", target=ref.name, what=ref.kind, message=str(error))
            else:
                self._context.fault(f"{ref.kind}_not_used", str(error))
        except Exception as error:
            artifact.fail(type(error).__name__)
            _log.exception("%s %s", ref.kind, ref.name, extra={"job": job.job_id})
            self._context.fault(f"{ref.kind}_not_used", f"{ref.kind} {ref.name}: {type(error).__name__}")
        finally:
            artifact.finish()
        return None

    def _resolve(self, artifact: Artifact, digest: str) -> ResolvedArtifact | CheckpointFolder:
        """Resolve it, and mount what is an environment. Raises BootseerError."""
        ref, job = artifact.ref, self._context.job
        is_environment = ref.kind == "environment"
        may_be_folder = ref.kind == "checkpoint" and artifact.folder is None
        request = Resolve(
            ref.kind,
            ref.name,
            digest=digest,
            image=image_name(self._artifacts) if is_environment else "",
            job_class=self._context.job_class if is_environment and self.writable else "",
            rank=self._surroundings.rank.number,
            nodes=self._surroundings.rank.nodes if may_be_folder else 0,
            newest=artifact.is_learned,
        )

        def on_fault(name: str, message: str) -> None:
            self._context.fault(name, f"{ref.name}: {message}")

        resolved = resolve_artifact(request, self._surroundings, on_fault, role=artifact.role)
        if isinstance(resolved, CheckpointFolder):
            return resolved
        try:
            artifact.set_owner(resolved.owner)
            if resolved.reply.warning:
                self._context.fault("store_not_used", resolved.reply.warning)
            if is_environment:
                if self.writable and job.uid not in (0, resolved.owner):
                    whose = f"environment {resolved.path} belongs to user {resolved.owner}"
                    raise ShadowRefused(f"{whose}, so this job cannot install to it")
                place = self._mount_place(resolved.owner)
                resolved.environment = mount_environment(resolved.layers, resolved.path, place, on_fault)
        except BaseException:
            resolved.close()
            raise
        return resolved

    def _mount_place(self, owner: int | None) -> MountPlace:
        job, cache = self._context.job, self._context.config.cache
        return MountPlace(
            self._blobs.private,
            self._folder,
            self._disk,
            DiskBounds(cache.max_bytes, cache.min_free_bytes),
            User(job.uid, job.gid, ()),
            self._key,
            self.writable,
            owner,
            self._context.group,
        )

    def close(self) -> None:
        """Take away what is left of the job's environments."""
        unmount_left(self._blobs.private, self._folder)
        remove(self._disk)

    def _take_folder(self, artifact: Artifact, found: CheckpointFolder, request_file: RequestFile) -> None:
        """Have each file of the newest checkpoint in a folder loaded. Raises InputError."""
        ref, files, message = artifact.ref, found.files, found.message
        has_no_path = len(files) > 1 and any("://" in file.name for file in files)
        if found.count > len(files):
            if has_no_path:
                raise InputError(
                    f"checkpoint {ref.name}: more than {FILES_LIMIT} files that have no path of their own"
                )
            message += f"; {len(files)} of its files are brought"
        refs = {
            file.within: (file_ref, file.role)
            for file in files
            for file_ref, _ in learned_refs([Remembered(ref.kind, file.name)])
        }
        self._context.log.emit("plan", "located", target=ref.name, what=ref.kind, message=message or None)
        if has_no_path:  # at once: steps look at it
            artifact.files = {within: file for within, (file, _) in refs.items()}
        for file, role in refs.values():
            request_file(file, artifact, role)
        artifact.become_ready(None)

    def _begin_prefetch(self, artifact: Artifact, resolved: ResolvedArtifact, scheduler: Scheduler) -> None:
        context = self._context
        for layer in resolved.layers:
            self._recording.add(layer)
            fetch_plan(
                layer, self._surroundings.process(), context.job_class, allow=self._artifacts.quota.allow_plan
            )
            if layer.is_unread and artifact.folder is None:
                context.log.emit("plan", "unread", target=layer.label, what=layer.ref.kind, message=_UNREAD)
            # Blocks that are pushed are read unseen: of every few starts, one is recorded whole.
            if layer.is_settled and context.job.job_id % _WHOLE_TRACE_EVERY:
                layer.handle.push_prefetched()
            prefetch_layer(scheduler, resolved, layer)
            if layer.ref.kind == "image" and layer.is_signed(self._key):
                try:
                    layer.mount_image()
                except BootseerError as error:
                    context.fault("kernel_mount_failed", error.message)
                self._recording.mounted(layer)


def prefetch_layer(scheduler: Scheduler, resolved: ResolvedArtifact, layer: Layer) -> None:
    """Have a layer prefetched, with what its kind needs first and last."""
    kind, size_bytes = layer.ref.kind, layer.handle.reader.size_bytes
    first = resolved.reply.first_ranges(size_bytes) if kind == "image" else ()
    scheduler.add(layer, first=first, ends=both_ends(size_bytes) if kind == "checkpoint" else ())
