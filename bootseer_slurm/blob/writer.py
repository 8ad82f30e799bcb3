"""Making a blob of a file: hash its blocks, write its stripe objects, then its manifest.

Runs as the user who owns the file, on any node. Threads: one for each object, at most `_THREADS`, each with
a chunk in memory.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootseer_slurm.blob.digest import DIGEST_BYTES, PREFERRED
from bootseer_slurm.blob.manifest import Layout, Manifest, block_bytes_of
from bootseer_slurm.blob.names import Base, Name, user_folder, wait_while_racy, write_name
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.store import FileReader, Store

_THREADS = 16  # they wait more than they work: to close a file of HDFS takes half a second


@dataclass(frozen=True)
class Original:
    """The original that a blob is made of, as its name in the store tells it (blob/names.py).

    name: the path or URI. key: of an environment. base: the blob that a layer lies over. shared: all may read
    the blob.
    """

    kind: str
    name: str
    fingerprint: str
    key: dict[str, str] = field(default_factory=dict)
    base: Base | None = None
    shared: bool = False


@dataclass(frozen=True)
class BlobWriter:
    """Puts files into the store as blobs of this user.

    objects: stripe objects to spread the bytes over. beside: small objects to keep in the blob's folder, by
    their names. progress: called with the number of bytes just stored, from several threads.
    """

    store: Store
    objects: int = 1
    beside: Mapping[str, bytes] = field(default_factory=dict)
    progress: Callable[[int], None] = lambda count: None

    def store_named(
        self, path: Path, original: Original, *, sign: Callable[[str], str] = lambda blob: ""
    ) -> Name:
        """Store the bytes of `path`, and have its blob known under the original's name.

        sign: gives the signature of a blob's id, "" without one. Raises as `store_unnamed`.
        """
        blob, folder = self.store_unnamed(path, original.kind)
        record = Name(
            original.kind,
            original.name,
            original.fingerprint,
            blob,
            folder,
            time.time_ns(),
            sign(blob),
            original.key,
            original.base,
            original.shared,
        )
        write_name(self.store, os.getuid(), record)
        return record

    def store_unnamed(self, path: Path, kind: str) -> tuple[str, str]:
        """Store the bytes of `path` as a blob without a name; gives its id and folder.

        kind: image, environment or checkpoint. Raises BootseerError when the file changed while it was read,
        StoreError when the store fails.
        """
        before = path.stat()
        wait_while_racy(before)
        layout = Layout(before.st_size, block_bytes_of(kind), objects=max(1, self.objects), digest=PREFERRED)
        folder = f"{user_folder(os.getuid())}/blobs/{secrets.token_hex(12)}"
        try:
            digests = write_objects(self.store, folder, path, layout, progress=self.progress)
            for other, content in self.beside.items():
                self.store.write(f"{folder}/{other}", content)
            manifest = Manifest(kind, layout, digests)
            self.store.write(f"{folder}/manifest", manifest.encode())
        except BaseException:
            self.store.remove(folder)
            raise
        return manifest.id, folder


def write_objects(
    store: Store,
    folder: str,
    path: Path,
    layout: Layout,
    *,
    there: Container[int] = (),
    progress: Callable[[int], None] = lambda count: None,
) -> bytes:
    """Write the stripe objects of the file `path` into a folder of the store; gives the blocks' digests.

    there: objects that an earlier try has written of this file. Raises BootseerError when the file is changed
    meanwhile, StoreError when the store fails; what was written stays.
    """
    source = FileReader(path)
    digests = bytearray(layout.blocks * DIGEST_BYTES)
    paths = [f"{folder}/{index}" for index in range(layout.objects)]
    writer = store.spread(each for index, each in enumerate(paths) if index in there)
    try:
        before = source.status
        with ThreadPoolExecutor(_THREADS, "bootseer-write") as pool:

            def write(index: int) -> None:
                opening = nullcontext() if index in there else writer(paths[index])
                _write_object(opening, index, layout, source, digests, progress)

            list(pool.map(write, range(layout.objects)))
        if _identity(path.stat()) != _identity(before) or before.st_size != layout.size_bytes:
            raise BootseerError(
                f"{path}: was changed while it was read", hint="try again when it is complete"
            )
        return bytes(digests)
    finally:
        source.close()


def _identity(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def _write_object(
    opening: AbstractContextManager[Any],
    index: int,
    layout: Layout,
    source: FileReader,
    digests: bytearray,
    progress: Callable[[int], None],
) -> None:
    buffer = memoryview(bytearray(layout.chunk_bytes))
    with opening as target:
        for offset in range(
            index * layout.chunk_bytes, layout.size_bytes, layout.objects * layout.chunk_bytes
        ):
            chunk = buffer[: min(layout.chunk_bytes, layout.size_bytes - offset)]
            if source.read_into(offset, chunk) != len(chunk):
                raise BootseerError("the file became shorter while it was read", hint="try again")
            made = layout.digests_of(chunk)
            first = offset // layout.block_bytes * DIGEST_BYTES
            digests[first : first + len(made)] = made
            if target is not None:
                target.write(chunk)
            progress(len(chunk))
