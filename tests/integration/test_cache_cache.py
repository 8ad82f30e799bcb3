"""The node's cache: killed agents, reboots, damage, and full memory."""

from __future__ import annotations

import errno
import fcntl
import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.digest import BLAKE3
from bootseer_slurm.blob.manifest import Layout
from bootseer_slurm.cache import live as live_states
from bootseer_slurm.cache.admin import entries, evict, verify
from bootseer_slurm.cache.cache import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, CachedBlob
from bootseer_slurm.errors import BootseerError
from tests.integration.cached import (
    BLOCK,
    BLOCKS,
    LAYOUT,
    Node,
    acquire,
    child,
    content,
    fill,
    flip,
    manifest,
    node,
    small_disk,
    stored,
)

__all__ = ["node", "small_disk"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cache is root's")


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
    assert [_can_read(blob.file.path, 20001) for blob in (mine, other)] == [True, False]
    assert node.root.stat().st_mode & 0o777 == 0o700 and node.live.stat().st_mode & 0o777 == 0o700


def _as_user(uid: int, act: Callable[[], object]) -> bool:
    """Whether a process of this user can do it; a descriptor that it keeps stays open until it is killed."""
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            act()
            os._exit(0)
        except OSError:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0


def _can_read(path: Path, uid: int) -> bool:
    """Whether a user can open the file, as he does through a mount of it."""
    fd = os.open(path, os.O_PATH)
    try:
        return _as_user(uid, lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDONLY))
    finally:
        os.close(fd)


def _lease(fd: int) -> None:
    signal.signal(signal.SIGIO, signal.SIG_IGN)
    fcntl.fcntl(fd, fcntl.F_SETLEASE, fcntl.F_RDLCK)


def test_its_user_can_take_no_lease_on_a_cached_file(node: Node) -> None:
    """A lease would have whoever opens the file for writing wait, for 45 s by default."""
    file = stored(node.cache(), 1, uid=20001) / "data"
    assert _can_read(file, 20001) and not _can_read(file, 20002)
    with open(file, "rb") as opened:
        assert not _as_user(20001, lambda: _lease(opened.fileno()))


def test_where_the_disk_has_no_acls_the_file_is_its_users(node: Node, mocker: MockerFixture) -> None:
    mocker.patch("os.setxattr", side_effect=OSError(errno.ENOTSUP, "no ACLs"))
    file = stored(node.cache(), 1, uid=20001) / "data"
    assert (file.stat().st_uid, file.stat().st_mode & 0o7777) == (20001, 0o400)
    assert _can_read(file, 20001) and not _can_read(file, 20002)


def test_a_lease_on_a_cached_file_holds_nobody(node: Node) -> None:
    """Of a file that an older version, or one on a disk without ACLs, gave to its user."""
    file = stored(node.cache(), 1, uid=20001) / "data"
    cache, got = node.cache(), []
    os.chown(file, 20001, 20001)
    with open(file, "rb") as opened:
        taken, wait = os.pipe()
        holder = os.fork()
        if holder == 0:
            os.setresuid(20001, 20001, 20001)
            _lease(opened.fileno())
            os.write(wait, b"x")
            signal.pause()
        try:
            assert os.read(taken, 1) == b"x"
            threads = [
                threading.Thread(
                    target=lambda seed=seed: got.append(acquire(cache, seed, 20001)), daemon=True
                )
                for seed in (1, 2)
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(10)
                assert not thread.is_alive(), "it waits for the lease"
            for blob in got:
                fill(blob, content(1 if blob.id == manifest(1).id else 2))
                assert blob.complete and _can_read(blob.file.path, 20001)
            assert verify(node.root, node.live) == []
        finally:
            os.kill(holder, signal.SIGKILL)
            os.waitpid(holder, 0)
            os.close(taken)
            os.close(wait)


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
