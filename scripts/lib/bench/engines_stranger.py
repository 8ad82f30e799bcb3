"""A stranger: another user on a machine that is no node of the job, who asks a node for a block of the file.

Run as a program: ADDRESS INFO_HASH. It knows no more than these two, and speaks BitTorrent (BEP 3), plainly
and by TLS without a certificate. Prints the first bytes that it got, or nothing. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import sys
import time

PORT, TLS_PORT = 6881, 6882
PATIENCE_S = 15.0
_BLOCK_BYTES = 16384
_NOBODY = 65534
_UNCHOKE, _INTERESTED, _REQUEST, _PIECE = 1, 2, 6, 7


def ask(address: str, info_hash: bytes, tls: bool) -> bytes:
    """The first block of the file, from the node at an address. Raises OSError when the node gives none."""
    with (
        socket.create_connection((address, TLS_PORT if tls else PORT), PATIENCE_S) as plain,
        wrapped(plain, info_hash) if tls else plain as link,
        link.makefile("rb") as reader,
    ):
        link.sendall(b"\x13BitTorrent protocol" + bytes(8) + info_hash + b"-XX0000-stranger0000")
        if len(reader.read(68)) < 68:
            raise OSError("no handshake")
        link.sendall(message(_INTERESTED))
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            size = int.from_bytes(reader.read(4), "big")
            body = reader.read(size)
            if body[:1] == bytes([_UNCHOKE]):
                zeros = (0).to_bytes(4, "big")
                link.sendall(message(_REQUEST, zeros + zeros + _BLOCK_BYTES.to_bytes(4, "big")))
            elif body[:1] == bytes([_PIECE]):
                return body[9:]
    raise OSError("no block")


def wrapped(link: socket.socket, info_hash: bytes) -> ssl.SSLSocket:
    """The connection as a TLS client that trusts anybody and has no certificate; raises OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context.wrap_socket(link, server_hostname=info_hash.hex())


def message(kind: int, payload: bytes = b"") -> bytes:
    """A message of the peer protocol."""
    return (1 + len(payload)).to_bytes(4, "big") + bytes([kind]) + payload


def main() -> None:
    """Ask as nobody."""
    address, info_hash = sys.argv[1:]
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    for tls in (False, True):
        with contextlib.suppress(OSError):
            print(ask(address, bytes.fromhex(info_hash), tls)[:32].hex())
            return


if __name__ == "__main__":
    main()
