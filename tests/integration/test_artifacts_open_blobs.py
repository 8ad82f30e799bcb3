"""Kernel mounts that stay for the next start of a job on this node."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.image.signing import make_key
from tests.integration.node import ALICE, Node, node_of, wait_until
from tests.integration.test_env_layer import make_large_venv, saved, start_is_over, without_byte_code
from tests.integration.test_env_snapshot import contents, contents_of, end, names, pytestmark, shown

__all__ = ["pytestmark"]
OFTEN = "agent._TEND_EVERY_S = 0.1\n"


@pytest.fixture
def node() -> Iterator[Node]:
    """A node whose kernel mounts what the agent packed."""
    with node_of() as made:
        make_key(made.folder / "site.key")
        yield made


def mount_ids(node: Node) -> list[str]:
    """Of the kernel's mounts of images and snapshots, whoever uses them."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[0] for line in lines if f" {node.run}/images/" in line]


def file_read(node: Node) -> str:
    """The file that the one mount reads."""
    (mount,) = mounts.mounts_below(node.run / "images")
    return (Path("/sys/block") / Path(mount.source).name / "loop/backing_file").read_text().strip()


def start_with_all_in_the_cache(node: Node) -> Path:
    """An environment, started so that its snapshot is whole in the cache; the next job is 3."""
    root = make_large_venv(node)
    assert shown(node, 1, root) is None
    saved(node, 1)
    end(node, 1)
    view = shown(node, 2, root)
    assert view is not None, node.log
    contents(view)
    start_is_over(node, 2)
    (name,) = names(node)
    blocks = node.folder / f"cache/{ALICE}/{name['blob']}/data"
    wait_until(lambda: blocks.stat().st_blocks * 512 >= blocks.stat().st_size)
    end(node, 2, view)
    wait_until(lambda: file_read(node).endswith("/data"))  # the cache's
    return root


def start_and_end(node: Node, job: int, root: Path) -> list[dict[str, object]]:
    """The events of a job that reads all of an environment."""
    view = shown(node, job, root)
    assert view is not None, node.log
    assert without_byte_code(contents(view)) == without_byte_code(contents_of(root))
    return end(node, job, view)


def test_the_next_start_finds_the_mount(node: Node) -> None:
    node.start()
    root = start_with_all_in_the_cache(node)
    before = mount_ids(node)
    assert len(before) == 1
    for job in (3, 4):
        events = start_and_end(node, job, root)
        assert mount_ids(node) == before
    assert not [event for event in events if event["kind"] == "fault"]


def test_reads_that_the_kernel_answers_are_no_reason_to_bring_nothing(node: Node) -> None:
    node.start()
    root = start_with_all_in_the_cache(node)
    for job in (3, 4, 5):
        view = shown(node, job, root)
        assert view is not None
        contents(view)
        start_is_over(node, job)
        events = end(node, job, view)
        assert not [event for event in events if event["name"] == "unread"], job


def test_it_goes_when_nobody_used_it_for_long(node: Node) -> None:
    node.start(OFTEN + "from bootseer_slurm.artifacts import open_blobs\nopen_blobs._IDLE_S = 2.0\n")
    root = start_with_all_in_the_cache(node)
    start_and_end(node, 3, root)
    assert len(mount_ids(node)) == 1
    wait_until(lambda: mount_ids(node) == [])
    start_and_end(node, 4, root)


def test_no_more_stay_than_the_node_has_loop_devices_for(node: Node) -> None:
    node.start("from bootseer_slurm.artifacts import open_blobs\nopen_blobs._MOST_IDLE = 0\n")
    root = make_large_venv(node)
    assert shown(node, 1, root) is None
    saved(node, 1)
    end(node, 1)
    for job in (2, 3):
        start_and_end(node, job, root)
        wait_until(lambda: mount_ids(node) == [])


def test_a_blob_that_the_cache_removes_does_not_stay_on_the_disk(node: Node) -> None:
    node.start(OFTEN)
    root = start_with_all_in_the_cache(node)
    start_and_end(node, 3, root)
    (name,) = names(node)
    shutil.rmtree(node.folder / f"cache/{ALICE}/{name['blob']}")
    wait_until(lambda: mount_ids(node) == [])
    start_and_end(node, 4, root)


def test_a_mount_of_a_removed_blob_is_not_used(node: Node) -> None:
    node.start()
    root = start_with_all_in_the_cache(node)
    start_and_end(node, 3, root)
    (name,) = names(node)
    shutil.rmtree(node.folder / f"cache/{ALICE}/{name['blob']}")
    assert "(deleted)" in file_read(node)
    view = shown(node, 4, root)
    assert view is not None
    assert "(deleted)" not in file_read(node)
    end(node, 4, view)


def test_a_mount_that_somebody_took_away_is_no_reason_to_keep_the_blob(node: Node) -> None:
    node.start()
    root = start_with_all_in_the_cache(node)
    node.crash()  # the next agent does not know what the mount reads
    wait_until(lambda: mount_ids(node) == [])
    view = shown(node, 3, root)
    assert view is not None
    node.crash()
    wait_until(node.answers)
    (mount,) = mounts.mounts_below(node.run / "images")
    mounts.unmount(mount.point)
    end(node, 3, view)
    start_and_end(node, 4, root)
    assert "is not let go" not in node.log


@pytest.mark.parametrize("end_agent", ["stop", "kill"])
def test_it_does_not_outlive_its_agent(node: Node, end_agent: str) -> None:
    keeper = node.start()
    root = start_with_all_in_the_cache(node)
    start_and_end(node, 3, root)
    assert len(mount_ids(node)) == 1
    if end_agent == "stop":
        keeper.terminate()
        keeper.wait(30)
        assert mount_ids(node) == []
    else:
        node.crash()
        wait_until(lambda: mount_ids(node) == [])
        start_and_end(node, 4, root)
