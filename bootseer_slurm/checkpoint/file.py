"""Reading a file in parallel: a striped one, whose digests are checked, or any other as it lies.

What is asked for in large pieces is read by several threads straight into the caller's memory. What is asked
for in small ones comes from chunks that are kept, and while it goes forward the next ones are fetched ahead.

Threads: `streams` for each open file, started with the first read; readers may be several.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from bootseer_slurm.checkpoint.chunks import ChunkReader, KeptChunks
from bootseer_slurm.checkpoint.striped import Opened, open_file

STREAMS = 16


# size: most of its methods are those of a binary stream, io.RawIOBase.
class ParallelFile(io.RawIOBase):
    """A file that is open for reading, as a binary stream. `read_at` and `view` are thread-safe."""

    def __init__(self, uri: str, *, streams: int = STREAMS) -> None:
        """uri: a URI or an absolute path. streams: reads at once.

        Raises NotFound, StoreError, or IntegrityError where a stripe is missing or has another size.
        """
        self._open(open_file(uri), uri, streams)

    @classmethod
    def of(cls, opened: Opened, name: str, *, streams: int = STREAMS) -> ParallelFile:
        """As the constructor, of what is open already, which is closed with it."""
        file = cls.__new__(cls)
        file._open(opened, name, streams)
        return file

    def _open(self, opened: Opened, name: str, streams: int) -> None:
        self.name = name
        self.size = opened.layout.size_bytes
        self._opened = opened
        self._chunk_bytes = opened.layout.chunk_bytes
        self._position = 0
        self._pool = ThreadPoolExecutor(streams, "bootseer-read")
        self._reader = ChunkReader(opened, name)
        self._kept = KeptChunks(self._reader, -(-self.size // self._chunk_bytes), self._pool)

    # The stream

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        if base + offset < 0:
            raise ValueError(f"{self.name}: negative position {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        count = self.read_at(self._position, buffer)
        self._position += count
        return count

    def readall(self) -> bytes:
        return self.read(-1)

    def read(self, size: int | None = -1) -> bytes:
        left_bytes = max(0, self.size - self._position)
        wanted = left_bytes if size is None or size < 0 else min(size, left_bytes)
        buffer = bytearray(wanted)
        self.readinto(buffer)
        return bytes(buffer)

    def close(self) -> None:
        if not self.closed:
            self._pool.shutdown(cancel_futures=True)
            self._opened.close()
        super().close()

    # At any place

    def view(self, offset: int = 0, size_bytes: int | None = None) -> memoryview:
        """A range in memory of its own, which nothing copies again. Short only at the end of the file."""
        left_bytes = max(0, self.size - offset)
        buffer = bytearray(left_bytes if size_bytes is None else min(size_bytes, left_bytes))
        self.read_at(offset, buffer)
        return memoryview(buffer)

    def read_at(self, offset: int, buffer: Any) -> int:
        """Fill a buffer from `offset` on; gives the bytes, short only at the end of the file.

        Raises StoreError, or IntegrityError where bytes are not those that were written.
        """
        if self.closed:
            raise ValueError("read of a closed file")
        view = memoryview(buffer).cast("B")
        view = view[: max(0, self.size - offset)]
        chunk_bytes = self._chunk_bytes
        direct: list[Future[None]] = []
        done = 0
        try:
            while done < len(view):
                chunk, within = divmod(offset + done, chunk_bytes)
                count = min(chunk_bytes - within, len(view) - done)
                part = view[done : done + count]
                if count == self._reader.size_of(chunk) and not self._kept.has(chunk):
                    direct.append(self._pool.submit(self._reader.read, chunk, part))
                else:
                    part[:] = self._kept.get(chunk)[within : within + count]
                done += count
        finally:
            self._kept.go_on((offset + done) // chunk_bytes)
            wait(direct)  # all, for they write to the caller's memory
        for future in direct:
            future.result()
        return done

    def read_ranges(self, ranges: Iterable[tuple[int, Any]]) -> None:
        """Fill several buffers, each from an offset of its own, all at once; a chunk is read once for all.

        A chunk that is one buffer's goes straight into it. Raises ValueError of a range that goes beyond the
        end, and as `read_at`; buffers may then be half filled.
        """
        if self.closed:
            raise ValueError("read of a closed file")
        chunk_bytes = self._chunk_bytes
        parts: dict[int, list[tuple[int, memoryview]]] = {}  # by chunk: where in it, and what is filled
        for offset, buffer in ranges:
            view = memoryview(buffer).cast("B")
            if not 0 <= offset <= self.size - len(view):
                raise ValueError(f"{self.name}: has no bytes {offset} to {offset + len(view)}")
            done = 0
            while done < len(view):
                chunk, within = divmod(offset + done, chunk_bytes)
                count = min(chunk_bytes - within, len(view) - done)
                parts.setdefault(chunk, []).append((within, view[done : done + count]))
                done += count
        futures = [self._pool.submit(self._reader.read_parts, chunk, each) for chunk, each in parts.items()]
        wait(futures)  # all, for they write to the caller's memory
        for future in futures:
            future.result()

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            with contextlib.suppress(Exception):
                self.close()
