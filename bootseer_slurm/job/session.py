"""One job on this node, from its prolog to its epilog.

A session begins, shows each step what is ready, is told of marks, and ends. Everything slow happens in
threads of the job's: `begin`, `step` and `mark` return at once. `attach` shows what is there; who asks waits
until it `can_show` all, some seconds at most.
"""

from __future__ import annotations

import logging
import threading
import time

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.checkpoint_folders import CheckpointFolders
from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.artifacts.open_blobs import OpenBlobs, Use
from bootseer_slurm.artifacts.reattached import Found, reattach
from bootseer_slurm.artifacts.resolve import Context
from bootseer_slurm.artifacts.resolved import Bind
from bootseer_slurm.artifacts.step_view import StepView
from bootseer_slurm.artifacts.table import Artifacts
from bootseer_slurm.blob.jobclass import job_class
from bootseer_slurm.cgroups import job_group, service_folder
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.events import EventLog
from bootseer_slurm.image.signing import read_key
from bootseer_slurm.job.background.after_start import AfterStart
from bootseer_slurm.job.class_record import ClassRecord
from bootseer_slurm.job.context import JobContext, Threads
from bootseer_slurm.job.intake import Intake
from bootseer_slurm.job.journal import Added, Journal
from bootseer_slurm.job.loading import Loader
from bootseer_slurm.job.peering import Peering
from bootseer_slurm.job.publishing import Publisher
from bootseer_slurm.job.recording import Recording, TraceWriter
from bootseer_slurm.job.request import Request, image_ref
from bootseer_slurm.job.telemetry.start import Telemetry
from bootseer_slurm.prefetch.budget import MemoryBudget
from bootseer_slurm.prefetch.scheduler import Scheduler
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.userproc.job_process import JobProcess
from bootseer_slurm.userproc.link import Link
from bootseer_slurm.userproc.spare import Spares

_log = logging.getLogger(__name__)

_PUBLISH_DELAY_S = 2.0  # the other tasks' marks come within it
_JOIN_S = 5.0  # for threads whose process was killed
_LOOK_UP_LIMIT_S = 25.0  # for an importer, which waits for one name


