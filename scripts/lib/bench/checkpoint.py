"""Reading a checkpoint: striped over HDFS with limited links, and as it lies on a local disk.

Needs no Slurm. One file of random bytes; on HDFS once as it lies and once striped, one replica each. What is
read is compared once, before anything is timed. Arms are interleaved, each with a client of its own; HDFS's
blocks are in the memory of its DataNodes' host, so that links and processors are measured, and no disk.
"""

from __future__ import annotations

import mmap
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median

from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.stripe import stripe_file
from bootseer_slurm.checkpoint.striped import Opened, open_file, placement
from bootseer_slurm.store import FileReader, open_store
from scripts.lib.bench import checkpoint_load
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner
from scripts.lib.cluster.layout import REPO, ClusterError, Layout, State
from scripts.lib.host import output_of

SIZE_BYTES = 4 * 2**30
REPEATS = 5
DATANODES = 3
LINK = "800mbit"
OBJECTS = 256  # so that each DataNode has a third of them, but for one
RAW_BYTES = 256 * 2**20  # of each link, to measure what it carries
RANGE_BYTES = 8 * 2**20
THREADS = 16
FOLDER = Path("/var/tmp/bootseer-bench-checkpoint")
HDFS_FOLDER = "/var/tmp/bootseer-hdfs-bench"
PORT = 9999
SEND = f"""
import socket
server = socket.create_server(("", {PORT}))
while True:
    link, _ = server.accept()
    piece = bytes(2**20)
    try:
        for _ in range({RAW_BYTES} // len(piece)):
            link.sendall(piece)
    except OSError:
        pass
    link.close()
"""

Times = dict[str, list[float]]


def run(only: str = "") -> list[Row]:
    """All rows. only: "disk", "node" or "hdfs", where not all of these are to be measured."""
    with spinner("inputs") as step:
        rows = checkpoint_load.run_node(step) if only in ("", "node") else []
        if only == "node":
            return rows
        FOLDER.mkdir(exist_ok=True)
        source = FOLDER / "model.bin"
        try:
            make(source)
            if only in ("", "disk"):
                rows += local_rows(source, step)
            if only in ("", "hdfs"):
                step("HDFS")
                hdfs("up", "--datanodes", str(DATANODES))
                rows += hdfs_rows(source, step)
            return rows
        finally:
            hdfs("down")
            source.unlink(missing_ok=True)
            FOLDER.rmdir()


def hdfs(*arguments: str) -> str:
    """Run scripts/hdfs. Raises ClusterError."""
    environ = os.environ | {"BOOTSEER_HDFS_DIR": HDFS_FOLDER}
    return output_of(str(REPO / "scripts" / "hdfs"), *arguments, env=environ)


def make(source: Path) -> None:
    """The file; an old time, for a young one would be waited for."""
    with source.open("wb") as file:
        for _ in range(SIZE_BYTES // 2**26):
            file.write(os.urandom(2**26))
        os.fsync(file.fileno())
    os.utime(source, (1_700_000_000, 1_700_000_000))


def timed(times: Times, name: str, work: Callable[[], object]) -> None:
    begin_s = time.monotonic()
    work()
    times.setdefault(name, []).append(time.monotonic() - begin_s)


def local_rows(source: Path, step: Callable[[str], None]) -> list[Row]:
    """As it lies on the disk, cold, beside parallel preads of the same ranges."""
    buffer = memoryview(mmap.mmap(-1, SIZE_BYTES))
    times: Times = {}
    for number in range(REPEATS):
        for name, work in (
            ("pread", lambda: pread_all(source, buffer, direct=False)),
            ("pread past the cache", lambda: pread_all(source, buffer, direct=True)),
            ("ours", lambda: read_all(open_file(str(source)), buffer)),
        ):
            step(f"disk, {name}, {number + 1} of {REPEATS}")
            Path("/proc/sys/vm/drop_caches").write_text("3")
            timed(times, name, work)
    best_s = min(median(times["pread"]), median(times["pread past the cache"]))
    how = f"{SIZE_BYTES / 2**30:.0f} GiB on the local disk, no page cached, {THREADS} threads; "
    how += f"medians of {REPEATS}"
    ratio = best_s / median(times["ours"])
    rows = [Row("disk: ours, against the better of two parallel preads", ratio, "×", 0.95, 1.0, how, True)]
    return rows + [rate_row(f"disk: {name}", each, None, how) for name, each in times.items()]


def pread_all(source: Path, buffer: memoryview, *, direct: bool) -> None:
    reader = FileReader(source, bulk=direct)

    def read(offset: int) -> None:
        reader.read_into(offset, buffer[offset : offset + RANGE_BYTES])

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(read, range(0, SIZE_BYTES, RANGE_BYTES)))
    reader.close()


def read_all(opened: Opened, buffer: memoryview) -> None:
    with ParallelFile.of(opened, "model", streams=THREADS) as file:
        if file.read_at(0, buffer) != SIZE_BYTES:
            raise ClusterError("the file was not read whole")


