"""The sessions of this node, one for each job id: begun, found, ended, and recovered by a new agent.

Owns the table and its journal on disk. Thread-safe. One thread ends sessions whose epilog was lost.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import psutil

from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.artifacts.reattached import Found
from bootseer_slurm.errors import BootseerError, NotFound
from bootseer_slurm.job.journal import Added, Began, Journal
from bootseer_slurm.job.request import Request, number, parse_job, parse_request
from bootseer_slurm.job.session import Session
from bootseer_slurm.service.endings import Endings, faults_of
from bootseer_slurm.service.lost_epilogs import LostEpilogs
from bootseer_slurm.slurm.allocation import Job

_log = logging.getLogger(__name__)

_END_LIMIT_S = 20.0  # for all sessions when the agent stops; the systemd unit allows 30 s
_RESTORE_LIMIT_S = 60.0  # readers of what was being looked up when an agent died wait this long for the next
_LOOK_EVERY_S = 1.0  # for lost epilogs, of which the hook left a word
_STEPS_EVERY_S = 30.0  # for steps: to look at each process of a large node takes 0.1 s
# An interactive job may pause between its steps, where Slurm keeps no step for the whole of it
# (PrologFlags=Contain); what is lost by waiting is some disk.
_REAP_AGE_S = 3600.0
_REAP_AGE_WITHOUT_STEP_S = 86400.0  # an allocation may wait long for its first step on this node
_STEP_TITLE = re.compile(r"^slurmstepd: \[(\d+)\.([^]]*)\]")
_WHOLE_JOB = "extern"
_OVER_MOST = 4096  # jobs of a node whose last messages may still wait to be read


def jobs_with_steps() -> dict[int, set[str]]:
    """The jobs that have steps on this node, and these: each has a slurmstepd, "slurmstepd: [1234.batch]".

    Anybody can give himself this title: only root's processes that run slurmstepd count.
    """
    jobs: dict[int, set[str]] = {}
    for process in psutil.process_iter(["name"]):
        if not (process.info["name"] or "").startswith("slurmstepd"):
            continue
        with contextlib.suppress(psutil.Error, OSError):
            title = _STEP_TITLE.match(" ".join(process.cmdline()))
            program = os.readlink(f"/proc/{process.pid}/exe").removesuffix(" (deleted)")
            if title and process.uids().real == 0 and os.path.basename(program) == "slurmstepd":
                jobs.setdefault(int(title[1]), set()).add(title[2])
    return jobs


@dataclass(slots=True)
class _Row:
    """A session in the table.

    begin_ns: since the epoch, when the hook began; 0 of one that a step began, or an agent before this one.
    contained: its job has a step that lasts as long as the job. absent: rounds in a row in which its job had
    no step on this node.
    """

    session: Session
    begin_s: float
    begin_ns: int
    had_step: bool = False
    contained: bool = False
    absent: int = 0


class Sessions:
    """The sessions of one node."""

    def __init__(
        self,
        make: Callable[[Job, str], Session],
        journal: Journal,
        lost: LostEpilogs,
        *,
        observe_all: bool = False,
    ) -> None:
        """make: a session of a job on the node that Slurm calls so. observe_all: of every job."""
        self._make = make
        # What the site asks for a job that did not ask itself.
        self._site_request = Request(observe=True, asked=False) if observe_all else None
        self._journal = journal
        self._lost = lost
        self._rows: dict[int, _Row] = {}
        self._over: dict[int, int] = {}  # jobs that are over, and when, in the order of their ends
        self._endings = Endings()
        self.begun = 0  # sessions since the agent started
        self._lock = threading.RLock()

    def begin(self, message: Message) -> None:
        """A job's prolog: end what an earlier start of it left, and begin when it asks. Raises InputError."""
        job, asked = parse_job(message), parse_request(message)
        request = asked or self._site_request
        hook_start_ns = number(message, "HOOK_START_NS", "0")
        with self._lock:  # at once: a step that comes in between would begin a session that nobody ends
            over_ns = max(self._lost.time_ns(job.job_id), self._over.get(job.job_id, 0))
            if 0 < hook_start_ns < over_ns:  # this message waited, and its job did not
                return
            self.end(job.job_id, "requeued", hook_start_ns)  # a session of this job is of an earlier start
            self._lost.forget(job.job_id)
            self._over.pop(job.job_id, None)
            if request is None:
                return
            session = self._keep(Began(job, first(message, "NODENAME"), asked), hook_start_ns)
        session.begin(request, hook_start_ns=hook_start_ns)

    def step(self, message: Message) -> Session | None:
        """The session of a step's job, with what the step asks for added; None when the job is not ours.

        A job that asked in this step only, or whose prolog was lost, begins here. Raises InputError.
        """
        job, request = parse_job(message), parse_request(message)
        with self._lock:
            row = self._rows.get(job.job_id)
            if row is None and request is not None and job.job_id not in self._over:
                began = Began(job, first(message, "NODENAME"), request)
                self._keep(began, 0).begin(request, hook_start_ns=None)
                row = self._rows[job.job_id]
            elif row is not None and request is not None and row.session.intake.wants(request):
                self._journal.add(job.job_id, Added(request))
            if row is None or row.session.context.job.uid != job.uid:
                return None
            row.had_step, row.absent = True, 0
        row.session.intake.add(request or Request(observe=True))
        return row.session

    def find(self, job_id: int) -> Session:
        """The session of a job. Raises NotFound."""
        with self._lock:
            row = self._rows.get(job_id)
        if row is None:
            raise NotFound(f"job {job_id} did not ask for Bootseer on this node")
        return row.session

    def all(self) -> list[Session]:
        """The sessions of jobs that are not over."""
        with self._lock:
            return [row.session for row in self._rows.values()]

    def faults(self) -> Counter[str]:
        """How often each fault was told since the agent started, by its name."""
        with self._lock:
            ending, past = self._endings.state()
            sessions = self.all() + ending
        # Without the lock, which prologs wait for: a job may have made 20,000 marks.
        return sum(map(faults_of, sessions), past)

    def end(self, job_id: int, reason: str, at_ns: int = 0) -> None:
        """Take a job's session out of the table, if there is one, and end it in a thread.

        at_ns: since the epoch, when the job was over; a session that began later is another start's. 0: now.
        Remembered for a while: what the job has sent before may be read later.
        """
        at_ns = at_ns or time.time_ns()
        with self._lock:
            self._over[job_id] = at_ns
            if len(self._over) > _OVER_MOST:
                del self._over[next(iter(self._over))]
            row = self._rows.get(job_id)
            if row is None or row.begin_ns >= at_ns:
                return
            del self._rows[job_id]
            self._journal.end(job_id, row.session.context.job.restart)
            self._endings.begin(row.session, reason)

    def end_all(self, reason: str) -> None:
        """End the sessions, all at once, and wait for them and for those that are ending already."""
        for session in self.all():
            self.end(session.context.job.job_id, reason)
        self._endings.wait(_END_LIMIT_S)

    def restore(self) -> None:
        """Recover the sessions of an agent that was killed, and end those that were just ending."""
        for began in self._journal.endings():
            with contextlib.suppress(BootseerError):
                self._endings.begin(self._make(began.job, began.node), "job ended")
        for job_id, began, others in list(self._journal.jobs()):
            try:
                request = began.request or self._site_request
                if request is None or began.job.job_id != job_id:
                    continue
                with self._lock:
                    session = self._make(began.job, began.node)
                    self._rows[job_id] = _Row(session, time.monotonic(), begin_ns=0)
                session.recover(request, [each for each in others if isinstance(each, Found)])
                for each in others:
                    if isinstance(each, Added):
                        session.intake.add(each.request)
                _log.warning("session recovered", extra={"job": job_id})
            except BootseerError as error:
                _log.error("session cannot be recovered: %s", error, extra={"job": job_id})

    def wait_restored(self) -> None:
        """Wait until what these sessions had is looked up again, `_RESTORE_LIMIT_S` at most."""
        deadline_s = time.monotonic() + _RESTORE_LIMIT_S
        with self._lock:
            sessions = [row.session for row in self._rows.values()]
        for session in sessions:
            session.intake.wait_looked_up(deadline_s)

    def _keep(self, began: Began, begin_ns: int) -> Session:
        """A new session in the table and the journal; the caller holds the lock."""
        session = self._make(began.job, began.node)
        self._rows[began.job.job_id] = _Row(session, time.monotonic(), begin_ns)
        self.begun += 1
        self._journal.begin(began)
        return session

    def without_step(self, jobs: Mapping[int, set[str]]) -> list[int]:
        """Note which jobs have steps in this round; give those whose session is to be ended."""
        over = []
        with self._lock:
            for job_id, row in self._rows.items():
                row.had_step |= job_id in jobs
                row.contained |= _WHOLE_JOB in jobs.get(job_id, ())
                # Two rounds, for a job has no step for a moment between one and the next.
                row.absent = 0 if job_id in jobs else row.absent + 1
                age_s = _REAP_AGE_S if row.had_step else _REAP_AGE_WITHOUT_STEP_S
                is_old = time.monotonic() - row.begin_s > age_s
                if row.absent >= 2 and (row.contained or is_old):
                    over.append(job_id)
        return over


def reap(sessions: Sessions, lost: LostEpilogs, stop: threading.Event) -> None:
    """End, round by round, the sessions whose epilog was lost, until `stop` is set."""
    next_look_s = 0.0
    while not stop.wait(_LOOK_EVERY_S):
        for job_id, lost_ns in lost.all():
            _log.warning("no agent took the epilog", extra={"job": job_id})
            sessions.end(job_id, "job ended", lost_ns)
            lost.forget(job_id)
        if time.monotonic() < next_look_s or not sessions.all():
            continue
        next_look_s = time.monotonic() + _STEPS_EVERY_S
        try:
            for job_id in sessions.without_step(jobs_with_steps()):
                _log.warning("no step left and no epilog", extra={"job": job_id})
                sessions.end(job_id, "no step left")
        except (psutil.Error, OSError, RuntimeError) as error:  # the next may do better
            _log.warning("cannot look for sessions without a step: %s", error)
