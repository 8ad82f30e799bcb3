"""Layers: what of an environment differs from a snapshot that there is, so that no more than this is saved.

A layer is a squashfs of what is new or changed, with whiteouts for what is gone. It lies over a whole
snapshot, never over another layer, so that a start mounts two things at most. What is to be compared with is
kept beside each snapshot and each layer in the store, as its object "files": Parquet, a row for each file,
folder and link that it holds, with the columns

    path binary, mode uint32, size_bytes int64, mtime_ns int64, ctime_ns int64, link binary, digest binary

Does no I/O but reading files whose digest is needed.
"""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bootseer_slurm.env.tree import FileState, Tree, changed, is_cache, source_of
from bootseer_slurm.errors import IntegrityError

FILES = "files"
FILES_LIMIT_BYTES = 512 * 2**20
# Beyond this share of its bytes an environment is saved whole: starts are then served from one blob.
_LARGEST_SHARE = 0.5
_READ_BYTES = 2**20
_SCHEMA = pa.schema(
    {
        "path": pa.binary(),
        "mode": pa.uint32(),
        "size_bytes": pa.int64(),
        "mtime_ns": pa.int64(),
        "ctime_ns": pa.int64(),
        "link": pa.binary(),
        "digest": pa.binary(),
    }
)


class Layer(NamedTuple):
    """files: to be saved. gone: to be whited out; paths within the environment."""

    files: dict[str, FileState]
    gone: list[str]


def encode_files(files: Tree) -> bytes:
    """The object "files" of a snapshot that holds these."""
    rows = [
        {"path": os.fsencode(path), **state._asdict(), "link": os.fsencode(state.link)}
        for path, state in files.items()
    ]
    out = io.BytesIO()
    table = pa.Table.from_pylist(rows, schema=_SCHEMA)
    pq.write_table(table, out, compression="zstd", write_page_checksum=True)
    return out.getvalue()


def decode_files(content: bytes) -> dict[str, FileState]:
    """The files of a snapshot, from its object "files". Raises IntegrityError."""
    try:
        source = pa.BufferReader(content)
        table = pq.read_table(source, schema=_SCHEMA, page_checksum_verification=True)
        columns = [table.column(name).to_pylist() for name in _SCHEMA.names]
        return {
            os.fsdecode(path): FileState(mode, size_bytes, mtime_ns, ctime_ns, os.fsdecode(link), digest)
            for path, mode, size_bytes, mtime_ns, ctime_ns, link, digest in zip(*columns, strict=True)
        }
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        raise IntegrityError(f"the list of a snapshot's files is damaged: {error}") from error


def as_shown(base: Tree, layer: Tree) -> dict[str, FileState]:
    """The files that a mount of a snapshot with a layer shows: with whole seconds, and one time for all."""
    return {
        path: state._replace(ctime_ns=state.mtime_ns // 10**9 * 10**9)
        for path, state in {**base, **layer}.items()
    }


def with_own_ctime(files: Tree) -> dict[str, FileState]:
    """The files whose time of change is known: some file systems (sshfs) tell the mtime instead."""
    return {path: state for path, state in files.items() if state.ctime_ns != state.mtime_ns // 10**9 * 10**9}


def layer_over(base: Tree, root: Path, tree: Tree, *, known: Tree) -> Layer | None:
    """The layer that must lie over a snapshot of `base`, so that both show the environment in `root`.

    tree: what is there now. known: with digests, files that were there; one with the same time of change is
    not read again. None: the environment should rather be saved whole. Raises BootseerError.
    """
    same = {
        path
        for path, state in tree.items()
        if path in base and _is_same(base[path], state, root / path, known.get(path))
    }

    def stays(path: str) -> bool:
        """Whether a path is byte code of an unchanged source; the runs that made it may differ."""
        return path in base and source_of(path) in same

    def is_folder(path: str) -> bool:
        return path in tree and tree[path].is_folder

    files = [
        path for path, state in tree.items() if path not in same and not state.is_special and not stays(path)
    ]

    def is_seen(path: str) -> bool:
        """Whether the snapshot's file would be seen there. Byte code goes file by file."""
        folder = os.path.dirname(path)
        if is_cache(path) and base[path].is_folder:
            return False
        if is_cache(folder) and folder not in tree:
            folder = os.path.dirname(folder)
        return not folder or is_folder(folder)

    gone = [
        path
        for path in base
        if (path not in tree or tree[path].is_special) and not stays(path) and is_seen(path)
    ]
    # Where nothing can mount it, a layer is unpacked over its snapshot, after what unsquashfs lists of it.
    if any(is_folder(path) and not base[path].is_folder for path in files if path in base):
        return None
    if any("\n" in path or " -> " in path for path in (*files, *gone)):
        return None
    size_bytes = sum(tree[path].size_bytes for path in files)
    if size_bytes > _LARGEST_SHARE * sum(state.size_bytes for state in tree.values()):
        return None
    wanted = set(files)
    for path in (*files, *gone):
        while path := os.path.dirname(path):
            wanted.add(path)
    return Layer({path: state for path, state in tree.items() if path in wanted}, gone)


def _is_same(before: FileState, state: FileState, path: Path, known: FileState | None) -> bool:
    """Whether a file is the one in the snapshot. Its size and mtime alone cannot tell: archives set them."""
    if state.as_installed != before.as_installed:
        return False
    if not state.is_file:
        return True
    if known and (known.as_installed, known.ctime_ns) == (state.as_installed, state.ctime_ns):
        return known.digest == before.digest
    return _digest(path) == before.digest


def _digest(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while content := file.read(_READ_BYTES):
                digest.update(content)
            return digest.digest()
    except OSError as error:
        raise changed(path) from error
