"""Making snapshots of environments that had none, or that a start installed to, once that start is over.

On one node of the job, the first of its nodelist: `bootseer env save`, in the background. What a start
installed is saved where it is seen over the snapshot, as the job's steps see it (run_as_user.py). Owns
one thread, which waits for that. The event "snapshot" says how it ended.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bootseer_slurm.artifacts.environment import View
from bootseer_slurm.artifacts.table import Artifacts, image_name
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.job.background.run_as_user import SeenAt
from bootseer_slurm.job.background.work import Background
from bootseer_slurm.job.context import JobContext

# How often it is looked whether a start has installed something, where the job does not say that it trains.
_LOOKS, _LOOK_EVERY_S = 10, 60.0


@dataclass(frozen=True)
class ToSave:
    """An environment, and how the command is told what it is used in.

    installed: of one that was installed to, the class, fingerprint and folder of env.snapshot.Installed.
    view: gives what the job sees there; its descriptor is the caller's to close.
    """

    path: str
    options: Sequence[str] = ()
    installed: Sequence[str] = ()
    view: Callable[[], View] | None = None


class Saving:
    """The snapshots that one job makes on this node. Thread-safe."""

    def __init__(self, background: Background, context: JobContext) -> None:
        self._background = background
        self._context = context
        self._begun = False
        self._lock = threading.Lock()

    def begin(self, environments: Sequence[ToSave]) -> None:
        """Save these, one after the other, those that are installed to last; a second call does nothing.

        Unless the job says that it trains, its installer may still run: what is installed is looked at again,
        some times, and once more when the job does say so.
        """
        with self._lock:
            if self._begun or not environments:
                return
            self._begun = True
        thread = threading.Thread(target=self._save_all, args=(environments,), name="saving", daemon=True)
        thread.start()

    def _save_all(self, environments: Sequence[ToSave]) -> None:
        for environment in environments:
            if environment.view is None:
                self._try(environment, last=True)
        installed_to = [environment for environment in environments if environment.view]
        for number in range(_LOOKS if installed_to else 0):
            last = self._context.phase.is_marked or number == _LOOKS - 1
            for environment in installed_to:
                self._try(environment, last=last)
            if not last:
                self._context.phase.wait_marked(_LOOK_EVERY_S)
            if last or self._context.phase.has_ended:
                return

    def _try(self, environment: ToSave, *, last: bool) -> None:
        """Save it, and tell so. Of what is installed nothing may be there; only the last failure is told."""
        begin_s = time.monotonic()
        try:
            said, failed = self._save(environment)
        except (BootseerError, OSError, ValueError, subprocess.SubprocessError) as error:
            said, failed = str(error), True
        if self._context.phase.has_ended or (
            environment.view and not (last if failed else said.endswith(" saved"))
        ):
            return
        self._context.log.emit(
            "snapshot",
            "failed" if failed else "saved",
            target=environment.path,
            what="environment",
            dur_s=time.monotonic() - begin_s,
            level="warning" if failed else "info",
            message=f"not saved: {said}" if failed else "saved for the next start",
        )

    def _save(self, environment: ToSave) -> tuple[str, bool]:
        """Run the command; gives what it said last, and whether it failed."""
        what = "save-installed" if environment.view else "save"
        command = ["bootseer_slurm", "env", what, environment.path]
        command += [*environment.installed, *environment.options]
        if environment.view is None:
            return self._background.run(command)
        view = environment.view()
        try:
            seen_at = SeenAt(*view, environment.path)
            return self._background.run(command, seen_at=seen_at, fds=(view.fd,))
        finally:
            os.close(view.fd)


def to_save(artifacts: Artifacts, uid: int, job_class: str) -> list[ToSave]:
    """The environments without a snapshot, and this user's own that a start may have installed to."""
    image, own, found = image_name(artifacts), f"{user_folder(uid)}/", []
    for artifact in artifacts.all():
        resolved = artifact.resolved
        if artifact.ref.kind != "environment":
            continue
        if resolved is None:
            if not artifact.dropped:
                found.append(ToSave(artifact.ref.name, ["--image", image] if image else []))
        elif resolved.is_writable and resolved.store_folder.startswith(own):
            digest = resolved.reply.image
            installed = [job_class, resolved.reply.fingerprint, resolved.store_folder]
            options = ["--image-digest", digest] if digest else []
            found.append(ToSave(resolved.path, options, installed, resolved.installed_view))
    return found
