"""The sessions of this node, one for each job id: begun, found, ended, and recovered by a new agent.

Owns the table and its journal on disk. Thread-safe.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

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
# An interactive job may pause between its steps; what is lost by waiting is some disk.
_REAP_AGE_S = 3600.0
_REAP_AGE_WITHOUT_STEP_S = 86400.0  # an allocation may wait long for its first step on this node
# Steps that last as long as the job does on this node. There is one where Slurm has PrologFlags=Contain.
_LASTING = frozenset({"extern", "batch", "interactive"})
_OVER_MOST = 4096  # jobs of a node whose last messages may still wait to be read


@dataclass(slots=True)
class _Row:
    """A session in the table.

    seen_s: when its job was seen last, by time.monotonic(). begin_ns: since the epoch, when the hook began;
    0 of one that a step began, or an agent before this one. had_lasting: its job had a step that lasts as
    long as the job. absent: rounds in a row in which its job had no step on this node.
    """

    session: Session
    seen_s: float
    begin_ns: int
    had_step: bool = False
    had_lasting: bool = False
    absent: int = 0

    def see_step(self) -> None:
        self.had_step, self.absent, self.seen_s = True, 0, time.monotonic()

    @property
    def is_over(self) -> bool:
        """Whether its job has left. Two rounds, for it has no step for a moment between one and the next."""
        age_s = _REAP_AGE_S if self.had_step else _REAP_AGE_WITHOUT_STEP_S
        return self.absent >= 2 and (self.had_lasting or time.monotonic() - self.seen_s > age_s)


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
            self.end(job.job_id, "requeued")  # a session of this job is of an earlier start
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
            row.see_step()
        row.session.intake.add(request or Request(observe=True))
        return row.session

    def find(self, job_id: int) -> Session:
        """The session of a job. Raises NotFound."""
        with self._lock:
            row = self._rows.get(job_id)
        if row is None:
            raise NotFound(f"job {job_id} did not ask for Bootseer on this node")
        return row.session

    def all(self, *, with_ending: bool = False) -> list[Session]:
        """The sessions of jobs that are not over. with_ending: those too that are just ending."""
        with self._lock:
            sessions = [row.session for row in self._rows.values()]
            return sessions + self._endings.state()[0] if with_ending else sessions

    def faults(self) -> Counter[str]:
        """How often each fault was told since the agent started, by its name."""
        with self._lock:
            ending, past = self._endings.state()
            sessions = self.all() + ending
        # Without the lock, which prologs wait for: a job may have made 20,000 marks.
        return sum(map(faults_of, sessions), past)

    def end(self, job_id: int, reason: str, at_ns: int = 0) -> Session | None:
        """Take a job's session out of the table, if there is one, and end it in a thread; gives it.

        at_ns: since the epoch, when the hook said that the job was over: a session that began later is
        another start's. Remembered for a while, for what the job has sent before may be read later. Raises
        RuntimeError where no thread can be started; then it can be ended later.
        """
        with self._lock:
            if at_ns:
                self._over[job_id] = at_ns
            if len(self._over) > _OVER_MOST:
                del self._over[next(iter(self._over))]
            row = self._rows.get(job_id)
            if row is None or 0 < at_ns <= row.begin_ns:
                return None
            self._journal.end(job_id, row.session.context.job.restart)
            self._endings.begin(row.session, reason)
            del self._rows[job_id]
        return row.session

    def end_absent(self, jobs: Mapping[int, set[str]]) -> list[Session]:
        """Note which jobs have steps in this round; end the sessions of those that left, and give them."""
        with self._lock:
            for job_id, row in self._rows.items():
                if job_id in jobs:
                    row.see_step()
                    row.had_lasting |= not _LASTING.isdisjoint(jobs[job_id])
                else:
                    row.absent += 1
            over = [job_id for job_id, row in self._rows.items() if row.is_over]
            ended = [self.end(job_id, "no step left") for job_id in over]
        return [session for session in ended if session is not None]

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
