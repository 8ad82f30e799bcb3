"""A store on HDFS, through hdfs-native: no JVM, no libhdfs.

Owns the only use of hdfs_native, which `pip install bootseer-slurm[hdfs]` brings. Runs as the user whose
process it is in (or HADOOP_USER_NAME, as all clients of HDFS without Kerberos do). Its reads are positioned
and may run in parallel; what its native part panics with, a BaseException, is a StoreError here.

A read that fails, or takes too long, is begun again with the file opened anew: where its blocks are is
learned when it is opened, in another order each time, and those DataNodes may all be gone.

HDFS places blocks at random. One of several objects of a file that begins on a DataNode with more than its
share is given up after its first byte, and begun again (placement.py, webhdfs.py).
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import webhdfs
from bootseer_slurm.store.base import ObjectWriter, Store, StoreEntry
from bootseer_slurm.store.placement import TRIES, Tally

_ATTEMPTS = 4
_HEDGE_S = 3.0  # a read that takes longer is begun a second time, from the replica that comes first then
_LIMIT_S = 60.0
_PAUSE_S = 0.1  # longer each time: 1.5 s for an object that is begun eight times
_REOPEN_EVERY_S = 60.0  # from the beginning of one that failed
_SETTINGS = {
    "dfs.client.socket-timeout": "5000",  # ms; then the next replica is read. 60000 without this
    # Some 20 s in all where no NameNode answers, instead of three minutes.
    "dfs.client.failover.max.attempts": "8",
    "dfs.client.failover.sleep.max.millis": "4000",
}
_Result = TypeVar("_Result")


class HdfsReader:
    """A file that is read in ranges."""

    def __init__(self, client: Any, path: str) -> None:
        """Open for reading. Raises NotFound or StoreError."""
        self._client = client
        self._path = path
        self._lock = threading.Lock()
        self._changed = _call(path, "opened", lambda: client.get_file_info(path).modification_time)
        self._file: Any = _call(path, "opened", lambda: client.read(path))
        self.size_bytes = len(self._file)
        self._no_reopen_until_s = 0.0

    def read_into(self, offset: int, view: memoryview) -> int:
        wanted = min(len(view), max(0, self.size_bytes - offset))  # past the end the library panics
        if not wanted:
            return 0
        file = self._file
        running = [self._begin(file, offset, wanted)]
        begun, deadline_s = 1, time.monotonic() + _LIMIT_S
        error: StoreError | NotFound = StoreError(f"{self._path}: does not answer")
        while running and time.monotonic() < deadline_s:
            ended, _ = wait(running, _HEDGE_S, FIRST_COMPLETED)
            for future in ended:
                try:
                    return _copy(future.result(), view)
                except (StoreError, NotFound) as failure:
                    error = failure
                    running.remove(future)
            if begun < _ATTEMPTS:
                begun += 1
                try:
                    file = self._reopen(file)
                except (StoreError, NotFound) as failure:  # what runs may still end well
                    error = failure
                else:
                    running.append(self._begin(file, offset, wanted))
        raise error

    def _begin(self, file: Any, offset: int, size_bytes: int) -> Future[list[bytes]]:
        """Read in a thread of its own: one that hangs is left to itself, without memory of the caller's."""
        future: Future[list[bytes]] = Future()

        def read() -> None:
            try:
                # As a stream of packets, which is faster than as one piece.
                pieces = _call(self._path, "read", lambda: list(file.read_range_stream(offset, size_bytes)))
                future.set_result(pieces)
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=read, name="hdfs-read", daemon=True).start()
        return future

    def _reopen(self, failed: Any) -> Any:
        """The file opened anew, in place of one that failed. Raises StoreError."""
        with self._lock:
            if self._file is failed:
                if time.monotonic() < self._no_reopen_until_s:  # a try takes long where no NameNode answers
                    raise StoreError(f"{self._path}: cannot be opened again")
                self._no_reopen_until_s = time.monotonic() + _REOPEN_EVERY_S
                again = _call(self._path, "opened", lambda: self._client.read(self._path))
                changed = _call(self._path, "opened", lambda: self._client.get_file_info(self._path))
                self._no_reopen_until_s = 0.0
                if (len(again), changed.modification_time) != (self.size_bytes, self._changed):
                    raise StoreError(f"{self._path}: was replaced while it was read")
                self._file = again
            return self._file

    def close(self) -> None:
        """Nothing is held but memory."""


