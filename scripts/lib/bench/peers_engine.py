"""Our peers as an engine of `scripts/bench peers`: an owner as the agent is one, and its peer process.

The owner reads ranges of the store by plain HTTP, over a connection for each thread, compares the BLAKE3
digest of each block, and writes the file.
"""

from __future__ import annotations

import hashlib
import http.client
import threading
import time

from bootseer_slurm.blob.manifest import CHUNK_BYTES
from scripts.lib.bench.engines_engine import PATIENCE_S, Engine, connect, get_range, read_range
from scripts.lib.bench.peers_owner import File, Owner, Site


class Peers(Engine):
    """One node. The addresses of a task are those of the store and of the other nodes."""

    def start(self) -> None:
        self._local = threading.local()
        nodes = sorted(
            [*self.task.peers[1:], self.task.address], key=lambda each: int(each.rpartition(".")[2])
        )
        size_bytes = self.task.size_bytes
        digests = get_range(f"{self.task.url}.digests", 0, size_bytes // 2**18 * 32)
        file = File(hashlib.sha256(digests).hexdigest(), size_bytes, digests)
        site = Site(nodes)
        self._owner = Owner(site, nodes.index(self.task.address), file, self.path, self._read)
        self.pids.append(self._owner.process.pid)
        self._chunks = range(file.chunks)
        while self._owner.port is None:
            time.sleep(0.01)

    def quiet(self, offset: int) -> float | None:
        start_s = time.monotonic()
        return self._demand(offset) - start_s

    def all(self, offset: int, wait_s: float) -> tuple[float, float | None]:
        start_s = time.monotonic()
        self._owner.want(self._chunks)
        time.sleep(max(0.0, start_s + wait_s - time.monotonic()))
        first_s = self._demand(offset) - start_s - wait_s
        done_s = self._owner.wait(self._chunks, PATIENCE_S)
        if done_s is None:
            raise OSError(f"{len(self._owner.here)} chunks came, of {len(self._chunks)}")
        return done_s, first_s

    def close(self) -> None:
        self._owner.close()

    def _demand(self, offset: int) -> float:
        chunk = offset // CHUNK_BYTES
        self._owner.want([chunk], demand=True)
        there_s = self._owner.wait([chunk], PATIENCE_S)
        if there_s is None:
            raise OSError(f"chunk {chunk} did not come")
        return there_s

    def _read(self, chunk: int, view: memoryview) -> None:
        link = getattr(self._local, "link", None)
        if link is None:
            link = self._local.link = connect(self.task.url)
        try:
            read_range(link, self.task.url, chunk * CHUNK_BYTES, view)
        except http.client.HTTPException as error:
            raise OSError(str(error)) from error
