"""Making a striped file of a file that is there: in parallel, and going on where an earlier try ended.

<file>/unfinished    of a try that has not ended: what of, in how many objects, and as which generation
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bootseer_slurm.blob.digest import PREFERRED
from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.blob.names import wait_while_racy
from bootseer_slurm.blob.writer import write_objects
from bootseer_slurm.checkpoint.striped import generation_of, new_generation, publish, remove_older, split
from bootseer_slurm.checkpoint.writer import OBJECTS
from bootseer_slurm.errors import NotFound
from bootseer_slurm.store import Store, open_store

_LIMIT_OBJECTS = 256
_UNFINISHED = "unfinished"
_LIMIT_BYTES = 4096


def stripe_file(
    source: Path,
    uri: str,
    *,
    objects: int | None = None,
    progress: Callable[[int], None] = lambda count: None,
) -> Manifest:
    """Make the striped file `uri` of the file `source`.

    objects: to spread it over; None: as many as are good for it. progress: told the bytes just done, from
    several threads. What an earlier try wrote of the same file, as its size, time and inode tell, is not
    written again, but read, for its digests. Raises BootseerError.
    """
    folder, name = split(uri)
    store = open_store(folder, plain=True)
    status = source.stat()
    wait_while_racy(status)
    objects = objects or _objects_for(store, status.st_size)
    layout = Layout(status.st_size, objects=objects, digest=PREFERRED)
    identity = [str(source.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    generation, there = _earlier_try(store, name, identity, layout)
    note = {"source": identity, "objects": objects, "generation": generation}
    store.write(f"{name}/{_UNFINISHED}", json.dumps(note).encode())
    written = write_objects(store, f"{name}/{generation}", source, layout, there=there, progress=progress)
    manifest = Manifest("checkpoint", layout, written, generation)
    last = generation_of(store, name)
    publish(store, name, manifest)
    store.remove(f"{name}/{_UNFINISHED}")
    remove_older(store, name, generation, last)
    return manifest


def _objects_for(store: Store, size_bytes: int) -> int:
    """As many as let the store choose the place of all bytes, and no fewer than a stream has."""
    placed = -(-size_bytes // store.placed_bytes) if store.placed_bytes else 0
    return max(OBJECTS, min(_LIMIT_OBJECTS, placed))


def _earlier_try(store: Store, name: str, identity: list[object], layout: Layout) -> tuple[str, set[int]]:
    """The generation to go on with, and which of its objects are there."""
    try:
        note = json.loads(store.read(f"{name}/{_UNFINISHED}", limit_bytes=_LIMIT_BYTES))
        generation = str(note["generation"])
        same = (note["source"], note["objects"]) == (identity, layout.objects) and generation.isalnum()
    except (NotFound, ValueError, LookupError, TypeError):
        same = False
    if not same:
        return new_generation(), set()
    sizes = {entry.name: entry.size_bytes for entry in store.scan(f"{name}/{generation}")}
    there = {index for index in range(layout.objects) if sizes.get(str(index)) == layout.object_size(index)}
    return generation, there
