"""The chunks of a file that is read in parallel: read with their digests checked, and kept for small reads.

Threads: those of the pool that is given; callers may be several.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future, ThreadPoolExecutor

from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from bootseer_slurm.checkpoint.striped import Opened
from bootseer_slurm.errors import IntegrityError, StoreError

_ATTEMPTS = 3
_KEPT_CHUNKS = 32  # 128 MiB
_AHEAD_CHUNKS = 16


class ChunkReader:
    """Reads chunks of one file. Thread-safe."""

    def __init__(self, opened: Opened, name: str) -> None:
        """name: for messages."""
        self._opened = opened
        self._layout = opened.layout
        self._name = name

    def size_of(self, chunk: int) -> int:
        """Bytes of a chunk: all are alike but the last."""
        return min(self._layout.chunk_bytes, self._layout.size_bytes - chunk * self._layout.chunk_bytes)

    def read(self, chunk: int, view: memoryview, within: int = 0) -> None:
        """Fill `view` with blocks of a chunk, from the offset `within` on.

        Reads again where that fails or bytes are wrong: a replica may be. Raises StoreError, IntegrityError.
        """
        retrying = Retrying(
            retry=retry_if_exception_type((StoreError, IntegrityError)),
            stop=stop_after_attempt(_ATTEMPTS),
            wait=wait_exponential(multiplier=0.1, max=2),
            reraise=True,
        )
        retrying(self._read_once, chunk * self._layout.chunk_bytes + within, view)

    def read_parts(self, chunk: int, parts: list[tuple[int, memoryview]]) -> None:
        """Fill several views, each from its offset in the chunk, with one read of the blocks they lie in."""
        if len(parts) == 1 and len(parts[0][1]) == self.size_of(chunk):
            self.read(chunk, parts[0][1])
            return
        block_bytes = self._layout.block_bytes
        first = min(within for within, _ in parts) // block_bytes * block_bytes
        end = max(within + len(view) for within, view in parts)
        end = min(-(-end // block_bytes) * block_bytes, self.size_of(chunk))
        blocks = memoryview(bytearray(end - first))
        self.read(chunk, blocks, first)
        for within, view in parts:
            view[:] = blocks[within - first : within - first + len(view)]

    def _read_once(self, offset: int, view: memoryview) -> None:
        extent = self._layout.extent(offset, len(view))
        count = self._opened.objects[extent.object].read_into(extent.offset, view)
        if count < len(view):
            raise IntegrityError(f"{self._name}: stripe {extent.object} ended before it should")
        manifest = self._opened.manifest
        if manifest is None:
            return
        first = offset // self._layout.block_bytes
        blocks = range(first, first - (-len(view) // self._layout.block_bytes))
        for block in manifest.wrong_blocks(blocks, view):
            raise IntegrityError(f"{self._name}: block {block} is not what was written")


class KeptChunks:
    """The chunks that small reads came to, and those behind them while reads go forward. Thread-safe."""

    def __init__(self, reader: ChunkReader, count: int, pool: ThreadPoolExecutor) -> None:
        """count: the chunks of the file. pool: what reads them."""
        self._reader = reader
        self._count = count
        self._pool = pool
        self._chunks: OrderedDict[int, Future[memoryview]] = OrderedDict()
        self._next = 0  # where a reader that goes forward is next
        self._lock = threading.Lock()

    def has(self, chunk: int) -> bool:
        """Whether a chunk is kept, or on its way."""
        with self._lock:
            return chunk in self._chunks

    def go_on(self, chunk: int) -> None:
        """A read ended in this chunk."""
        self._next = chunk

    def get(self, chunk: int) -> memoryview:
        """A whole chunk; where reads go forward, the next ones are asked for too.

        Raises what ChunkReader.read does.
        """
        with self._lock:
            is_forward = chunk in (self._next, self._next + 1)
            last = min(self._count - 1, chunk + (_AHEAD_CHUNKS if is_forward else 0))
            for each in range(chunk, last + 1):
                if each not in self._chunks:
                    self._chunks[each] = self._pool.submit(self._new, each)
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

    def _new(self, chunk: int) -> memoryview:
        view = memoryview(bytearray(self._reader.size_of(chunk)))
        self._reader.read(chunk, view)
        return view