class HdfsStore(Store):
    """A folder of HDFS."""

    def __init__(self, uri: str) -> None:
        """uri: hdfs://<host>:<port>/<folder>, or hdfs://<nameservice>/<folder> with HADOOP_CONF_DIR."""
        try:
            from hdfs_native import Client, WriteOptions
        except ImportError as error:
            raise StoreError(f"{uri}: {error}", hint="pip install 'bootseer-slurm[hdfs]'") from error
        parts = urlsplit(uri)
        self._root = parts.path.rstrip("/")
        self._options = WriteOptions
        self.client = _call(uri, "used as a store", lambda: Client(f"hdfs://{parts.netloc}", _SETTINGS))
        self.web = webhdfs.of_authority(parts.netloc)

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/") or "/"

    def open(self, path: str, *, bulk: bool = False) -> HdfsReader:
        return HdfsReader(self.client, self._path(path))

    def writer(self, path: str) -> contextlib.AbstractContextManager[Any]:
        return _draft(self, self._path(path))

    def spread(self, there: Iterable[str] = ()) -> ObjectWriter:
        tally = Tally()
        for path in there:
            if servers := self.locations(path):
                tally.add(servers)
        return lambda path: _draft(self, self._path(path), tally)

    placed_bytes = 128 * 2**20  # Hadoop's block size; of a larger object only where the first block lies

    def locations(self, path: str) -> dict[str, int] | None:
        return self.web.locations(self._path(path))

    def create_file(self, full: str, *, overwrite: bool = True) -> Any:
        return self.client.create(full, self._options(overwrite=overwrite, create_parent=True))

    def create(self, path: str, content: bytes) -> bool:
        full = self._path(path)
        try:
            file = self.create_file(full, overwrite=False)
        except FileExistsError:
            return False
        except BaseException as error:
            raise _store_error(full, "written", error) from error

        def write() -> None:
            file.write(content)
            file.close()

        _call(full, "written", write)
        return True

    def scan(self, path: str) -> list[StoreEntry]:
        full = self._path(path)
        try:
            found = _call(full, "listed", lambda: list(self.client.list_status(full)))
        except NotFound:
            return []
        return [
            StoreEntry(each.path.rpartition("/")[2], each.isdir, each.length, each.modification_time / 1000)
            for each in found
        ]

    def changed_ns(self, path: str) -> int:
        full = self._path(path)
        status = _call(full, "looked at", lambda: self.client.get_file_info(full))
        return int(status.modification_time) * 1_000_000

    def remove(self, path: str) -> None:
        full = self._path(path)
        with contextlib.suppress(NotFound):
            _call(full, "removed", lambda: self.client.delete(full, recursive=True))

    renames = True

    def rename(self, path: str, new: str) -> None:
        source, target = self._path(path), self._path(new)

        def rename() -> None:
            self.client.mkdirs(target.rpartition("/")[0] or "/", create_parent=True)
            self.client.rename(source, target)

        _call(source, "renamed", rename)


@contextlib.contextmanager
def _draft(store: HdfsStore, full: str, tally: Tally | None = None) -> Iterator[_Draft]:
    draft = _Draft(store, full, tally)
    try:
        yield draft
        draft.publish()
    except BaseException:
        with contextlib.suppress(StoreError, NotFound):
            draft.remove()
        raise


class _Draft:
    """A file that is being written, under another name until it is whole."""

    def __init__(self, store: HdfsStore, full: str, tally: Tally | None) -> None:
        """Begin it. tally: of the objects that it is one of. Raises StoreError."""
        folder, _, name = full.rpartition("/")
        self._store = store
        self._path = full
        self._temporary = f"{folder}/.{name}.{secrets.token_hex(6)}"
        self._tally = tally
        self._begin()

    def write(self, content: bytes | memoryview) -> int:
        view = memoryview(content).cast("B")
        if self._tally is not None and view:
            self._place(self._tally, view[:1])
            self._tally = None
            self._write(view[1:])
        else:
            self._write(view)
        return len(view)

    def publish(self) -> None:
        """Give it its name."""
        _call(self._path, "written", self._file.close)
        client = self._store.client
        _call(self._path, "written", lambda: client.rename(self._temporary, self._path, overwrite=True))

    def remove(self) -> None:
        _call(self._temporary, "removed", lambda: self._store.client.delete(self._temporary))

    def _begin(self) -> None:
        self._file = _call(self._path, "written", lambda: self._store.create_file(self._temporary))

    def _write(self, view: memoryview) -> None:
        # Of what is not `bytes` the library takes one byte after the other, at 70 MB/s, and holds the GIL.
        _call(self._path, "written", lambda: self._file.write(bytes(view)))

    def _place(self, tally: Tally, first: memoryview) -> None:
        """Write the first byte, and do so again until its block lies where the tally wants it."""
        for number in range(1, TRIES + 1):
            self._write(first)
            servers = self._store.web.locations(self._temporary)
            if not servers or tally.takes(servers, last=number == TRIES):
                return
            self.remove()
            # Of a file that is gone this only ends the connection; else it waits 0.5 s for the NameNode.
            with contextlib.suppress(StoreError, NotFound):
                _call(self._temporary, "closed", self._file.close)
            # The NameNode passes over a busy DataNode until the next heartbeat tells that it is less so.
            time.sleep(max(0, number - 2) * _PAUSE_S)
            self._begin()


def _copy(pieces: list[bytes], view: memoryview) -> int:
    done = 0
    for piece in pieces:
        view[done : done + len(piece)] = piece
        done += len(piece)
    return done


def _call(path: str, what: str, work: Callable[[], _Result]) -> _Result:
    """Do it; every failure, a panic too, is a StoreError that says what cannot be done, or NotFound."""
    try:
        return work()
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise _store_error(path, what, error) from error


def _store_error(path: str, what: str, error: BaseException) -> StoreError | NotFound:
    text = str(error).partition("\\n\\tat ")[0]  # of an error of the NameNode's its stack follows
    # What is looked for below a file is not there; it is no matter of rights, as the NameNode has it.
    if isinstance(error, FileNotFoundError) or "is not a directory" in text:
        return NotFound(f"{path}: no such file")
    return StoreError(f"{path}: cannot be {what}: {text}")
