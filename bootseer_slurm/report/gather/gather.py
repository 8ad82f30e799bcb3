"""Gather all that is known of one run of a job: the nodes' events and the accounting record.

Owns the joining only: gather/stored.py knows where events lie, startup/analyse.py what they mean. Reads,
never writes; no threads. Either half may be missing, and the run then says so in its notes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.event_table import NODE_NAME
from bootseer_slurm.events import read_events
from bootseer_slurm.report.gather.run import EventStore, NodeEvents, Run
from bootseer_slurm.report.gather.stored import MAX_TEXT
from bootseer_slurm.slurm import jobs
from bootseer_slurm.slurm.hostlist import expand
from bootseer_slurm.slurm.jobs import AccountingError, JobRecord

# Accounting rounds to seconds, and a node's first stamp may be a little before slurmctld's.
_WINDOW_NS = 5_000_000_000


def gather(
    job_id: str,
    *,
    store: EventStore,
    accounting: Callable[[str], Sequence[JobRecord]] = jobs.records,
    restart: int | None = None,
    uid: int | None = None,
) -> Run:
    """The events and the accounting record of one run of a job: the last, or the one with this restart count.

    uid: whose job it is; needed only without accounting, when several users have events under this id.
    Raises InputError (no job id), NotFound (neither events nor accounting know it).
    """
    text = jobs.check_job_id(job_id)
    notes: list[str] = []
    records, refusal = _records(text, accounting)
    if refusal is not None:
        notes.append(f"without accounting: {refusal.message}")
    job = records[-1].job if records else _plain_id(text, refusal)
    owner = records[-1].uid if records else None
    owner = _owner(store, job, uid, owner)
    sent = sorted(set(store.restarts(owner, job))) if owner is not None else []
    if records and sent and sent[-1] > records[-1].restart:
        # Accounting has purged the first runs and numbers the rest from 0 again.
        shift = sent[-1] - records[-1].restart
        records = tuple(replace(record, restart=record.restart + shift) for record in records)
    known = sorted({*sent, *(record.restart for record in records if record.start_ns is not None)})
    if not known and not records:
        raise NotFound(
            f"nothing is known of job {text}",
            hint="was it submitted with --bootseer, and is this its cluster?",
        )
    chosen = _choose(text, restart, known)
    had = {node for record in records for node in record.nodes}
    nodes, foreign_count = _read(store, owner, job, chosen, had) if owner is not None else ((), 0)
    record = _match(records, chosen, nodes)
    if len(known) > 1:
        others = ", ".join(str(number) for number in known if number != chosen)
        notes.append(f"restart {chosen}; this job also has restart {others}")
    if record is not None and record.nodes:
        had = set(record.nodes)
        foreign_count += sum(sent.node not in had for sent in nodes)
        nodes = tuple(sent for sent in nodes if sent.node in had)
    if foreign_count:
        notes.append(f"files left out because the job did not have their nodes: {foreign_count}")
    notes += _notes(nodes, record, chosen)
    return Run(
        job=job,
        restart=chosen,
        restarts=tuple(known) or (chosen,),
        uid=owner,
        record=record,
        nodes=nodes,
        silent_nodes=_silent(nodes, record),
        notes=tuple(notes),
    )


def _records(
    text: str, accounting: Callable[[str], Sequence[JobRecord]]
) -> tuple[tuple[JobRecord, ...], BootseerError | None]:
    try:
        return jobs.runs_of(tuple(accounting(text)), text), None
    except (AccountingError, NotFound) as error:
        return (), error


def _plain_id(text: str, refusal: BootseerError | None) -> int:
    """The id under which events are kept, when accounting cannot translate it."""
    if text.isdecimal():
        return int(text)
    raise InputError(
        f"job {text} cannot be looked up: {refusal.message if refusal else 'accounting does not know it'}",
        hint="use the job's own number, which it has as SLURM_JOB_ID",
    )


def _owner(store: EventStore, job: int, asked: int | None, accounted: int | None) -> int | None:
    """Whose events to read. Any user can write events of any job into his own folder: accounting decides."""
    if accounted is not None:
        return accounted
    if asked is not None:
        return asked
    found = sorted(uid for uid in store.users() if any(True for _ in store.restarts(uid, job)))
    if len(found) > 1:
        raise InputError(
            f"users {', '.join(map(str, found))} all have events of job {job}",
            hint="accounting would tell whose job it is; without it, name the user",
        )
    return found[0] if found else None


def _choose(text: str, asked: int | None, known: Sequence[int]) -> int:
    if asked is None:
        return known[-1] if known else 0
    if asked not in known:
        listed = ", ".join(map(str, known)) or "none"
        raise NotFound(f"job {text} has no restart {asked}; known are: {listed}")
    return asked


def _read(
    store: EventStore, uid: int, job: int, restart: int, had: set[str]
) -> tuple[tuple[NodeEvents, ...], int]:
    """The events of each node, and how many files are of nodes that no run of the job had.

    The user may put any file there, so its name is checked like its content. had: the nodes of all runs;
    empty when they are not known.
    """
    nodes = []
    foreign_count = 0
    for node, text in store.event_files(uid, job, restart):
        if not NODE_NAME.fullmatch(node):
            continue
        if had and node not in had:
            foreign_count += 1
            continue
        events, bad_lines = read_events(text[:MAX_TEXT].split("\n"))
        # The file's path says whose events these are; a line that says something else is not to be believed.
        true = [event for event in events if (event.node, event.job, event.restart) == (node, job, restart)]
        bad_lines += len(events) - len(true)
        nodes.append(NodeEvents(node, tuple(sorted(true, key=lambda event: event.t_ns)), bad_lines))
    return tuple(sorted(nodes, key=lambda sent: sent.node)), foreign_count


def _match(records: Sequence[JobRecord], restart: int, nodes: Sequence[NodeEvents]) -> JobRecord | None:
    """The record of this run: the one with its number, unless the events lie in the time of another one.

    Numbers alone may mislead: where job ids were reset, one user's old job counts as a run of the new one.
    """
    stamps = [sent.events[0].t_ns for sent in nodes if sent.events]
    same = [record for record in records if record.restart == restart]
    if not stamps:
        return same[0] if same else None
    fitting = [record for record in [*records, *same] if _covers(record, min(stamps))]
    matching = fitting or same
    return matching[-1] if matching else None


def _covers(record: JobRecord, stamp_ns: int) -> bool:
    if record.start_ns is None or stamp_ns < record.start_ns - _WINDOW_NS:
        return False
    return record.end_ns is None or stamp_ns <= record.end_ns + _WINDOW_NS


def _silent(nodes: Sequence[NodeEvents], record: JobRecord | None) -> tuple[str, ...]:
    expected = list(record.nodes) if record else []
    if not expected:
        for event in (event for sent in nodes for event in sent.events):
            nodelist = event.extra.get("nodelist")
            if (event.kind, event.name) == ("session", "begin") and isinstance(nodelist, str):
                try:
                    expected = expand(nodelist)
                except InputError:
                    continue
                break
    heard = {sent.node for sent in nodes if sent.events}
    return tuple(node for node in dict.fromkeys(expected) if node not in heard)


def _notes(nodes: Sequence[NodeEvents], record: JobRecord | None, restart: int) -> list[str]:
    notes = []
    if not any(sent.events for sent in nodes):
        running = record is not None and record.start_ns is not None and record.end_ns is None
        notes.append(
            "no events yet: nodes send them when the job ends"
            if running
            else "no events: the job ran without --bootseer, or its nodes could not reach the store"
        )
    bad_lines = sum(sent.bad_lines for sent in nodes)
    if bad_lines:
        notes.append(f"lines left out because they are no events of this run: {bad_lines}")
    if record is not None and record.restart != restart:
        notes.append("accounting numbers this job's restarts otherwise; the record was chosen by its time")
    return notes
