"""The shared store: where blobs, names and events live.

Owns the layout below. Drivers keep the objects: local.py in folders (file://), hdfs.py in HDFS, arrow.py in
what pyarrow knows beside these. None knows what a blob is. Everything in the store belongs to one user and is
read and written with that user's rights: the node agent, which is root, never touches it itself but asks the
job's user's process (userproc/), so root_squash and quotas hold.

    <uri>/users/                         made by the admin (`bootseer store init`), mode 1777 like /tmp
    <uri>/users/<uid>/                   made by the user, 0700
        blobs/<id>/manifest, 0, 1, …     blob/manifest.py: the stripe objects, and the manifest written last
        names/<digest>.json              blob/names.py: which blob stands for which path
        leases/<digest>                  blob/lease.py: who is making the blob of a name
        traces/<class>/<blob>/<job>.<restart>.<node>[.partial]   blob/trace.py
        classes/<class>.json             blob/jobclass.py: what the last start of a job class asked for
        events/<job>.<restart>/<node>.jsonl

pyarrow tells no owners: on its file systems the admin makes the users' folders.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from bootseer_slurm.store.base import TEMPORARY, ObjectReader, ObjectWriter, Store, StoreEntry, clock_offset
from bootseer_slurm.store.local import FileReader, FileStore, give_folder, users_of

__all__ = [
    "TEMPORARY",
    "FileReader",
    "FileStore",
    "ObjectReader",
    "ObjectWriter",
    "Store",
    "StoreEntry",
    "clock_offset",
    "folder_of",
    "give_folder",
    "open_store",
    "users_of",
]


def folder_of(uri: str) -> Path | None:
    """The folder of a file:// store; None of another one."""
    parts = urlsplit(uri)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def open_store(uri: str, *, plain: bool = False) -> Store:
    """The store at a URI that pyarrow knows, such as file:///lustre/bootseer or hdfs://nn:8020/bootseer.

    plain: any folder of the user's, and not one with the layout above.
    Raises StoreError when the URI is of no known kind or its file system cannot be reached.
    """
    parts = urlsplit(uri)
    if parts.scheme == "file":
        return FileStore(Path(unquote(parts.path)), plain=plain)
    if parts.scheme == "hdfs":
        from bootseer_slurm.store.hdfs import HdfsStore

        return HdfsStore(uri)
    from bootseer_slurm.store.arrow import ArrowStore

    return ArrowStore(uri)
