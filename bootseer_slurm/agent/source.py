"""Where a target's bytes come from: the objects behind a handle of the job's fetch process."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.fetch.process import FetchProcess


class FetchSource:
    """The objects behind one handle, as a source of the blob (cache.reader.Source)."""

    def __init__(self, name: str, process: FetchProcess, handle: int, layout: Layout) -> None:
        self.name = name
        self._process = process
        self._handle = handle
        self._layout = layout

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        extent = self._layout.extent(offset, size_bytes)
        read = self._process.read(
            self._handle, extent.object, extent.offset, extent.size_bytes, demand=demand, fixed=fixed
        )
        with read as view:
            yield view


def flat(layout: Layout) -> Layout:
    """The layout of the same bytes in one file."""
    return replace(layout, objects=1)


def adopted_id(path: str, status: os.stat_result) -> str:
    """The id of a file that is used where it lies: another one when it was changed or replaced."""
    identity = (path, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return "file-" + hashlib.sha256(repr(identity).encode()).hexdigest()


def remote_id(identity: object) -> str:
    """The id of a file that is used where it lies in another store. identity: of checkpoint.striped."""
    return "file-" + hashlib.sha256(str(identity).encode()).hexdigest()
