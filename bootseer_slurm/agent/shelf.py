"""The blobs in use on this node: for each a pin in the cache, a reader, and a file in the FUSE file system.

Jobs of one user that use the same blob share all three. Thread-safe.
"""

from __future__ import annotations

import threading
from pathlib import Path

from bootseer_slurm.blob.cache import Cache
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.blob.reader import OnFault, Reader, Source
from bootseer_slurm.fuse import Server


class Shelf:
    """Cache and FUSE file system of one node."""

    def __init__(self, cache: Cache, server: Server) -> None:
        self._cache = cache
        self._server = server
        self._readers: dict[tuple[int, str], Reader] = {}
        self._paths: dict[tuple[int, str], Path] = {}
        self._lock = threading.Lock()

    def take(
        self,
        blob_id: str,
        layout: Layout,
        digests: bytes | None,
        *,
        uid: int,
        gid: int,
        mtime_ns: int,
        sources: list[Source],
        on_fault: OnFault,
    ) -> Reader:
        """The reader of a blob, with these sources added, until `give_back`.

        Raises BootseerError when the cache cannot be used.
        """
        blob = self._cache.acquire(blob_id, layout, digests, uid, gid)
        with self._lock:
            reader = self._readers.get((uid, blob_id))
            if reader is None:
                reader = Reader(blob, mtime_ns=mtime_ns)
                self._paths[uid, blob_id] = self._server.add(_name(reader), reader)
                self._readers[uid, blob_id] = reader
            reader.add_user(sources, on_fault)
            return reader

    def path(self, reader: Reader) -> Path:
        """Where the blob can be bound from: its cache file once it is complete, before that the FUSE file."""
        return reader.blob.path if reader.blob.complete else self.served_path(reader)

    def served_path(self, reader: Reader) -> Path:
        """The FUSE file, which its user may open by path."""
        return self._paths[reader.uid, reader.blob.id]

    def give_back(self, reader: Reader, sources: list[Source], on_fault: OnFault) -> None:
        """Take the sources away, and let go of the blob when no other job uses it."""
        reader.remove_user(sources, on_fault)

        def forget() -> None:
            with self._lock:
                del self._readers[reader.uid, reader.blob.id]
                del self._paths[reader.uid, reader.blob.id]
            self._server.remove(_name(reader))

        self._cache.release(reader.blob, on_last=forget)


def _name(reader: Reader) -> str:
    return f"{reader.uid}/{reader.blob.id}"
