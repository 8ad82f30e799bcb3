"""The process's end of the socket to its owner: nothing that is said waits for the owner to listen."""

from __future__ import annotations

import selectors
import socket
from collections import deque

from bootseer_slurm.peers.local import MESSAGE_BYTES, FromChild, FromOwner, decode_from_owner, encode

_MESSAGES = 64  # at a time


class Owner:
    """The owner, as its process sees it."""

    def __init__(self, selector: selectors.BaseSelector, link: socket.socket) -> None:
        link.setblocking(False)
        self._selector = selector
        self._link = link
        self._to_say: deque[bytes] = deque()
        self._heard: list[tuple[FromOwner, int]] = []
        self.has_gone = False
        selector.register(link, selectors.EVENT_READ, self._ready)

    def say(self, message: FromChild) -> None:
        """Say something to the owner."""
        self._to_say.append(encode(message))
        self._send()

    def heard(self) -> list[tuple[FromOwner, int]]:
        """What it has said, each with a descriptor, or -1."""
        heard, self._heard = self._heard, []
        return heard

    def _ready(self, mask: int, _now_s: float) -> None:
        if mask & selectors.EVENT_WRITE:
            self._send()
        if not mask & selectors.EVENT_READ:
            return
        try:
            for _ in range(_MESSAGES):
                message, fds, _flags, _address = socket.recv_fds(self._link, MESSAGE_BYTES, 1)
                if not message:
                    self.has_gone = True
                    return
                self._heard.append((decode_from_owner(message), fds[0] if fds else -1))
        except BlockingIOError:
            pass
        except OSError:
            self.has_gone = True

    def _send(self) -> None:
        try:
            while self._to_say:
                self._link.send(self._to_say[0])
                self._to_say.popleft()
        except BlockingIOError:
            pass
        except OSError:
            self.has_gone = True
            return
        events = selectors.EVENT_READ | selectors.EVENT_WRITE * bool(self._to_say)
        if self._selector.get_key(self._link).events != events:
            self._selector.modify(self._link, events, self._ready)
