"""A store on any file system that pyarrow knows, such as S3.

Owns the only use of pyarrow.fs for stores.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from typing import Any

from bootseer_slurm.errors import NotFound, StoreError
from bootseer_slurm.store.base import Store, StoreEntry


class ArrowReader:
    """An object of a pyarrow file system, read in ranges."""

    def __init__(self, file: Any, path: str, again: Callable[[], Any] | None = None) -> None:
        """again: opens it anew; then each read looks whether it still is the same."""
        self._file = file
        self._again = again
        self.tag = _tag(file)
        self._path = path
        self.size_bytes = int(file.size())

    def read_into(self, offset: int, view: memoryview) -> int:
        wanted = min(len(view), max(0, self.size_bytes - offset))
        if not wanted:
            return 0
        try:
            content = self._file.read_at(wanted, offset)
            # Behind the read: a range comes from whatever has the name when it is asked for.
            if self._again is not None and _tag(self._again()) != self.tag:
                raise StoreError(f"{self._path}: was replaced while it was read")
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be read: {error}") from error
        view[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._file.close()


class ArrowStore(Store):
    """A store on any other file system that pyarrow knows."""

    def __init__(self, uri: str) -> None:
        from pyarrow import ArrowException, fs

        self._fs = fs
        try:
            self._filesystem, self._root = fs.FileSystem.from_uri(uri)
        except (ArrowException, OSError, ValueError) as error:
            raise StoreError(f"{uri}: cannot be used as a store: {error}") from error

    def _path(self, path: str) -> str:
        return f"{self._root.rstrip('/')}/{path}".rstrip("/")

    def open(self, path: str, *, bulk: bool = False) -> ArrowReader:
        return self._open(path, replaceable=False)

    def open_replaceable(self, path: str) -> ArrowReader:
        return self._open(path, replaceable=True)

    def _open(self, path: str, *, replaceable: bool) -> ArrowReader:
        full = self._path(path)

        def again() -> Any:
            return self._filesystem.open_input_file(full)

        try:
            return ArrowReader(again(), full, again if replaceable else None)
        except FileNotFoundError:
            raise NotFound(f"{full}: no such object") from None
        except OSError as error:
            raise StoreError(f"{full}: cannot be opened: {error}") from error

    def identity(self, path: str) -> str:
        reader = self.open(path)
        reader.close()
        return f"{super().identity(path)} {reader.tag}"

    def write(self, path: str, content: bytes) -> None:
        if self._filesystem.type_name != "s3":
            super().write(path, content)
            return
        full = self._path(path)
        try:  # what is small is sent as one when it is closed, and else what was there stays
            with self._filesystem.open_output_stream(full) as file:
                file.write(content)
        except OSError as error:
            raise StoreError(f"{full}: cannot be written: {error}") from error

    @contextlib.contextmanager
    def writer(self, path: str) -> Iterator[Any]:
        full = self._path(path)
        folder, _, name = full.rpartition("/")
        # An object of S3 appears when it is complete, and cannot be renamed but by copying it.
        renamed = self._filesystem.type_name != "s3"
        target = f"{folder}/.{name}.{secrets.token_hex(6)}" if renamed else full
        opened = written = False
        try:
            if renamed:
                self._filesystem.create_dir(folder, recursive=True)
            with self._filesystem.open_output_stream(target) as file:
                opened = True
                yield file
                written = True
            if renamed:
                self._filesystem.move(target, full)
        except BaseException as error:
            if renamed or (opened and not written):  # what S3 has then is a part
                with contextlib.suppress(OSError):
                    self._filesystem.delete_file(target)
            if isinstance(error, OSError):
                raise StoreError(f"{full}: cannot be written: {error}") from error
            raise

    def create(self, path: str, content: bytes) -> bool:
        full = self._path(path)
        try:
            if self._filesystem.get_file_info(full).type != self._fs.FileType.NotFound:
                return False
        except OSError as error:
            raise StoreError(f"{full}: cannot be looked at: {error}") from error
        self.write(path, content)
        return True

    def scan(self, path: str) -> list[StoreEntry]:
        selector = self._fs.FileSelector(self._path(path), allow_not_found=True)
        try:
            found = self._filesystem.get_file_info(selector)
        except OSError as error:
            raise StoreError(f"{self._path(path)}: cannot be listed: {error}") from error
        folder = self._fs.FileType.Directory
        return [
            StoreEntry(info.base_name, info.type == folder, info.size or 0, (info.mtime_ns or 0) / 1e9)
            for info in found
        ]

    def changed_ns(self, path: str) -> int:
        full = self._path(path)
        if self._filesystem.type_name != "s3":
            return super().changed_ns(path)
        try:
            changed_ns = self._filesystem.get_file_info(full).mtime_ns
        except OSError as error:
            raise StoreError(f"{full}: cannot be looked at: {error}") from error
        if not changed_ns:
            raise StoreError(f"{full}: has no time")
        return int(changed_ns)

    def remove(self, path: str) -> None:
        full = self._path(path)
        try:
            kind = self._filesystem.get_file_info(full).type
            if kind == self._fs.FileType.Directory:
                _remove_folder(self._filesystem, full)
            elif kind != self._fs.FileType.NotFound:
                self._filesystem.delete_file(full)
        except OSError as error:
            raise StoreError(f"{full}: cannot be removed: {error}") from error


def _remove_folder(filesystem: Any, full: str) -> None:
    """Remove it from the bottom up: servers of S3 that keep objects in folders remove empty ones only."""
    from pyarrow import fs

    below = filesystem.get_file_info(fs.FileSelector(full, recursive=True))
    for info in below:
        if info.type != fs.FileType.Directory:
            filesystem.delete_file(info.path)
    folders = [info.path for info in below if info.type == fs.FileType.Directory]
    for path in sorted([full, *folders], key=len, reverse=True):
        with contextlib.suppress(OSError):  # elsewhere folders go with what was in them
            filesystem.delete_dir(path)


def _tag(file: Any) -> object:
    """The ETag of an object of S3, which tells it from another of its name; of others their size."""
    return (file.metadata() or {}).get("ETag"), file.size()
