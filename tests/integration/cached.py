"""A cache to test with: blobs of random bytes, processes that use it and are killed, small disks."""

from __future__ import annotations

import functools
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.cache.cache import MISSING, PRESENT, Cache, CachedBlob

BLOCK = 4096
BLOCKS = 512
LAYOUT = Layout(BLOCK * BLOCKS - 100, BLOCK, 16 * BLOCK)


@functools.cache
def content(seed: int, layout: Layout = LAYOUT) -> bytes:
    return random.Random(seed).randbytes(layout.size_bytes)


@functools.cache
def manifest(seed: int, layout: Layout = LAYOUT) -> Manifest:
    return Manifest("image", layout, layout.digests_of(memoryview(content(seed, layout))))


class Node:
    """A cache folder and a live folder."""

    def __init__(self, folder: Path) -> None:
        self.root, self.live = folder / "cache", folder / "run" / "cache"

    def cache(self, *, max_bytes: int = 2**40, min_free_bytes: int = 0) -> Cache:
        return Cache(self.root, max_bytes=max_bytes, min_free_bytes=min_free_bytes, live=self.live)

    def reboot(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for path in self.live.iterdir():
            path.unlink()
        monkeypatch.setattr("bootseer_slurm.cache.disk.boot_id", lambda: "another boot")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def acquire(cache: Cache, seed: int, uid: int = 20001) -> CachedBlob:
    made = manifest(seed)
    return cache.acquire(made.id, made.layout, made.digests, uid, uid)


def fill(blob: CachedBlob, data: bytes, first: int = 0, last: int = BLOCKS - 1) -> None:
    """Bring blocks as a reader does, one by one."""
    for block in range(first, last + 1):
        count, unchecked = blob.blocks.claim(block, block)
        assert (count, unchecked) == (1, False)
        at = block * blob.layout.block_bytes
        kept = blob.file.write(at, memoryview(data)[at : at + blob.layout.block_bytes])
        blob.blocks.end_claim(block, 1, PRESENT if kept else MISSING)


def stored(cache: Cache, seed: int, *, uid: int = 20001, used_s: float | None = None) -> Path:
    """A complete blob that nobody uses; gives its folder."""
    blob = acquire(cache, seed, uid)
    fill(blob, content(seed))
    cache.release(blob)
    if used_s is not None and blob.folder.path.exists():
        os.utime(blob.folder.path / "used", (used_s, used_s))
    return blob.folder.path


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "disk"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)], check=True)
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


CHILD = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.integration import cached as t
node = t.Node(Path(sys.argv[2]))
unmanaged = sys.argv[3] == "unmanaged"
cache = node.cache()
data, made = t.content(1), t.manifest(1)
blob = cache.acquire("file-1", made.layout, None, 0, 0) if unmanaged else t.acquire(cache, 1, 0)
print("ready", flush=True)
while (first := blob.blocks.next_missing()) >= 0:
    count, _ = blob.blocks.claim(first, min(first + 2, t.BLOCKS - 1))
    for block in range(first, first + count) if unmanaged else ():
        blob.blocks.digests[block * 32 : block * 32 + 32] = made.digest(block)
    at = first * t.BLOCK
    blob.file.write(at, memoryview(data)[at : at + count * t.BLOCK])
    blob.blocks.end_claim(first, count, t.PRESENT)
    if first % 64 == 0:
        blob.save()
"""


def child(node: Node, kind: str) -> subprocess.Popen[str]:
    folder = str(Path(__file__).parent)
    command = [sys.executable, "-c", CHILD, folder, str(node.root.parent), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process
