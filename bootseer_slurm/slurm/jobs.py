"""The records of jobs in Slurm's accounting, as typed rows.

The only caller of sacct in this package. Owns the command line, the parsing and the numbering of restarts; it
keeps nothing and writes nothing. One process per call, with a time limit; no threads.

sacct prints no escapes, and a job's name may hold any character, also '|' and line ends. So the fields are
set apart by a text that is drawn anew for each call: nobody can put it into a name, and every row is found
again by counting it.
"""

from __future__ import annotations

import os
import re
import secrets
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.slurm.hostlist import expand

# Every release has these. Reserved (Planned from 23.02) is not asked for: it is Start - Eligible.
_FIELDS = (
    "JobID",
    "JobIDRaw",
    "JobName",
    "User",
    "UID",
    "Account",
    "Partition",
    "State",
    "Submit",
    "Eligible",
    "Start",
    "End",
    "AllocCPUS",
    "AllocTRES",
    "NodeList",
)
_COMMENT_FIELDS = ("JobIDRaw", "AdminComment", "Submit", "Start")
_MANY = 4000  # job ids in one call: an argument of a command may have 128 KiB
_JOB_ID = re.compile(r"[0-9]{1,10}([_+][0-9]{1,10})?")
_SHOWN_ID = re.compile(r"([0-9]+)(?:_(?:([0-9]+)|\[[^\]]*\]))?(?:\+([0-9]+))?")


class AccountingError(BootseerError):
    """sacct is not installed, accounting is off, or the accounting daemon does not answer."""

    exit_status = 8


@dataclass(frozen=True, slots=True)
class StepRecord:
    """One step of a job as accounting has it. Times are whole seconds, in ns since the epoch."""

    step: str  # "0", "batch", "extern", "interactive"
    name: str
    state: str
    start_ns: int | None
    end_ns: int | None
    nodes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
# size: a row of accounting.
class JobRecord:
    """One run of a job as accounting has it. Times are whole seconds in ns since the epoch; None: not yet."""

    job: int  # the id that the job itself sees as SLURM_JOB_ID
    shown_id: str  # "12", "12_3" for an array's task, "12+1" for a component of a heterogeneous job
    array_task: int | None
    het_offset: int | None
    restart: int  # 0 for the first run, as SLURM_RESTART_COUNT has it
    user: str
    uid: int | None
    account: str
    partition: str
    name: str
    state: str  # the first word: "CANCELLED", not "CANCELLED by 1000"
    submit_ns: int | None
    eligible_ns: int | None
    start_ns: int | None
    end_ns: int | None
    nodes: tuple[str, ...]
    cpus: int
    gpus: int
    steps: tuple[StepRecord, ...] = ()

    @property
    def queue_s(self) -> float | None:
        """Seconds from eligible to start: what sacct prints as Planned (Reserved before 23.02)."""
        if self.start_ns is None or self.eligible_ns is None:
            return None
        return max(0.0, (self.start_ns - self.eligible_ns) / 1e9)


def check_job_id(job_id: str) -> str:
    """The job id without the spaces around it: "12", "12_3" (array) or "12+1" (heterogeneous).

    Raises InputError when it is none of these.
    """
    text = job_id.strip()
    if not _JOB_ID.fullmatch(text):
        raise InputError(
            f"{job_id[:40]!r} is not a job id", hint='job ids look like "1234", "1234_5" or "1234+1"'
        )
    return text


def records(job_id: str, *, timeout_s: float = 30.0) -> tuple[JobRecord, ...]:
    """All runs of a job, oldest first; for the id of an array or a heterogeneous job those of all its parts.

    Raises InputError (no job id), NotFound (accounting has no such job, or hides it), AccountingError.
    Source: sacct(1), --duplicates and --parsable2.
    """
    text = check_job_id(job_id)
    found = _numbered(_jobs(_ask([f"--jobs={text}"], _FIELDS, timeout_s)))
    if not found:
        raise NotFound(
            f"accounting has no job {text}",
            hint="sacct shows other users' jobs to operators only where PrivateData has jobs",
        )
    return tuple(found)


def records_of(numbers: Iterable[int], *, timeout_s: float = 300.0) -> dict[int, tuple[JobRecord, ...]]:
    """All runs, oldest first, of each of these jobs that accounting knows. Few calls, for any number of jobs.

    numbers: what the jobs themselves have as SLURM_JOB_ID. Raises AccountingError.
    """
    wanted = sorted(set(numbers))
    known = set(wanted)
    found: dict[int, list[JobRecord]] = {}
    for start in range(0, len(wanted), _MANY):
        asked = ",".join(map(str, wanted[start : start + _MANY]))
        # The number of an array is that of one of its tasks too, and brings them all.
        for record in _jobs(_ask([f"--jobs={asked}"], _FIELDS, timeout_s)):
            if record.job in known:
                found.setdefault(record.job, []).append(record)
    return {job: tuple(_numbered(_once(runs))) for job, runs in found.items()}


