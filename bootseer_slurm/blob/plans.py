"""The traces of a user's starts in the store, and the plans that they give. Runs as that user.

Where the traces lie, and what they are: blob/trace.py. Thread-safe.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from bootseer_slurm.blob.trace import (
    LIMIT_BYTES,
    Plan,
    Trace,
    decode,
    merge,
    surplus,
    trace_folder,
    trace_name,
    traces_folder,
)
from bootseer_slurm.errors import BootseerError, NotFound
from bootseer_slurm.store import Store, StoreEntry

_PARALLEL_READS = 8
_CLASSES = 64  # looked through where this one has no traces


def keep_trace(store: Store, uid: int, job_class: str, blob_id: str, content: bytes) -> None:
    """Keep a trace of a class and blob, in place of those that no plan needs any more.

    content: the trace's bytes. Raises IntegrityError when they are none, StoreError.
    """
    folder = trace_folder(uid, job_class, blob_id)
    store.write(f"{folder}/{trace_name(decode(content))}", content)
    for name in surplus(_by_time(store, folder)):
        store.remove(f"{folder}/{name}")


class Shape(NamedTuple):
    """The blocks of a blob: how many, and the bytes of each."""

    blocks: int
    block_bytes: int


def plan_of(
    store: Store, uid: int, job_class: str, blob_id: str, shape: Shape, *, any_class: bool
) -> tuple[Plan, str]:
    """The plan that earlier starts of a class give for a blob, and why traces were left out, "" if none was.

    shape: the blob's. any_class: where the class has no traces, those of the user's others.
    Raises StoreError.
    """
    folder = trace_folder(uid, job_class, blob_id)
    names = _by_time(store, folder)
    left_out = set(surplus(names))
    paths = [f"{folder}/{name}" for name in names if name not in left_out]
    from_others = not paths and any_class
    if from_others:
        paths = list(_paths_of_any_class(store, uid, blob_id))
    with ThreadPoolExecutor(_PARALLEL_READS) as pool:
        found = [each for each in pool.map(lambda path: _read(store, path), paths) if each is not None]
    damaged = [each for each in found if isinstance(each, str)]
    warning = f"{len(damaged)} of {len(paths)} traces left out: {damaged[0]}" if damaged else ""
    plan = merge(
        # That another class read nothing of it says nothing of this one.
        [each for each in found if not isinstance(each, str) and (each.touches or not from_others)],
        blocks=shape.blocks,
        block_bytes=shape.block_bytes,
        now_ns=time.time_ns(),
    )
    return plan, warning


def _read(store: Store, path: str) -> Trace | str | None:
    """A trace; what is wrong with it; or None when it was removed meanwhile."""
    try:
        return decode(store.read(path, limit_bytes=LIMIT_BYTES))
    except NotFound:
        return None
    except BootseerError as error:
        return error.message


def _paths_of_any_class(store: Store, uid: int, blob_id: str) -> Iterator[str]:
    """The newest traces of a blob, whichever class they are of."""
    found = []
    for name in _by_time(store, traces_folder(uid))[-_CLASSES:]:
        folder = trace_folder(uid, name, blob_id)
        found += [(entry.changed_s, entry.name, folder) for entry in store.scan(folder) if _is_whole(entry)]
    found.sort()
    left_out = set(surplus([name for _, name, _ in found]))
    yield from (f"{folder}/{name}" for _, name, folder in found if name not in left_out)


def _by_time(store: Store, folder: str) -> list[str]:
    """The names in a folder of the store, the newest last."""
    entries = sorted(store.scan(folder), key=lambda entry: (entry.changed_s, entry.name))
    return [entry.name for entry in entries if _is_whole(entry)]


def _is_whole(entry: StoreEntry) -> bool:
    return not entry.name.startswith(".")
