"""The wire format between the node agent and its clients: prolog hook, plugin, `bootseer`, jobs.

One connection carries one request and one reply. A message is a sequence of KEY=VALUE entries, each ended by
a NUL, like the environment block of a process (environ(7)): C and Python write and read it in a few lines,
and no value needs quoting. A key may stand several times. The client ends its request with
shutdown(SHUT_WR), the agent its reply by closing; a reply that may take long begins with WAIT=milliseconds.
Descriptors travel with the reply (SCM_RIGHTS, unix(7)).
Standard library only, and as few modules as can be: every `bootseer mark` loads this.
"""

from __future__ import annotations

import os
import re
import socket
import struct
import time

SOCKET = "/run/bootseer/agent.sock"
ROOT_SOCKET_NAME = "root.sock"  # beside it
# Containers share the host's network namespace, in which abstract names live, but not its /run.
ABSTRACT_SOCKET = "\0bootseer-agent"
MESSAGE_LIMIT_BYTES = 2**20
DESCRIPTOR_LIMIT = 64

_KEY = re.compile(rb"[A-Z][A-Z0-9_]*")
_CREDENTIALS = struct.Struct("3i")

Message = list[tuple[str, str]]


def encode(entries: Message) -> bytes:
    """The bytes of a message. Raises ValueError when a value holds a NUL or the whole is too large."""
    parts = []
    for key, value in entries:
        raw = value.encode("utf-8", "surrogateescape")
        if b"\0" in raw:
            raise ValueError(f"{key}: holds a NUL")
        parts.append(key.encode() + b"=" + raw + b"\0")
    content = b"".join(parts)
    if len(content) > MESSAGE_LIMIT_BYTES:
        raise ValueError(f"message of {len(content)} bytes is larger than {MESSAGE_LIMIT_BYTES}")
    return content


def decode(content: bytes) -> Message:
    """The entries of a message. Raises ValueError when the bytes are not one."""
    if not content:
        return []
    if not content.endswith(b"\0"):
        raise ValueError("message is not whole")
    entries = []
    for entry in content[:-1].split(b"\0"):
        key, equals, value = entry.partition(b"=")
        if not equals or not _KEY.fullmatch(key):
            raise ValueError(f"not KEY=VALUE: {entry[:40]!r}")
        entries.append((key.decode(), value.decode("utf-8", "surrogateescape")))
    return entries


def receive_request(link: socket.socket, timeout_s: float) -> Message:
    """Read a client's message; all of it has to arrive within timeout_s.

    Clients have no descriptors to send: the kernel drops those that come, as nothing is there to take them.
    Raises ValueError when it is no message or too large, OSError (also TimeoutError) from the socket.
    """
    deadline_s = time.monotonic() + timeout_s
    content = bytearray()
    while True:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError(f"request did not end within {timeout_s} s")
        link.settimeout(left_s)
        part = link.recv(65536)
        if not part:
            return decode(bytes(content))
        content += part
        if len(content) > MESSAGE_LIMIT_BYTES:
            raise ValueError("message is too large")


def receive(link: socket.socket, *, rest_s: float | None = None) -> tuple[Message, list[int]]:
    """Read the agent's message until its end; the caller closes the descriptors.

    rest_s: how long it may take once it has begun; the socket's own timeout is for its first byte.
    Raises ValueError when it is no message or too large, OSError (also TimeoutError) from the socket.
    """
    content = bytearray()
    fds: list[int] = []
    try:
        while True:
            part, received, _, _ = socket.recv_fds(link, 65536, DESCRIPTOR_LIMIT)
            if rest_s is not None:
                link.settimeout(rest_s)
            fds += received
            if not part:
                return decode(bytes(content)), fds
            content += part
            if len(content) > MESSAGE_LIMIT_BYTES or len(fds) > DESCRIPTOR_LIMIT:
                raise ValueError("message is too large")
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def peer(link: socket.socket) -> tuple[int, int, int]:
    """Process, user and group id of the other end (SO_PEERCRED, unix(7))."""
    raw = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, uid, gid = _CREDENTIALS.unpack(raw)
    return pid, uid, gid


def first(message: Message, key: str, default: str = "") -> str:
    """The first value of a key."""
    return next((value for name, value in message if name == key), default)
