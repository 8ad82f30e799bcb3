"""The files that are served, as the kernel sees them: a tree of two levels, "<uid>/<name>".

Owns: node ids, names, how often the kernel has looked a node up, and what a later server has to know of them
(`save`). Does not own: the bytes (a File has them), the layout of messages (protocol.py), where the state and
the counts are kept, and telling the kernel what changed: `add`, `remove` and `settle` return what has to be
told, and server.py does it.

    /            0755 root
    /<uid>       0500 <uid>      made with its first file, removed with its last
    /<uid>/name  0400, owner as the File says

A node id is given once in the life of a mount, so generation is always 0. A node whose name was removed lives
on until the kernel has forgotten it: open files, mappings and bind mounts of it go on working, but not with
the next server, which has no File for it. Then the last reference to its File is dropped.

Recovery: a tree that was restored has names without a File, until `add` brings it or `settle` takes the name
away.

Threads: safe from any. One lock, held for a few dictionary accesses, never while calling out. Another one
orders changes, and is held while the state is saved; readers of the tree do not take it.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.ledger import Lookups

State = dict[str, Any]  # as JSON keeps it


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
    """A file or a directory; attr is its struct fuse_attr, slot the place of its count of look-ups."""

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


class Added(NamedTuple):
    """What became of an `add`: the node, the node that lost its name to it, and what to tell the kernel.

    changed: the directory that has a new name, if it is new. gone: (parent id, name) of the other node.
    """

    node: Node
    replaced: Node | None
    changed: int | None
    gone: list[tuple[int, bytes]]


class NodeTable:
    """The node table."""

    def __init__(self, lookups: Lookups, save: Callable[[State], None]) -> None:
        """lookups: where counts are kept. save: is given what `restore` needs; it may raise."""
        self._lookups = lookups
        self._save = save
        self._changes = threading.Lock()
        self._lock = threading.Lock()
        self._nodes: dict[int, Node] = {}
        self._last_id = protocol.ROOT_ID
        self._root = self._make_directory(protocol.ROOT_ID, uid=0, mode=0o755)

    def restore(self, state: State) -> None:
        """Take over names and node ids; for an empty tree, before anything else.

        Raises KeyError, TypeError or ValueError on what `save` did not give.
        """
        with self._lock:
            for uid, node_id in state["directories"].items():
                self._root.children[b"%d" % int(uid)] = self._make_directory(node_id, int(uid), 0o500)
            for node_id, directory, name, uid, gid, size_bytes, mtime_ns in state["files"]:
                node = self._make_file(node_id, uid, gid, size_bytes, mtime_ns)
                self._root.children[b"%d" % directory].children[os.fsencode(name)] = node
            self._last_id = state["last_id"]
            self._lookups.release_rest()

    def get(self, node_id: int) -> Node:
        """Return a node; raises OSError ESTALE when there is none."""
        node = self._nodes.get(node_id)
        if node is None:
            raise protocol.failure(errno.ESTALE)
        return node

    def find(self, path: str) -> Node | None:
        """Return the node that has a name, "<uid>/<name>"; raises ValueError."""
        uid, name = _split(path)
        with self._lock:
            directory = self._root.children.get(b"%d" % uid)
            return None if directory is None else directory.children.get(name)

    def look_up(self, parent_id: int, name: bytes) -> Node:
        """Return the node of a name and count the look-up; raises OSError ENOENT."""
        with self._lock:
            node = self.get(parent_id).children.get(name)
            if node is None:
                raise protocol.failure(errno.ENOENT)
            self._count(node, 1)
            return node

    def entries(self, directory_id: int, after_id: int) -> list[tuple[bytes, Node]]:
        """Return (name, node) of the children with an id above after_id, without "." and "..".

        They are in the order of their ids, so a listing can go on after any of them while others come and go.
        """
        with self._lock:
            children = self.get(directory_id).children
            entries = [(name, node) for name, node in children.items() if node.id > after_id]
        return sorted(entries, key=lambda entry: entry[1].id)

    def count_lookup(self, node: Node) -> bool:
        """Count a look-up that READDIRPLUS implies; False when the node went away in the meantime."""
        with self._lock:
            if not node.linked:
                return False
            self._count(node, 1)
            return True

    def forget(self, node_id: int, lookups: int) -> None:
        """Take look-ups back; a nameless node without any is dropped."""
        with self._lock:
            node = self._nodes.get(node_id)
            if node is not None:
                self._count(node, -lookups)
                self._drop_unused(node)

    def add(self, path: str, file: File) -> Added:
        """Give file the name path, "<uid>/<name>": its old node if it fits, else a new one, which is saved.

        Raises ValueError (no such path is possible), FileExistsError, BootseerError, and what `save` raises.
        """
        uid, name = _split(path)
        with self._changes:
            with self._lock:
                directory = self._root.children.get(b"%d" % uid)
                there = directory.children.get(name) if directory is not None else None
                if there is not None and there.file is not None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                if there is not None and _is_same(there, file):
                    there.file = file
                    return Added(there, None, None, [])
                made = directory or self._make_directory(self._next_id(), uid, 0o500)
                node = self._make_file(
                    self._next_id(), file.uid, file.gid, file.size_bytes, file.mtime_ns, file
                )
                state = self._state((uid, made, name, node))
            try:
                self._save(state)  # before the kernel can learn of the id: it outlives this process there
            except BaseException:
                with self._lock:
                    for new in (node,) if directory is not None else (node, made):
                        new.linked = False
                        self._drop_unused(new)
                raise
            with self._lock:
                if there is not None:
                    self._unlink(made, name)
                changed = made if directory is not None else self._root
                self._root.children[b"%d" % uid] = made
                made.children[name] = node
                self._touch(changed)
                return Added(node, there, changed.id, [(made.id, name)] if there is not None else [])

    def remove(self, path: str) -> tuple[Node, list[tuple[int, bytes]]]:
        """Take a name away; return its node and the (parent id, name) to tell the kernel of, in this order.

        Not saved: see `save`. Raises ValueError or FileNotFoundError.
        """
        uid, name = _split(path)
        with self._changes, self._lock:
            directory = self._root.children.get(b"%d" % uid)
            if directory is None or name not in directory.children:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            node = directory.children[name]
            return node, self._remove(directory, [name])

    def settle(self) -> list[tuple[int, bytes]]:
        """Take the names away that have no File; return the (parent id, name) to tell the kernel of."""
        with self._changes, self._lock:
            gone = []
            for directory in list(self._root.children.values()):
                names = [name for name, node in directory.children.items() if node.file is None]
                if names:
                    gone += self._remove(directory, names)
            return gone

    def save(self) -> None:
        """Save the state without the names that were taken away, once the kernel was told of them.

        Until then the kernel may lead a reader to such a node, and a later server has to know it.
        """
        with self._changes:
            with self._lock:
                state = self._state()
            self._save(state)

    def totals(self) -> tuple[int, int]:
        """Return the bytes and the number of all files, with those that have no name any more."""
        files = [node.size_bytes for node in list(self._nodes.values()) if node.is_file]
        return sum(files), len(files)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _make_directory(self, node_id: int, uid: int, mode: int) -> Node:
        slot, lookups = self._lookups.take(node_id)
        node = Node(node_id, stat.S_IFDIR | mode, uid, 0, 0, 0, b"", slot, lookups)
        self._touch(node)
        self._nodes[node.id] = node
        return node

    def _make_file(
        self, node_id: int, uid: int, gid: int, size_bytes: int, mtime_ns: int, file: File | None = None
    ) -> Node:
        mode = stat.S_IFREG | 0o400
        attr = protocol.attributes(node_id, mode, uid, gid, size_bytes, mtime_ns)
        slot, lookups = self._lookups.take(node_id)
        node = Node(node_id, mode, uid, gid, size_bytes, mtime_ns, attr, slot, lookups, file)
        self._nodes[node.id] = node
        return node

    def _state(self, new: tuple[int, Node, bytes, Node] | None = None) -> State:
        """What `restore` takes, with one more (uid, directory, name, node) instead of what has the name."""
        named = {
            (int(uid), name): (directory, node)
            for uid, directory in self._root.children.items()
            for name, node in directory.children.items()
        }
        if new is not None:
            named[new[0], new[2]] = (new[1], new[3])
        return {
            "last_id": self._last_id,
            "directories": {str(uid): directory.id for (uid, _), (directory, _) in named.items()},
            "files": [
                [node.id, uid, os.fsdecode(name), node.uid, node.gid, node.size_bytes, node.mtime_ns]
                for (uid, name), (_, node) in named.items()
            ],
        }

    def _touch(self, directory: Node) -> None:
        directory.mtime_ns = time.time_ns()
        directory.attr = protocol.attributes(
            directory.id, directory.mode, directory.uid, 0, 0, directory.mtime_ns
        )

    def _remove(self, directory: Node, names: list[bytes]) -> list[tuple[int, bytes]]:
        gone = [(directory.id, name) for name in names]
        for name in names:
            self._unlink(directory, name)
        if not directory.children:
            gone.append((self._root.id, b"%d" % directory.uid))
            self._unlink(self._root, b"%d" % directory.uid)
        return gone

    def _unlink(self, directory: Node, name: bytes) -> None:
        node = directory.children.pop(name)
        node.linked = False
        self._touch(directory)
        self._drop_unused(node)

    def _count(self, node: Node, change: int) -> None:
        node.lookups += change
        self._lookups.write(node.slot, max(0, node.lookups))

    def _drop_unused(self, node: Node) -> None:
        if not node.linked and node.lookups <= 0:
            del self._nodes[node.id]
            self._lookups.release(node.slot)


def _is_same(node: Node, file: File) -> bool:
    return (node.size_bytes, node.uid, node.gid) == (file.size_bytes, file.uid, file.gid)


def _split(path: str) -> tuple[int, bytes]:
    uid, slash, name = path.partition("/")
    plain = uid.isascii() and uid.isdecimal() and uid == str(int(uid)) and int(uid) < 2**32 - 1
    encoded = os.fsencode(name)
    if not (plain and slash) or name in ("", ".", "..") or "/" in name or "\0" in name or len(encoded) > 255:
        raise ValueError(f"not a path of the form <uid>/<name>: {path!r}")
    return int(uid), encoded