def admin_comments(numbers: Iterable[int], *, timeout_s: float = 300.0) -> dict[int, str]:
    """The AdminComment of the last run of each of these jobs that accounting knows; "" for none.

    Raises AccountingError.
    """
    wanted = sorted(set(numbers))
    last: dict[int, tuple[tuple[int, int], str]] = {}
    for start in range(0, len(wanted), _MANY):
        asked = ",".join(map(str, wanted[start : start + _MANY]))
        for row in _ask([f"--jobs={asked}"], _COMMENT_FIELDS, timeout_s):
            if row["JobIDRaw"].isdecimal():
                job, age = int(row["JobIDRaw"]), (_time(row["Submit"]) or 0, _time(row["Start"]) or 1 << 63)
                if job not in last or age >= last[job][0]:
                    last[job] = age, row["AdminComment"]
    return {job: comment for job, (_, comment) in last.items()}


def _once(found: Sequence[JobRecord]) -> list[JobRecord]:
    """Without what was told twice, as when two calls name an array and a task of it."""
    return list({(record.submit_ns, record.start_ns): record for record in found}.values())


def job(job_id: str, *, restart: int | None = None, timeout_s: float = 30.0) -> JobRecord:
    """One run of a job: the last, or the one with this restart count.

    For the id of an array or of a heterogeneous job it is the part that itself has this id.
    Raises InputError, NotFound, AccountingError.
    """
    text = check_job_id(job_id)
    runs = runs_of(records(text, timeout_s=timeout_s), text)
    if restart is None:
        return runs[-1]
    for run in runs:
        if run.restart == restart:
            return run
    raise NotFound(f"job {text} has no restart {restart}, its last one is {runs[-1].restart}")


def runs_of(found: tuple[JobRecord, ...], job_id: str) -> tuple[JobRecord, ...]:
    """The runs among these records that are of this one job and not of another part of its array.

    Raises NotFound when there are none.
    """
    runs = tuple(record for record in found if record.shown_id == job_id)
    runs = runs or tuple(record for record in found if str(record.job) == job_id)
    if not runs:
        parts = ", ".join(sorted({record.shown_id for record in found})[:5])
        raise NotFound(f"accounting has no job {job_id} itself", hint=f"name one part of it: {parts}")
    return runs


def alike(record: JobRecord, *, timeout_s: float = 30.0) -> tuple[JobRecord, ...]:
    """The runs of a job's class, the same user, account and name, of the last 30 days; the newest first.

    Without their steps. Raises AccountingError.
    """
    selection = [
        f"--uid={record.uid}",
        f"--accounts={record.account}",
        "--starttime=now-30days",
        "--allocations",
    ]
    if record.name and "," not in record.name:  # sacct takes a list of names
        selection.append(f"--name={record.name}")
    found = _numbered(_jobs(_ask(selection, _FIELDS, timeout_s)))
    same = [
        run for run in found if (run.uid, run.account, run.name) == (record.uid, record.account, record.name)
    ]
    return tuple(sorted(same, key=lambda run: -(run.start_ns or 0)))


def _ask(selection: Sequence[str], fields: Sequence[str], timeout_s: float) -> Iterator[dict[str, str]]:
    """The rows that sacct has of what is selected. Raises AccountingError."""
    delimiter = f"\x1f{secrets.token_hex(8)}\x1f"
    return _rows(_sacct(selection, fields, delimiter, timeout_s), delimiter, fields)


