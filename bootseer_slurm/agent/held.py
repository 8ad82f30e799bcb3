"""A blob that a job used under an agent that was killed, held for it by the agent after that one.

What it is called was looked up long ago: since then the store may have stalled, a tag moved, a file been
replaced, and what the job has mounted must stay what it was. So a target leaves a record in the journal, and
the blob is served from what the cache has of it, at once. The bytes that it lacks come from where they came
from then, opened when the first of them is read.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator

from bootseer_slurm.agent.journal import Found
from bootseer_slurm.agent.request import Job
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.source import FetchSource, adopted_id, flat, remote_id
from bootseer_slurm.cache.reader import OnFault
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.fetch.process import FetchProcess


class Held:
    """One blob, and the one source of what its cache lacks (cache.reader.Source). Thread-safe."""

    def __init__(
        self, found: Found, job: Job, shelf: Shelf, fetcher: Callable[[], FetchProcess], on_fault: OnFault
    ) -> None:
        """fetcher: gives the job's fetch process. Raises BootseerError or OSError."""
        self.id, self._kind = found.blob, found.kind
        self._path, self._folder = found.path, found.folder
        self.name = "store" if self._folder else "origin"
        self._shelf = shelf
        self._fetcher = fetcher
        self._on_fault = on_fault
        self._source: FetchSource | None = None
        self._lock = threading.Lock()
        self._reader = shelf.hold(
            self.id, kind=self._kind, uid=job.uid, gid=job.gid, sources=[self], on_fault=on_fault
        )

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        with self._opened().read(offset, size_bytes, demand=demand, fixed=fixed) as view:
            yield view

    def _opened(self) -> FetchSource:
        """Where the bytes come from. Raises StoreError, or NotFound when another file is there now."""
        with self._lock:
            if self._source is None:
                process = self._fetcher()
                handle = self._reopen(process) if self._folder else self._reopen_original(process)
                layout = self._reader.blob.layout
                self._source = FetchSource(
                    self.name, process, handle, layout if self._folder else flat(layout)
                )
            return self._source

    def _reopen(self, process: FetchProcess) -> int:
        return int(process.call("reopen", folder=self._folder, blob=self.id).fields["handle"])

    def _reopen_original(self, process: FetchProcess) -> int:
        try:
            reply = process.call("resolve", kind=self._kind, name=self._path)
        except InputError as error:
            raise NotFound(f"{self._path}: is not there any more") from error
        try:
            identity = reply.fields.get("identity")
            found = remote_id(identity) if identity else adopted_id(self._path, os.fstat(reply.fds[0]))
            if found != self.id:
                raise NotFound(f"{self._path}: was replaced since it was looked up")
        finally:
            for fd in reply.fds:
                os.close(fd)
        return int(reply.fields["origin"])

    def close(self) -> None:
        """Let go of the blob."""
        self._shelf.give_back(self._reader, [self], self._on_fault)
