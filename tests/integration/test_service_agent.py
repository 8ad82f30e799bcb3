"""The node agent as a real process with real sockets: what other users can do to it, a second one, its end."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest

from bootseer_slurm import mounts
from bootseer_slurm.agentapi import client, protocol
from tests.integration.node import ALICE, BOB, Node, node, node_of, wait_until
from tests.nodelists import nodelist_of

__all__ = ["node"]
HOOK = Path(__file__).parents[2] / "prolog.d" / "50-bootseer"
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
# Another user's: eight threads that connect and go, again and again.
_FLOOD = """
import socket, sys, threading
def flood():
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.connect(sys.argv[1])
        link.close()
for _ in range(8):
    threading.Thread(target=flood, daemon=True).start()
print("floods", flush=True)
threading.Event().wait()
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
    wait_until(lambda: len(psutil.Process(node.agent_pid).children()) > 0)  # the spare process
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
    node.start("departures._STEPS_EVERY_S, departures._LOOK_EVERY_S, sessions._REAP_AGE_S = 0.5, 0.1, 1.5")
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


def test_a_job_whose_own_step_is_gone_is_over_at_once(node: Node, tmp_path: Path) -> None:
    program = shutil.copy("/bin/sleep", tmp_path / "slurmstepd")
    node.start("departures._STEPS_EVERY_S, departures._LOOK_EVERY_S = 0.5, 0.1")
    with subprocess.Popen(["slurmstepd: [1.extern]", "100"], executable=program) as step:
        for job_id in (1, 2):
            node.ask("attach", JOB_ID=job_id, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
        time.sleep(2)
        step.kill()
    wait_until(lambda: node.jobs() == {2})  # of which no such step was seen: it may pause


@pytest.mark.parametrize("whose", ["a user's", "root's"])
def test_a_process_that_only_calls_itself_slurmstepd_keeps_no_session(node: Node, whose: str) -> None:
    folder = node.folder / "data"
    program = shutil.copy("/bin/sleep", folder / ("slurmstepd" if whose == "a user's" else "another"))
    node.start("departures._STEPS_EVERY_S, departures._LOOK_EVERY_S, sessions._REAP_AGE_S = 0.3, 0.1, 0")
    user = ALICE if whose == "a user's" else 0
    title = "slurmstepd: [1.batch]"
    with subprocess.Popen([title, "100"], executable=program, user=user, group=user, extra_groups=[]) as step:
        node.ask("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
        wait_until(lambda: node.jobs() == set())
        step.kill()


@pytest.fixture
def stepd(tmp_path: Path) -> str:
    """A program that is called slurmstepd, as its title may say then."""
    return str(shutil.copy("/bin/sleep", tmp_path / "slurmstepd"))


def test_a_pause_between_the_steps_of_an_old_job_ends_nothing(node: Node, stepd: str) -> None:
    """Of a job that Slurm keeps no step for, the hour counts from its last step, not from its begin."""
    node.start("departures._STEPS_EVERY_S, departures._LOOK_EVERY_S, sessions._REAP_AGE_S = 0.1, 0.1, 4")
    with subprocess.Popen(["slurmstepd: [1.0]", "100"], executable=stepd) as step:
        node.ask("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
        time.sleep(5)  # the job is older than that now
        step.kill()
    time.sleep(1.5)  # many rounds without a step
    assert node.jobs() == {1}
    wait_until(lambda: node.jobs() == set())


def test_processes_in_the_jobs_cgroup_keep_its_session(node: Node, stepd: str) -> None:
    """Its slurmstepd may be killed, for want of memory say, while the job lives on."""
    job_id = 10**9 + os.getpid()
    cgroup = Path("/sys/fs/cgroup/pids/slurm_test/uid_1") / f"job_{job_id}"
    try:
        cgroup.mkdir(parents=True)
    except OSError as error:
        pytest.skip(f"no cgroups of version 1 here: {error}")
    node.start("departures._STEPS_EVERY_S, departures._LOOK_EVERY_S = 0.2, 0.1")
    with contextlib.ExitStack() as stack:
        for folder in (cgroup.parent.parent, cgroup.parent, cgroup):
            stack.callback(folder.rmdir)
        task = stack.enter_context(subprocess.Popen(["sleep", "100"]))
        stack.callback(task.kill)
        (cgroup / "cgroup.procs").write_text(str(task.pid))
        with subprocess.Popen([f"slurmstepd: [{job_id}.extern]", "100"], executable=stepd) as step:
            node.ask("attach", JOB_ID=job_id, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
            time.sleep(1)
            step.kill()
        time.sleep(1.5)
        assert node.jobs() == {job_id}
        task.kill()
        wait_until(lambda: node.jobs() == set())


def run_hook(node: Node, context: str, job_id: int = 1, **variables: str) -> str:
    """The hook as slurmd runs it; what it says."""
    env = {"SLURM_JOB_ID": str(job_id), "SLURM_JOB_UID": str(ALICE), "SLURM_JOB_GID": str(ALICE)}
    env |= {"SLURM_SCRIPT_CONTEXT": f"{context}_slurmd", "SPANK_BOOTSEER_MODE": "observe"}
    env |= variables
    done = subprocess.run([HOOK, node.root_socket], env=env, stderr=subprocess.PIPE, text=True, check=True)
    return done.stderr


def nodelist_kept(node: Node, job_id: int) -> str:
    """The list that the agent keeps of a job."""
    (line,) = (node.run / "jobs" / str(job_id)).read_text().strip().split("\n")
    return str(json.loads(line)["Began"]["job"]["nodelist"])


def test_a_list_of_10_000_nodes_passes_the_hook(node: Node) -> None:
    node.start()
    nodelist = nodelist_of(10_000, size_bytes=131_055)  # Slurm gives the prolog no longer one
    variables = {"SLURM_NODELIST": nodelist, "SLURM_JOB_NUM_NODES": "10000"}
    name = nodelist.split(",")[7]
    assert run_hook(node, "prolog", SLURMD_NODENAME=name, **variables) == ""
    assert nodelist_kept(node, 1) == nodelist
    node.crash()
    assert nodelist_kept(node, 1) == nodelist and node.jobs() == {1}
    assert run_hook(node, "epilog", SLURMD_NODENAME=name) == ""
    faults = [event["name"] for event in node.events(1) if event["kind"] == "fault"]
    assert faults == ["agent_restarted"], "the list is as long as it should be, and has this node"


@pytest.mark.parametrize(
    ("nodelist", "words"),
    [("n[1-99]", "names 99 of the job's 100 nodes"), (None, "no list came of the job's 100 nodes")],
)
def test_a_nodelist_that_was_cut_is_refused_and_the_job_goes_on(
    node: Node, nodelist: str | None, words: str
) -> None:
    node.start()
    variables = {"SLURMD_NODENAME": "n1", "SLURM_JOB_NUM_NODES": "100"}
    variables |= {} if nodelist is None else {"SLURM_NODELIST": nodelist}
    assert run_hook(node, "prolog", **variables) == ""
    assert node.jobs() == {1}
    assert run_hook(node, "epilog", **variables) == ""
    events = node.events(1)
    (fault,) = (event for event in events if event["kind"] == "fault")
    assert fault["name"] == "nodelist_not_used" and words in str(fault["message"])
    assert not any("nodelist" in event for event in events)


def test_an_epilog_that_came_while_the_agent_hung_ends_its_session(node: Node) -> None:
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe", HOOK_START_NS=time.time_ns())
    with hanging(node):
        # Its message is not taken either: the backlog is full, as it is when a node is busy.
        links = fill_backlog(node)
        assert "did not answer in time" in run_hook(node, "epilog")
        for link in links:
            link.close()
    wait_until(lambda: node.jobs() == set())


def test_a_prolog_that_is_read_after_its_job_was_over_begins_nothing(node: Node) -> None:
    node.start()
    with hanging(node):
        assert "did not answer in time" in run_hook(node, "prolog")
        links = fill_backlog(node)
        assert "did not answer in time" in run_hook(node, "epilog")
        for link in links:
            link.close()
    wait_until(node.answers)
    time.sleep(2)  # what waited was read
    assert node.jobs() == set() and node.job_files() == set()
    assert [path.name for path in (node.run / "ended").iterdir()] == ["1"], "others may wait to be read"


def test_a_word_of_an_earlier_start_does_not_end_the_next_one(node: Node) -> None:
    node.start("departures._LOOK_EVERY_S = 600.0")
    (node.run / "ended" / "1").touch()
    assert run_hook(node, "prolog") == ""
    assert node.jobs() == {1} and list((node.run / "ended").iterdir()) == []


def test_messages_that_are_read_in_another_order_do_no_harm(node: Node) -> None:
    """Several threads read them: the order is by what the hook says."""
    node.start()
    first, over, again = (time.time_ns() + second * 10**9 for second in range(3))
    node.ask("epilog", JOB_ID=1, HOOK_START_NS=over)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe", HOOK_START_NS=first)
    node.ask("attach", JOB_ID=1, UID=ALICE, STEP_ID=0, BOOTSEER="observe")
    assert node.jobs() == set(), "it is over"
    node.ask("prolog", JOB_ID=1, UID=ALICE, RESTART=1, BOOTSEER="observe", HOOK_START_NS=again)
    node.ask("epilog", JOB_ID=1, HOOK_START_NS=over)
    assert node.jobs() == {1}, "another start's"
    node.ask("epilog", JOB_ID=1, HOOK_START_NS=again + 1)
    assert node.jobs() == set()


def test_the_next_agent_finds_epilogs_that_came_while_none_ran(node: Node) -> None:
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe", HOOK_START_NS=time.time_ns())
    with hanging(node) as agent_pid:
        (node.run / "ended" / "1").touch()
        os.kill(agent_pid, signal.SIGKILL)
    node.wait_for_another(agent_pid)
    wait_until(lambda: node.jobs() == set())
    assert node.job_files() == set()


def test_a_prolog_that_is_read_long_after_its_jobs_end_begins_nothing(node: Node) -> None:
    """The word outlives the looks that find no session: an agent that hung may look before it reads."""
    node.start("departures._LOOK_EVERY_S, departures._ASKING_S = 0.05, 0.0")
    start_ns = time.time_ns() - 10**9
    (node.run / "ended" / "1").touch()
    time.sleep(1)  # many looks
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe", HOOK_START_NS=start_ns)
    assert node.jobs() == set()


def test_a_step_that_has_gone_begins_no_session(node: Node) -> None:
    """Its message waited while an agent hung, and its job may be over: nobody would end the session."""
    node.start()
    with hanging(node), node.connect(node.root_socket) as link:
        fields = [
            ("OP", "attach"),
            ("JOB_ID", "1"),
            ("UID", str(ALICE)),
            ("GID", str(ALICE)),
            ("STEP_ID", "0"),
            ("BOOTSEER", "1"),
        ]
        link.sendall(protocol.encode(fields))
        link.shutdown(socket.SHUT_WR)
        link.close()
    node.ask("prolog", JOB_ID=2, UID=ALICE, BOOTSEER="observe")  # is read behind it
    time.sleep(1)
    assert node.jobs() == {2}


def test_a_session_that_could_not_end_ends_at_the_next_look(node: Node) -> None:
    node.start("""
departures._LOOK_EVERY_S, departures._ASKING_S = 0.1, 0.0
start, left = threading.Thread.start, [3]
def fail(thread):
    if getattr(thread._target, "__func__", None) is endings.Endings._end and left[0]:
        left[0] -= 1
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = fail
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe", HOOK_START_NS=time.time_ns())
    assert "refused" in run_hook(node, "epilog")
    wait_until(lambda: node.jobs() == set())
    node.events(1)


@contextlib.contextmanager
def hanging(node: Node) -> Iterator[int]:
    """The agent proper is stopped; gives its process id."""
    pid = node.agent_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def fill_backlog(node: Node) -> list[socket.socket]:
    """Connections to root's socket, as many as the kernel takes."""
    links = []
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        link.setblocking(False)
        links.append(link)
        if link.connect_ex(str(node.root_socket)) != 0:
            return links


def test_steps_that_wait_keep_no_hook_waiting(node: Node) -> None:
    """More of them than the agent has threads for root; what they wait for does not come."""
    node.start("session.Intake.wait_looked_up = lambda self, deadline_s: False")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER="observe")
    agent = psutil.Process(node.agent_pid)
    threads = agent.num_threads()
    links = []
    for step in range(200):
        links.append(node.connect(node.root_socket))
        fields = [
            ("OP", "attach"),
            ("JOB_ID", "1"),
            ("UID", str(ALICE)),
            ("GID", str(ALICE)),
            ("STEP_ID", str(step)),
        ]
        links[-1].sendall(protocol.encode(fields))
        links[-1].shutdown(socket.SHUT_WR)
        assert links[-1].recv(5) == b"WAIT=", "it is taken"
    assert agent.num_threads() < threads + 50, "a thread each"
    node.ask("prolog", JOB_ID=2, UID=BOB, BOOTSEER="observe")
    assert node.jobs() == {1, 2}
    answered = select.select(links, [], [], 0)[0]
    assert len(answered) < len(links) or select.select(links, [], [], 30)[0], "they waited meanwhile"
    for link in links:  # and get their answer when their time is over
        with link:
            assert b"STATUS=ok" in b"".join(iter(partial(link.recv, 65536), b""))


def test_as_many_steps_as_can_wait_leave_room_for_the_hook() -> None:
    """Five users', more than are parked: those beyond start without us, and no user's keep another's out."""
    with node_of('[prefetch]\nattach_wait = "100s"\n') as node, contextlib.ExitStack() as stack:
        node.start("session.Intake.wait_looked_up = lambda self, deadline_s: False")
        for job_id in range(1, 6):
            node.ask("prolog", JOB_ID=job_id, UID=ALICE + job_id, BOOTSEER="observe")
        links = []
        for step in range(1300):
            job_id = step // 260 + 1
            fields = [("OP", "attach"), ("JOB_ID", f"{job_id}"), ("UID", f"{ALICE + job_id}"), ("GID", "100")]
            links.append(stack.enter_context(node.connect(node.root_socket)))
            links[-1].sendall(protocol.encode([*fields, ("STEP_ID", f"{step}")]))
            links[-1].shutdown(socket.SHUT_WR)
        replies = [link.recv(1024) for link in links]
        assert all(reply.startswith(b"WAIT=") for reply in replies)
        assert run_hook(node, "prolog", 9) == "" and 9 in node.jobs()
        answered = select.poll()
        for link, reply in zip(links, replies, strict=True):
            if b"STATUS=" not in reply:
                answered.register(link, select.POLLIN)
        assert len(answered.poll(2000)) < 600, "they wait meanwhile"


def test_a_flood_of_connections_keeps_no_hook_waiting(node: Node) -> None:
    node.start()
    agent = psutil.Process(node.agent_pid)
    flood = [sys.executable, "-S", "-c", _FLOOD, str(node.socket)]
    with subprocess.Popen(flood, user=ALICE, group=ALICE, extra_groups=[], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout and child.stdout.readline() == b"floods\n"
            for job_id in range(1, 21):
                assert run_hook(node, "prolog", job_id) == ""
            cpu_s = sum(agent.cpu_times()[:2])
            time.sleep(2)
            used_s = sum(agent.cpu_times()[:2]) - cpu_s
            assert client.request("status", socket_path=str(node.socket)), "nor another user"
        finally:
            child.kill()
    assert used_s < 1.0, "half a core for what is refused"
    wait_until(node.answers)  # when what lies in the backlog is refused too
    assert node.jobs() == set(range(1, 21))


def test_root_alone_has_roots_socket(node: Node) -> None:
    node.start()
    assert node.root_socket.stat().st_mode & 0o777 == 0o600
    code = "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code, node.root_socket],
        user=ALICE,
        group=ALICE,
        extra_groups=[],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert b"PermissionError" in done.stderr


def test_one_round_without_a_step_ends_nothing(node: Node) -> None:
    node.start("""
departures._STEPS_EVERY_S, departures._LOOK_EVERY_S, sessions._REAP_AGE_S = 0.2, 0.1, 0
rounds = iter([{}, {1: {"0"}}] * 10 + [{}] * 1000)
departures.jobs_with_steps = lambda: next(rounds)
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
