"""Writing a striped file: as a stream of unknown length, or of a file that is there.

Threads: one for each object, at most `_THREADS`; each has at most two chunks waiting, so that a writer has
2 × objects × 4 MiB in memory. Chunks are hashed by these threads.
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import threading
from dataclasses import replace
from types import TracebackType
from typing import Any

from bootseer_slurm.blob.digest import PREFERRED
from bootseer_slurm.blob.manifest import CHUNK_BYTES, Layout, Manifest
from bootseer_slurm.checkpoint.striped import generation_of, new_generation, publish, remove_older, split
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.store import ObjectWriter, Store, open_store

OBJECTS = 8
_WAITING = 2
_LIMIT_OBJECTS = 64  # of a stream: each has a thread


class _Abandoned(Exception):
    """The file is not wanted any more: what was written of an object is taken away."""


class _Stripe:
    """One object that is being written, by a thread of its own."""

    def __init__(self, writer: ObjectWriter, path: str, layout: Layout) -> None:
        self.digests: list[bytes] = []  # of its chunks, one after the other
        self._layout = layout
        self._waiting: queue.Queue[memoryview | _Abandoned | None] = queue.Queue(_WAITING)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(writer, path), name="stripe", daemon=True)
        self._thread.start()

    def put(self, chunk: memoryview) -> None:
        """Have a chunk written. Raises what an earlier one failed with."""
        while True:
            self._raise()
            with contextlib.suppress(queue.Full):
                self._waiting.put(chunk, timeout=0.5)
                return

    def end(self) -> None:
        """Nothing more comes."""
        self._say(None)

    def join(self) -> None:
        """Wait until it is whole. Raises StoreError."""
        self._thread.join()
        self._raise()

    def abandon(self) -> None:
        """Take it away."""
        self._say(_Abandoned())
        self._thread.join()

    def _say(self, last: _Abandoned | None) -> None:
        while self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._waiting.put(last, timeout=0.1)
                return

    @property
    def is_own_thread(self) -> bool:
        return threading.current_thread() is self._thread

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _run(self, writer: ObjectWriter, path: str) -> None:
        try:
            with writer(path) as out:
                while (chunk := self._waiting.get()) is not None:
                    if isinstance(chunk, _Abandoned):
                        raise chunk
                    self.digests.append(self._layout.digests_of(chunk))
                    out.write(chunk)
        except _Abandoned:
            pass
        except BaseException as error:  # told to who writes
            self._error = error if isinstance(error, BootseerError) else StoreError(f"{path}: {error}")


class StripedWriter(io.RawIOBase):
    """A striped file that is being written, as a binary stream; it exists once it is closed.

    As a context manager it is left as it was when the block ends with an error. Not thread-safe.
    """

    def __init__(self, uri: str, *, objects: int = OBJECTS) -> None:
        """uri: a URI or an absolute path. objects: to spread it over. Raises BootseerError."""
        folder, self._path = split(uri)
        self._open(open_store(folder, plain=True), objects)

    @classmethod
    def in_store(cls, store: Store, path: str, *, objects: int = OBJECTS) -> StripedWriter:
        """As the constructor, of a path in a store."""
        writer = cls.__new__(cls)
        writer._path = path
        writer._open(store, objects)
        return writer

    def _open(self, store: Store, objects: int) -> None:
        self.name = self._path
        self._pid = os.getpid()
        self._store = store
        self._writer = store.spread()
        self._objects = max(1, min(objects, _LIMIT_OBJECTS))
        self._generation = new_generation()
        self._layout = Layout(0, objects=self._objects, digest=PREFERRED)
        self._stripes: list[_Stripe] = []
        self._size_bytes = 0
        self._chunk = bytearray()

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._size_bytes + len(self._chunk)

    def write(self, content: Any) -> int:
        """Write all of it; gives its bytes. Raises StoreError."""
        if self.closed:
            raise ValueError("write to a closed file")
        view = memoryview(content).cast("B")
        done = 0
        while done < len(view):
            count = min(CHUNK_BYTES - len(self._chunk), len(view) - done)
            self._chunk += view[done : done + count]
            done += count
            if len(self._chunk) == CHUNK_BYTES:
                self._put()
        return len(view)

    def _put(self) -> None:
        chunk, self._chunk = memoryview(self._chunk), bytearray()
        index = self._size_bytes // CHUNK_BYTES % self._objects
        if index == len(self._stripes):
            path = f"{self._path}/{self._generation}/{index}"
            self._stripes.append(_Stripe(self._writer, path, self._layout))
        self._stripes[index].put(chunk)
        self._size_bytes += len(chunk)

    def close(self) -> None:
        """Make the file what was written. Raises StoreError, and the file is then what it was."""
        if self.closed:
            return
        try:
            if self._chunk or not self._stripes:
                self._put()
            for stripe in self._stripes:
                stripe.end()
            for stripe in self._stripes:
                stripe.join()
            # A short file has fewer objects than it may have.
            layout = replace(self._layout, size_bytes=self._size_bytes, objects=len(self._stripes))
            last = generation_of(self._store, self._path)
            publish(
                self._store, self._path, Manifest("checkpoint", layout, self._digests(), self._generation)
            )
        except BaseException:
            self.abandon()
            raise
        super().close()
        remove_older(self._store, self._path, self._generation, last)

    def _digests(self) -> bytes:
        chunks = -(-self._size_bytes // CHUNK_BYTES)
        rows = [iter(stripe.digests) for stripe in self._stripes]
        return b"".join(next(rows[number % len(rows)]) for number in range(chunks))

    def abandon(self) -> None:
        """Leave the file as it was."""
        if self.closed:
            return
        for stripe in self._stripes:
            stripe.abandon()
        with contextlib.suppress(StoreError):
            # It may count all the same, where only the answer to the last write was lost.
            if generation_of(self._store, self._path) != self._generation:
                self._store.remove(f"{self._path}/{self._generation}")
        super().close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def __del__(self) -> None:
        # One that was forgotten is not known to be whole. A forked process has only a copy of it.
        if not hasattr(self, "_stripes") or os.getpid() != self._pid:
            return
        if not any(stripe.is_own_thread for stripe in self._stripes):
            self.abandon()
