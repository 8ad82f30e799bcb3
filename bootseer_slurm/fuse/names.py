"""The names of the files that are served: a tree of two levels, "<uid>/<name>", kept for the next server.

    /            0755 root
    /<uid>       0500 <uid>      made with its first file, removed with its last
    /<uid>/name  0400, owner as the File says

Owns: which name leads to which node, the node ids, and the state file. Does not own: the nodes (nodes.py).
It does not tell the kernel of a change: `add`, `remove` and `remove_without_file` return the change.

A node id is given once in the life of a mount, so generation is always 0.
Recovery: after `restore` there are names without a File, until `add` brings it or `remove_without_file` takes
the name away.
On disk: the state file, JSON, replaced atomically with every new name. It is of use only with its mount.

Threads: safe from any. The nodes' lock is held for a few dictionary accesses. Another lock orders changes,
and is held while the state is saved; who only reads does not take it.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.nodes import File, Node, NodeTable

_log = logging.getLogger(__name__)

State = dict[str, Any]  # as JSON keeps it


class Added(NamedTuple):
    """The result of an `add`: the node, the node that lost its name to it, and the change for the kernel.

    changed: the directory that has a new name, if it is new. gone: (parent id, name) of the other node.
    """

    node: Node
    replaced: Node | None
    changed: int | None
    gone: list[tuple[int, bytes]]


class StateFile:
    """The file that keeps the names of one mount for its next server."""

    def __init__(self, path: Path, mount_key: str) -> None:
        """mount_key: tells the mount from any other."""
        self._path = path
        self._mount_key = mount_key

    def write(self, state: State) -> None:
        """Replace what it holds. Raises BootseerError."""
        new = self._path.with_name(f"{self._path.name}.new")
        try:
            fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            with open(fd, "w", encoding="ascii") as stream:
                stream.write(json.dumps(state | {"mount": self._mount_key}))
            os.replace(new, self._path)
        except OSError as error:
            raise BootseerError(f"{self._path}: cannot be written: {error.strerror}") from error

    def restore(self, names: Names) -> None:
        """Give `names` what the last server of this mount had; a file of another mount means nothing."""
        try:
            state = json.loads(self._path.read_bytes())
            if state["mount"] == self._mount_key:
                names.restore(state)
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.error("%s: not usable, open files are lost: %r", self._path, error)


class Names:
    """Names and their nodes."""

    def __init__(self, nodes: NodeTable, save: Callable[[State], None]) -> None:
        """nodes: without names yet. save: is given what `restore` needs; it may raise."""
        self._nodes = nodes
        self._root = nodes.root
        self._save = save
        self._changes = threading.Lock()
        self._last_id = protocol.ROOT_ID

    def restore(self, state: State) -> None:
        """Take over names and node ids, before anything else.

        Raises KeyError, TypeError or ValueError on what `save` did not give.
        """
        with self._nodes.lock:
            for uid, node_id in state["directories"].items():
                self._root.children[b"%d" % int(uid)] = self._nodes.make_directory(node_id, int(uid), 0o500)
            for node_id, directory, name, uid, gid, size_bytes, mtime_ns in state["files"]:
                node = self._nodes.make_file(node_id, uid, gid, size_bytes, mtime_ns)
                self._root.children[b"%d" % directory].children[os.fsencode(name)] = node
            self._last_id = state["last_id"]
            self._nodes.lookups.release_rest()

    def find(self, path: str) -> Node | None:
        """Return the node that has a name, "<uid>/<name>"; raises ValueError."""
        uid, name = _split(path)
        with self._nodes.lock:
            directory = self._root.children.get(b"%d" % uid)
            return None if directory is None else directory.children.get(name)

    def add(self, path: str, file: File) -> Added:
        """Give file the name path, "<uid>/<name>": its old node if it fits, else a new one, which is saved.

        Raises ValueError (no such path is possible), FileExistsError, BootseerError, and what `save` raises.
        """
        uid, name = _split(path)
        with self._changes:
            with self._nodes.lock:
                directory = self._root.children.get(b"%d" % uid)
                there = directory.children.get(name) if directory is not None else None
                if there is not None and there.file is not None:
                    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
                if there is not None and _is_same(there, file):
                    there.file = file
                    return Added(there, None, None, [])
                made = directory or self._nodes.make_directory(self._next_id(), uid, 0o500)
                node = self._nodes.make_file(
                    self._next_id(), file.uid, file.gid, file.size_bytes, file.mtime_ns, file
                )
                state = self._state((uid, made, name, node))
            try:
                self._save(state)  # before the kernel can learn of the id: it outlives this process there
            except BaseException:
                with self._nodes.lock:
                    for new in (node,) if directory is not None else (node, made):
                        new.linked = False
                        self._nodes.drop_unused(new)
                raise
            with self._nodes.lock:
                if there is not None:
                    self._nodes.unlink(made, name)
                changed = made if directory is not None else self._root
                self._root.children[b"%d" % uid] = made
                made.children[name] = node
                changed.touch()
                return Added(node, there, changed.id, [(made.id, name)] if there is not None else [])

    def remove(self, path: str) -> tuple[Node, list[tuple[int, bytes]]]:
        """Take a name away; return its node and the (parent id, name) to tell the kernel of, in this order.

        Not saved: see `save`. Raises ValueError or FileNotFoundError.
        """
        uid, name = _split(path)
        with self._changes, self._nodes.lock:
            directory = self._root.children.get(b"%d" % uid)
            if directory is None or name not in directory.children:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            node = directory.children[name]
            return node, self._remove(directory, [name])

    def remove_without_file(self) -> list[tuple[int, bytes]]:
        """Take the names away that have no File; return the (parent id, name) to tell the kernel of."""
        with self._changes, self._nodes.lock:
            gone = []
            for directory in list(self._root.children.values()):
                names = [name for name, node in directory.children.items() if node.file is None]
                if names:
                    gone += self._remove(directory, names)
            return gone

    def save(self) -> None:
        """Save the state without the names that were taken away, once the kernel was told of them.

        Until then the kernel may lead a reader to such a node, and a later server has to know it.
        Where saving fails, the old state names more than there is; the next server's recovery mends that.
        """
        try:
            with self._changes:
                with self._nodes.lock:
                    state = self._state()
                self._save(state)
        except BootseerError as error:
            _log.warning("%s", error.message)

    def _next_id(self) -> int:
        self._last_id += 1
        return self._last_id

    def _state(self, new: tuple[int, Node, bytes, Node] | None = None) -> State:
        """Return what `restore` takes, with a new (uid, directory, name, node) in place of its namesake."""
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

    def _remove(self, directory: Node, names: list[bytes]) -> list[tuple[int, bytes]]:
        gone = [(directory.id, name) for name in names]
        for name in names:
            self._nodes.unlink(directory, name)
        if not directory.children:
            gone.append((self._root.id, b"%d" % directory.uid))
            self._nodes.unlink(self._root, b"%d" % directory.uid)
        return gone


def _is_same(node: Node, file: File) -> bool:
    return (node.size_bytes, node.uid, node.gid) == (file.size_bytes, file.uid, file.gid)


def _split(path: str) -> tuple[int, bytes]:
    uid, slash, name = path.partition("/")
    plain = uid.isascii() and uid.isdecimal() and uid == str(int(uid)) and int(uid) < 2**32 - 1
    encoded = os.fsencode(name)
    if not (plain and slash) or name in ("", ".", "..") or "/" in name or "\0" in name or len(encoded) > 255:
        raise ValueError(f"not a path of the form <uid>/<name>: {path!r}")
    return int(uid), encoded
