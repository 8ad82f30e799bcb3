"""Striped files: one file as a manifest and stripe objects in a folder of any store.

    <file>/manifest                   blob/manifest.py, with the generation that counts now; written last
    <file>/<generation>/0, 1, …       its stripe objects

Writing the file again makes a new generation beside the old one, and then one new manifest: whoever reads has
the old one or the new one, whole. The one before stays until the next is written, for those who still read
it. A generation is 24 hexadecimal digits: 16 of the time in ns since 1970, 8 at random.

Any other object can be opened too, and is read in parallel ranges as it lies; it has no digests.
"""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, Layout, Manifest, decode
from bootseer_slurm.blob.stripes import open_stripes
from bootseer_slurm.errors import InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.store import ObjectReader, Store, open_store

MANIFEST = "manifest"
_LOOKS = 8  # at once
# A generation that was begun this long before the newest is of a writer that died.
_DEAD_S = 86400.0


@dataclass(frozen=True)
class Opened:
    """A file that can be read: its layout, its objects, and its manifest where it is a striped one."""

    layout: Layout
    objects: list[ObjectReader]
    manifest: Manifest | None

    def close(self) -> None:
        for each in self.objects:
            each.close()


def split(uri: str) -> tuple[str, str]:
    """The folder of a URI or absolute path, as a URI of a store, and the name in it. Raises InputError."""
    parts = urlsplit(f"file://{quote(uri)}" if uri.startswith("/") else uri, allow_fragments=False)
    folder, _, name = parts.path.rstrip("/").rpartition("/")
    if not parts.scheme or not name:
        raise InputError(f"{uri}: neither an absolute path nor a URI of a file")
    name = unquote(name) if parts.scheme == "file" else name  # the others take it as it is written
    return urlunsplit(parts._replace(path=folder or "/")), name


def open_file(uri: str) -> Opened:
    """Open a striped file, or any other, of a URI or path. Raises NotFound, StoreError or IntegrityError."""
    folder, name = split(uri)
    return open_in(open_store(folder, plain=True), name)


def open_in(store: Store, path: str) -> Opened:
    """As `open_file`, of a path in a store."""
    manifest = read_manifest(store, path)
    if manifest is None:
        reader = store.open_replaceable(path)
        return Opened(Layout(reader.size_bytes), [reader], None)
    try:
        objects = open_stripes(store, f"{path}/{manifest.generation}", manifest.layout)
    except NotFound as error:
        raise IntegrityError(error.message) from error
    return Opened(manifest.layout, objects, manifest)


def read_manifest(store: Store, path: str) -> Manifest | None:
    """The manifest of a striped file; None of what is none. Raises IntegrityError or StoreError."""
    try:
        content = store.read(f"{path}/{MANIFEST}", limit_bytes=MANIFEST_LIMIT_BYTES)
    except NotFound:
        return None
    manifest = decode(content)
    if not manifest.generation:
        raise IntegrityError(f"{path}: its manifest has no generation: not one of a striped file")
    return manifest


def placement(uri: str) -> dict[str, int] | None:
    """How many bytes of a file lie on which server; None where the store does not tell.

    Raises NotFound, StoreError or IntegrityError.
    """
    folder, name = split(uri)
    store = open_store(folder, plain=True)
    manifest = read_manifest(store, name)
    if manifest is None:
        store.open(name).close()
        return store.locations(name)
    paths = [f"{name}/{manifest.generation}/{index}" for index in range(manifest.layout.objects)]
    total: Counter[str] = Counter()
    with ThreadPoolExecutor(_LOOKS) as pool:
        for found in pool.map(store.locations, paths):
            if found is None:
                return None
            total.update(found)
    return dict(total)


def identity_of(uri: str) -> str:
    """A text that tells a file that is not striped from another of its name. Raises StoreError, NotFound."""
    folder, name = split(uri)
    return f"{uri} {open_store(folder, plain=True).identity(name)}"


def new_generation() -> str:
    return f"{time.time_ns():016x}{secrets.token_hex(4)}"


def publish(store: Store, path: str, manifest: Manifest) -> None:
    """Have a generation count from now on. Raises StoreError, also where not all of its objects are there."""
    layout = manifest.layout
    sizes = {entry.name: entry.size_bytes for entry in store.scan(f"{path}/{manifest.generation}")}
    if any(sizes.get(str(index)) != layout.object_size(index) for index in range(layout.objects)):
        raise StoreError(f"{path}: others have written it twice meanwhile, and what was written is gone")
    store.write(f"{path}/{MANIFEST}", manifest.encode())


def generation_of(store: Store, path: str) -> str:
    """The generation that counts; "" where none does, or the manifest is damaged. Raises StoreError."""
    try:
        manifest = read_manifest(store, path)
    except IntegrityError:
        return ""
    return manifest.generation if manifest else ""


def remove_older(store: Store, path: str, generation: str, last: str) -> None:
    """Remove what was before the last generation; what cannot be removed now goes with the next.

    One that was begun less than a day ago stays if it is newer than the last: somebody may write it.
    """
    with contextlib.suppress(StoreError):
        for entry in store.scan(path):
            if not entry.is_folder or entry.name in (last, generation):
                continue
            age_s = (_begun_ns(generation) - _begun_ns(entry.name)) / 1e9
            if entry.name < last or age_s > _DEAD_S:
                store.remove(f"{path}/{entry.name}")


def _begun_ns(generation: str) -> int:
    try:
        return int(generation[:16], 16)
    except ValueError:
        return 0
