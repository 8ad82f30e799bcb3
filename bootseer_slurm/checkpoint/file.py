"""Reading a file in parallel: a striped one, whose digests are checked, or any other as it lies.

What is asked for in large pieces is read by several threads straight into the caller's memory. What is asked
for in small ones comes from chunks that are kept, and while it goes forward the next ones are fetched ahead.

Threads: `streams` for each open file, started with the first read; readers may be several.
"""

from __future__ import annotations

import contextlib
import io
import os
import threading
from collections import OrderedDict
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from bootseer_slurm.checkpoint.striped import Opened, open_file
from bootseer_slurm.errors import IntegrityError, StoreError

STREAMS = 16
_ATTEMPTS = 3
_KEPT_CHUNKS = 32  # 128 MiB
_AHEAD_CHUNKS = 16


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
        self._layout = opened.layout
        self._position = 0
        self._pool = ThreadPoolExecutor(streams, "bootseer-read")
        self._chunks: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._lock = threading.Lock()
        self._next_chunk = 0  # where a reader that goes forward is next

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
        chunk_bytes = self._layout.chunk_bytes
        direct: list[Future[None]] = []
        done = 0
        try:
            while done < len(view):
                chunk, within = divmod(offset + done, chunk_bytes)
                count = min(chunk_bytes - within, len(view) - done)
                part = view[done : done + count]
                if count == self._chunk_size(chunk) and not self._is_kept(chunk):
                    direct.append(self._pool.submit(self._read_chunk, chunk, part))
                else:
                    part[:] = self._kept(chunk)[within : within + count]
                done += count
        finally:
            self._next_chunk = (offset + done) // chunk_bytes
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
        chunk_bytes = self._layout.chunk_bytes
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
        futures = [self._pool.submit(self._read_parts, chunk, each) for chunk, each in parts.items()]
        wait(futures)  # all, for they write to the caller's memory
        for future in futures:
            future.result()

    def _read_parts(self, chunk: int, parts: list[tuple[int, memoryview]]) -> None:
        """Read the blocks of a chunk that the parts lie in."""
        if len(parts) == 1 and len(parts[0][1]) == self._chunk_size(chunk):
            self._read_chunk(chunk, parts[0][1])
            return
        block_bytes = self._layout.block_bytes
        first = min(within for within, _ in parts) // block_bytes * block_bytes
        end = max(within + len(view) for within, view in parts)
        end = min(-(-end // block_bytes) * block_bytes, self._chunk_size(chunk))
        blocks = memoryview(bytearray(end - first))
        self._read_chunk(chunk, blocks, first)
        for within, view in parts:
            view[:] = blocks[within - first : within - first + len(view)]

    def _chunk_size(self, chunk: int) -> int:
        return min(self._layout.chunk_bytes, self.size - chunk * self._layout.chunk_bytes)

    def _is_kept(self, chunk: int) -> bool:
        with self._lock:
            return chunk in self._chunks

    def _kept(self, chunk: int) -> memoryview:
        """A whole chunk; where reads go forward, the next ones are asked for too."""
        with self._lock:
            forward = chunk in (self._next_chunk, self._next_chunk + 1)
            last = -(-self.size // self._layout.chunk_bytes) - 1
            for each in range(chunk, min(last, chunk + (_AHEAD_CHUNKS if forward else 0)) + 1):
                if each not in self._chunks:
                    self._chunks[each] = self._pool.submit(self._new_chunk, each)
                if each == chunk:
                    self._chunks.move_to_end(each)
            future = self._chunks[chunk]
            while len(self._chunks) > _KEPT_CHUNKS:
                self._chunks.popitem(last=False)  # who waits for it has it still
        try:
            return future.result()
        except BaseException:
            with self._lock:
                if self._chunks.get(chunk) is future:
                    del self._chunks[chunk]  # the next read tries again
            raise

    def _new_chunk(self, chunk: int) -> memoryview:
        view = memoryview(bytearray(self._chunk_size(chunk)))
        self._read_chunk(chunk, view)
        return view

    def _read_chunk(self, chunk: int, view: memoryview, within: int = 0) -> None:
        """Read blocks of a chunk; once more where it fails, or its bytes are wrong: a replica may be."""
        retrying = Retrying(
            retry=retry_if_exception_type((StoreError, IntegrityError)),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=0.1, max=2),
            reraise=True,
        )
        retrying(self._read_once, chunk * self._layout.chunk_bytes + within, view)

    def _read_once(self, offset: int, view: memoryview) -> None:
        extent = self._layout.extent(offset, len(view))
        count = self._opened.objects[extent.object].read_into(extent.offset, view)
        if count < len(view):
            raise IntegrityError(f"{self.name}: stripe {extent.object} ended before it should")
        manifest = self._opened.manifest
        if manifest is None:
            return
        first = offset // self._layout.block_bytes
        blocks = range(first, first - (-len(view) // self._layout.block_bytes))
        for block in manifest.wrong_blocks(blocks, view):
            raise IntegrityError(f"{self.name}: block {block} is not what was written")

    def __del__(self) -> None:
        if hasattr(self, "_pool"):
            with contextlib.suppress(Exception):
                self.close()
