"""A connection of two nodes until both ends have proven that they are peers (key.py). Never blocks."""

from __future__ import annotations

import os
import socket

from bootseer_slurm.peers.key import (
    HELLO_BYTES,
    NONCE_BYTES,
    PROOF_BYTES,
    REPLY_BYTES,
    Connects,
    Listens,
    NoProof,
)
from bootseer_slurm.peers.local import Order
from bootseer_slurm.peers.wire import unacknowledged_bytes

HELLO_S = 0.25
TAKEN_S = 0.5  # where the far kernel has taken the hello, and the process has not had its turn


class Handshake:
    """One end. `step` is called whenever the socket is ready, until it says that both ends have proven it."""

    def __init__(self, link: socket.socket, until_s: float) -> None:
        self.link = link
        self.until_s = until_s
        self.is_connecting = False
        self._heard = b""

    def fileno(self) -> int:
        return self.link.fileno()

    def step(self) -> bool:
        """Go on; gives whether the other end is a peer. Else raises NoProof, OSError, EOFError."""
        raise NotImplementedError

    def _hear(self, size_bytes: int) -> bytes | None:
        """So many bytes, and none beyond; None while some are to come."""
        try:
            came = self.link.recv(size_bytes - len(self._heard))
        except BlockingIOError:
            return None
        if not came:
            raise EOFError
        self._heard += came
        if len(self._heard) < size_bytes:
            return None
        heard, self._heard = self._heard, b""
        return heard

    def _say(self, said: bytes) -> None:
        """A new socket takes so few bytes at once."""
        if self.link.send(said) != len(said):
            raise NoProof("it takes no hello")


class Dialling(Handshake):
    """The end that connects."""

    def __init__(self, order: Order, node: int, port: int, until_s: float) -> None:
        """node: the one that is meant. Raises OSError."""
        address = order.addresses[node]
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        link = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        super().__init__(link, until_s)
        self.node = node
        self._proof = Connects(order.key, node=order.node, to=node, nonce=os.urandom(NONCE_BYTES))
        self.is_connecting = True
        try:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.connect((address, port))
        except BlockingIOError:
            pass
        except OSError:
            link.close()
            raise

    @property
    def is_taken(self) -> bool:
        """Whether the far kernel has the hello."""
        return not self.is_connecting and not unacknowledged_bytes(self.link)

    def step(self) -> bool:
        if self.is_connecting:
            error = self.link.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
            self.is_connecting = False
            self._say(self._proof.hello)
        reply = self._hear(REPLY_BYTES)
        if reply is None:
            return False
        self._say(self._proof.prove(reply, self.link.getpeername()[:2]))
        return True


class Answering(Handshake):
    """The end that listens."""

    def __init__(self, order: Order, link: socket.socket, until_s: float) -> None:
        super().__init__(link, until_s)
        self._order = order
        self._listens: Listens | None = None

    @property
    def node(self) -> int:
        """The one that says it is the other end."""
        assert self._listens
        other: int = self._listens.other
        return other

    def step(self) -> bool:
        if self._listens is None:
            hello = self._hear(HELLO_BYTES)
            if hello is None:
                return False
            order = self._order
            nonce = os.urandom(NONCE_BYTES)
            self._listens = Listens(
                order.key,
                node=order.node,
                nodes=len(order.addresses),
                nonce=nonce,
                hello=hello,
                place=self.link.getsockname()[:2],
            )
            self._say(self._listens.reply)
        proof = self._hear(PROOF_BYTES)
        if proof is None:
            return False
        self._listens.check(proof)
        return True
