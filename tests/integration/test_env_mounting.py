"""Mounts that a user's squashfuse serves: what it does not answer harms nobody but its job."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from tests.integration.node import ALICE, Node, node, wait_until
from tests.integration.test_env_layer import change, make_large_venv
from tests.integration.test_service_recovery import (
    attach,
    make_environment,
    needs_squashfuse,
    shown_text,
    squashfuses,
)

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
    pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="needs squashfs-tools"),
    needs_squashfuse,
]
# What df(1) and health checks of a node do.
_DF = """
import os, sys
for line in open("/proc/self/mounts"):
    point = line.split()[1].encode().decode("unicode_escape")
    if point.startswith(sys.argv[1]):
        print(point, flush=True)
        try:
            os.stat(point), os.statvfs(point)
        except OSError as error:
            print(error)
"""


def df(folder: Path) -> str:
    """Ask all mounts below a folder. Raises TimeoutExpired."""
    return subprocess.run(
        [sys.executable, "-IS", "-c", _DF, folder], capture_output=True, text=True, check=True, timeout=10
    ).stdout


def test_who_stops_his_squashfuse_stops_nobody_on_the_host(node: Node) -> None:
    folder = make_environment(node)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    first = attach(node, 1)[str(folder)]
    (served,) = squashfuses(node)
    served.send_signal(signal.SIGSTOP)
    try:
        assert str(node.run / "blobs") in df(node.folder), "ours is on the host, and answers"
        assert mounts.mounts_below(node.run / "env") == []
        second = attach(node, 1)[str(folder)]
        with pytest.raises(subprocess.TimeoutExpired):  # who waits for it can be killed
            subprocess.run(
                ["cat", f"/proc/self/fd/{second}/thing.txt"], pass_fds=(second,), capture_output=True, timeout=1, check=False
            )  # fmt: skip
    finally:
        served.send_signal(signal.SIGCONT)
    assert shown_text(first) == shown_text(second) == "thing"
    os.close(first)
    os.close(second)
    served.send_signal(signal.SIGSTOP)
    node.ask("epilog", JOB_ID=1)
    wait_until(lambda: node.environments() == [] and squashfuses(node) == [])
    wait_until(lambda: list((node.run / "env").iterdir()) == [])


def test_who_stops_his_squashfuse_before_it_answers_starts_plain(node: Node) -> None:
    folder = make_environment(node)
    node.start("""
from bootseer_slurm.env import mounting
mounting._BEGIN_LIMIT_S = 1.0
real = mounting.Snapshot._serve
def serve(*arguments):
    process = real(*arguments)
    process.send_signal(19)
    return process
mounting.Snapshot._serve = serve
""")
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    assert attach(node, 1) == {}
    assert squashfuses(node) == [] and node.environments() == []
    node.ask("epilog", JOB_ID=1)
    assert [event["name"] for event in node.events(1) if event["kind"] == "fault"] == ["environment_not_used"]


def test_squashfuse_keeps_no_namespace_and_is_killed_before_the_agent(node: Node) -> None:
    folder = make_environment(node)
    supervisor = node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
    os.close(attach(node, 1)[str(folder)])
    (served,) = squashfuses(node)
    assert os.stat(f"/proc/{served.pid}/ns/mnt") == os.stat("/proc/self/ns/mnt")
    assert Path(f"/proc/{served.pid}/oom_score_adj").read_text().strip() == "500"
    assert [mount.fstype for mount in node.environments()] == ["fuse.squashfuse"]
    supervisor.kill()  # without systemd: the namespace goes with it, and squashfuse with that
    wait_until(lambda: squashfuses(node) == [])


@pytest.mark.parametrize("writable", [False, True])
def test_who_kills_his_squashfuse_has_nothing_unpacked(node: Node, writable: bool) -> None:
    """Killed just before its layers are put together."""
    folder = make_large_venv(node)
    node.bootseer("env", "save", str(folder))
    change(folder)
    node.bootseer("env", "save", str(folder))
    node.start(f"""
import psutil
from bootseer_slurm import mounts
real = mounts.mount
def mount(source, target, fstype, flags, data=None):
    for each in psutil.process_iter(["name", "cmdline"]) if fstype == "overlay" else ():
        if each.info["name"].startswith("squashfuse") and {str(node.folder)!r} in str(each.info["cmdline"]):
            each.kill()
            each.wait()
    real(source, target, fstype, flags, data)
mounts.mount = mount
""")
    profile = f'environments = ["{folder}"]\nwritable = {str(writable).lower()}\n'
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, PROFILE=profile)
    shown = attach(node, 1)
    unpacked = node.folder / "cache" / ".unpacked"
    assert not unpacked.exists() or not list(unpacked.iterdir())
    assert shown == {}
    node.ask("epilog", JOB_ID=1)
    faults = [event for event in node.events(1) if event["kind"] == "fault"]
    assert [event["name"] for event in faults] == ["environment_not_used"]