def _sacct(selection: Sequence[str], fields: Sequence[str], delimiter: str, timeout_s: float) -> str:
    argv = ["sacct", "--duplicates", "--noheader", "--parsable2", f"--delimiter={delimiter}"]
    argv += [*selection, f"--format={','.join(fields)}"]
    # %s makes sacct print seconds since the epoch: no time zone, no hour that comes twice.
    environment = {**os.environ, "SLURM_TIME_FORMAT": "%s", "LC_ALL": "C", "LANG": "C"}
    hint = "the report works without accounting, from the nodes' own events"
    try:
        done = subprocess.run(
            argv,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError:
        raise AccountingError("sacct is not installed here", hint=hint) from None
    except subprocess.TimeoutExpired:
        raise AccountingError(f"sacct did not answer in {timeout_s:g} s", hint=hint) from None
    except OSError as error:
        raise AccountingError(f"sacct cannot be run: {error.strerror}", hint=hint) from None
    complaint = _complaint(done.stderr)
    if done.returncode != 0 or (complaint and not done.stdout):
        raise AccountingError(f"sacct failed: {complaint or f'exit status {done.returncode}'}", hint=hint)
    return done.stdout.decode("utf-8", errors="replace")


def _complaint(stderr: bytes) -> str:
    """The last line that sacct wrote, without its own name, fit for one line of a message."""
    lines = [line.strip() for line in stderr.decode("utf-8", errors="replace").splitlines() if line.strip()]
    text = re.sub(r"^sacct: (error|fatal): ", "", lines[-1]) if lines else ""
    return "".join(c if c.isprintable() else " " for c in text)[:200]


def _rows(output: str, delimiter: str, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """The rows of sacct's output. A row ends at the first line end behind its last delimiter."""
    pending = ""
    for line in output.split("\n"):
        pending = f"{pending}\n{line}" if pending else line
        values = pending.split(delimiter)
        if len(values) >= len(fields):
            yield dict(zip(fields, values, strict=False))
            pending = ""


def _jobs(rows: Iterable[dict[str, str]]) -> list[JobRecord]:
    """One record per job row, with the step rows that follow it."""
    found: list[JobRecord] = []
    steps: list[StepRecord] = []
    for row in rows:
        raw_id, _, step = row["JobIDRaw"].partition(".")
        if step:
            if found and raw_id == str(found[-1].job):
                steps.append(_step_record(row, step))
                found[-1] = replace(found[-1], steps=tuple(steps))
            continue
        record = _job_record(row)
        if record is not None:
            found.append(record)
            steps = []
    return found


def _job_record(row: dict[str, str]) -> JobRecord | None:
    shown = _SHOWN_ID.fullmatch(row["JobID"])
    if not shown or not row["JobIDRaw"].isdecimal():
        return None
    return JobRecord(
        job=int(row["JobIDRaw"]),
        shown_id=row["JobID"],
        array_task=int(shown[2]) if shown[2] else None,
        het_offset=int(shown[3]) if shown[3] else None,
        restart=0,
        user=row["User"],
        uid=int(row["UID"]) if row["UID"].isdecimal() else None,
        account=row["Account"],
        partition=row["Partition"],
        name=row["JobName"],
        state=_first_word(row["State"]),
        submit_ns=_time(row["Submit"]),
        eligible_ns=_time(row["Eligible"]),
        start_ns=_time(row["Start"]),
        end_ns=_time(row["End"]),
        nodes=_nodes(row["NodeList"]),
        cpus=int(row["AllocCPUS"]) if row["AllocCPUS"].isdecimal() else 0,
        gpus=_gpus(row["AllocTRES"]),
    )


def _step_record(row: dict[str, str], step: str) -> StepRecord:
    return StepRecord(
        step=step,
        name=row["JobName"],
        state=_first_word(row["State"]),
        start_ns=_time(row["Start"]),
        end_ns=_time(row["End"]),
        nodes=_nodes(row["NodeList"]),
    )


def _numbered(found: list[JobRecord]) -> list[JobRecord]:
    """The records with their restart counts, oldest first.

    A requeue gives a new record under the same id and user. Older records of another user are another job,
    from before the ids were reset.
    """
    by_job: dict[int, list[JobRecord]] = {}
    for record in found:
        by_job.setdefault(record.job, []).append(record)
    numbered: list[JobRecord] = []
    for runs in by_job.values():
        runs.sort(key=lambda run: (run.submit_ns or 0, run.start_ns or (1 << 63)))
        first = len(runs)
        while first and runs[first - 1].uid == runs[-1].uid:
            first -= 1
        numbered += [replace(run, restart=restart) for restart, run in enumerate(runs[first:])]
    return numbered


def _time(text: str) -> int | None:
    """Epoch seconds as ns; None for "Unknown", "None" and 0, which stand for "not yet"."""
    return int(text) * 1_000_000_000 if text.isdecimal() and int(text) > 0 else None


def _nodes(text: str) -> tuple[str, ...]:
    """The node names; none while "None assigned", or for a list that cannot be read."""
    try:
        return tuple(expand(text))
    except InputError:
        return ()


def _gpus(tres: str) -> int:
    """GPUs in "billing=8,cpu=64,gres/gpu=8,gres/gpu:h100=8": the untyped sum, else the sum over the types."""
    total = 0
    for item in tres.split(","):
        key, _, value = item.partition("=")
        if not value.isdecimal():
            continue
        if key == "gres/gpu":
            return int(value)
        if key.startswith("gres/gpu:"):
            total += int(value)
    return total


def _first_word(text: str) -> str:
    return text.split(" ", 1)[0]
