"""The events in the shared store, as `gather` asks for them.

Owns the paths of the event files (docs/events.md) on the reading side. Files that this person may not read
are left out with a log line: of a job's report the rest is still true, and their nodes show as silent.
"""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterator

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.gather.run import Offset
from bootseer_slurm.store import Store, clock_offset
from bootseer_slurm.userproc.forked import NO_UID

log = logging.getLogger(__name__)

# A user may write the file; this bounds what a hostile one costs the person who asks for the report.
MAX_TEXT = 32 << 20
_RUN = re.compile(r"([0-9]{1,10})\.([0-9]{1,7})")
_SUFFIX = ".jsonl"
_JOBS = range(1, 1 << 32)


def user_folders(store: Store) -> list[int]:
    """The uids that have a folder. Raises StoreError."""
    names = (name for name in store.list("users") if name.isascii() and name.isdecimal())
    return sorted({int(name) for name in names if str(int(name)) == name and int(name) < NO_UID})


def run_folders(store: Store, uid: int) -> Iterator[tuple[int, int, float]]:
    """(job, restart, when it last changed, in seconds since 1970) of each run of which a user has events.

    Raises StoreError.
    """
    for entry in store.scan(f"users/{uid}/events"):
        run = _RUN.fullmatch(entry.name)
        if run and int(run[1]) in _JOBS:  # of another number sacct may tell nothing but an error
            yield int(run[1]), int(run[2]), entry.changed_s


def reader_clock(store: Store) -> Offset | None:
    """This machine's clock against the store's server's; None where the store does not tell.

    Asked with a small file in this user's own folder, and only where that is there already.
    """
    folder = f"users/{os.geteuid()}/events"
    try:
        if not store.list(folder):
            return None
        return Offset(*clock_offset(store, f"{folder}/.{secrets.token_hex(6)}.clock"))
    except BootseerError as error:
        log.debug("clock not compared: %s", error)
        return None


class StoredEvents:
    """The EventStore of a store. Raises nothing for what is missing or unreadable."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def users(self) -> list[int]:
        """The uids that have a folder."""
        try:
            return user_folders(self._store)
        except BootseerError as error:
            log.warning("events left out: %s", error)
            return []

    def restarts(self, uid: int, job: int) -> list[int]:
        """The restart counts under which this user's job has events."""
        runs = (_RUN.fullmatch(name) for name in self._list(f"users/{uid}/events"))
        return sorted(int(run[2]) for run in runs if run and int(run[1]) == job)

    def event_files(self, uid: int, job: int, restart: int) -> Iterator[tuple[str, str]]:
        """(node, text of its file) for each node that sent events."""
        folder = f"users/{uid}/events/{job}.{restart}"
        for name in self._list(folder):
            if not name.endswith(_SUFFIX):
                continue
            try:
                content = self._store.read(f"{folder}/{name}", limit_bytes=MAX_TEXT)
            except BootseerError as error:
                log.warning("job=%d events left out: %s", job, error)
                continue
            yield name[: -len(_SUFFIX)], content.decode("utf-8", errors="replace")

    def _list(self, path: str) -> list[str]:
        try:
            return self._store.list(path)
        except BootseerError as error:
            log.warning("events left out: %s", error)
            return []
