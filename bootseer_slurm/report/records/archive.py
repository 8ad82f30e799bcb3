"""The dataset of starts on disk: row.SCHEMA in Parquet, a file per user and month.

    <folder>/<YYYY-MM>/<uid>.parquet      the month (UTC) in which the starts were; root's alone

A file is replaced whole, by a rename, with new rows taking the place of those of the same start. So to add
rows twice is to add them once, a reader has the old file or the new one, and a process that is killed leaves
at most a file that begins with a dot. One writer at a time (done.py has a lock); any number of readers.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.report.records.row import KEY, SCHEMA, Row, table_of

_MONTH = re.compile(r"[0-9]{4}-[0-9]{2}")
_FILE = re.compile(r"([0-9]{1,10})\.parquet")


_GROUP_ROWS = 1 << 16  # what a reader has in memory at a time, a few times over


def write_rows(rows: pa.Table, path: Path) -> None:
    """Write rows to a file as they are kept. Raises OSError or ArrowException."""
    pq.write_table(rows, path, compression="zstd", row_group_size=_GROUP_ROWS)


class Archive:
    """The dataset in one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, rows: Iterable[Row]) -> None:
        """Put rows in, in place of those of the same starts; of two the last. Raises BootseerError."""
        groups: dict[Path, dict[tuple[Any, ...], Row]] = defaultdict(dict)
        for row in rows:
            path = self._folder / _month(row["start_time"]) / f"{row['uid']}.parquet"
            groups[path][tuple(row[name] for name in KEY)] = row
        try:
            for path, new in groups.items():
                self._add(path, table_of(new.values()))
        except (OSError, pa.ArrowException) as error:
            raise BootseerError(f"records {self._folder}: cannot be written: {error}") from error

    def files(self, *, since_ms: int = 0, uid: int | None = None) -> Iterator[Path]:
        """The files that may have starts from `since_ms` (since 1970) on: of one user, or of all.

        Raises BootseerError when the folder cannot be read.
        """
        try:
            months = sorted(path for path in self._folder.iterdir() if _MONTH.fullmatch(path.name))
            for month in months:
                if month.name < _month(since_ms):
                    continue
                for path in sorted(month.iterdir()):
                    match = _FILE.fullmatch(path.name)
                    if match and uid in (None, int(match[1])):
                        yield path
        except FileNotFoundError:
            return
        except OSError as error:
            raise BootseerError(f"records {self._folder}: cannot be read: {error.strerror}") from error

    def _add(self, path: Path, new: pa.Table) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if path.exists():
            new = _merge(pq.read_table(path, schema=SCHEMA, partitioning=None), new)
        temporary = path.with_name(f".{path.name}.new")
        try:
            write_rows(new.sort_by("start_time"), temporary)
            temporary.chmod(0o600)
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.rename(path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                temporary.unlink()


def _merge(old: pa.Table, new: pa.Table) -> pa.Table:
    """Old rows that have no new one, and the new ones; of each start one row, the last given."""
    kept = old.join(new.select(KEY), keys=list(KEY), join_type="left anti").select(SCHEMA.names)
    return pa.concat_tables([kept.cast(SCHEMA), new])


def _month(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, tz=timezone.utc).strftime("%Y-%m")
