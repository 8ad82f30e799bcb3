"""Digests of blocks: which there are, and how they are made. Only `Layout.wrong_blocks` compares them.

    sha256    Python's own; of all manifests that name none
    blake3    of the package of that name, at less than half of sha256's cost (docs/bench-digest.md)

A digest protects from a store whose bytes somebody changed on purpose. So only functions serve for which
nobody can make collisions; xxh3, crc32 and their like never do. Each digest has 32 bytes. Those of a blob
lie one after the other, one for each block, and zeros stand where none is known yet. Both functions let go
of the interpreter's lock while they work. Does no I/O. Thread-safe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from mmap import mmap
from typing import TypeAlias

from bootseer_slurm.errors import IntegrityError

Bytes: TypeAlias = bytes | bytearray | memoryview | mmap

DIGEST_BYTES = 32
NO_DIGEST = bytes(DIGEST_BYTES)
SHA256 = "sha256"
BLAKE3 = "blake3"

_FUNCTIONS: dict[str, Callable[[Bytes], bytes]] = {SHA256: lambda view: hashlib.sha256(view).digest()}
try:
    from blake3 import blake3
except ImportError:  # blobs of sha256 are read and written without it
    pass
else:
    _FUNCTIONS[BLAKE3] = lambda view: blake3(view).digest()

# The digest of new blobs.
PREFERRED = BLAKE3 if BLAKE3 in _FUNCTIONS else SHA256


def check_digest(name: object) -> str:
    """The name of a digest that this process can make.

    Raises IntegrityError for any other: unknown, or of a package that is not installed.
    """
    if name == BLAKE3 and BLAKE3 not in _FUNCTIONS:
        raise IntegrityError(
            "its digests are blake3, and this Python lacks the package blake3",
            hint="pip install 'blake3>=1.0'",
        )
    if not isinstance(name, str) or name not in _FUNCTIONS:
        raise IntegrityError(f"its digests are {str(name)[:40]!r}, which this version does not know")
    return name


def digest_of(name: str, view: Bytes) -> bytes:
    """The digest of one block. name: of `check_digest`."""
    return _FUNCTIONS[name](view)


def digest_slice(block: int) -> slice:
    """The range of a block's digest among the digests of its blob."""
    return slice(block * DIGEST_BYTES, (block + 1) * DIGEST_BYTES)
