"""The processor's cost of a digest of each block: candidates beside the speed at which memory is read.

Needs no cluster. Blocks of 256 KiB, one after the other from a buffer that no cache holds. The candidates
take turns, since others use the machine too; CPU time counts, and medians of the rounds. Two threads at once
tell whether a candidate lets go of the interpreter's lock: there the shortest times count.
Functions with known collisions, or without any claim against them (sha1, xxh3, crc32), are no candidates: a
digest protects from a hostile store. Then a striped file is read, from pages that the kernel has, with
either digest that we know, and with none.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

from blake3 import __version__ as blake3_version
from blake3 import blake3

from bootseer_slurm.blob.digest import BLAKE3, SHA256
from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.blob.stripes import open_stripes
from bootseer_slurm.blob.writer import write_objects
from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.striped import Opened
from bootseer_slurm.store import Store, open_store
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner

BLOCK_BYTES = 256 * 1024
ROUNDS = 15
_CACHES = 8  # the buffer is so many times the largest cache
_LEAST_BYTES = 256 * 2**20
_FILE_BYTES = 512 * 2**20
_OBJECTS = 8
_FLAGS = ("sha_ni", "avx2", "avx512f", "sha2", "asimd")

CANDIDATES: dict[str, Callable[[memoryview], bytes]] = {
    "sha256": lambda view: hashlib.sha256(view).digest(),
    "sha512-256": lambda view: hashlib.new("sha512_256", view).digest(),
    "sha3-256": lambda view: hashlib.sha3_256(view).digest(),
    "blake2b": lambda view: hashlib.blake2b(view, digest_size=32).digest(),
    "blake3": lambda view: blake3(view).digest(),
}


def run(only: str = "") -> list[Row]:
    """All rows. only: has no parts."""
    with spinner("digest") as step:
        buffer = bytearray(b"Z") * buffer_bytes()  # what is in it makes no difference, but it must be memory
        cpu_s: dict[str, list[float]] = {}
        one_s: dict[str, list[float]] = {}
        two_s: dict[str, list[float]] = {}
        for number in range(ROUNDS):
            step(f"round {number + 1} of {ROUNDS}")
            cpu_s.setdefault("memory", []).append(cpu_time(lambda: buffer.find(b"0")))
            for name, digest in CANDIDATES.items():
                one, two, used = times_of(memoryview(buffer), digest)
                cpu_s.setdefault(name, []).append(used)
                one_s.setdefault(name, []).append(one)
                two_s.setdefault(name, []).append(two)
        gains = {name: 2 * min(one_s[name]) / min(two_s[name]) for name in CANDIDATES}
        rows = rows_of(len(buffer), {name: median(each) for name, each in cpu_s.items()}, gains)
        return rows + reading_rows(step)


def rows_of(size_bytes: int, cpu_s: dict[str, float], gains: dict[str, float]) -> list[Row]:
    """cpu_s: for the whole buffer. gains: how much more two threads do than one."""
    size_gb = size_bytes / 1e9
    how = f"blocks of {BLOCK_BYTES // 1024} KiB from {size_bytes / 2**20:.0f} MiB, cold; {processor()}; "
    how += f"blake3 {blake3_version}; CPU time, medians of {ROUNDS} interleaved; "
    how += "limit: reading the same memory (memchr)"
    threads = f"twice as much by two threads, wall time, the shortest of {ROUNDS}; {os.cpu_count()} cores"
    rows = [
        Row("blake3, against sha256", cpu_s["sha256"] / cpu_s["blake3"], "×", 1.5, None, how, at_least=True)
    ]
    for name in CANDIDATES:
        limit_s = cpu_s["memory"]
        rows += [
            Row(f"{name}: one core", size_gb / cpu_s[name], "GB/s", None, size_gb / limit_s, how),
            Row(f"{name}: cost", cpu_s[name] / size_gb, "core-s/GB", None, limit_s / size_gb, how),
            Row(f"{name}: two threads, against one", gains[name], "×", None, 2.0, threads),
        ]
    return rows


def reading_rows(step: Callable[[str], None]) -> list[Row]:
    """The cost of reading a striped file whole."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        source = Path(folder, "source")
        source.write_bytes(os.urandom(_FILE_BYTES))
        store = open_store(f"file://{folder}")
        manifests = {name: written(store, source, name) for name in (SHA256, BLAKE3)}
        cpu_s: dict[str, list[float]] = {}
        buffer = bytearray(_FILE_BYTES)
        for number in range(ROUNDS):
            step(f"a striped file, {number + 1} of {ROUNDS}")
            for name, manifest in (("none", None), *manifests.items()):
                layout = manifests[BLAKE3].layout
                opened = Opened(layout, open_stripes(store, name if manifest else BLAKE3, layout), manifest)
                with ParallelFile.of(opened, "model") as file:
                    cpu_s.setdefault(name, []).append(cpu_time(partial(file.read_at, 0, buffer)))
    how = f"{_FILE_BYTES / 2**20:.0f} MiB in {_OBJECTS} objects on the local disk, all pages in memory; "
    how += f"CPU time of all threads, medians of {ROUNDS} interleaved; limit: without digests"
    cost = {name: median(each) / _FILE_BYTES * 1e9 for name, each in cpu_s.items()}
    metric = "a striped file: cost with"
    return [Row(f"{metric} {name}", cost[name], "core-s/GB", None, cost["none"], how) for name in manifests]


def written(store: Store, source: Path, name: str) -> Manifest:
    layout = Layout(_FILE_BYTES, objects=_OBJECTS, digest=name)
    return Manifest("checkpoint", layout, write_objects(store, name, source, layout))


def times_of(view: memoryview, digest: Callable[[memoryview], bytes]) -> tuple[float, float, float]:
    """How long one thread takes for the buffer, how long two take for twice that, and one's CPU time."""

    def work(_: int = 0) -> None:
        for start in range(0, len(view), BLOCK_BYTES):
            digest(view[start : start + BLOCK_BYTES])

    begin_s = time.monotonic()
    used_s = cpu_time(work)
    one_s = time.monotonic() - begin_s
    with ThreadPoolExecutor(2) as pool:
        begin_s = time.monotonic()
        list(pool.map(work, range(2)))
    return one_s, time.monotonic() - begin_s, used_s


def cpu_time(work: Callable[[], object]) -> float:
    begin_s = time.process_time()
    work()
    return time.process_time() - begin_s


def buffer_bytes() -> int:
    """So much that no cache of this machine holds a part of it that counts."""
    sizes = [
        int(path.read_text().strip().rstrip("K")) * 1024
        for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(_LEAST_BYTES, _CACHES * max(sizes, default=0))


def processor() -> str:
    """The processor, and which of the instructions it has that matter here."""
    text = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.MULTILINE)
    has = [flag for flag in _FLAGS if flags and flag in flags[1].split()]
    return f"{model[1] if model else os.uname().machine} ({', '.join(has)})"
