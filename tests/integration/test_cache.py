"""The node's cache: killed agents, reboots, damage, full disks, eviction; and the command line beside an agent."""

from __future__ import annotations

import functools
import gc
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from pytest_mock import MockerFixture
from typer.testing import CliRunner

from bootseer_slurm.blob.digest import BLAKE3, SHA256
from bootseer_slurm.blob.manifest import Layout, Manifest
from bootseer_slurm.cache import live as live_states
from bootseer_slurm.cache.admin import entries, evict, verify
from bootseer_slurm.cache.cache import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, Cache, CachedBlob
from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cache import app
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cache is root's")

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


def stored(cache: Cache, seed: int, *, used_s: float | None = None) -> Path:
    """A complete blob that nobody uses; gives its folder."""
    blob = acquire(cache, seed)
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


CHILD = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import test_cache as t
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


@pytest.mark.parametrize("kind", ["stored", "unmanaged"])
def test_sigkill_at_any_moment_leaves_no_wrong_block(node: Node, kind: str) -> None:
    data, made, seen = content(1), manifest(1), []
    for delay_s in (0.0, 0.001, 0.002, 0.004, 0.008):
        process = child(node, kind)
        time.sleep(delay_s)
        process.kill()
        process.communicate()
        cache = node.cache()
        assert cache.check() == []
        unmanaged = kind == "unmanaged"
        blob = cache.acquire("file-1", LAYOUT, None, 0, 0) if unmanaged else acquire(cache, 1, 0)
        states = blob.blocks.states[:]
        assert IN_FLIGHT not in states and UNCHECKED not in states
        for block in range(BLOCKS):
            if states[block] == PRESENT:
                assert (
                    blob.file.read(block * BLOCK, LAYOUT.block_size(block))
                    == data[block * BLOCK : (block + 1) * BLOCK]
                )
                assert blob.blocks.digests[block * 32 : block * 32 + 32] == made.digest(block)
        seen.append(states.count(PRESENT))
        del blob, cache  # without a release, as if killed too
    assert seen == sorted(seen), "what was there once stays"
    assert seen[-1] > 0
    process = child(node, kind)
    process.communicate(timeout=20)
    assert process.returncode == 0
    assert node.live.joinpath("0.file-1" if kind == "unmanaged" else f"0.{made.id}").exists()


def test_a_release_and_a_restart_in_the_same_boot_need_no_hashing(node: Node) -> None:
    stored(node.cache(), 1)
    assert list(node.live.iterdir()) == [], "nobody uses it"
    assert acquire(node.cache(), 1).complete


