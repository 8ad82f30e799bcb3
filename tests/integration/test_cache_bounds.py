"""The bounds of the cache: eviction, blobs that grow, full disks."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache.cache import MISSING, PRESENT, Cache
from tests.integration.cached import BLOCK, BLOCKS, Node, acquire, content, fill, node, small_disk, stored

__all__ = ["node", "small_disk"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cache is root's")


def test_the_longest_unused_go_first_down_to_the_low_mark_and_pinned_ones_stay(node: Node) -> None:
    cache = node.cache()
    pinned = acquire(cache, 0)
    fill(pinned, content(0))
    os.utime(pinned.folder.path / "used", (1, 1))
    folders = [stored(cache, seed, used_s=1000 + seed) for seed in (1, 2, 3)]
    each = (folders[0] / "data").stat().st_blocks * 512
    small = Cache(node.root, max_bytes=int(3.99 * each), min_free_bytes=0, live=node.live)
    assert small.make_room()
    assert [folder.exists() for folder in folders] == [False, True, True] and pinned.folder.path.exists()
    tight = Cache(node.root, max_bytes=3 * each, min_free_bytes=0, live=node.live)
    assert tight.make_room() and all(folder.exists() for folder in folders[1:]), "not over: nothing goes"
    tight = Cache(node.root, max_bytes=3 * each - BLOCK, min_free_bytes=0, live=node.live)
    assert tight.make_room() and [folder.exists() for folder in folders[1:]] == [False, True]
    none = Cache(node.root, max_bytes=1, min_free_bytes=0, live=node.live)
    assert not none.make_room(), "what is in use is too much"
    assert pinned.folder.path.exists() and not folders[2].exists()
    assert pinned.file.path.read_bytes() == content(0)


def test_the_low_mark_is_below_the_bound(node: Node) -> None:
    cache = node.cache()
    folders = [stored(cache, seed, used_s=1000 + seed) for seed in range(4)]
    each = (folders[0] / "data").stat().st_blocks * 512
    cache = node.cache(max_bytes=int(3.02 * each))
    assert cache.make_room()
    assert [folder.exists() for folder in folders] == [False, False, True, True]
    state = cache.state()
    assert (state.blobs, state.evicted_blobs, state.max_bytes) == (2, 2, int(3.02 * each))
    assert 2 * each <= state.evicted_bytes < 3 * each and state.used_bytes < 3 * each


def test_a_live_blob_makes_room_as_it_grows_and_keeps_what_fits_when_it_never_will(node: Node) -> None:
    cache = node.cache()
    folder = stored(cache, 1)
    each = (folder / "data").stat().st_blocks * 512
    small = node.cache(max_bytes=int(1.5 * each))
    blob = acquire(small, 2)
    fill(blob, content(2), 0, BLOCKS // 4)
    assert folder.exists(), "the whole would not fit, a quarter does"
    fill(blob, content(2), BLOCKS // 4 + 1, BLOCKS - 1)
    assert not folder.exists() and blob.complete
    small.release(blob)
    huge = small.acquire("file-huge", Layout(100 * each), None, 0, 0)
    assert not huge.file.full
    kept = 0
    while huge.file.write(kept * BLOCK, memoryview(bytes(BLOCK))):
        kept += 1
        assert kept < BLOCKS
    assert huge.file.full and kept > 0 and blob.folder.path.exists(), "one that never fits evicts nobody"
    blob.file.path.unlink()
    assert small.make_room() and not huge.file.full, "room again"


def test_the_disk_keeps_what_others_need(node: Node) -> None:
    folder = stored(node.cache(), 1)
    greedy = node.cache(min_free_bytes=2**60)
    blob = acquire(greedy, 2)
    assert blob.file.full and not folder.exists()
    assert not blob.file.write(0, memoryview(b"x"))


def test_a_full_disk(node: Node, small_disk: Path) -> None:
    node.root = small_disk / "cache"
    cache = node.cache()
    blob = acquire(cache, 1)
    fill(blob, content(1))
    there = blob.blocks.states[:].count(PRESENT)
    assert blob.file.full and 0 < there < BLOCKS
    cache.release(blob)  # there is no room for `blocks` either
    assert not list(blob.folder.path.glob("*.new"))
    again = acquire(node.cache(), 1)
    for block in range(BLOCKS):
        if again.blocks.states[block] != MISSING:
            assert again.file.read(block * BLOCK, BLOCK) == content(1)[block * BLOCK : (block + 1) * BLOCK]


def test_a_long_job_leaves_room_for_another_users(node: Node) -> None:
    """What is in use cannot go: one user's blobs were all that the cache could hold, for days."""
    before = node.cache()
    each = acquire_whole(before, 1, uid=1)
    cache = node.cache(max_bytes=8 * each)
    for seed in range(2, 8):
        acquire_whole(cache, seed, uid=1)
    greedy = acquire(cache, 8, uid=1)
    fill(greedy, content(8))
    assert greedy.file.full and "kept for other users" in greedy.file.why_full
    modest = acquire(cache, 9, uid=2)
    fill(modest, content(9))
    assert modest.complete, "its eighth is there"
    assert greedy.file.path.read_bytes() != content(8)
    late = acquire(cache, 10, uid=1)
    assert late.file.full and late.file.why_full == "user 1's share of the cache is used up"


def test_unused_blobs_of_a_user_go_for_anothers(node: Node) -> None:
    cache = node.cache()
    folders = [stored(cache, seed) for seed in range(3)]
    each = (folders[0] / "data").stat().st_blocks * 512
    small = node.cache(max_bytes=4 * each)
    acquire_whole(small, 3, uid=2)
    acquire_whole(small, 4, uid=2)
    assert [folder.exists() for folder in folders].count(True) < 3


def acquire_whole(cache: Cache, seed: int, uid: int) -> int:
    """A blob in use, all of it; gives its bytes on the disk."""
    blob = acquire(cache, seed, uid)
    fill(blob, content(seed))
    assert blob.complete
    return blob.folder.disk_bytes
