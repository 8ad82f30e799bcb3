"""The node agent as a real process with real sockets: what other users can do to it, a second one, its end."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import protocol
from tests.integration.node import ALICE, BOB, Node, node, wait_until

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
# Another user's: opens connections, says how many the agent left open, and waits until stdin ends.
_OPEN = """
import select, socket, sys
links = []
for _ in range(int(sys.argv[2])):
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(sys.argv[1])
    links.append(link)
closed = set()
while fresh := set(select.select([l for l in links if l not in closed], [], [], 0.5)[0]):
    closed |= fresh
print(len(links) - len(closed), flush=True)
sys.stdin.read()
"""
# A user's: sends marks from forked tasks at once, and says how many were taken.
_MARK = """
import os, sys, time
import bootseer_slurm
begin_s = time.time() + 0.5
for task in range(int(sys.argv[1])):
    if os.fork() == 0:
        time.sleep(begin_s - time.time())
        os._exit(0 if bootseer_slurm.mark("loaded") else 1)
print(sum(os.wait()[1] == 0 for _ in range(int(sys.argv[1]))))
"""


@contextlib.contextmanager
def connections_of(uid: int, node: Node, count: int) -> Iterator[int]:
    """Connections that another user opens and says nothing on; gives how many the agent keeps open."""
    with subprocess.Popen(
        [sys.executable, "-S", "-c", _OPEN, node.socket, str(count)],
        user=uid,
        group=uid,
        extra_groups=[],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as child:
        assert child.stdout is not None
        yield int(child.stdout.readline())


def test_descriptors_that_a_client_sends_are_not_kept(node: Node) -> None:
    node.start()
    wait_until(lambda: len(psutil.Process(node.agent_pid).children()) > 0)  # the spare fetch process
    fds = Path(f"/proc/{node.agent_pid}/fd")
    before = len(list(fds.iterdir()))
    with node.connect() as link:
        for _ in range(20):
            socket.send_fds(link, [b"A=\0"], [0] * 50)
        time.sleep(0.3)
        assert len(list(fds.iterdir())) <= before + 1  # the connection


def test_a_request_has_one_deadline(node: Node) -> None:
    node.start()
    with node.connect() as link:
        begin_s = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - begin_s < 40:
                link.sendall(b"A=\0")
                time.sleep(0.2)
        assert time.monotonic() - begin_s < 20


def test_goes_on_when_it_had_no_descriptors(node: Node) -> None:
    node.start()
    pid = node.agent_pid
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    with node.connect():
        wait_until(lambda: "connection not taken" in node.log)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
    node.ask("status")


def test_goes_on_when_it_could_start_no_thread(node: Node) -> None:
    node.start("""
