"""The stripe objects of a blob, read as the one sequence of bytes that they are."""

from __future__ import annotations

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.errors import IntegrityError, NotFound
from bootseer_slurm.store import ObjectReader, Store


def open_stripes(store: Store, folder: str, layout: Layout) -> list[ObjectReader]:
    """Open all objects that lie in a folder of the store; the caller closes them.

    Raises NotFound where one is missing, IntegrityError where one is not whole, StoreError.
    """
    readers: list[ObjectReader] = []
    try:
        for index in range(layout.objects):
            reader = store.open(f"{folder}/{index}", bulk=True)
            readers.append(reader)
            if reader.size_bytes != layout.object_size(index):
                raise IntegrityError(f"{folder}: stripe {index} is of {reader.size_bytes} bytes: not whole")
    except BaseException as error:
        for each in readers:
            each.close()
        if isinstance(error, NotFound):
            raise NotFound(f"{folder}: stripe {len(readers)} is missing") from error
        raise
    return readers


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
