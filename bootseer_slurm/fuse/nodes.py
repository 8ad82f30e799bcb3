"""The nodes that the kernel knows: files and folders by id, and how often it has looked each up.

Owns: the nodes, their attributes, and when a node is dropped. Does not own: which name leads to which node
(names.py), the bytes (a File has them), the layout of messages (protocol.py), and where counts are kept
(ledger.py).

A node whose name was removed lives on until the kernel has forgotten it: open files, mappings and bind mounts
of it go on working, but not with the next server, which has no File for it. Then the last reference to its
File is dropped.

Threads: safe from any. One lock, held for a few dictionary accesses, never while calling out; names.py takes
it too.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from dataclasses import dataclass, field
from typing import Protocol

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.ledger import Lookups


class File(Protocol):
    """A file that can be served: immutable bytes, of which some are already local.

    Called by many threads at once. A descriptor that `ready` gave must stay open, and what it shows must stay
    as it is, for as long as the server holds a reference to the File. The server drops its last one when the
    name was removed, the kernel forgot the file and no read is under way: `weakref.finalize` is the place to
    clean up. patience_s: how long a read may wait until it fails; it may change at any time.
    """

    @property
    def size_bytes(self) -> int: ...
    @property
    def uid(self) -> int: ...
    @property
    def gid(self) -> int: ...
    @property
    def mtime_ns(self) -> int: ...
    @property
    def patience_s(self) -> float: ...

    def ready(self, offset: int, size: int) -> int | None:
        """Return a descriptor to pread [offset, offset+size) from, at the same offset.

        None unless every one of these bytes is local and verified. Also records the access. Never blocks.
        """

    def fetch(self, offset: int, size: int) -> bytes | memoryview:
        """Return exactly [offset, offset+size); may wait, in bounded time. The reader gets its OSError."""


def read_local(file: File, fd: int, offset: int, part: memoryview) -> None:
    """Fill part from the descriptor that the file's `ready` gave."""
    if os.preadv(fd, [part], offset) != len(part):
        raise ValueError(f"the local copy of {file!r} ends before {offset + len(part)}")


@dataclass(slots=True)
class Node:
    """A file or a directory; attr is its struct fuse_attr, slot the number of its count in the ledger."""

    id: int
    mode: int
    uid: int
    gid: int
    size_bytes: int
    mtime_ns: int
    attr: bytes
    slot: int
    lookups: int
    file: File | None = None
    children: dict[bytes, Node] = field(default_factory=dict)
    linked: bool = True

    @property
    def is_file(self) -> bool:
        return stat.S_ISREG(self.mode)

    def touch(self) -> None:
        """Give a directory the time of now."""
        self.mtime_ns = time.time_ns()
        self.attr = protocol.attributes(self.id, self.mode, self.uid, 0, 0, self.mtime_ns)


class NodeTable:
    """All nodes, by id. `root` is there from the start.

    `make_directory`, `make_file`, `unlink` and `drop_unused` are called with `lock` held; the others take it.
    """

    def __init__(self, lookups: Lookups) -> None:
        """lookups: where counts are kept."""
        self.lock = threading.Lock()
        self.lookups = lookups
        self._nodes: dict[int, Node] = {}
        self.root = self.make_directory(protocol.ROOT_ID, uid=0, mode=0o755)

    def get(self, node_id: int) -> Node:
        """Return a node; raises OSError ESTALE when there is none."""
        node = self._nodes.get(node_id)
        if node is None:
            raise protocol.failure(errno.ESTALE)
        return node

    def look_up(self, parent_id: int, name: bytes) -> Node:
        """Return the node of a name and count the look-up; raises OSError ENOENT."""
        with self.lock:
            node = self.get(parent_id).children.get(name)
            if node is None:
                raise protocol.failure(errno.ENOENT)
            self._count(node, 1)
            return node

    def entries(self, directory_id: int, after_id: int) -> list[tuple[bytes, Node]]:
        """Return (name, node) of the children with an id above after_id, without "." and "..".

        They are in the order of their ids, so a listing can go on after any of them while others come and go.
        """
        with self.lock:
            children = self.get(directory_id).children
            entries = [(name, node) for name, node in children.items() if node.id > after_id]
        return sorted(entries, key=lambda entry: entry[1].id)

    def count_lookup(self, node: Node) -> bool:
        """Count a look-up that READDIRPLUS implies; False when the node went away in the meantime."""
        with self.lock:
            if not node.linked:
                return False
            self._count(node, 1)
            return True

    def forget(self, node_id: int, lookups: int) -> None:
        """Take look-ups back; a nameless node without any is dropped."""
        with self.lock:
            node = self._nodes.get(node_id)
            if node is not None:
                self._count(node, -lookups)
                self.drop_unused(node)

    def totals(self) -> tuple[int, int]:
        """Return the bytes and the number of all files, with those that have no name any more."""
        files = [node.size_bytes for node in list(self._nodes.values()) if node.is_file]
        return sum(files), len(files)

    def make_directory(self, node_id: int, uid: int, mode: int) -> Node:
        """Make a directory that has no name yet. Raises BootseerError when there are too many nodes."""
        slot, lookups = self.lookups.take(node_id)
        node = Node(node_id, stat.S_IFDIR | mode, uid, 0, 0, 0, b"", slot, lookups)
        node.touch()
        self._nodes[node.id] = node
        return node

    def make_file(
        self, node_id: int, uid: int, gid: int, size_bytes: int, mtime_ns: int, file: File | None = None
    ) -> Node:
        """Make a file that has no name yet. Raises BootseerError when there are too many nodes."""
        mode = stat.S_IFREG | 0o400
        attr = protocol.attributes(node_id, mode, uid, gid, size_bytes, mtime_ns)
        slot, lookups = self.lookups.take(node_id)
        node = Node(node_id, mode, uid, gid, size_bytes, mtime_ns, attr, slot, lookups, file)
        self._nodes[node.id] = node
        return node

    def unlink(self, directory: Node, name: bytes) -> None:
        """Take the name of a child away."""
        node = directory.children.pop(name)
        node.linked = False
        directory.touch()
        self.drop_unused(node)

    def drop_unused(self, node: Node) -> None:
        """Drop a node that has no name, if the kernel does not know it any more."""
        if not node.linked and node.lookups <= 0:
            del self._nodes[node.id]
            self.lookups.release(node.slot)

    def _count(self, node: Node, change: int) -> None:
        node.lookups += change
        self.lookups.write(node.slot, max(0, node.lookups))
