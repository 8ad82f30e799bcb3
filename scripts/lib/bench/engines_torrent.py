"""A BitTorrent metainfo of one file, version 1 of the format, which every engine reads (BEP 3, BEP 19)."""

from __future__ import annotations

import hashlib
from pathlib import Path

PIECE_BYTES = 256 * 1024  # a block of ours


def bencode(value: object) -> bytes:
    """A value of int, bytes, str, list or dict as BEP 3 writes it."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, str):
        value = value.encode()
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    if isinstance(value, list):
        return b"l" + b"".join(map(bencode, value)) + b"e"
    if isinstance(value, dict):
        parts = [bencode(key) + bencode(value[key]) for key in sorted(value)]
        return b"d" + b"".join(parts) + b"e"
    raise TypeError(f"no bencoding of {type(value).__name__}")


def information(path: Path, root_certificate: bytes = b"") -> dict[str, object]:
    """What the metainfo says of a file. Its bencoding's SHA-1 names the file among peers.

    root_certificate: in PEM; peers need a certificate that this one signed (libtorrent's SSL torrents).
    """
    pieces = []
    with path.open("rb") as file:
        while block := file.read(PIECE_BYTES):
            pieces.append(hashlib.sha1(block).digest())
    own = {"ssl-cert": root_certificate} if root_certificate else {}
    return {
        "name": path.name,
        "length": path.stat().st_size,
        "piece length": PIECE_BYTES,
        "pieces": b"".join(pieces),
        **own,
    }


def metainfo(info: dict[str, object], announce: str, web_seed: str = "") -> bytes:
    """The metainfo of a file. announce: the tracker's address. web_seed: the file's address by plain HTTP."""
    return bencode({"announce": announce, "info": info, **({"url-list": web_seed} if web_seed else {})})


def info_hash(info: dict[str, object]) -> str:
    """The name of a file among peers, in hexadecimal digits."""
    return hashlib.sha1(bencode(info)).hexdigest()
