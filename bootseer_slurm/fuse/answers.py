"""The answers that need no bytes of a file: names, attributes, listings, and forgetting them.

Owns: which request of this kind is answered how. Does not own: reads (requests.py), the nodes (nodes.py), and
the layout of messages (protocol.py). Threads: safe from any; nothing here waits.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from bootseer_slurm.fuse import protocol
from bootseer_slurm.fuse.device import Device
from bootseer_slurm.fuse.nodes import NodeTable
from bootseer_slurm.fuse.protocol import Opcode, Request

_VALID_S = 86400  # names and attributes never change without a notification
# The positions of a listing begin with these; a child's is its node id and their number.
_DOTS = ((1, b"."), (2, b".."))
_ENTRY_BYTES = protocol.ENTRY_OUT.size + protocol.ATTR.size

Handler = Callable[[Request], "bytes | None"]


class Answers:
    """Gives the payload of a reply, or None when it was sent, or there is none."""

    def __init__(self, nodes: NodeTable, device: Device, *, zero_message_open: bool) -> None:
        """zero_message_open: the kernel takes ENOSYS to OPEN for "open without asking"."""
        self._nodes = nodes
        self._device = device
        self._zero_message_open = zero_message_open
        self.handlers: dict[int, Handler] = {
            Opcode.LOOKUP: self._look_up,
            Opcode.FORGET: self._forget,
            Opcode.BATCH_FORGET: self._batch_forget,
            Opcode.GETATTR: self._get_attributes,
            Opcode.OPEN: self._open,
            Opcode.OPENDIR: lambda request: protocol.open_reply(),
            Opcode.READDIR: lambda request: self._list(request, plus=False),
            Opcode.READDIRPLUS: lambda request: self._list(request, plus=True),
            Opcode.STATFS: lambda request: protocol.statfs_reply(*self._nodes.totals()),
            **dict.fromkeys((Opcode.RELEASE, Opcode.RELEASEDIR, Opcode.DESTROY), lambda request: b""),
        }

    def _look_up(self, request: Request) -> None:
        node = self._nodes.look_up(request.node_id, bytes(request.body).partition(b"\0")[0])
        if not self._device.reply(request.unique, protocol.entry_reply(node.id, node.attr, _VALID_S)):
            self._nodes.forget(node.id, 1)

    def _forget(self, request: Request) -> None:
        self._nodes.forget(request.node_id, *protocol.FORGET_IN.unpack_from(request.body))

    def _batch_forget(self, request: Request) -> None:
        for node_id, lookups in protocol.forgets(request.body):
            self._nodes.forget(node_id, lookups)

    def _get_attributes(self, request: Request) -> bytes:
        return protocol.attr_reply(self._nodes.get(request.node_id).attr, _VALID_S)

    def _open(self, request: Request) -> bytes:
        if self._zero_message_open:
            raise protocol.failure(errno.ENOSYS)
        return protocol.open_reply(protocol.FOPEN_KEEP_CACHE)

    def _list(self, request: Request, *, plus: bool) -> None:
        _fh, offset, room, _, _, _, _ = protocol.READ_IN.unpack_from(request.body)
        this = self._nodes.get(request.node_id)
        entries = [(position, name, this) for position, name in _DOTS if position > offset]
        children = self._nodes.entries(this.id, after_id=offset - len(_DOTS))
        entries += [(node.id + len(_DOTS), name, node) for name, node in children]
        records: list[bytes] = []
        looked_up: list[int] = []
        for position, name, node in entries:
            record = protocol.directory_entry(node.id, position, node.mode, name)
            room -= len(record) + (_ENTRY_BYTES if plus else 0)
            if room < 0:
                break
            if plus:  # node id 0 says: only a name
                counted = node is not this and self._nodes.count_lookup(node)
                if counted:
                    looked_up.append(node.id)
                records.append(protocol.entry_reply(node.id if counted else 0, node.attr, _VALID_S))
            records.append(record)
        if not self._device.reply(request.unique, b"".join(records)):
            for node_id in looked_up:
                self._nodes.forget(node_id, 1)