def hdfs_rows(source: Path, step: Callable[[str], None]) -> list[Row]:
    """Striped, beside one plain stream, and what the links carry."""
    base = hdfs("uri")
    plain, striped = f"{base}/plain.bin", f"{base}/striped.bin"
    step("writing plain")
    with open_store(base).writer("plain.bin") as out, source.open("rb") as content:
        while piece := content.read(2**24):
            out.write(piece)
    step("writing striped")
    stripe_file(source, striped, objects=OBJECTS)
    fullest = max((placement(striped) or {"?": SIZE_BYTES}).values()) / SIZE_BYTES
    buffer = memoryview(mmap.mmap(-1, SIZE_BYTES))
    step("comparing")
    for uri in (plain, striped):
        read_all(open_file(uri), buffer)
        with source.open("rb") as content:
            if any(content.read(2**26) != buffer[at : at + 2**26] for at in range(0, SIZE_BYTES, 2**26)):
                raise ClusterError(f"{uri}: not what was written")
    arms: list[tuple[str, Callable[[], object]]] = [
        ("one plain stream", lambda: stream(plain, buffer)),
        ("the plain file, in parallel", lambda: read_all(open_file(plain), buffer)),
        ("striped", lambda: read_all(open_file(striped), buffer)),
        ("striped, digests not checked", lambda: read_all(unchecked(striped), buffer)),
    ]
    rows: list[Row] = []
    for link, repeats in ((LINK, REPEATS), ("off", REPEATS)):
        hdfs("link", "all", link)
        times: Times = {}
        rates: list[float] = []
        with senders() as measure:
            for number in range(repeats):
                step(f"links {link}: what they carry, {number + 1} of {repeats}")
                rates.append(measure())
                for name, work in arms:
                    step(f"links {link}: {name}, {number + 1} of {repeats}")
                    timed(times, name, work)
        rows += rows_of(link, times, median(rates), fullest)
    return rows


def rows_of(link: str, times: Times, links_bytes_per_s: float, fullest: float) -> list[Row]:
    limited = link != "off"
    ours_s, plain_s = median(times["striped"]), median(times["one plain stream"])
    ceiling = links_bytes_per_s / 1e6
    how = f"{SIZE_BYTES / 2**30:.0f} GiB on {DATANODES} DataNodes; links {link} carry {ceiling:.0f} MB/s "
    how += f"at once; {OBJECTS} objects, {fullest:.1%} on the fullest; "
    how += f"{THREADS} reads at once; medians of {REPEATS} interleaved"
    name = f"HDFS, links {link}"
    target = 2.5 if limited else 1.3
    rows = [Row(f"{name}: striped, against one plain stream", plain_s / ours_s, "×", target, None, how, True)]
    if limited:
        share = SIZE_BYTES / ours_s / links_bytes_per_s
        checked = ours_s / median(times["striped, digests not checked"]) - 1
        rows.append(Row(f"{name}: striped, of what the links carry", share, "×", 0.9, 1.0, how, True))
        rows.append(Row(f"{name}: what checking digests adds", checked * 100, "%", 10, 0, how))
    return rows + [rate_row(f"{name}: {each}", times[each], ceiling, how) for each in times]


def rate_row(name: str, times: list[float], limit: float | None, how: str) -> Row:
    return Row(name, SIZE_BYTES / median(times) / 1e6, "MB/s", None, limit, how)


def stream(uri: str, buffer: memoryview) -> None:
    """hdfs-native's own stream, from the beginning to the end."""
    from hdfs_native import Client

    base, _, name = uri.rpartition("/")
    done = 0
    for piece in Client(base).read(f"/{name}").read_range_stream(0, SIZE_BYTES):
        buffer[done : done + len(piece)] = piece
        done += len(piece)


def unchecked(uri: str) -> Opened:
    opened = open_file(uri)
    return Opened(opened.layout, opened.objects, None)


class senders:
    """On each DataNode's machine a server of zeros; measures what all links carry at once, in bytes/s."""

    def __enter__(self) -> Callable[[], float]:
        layout = Layout(Path(HDFS_FOLDER))
        state = State.load(layout)
        if state is None:
            raise ClusterError("no HDFS is up")
        self._processes = [
            subprocess.Popen(["nsenter", f"--net=/proc/{state.init(node)}/ns/net", "python3", "-c", SEND])
            for node in state.nodes
        ]
        self._addresses = [layout.address(node) for node in state.nodes]
        time.sleep(1)
        return self._measure

    def _measure(self) -> float:
        begin_s = time.monotonic()
        threads = [threading.Thread(target=_receive, args=(each,)) for each in self._addresses]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(threads) * RAW_BYTES / (time.monotonic() - begin_s)

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()


def _receive(address: str) -> None:
    piece = bytearray(2**20)
    with socket.create_connection((address, PORT)) as link:
        while link.recv_into(piece):
            pass