def test_after_a_reboot_blocks_are_unchecked(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = stored(node.cache(), 1)
    node.reboot(monkeypatch)
    flip(folder / "data", 5 * BLOCK)
    cache = node.cache()
    assert cache.check() == []
    blob = acquire(cache, 1)
    assert set(blob.blocks.states[:]) == {UNCHECKED} and blob.present_bytes == 0 and not blob.blocks.has(0, 0)
    for block in range(BLOCKS):
        assert blob.blocks.next_missing() == block
        assert blob.blocks.claim(block, block) == (1, True)
        right = manifest(1).agrees(block, blob.file.read(block * BLOCK, LAYOUT.block_size(block)))
        blob.blocks.end_claim(block, 1, PRESENT if right else MISSING)
        if not right:
            assert block == 5
            fill(blob, content(1), 5, 5)
    assert blob.complete and blob.file.path.read_bytes() == content(1)


def test_a_reboot_in_the_middle_of_a_job_keeps_what_was_saved(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = node.cache()
    blob = acquire(cache, 1)
    fill(blob, content(1), 0, 9)
    cache.save()
    fill(blob, content(1), 10, 19)
    node.reboot(monkeypatch)
    again = acquire(node.cache(), 1)
    assert again.blocks.states[:] == bytes([UNCHECKED] * 10 + [MISSING] * (BLOCKS - 10))
    assert again.blocks.claim(0, BLOCKS - 1) == (10, True) and again.blocks.claim(10, 11) == (2, False)


def test_data_that_somebody_wrote_to_is_checked_again(node: Node) -> None:
    folder = stored(node.cache(), 1)
    flip(folder / "data", 0)
    assert set(acquire(node.cache(), 1).blocks.states[:]) == {UNCHECKED}


@pytest.mark.parametrize("name", ["manifest", "data", "blocks", "used", "digests"])
@pytest.mark.parametrize("damage", ["missing", "garbage", "empty", "folder"])
@pytest.mark.parametrize("checked", [True, False])
def test_a_damaged_folder_never_gives_a_wrong_block(
    node: Node, monkeypatch: pytest.MonkeyPatch, name: str, damage: str, checked: bool
) -> None:
    made, cache = manifest(1), node.cache()
    blob = cache.acquire("file-1", LAYOUT, None, 0, 0)
    blob.blocks.digests[:] = made.digests
    fill(blob, content(1))
    cache.release(blob)
    node.reboot(monkeypatch)
    path = blob.folder.path / name
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes(os.urandom(3000) if damage == "garbage" else b"")
    cache = node.cache()
    removed = cache.check() if checked else []
    assert len(removed) == (
        checked
        and not (name in ("used", "digests") or (name, damage[0]) in (("blocks", "g"), ("blocks", "e")))
    )
    if damage == "folder" and not removed:
        return  # what is not checked may fail, and is served from the store
    again = cache.acquire("file-1", LAYOUT, None, 0, 0)
    assert PRESENT not in again.blocks.states[:]
    for block in range(BLOCKS):
        if again.blocks.states[block] == UNCHECKED:
            assert again.blocks.digests[block * 32 : block * 32 + 32] == made.digest(block)
    first = again.blocks.next_missing()
    assert again.blocks.claim(first, first)[0] == 1


def test_live_state_that_is_garbage_or_of_another_boot_counts_for_nothing(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(acquire(node.cache(), 1), content(1))
    file = next(node.live.iterdir())
    whole = file.read_bytes()
    for damaged in (
        b"",
        os.urandom(len(whole)),
        whole[:5000],
        whole.replace(live_states.boot_id().encode(), b"x" * 36),
    ):
        file.write_bytes(damaged)
        again = acquire(node.cache(), 1)
        assert set(again.blocks.states[:]) == {MISSING}
    del again
    gc.collect()  # what an agent held that is no more
    file.write_bytes(b"{}")
    assert len(node.cache().check()) == 1 and not file.exists()


def test_two_users_of_the_same_blob_are_apart(node: Node) -> None:
    cache = node.cache()
    mine, other = acquire(cache, 1, 20001), acquire(cache, 1, 20002)
    fill(mine, content(1))
    assert other.present_bytes == 0
    assert (mine.file.path.stat().st_uid, other.file.path.stat().st_uid) == (20001, 20002)
    assert node.root.stat().st_mode & 0o777 == 0o700 and node.live.stat().st_mode & 0o777 == 0o700


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


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    point = tmp_path / "disk"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(point)], check=True)
    yield point
    subprocess.run(["umount", "-l", str(point)], check=True)


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


def test_live_memory_that_is_full_is_an_error_not_a_crash(node: Node, small_disk: Path) -> None:
    node.live = small_disk / "live"
    cache = node.cache()
    (small_disk / "filler").write_bytes(bytes(2**20 - 4 * BLOCK))
    with pytest.raises(BootseerError, match="No space left"):
        cache.acquire("file-1", Layout(LAYOUT.size_bytes, BLOCK, BLOCK), None, 0, 0)
    assert list(node.live.iterdir()) == []


def test_a_blob_of_a_killed_agent_stays_until_its_sessions_are_known(node: Node) -> None:
    process = child(node, "stored")
    process.communicate(timeout=20)
    cache = node.cache(max_bytes=1)
    assert cache.check() == [] and not cache.make_room()
    assert evict(node.root, node.live, 0) == [] and entries(node.root, node.live)[0].in_use
    folder = next(node.root.glob("0/*"))
    roomy = node.cache()
    roomy.forget_left()
    assert list(node.live.iterdir()) == [] and acquire(node.cache(), 1, 0).complete
    for path in node.live.iterdir():
        path.unlink()
    gc.collect()
    assert cache.make_room() and not folder.exists()


def test_verify_and_gc_beside_what_is_in_use(node: Node) -> None:
    cache = node.cache()
    pinned = acquire(cache, 1, 0)
    fill(pinned, content(1))
    folder, gone = stored(cache, 2, used_s=2000), stored(cache, 3, used_s=1000)
    flip(folder / "data", 7 * BLOCK + 3)
    flip(pinned.file.path, 9)
    damage = {each.id: each for each in verify(node.root, node.live)}
    assert damage[folder.name].blocks == (7,) and damage[folder.name].mended
    assert damage[pinned.id].blocks == (0,) and not damage[pinned.id].mended
    assert pinned.complete, "what an agent uses is only reported"
    mended = acquire(cache, 2)
    assert mended.blocks.next_missing() == 7 and mended.blocks.states[:].count(PRESENT) == BLOCKS - 1
    cache.release(mended)
    os.utime(mended.folder.path / "used", (2000, 2000))

    removed = evict(node.root, node.live, 2 * (gone / "data").stat().st_blocks * 512)
    assert [each.id for each in removed] == [gone.name]
    assert [each.id for each in evict(node.root, node.live, 0)] == [folder.name]
    assert pinned.folder.path.exists()


@pytest.mark.parametrize("digest", [SHA256, BLAKE3])
@pytest.mark.parametrize("unmanaged", [False, True])
def test_verify_compares_the_digest_that_the_blob_has(node: Node, digest: str, unmanaged: bool) -> None:
    cache, layout = node.cache(), replace(LAYOUT, digest=digest)
    made = manifest(1, layout)
    if unmanaged:
        blob = cache.acquire("file-1", layout, None, 0, 0)
        blob.blocks.digests[:] = made.digests
    else:
        blob = cache.acquire(made.id, layout, made.digests, 0, 0)
    fill(blob, content(1))
    cache.release(blob)
    assert verify(node.root, node.live) == []
    flip(blob.file.path, 7 * BLOCK + 3)
    (damage,) = verify(node.root, node.live)
    assert damage.blocks == (7,) and damage.mended


def unmanaged_of_an_earlier_version(node: Node, seed: int = 1) -> CachedBlob:
    """A complete file that is used where it lies, with digests of sha256, which nobody uses."""
    cache = node.cache()
    blob = cache.acquire("file-1", LAYOUT, None, 0, 0)
    blob.blocks.digests[:] = manifest(seed).digests
    fill(blob, content(seed))
    cache.release(blob)
    assert b"digest" not in (blob.folder.path / "manifest").read_bytes()
    return blob


@pytest.mark.parametrize("rebooted", [False, True])
def test_digests_of_unmanaged_files_stay_valid_under_a_version_with_another(
    node: Node, monkeypatch: pytest.MonkeyPatch, rebooted: bool
) -> None:
    folder = unmanaged_of_an_earlier_version(node).folder.path
    if rebooted:
        node.reboot(monkeypatch)
    cache = node.cache()
    assert cache.check() == []
    blob = cache.acquire("file-1", replace(LAYOUT, digest=BLAKE3), None, 0, 0)
    assert blob.layout == LAYOUT, "what the folder has of it counts"
    assert set(blob.blocks.states[:]) == {UNCHECKED if rebooted else PRESENT}
    cache.release(blob)
    assert verify(node.root, node.live) == []
    evict(node.root, node.live, 0)
    assert not folder.exists()
    assert cache.acquire("file-1", replace(LAYOUT, digest=BLAKE3), None, 0, 0).layout.digest == BLAKE3


def test_killed_while_a_folder_changes_its_digest(node: Node, mocker: MockerFixture) -> None:
    """Nothing that the earlier digests say may count for the new one."""
    folder = unmanaged_of_an_earlier_version(node).folder.path
    (folder / "manifest").write_bytes(b"damaged")
    mocker.patch("bootseer_slurm.cache.blob.open_data", side_effect=KeyboardInterrupt)
    new = replace(LAYOUT, digest=BLAKE3)
    with pytest.raises(KeyboardInterrupt):
        node.cache().acquire("file-1", new, None, 0, 0)
    mocker.stopall()
    blob = node.cache().acquire("file-1", new, None, 0, 0)
    assert blob.layout == new and set(blob.blocks.states[:]) == {MISSING} and not any(blob.blocks.digests[:])


def bootseer(node: Node, *words: str) -> Result:
    file = node.root.parent / "bootseer.toml"
    file.write_text(f'[cache]\npath = "{node.root}"\n[agent]\nsocket = "{node.live.parent}/agent.sock"\n')
    settings.name_config(file)
    try:
        return CliRunner().invoke(app, list(words))
    finally:
        settings.name_config(None)


def test_the_commands(node: Node) -> None:
    cache = node.cache()
    pinned = acquire(cache, 1, 0)
    fill(pinned, content(1), 0, BLOCKS // 2 - 1)
    folder = stored(cache, 2, used_s=time.time() - 3600)
    shown = bootseer(node, "show").output
    lines = {line.split()[1][:8]: line for line in shown.splitlines() if " image" in line}
    assert "root" in lines[pinned.id[:8]] and "50 %" in lines[pinned.id[:8]] and "yes" in lines[pinned.id[:8]]
    assert (
        "20001" in lines[folder.name[:8]]
        and "100 %" in lines[folder.name[:8]]
        and "1 h 00 min ago" in lines[folder.name[:8]]
    )
    assert (
        "yes" not in lines[folder.name[:8]]
        and "blobs: 2" in shown
        and "200.0 GiB" in shown.replace("200 GiB", "200.0 GiB")
    )
    result = bootseer(node, "verify")
    assert result.exit_code == 0 and "is right" in result.output
    flip(folder / "data", 0)
    result = bootseer(node, "verify")
    assert isinstance(result.exception, IntegrityError) and result.exception.exit_status == 6
    assert f"1 of {BLOCKS} blocks" in result.output and "will be fetched again" in result.output
    assert "removed: 0" in bootseer(node, "gc", "--to", "1GiB").output
    assert "removed: 1" in bootseer(node, "gc").output and not folder.exists() and pinned.folder.path.exists()
    (pinned.folder.path / "manifest").write_bytes(b"x")
    assert "damaged" in bootseer(node, "show").output


@pytest.mark.parametrize("command", ["show", "gc", "verify"])
def test_the_commands_are_roots(node: Node, command: str, mocker: MockerFixture) -> None:
    node.cache()
    mocker.patch("os.geteuid", return_value=1000)
    assert isinstance(bootseer(node, command).exception, InputError)


def test_verify_counts_checked_blocks_after_a_reboot(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(node.cache(), 1)
    node.reboot(monkeypatch)
    read: list[int] = []
    assert verify(node.root, node.live, read.append) == [] and sum(read) == LAYOUT.size_bytes
    assert acquire(node.cache(), 1).complete


def test_data_that_counts_for_nothing_is_not_written_over(node: Node) -> None:
    """A container may have it mounted still: it must go on seeing what it saw."""
    folder = stored(node.cache(), 1)
    shown = os.open(folder / "data", os.O_RDONLY)
    (folder / "blocks").unlink()
    again = acquire(node.cache(), 1)
    assert set(again.blocks.states[:]) == {MISSING}
    assert os.pread(shown, LAYOUT.size_bytes, 0) == content(1)
    os.close(shown)


def test_what_runs_with_the_last_pin_may_wait_for_the_cache(node: Node) -> None:
    """It tells the kernel, which waits for readers, and these write to the cache."""
    cache = node.cache()
    blob = acquire(cache, 1)
    again: list[CachedBlob] = []
    taking = threading.Thread(target=lambda: again.append(acquire(cache, 1)))

    def on_last() -> None:
        taking.start()
        tending = threading.Thread(target=lambda: (cache.make_room(), cache.save()), daemon=True)
        tending.start()
        tending.join(10)
        assert not tending.is_alive()
        assert not again, "a blob that is being let go is not given out"

    cache.release(blob, on_last)
    taking.join(10)
    assert again[0] is not blob
    cache.release(again[0])
    assert list(node.live.iterdir()) == [], "it had one pin"
