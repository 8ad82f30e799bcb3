"""The few things that parsers read from, holding the bytes of one input."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import cast

from bootseer_slurm.store import Store


class Bytes:
    """An open object of a store."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.size_bytes = len(content)

    def read_into(self, offset: int, view: memoryview) -> int:
        part = self._content[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def close(self) -> None: ...


class _OneObject:
    """A store that has one content, whatever the path, and takes another."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def read(self, path: str, *, limit_bytes: int) -> bytes:
        return self.content

    def write(self, path: str, content: bytes) -> None:
        self.content = content

    def list(self, folder: str) -> list[str]:
        return ["object"]

    def share(self, path: str) -> None: ...


def store_of(content: bytes) -> Store:
    """A store with one object."""
    return cast(Store, _OneObject(content))


def content_of(store: Store) -> bytes:
    """The object that such a store has now."""
    return cast(_OneObject, store).content


class Folder:
    """A folder in memory or on a disk, made at its first use and gone with the process."""

    def __init__(self, *inner: str) -> None:
        self._inner = inner
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @property
    def path(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="bootseer-fuzz-")
            for each in self._inner:
                (Path(self._folder.name) / each).mkdir(parents=True)
        return Path(self._folder.name)
