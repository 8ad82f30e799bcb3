"""The part of `bench image` that measures this machine, without a cluster's link.

64 KiB blocks   which of them a start touches, of a file whose readahead is off: what no block size can beat
recording       the calls of one start's recorder, timed
NOTIFY_STORE    pages pushed by our FUSE server and then read, beside pyfuse3 serving the same file
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

from bootseer_slurm.blob.manifest import BLOCK_BYTES
from bootseer_slurm.blob.trace import Recorder
from bootseer_slurm.fuse import Mount, Server
from scripts.lib.bench import image_arms as arms
from scripts.lib.bench.image_inputs import Inputs
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import ClusterError, poll
from scripts.lib.host import run

SMALL_BYTES = 64 * 2**10
STORE_BYTES = 512 * 2**20
READ_BYTES = 128 * 2**10  # what the kernel asks our server for at once
PEERS = Path("/var/tmp/bootseer-bench-peers")
PEER = Path(__file__).with_name("fuse_peer.py")
COUNTER = Path(__file__).with_name("image_touched.py")


def touched_bytes(cluster: Cluster, inputs: Inputs) -> int:
    """Bytes of the 64 KiB blocks that the job's imports touch, from a kernel mount of the image."""
    (arm,) = (arm for arm in arms.local(inputs) if arm.name == "local, kernel")
    result = f"{arms.WORK}/touched"
    counting = ["/usr/bin/python3", str(COUNTER), str(inputs.image), str(SMALL_BYTES), result]
    arm = arms.Arm(arm.name, arm.steps, imported=[{"name": "count", "argv": counting}])
    with _without_readahead(inputs.image):
        arms.start(cluster, inputs, arm)
    return int(cluster.exec(arms.NODE, "cat", result).stdout) * SMALL_BYTES


@contextlib.contextmanager
def _without_readahead(path: Path) -> Iterator[None]:
    """The disk of a file without readahead, so that only what is asked for gets into the page cache."""
    device = path.stat().st_dev
    control = Path("/sys/class/bdi", f"{os.major(device)}:{os.minor(device)}", "read_ahead_kb")
    before = control.read_text()
    control.write_text("0\n")
    try:
        yield
    finally:
        control.write_text(before)


def recording_row(hot_bytes: float, start_s: float) -> Row:
    """The time of the recorder's calls of one start, as a share of that start."""
    blocks, reads = int(hot_bytes) // BLOCK_BYTES, int(hot_bytes) // READ_BYTES
    took_s = []
    for _ in range(5):
        recorder = Recorder(blocks, begin_s=time.monotonic())
        begin_s = time.perf_counter()
        for read in range(reads):
            block = read * READ_BYTES // BLOCK_BYTES
            recorder.touch(block, block)
        took_s.append(time.perf_counter() - begin_s)
    how = f"{reads} calls of Recorder.touch: a start of {hot_bytes / 1e6:.0f} MB in reads of 128 KiB"
    return Row("recording, share of a start", median(took_s) / start_s, "", 0.02, None, how)


class _LocalFile:
    """A File whose bytes are all in a local file."""

    uid = gid = 0
    mtime_ns = 0
    patience_s = 900.0

    def __init__(self, fd: int, size_bytes: int) -> None:
        self.fd, self.size_bytes = fd, size_bytes

    def ready(self, offset: int, size: int) -> int | None:
        return self.fd

    def fetch(self, offset: int, size: int) -> bytes:
        return os.pread(self.fd, size, offset)


def store_rows(inputs: Inputs, repeats: int, step: Callable[[str], None]) -> list[Row]:
    """Reads of pages that were pushed, beside a sequential read of the same bytes through pyfuse3."""
    python = _peer_python(step)
    rates: dict[str, list[float]] = {"pushed": [], "push": [], "pyfuse3": []}
    with tempfile.TemporaryDirectory(prefix="bootseer-bench-") as folder:
        source = Path(folder, "source")
        with inputs.image.open("rb") as image:
            source.write_bytes(image.read(STORE_BYTES))
        with _served(source, Path(folder)) as (server, path), _peer(python, source, Path(folder)) as peer:
            data = source.read_bytes()
            for number in range(repeats):
                step(f"NOTIFY_STORE and pyfuse3, {number + 1} of {repeats}")
                _forget_pages(path)
                os.stat(path)
                begin_s = time.perf_counter()
                if not server.store(f"0/{path.name}", 0, data):
                    raise ClusterError("the kernel takes no pages")
                rates["push"].append(len(data) / (time.perf_counter() - begin_s))
                rates["pushed"].append(_read_rate(path))
                _forget_pages(peer)
                rates["pyfuse3"].append(_read_rate(peer))
    peer_rate = median(rates["pyfuse3"])
    how = f"dd of {STORE_BYTES >> 20} MiB in 1 MiB, median of {repeats}, interleaved; "
    how += f"pyfuse3 {peer_rate / 1e9:.2f} GB/s, pushing {median(rates['push']) / 1e9:.2f} GB/s"
    ratio = median(rates["pushed"]) / peer_rate
    return [Row("reads after NOTIFY_STORE, against pyfuse3", ratio, "×", 2.5, 1.0, how, at_least=True)]


def _peer_python(step: Callable[[str], None]) -> Path:
    """A Python with pyfuse3 from PyPI, made once."""
    python = PEERS / "bin" / "python"
    if not (PEERS / "made").exists():
        step("pyfuse3 from PyPI")
        run(sys.executable, "-m", "venv", "--clear", str(PEERS))
        run(str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "pyfuse3")
        (PEERS / "made").touch()
    return python


@contextlib.contextmanager
def _served(source: Path, folder: Path) -> Iterator[tuple[Server, Path]]:
    mount = Mount.open(folder / "blobs")
    server = Server(mount, folder / "nodes")
    server.start()
    try:
        fd = os.open(source, os.O_RDONLY)
        yield server, server.add("0/blob", _LocalFile(fd, source.stat().st_size))
        os.close(fd)
    finally:
        mount.close()
        server.stop()


@contextlib.contextmanager
def _peer(python: Path, source: Path, folder: Path) -> Iterator[Path]:
    point = folder / "peer"
    point.mkdir()
    with subprocess.Popen(
        [str(python), str(PEER), str(source), str(point)], stdout=subprocess.DEVNULL
    ) as process:
        try:
            if not poll(lambda: os.path.ismount(point), timeout_s=10):
                raise ClusterError("pyfuse3 does not serve")
            yield point / "blob"
        finally:
            subprocess.run(["umount", "-l", str(point)], check=False)
            process.terminate()


def _forget_pages(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)


def _read_rate(path: Path) -> float:
    begin_s = time.perf_counter()
    run("dd", f"if={path}", "of=/dev/null", "bs=1M")
    return path.stat().st_size / (time.perf_counter() - begin_s)
