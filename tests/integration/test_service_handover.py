"""A supervisor that is killed: systemd keeps its descriptors, and the next one goes on with them."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bootseer_slurm import mounts
from tests.integration.node import ALICE, Node, digest_of, node, wait_until
from tests.integration.systemd import FdStore, Systemd, fd_store, systemd
from tests.integration.test_service_recovery import (
    attach,
    make_environment,
    make_file,
    needs_squashfuse,
    reader,
    shown_text,
    squashfuses,
)

__all__ = ["fd_store", "node", "systemd"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
REPO = Path(__file__).resolve().parents[2]
UNIT = REPO / "conf/systemd/bootseer-agent.service"
_OTHERS = {"lock", "private", "record", "listener.path", "listener.root"}
_MOUNTS = {f"{what}.{name}" for what in ("mount", "ledger") for name in ("blobs", "checkpoints")}


def start(node: Node, store: FdStore, changes: str = "") -> subprocess.Popen[bytes]:
    process = store.launch(node, changes)
    wait_until(lambda: process.poll() is not None or node.answers())
    assert process.poll() is None, node.log
    return process


def kill(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_a_read_goes_on_when_the_supervisor_is_killed_in_the_middle_of_it(
    node: Node, fd_store: FdStore
) -> None:
    model = make_file(node, "model.bin", 100 * 2**20)
    supervisor = start(node, fd_store)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    readers = [reader(f"/proc/{os.getpid()}/fd/{mount}", step) for step in (1 << 20, 70_000)]
    before = [entry.mount_id for entry in mounts.mounts_below(node.run)]
    for _ in range(3):
        time.sleep(0.2)
        kill(supervisor)
        supervisor = start(node, fd_store)
    for each in readers:
        output, errors = each.communicate(timeout=60)
        assert (output.strip(), errors) == (digest_of(model), ""), node.log
    assert node.jobs() == {1}
    assert [entry.mount_id for entry in mounts.mounts_below(node.run)] == before
    os.close(mount)
    node.ask("epilog", JOB_ID=1)
    assert sum(event["name"] == "agent_restarted" for event in node.events(1)) == 3


def test_what_systemd_is_told(node: Node, fd_store: FdStore) -> None:
    supervisor = start(node, fd_store)
    assert fd_store.fds.keys() - {"listener.abstract"} == _OTHERS | _MOUNTS
    wait_until(lambda: fd_store.is_ready)
    kill(supervisor)
    supervisor = start(node, fd_store)
    pid = node.agent_pid
    supervisor.send_signal(signal.SIGHUP)
    node.wait_for_another(pid)
    kill(supervisor)
    supervisor = start(node, fd_store)
    assert len(fd_store.stored) == len(set(fd_store.stored)), "what is kept is not stored again"
    supervisor.send_signal(signal.SIGTERM)
    assert supervisor.wait(30) == 0
    wait_until(lambda: fd_store.fds == {})
    assert mounts.mounts_below(node.run) == []


@pytest.mark.parametrize("lacking", ["record", "mount.blobs", "private"])
def test_what_is_not_whole_is_made_anew(node: Node, fd_store: FdStore, lacking: str) -> None:
    supervisor = start(node, fd_store)
    kill(supervisor)
    os.close(fd_store.fds.pop(lacking))
    old = set(fd_store.fds)
    supervisor = start(node, fd_store)
    assert node.jobs() == set()
    wait_until(lambda: fd_store.fds.keys() >= old | {lacking})
    model = make_file(node, "model.bin", 2**20)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    kill(supervisor)
    supervisor = start(node, fd_store)
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        assert each.communicate(timeout=60) == (digest_of(model) + "\n", ""), node.log
    os.close(mount)


def test_killed_while_it_starts_the_next_agent_again_and_again(node: Node, fd_store: FdStore) -> None:
    model = make_file(node, "model.bin", 2**20)
    supervisor = start(node, fd_store)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    mount = attach(node, 1)[str(model)]
    rng = random.Random(1)
    for _ in range(12):
        kill(supervisor)
        supervisor = fd_store.launch(node)
        time.sleep(rng.random())  # it begins to serve after half of that
    wait_until(node.answers)
    assert node.jobs() == {1}
    with reader(f"/proc/{os.getpid()}/fd/{mount}", 1 << 20) as each:
        assert each.communicate(timeout=60) == (digest_of(model) + "\n", ""), node.log
    os.close(mount)


@needs_squashfuse
def test_an_environment_goes_on_when_the_supervisor_is_killed(node: Node, fd_store: FdStore) -> None:
    folder = make_environment(node)
    supervisor = start(node, fd_store)
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    first = attach(node, 1)[str(folder)]
    (served,) = squashfuses(node)
    kill(supervisor)
    supervisor = start(node, fd_store)
    second = attach(node, 1)[str(folder)]
    assert shown_text(first) == shown_text(second) == "thing"
    assert squashfuses(node) == [served]
    os.close(first)
    os.close(second)
    node.ask("epilog", JOB_ID=1)
    wait_until(lambda: node.environments() == [] and squashfuses(node) == [])


def test_when_memory_is_full_users_go_first(node: Node) -> None:
    model = make_file(node, "model.bin", 2**20)
    supervisor = node.start(
        "open('/proc/self/oom_score_adj', 'w').write('100')\n"
    )  # less is not allowed here
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
    os.close(attach(node, 1)[str(model)])

    def adjusted(uid: int) -> set[str]:
        found = [
            each
            for each in psutil.Process(supervisor.pid).children(recursive=True)
            if each.uids().real == uid
        ]
        return {Path(f"/proc/{each.pid}/oom_score_adj").read_text().strip() for each in found}

    assert adjusted(ALICE) == {"500"}
    assert Path(f"/proc/{node.agent_pid}/oom_score_adj").read_text().strip() == "100"


def test_a_supervisor_of_another_layout_stays_what_it_is(node: Node) -> None:
    """It tries the new code before it becomes that; here the code is told so by a name that it does not know."""
    node.start()
    pid = node.agent_pid
    trial = node.launch(BOOTSEER_KEPT="trial")
    assert trial.wait(30) != 0 and "an agent runs already" in node.log
    assert node.agent_pid == pid


# Under the real systemd


def unit_for(node: Node) -> str:
    """The unit as it is installed, for the node of a test."""
    path = f"{Path(sys.executable).with_name('bootseer')}"
    text = UNIT.read_text().replace("/usr/bin/bootseer", path)
    extra = f"[Service]\nEnvironment=BOOTSEER_CONFIG={node.config}\nStandardError=append:{node.folder}/log\n"
    return text.replace("After=network-online.target remote-fs.target\n", "DefaultDependencies=no\n").replace(
        "[Service]\n", extra
    )


def main_pid(systemd: Systemd) -> int:
    return int(systemd.ctl("show", "bootseer-agent", "-p", "MainPID", "--value").stdout)


@needs_squashfuse
def test_the_unit_under_systemd(node: Node, systemd: Systemd) -> None:
    """A kill of the supervisor costs no mount; a stop leaves nothing."""
    folder, model = make_environment(node), make_file(node, "model.bin", 20 * 2**20)
    systemd.add("bootseer-agent.service", unit_for(node))
    systemd.ctl("start", "bootseer-agent")
    assert node.answers(), node.log
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model, ENV=folder)
    shown = attach(node, 1)
    script = "for each in /proc/[0-9]*; do echo $(stat -c %u $each):$(cat $each/oom_score_adj):$(cat $each/comm); done"
    scores = {tuple(line.split(":")) for line in systemd.run("sh", "-c", script, check=False).stdout.split()}
    show = systemd.ctl("show", "bootseer-agent", "-p", "OOMPolicy,OOMScoreAdjust").stdout
    assert set(show.split()) == {
        "OOMPolicy=continue",
        "OOMScoreAdjust=-900",
    }  # which needs CAP_SYS_RESOURCE here
    assert (str(ALICE), "500", "squashfuse_ll") in scores
    assert {score for uid, score, _ in scores if uid == str(ALICE)} == {"500"}
    with reader(f"/proc/{os.getpid()}/fd/{shown[str(model)]}", 4096) as each:
        for _ in range(3):
            pid = main_pid(systemd)
            systemd.run("kill", "-9", str(pid))
            wait_until(lambda pid=pid: main_pid(systemd) not in (0, pid) and node.answers())
        assert each.communicate(timeout=60) == (digest_of(model) + "\n", ""), node.log
    assert shown_text(shown[str(folder)]) == "thing"
    again = attach(node, 1)
    assert shown_text(again[str(folder)]) == "thing"
    for mount in (*shown.values(), *again.values()):
        os.close(mount)
    wait_until(lambda: systemd.ctl("is-active", "bootseer-agent", check=False).stdout == "active\n")
    pid = main_pid(systemd)
    systemd.ctl("reload", "bootseer-agent")
    wait_until(lambda: "loading the code anew" in node.log)
    wait_until(node.answers)
    assert node.jobs() == {1}
    assert main_pid(systemd) == pid
    systemd.ctl("restart", "bootseer-agent")
    assert node.jobs() == set() and squashfuses(node) == []
    systemd.ctl("stop", "bootseer-agent")
    show = systemd.ctl(
        "show", "bootseer-agent", "-p", "Result,NRestarts,ActiveState,NFileDescriptorStore"
    ).stdout
    assert {"Result=success", "ActiveState=inactive", "NFileDescriptorStore=0"} <= set(show.split()), show
    assert squashfuses(node) == []
    left = systemd.run(
        "find",
        "/sys/fs/cgroup",
        "-path",
        "*bootseer-agent*",
        "-name",
        "cgroup.procs",
        "-exec",
        "cat",
        "{}",
        ";",
    )
    assert left.stdout.split() == []


def test_a_stop_ends_what_users_left_in_the_service(node: Node, systemd: Systemd) -> None:
    """A process that a user's left behind, in a session of its own, is found in the service's cgroup."""
    systemd.add("bootseer-agent.service", unit_for(node))
    systemd.ctl("start", "bootseer-agent")
    cgroup = systemd.ctl("show", "bootseer-agent", "-p", "ControlGroup", "--value").stdout.strip()
    script = f"echo $$ > /sys/fs/cgroup{cgroup}/cgroup.procs && exec setsid --fork sleep 1000 < /dev/null > /dev/null 2>&1"
    systemd.run("sh", "-c", script)
    procs = f"/sys/fs/cgroup{cgroup}/cgroup.procs"
    names = f"for pid in $(cat {procs}); do cat /proc/$pid/comm; done"
    wait_until(lambda: "sleep" in systemd.run("sh", "-c", names, check=False).stdout.split())
    systemd.ctl("stop", "bootseer-agent")
    assert systemd.ctl("show", "bootseer-agent", "-p", "Result", "--value").stdout.strip() == "success"
    assert systemd.run("sh", "-c", f"cat {procs} 2>/dev/null", check=False).stdout.split() == []
