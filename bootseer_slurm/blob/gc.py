"""The garbage of a user's part of the store: blobs without a name, dead leases, old traces, half objects.

    users/<uid>/blobs/<token>/unused    an empty object: since its time, no name has stood for this blob

A blob without a name is marked first, and removed a day later: jobs that began before may still read it, and
one that was just stored gets its name last. The store's own times are compared with each other where
possible; a day is longer than clocks are apart. Runs as the store's user, and may run twice at once.

Each blob, and each rank's part of a checkpoint, has traces of its own: those too old for a plan go too.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bootseer_slurm.blob.names import list_names, user_folder
from bootseer_slurm.blob.trace import MAX_AGE_S, traces_folder
from bootseer_slurm.store import TEMPORARY, Store, StoreEntry

GRACE_S = 86400.0
_UNUSED = "unused"


@dataclass(slots=True)
class Collected:
    """The paths in the store that were removed, and their bytes.

    marked: blobs that go after a day. problems: what is wrong with records that are damaged.
    """

    removed: list[str] = field(default_factory=list)
    size_bytes: int = 0
    marked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect_garbage(store: Store, uid: int, *, now_s: float | None = None) -> Collected:
    """Remove blobs that were never completed or lost their names, dead leases, old traces and half-written
    objects.

    While a name's record is damaged no complete blob is removed: the record may be of it.
    now_s: seconds since 1970. Raises StoreError.
    """
    now_s = time.time() if now_s is None else now_s
    root = user_folder(uid)
    result = Collected()
    names, result.problems = list_names(store, uid)
    used = {folder for name in names for folder in name.folders}
    for blob in store.scan(f"{root}/blobs"):
        if blob.is_folder:
            path = f"{root}/blobs/{blob.name}"
            _look_at_blob(store, path, blob, path in used, now_s, result)
    for lease in store.scan(f"{root}/leases"):
        if now_s - lease.changed_s > GRACE_S:
            _remove(store, f"{root}/leases/{lease.name}", lease.size_bytes, result)
    _remove_traces(store, traces_folder(uid), now_s, result)
    _remove_temporary(store, root, now_s, result)
    return result


def _look_at_blob(
    store: Store, path: str, folder: StoreEntry, named: bool, now_s: float, result: Collected
) -> None:
    entries = store.scan(path)
    objects = {entry.name: entry for entry in entries}
    size_bytes = sum(entry.size_bytes for entry in entries)
    mark = objects.get(_UNUSED)
    if "manifest" not in objects:
        latest_s = max([folder.changed_s, *(entry.changed_s for entry in entries)])
        if now_s - latest_s > GRACE_S:
            _remove(store, path, size_bytes, result)
    elif named:
        if mark is not None:
            store.remove(f"{path}/{_UNUSED}")
    elif mark is None:
        store.write(f"{path}/{_UNUSED}", b"")
        result.marked.append(path)
    elif now_s - mark.changed_s > GRACE_S and not result.problems:
        _remove(store, path, size_bytes, result)
    else:
        result.marked.append(path)


def _remove_traces(store: Store, root: str, now_s: float, result: Collected) -> None:
    for job_class in _folders(store, root):
        path = f"{root}/{job_class.name}"
        blobs = _folders(store, path)
        old = []
        for blob in blobs:
            traces = store.scan(f"{path}/{blob.name}")
            if now_s - max(entry.changed_s for entry in (blob, *traces)) > MAX_AGE_S:
                old.append((f"{path}/{blob.name}", sum(entry.size_bytes for entry in traces)))
        if len(old) == len(blobs) and now_s - job_class.changed_s > MAX_AGE_S:
            old = [(path, sum(size_bytes for _, size_bytes in old))]
        for each in old:
            _remove(store, *each, result)


def _folders(store: Store, path: str) -> list[StoreEntry]:
    return [entry for entry in store.scan(path) if entry.is_folder]


def _remove_temporary(store: Store, folder: str, now_s: float, result: Collected) -> None:
    """Remove what writers that were killed left, in all folders below."""
    for entry in store.scan(folder):
        path = f"{folder}/{entry.name}"
        if entry.is_folder:
            _remove_temporary(store, path, now_s, result)
        elif TEMPORARY.fullmatch(entry.name) and now_s - entry.changed_s > GRACE_S:
            _remove(store, path, entry.size_bytes, result)


def _remove(store: Store, path: str, size_bytes: int, result: Collected) -> None:
    store.remove(path)
    result.removed.append(path)
    result.size_bytes += size_bytes
