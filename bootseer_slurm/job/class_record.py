"""The record of a job's class in the store: what its last start asked for (blob/jobclass.py)."""

from __future__ import annotations

import logging

from bootseer_slurm.artifacts.table import Artifacts, remembered
from bootseer_slurm.blob.jobclass import Remembered, encode_record
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.job.publishing import Publisher
from bootseer_slurm.job.request import learned_refs
from bootseer_slurm.userproc.job_process import JobProcess
from bootseer_slurm.userproc.protocol import Remember

_log = logging.getLogger(__name__)


class ClassRecord:
    """Reads the record at a job's start, and writes it at its end."""

    def __init__(self, context: JobContext, process: JobProcess) -> None:
        self._context = context
        self._process = process
        self._found: list[Remembered] | None = None  # in the store, where it could be read

    def read(self) -> list[tuple[ArtifactRef, int | None]]:
        """All that the last start asked for, with its owners then, images first; [] where not known."""
        try:
            learned = learned_refs(self._process().recall(self._context.job_class))
        except BootseerError as error:
            _log.info("nothing recalled: %s", error, extra={"job": self._context.job.job_id})
            return []
        self._found = [Remembered(ref.kind, ref.name, owner) for ref, owner in learned]
        return learned

    def write(self, artifacts: Artifacts, publisher: Publisher) -> None:
        """Tell the next start what this one asked for, unless the record says so."""
        asked = remembered(artifacts)
        if not self._process.started or asked == self._found:
            return
        if asked or self._found is not None:  # else the store may have something, and was away
            publisher.write(Remember(self._context.job_class), encode_record(asked))
