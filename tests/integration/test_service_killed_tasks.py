"""Tasks that wait in the kernel for a mounted snapshot whose blocks do not come: none keeps a node from its work."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bootseer_slurm import mounts
from bootseer_slurm.image.signing import make_key
from bootseer_slurm.service.killed_tasks import waiting_tasks
from tests.integration.node import ALICE, Node, digest_of, node_of, wait_until
from tests.integration.test_env_layer import make_large_venv, saved
from tests.integration.test_env_snapshot import end, package, pytestmark, shown

__all__ = ["pytestmark"]
_LARGE = "lib/python3.11/site-packages/thing/large"
# A store that answers no more, once there is a file "stalled" in the node's folder.
_MAY_STALL = """
import contextlib, os
from bootseer_slurm.artifacts import handle, source
real = source.ObjectSource.read

@contextlib.contextmanager
def read(self, *arguments, **fields):
    while os.path.exists({path!r}):
        time.sleep(0.05)
    with real(self, *arguments, **fields) as view:
        yield view

source.ObjectSource.read = read
"""
_READ = """
import hashlib, os, sys
try:
    file = open(sys.argv[1], "rb")
    file.seek(int(sys.argv[2]))
    print(hashlib.sha256(file.read()).hexdigest())
except OSError as error:
    print("error", error.errno)
"""


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose kernel mounts what the agent packed."""
    with node_of() as made:
        make_key(made.folder / "site.key")
        yield made


def stall(node: Node) -> Path:
    return node.folder / "stalled"


def mounted(node: Node, changes: str = "") -> tuple[Path, Path]:
    """An environment whose snapshot the kernel has mounted for job 2, of which most is missing; and its original."""
    node.start(_MAY_STALL.format(path=str(stall(node))) + changes)
    root = make_large_venv(node)
    assert shown(node, 1, root) is None
    saved(node, 1)
    end(node, 1)
    view = shown(node, 2, root)
    assert view is not None and mounts.mounts_below(node.run / "images"), node.log
    return view, root


@contextlib.contextmanager
def reading(view: Path, offset: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A task of alice's that reads the snapshot's large file from there on."""
    task = subprocess.Popen(
        [sys.executable, "-S", "-c", _READ, f"{view}/{_LARGE}", str(offset)], stdout=subprocess.PIPE, text=True,
        user=ALICE, group=ALICE, extra_groups=[], pass_fds=(int(view.name),), cwd="/",
    )  # fmt: skip
    try:
        yield task
    finally:
        task.kill()
        task.communicate(timeout=60)


def state(process: subprocess.Popen[str]) -> str:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_stopped_process_of_the_user_is_followed_by_another(node: Node) -> None:
    view, root = mounted(node)
    agent = psutil.Process(node.agent_pid)
    (worker,) = [each for each in agent.children() if each.uids().real == ALICE]
    worker.send_signal(signal.SIGSTOP)
    try:
        with reading(view) as task:
            assert task.communicate(timeout=60)[0].strip() == digest_of(package(root) / "large")
        assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            worker.kill()
    end(node, 2, view)


def test_a_task_that_is_killed_ends_though_its_block_never_comes(node: Node) -> None:
    view, _ = mounted(node)
    stall(node).touch()
    with reading(view) as task:
        wait_until(lambda: state(task) == "D")
        task.kill()
        assert task.wait(30) == -signal.SIGKILL, "before its read would have failed in any case"
    stall(node).unlink()
    end(node, 2, view)


def test_a_read_whose_block_never_comes_fails_in_time(node: Node) -> None:
    view, _ = mounted(node, "handle.MOUNTED_PATIENCE_S = 2.0\n")
    stall(node).touch()
    with reading(view) as task:
        assert task.communicate(timeout=30)[0] == f"error {errno.EIO}\n"
    with reading(view) as task:
        assert task.communicate(timeout=30)[0] == f"error {errno.EIO}\n", "once more, and as soon"
    stall(node).unlink()
    end(node, 2, view)


def test_who_is_not_killed_waits_on_beside_one_who_is(node: Node) -> None:
    view, root = mounted(node)
    stall(node).touch()
    with reading(view) as task, reading(view) as other:
        wait_until(lambda: state(task) == state(other) == "D")
        task.kill()
        time.sleep(6)  # by then it would have ended, were it alone
        assert state(task) == state(other) == "D"
        stall(node).unlink()
        assert other.communicate(timeout=60)[0].strip() == digest_of(package(root) / "large")
    end(node, 2, view)


# A user's task that waits without being interruptible, for a child that shares its memory, beside threads that
# come and go. It did no exec since it became the user, as one that Slurm has just begun.
_WAITS = """
import ctypes, os, sys, threading, time
os.setresuid(54321, 54321, 54321)
def short():
    for _ in range(10**6):
        thread = threading.Thread(target=time.sleep, args=(0.0005,))
        thread.start()
        thread.join()
for _ in range(4):
    threading.Thread(target=short, daemon=True).start()
library = ctypes.CDLL(None)  # without the lock of the interpreter
child = threading.Thread(target=lambda: library.vfork() or library.sleep(60), daemon=True)
child.start()
child.join()
"""


def states(pid: int) -> set[str]:
    """Of each thread that has not ended meanwhile."""
    found = set()
    for thread in psutil.Process(pid).threads():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            stat = Path(f"/proc/{pid}/task/{thread.id}/stat").read_text()
            found.add(stat.rpartition(")")[2].split()[0])
    return found


@pytest.mark.parametrize("is_ours", [False, True])
def test_a_task_that_waits_is_seen_whatever_ends_beside_it_and_before_its_exec(is_ours: bool) -> None:
    command = [sys.executable, "-S", "-c", _WAITS]
    with subprocess.Popen(command if is_ours else ["sh", "-c", '"$@"; :', "sh", *command]) as process:
        try:
            if is_ours:
                wait_until(lambda: "D" in states(process.pid))
                assert list(waiting_tasks({ALICE})) == [], "it waits for the store"
            else:
                wait_until(lambda: bool(list(waiting_tasks({ALICE}))))
                assert all(list(waiting_tasks({ALICE})) for _ in range(300))
        finally:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()


def test_who_reads_after_a_task_was_killed_waits_for_the_store(node: Node) -> None:
    view, root = mounted(node)
    large = package(root) / "large"
    half = large.stat().st_size // 2
    stall(node).touch()
    with reading(view) as task:
        wait_until(lambda: state(task) == "D")
        task.kill()
        assert task.wait(30) == -signal.SIGKILL
    with reading(view, half) as other:
        wait_until(lambda: state(other) == "D")
        time.sleep(6)  # what the kernel had read ahead for the other comes first
        stall(node).unlink()
        expected = hashlib.sha256(large.read_bytes()[half:]).hexdigest()
        assert other.communicate(timeout=60)[0].strip() == expected
    end(node, 2, view)
