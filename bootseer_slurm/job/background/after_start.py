"""All that a start leaves for the next one: traces, events, snapshots, and what its class asked for."""

from __future__ import annotations

from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.artifacts.table import Artifacts
from bootseer_slurm.job.background.repacking import Repacking
from bootseer_slurm.job.background.saving import Saving, to_save
from bootseer_slurm.job.background.work import Background
from bootseer_slurm.job.class_record import ClassRecord
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.job.intake import Intake
from bootseer_slurm.job.publishing import Publisher
from bootseer_slurm.job.recording import Recording


class AfterStart:
    """For one job on this node."""

    def __init__(
        self,
        context: JobContext,
        artifacts: Artifacts,
        intake: Intake,
        recording: Recording,
        publisher: Publisher,
        record: ClassRecord,
    ) -> None:
        self._context = context
        self._artifacts = artifacts
        self._intake = intake
        self._recording = recording
        self._record = record
        self._publisher = publisher
        self._background = Background(context)
        self._saving = Saving(self._background, context)
        self._repacking = Repacking(self._background, context)

    def begin(self, why: str, fetched_bytes: dict[Layer, int]) -> None:
        """The start is over: write its traces and events, and begin what is done in the background.

        why: "mark", "quiet" or "cap". fetched_bytes: of each layer, that came during the start.
        """
        context = self._context
        self._recording.finish(why)
        self._publisher.write_events(context.log)
        if not context.job.is_first_node(context.node):
            return
        self._saving.begin(to_save(self._artifacts, context.job.uid, context.job_class))
        process = self._publisher.process
        if not self._intake.only_observes and process.started:
            self._repacking.begin(
                fetched_bytes,
                link_bytes_per_s=process.link.bytes_per_s,
                whole_comes=context.config.prefetch.cold_rate_bytes > 0,
            )

    def stop(self) -> None:
        """The job is over: end what runs in the background."""
        self._background.stop()

    def end(self) -> None:
        """The job is over: write what is not written yet."""
        self._recording.finish("mark" if self._context.phase.is_announced else "end")
        self._recording.close()
        if not self._intake.only_observes:
            self._record.write(self._artifacts, self._publisher)
        self._publisher.write_events(self._context.log)
