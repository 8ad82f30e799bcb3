"""Leases between real processes: one holder, and another one when it dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.lease import Lease
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.store import FileStore, Store
from bootseer_slurm.store.arrow import ArrowStore

UID = os.geteuid()
HOLDER = """
import os, sys, time
from pathlib import Path
from bootseer_slurm.blob.lease import Lease
from bootseer_slurm.store import FileStore
lease = Lease(FileStore(Path(sys.argv[1])), os.geteuid(), "thing", refresh_s=0.1, stale_s=1)
assert lease.acquire()
with lease:
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lease until its stdin is closed."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def lease(folder: Path) -> Lease:
    return Lease(FileStore(folder), UID, "thing", refresh_s=0.1, stale_s=1)


def leases(folder: Path) -> list[str]:
    names = os.listdir(folder / user_folder(UID) / "leases")
    return sorted(name for name in names if not name.startswith("."))  # what is just being written


def test_who_waits_gets_it_when_the_holder_is_done(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    mine, told = lease(tmp_path), []
    assert holder.stdin is not None
    threading.Timer(2.0, holder.stdin.close).start()
    start_s = time.monotonic()
    assert mine.acquire(on_wait=told.append)
    assert time.monotonic() - start_s > 1.9, "a living holder is waited for, longer than the stale time"
    assert told == [f"process {holder.pid} on {os.uname().nodename}"]
    with mine:
        assert len(leases(tmp_path)) == 1
    assert leases(tmp_path) == []


def test_a_killed_holder_is_taken_over(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    mine = lease(tmp_path)
    start_s = time.monotonic()
    assert mine.acquire(patience_s=10)
    assert 1 < time.monotonic() - start_s < 6
    with mine:
        time.sleep(0.3)
        assert mine._is_mine()
    assert leases(tmp_path) == []


def test_a_holder_that_hung_notices_that_it_was_taken_over(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    os.kill(holder.pid, signal.SIGSTOP)
    mine = lease(tmp_path)
    assert mine.acquire(patience_s=10)
    with mine:
        os.kill(holder.pid, signal.SIGCONT)
        time.sleep(0.5)
        assert holder.stdin is not None
        holder.stdin.close()
        holder.wait(10)
        assert len(leases(tmp_path)) == 1, "it does not remove what is another's now"
        assert mine._is_mine()


def test_nothing_left_to_do_ends_the_wait(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    assert not lease(tmp_path).acquire(done=lambda: True)
    with pytest.raises(BootseerError, match=f"still being made by process {holder.pid}"):
        lease(tmp_path).acquire(patience_s=0.1)


def test_a_lease_that_was_written_half_is_taken_over(tmp_path: Path) -> None:
    first = lease(tmp_path)
    assert first.acquire()
    with first:
        first._over.set()
        first._thread.join()
        (file,) = leases(tmp_path)
        (tmp_path / user_folder(UID) / "leases" / file).write_bytes(b"")
        second = lease(tmp_path)
        assert second.acquire(patience_s=10)
        with second:
            assert second._is_mine()


def test_an_end_gives_it_back(tmp_path: Path) -> None:
    mine = lease(tmp_path)
    assert mine.acquire()
    with pytest.raises(SystemExit), mine:
        raise SystemExit
    assert leases(tmp_path) == []


def test_who_waited_for_one_that_failed_fails_too_and_who_comes_later_tries(tmp_path: Path) -> None:
    first, waiting, told = lease(tmp_path), lease(tmp_path), threading.Event()
    failures: list[BootseerError] = []

    def wait() -> None:
        try:
            waiting.acquire(on_wait=lambda holder: told.set())
        except BootseerError as error:
            failures.append(error)

    thread = threading.Thread(target=wait)
    assert first.acquire()
    with pytest.raises(RuntimeError), first:
        thread.start()
        assert told.wait(10)
        raise RuntimeError("the disk is full")
    thread.join(10)
    assert "could not make it: the disk is full" in failures[0].message
    later = lease(tmp_path)
    assert later.acquire(patience_s=10)
    with later:
        pass
    assert leases(tmp_path) == []


@pytest.mark.parametrize("kind", ["file", "arrow"])
def test_one_of_many_threads_creates(tmp_path: Path, kind: str) -> None:
    store: Store = FileStore(tmp_path) if kind == "file" else ArrowStore(f"file://{tmp_path}")
    assert store.create("a/b", b"first")
    assert not store.create("a/b", b"second")
    assert store.read("a/b", limit_bytes=10) == b"first"
    if kind == "file":
        won: list[bool] = []
        threads = [threading.Thread(target=lambda: won.append(store.create("a/c", b""))) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(won) == [False] * 15 + [True]


@pytest.mark.parametrize("kind", ["file", "arrow"])
def test_scan_tells_what_lies_there(tmp_path: Path, kind: str) -> None:
    store: Store = FileStore(tmp_path) if kind == "file" else ArrowStore(f"file://{tmp_path}")
    store.write("a/file", b"12345")
    store.write("a/folder/x", b"")
    (tmp_path / "a/.half").write_bytes(b"1")
    os.utime(tmp_path / "a/.half", (1_700_000_000, 1_700_000_000))
    found = {entry.name: entry for entry in store.scan("a")}
    assert sorted(found) == [".half", "file", "folder"]
    assert (found["file"].size_bytes, found["file"].is_folder) == (5, False)
    assert (found["folder"].size_bytes, found["folder"].is_folder) == (0, True)
    assert found[".half"].changed_s == 1_700_000_000
    assert store.list("a") == ["file", "folder"] and store.scan("nothing") == []
