"""The key of a job's peers, and how both ends of a connection prove that they have it.

The key comes from the site's key, alike on every node: no message carries it. It is of one job, one restart
and one user, so a peer of another job proves nothing here. The end that connects speaks first:

    HELLO: version, its node, its nonce        →
                                               ←  nonce, HMAC(key, LISTENS, nodes, nonces, place)
    HMAC(key, CONNECTS, nodes, nonces, place)  →

Each end adds a nonce, so what was said on one connection proves nothing on the next. The side is under the
HMAC, so a proof cannot be sent back to its maker. The place is the address and port that was connected to, as
each end sees it: who listens elsewhere and passes everything on, on a port that he took first say, proves
nothing. Pure: nonces are given.
"""

from __future__ import annotations

import hashlib
import hmac
import struct

KEY_BYTES = NONCE_BYTES = PROOF_BYTES = 32
_HELLO = struct.Struct("!8sI32s")  # version, node, nonce
HELLO_BYTES = _HELLO.size
REPLY_BYTES = NONCE_BYTES + PROOF_BYTES
_VERSION = b"bspeers1"
_CONNECTS, _LISTENS = b"connects", b"listens "


# Address and port of the listening end.
Place = tuple[str, int]


class NoProof(Exception):
    """The other end has not shown that it has the key."""


def job_key(site_key: bytes, *, job: int, restart: int, uid: int) -> bytes:
    """The key of the peers of one start of a job, which is its user's: KEY_BYTES bytes."""
    said = f"bootseer peers 1, job {job}, restart {restart}, uid {uid}"
    return hmac.digest(site_key, said.encode(), hashlib.sha256)


class Connects:
    """The proof of the end that connects."""

    def __init__(self, key: bytes, *, node: int, to: int, nonce: bytes) -> None:
        """node: this one. to: the one that it means to reach. nonce: NONCE_BYTES random ones, used once."""
        self._key = key
        self._nodes = node, to
        self._nonce = nonce
        self.hello = _HELLO.pack(_VERSION, node, nonce)

    def prove(self, reply: bytes, place: Place) -> bytes:
        """This end's proof, once the other end's is right. Raises NoProof."""
        nonces = self._nonce + reply[:NONCE_BYTES]
        if not hmac.compare_digest(
            reply[NONCE_BYTES:], _proof(self._key, _LISTENS, self._nodes, nonces, place)
        ):
            raise NoProof("it listens, and is no peer of this job")
        return _proof(self._key, _CONNECTS, self._nodes, nonces, place)


class Listens:
    """The proof of the end that listens."""

    def __init__(
        self, key: bytes, *, node: int, nodes: int, nonce: bytes, hello: bytes, place: Place
    ) -> None:
        """node: this one of so many. nonce: as of Connects. Raises NoProof."""
        if len(hello) != HELLO_BYTES:
            raise NoProof("no hello")
        version, self.other, their_nonce = _HELLO.unpack(hello)
        if version != _VERSION or self.other >= nodes or self.other == node:
            raise NoProof("no hello of another node of this job")
        pair, nonces = (self.other, node), their_nonce + nonce
        self.reply = nonce + _proof(key, _LISTENS, pair, nonces, place)
        self._expected = _proof(key, _CONNECTS, pair, nonces, place)

    def check(self, proof: bytes) -> None:
        """Raises NoProof unless the other end has the key."""
        if not hmac.compare_digest(proof, self._expected):
            raise NoProof("it connected, and is no peer of this job")


def _proof(key: bytes, side: bytes, nodes: tuple[int, int], nonces: bytes, place: Place) -> bytes:
    """nodes: the one that connects, and the one that listens. nonces: in the same order."""
    address, port = place
    address = address.partition("%")[0]  # an interface is named otherwise at each end
    said = side + struct.pack("!II", *nodes) + nonces + f"{address} {port}".encode()
    return hmac.digest(key, said, hashlib.sha256)
