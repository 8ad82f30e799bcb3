"""A store on HDFS, through hdfs-native: no JVM, no libhdfs.

Owns the only use of hdfs_native, which `pip install bootseer-slurm[hdfs]` brings. Runs as the user whose
process it is in (or HADOOP_USER_NAME, as all clients of HDFS without Kerberos do). Its reads are positioned
and may run in parallel; what its native part panics with, a BaseException, is a StoreError here.

A read that fails is tried again with the file opened anew: where its blocks are is learned when it is
opened, and those DataNodes may all be gone.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store import Entry, Store

_ATTEMPTS = 3
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

    def read_into(self, offset: int, view: memoryview) -> int:
        wanted = min(len(view), max(0, self.size_bytes - offset))  # past the end the library panics
        for attempt in range(_ATTEMPTS):
            file = self._file
            try:
                return _call(self._path, "read", lambda: _fill(file, offset, view[:wanted]))  # noqa: B023
            except StoreError:
                if attempt + 1 == _ATTEMPTS:
                    raise
                self._reopen(file)
        raise AssertionError("not reached")

    def _reopen(self, failed: Any) -> None:
        with self._lock:
            if self._file is failed:
                again = _call(self._path, "opened", lambda: self._client.read(self._path))
                changed = _call(self._path, "opened", lambda: self._client.get_file_info(self._path))
                if (len(again), changed.modification_time) != (self.size_bytes, self._changed):
                    raise StoreError(f"{self._path}: was replaced while it was read")
                self._file = again

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
        self._client = _call(uri, "used as a store", lambda: Client(f"hdfs://{parts.netloc}", _SETTINGS))

    def _path(self, path: str) -> str:
        return f"{self._root}/{path}".rstrip("/") or "/"

    def open(self, path: str, *, bulk: bool = False) -> HdfsReader:
        return HdfsReader(self._client, self._path(path))

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[Any]:
        full = self._path(path)
        folder, _, name = full.rpartition("/")
        temporary = f"{folder}/.{name}.{secrets.token_hex(6)}"
        file = _call(full, "written", lambda: self._create(temporary))
        try:
            yield _Writer(file, full)
            _call(full, "written", file.close)
            _call(full, "written", lambda: self._client.rename(temporary, full, overwrite=True))
        except BaseException:
            with contextlib.suppress(StoreError, NotFound):
                _call(temporary, "removed", lambda: self._client.delete(temporary))
            raise

    def _create(self, full: str, *, overwrite: bool = True) -> Any:
        return self._client.create(full, self._options(overwrite=overwrite, create_parent=True))

    def create(self, path: str, content: bytes) -> bool:
        full = self._path(path)
        try:
            file = self._create(full, overwrite=False)
        except FileExistsError:
            return False
        except BaseException as error:
            raise _store_error(full, "written", error) from error

        def write() -> None:
            file.write(content)
            file.close()

        _call(full, "written", write)
        return True

    def scan(self, path: str) -> list[Entry]:
        full = self._path(path)
        try:
            found = _call(full, "listed", lambda: list(self._client.list_status(full)))
        except NotFound:
            return []
        return [
            Entry(each.path.rpartition("/")[2], each.isdir, each.length, each.modification_time / 1000)
            for each in found
        ]

    def remove(self, path: str) -> None:
        full = self._path(path)
        with contextlib.suppress(NotFound):
            _call(full, "removed", lambda: self._client.delete(full, recursive=True))

    renames = True

    def rename(self, path: str, new: str) -> None:
        source, target = self._path(path), self._path(new)

        def rename() -> None:
            self._client.mkdirs(target.rpartition("/")[0] or "/", create_parent=True)
            self._client.rename(source, target)

        _call(source, "renamed", rename)


class _Writer:
    """A file that is being written."""

    def __init__(self, file: Any, path: str) -> None:
        self._file = file
        self._path = path

    def write(self, content: bytes | memoryview) -> int:
        _call(self._path, "written", lambda: self._file.write(content))
        return len(content)


def _fill(file: Any, offset: int, view: memoryview) -> int:
    """Read as a stream of packets, which is faster than as one piece."""
    done = 0
    for piece in file.read_range_stream(offset, len(view)) if view else ():
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
