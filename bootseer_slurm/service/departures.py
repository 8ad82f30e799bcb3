"""Jobs that leave this node: told by the hook in time, told late, or seen by what is left of them.

The end of a job must not hang on one message within 0.1 s. So one thread looks for the words that the hook
leaves (lost_epilogs.py), and for steps and processes of each job that has a session.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from pathlib import Path

import psutil

from bootseer_slurm.image.packer import Packer
from bootseer_slurm.job.session import Session
from bootseer_slurm.service.lost_epilogs import LostEpilogs
from bootseer_slurm.service.sessions import Sessions

_log = logging.getLogger(__name__)

_LOOK_EVERY_S = 1.0  # for the hook's words
_STEPS_EVERY_S = 30.0  # for steps: to look at each process of a large node takes 0.1 s
_ASKING_S = 1.0  # a word younger than this is of a hook that may just be asking
# A prolog that waited in the backlog of an agent that hung is read at any moment after the word.
_KEPT_S = 60.0
_STEP_TITLE = re.compile(r"^slurmstepd: \[(\d+)\.([^]]*)\]")
_CGROUPS = Path("/sys/fs/cgroup")
_CGROUPS_OF_JOB = ("system.slice/*slurmstepd.scope/job_{}", "*/slurm*/uid_*/job_{}")  # of version 2, of 1


def end_job(sessions: Sessions, packer: Packer, job_id: int, reason: str, at_ns: int = 0) -> bool:
    """End a job's session, and what is packed for a user who has no other job; False where there is none.

    at_ns: see Sessions.end.
    """
    session = sessions.end(job_id, reason, at_ns)
    if session is not None:
        _cancel_packing(sessions, packer, session)
    return session is not None


def watch(sessions: Sessions, lost: LostEpilogs, packer: Packer, stop: threading.Event) -> None:
    """End, round by round, the sessions whose epilog was lost, until `stop` is set (a thread of its own)."""
    next_look_s = 0.0
    while not stop.wait(_LOOK_EVERY_S):
        try:
            _end_told(sessions, lost, packer)
            if time.monotonic() >= next_look_s and sessions.all():
                next_look_s = time.monotonic() + _STEPS_EVERY_S
                _end_absent(sessions, packer)
        except Exception:  # the next round may do better
            _log.exception("cannot look for sessions whose epilog was lost")


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


def has_processes(job_id: int) -> bool:
    """Whether processes are in a cgroup of the job: slurmstepd may be killed and leave them."""
    for pattern in _CGROUPS_OF_JOB:
        for folder in _CGROUPS.glob(pattern.format(job_id)):
            for listed in folder.rglob("cgroup.procs"):
                with contextlib.suppress(OSError):
                    if listed.read_text():
                        return True
    return False


def _end_told(sessions: Sessions, lost: LostEpilogs, packer: Packer) -> None:
    """End the sessions of jobs of which the hook left a word."""
    for job_id, lost_ns in lost.all():
        age_s = (time.time_ns() - lost_ns) / 1e9  # below 0: the clock was set back
        if 0 <= age_s < _ASKING_S:
            continue
        if end_job(sessions, packer, job_id, "job ended", lost_ns):
            _log.warning("no agent took the epilog", extra={"job": job_id})
            lost.forget(job_id)
        elif not 0 <= age_s < _KEPT_S:
            lost.forget(job_id)


def _end_absent(sessions: Sessions, packer: Packer) -> None:
    """End the sessions of jobs of which nothing is left here."""
    jobs = jobs_with_steps()
    for session in sessions.all():
        job_id = session.context.job.job_id
        if job_id not in jobs and has_processes(job_id):
            jobs[job_id] = set()
    for session in sessions.end_absent(jobs):
        _log.warning("no step left and no epilog", extra={"job": session.context.job.job_id})
        _cancel_packing(sessions, packer, session)


def _cancel_packing(sessions: Sessions, packer: Packer, ended: Session) -> None:
    """End what is packed for a user whose last job ended: in a thread, for it waits for processes."""
    uid = ended.context.job.uid
    if all(other.context.job.uid != uid for other in sessions.all()):
        threading.Thread(target=packer.cancel, args=(uid,), daemon=True).start()