start, left = threading.Thread.start, [3]
def fail(thread):
    if getattr(thread._target, "__func__", None) is server.Server._serve and left[0]:
        left[0] -= 1
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = fail
""")
    node.ask("status")
    assert node.log.count("can't start new thread") == 3


def test_a_user_with_many_connections_keeps_nobody_out(node: Node) -> None:
    # 60 s: those that the agent keeps open stay so while the test looks, and an answer must not wait for them.
    node.start("server._REQUEST_TIMEOUT_S = 60.0")
    with connections_of(ALICE, node, 100) as alices, connections_of(BOB, node, 4) as bobs:
        assert (alices, bobs) == (8, 4)
        begin_s = time.monotonic()
        node.ask("status")
        assert time.monotonic() - begin_s < 20
    with connections_of(ALICE, node, 3) as alices:  # the room is given back
        assert alices == 3


def test_many_users_keep_root_not_out(node: Node) -> None:
    node.start("server._REQUEST_TIMEOUT_S = 60.0")
    with contextlib.ExitStack() as stack:
        opened = [stack.enter_context(connections_of(ALICE + n, node, 8)) for n in range(8)]
        assert opened == [8] * 6 + [0] * 2
        begin_s = time.monotonic()
        node.ask("status")
        assert time.monotonic() - begin_s < 20


def test_a_second_agent_leaves_the_first_alone(node: Node) -> None:
    first = node.start()
    second = node.launch()
    assert second.wait(30) == 1
    assert "an agent runs already" in node.log
    assert mounts.is_mountpoint(node.run / "blobs")
    node.ask("status")
    assert ((node.run / "agent.lock").stat().st_mode & 0o777) == 0o600
    first.send_signal(signal.SIGTERM)
    assert first.wait(30) == 0
    node.start()  # the lock's file stays, the lock does not


def test_starts_though_another_holds_the_abstract_name(node: Node) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as squatter:
        with contextlib.suppress(OSError):  # another agent of this machine does
            squatter.bind(protocol.ABSTRACT_SOCKET)
        node.start()
    assert "marks from containers are lost" in node.log


def test_environments_are_for_root_alone_and_only_empty_folders_go(node: Node) -> None:
    full, empty = node.run / "env" / "1.0" / "7", node.run / "env" / "2.0" / "7"
    for folder in (full, empty):
        folder.mkdir(parents=True)
    (node.run / "env").chmod(0o755)
    (full / "file").write_text("somebody's")
    left = node.run / "env" / "3.0" / "7"
    left.mkdir(parents=True)
    mounts.mount("tmpfs", left, "tmpfs", 0, "")
    node.start()
    assert (node.run / "env").stat().st_mode & 0o777 == 0o700
    assert mounts.mounts_below(node.run / "env") == []
    assert [path.name for path in (node.run / "env").iterdir()] == ["1.0"]
    assert (full / "file").read_text() == "somebody's"


def test_each_session_has_a_file(node: Node) -> None:
    (node.run / "jobs").mkdir(parents=True)
    (node.run / "jobs" / "7").touch()
    node.start()
    assert node.job_files() == set()
    assert (node.run / "jobs").stat().st_mode & 0o777 == 0o755
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe")
    node.ask("prolog", JOB_ID=2, UID=ALICE)
    node.ask("attach", JOB_ID=3, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
    assert node.job_files() == {"1", "3"}
    node.ask("epilog", JOB_ID=1)
    node.ask("epilog", JOB_ID=3)
    assert node.job_files() == set()
    assert node.jobs() == set()


def test_a_new_start_ends_the_session_of_the_one_before(node: Node) -> None:
    node.start()
    node.ask("attach", JOB_ID=3, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
    node.ask("prolog", JOB_ID=3, UID=ALICE, RESTART=1)
    assert node.jobs() == set()


def test_a_lost_epilog_ends_when_no_step_is_left(node: Node, tmp_path: Path) -> None:
    program = shutil.copy("/bin/sleep", tmp_path / "slurmstepd")
    node.start("sessions._REAP_EVERY_S, sessions._REAP_AGE_S = 0.5, 1.5")
    with subprocess.Popen(["slurmstepd: [1.batch]", "100"], executable=program) as step:
        begin_s = time.monotonic()
        for job_id in (1, 2):
            node.ask("attach", JOB_ID=job_id, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
        node.ask("prolog", JOB_ID=3, UID=ALICE, BOOTSEER="observe")  # waits for its first step
        wait_until(lambda: node.jobs() == {1, 3})
        assert time.monotonic() - begin_s > 1.5
        time.sleep(1.5)
        assert node.jobs() == {1, 3}
        step.kill()
    wait_until(lambda: node.jobs() == {3})
    assert node.job_files() == {"3"}


def test_one_round_without_a_step_ends_nothing(node: Node) -> None:
    node.start("""
sessions._REAP_EVERY_S, sessions._REAP_AGE_S = 0.2, 0
rounds = iter([set(), {1}] * 10 + [set()] * 1000)
sessions.jobs_with_steps = lambda: next(rounds)
""")
    node.ask("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
    time.sleep(2)
    assert node.jobs() == {1}
    wait_until(lambda: node.jobs() == set())


@pytest.mark.parametrize(("lasts_s", "limit_s"), [(2, 20), (600, 3)], ids=["at once", "bounded"])
def test_sessions_end_at_the_same_time(node: Node, lasts_s: int, limit_s: int) -> None:
    process = node.start(
        f"sessions._END_LIMIT_S = {limit_s}\nsession.Session.end = lambda self, reason: time.sleep({lasts_s})"
    )
    for job_id in range(1, 9):
        node.ask("prolog", JOB_ID=job_id, UID=ALICE, BOOTSEER="observe")
    node.ask("epilog", JOB_ID=1)  # ends already, and is waited for too
    begin_s = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    assert min(lasts_s, limit_s) - 0.5 < time.monotonic() - begin_s < 10
    assert mounts.mounts_below(node.run) == []


def test_many_marks_at_once_are_taken(node: Node) -> None:
    """The tasks of a node that leave one barrier: their user has little room, but a mark takes little time."""
    node.start("limits._USER_CONNECTIONS = 2")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe")
    with subprocess.Popen(
        [sys.executable, "-c", _MARK, "64"],
        env={"SLURM_JOB_ID": "1", "BOOTSEER_AGENT_SOCKET": str(node.socket)},
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        stdout=subprocess.PIPE,
    ) as child:
        assert child.communicate(timeout=60)[0] == b"64\n"
