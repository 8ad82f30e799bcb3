"""The view of a job's steps: mounts over originals, and variables that name what has no path.

Owns the folders of checkpoint_folders.py; the table says what there is to be shown. Thread-safe.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.checkpoint_folders import CheckpointFolders
from bootseer_slurm.artifacts.resolved import Bind, ResolvedArtifact
from bootseer_slurm.artifacts.table import Artifacts
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import NotFound
from bootseer_slurm.events import EventLog

_FIRST_STEPS = ("batch", "interactive")


class StepView:
    """For one job."""

    def __init__(self, artifacts: Artifacts, folders: CheckpointFolders, log: EventLog) -> None:
        self._artifacts = artifacts
        self._folders = folders
        self._log = log
        self._told: set[tuple[str, ArtifactRef]] = set()
        self._readable: set[ArtifactRef] = set()
        self._step_seen = False
        self._lock = threading.Lock()

    def open(self, step: str) -> tuple[list[Bind], dict[str, str]]:
        """Fresh mounts for a step (the caller closes them) and its variables, of what is ready by now."""
        # The batch step runs before all others. One that is not the first was seen on this node.
        is_first, self._step_seen = step in _FIRST_STEPS and not self._step_seen, True
        artifacts = [each for each in self._artifacts.all() if not each.dropped]
        resolved = [each.resolved for each in artifacts if each.resolved is not None]
        with ThreadPoolExecutor(len(resolved) or 1) as pool:  # one that does not answer holds up no other
            made = pool.map(lambda each: self._bind(each, is_first), resolved)
            binds = [bind for bind in made if bind]
        for artifact in artifacts:
            if not artifact.looked_up.is_set():
                self._tell("skipped", artifact.ref, "the store had not answered when the step started")
        # An inner original is shown first: below an outer one it could no longer be told from the original.
        return sorted(binds, key=lambda bind: -len(bind.path)), self._variables(artifacts)

    def is_readable(self, ref: ArtifactRef) -> bool:
        """Whether some step was shown it, at its path or by a variable."""
        with self._lock:
            return ref in self._readable

    def close(self) -> None:
        """Take the folders away."""
        with self._lock:
            self._folders.close()

    def _bind(self, resolved: ResolvedArtifact, is_first: bool) -> Bind | None:
        try:
            bind = resolved.bind(is_first=is_first)
        except Exception as error:  # the binds of others are to be shown, or closed
            self._tell("skipped", resolved.ref, str(error))
            return None
        if resolved.path:
            self._tell("shown", resolved.ref, None)
            self._note_readable(resolved.ref)
        return bind

    def _variables(self, artifacts: Sequence[Artifact]) -> dict[str, str]:
        in_folders = {file for each in artifacts for file in each.files.values()}
        by_ref = {each.ref: each for each in artifacts}
        variables: dict[str, str] = {}
        for artifact in sorted(artifacts, key=lambda each: bool(each.files)):  # folders win
            ref, resolved = artifact.ref, artifact.resolved
            try:
                if artifact.files:
                    files = {name: _served_path(by_ref, file) for name, file in artifact.files.items()}
                    with self._lock:
                        variables["BOOTSEER_CHECKPOINT"] = str(self._folders.show(ref.name, files))
                    self._note_readable(*artifact.files.values())
                elif resolved is not None and not resolved.path and ref not in in_folders:
                    variables[f"BOOTSEER_{ref.kind.upper()}"] = str(resolved.served_path)
                    self._note_readable(ref)
            except Exception as error:  # the binds are to be shown, or closed
                self._tell("skipped", ref, str(error))
        return variables

    def _note_readable(self, *refs: ArtifactRef) -> None:
        with self._lock:
            self._readable.update(refs)

    def _tell(self, name: str, ref: ArtifactRef, message: str | None) -> None:
        """Once for all steps: there may be thousands, with as many files each."""
        with self._lock:
            if (name, ref) in self._told:
                return
            self._told.add((name, ref))
        level = "info" if name == "shown" else "warning"
        self._log.emit("shadow", name, target=ref.name, what=ref.kind, message=message, level=level)


def _served_path(artifacts: dict[ArtifactRef, Artifact], ref: ArtifactRef) -> Path:
    resolved = artifacts[ref].resolved if ref in artifacts else None
    if resolved is None:
        raise NotFound(f"{ref.name}: not there, so the checkpoint is not whole")
    return resolved.served_path
