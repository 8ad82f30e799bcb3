"""The manifest: what a blob is.

A manifest file is one line of JSON, then the digest (32 bytes) of every block:

    {"format": "bootseer-blob", "version": 2, "kind": "image", "size_bytes": 104857600, "digest": "blake3",
     "block_bytes": 262144, "chunk_bytes": 4194304, "objects": 4}\\n<digest of block 0><digest of block 1>…

"digest" says which (blob/digest.py). Without it the digests are sha256, and the version is 1: what knows
that version only refuses the others, rather than find every block wrong.
A striped file, which is written again under its name, has a "generation" too: checkpoint/striped.py.

The blob's id is the sha256 of that file, whatever the digests are. So the same bytes with the same layout
have the same id everywhere, and a signature of the id binds the name of the digests too.
Chunk i (chunk_bytes, a whole number of blocks) lies in object i % objects, at (i // objects) * chunk_bytes.
A manifest is hostile until parsed: it comes from a folder that its user may write.

The cache keeps the manifest beside the blocks. An unmanaged file, which is used where it lies, has none. For
it the cache keeps the same line with "format": "bootseer-file", without a kind, and no digests behind it:
these are known only as blocks are read, and lie in a file of their own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from bootseer_slurm.blob.digest import (
    DIGEST_BYTES,
    NO_DIGEST,
    SHA256,
    Bytes,
    check_digest,
    digest_of,
    digest_slice,
)
from bootseer_slurm.errors import IntegrityError

# Of checkpoints, which are read in order.
BLOCK_BYTES = 256 * 1024
# Of images and environments, of which a start reads a little everywhere: of an image that was not laid out
# for it, 64 KiB fetched 7 % for a set of Python imports, 256 KiB 9 %, 1 MiB 15 %.
SQUASHFS_BLOCK_BYTES = 64 * 1024
# What one read of an object asks for at most: long enough to hide 1 ms of latency at 10 Gbit/s.
CHUNK_BYTES = 4 * 2**20
MAX_BLOB_BYTES = 2 * 2**40
MANIFEST_LIMIT_BYTES = MAX_BLOB_BYTES // BLOCK_BYTES * DIGEST_BYTES + 4096
_HEADER_LIMIT_BYTES = 4096
_MAX_OBJECTS = 4096
_GENERATION = re.compile(r"[0-9a-f]{16,64}")
KINDS = ("image", "environment", "checkpoint")


def block_bytes_of(kind: str) -> int:
    """The bytes of a block in a new blob of this kind."""
    return BLOCK_BYTES if kind == "checkpoint" else SQUASHFS_BLOCK_BYTES


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of one object."""

    object: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Layout:
    """How a blob's bytes lie in its objects, in which blocks they are checked, and with which digest."""

    size_bytes: int
    block_bytes: int = BLOCK_BYTES
    chunk_bytes: int = CHUNK_BYTES
    objects: int = 1
    digest: str = SHA256

    @property
    def blocks(self) -> int:
        return -(-self.size_bytes // self.block_bytes)

    def block_size(self, block: int) -> int:
        """Bytes of a block: all are alike but the last."""
        return min(self.block_bytes, self.size_bytes - block * self.block_bytes)

    def extent(self, offset: int, size_bytes: int) -> Extent:
        """Where a range lies that does not cross a chunk's end."""
        chunk, within = divmod(offset, self.chunk_bytes)
        return Extent(chunk % self.objects, chunk // self.objects * self.chunk_bytes + within, size_bytes)

    def object_size(self, index: int) -> int:
        """Bytes of one object when it is whole."""
        chunks, rest = divmod(self.size_bytes, self.chunk_bytes)
        size_bytes = (chunks // self.objects + (index < chunks % self.objects)) * self.chunk_bytes
        return size_bytes + (rest if chunks % self.objects == index else 0)

    def digests_of(self, chunk: memoryview) -> bytes:
        """The digests of blocks that lie one after the other, in the same order."""
        starts = range(0, len(chunk), self.block_bytes)
        return b"".join(digest_of(self.digest, chunk[start : start + self.block_bytes]) for start in starts)

    def wrong_blocks(self, digests: Bytes, blocks: range, view: Bytes) -> Iterator[int]:
        """Those of some blocks whose bytes do not have their digest, or of which none is known.

        digests: of all blocks of the blob. view: the bytes of `blocks`; one that it lacks is wrong.
        """
        start = 0
        for block in blocks:
            expected = digests[digest_slice(block)]
            end = start + self.block_bytes
            if expected == NO_DIGEST or digest_of(self.digest, view[start:end]) != expected:
                yield block
            start = end


@dataclass(frozen=True, slots=True)
class Manifest:
    """A blob: its kind, its layout and the digest of each block. generation: of a striped file."""

    kind: str
    layout: Layout
    digests: bytes
    generation: str = ""

    def digest(self, block: int) -> bytes:
        return self.digests[digest_slice(block)]

    def agrees(self, block: int, view: Bytes) -> bool:
        """Whether these are the bytes of a block."""
        return not any(True for _ in self.wrong_blocks(range(block, block + 1), view))

    def wrong_blocks(self, blocks: range, view: Bytes) -> Iterator[int]:
        """Those of some blocks of which these are not the bytes (Layout.wrong_blocks)."""
        return self.layout.wrong_blocks(self.digests, blocks, view)

    def encode(self) -> bytes:
        header = {"format": "bootseer-blob", "kind": self.kind, **_header(self.layout)}
        if self.generation:
            header["generation"] = self.generation
        return json.dumps(header, sort_keys=True).encode() + b"\n" + self.digests

    @property
    def id(self) -> str:
        """The sha256 of the manifest, in hexadecimal; the same for each generation of the same bytes."""
        return hashlib.sha256(replace(self, generation="").encode()).hexdigest()


def decode(content: bytes) -> Manifest:
    """The manifest in a manifest file's bytes.

    Raises IntegrityError when it is not one, is not whole, or has digests that this process cannot make.
    """
    with _as_integrity_error():
        header, digests = _split(content, "bootseer-blob")
        layout = _layout(header)
        if header["kind"] not in KINDS:
            raise ValueError("unknown kind")
        if len(digests) != layout.blocks * DIGEST_BYTES:
            raise ValueError("it does not hold one digest per block")
        generation = header.get("generation", "")
        if not isinstance(generation, str) or (generation and not _GENERATION.fullmatch(generation)):
            raise ValueError("its generation is not one")
    return Manifest(header["kind"], layout, digests, generation)


def manifest_of(blob_id: str, layout: Layout, digests: bytes) -> Manifest:
    """The manifest that has this id. Raises IntegrityError when no kind of blob gives it."""
    for kind in KINDS:
        manifest = Manifest(kind, layout, digests)
        if manifest.id == blob_id:
            return manifest
    raise IntegrityError(f"blob {blob_id[:16]}: these digests are another blob's")


def encode_unmanaged(layout: Layout) -> bytes:
    """The line that the cache keeps in a manifest's place for an unmanaged file."""
    header = {"format": "bootseer-file", **_header(layout)}
    return json.dumps(header, sort_keys=True).encode() + b"\n"


def decode_unmanaged(content: bytes) -> Layout:
    """The layout in such a file. Raises IntegrityError, as `decode`."""
    with _as_integrity_error():
        header, rest = _split(content, "bootseer-file")
        if rest:
            raise ValueError("something follows its line")
        return _layout(header)


@contextlib.contextmanager
def _as_integrity_error() -> Iterator[None]:
    try:
        yield
    except IntegrityError as error:
        raise IntegrityError(f"manifest cannot be used: {error.message}", hint=error.hint) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"manifest cannot be used: {error}") from error


def _split(content: bytes, format_: str) -> tuple[Any, bytes]:
    """The line, parsed, and what follows it."""
    end = content.find(b"\n", 0, _HEADER_LIMIT_BYTES)
    if end < 0:
        raise ValueError("its first line does not end")
    header: Any = json.loads(content[:end])
    if header["format"] != format_ or header["version"] not in (1, 2):
        raise ValueError("not a manifest of version 1 or 2")
    return header, content[end + 1 :]


def _header(layout: Layout) -> dict[str, object]:
    """The fields of a line that describe a layout, and the version that this takes."""
    header = {"version": 1 if layout.digest == SHA256 else 2, **asdict(layout)}
    if layout.digest == SHA256:
        del header["digest"]  # as it was when there was no other: the ids of old blobs hold
    return header


def _layout(header: Any) -> Layout:
    digest = check_digest(header.get("digest", SHA256))
    if header["version"] != (1 if digest == SHA256 else 2):
        raise ValueError("its digest is not one of its version")
    numbers = {key: header[key] for key in ("size_bytes", "block_bytes", "chunk_bytes", "objects")}
    if any(type(number) is not int or number < 0 for number in numbers.values()):
        raise ValueError("a size is not a natural number")
    layout = Layout(**numbers, digest=digest)
    if layout.block_bytes not in (2**n for n in range(12, 25)) or layout.chunk_bytes % layout.block_bytes:
        raise ValueError("block and chunk sizes do not fit each other")
    if not layout.block_bytes <= layout.chunk_bytes <= CHUNK_BYTES or not 1 <= layout.objects <= _MAX_OBJECTS:
        raise ValueError("chunk size or number of objects out of range")
    return layout
