"""The interface of a store: a folder of objects, whatever keeps them.

Owns the interface and the methods that work on every store. Imports no driver; they import this.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, Protocol

from bootseer_slurm.errors import NotFound, StoreError

TEMPORARY = re.compile(r"\..+\.[0-9a-f]{12}")  # what an object is called while it is written
_TICK_NS = 10_000_000  # as coarse as a kernel may stamp files, with times in ns


class StoreEntry(NamedTuple):
    """An object or folder in a folder of the store. size_bytes: 0 of a folder. changed_s: since 1970."""

    name: str
    is_folder: bool
    size_bytes: int
    changed_s: float


class ObjectReader(Protocol):
    """An open object of the store; `read_into` may be called from several threads at once."""

    size_bytes: int

    def read_into(self, offset: int, view: memoryview) -> int:
        """Fill `view` from `offset` on; gives the number of bytes, short only at the end of the object."""

    def close(self) -> None: ...


ObjectWriter = Callable[[str], contextlib.AbstractContextManager[Any]]


# size: the interface of all drivers.
class Store(Protocol):
    """A folder of objects. Paths are relative, with "/" between their parts."""

    def open(self, path: str, *, bulk: bool = False) -> ObjectReader:
        """Open an object. Raises NotFound or StoreError.

        bulk: its ranges are large and read once, so they go past the page cache: faster from a shared file
        system, and the memory stays the job's.
        """

    def open_replaceable(self, path: str) -> ObjectReader:
        """As `open` in bulk, of one that others may replace: reads then go on with the old one, or fail."""
        return self.open(path, bulk=True)

    def identity(self, path: str) -> str:
        """A text that tells an object from another one of its name. Raises NotFound or StoreError."""
        folder, _, name = path.rpartition("/")
        entry = next((each for each in self.scan(folder) if each.name == name), None)
        if entry is None:
            raise NotFound(f"{path}: no such file")
        return f"{entry.size_bytes} {entry.changed_s}"

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        """A whole small object. Raises NotFound, or StoreError when it is larger than `limit_bytes`."""
        reader = self.open(path)
        try:
            return _read_whole(reader, path, limit_bytes)
        finally:
            reader.close()

    def write(self, path: str, content: bytes) -> None:
        """Write an object whole, or not at all; its folder is made when missing. Raises StoreError."""
        with self.writer(path) as file:
            file.write(content)

    def writer(self, path: str) -> contextlib.AbstractContextManager[Any]:
        """A file to write a large object to; it appears when the block ends without an error."""

    def spread(self, there: Iterable[str] = ()) -> ObjectWriter:
        """A function that opens the objects of one file for writing, as `writer` does, from several threads.

        They are spread evenly over the store's servers, where it can tell and choose. there: those that are
        written already.
        """
        return self.writer

    placed_bytes: int | None = None  # of an object whose place can be chosen, at most; None: no such thing

    def locations(self, path: str) -> dict[str, int] | None:
        """How many bytes of an object lie on which server, its replicas together its size; None: not told."""
        return None

    def create(self, path: str, content: bytes) -> bool:
        """Write a small object that is not there yet; False when it is. Raises StoreError.

        Of several that try at once one gets True, on every file system that has O_EXCL. Other stores have
        no such thing: there it is looked first and written then, and in between two may get True.
        """

    def scan(self, path: str) -> list[StoreEntry]:
        """All that lies in a folder, half-written objects too (`.` in front); empty when it is missing.

        Raises StoreError.
        """

    def descriptor(self, path: str) -> int | None:
        """An open descriptor of an object, which the caller closes; None where objects are no files.

        Raises StoreError.
        """
        return None

    def share(self, path: str) -> None:
        """Let all users read an object or a folder of objects, who know its path. Raises StoreError."""
        raise StoreError(f"{path}: on this store an admin says who may read it")

    def changed_ns(self, path: str) -> int:
        """When an object was written, in ns since 1970 by the clock of the store's server.

        Raises NotFound or StoreError, the latter also where its time is not the server's.
        """
        raise StoreError(f"{path}: this store does not tell by which clock it was written")

    def list(self, path: str) -> list[str]:
        """Names in a folder, sorted; a missing folder is empty. Raises StoreError."""
        return sorted(entry.name for entry in self.scan(path) if not entry.name.startswith("."))

    def remove(self, path: str) -> None:
        """Remove an object or a whole folder; nothing happens when it is missing. Raises StoreError."""

    renames: bool = False  # where `rename` works

    def rename(self, path: str, new: str) -> None:
        """Give a folder or object another name, which must be free. Raises StoreError."""
        raise StoreError(f"{path}: this store has no renaming")


def clock_offset(store: Store, path: str) -> tuple[float, float]:
    """How many seconds this machine's clock is ahead of the store's server's, and how wrong that may be.

    Writes a small object at `path` and removes it again. Raises StoreError, NotFound.
    """
    begin_ns = time.time_ns()
    store.write(path, b"\n")
    end_ns = time.time_ns()
    try:
        changed_ns = store.changed_ns(path)
    finally:
        store.remove(path)
    grain_ns = 10**9 if changed_ns % 10**9 == 0 else _TICK_NS
    offset_ns = (begin_ns + end_ns) / 2 - (changed_ns + grain_ns / 2)
    return offset_ns / 1e9, ((end_ns - begin_ns) / 2 + grain_ns / 2) / 1e9


def _read_whole(reader: ObjectReader, path: str, limit_bytes: int) -> bytes:
    if reader.size_bytes > limit_bytes:
        raise StoreError(f"{path}: {reader.size_bytes} bytes, more than the {limit_bytes} expected of it")
    content = bytearray(reader.size_bytes)
    count = reader.read_into(0, memoryview(content))
    return bytes(content[:count])
