"""A job whose checkpoint is on HDFS finds it as a file on its node."""

from __future__ import annotations

import os
import subprocess

import pytest

import bootseer_slurm
from bootseer_slurm.store import open_store
from tests.hdfs.conftest import Hdfs
from tests.integration.node import ALICE, Node, node

__all__ = ["node"]
pytestmark = [pytest.mark.fuse]
CONTENT = os.urandom(2**24) * 4


def given(node: Node, job: int, uri: str) -> str:
    """The path that a step of a new job is given for its checkpoint; "" without one."""
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, CHECKPOINT=uri)
    reply, fds = node.request("attach", JOB_ID=job, UID=ALICE, STEP_ID=0)
    for fd in fds:
        os.close(fd)
    values = dict(value.split("=", 1) for key, value in reply if key == "SETENV")
    return values.get("BOOTSEER_CHECKPOINT", "")


def read_as_alice(path: str) -> bytes:
    return subprocess.run(
        ["cat", path], user=ALICE, group=ALICE, extra_groups=[], capture_output=True, check=True
    ).stdout


def test_striped_or_as_it_lies(hdfs: Hdfs, node: Node) -> None:
    with bootseer_slurm.open(f"{hdfs.uri}/jobs/striped.pt", "wb") as file:
        file.write(CONTENT)
    open_store(f"{hdfs.uri}/jobs").write("plain.pt", CONTENT)
    node.start()
    for job, name in enumerate(("striped.pt", "plain.pt"), start=1):
        path = given(node, job, f"{hdfs.uri}/jobs/{name}")
        assert path, node.log
        assert read_as_alice(path) == CONTENT
        node.crash()
        assert read_as_alice(path) == CONTENT, "held by the next agent"
        node.ask("epilog", JOB_ID=job)
        events = node.events(job)
        fetched = [
            event["bytes"] for event in events if (event["kind"], event["name"]) == ("prefetch", "end")
        ]
        assert fetched and not [
            event for event in events if event["kind"] == "fault" and event["name"] != "agent_restarted"
        ]


def test_the_newest_of_a_folder_whose_files_have_no_paths(hdfs: Hdfs, node: Node) -> None:
    store = open_store(f"{hdfs.uri}/folder", plain=True)
    for step in (9, 10):
        with bootseer_slurm.open(f"{hdfs.uri}/folder/step_{step}/__0_0.distcp", "wb") as file:
            file.write(CONTENT)
        store.write(f"step_{step}/__1_0.distcp", CONTENT[::-1])
        store.write(f"step_{step}/.metadata", str(step).encode())
    node.start()
    path = given(node, 1, f"{hdfs.uri}/folder")
    assert path, node.log
    listed = subprocess.run(
        ["ls", "-A", path], user=ALICE, group=ALICE, extra_groups=[], capture_output=True, check=True
    )
    assert sorted(listed.stdout.split()) == [b".metadata", b"__0_0.distcp", b"__1_0.distcp"]
    assert read_as_alice(f"{path}/__0_0.distcp") == CONTENT
    assert read_as_alice(f"{path}/__1_0.distcp") == CONTENT[::-1]
    assert read_as_alice(f"{path}/.metadata") == b"10"
    node.ask("epilog", JOB_ID=1)
    node.events(1)


def test_it_is_written_again_while_a_job_reads_it(hdfs: Hdfs, node: Node) -> None:
    uri = f"{hdfs.uri}/jobs/again.pt"
    with bootseer_slurm.open(uri, "wb") as file:
        file.write(CONTENT)
    node.start()
    path = given(node, 1, uri)
    with bootseer_slurm.open(uri, "wb") as file:
        file.write(CONTENT[::-1])
    assert read_as_alice(path) == CONTENT
    later = given(node, 2, uri)
    assert read_as_alice(later) == CONTENT[::-1]
    for job in (1, 2):
        node.ask("epilog", JOB_ID=job)


def test_one_that_is_not_there(hdfs: Hdfs, node: Node) -> None:
    node.start()
    assert given(node, 1, f"{hdfs.uri}/jobs/none.pt") == ""
    node.ask("epilog", JOB_ID=1)
    assert any("no such checkpoint" in str(event.get("message")) for event in node.events(1))
