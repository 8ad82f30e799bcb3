"""The stripe objects of a blob, read as the one sequence of bytes that they are."""

from __future__ import annotations

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.store import ObjectReader


class Stripes:
    """A blob's objects as one ObjectReader, which does not own them."""

    def __init__(self, layout: Layout, readers: list[ObjectReader]) -> None:
        self.size_bytes = layout.size_bytes
        self._layout = layout
        self._readers = readers

    def read_into(self, offset: int, view: memoryview) -> int:
        view = view[: max(0, self.size_bytes - offset)]
        done = 0
        while done < len(view):
            left_bytes = self._layout.chunk_bytes - (offset + done) % self._layout.chunk_bytes
            extent = self._layout.extent(offset + done, min(left_bytes, len(view) - done))
            part = view[done : done + extent.size_bytes]
            count = self._readers[extent.object].read_into(extent.offset, part)
            done += count
            if count < len(part):
                break
        return done

    def close(self) -> None: ...
