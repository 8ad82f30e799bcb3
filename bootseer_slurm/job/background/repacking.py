"""Having images and snapshots packed again in the order in which starts touch them, once a start is over.

On one node of the job, the first of its nodelist, in the background (repack/__main__.py): of what was packed
here, lies in the user's own folder of the store as a whole, and is mounted on this node. Owns one thread. The
event "snapshot" says what came of it.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from dataclasses import dataclass
from typing import Any

from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.job.background.work import Background
from bootseer_slurm.job.context import JobContext

_log = logging.getLogger(__name__)

_WHOLE_LIMIT_S = 1800.0  # for the rest of a blob to come, at the cold rate


@dataclass(frozen=True, slots=True)
class _Work:
    """A layer to be packed again. beside_bytes: what the start brought of all others."""

    layer: Layer
    link_bytes_per_s: float
    beside_bytes: int
    whole_comes: bool


class Repacking:
    """The layers that one job has packed again on this node. Thread-safe."""

    def __init__(self, background: Background, context: JobContext) -> None:
        self._background = background
        self._context = context
        self._begun = False
        self._lock = threading.Lock()

    def begin(self, fetched_bytes: dict[Layer, int], *, link_bytes_per_s: float, whole_comes: bool) -> None:
        """Have layers packed again, one after the other; a second call does nothing.

        fetched_bytes: of all layers, what came of each during the start. link_bytes_per_s: that this node got
        of the store. whole_comes: all of each is going to be there.
        """
        with self._lock:
            if self._begun:
                return
            self._begun = True
        own = f"{user_folder(self._context.job.uid)}/"
        all_bytes = sum(fetched_bytes.values())
        works = [
            _Work(layer, link_bytes_per_s, all_bytes - count, whole_comes)
            for layer, count in fetched_bytes.items()
            if layer.is_packed_here and layer.description.folder.startswith(own)
        ]
        if works:
            threading.Thread(target=self._repack_all, args=(works,), name="repacking", daemon=True).start()

    def _repack_all(self, works: list[_Work]) -> None:
        for work in works:
            begin_s = time.monotonic()
            try:
                said, failed = self._repack(work)
            except (BootseerError, OSError, ValueError, subprocess.SubprocessError) as error:
                said, failed = str(error), True
            if self._context.phase.has_ended:
                return
            label = work.layer.label
            _log.info("%s: %s", label, said, extra={"job": self._context.job.job_id})
            if failed or said.startswith("packed"):
                self._context.log.emit(
                    "snapshot",
                    "kept" if failed else "packed",
                    target=label,
                    what=work.layer.ref.kind,
                    dur_s=time.monotonic() - begin_s,
                    message=f"not packed anew: {said}" if failed else said,
                )

    def _repack(self, work: _Work) -> tuple[str, bool]:
        layer, job = work.layer, self._context.job
        blob = layer.handle.reader.blob
        give_up_s = time.monotonic() + _WHOLE_LIMIT_S
        fd = layer.clone_mounted()
        try:
            task: dict[str, Any] = {
                "kind": layer.ref.kind,
                "blob": blob.id,
                "folder": layer.description.folder,
                "image": str(layer.handle.served_path),
                "mount": fd,
                "job_class": self._context.job_class,
                "job": job.job_id,
                "restart": job.restart,
                "node": self._context.node,
                "link_bytes_per_s": work.link_bytes_per_s,
                "beside_bytes": work.beside_bytes,
            }
            return self._background.run(
                ["bootseer_slurm.repack", json.dumps(task)],
                fds=(fd,),
                # What is missing then would be brought for it while the job trains, past the cold rate.
                when_to_go_on=lambda: (
                    not work.whole_comes or blob.complete or blob.file.full or time.monotonic() > give_up_s
                ),
            )
        finally:
            os.close(fd)
