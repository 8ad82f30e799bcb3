"""The blobs of the job on this node: which chunks are in their data files, and which are wanted."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from bootseer_slurm.peers.child.links import Part
from bootseer_slurm.peers.groups import Chunk
from bootseer_slurm.peers.local import OpenBlob
from bootseer_slurm.peers.uploads import Held
from bootseer_slurm.peers.wire import MOST_DATA_BYTES


class DataFile:
    """A blob's data file. Each frame that is to be sent of it holds it too; the last one that does closes it.

    So no frame reads from a descriptor that was closed, or that is another file's by now.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __del__(self) -> None:
        os.close(self._fd)

    def fileno(self) -> int:
        """Its descriptor."""
        return self._fd


@dataclass(slots=True)
class Blob:
    """One blob. order: the owner's. wanted: chunks that are not here."""

    order: OpenBlob
    file: DataFile
    here: set[int]
    wanted: set[int] = field(default_factory=set)

    def has(self, number: int) -> bool:
        """Whether it has so many chunks that one has this number."""
        return 0 <= number * self.order.chunk_bytes < self.order.size_bytes


class Blobs:
    """All that the owner has opened."""

    def __init__(self) -> None:
        self._by_number: dict[int, Blob] = {}
        self._by_name: dict[str, Blob] = {}

    def open(self, order: OpenBlob, fd: int) -> list[Chunk]:
        """Have a blob known; gives the chunks that are here."""
        bits = int.from_bytes(order.here, "little")
        count = min(bits.bit_length(), -(-order.size_bytes // order.chunk_bytes))
        here = {number for number in range(count) if bits >> number & 1}
        blob = Blob(order, DataFile(fd), here)
        self._by_number[order.blob] = self._by_name[order.name] = blob
        return [Chunk(order.name, number) for number in sorted(here)]

    def close(self, number: int) -> str | None:
        """What the owner calls so is open no more. Gives its name where no other number has that."""
        blob = self._by_number.pop(number, None)
        if blob is None or self._by_name[blob.order.name] is not blob:
            return None
        del self._by_name[blob.order.name]
        return blob.order.name

    def chunk(self, blob: int, number: int) -> Chunk | None:
        """The chunk that the owner calls so. None: its blob is not open, or has no such chunk."""
        known = self._by_number.get(blob)
        return Chunk(known.order.name, number) if known is not None and known.has(number) else None

    def may_be(self, chunk: Chunk) -> bool:
        """Whether there is such a chunk, as far as this node knows: others open blobs before it does."""
        blob = self._by_name.get(chunk.blob)
        return blob is None or blob.has(chunk.number)

    def of(self, chunk: Chunk) -> Blob:
        """The one that a chunk of this node is of."""
        return self._by_name[chunk.blob]

    def held(self, chunk: Chunk) -> Held:
        """How much of a chunk is here, which another node asks for."""
        blob = self._by_name.get(chunk.blob)
        if blob is not None and chunk.number in blob.here:
            return Held.HERE
        return Held.COMING if blob is not None and chunk.number in blob.wanted else Held.LACKS

    @property
    def wants(self) -> bool:
        """Whether something is wanted that is not here."""
        return any(blob.wanted for blob in self._by_name.values())

    def size_of(self, chunk: Chunk) -> int:
        """Bytes of a chunk of this node."""
        order = self.of(chunk).order
        return min(order.chunk_bytes, order.size_bytes - chunk.number * order.chunk_bytes)

    def parts(self, chunk: Chunk) -> Iterator[Part]:
        """A chunk that is here, in parts that a frame takes (links.Part)."""
        blob, size_bytes = self.of(chunk), self.size_of(chunk)
        begin = chunk.number * blob.order.chunk_bytes
        for offset in range(0, size_bytes, MOST_DATA_BYTES):
            part_bytes = min(MOST_DATA_BYTES, size_bytes - offset)
            yield chunk, offset, blob.file, begin + offset, part_bytes
