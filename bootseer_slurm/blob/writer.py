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
from pathlib import Path
from typing import Any

from bootseer_slurm.blob.digest import DIGEST_BYTES, PREFERRED
from bootseer_slurm.blob.manifest import Layout, Manifest, block_bytes_of
from bootseer_slurm.blob.names import Base, Name, user_folder, wait_until_settled, write_name
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.store import FileReader, Store

_THREADS = 16  # they wait more than they work: to close a file of HDFS takes half a second


def store_file(
    store: Store,
    path: Path,
    *,
    kind: str,
    name: str,
    fingerprint: str,
    objects: int = 1,
    progress: Callable[[int], None] = lambda count: None,
    sign: Callable[[str], str] = lambda blob: "",
    key: dict[str, str] | None = None,
    base: Base | None = None,
    beside: Mapping[str, bytes] | None = None,
) -> Name:
    """Put the bytes of `path` into the store as a blob of this user, known under `name`.

    kind, objects, progress, beside: see store_blob.
    sign: gives the signature of a blob's id, "" without one. key: of an environment. base: what it lies over.
    Raises BootseerError when the file changed while it was read, StoreError when the store fails.
    """
    blob, folder = store_blob(store, path, kind=kind, objects=objects, progress=progress, beside=beside)
    record = Name(kind, name, fingerprint, blob, folder, time.time_ns(), sign(blob), key or {}, base)
    write_name(store, os.getuid(), record)
    return record


def store_blob(
    store: Store,
    path: Path,
    *,
    kind: str,
    objects: int = 1,
    progress: Callable[[int], None] = lambda count: None,
    beside: Mapping[str, bytes] | None = None,
) -> tuple[str, str]:
    """Put the bytes of `path` into the store as a blob of this user without a name; gives its id and folder.

    kind: image, environment or checkpoint. objects: stripe objects to spread the bytes over.
    progress: called with the number of bytes just stored, from several threads.
    beside: small objects to keep in the blob's folder, by their names.
    Raises BootseerError when the file changed while it was read, StoreError when the store fails.
    """
    before = path.stat()
    wait_until_settled(before)
    layout = Layout(before.st_size, block_bytes_of(kind), objects=max(1, objects), digest=PREFERRED)
    folder = f"{user_folder(os.getuid())}/blobs/{secrets.token_hex(12)}"
    try:
        digests = write_objects(store, folder, path, layout, progress=progress)
        for other, content in (beside or {}).items():
            store.write(f"{folder}/{other}", content)
        manifest = Manifest(kind, layout, digests)
        store.write(f"{folder}/manifest", manifest.encode())
    except BaseException:
        store.remove(folder)
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
    places = [f"{folder}/{index}" for index in range(layout.objects)]
    writer = store.spread(place for index, place in enumerate(places) if index in there)
    try:
        before = source.status
        with ThreadPoolExecutor(_THREADS, "bootseer-write") as pool:

            def write(index: int) -> None:
                opening = nullcontext() if index in there else writer(places[index])
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
