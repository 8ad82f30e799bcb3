"""The files that are served, as the kernel sees them: a tree of two levels, "<uid>/<name>".

Owns: node ids, names, and how often the kernel has looked a node up. Does not own: the bytes (a File has
them), the layout of messages (kernel.py), and telling the kernel what changed: `add` and `remove` return what
has to be told, and server.py does it.

    /            0755 root
    /<uid>       0500 <uid>      made with its first file, removed with its last
    /<uid>/name  0400, owner as the File says

A node id is given once in the life of a tree, so generation is always 0. A node whose name was removed lives
on until the kernel has forgotten it: open files, mappings and bind mounts of it go on working. Then the last
reference to its File is dropped.

Threads: safe from any. One lock, held for a few dictionary accesses, never while calling out.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from bootseer_slurm.fuse import kernel


class File(Protocol):
    """What can be served: immutable bytes, of which some are already local.

    Called by many threads at once. A descriptor that `ready` gave must stay open, and what it shows must stay
    as it is, for as long as the server holds a reference to the File. The server drops its last one when the
    name was removed, the kernel forgot the file and no read is under way: `weakref.finalize` is the place to
    clean up.
    """

    @property
    def size_bytes(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...

    def ready(self, offset: int, size: int) -> int | None:
        """Return a descriptor to pread [offset, offset+size) from, at the same offset.

        None unless every one of these bytes is local and verified. Also records the access. Never blocks.
        """

    def fetch(self, offset: int, size: int) -> bytes | memoryview:
        """Return exactly [offset, offset+size); may wait, in bounded time. The reader gets its OSError."""


@dataclass(slots=True)
class Node:
    """A file or a directory; attr is its struct fuse_attr."""

    id: int
    mode: int
    uid: int
    attr: bytes
    file: File | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    lookups: int = 0
    linked: bool = True


class Tree:
    """The node table."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._last_id = kernel.ROOT_ID - 1
        self._root = self._make_directory(uid=0, mode=0o755)

    def get(self, node_id: int) -> Node:
        """Return a node; raises OSError ESTALE when there is none."""
        node = self._nodes.get(node_id)
        if node is None:
            raise kernel.failure(errno.ESTALE)
        return node

    def look_up(self, parent_id: int, name: bytes) -> Node:
        """Return the node of a name and count the look-up; raises OSError ENOENT."""
        with self._lock:
            node = self.get(parent_id).children.get(name)
            if node is None:
                raise kernel.failure(errno.ENOENT)
            node.lookups += 1
            return node

    def entries(self, directory_id: int, after_id: int) -> list[tuple[bytes, Node]]:
        """Return (name, node) of the children with an id above after_id, without "." and "..".

        They are in the order of their ids, so a listing can go on after any of them while others come and go.
        """
        with self._lock:
            children = self.get(directory_id).children
            return [(name, node) for name, node in children.items() if node.id > after_id]

    def count_lookup(self, node: Node) -> bool:
        """Count a look-up that READDIRPLUS implies; False when the node went away in the meantime."""
        with self._lock:
            if not node.linked:
                return False
            node.lookups += 1
            return True

    def forget(self, node_id: int, lookups: int) -> None:
        """Take look-ups back; a nameless node without any is dropped."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is not None:
                node.lookups -= lookups
                self._drop_unused(node)

    def add(self, path: str, file: File) -> int:
        """Give file the name path, "<uid>/<name>"; return the id of the directory that changed.

        Raises ValueError (no such path is possible) or FileExistsError.
        """
        uid, name = _split(path)
        with self._lock:
            directory = self._root.children.get(b"%d" % uid)
            if directory is not None and name in directory.children:
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
            changed = directory or self._root
            if directory is None:
                directory = self._make_directory(uid=uid, mode=0o500)
                self._root.children[b"%d" % uid] = directory
            node_id, mode = self._next_id(), stat.S_IFREG | 0o400
            attr = kernel.attributes(node_id, mode, file.uid, file.gid, file.size_bytes, file.mtime_ns)
            self._nodes[node_id] = directory.children[name] = Node(node_id, mode, file.uid, attr, file)
            self._touch(changed)
            return changed.id

    def remove(self, path: str) -> list[tuple[int, bytes]]:
        """Take a name away; return the (parent id, name) that the kernel must be told of, in this order.

        Raises ValueError or FileNotFoundError.
        """
        uid, name = _split(path)
        with self._lock:
            directory = self._root.children.get(b"%d" % uid)
            if directory is None or name not in directory.children:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            gone = [(directory.id, name)]
            self._unlink(directory, name)
            if not directory.children:
                gone.append((self._root.id, b"%d" % uid))
                self._unlink(self._root, b"%d" % uid)
            return gone

    def totals(self) -> tuple[int, int]:
        """Return the bytes and the number of all files, with those that have no name any more."""
        files = [node.file for node in list(self._nodes.values()) if node.file is not None]
        return sum(file.size_bytes for file in files), len(files)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _make_directory(self, uid: int, mode: int) -> Node:
        node = Node(self._next_id(), stat.S_IFDIR | mode, uid, b"")
        self._touch(node)
        self._nodes[node.id] = node
        return node

    def _touch(self, directory: Node) -> None:
        directory.attr = kernel.attributes(directory.id, directory.mode, directory.uid, 0, 0, time.time_ns())

    def _unlink(self, directory: Node, name: bytes) -> None:
        node = directory.children.pop(name)
        node.linked = False
        self._touch(directory)
        self._drop_unused(node)

    def _drop_unused(self, node: Node) -> None:
        if not node.linked and node.lookups <= 0:
            del self._nodes[node.id]


def _split(path: str) -> tuple[int, bytes]:
    uid, slash, name = path.partition("/")
    plain = uid.isascii() and uid.isdecimal() and uid == str(int(uid)) and int(uid) < 2**32 - 1
    encoded = os.fsencode(name)
    if not (plain and slash) or name in ("", ".", "..") or "/" in name or "\0" in name or len(encoded) > 255:
        raise ValueError(f"not a path of the form <uid>/<name>: {path!r}")
    return int(uid), encoded
