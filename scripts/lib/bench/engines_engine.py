"""An engine on a node, and the one that is none: the store by plain HTTP.

Standard library only: it runs with whatever Python has libtorrent's binding.
"""

from __future__ import annotations

import http.client
import os
import socket
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

FIRST_BYTES = 256 * 1024
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Task:
    """What a node has to do, and with what.

    url: the file in the store. torrent: its metainfo, and info_hash, its name. peers: addresses of the store
    and the other nodes. programs: of an engine, by their names. certificates: the folder of the job's, where
    TLS is used. mode: "node", or how the store seeds ("seed", "super").
    """

    engine: str
    address: str
    folder: str
    url: str
    size_bytes: int
    torrent: str = ""
    info_hash: str = ""
    peers: list[str] = field(default_factory=list)
    programs: dict[str, str] = field(default_factory=dict)
    certificates: str = ""
    mode: str = "node"


class Engine:
    """One engine on this node. Its processes are `pids`, and this one where it works in it."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.folder = Path(task.folder)
        self.path = self.folder / Path(urlsplit(task.url).path).name
        self.pids: list[int] = [os.getpid()]
        self.before_s = 0.0

    def start(self) -> None:
        """Start what has to run before a job comes."""

    def quiet(self, offset: int) -> float | None:
        """Seconds until 256 KiB at `offset` are in this process, with nothing else being got."""
        raise NotImplementedError

    def all(self, offset: int, wait_s: float) -> tuple[float, float | None]:
        """When the whole file was there, and how long 256 KiB at `offset`, wanted after wait_s, took."""
        raise NotImplementedError

    def close(self) -> None:
        """End all processes."""

    def cpu_s(self) -> float:
        """CPU time of the engine's processes since it was ready."""
        return sum(map(process_s, self.pids)) - self.before_s


class Direct(Engine):
    """The store by plain HTTP, one connection for all, as curl does."""

    def quiet(self, offset: int) -> float | None:
        start_s = time.monotonic()
        got = get_range(self.task.url, offset, FIRST_BYTES)
        assert len(got) == FIRST_BYTES
        return time.monotonic() - start_s

    def all(self, offset: int, wait_s: float) -> tuple[float, float | None]:
        start_s = time.monotonic()
        done_at: list[float] = []
        thread = threading.Thread(target=lambda: done_at.append(self.stream()))
        thread.start()
        time.sleep(max(0.0, start_s + wait_s - time.monotonic()))
        first_s = self.quiet(offset)
        thread.join()
        return done_at[0], first_s

    def stream(self) -> float:
        """Get the whole file; when it was there."""
        buffer = memoryview(bytearray(2**20))
        link = connect(self.task.url)
        link.connect()
        # The kernel wakes this process for so much at once, else for each packet; and when the server closes.
        link.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, FIRST_BYTES)
        link.request("GET", self.task.url, headers={"Connection": "close"})
        with link.getresponse() as reply, self.path.open("wb") as file:
            while count := reply.readinto(buffer):
                file.write(buffer[:count])
        return time.monotonic()


def connect(url: str) -> http.client.HTTPConnection:
    """A connection to the server of an address."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    return http.client.HTTPConnection(parts.hostname, parts.port, timeout=PATIENCE_S)


def read_range(link: http.client.HTTPConnection, url: str, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a file from `start` on. Raises OSError when the answer is another."""
    link.request("GET", url, headers={"Range": f"bytes={start}-{start + len(view) - 1}"})
    with link.getresponse() as answer:
        if answer.status != 206:
            raise OSError(f"{url}: status {answer.status}: {answer.read(300)!r}")
        while len(view):
            count = answer.readinto(view)
            if not count:
                raise OSError(f"{url}: ended early")
            view = view[count:]


def get_range(url: str, start: int, size: int) -> bytes:
    """A range of a file by HTTP, over a connection of its own. Raises OSError."""
    buffer = bytearray(size)
    link = connect(url)
    try:
        read_range(link, url, start, memoryview(buffer))
    finally:
        link.close()
    return bytes(buffer)


def process_s(pid: int) -> float:
    """CPU seconds of a process; 0 when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")
