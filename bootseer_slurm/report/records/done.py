"""The note of what `bootseer collect` has done: one SQLite file beside the dataset.

Owns its tables, and the lock by which one collect is at work at a time. Every call of a method is one
transaction.

    <folder>/done.sqlite    done(uid, job, restart, changed_s): in the dataset, or not believed; as long as
                            its events are in the store
                            comment(job, shown_id, text, tries): to be written
    <folder>/lock           flock; its time: when a call last came to its end
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bootseer_slurm.errors import BootseerError

_TABLES = """
CREATE TABLE IF NOT EXISTS done(
    uid INTEGER, job INTEGER, restart INTEGER, changed_s REAL, PRIMARY KEY(uid, job, restart));
CREATE TABLE IF NOT EXISTS comment(job INTEGER PRIMARY KEY, shown_id TEXT, text TEXT, tries INTEGER);
"""


@dataclass(frozen=True, slots=True, order=True)
class RunFolder:
    """The folder with the events of one run of a job, as it was when it last changed."""

    job: int
    restart: int
    changed_s: float  # since 1970; 0 where the store has no times
    uid: int  # whose folder it is


@dataclass(frozen=True, slots=True)
class Comment:
    """A line for a job's AdminComment. tries: how often it was written in vain."""

    job: int
    shown_id: str
    text: str
    tries: int = 0


class Done:
    """The tables."""

    def __init__(self, state: sqlite3.Connection) -> None:
        self._state = state

    def runs_of(self, uid: int) -> dict[tuple[int, int], float]:
        """When the folder of each (job, restart) had last changed as it was done."""
        rows = self._state.execute("SELECT job, restart, changed_s FROM done WHERE uid = ?", (uid,))
        return {(job, restart): changed_s for job, restart, changed_s in rows}

    def forget(self, uid: int, runs: Iterable[tuple[int, int]]) -> None:
        """Forget runs, each (job, restart), whose events are gone."""
        with self._state:
            self._state.executemany(
                "DELETE FROM done WHERE uid = ? AND job = ? AND restart = ?",
                [(uid, job, restart) for job, restart in runs],
            )

    def add(self, runs: Iterable[RunFolder], comments: Iterable[Comment] = ()) -> None:
        """Note these runs as done, and comments to be written, in place of those of the same jobs."""
        with self._state:
            self._state.executemany(
                "INSERT OR REPLACE INTO done VALUES(?, ?, ?, ?)",
                [(run.uid, run.job, run.restart, run.changed_s) for run in runs],
            )
            self._state.executemany(
                "INSERT OR REPLACE INTO comment VALUES(?, ?, ?, ?)",
                [(each.job, each.shown_id, each.text, each.tries) for each in comments],
            )

    def comments(self) -> list[Comment]:
        """The comments that wait, by their jobs."""
        rows = self._state.execute("SELECT job, shown_id, text, tries FROM comment ORDER BY job")
        return [Comment(*row) for row in rows]

    def end_tries(self, *, over: Collection[int], again: Collection[int]) -> None:
        """Drop the comments of the jobs `over`; those of the jobs `again` were tried once more."""
        with self._state:
            self._state.executemany("DELETE FROM comment WHERE job = ?", [(job,) for job in over])
            self._state.executemany(
                "UPDATE comment SET tries = tries + 1 WHERE job = ?", [(job,) for job in again]
            )


@contextlib.contextmanager
def open_done(folder: Path) -> Iterator[Done]:
    """The note in this folder, which is made where there is none.

    Raises BootseerError when another collect is at work, or the folder cannot be used.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        with (folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.closing(sqlite3.connect(folder / "done.sqlite")) as state:
                state.executescript(_TABLES)
                yield Done(state)
            os.utime(folder / "lock")
    except BlockingIOError:
        raise BootseerError(f"records {folder}: another collect is at work") from None
    except (OSError, sqlite3.Error) as error:
        raise BootseerError(
            f"records {folder}: cannot be used: {error}", hint="see [records] path"
        ) from error
