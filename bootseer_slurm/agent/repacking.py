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
from typing import Any

from bootseer_slurm import mounts
from bootseer_slurm.agent.background import Background
from bootseer_slurm.agent.part import Part
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.events import EventLog

_log = logging.getLogger(__name__)

_WHOLE_LIMIT_S = 1800.0  # for the rest of a blob to come, at the cold rate


class Repacking:
    """What one job has packed again on this node. Thread-safe."""

    def __init__(self, background: Background, log: EventLog, job_class: str) -> None:
        self._background = background
        self._log = log
        self._class = job_class
        self._begun = False

    def begin(
        self, fetched_bytes: dict[Part, int], *, link_bytes_per_s: float, whole_comes: bool
    ) -> None:
        """Have parts packed again, one after the other; a second call does nothing.

        fetched_bytes: of all parts, what came of each during the start. link_bytes_per_s: that this node got
        of the store. whole_comes: all of each is going to be there.
        """
        if self._begun or not self._background.is_first_node:
            return
        self._begun = True
        own = f"{user_folder(self._background.job.uid)}/"
        chosen = [part for part in fetched_bytes if part.is_packed_here and part.folder.startswith(own)]
        if chosen:
            arguments = (chosen, fetched_bytes, link_bytes_per_s, whole_comes)
            threading.Thread(target=self._repack_all, args=arguments, name="repacking", daemon=True).start()

    def _repack_all(
        self, parts: list[Part], fetched_bytes: dict[Part, int], link_bytes_per_s: float, whole_comes: bool
    ) -> None:
        for part in parts:
            begin_s = time.monotonic()
            beside_bytes = sum(fetched_bytes.values()) - fetched_bytes[part]
            link: dict[str, Any] = {"link_bytes_per_s": link_bytes_per_s, "beside_bytes": beside_bytes}
            try:
                said, failed = self._repack(part, link, whole_comes)
            except (BootseerError, OSError, ValueError, subprocess.SubprocessError) as error:
                said, failed = str(error), True
            if self._background.over.is_set():
                return
            _log.info("%s: %s", part.label, said, extra={"job": self._background.job.job_id})
            if failed or said.startswith("packed"):
                self._log.emit(
                    "snapshot",
                    "kept" if failed else "packed",
                    target=part.label,
                    what=part.wish.kind,
                    dur_s=time.monotonic() - begin_s,
                    message=f"not packed anew: {said}" if failed else said,
                )

    def _repack(self, part: Part, link: dict[str, Any], whole_comes: bool) -> tuple[str, bool]:
        blob, job = part.reader.blob, self._background.job
        give_up_s = time.monotonic() + _WHOLE_LIMIT_S
        if part.mounted is None:
            return "it is not mounted any more", True
        fd = mounts.bind_clone(part.mounted)
        try:
            task: dict[str, Any] = {
                "kind": part.wish.kind,
                "blob": blob.id,
                "folder": part.folder,
                "image": str(part.served_path),
                "mount": fd,
                "job_class": self._class,
                "job": job.job_id,
                "restart": job.restart,
                "node": self._log.node,
                **link,
            }
            return self._background.run(
                ["bootseer_slurm.repack", json.dumps(task)],
                fds=(fd,),
                # What is missing then would be brought for it while the job trains, past the cold rate.
                when_to_go_on=lambda: (
                    not whole_comes or blob.complete or blob.file.full or time.monotonic() > give_up_s
                ),
            )
        finally:
            os.close(fd)
