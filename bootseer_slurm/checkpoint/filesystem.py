"""Striped files through fsspec: `bootseer+file://`, `bootseer+hdfs://`, `bootseer+s3://`.

What is written becomes a striped file in the place of that name; what is read may be striped or not. All
that takes an fsspec URL takes these: torch.distributed.checkpoint, safetensors, pandas; and pyarrow through
`arrow_filesystem`. Found by fsspec as an entry point, once this package is installed.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs
from fsspec import AbstractFileSystem

from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.striped import open_in, read_manifest
from bootseer_slurm.checkpoint.writer import OBJECTS, StripedWriter
from bootseer_slurm.errors import NotFound
from bootseer_slurm.store import TEMPORARY, Store, StoreEntry, open_store

PROTOCOLS = ("bootseer+file", "bootseer+hdfs", "bootseer+s3")


# size: the methods that fsspec prescribes.
class StripedFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The files below one host, bucket or root. Errors are BootseerError, and FileNotFoundError."""

    protocol = PROTOCOLS
    cachable = True
    root_marker = "/"

    def __init__(
        self, base: str = "file://", query: str = "", objects: int = OBJECTS, **options: Any
    ) -> None:
        """base: scheme and host or bucket. query: what the store's URI has after "?". objects: of a file."""
        super().__init__(base=base, query=query, objects=objects, **options)
        self._base = base
        self._objects = objects
        self._store: Store = open_store(f"{base}/{'?' if query else ''}{query}", plain=True)

    @classmethod
    def _strip_protocol(cls, path: str | list[str]) -> str | list[str]:
        if isinstance(path, list):
            return [cls._strip_protocol(each) for each in path]  # type: ignore[misc]
        scheme, separator, _ = path.partition("://")
        if separator and scheme in PROTOCOLS:
            parts = urlsplit(path, allow_fragments=False)
            path = parts.path + "".join(parts.query.partition("/")[1:])  # a name that was put behind a query
        return path.rstrip("/") or cls.root_marker

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> dict[str, str]:
        parts = urlsplit(path, allow_fragments=False)
        scheme, query = parts.scheme.partition("+")[2], parts.query.partition("/")[0]
        return {"base": f"{scheme}://{parts.netloc}", "query": query} if scheme else {}

    def unstrip_protocol(self, name: str) -> str:
        return f"bootseer+{self._base}{self._strip_protocol(name)}"

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        name = _within(path)
        if not options.get("autocommit", True):
            raise NotImplementedError("a striped file is written when it is closed, not by a transaction")
        if mode in ("rb", "r"):
            with _as_os_error(path):
                return ParallelFile.of(open_in(self._store, name), path)
        if mode in ("wb", "w"):
            return StripedWriter.in_store(self._store, name, objects=self._objects)
        raise ValueError(f"{path}: mode {mode!r} is not one of a striped file: it is written whole, or read")

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        path = str(self._strip_protocol(path))
        with _as_os_error(path):
            manifest = read_manifest(self._store, _within(path))
            if manifest is not None:
                size = manifest.layout.size_bytes
                return {"name": path, "size": size, "type": "file", "stripes": manifest.layout.objects}
        folder, _, name = path.rpartition("/")
        entry = next((each for each in self._store.scan(_within(folder)) if each.name == name), None)
        if entry is None and path != self.root_marker:
            raise FileNotFoundError(path)
        is_folder = entry is None or entry.is_folder
        return {"name": path, "size": 0 if entry is None else entry.size_bytes,
                "type": "directory" if is_folder else "file"}  # fmt: skip

    def ls(self, path: str, detail: bool = True, **options: Any) -> list[Any]:
        path = str(self._strip_protocol(path))
        own = self.info(path)
        if own["type"] == "file":
            return [own] if detail else [path]
        base = path.rstrip("/")
        found = [
            self._entry(f"{base}/{each.name}", each)
            for each in sorted(self._store.scan(_within(path)))
            if not TEMPORARY.fullmatch(each.name)
        ]
        return found if detail else [each["name"] for each in found]

    def _entry(self, path: str, entry: StoreEntry) -> dict[str, Any]:
        if entry.is_folder:
            return self.info(path)
        return {"name": path, "size": entry.size_bytes, "type": "file"}

    def mkdir(self, path: str, create_parents: bool = True, **options: Any) -> None:
        """Nothing: folders come with what is written in them."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Nothing: folders come with what is written in them."""

    def rm_file(self, path: str) -> None:
        self._store.remove(_within(str(self._strip_protocol(path))))

    def _rm(self, path: str) -> None:
        self.rm_file(path)

    def rmdir(self, path: str) -> None:
        if self.ls(path):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)
        self.rm_file(path)

    def rm(self, path: str | list[str], recursive: bool = False, maxdepth: int | None = None) -> None:
        for each in [path] if isinstance(path, str) else path:
            if self.isdir(each) and not recursive:
                raise IsADirectoryError(each)
            self.rm_file(each)

    def mv(self, path1: str, path2: str, **options: Any) -> None:
        """Rename a file or folder; a file takes the place of one that is there."""
        old, new = (_within(str(self._strip_protocol(each))) for each in (path1, path2))
        is_file = self.info(path1)["type"] == "file"
        if old == new:
            return
        if not self._store.renames:
            super().mv(
                f"/{old}", f"/{new}", recursive=not is_file
            )  # a URL's "?" would be taken for a pattern
            return
        aside = f"{new}.{secrets.token_hex(6)}"
        replaced = self.exists(path2)
        if replaced and not is_file:
            raise FileExistsError(path2)
        if replaced:
            self._store.rename(new, aside)
        try:
            self._store.rename(old, new)
        except BaseException:
            if replaced:
                self._store.rename(aside, new)
            raise
        self._store.remove(aside)

    def cp_file(self, path1: str, path2: str, **options: Any) -> None:
        with self._open(path1) as source, self._open(path2, "wb") as target:
            shutil.copyfileobj(source, target, 2**24)


def arrow_filesystem(url: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The pyarrow file system of a `bootseer+…` URL, and the path in it."""
    options: dict[str, Any] = StripedFileSystem._get_kwargs_from_urls(url)
    handler = pyarrow.fs.FSSpecHandler(StripedFileSystem(**options))
    return pyarrow.fs.PyFileSystem(handler), str(StripedFileSystem._strip_protocol(url))


def _within(path: str) -> str:
    return path.strip("/")


@contextlib.contextmanager
def _as_os_error(path: str) -> Any:
    """A missing file is the error that fsspec's users expect."""
    try:
        yield
    except NotFound as error:
        raise FileNotFoundError(path) from error