class Session:  # size: it holds the parts of a job, which know nothing of it
    """A job that asked for Bootseer. Thread-safe."""

    def __init__(
        self, job: Job, node: str, config: Config, blobs: OpenBlobs, journal: Journal, spares: Spares
    ) -> None:
        log = EventLog(job.job_id, job.restart, node, path=journal.events_path(job.job_id, job.restart))
        of_class = job_class(job.uid, job.account, job.name)
        group = job_group(service_folder(), job.folder_name)
        context = self.context = JobContext(job, of_class, node, config, log, group)
        self._blobs = blobs
        self._journal = journal
        self._reattached: list[BlobHandle] = []
        self.artifacts = Artifacts(blobs.shares, job.uid)
        self._process = JobProcess(job.uid, job.gid, config, spares.users, group)
        self._threads = Threads(context)
        self._budget = MemoryBudget()
        self.scheduler = Scheduler(
            self._process.link, config.prefetch, self._budget, context.phase, log, context.fault
        )
        publisher = Publisher(job, self._process)
        writer = TraceWriter(job, node, of_class, publisher)
        self._recording = Recording(writer, config.prefetch, context.phase, self._end_start)
        self._telemetry = Telemetry(
            job, log, context.phase, self.artifacts.layers, limit_s=config.prefetch.start_cap_s
        )
        folders = CheckpointFolders(config.agent.mounts / "named" / job.folder_name)
        self._view = StepView(self.artifacts, folders, log)
        key = read_key(config.image.site_key)
        self._peering = Peering(context, spares.peers, key)
        surroundings = Context(
            self._process,
            blobs,
            config.shadow.roots,
            job.uid,
            job.gid,
            job.rank(node),
            config.store.uri,
            key,
            self.artifacts.quota.allow_digests,
            self._peering.join,
        )
        self._loader = Loader(context, self.artifacts, surroundings, self._recording, journal)
        record = ClassRecord(context, self._process)
        self.intake = Intake(context, self.artifacts, self._loader, self.scheduler, self._threads, record)
        self._after_start = AfterStart(
            context, self.artifacts, self.intake, self._recording, publisher, record
        )

    @property
    def link(self) -> Link:
        """The link that the job's bytes come over."""
        return self._process.link

    def begin(self, request: Request, *, hook_start_ns: int | None) -> None:
        """Start to bring what the job asks for."""
        now_ns = time.time_ns()
        job, log = self.context.job, self.context.log
        if hook_start_ns:
            log.emit("hook", "begin", t_ns=hook_start_ns)
            log.emit("hook", "received", t_ns=now_ns)
        nodelist = self._usable_nodelist()
        log.emit(
            "session",
            "begin",
            t_ns=now_ns,
            uid=job.uid,
            nodelist=nodelist or None,
            mode="observe" if request.observe else "prefetch",
            partition=job.partition or None,
            job_name=job.name or None,
        )
        self._telemetry.begin()
        self._begin_peers(request)
        self.intake.begin(request)

    def _begin_peers(self, request: Request) -> None:
        if not request.observe:
            self._peering.begin()

    def _usable_nodelist(self) -> str:
        """The job's list of nodes; "" where there is none, or none that can be used, which is told."""
        job = self.context.job
        try:
            job.nodes(self.context.node)
        except InputError as error:
            self.context.fault("nodelist_not_used", error.message)
            return ""
        return job.nodelist

    def recover(self, request: Request, found: list[Found]) -> None:
        """Go on where an agent was killed. found: the blobs that it had given the job."""
        context = self.context
        message = "the agent was started again"
        context.log.emit("fault", "agent_restarted", level="warning", message=message)
        self._recording.resume()
        for each in found:
            use = Use(each.kind, context.job.uid, context.job.gid)
            try:
                self._reattached.append(reattach(each, self._blobs, use, self._process, context.fault))
            except (BootseerError, OSError) as error:
                context.fault("blob_not_held", str(error))
        self._begin_peers(request)
        self.intake.begin(request)

    def step(self, step: str, memory_bytes: int = 0) -> None:
        """A step comes. memory_bytes: that the job has on this node, 0 when that is not known."""
        if memory_bytes:
            self._budget.bound(memory_bytes)
        self.context.log.emit("step", "attach", step=step)
        self._recording.step()

    def can_show(self) -> bool:
        """Whether all is looked up that the job asked for."""
        return self.intake.wait_looked_up(0.0)

    def attach(self, step: str) -> tuple[list[Bind], dict[str, str]]:
        """The view of a step: mounts over its originals (the caller closes them), and its environment."""
        shown = self._view.open(step)
        self._recording.shown(each for each in self.artifacts.layers() if self._view.is_readable(each.ref))
        self._telemetry.step()
        return shown

    def image(self, name: str, digest: str) -> tuple[str, str]:
        """Where the job's user can open an image, once what its start needs is there, and its fingerprint.

        digest: what the registry says that its tag means now, or "". Waits `hot_wait_s` for the blocks.
        Raises NotFound when the store does not have the image, or has an older one under this tag.
        """
        self._telemetry.image_asked(name)
        ref = image_ref(name)
        if self.intake.only_observes:
            raise InputError("this job only wants to be measured")
        asked = Request(observe=False, wanted=(ref,))
        is_new = self.intake.wants(asked)
        artifact = self.intake.request(Artifact(ref, by_job=True))
        if not self.artifacts.can_come(artifact):
            raise InputError(f"image {ref.name}: this job asked for too much")
        if is_new:
            self._journal.add(self.context.job.job_id, Added(asked))
        self._recording.step()
        artifact.begun.wait(_LOOK_UP_LIMIT_S)
        self.intake.take_back(artifact)
        resolved = artifact.resolved
        if resolved is None or (digest and resolved.reply.fingerprint != digest):
            resolved = self.intake.load(artifact, digest)  # again: the importer may just have made it
        if resolved is None or (digest and resolved.reply.fingerprint != digest):
            raise NotFound(f"image {ref.name}: not in the store, or an older one")
        self._recording.shown(resolved.layers)
        self.scheduler.wait_hot(resolved.layers[0], self.context.config.prefetch.hot_wait_s)
        return str(resolved.served_path), resolved.reply.fingerprint

    def mark(self, name: str, *, t_ns: int, step: str | None, task: int | None) -> None:
        """Record where the job is. Raises InputError when a value is not usable."""
        self.context.log.emit("mark", name, t_ns=t_ns, step=step, task=task)
        if name == "training_started":
            self._telemetry.trains()
            if self.context.phase.announce():
                threading.Thread(target=self._end_start_later, daemon=True).start()

    def stage(self, name: str, *, t_ns: int, step: str, task: int | None, detail: str | None) -> None:
        """Record what the plugin says of a step."""
        log = self.context.log
        if name == "task_start" and step.isdecimal():
            self.intake.drop(lambda ref: ref.can_be_imported)  # its container, if any, is there
        if name == "shadow_failed":
            log.emit("shadow", "failed", t_ns=t_ns, step=step, level="warning", message=detail)
        else:
            log.emit("step", name, t_ns=t_ns, step=step, task=task, message=detail)

    def end(self, reason: str) -> None:
        """The job is over on this node: write its events, let go of everything."""
        if not self.context.phase.end():
            return
        self.artifacts.refuse_more()
        self.scheduler.stop()
        self._after_start.stop()
        try:
            self._tell_end(reason)
        except Exception:
            _log.exception("the session's end is not told", extra={"job": self.context.job.job_id})
        finally:
            self._let_go()

    def _tell_end(self, reason: str) -> None:
        """Write what the next start and the report need."""
        context = self.context
        self._telemetry.end()
        for artifact in self.artifacts.all():
            ref = artifact.ref
            if artifact.resolved is None and ref.can_be_imported and not artifact.is_learned:
                context.fault("image_not_used", f"image {ref.name}: not in the store")
        self._peering.tell()
        context.log.emit("hook", "epilog", message=reason)
        context.log.emit("session", "end")
        self._after_start.end()

    def _let_go(self) -> None:
        """End all that the session had."""
        job = self.context.job
        self._process.kill()
        self._peering.end()
        self.scheduler.join(_JOIN_S)
        self._threads.join(_JOIN_S)
        self._process.close()
        closes = [self._view.close, self.artifacts.close, *(each.close for each in self._reattached)]
        for close in closes:
            try:
                close()
            except Exception:  # the others are let go all the same
                _log.exception("a blob is not let go", extra={"job": job.job_id})
        self.context.group.end()
        self._loader.close()
        self.context.log.close()
        self._journal.forget(job.job_id, job.restart)

    def _end_start_later(self) -> None:
        if not self.context.phase.wait_end(_PUBLISH_DELAY_S):  # else the end does all this
            self._end_start("mark")
            self.context.phase.take_announcement()

    def _end_start(self, why: str) -> None:
        """The job trains: what it touched until now was its start, and the rest can wait."""
        fetched_bytes = {layer: layer.handle.usage.fetched_bytes for layer in self.artifacts.layers()}
        read_ns = self._recording.last_new_ns if why == "quiet" else 0
        self.context.phase.train(marked=why == "mark")
        self._telemetry.over(read_ns=read_ns)
        self.scheduler.start_over()
        self._after_start.begin(why, fetched_bytes)
