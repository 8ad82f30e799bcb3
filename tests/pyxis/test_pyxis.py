"""Containers under real pyxis and enroot: by path, by a registry's name, by the kernel, and in faults.

What each task prints is the digest of a large file in its image and the file system that it came through, so
a wrong byte, a container that was not entered, and a mount by other means all fail.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from scripts.lib.cluster.client import ALICE
from tests.pyxis.containers import HOME, Site

pytestmark = [pytest.mark.pyxis, pytest.mark.timeout(300)]

FUSE, KERNEL = "fuse.squashfuse", "squashfs"


@pytest.fixture(autouse=True)
def all_well(site: Site) -> Iterator[None]:
    """Agents run, links have no limit that matters, and afterwards nothing of a job is left."""
    yield
    site.cluster.script("link", "all", "1gbit")
    for node in site.cluster.nodes:
        site.cluster.agent(node, "start")


def assert_nothing_left(site: Site) -> None:
    """Epilogs run when srun has returned, and a name may go a little later than its last user."""
    deadline = time.monotonic() + 20
    for node in site.cluster.nodes:
        while left := site.left_over(node):
            assert time.monotonic() < deadline, f"left on {node}:\n{left}"
            time.sleep(0.2)


def test_pyxis_and_enroot_work_without_us(site: Site) -> None:
    assert site.run(f"{HOME}/app.sqsh", "--no-bootseer") == site.expected(FUSE)
    assert_nothing_left(site)


def test_an_image_given_as_a_path_is_shown_through_the_shadow(site: Site) -> None:
    assert site.run(f"{HOME}/app.sqsh", "--bootseer") == site.expected(FUSE, shadow=True)
    assert_nothing_left(site)


def test_a_container_is_saved_over_the_image_that_it_started_from(site: Site) -> None:
    home = site.cluster.shared / "home/alice"
    image, shown = home / "saved.sqsh", f"{HOME}/saved.sqsh"
    shutil.copy(home / "app.sqsh", image)
    os.chown(image, ALICE, ALICE)
    argv = ["srun", "-w", "n1", "--bootseer", f"--container-image={shown}", f"--container-save={shown}"]
    for note in ("", "one", "onetwo"):
        # What was saved before, and by what this container's image came: unpacked, from the shadow.
        script = f"cat /note /etc/start; printf {'one' if not note else 'two'} >> /note"
        done = site.cluster.exec(
            "login", *argv, "--container-writable", "sh", "-c", script, user="alice", timeout_s=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"{note}shadow"
        assert_nothing_left(site)
    image.unlink()


def test_a_registry_image_is_imported_once_and_then_comes_from_the_store(site: Site) -> None:
    before = site.fetched_layers()
    assert site.run(site.image, "--bootseer") == site.expected(KERNEL)
    assert site.fetched_layers() == before + 1, "one import for four tasks on two nodes"
    assert_nothing_left(site)
    site.cluster.script("drop-caches", "--bootseer")
    assert site.run(site.image, "--bootseer") == site.expected(KERNEL)
    assert site.fetched_layers() == before + 1, "the second start needs no layer"
    assert_nothing_left(site)


def test_squashfuse_mounts_it_where_the_site_says_so(site: Site) -> None:
    site.configure('[image]\nkernel_mount = "off"\n')
    try:
        assert site.run(site.image, "--bootseer") == site.expected(FUSE)
    finally:
        site.configure("")
    assert_nothing_left(site)


@pytest.mark.parametrize("image", [f"{HOME}/app.sqsh", "registry"])
def test_agents_killed_while_containers_read_cost_nothing(site: Site, image: str) -> None:
    name = site.image if image == "registry" else image
    mounted_by = KERNEL if image == "registry" else FUSE
    site.run(name, "--bootseer")  # it is in the store
    site.cluster.script("drop-caches", "--bootseer")
    # 24 MB take each node 2 s.
    site.cluster.script("link", "all", "100mbit")
    crashes = 0
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(site.run, name, "--bootseer")
        # Now and then: an agent that is killed again and again is started ever later.
        for _ in range(4):
            time.sleep(0.7)
            for node in site.cluster.nodes:
                done = site.cluster.script("agent", node, "crash", check=False)
                crashes += done.returncode == 0 and not start.done()
        starts = start.result()
    assert crashes >= 4
    # One that finds no agent at this very moment starts through squashfuse.
    kinds = {start.mounted_by for start in starts}
    assert kinds <= {mounted_by, FUSE}
    expected = site.expected(FUSE, shadow=image != "registry")
    assert [replace(start, mounted_by=FUSE) for start in starts] == expected
    assert_nothing_left(site)


@pytest.mark.parametrize("state", ["stop", "kill"])
def test_without_agents_enroot_imports(site: Site, state: str) -> None:
    for node in site.cluster.nodes:
        site.cluster.agent(node, state)
        site.cluster.exec(node, "sh", "-c", "rm -rf /run/enroot/cache-*")
    before = site.fetched_layers()
    assert site.run(site.image, "--bootseer") == site.expected(FUSE)
    assert site.fetched_layers() == before + 2, "each node for itself"
    assert_nothing_left(site)


def test_a_job_that_did_not_ask_imports_as_without_us(site: Site) -> None:
    before = site.fetched_layers()
    for node in site.cluster.nodes:
        site.cluster.exec(node, "sh", "-c", "rm -rf /run/enroot/cache-*")
    assert site.run(site.image) == site.expected(FUSE)
    assert site.fetched_layers() == before + 2
    assert_nothing_left(site)


def test_an_image_that_is_not_there_fails_with_the_reason(site: Site) -> None:
    argv = ["srun", "-w", "n1", "--bootseer", f"--container-image={site.image.replace(':1', ':none')}"]
    done = site.cluster.exec("login", *argv, "true", user="alice", timeout_s=60)
    assert done.returncode != 0, "the task must not run on the node instead"
    assert "none" in done.stderr
    assert_nothing_left(site)


def test_a_start_that_is_cancelled_leaves_nothing(site: Site) -> None:
    site.cluster.script("link", "all", "1mbit")
    site.cluster.script("drop-caches", "--bootseer")
    with ThreadPoolExecutor(1) as pool:
        argv = ["srun", "-w", "n1", "--bootseer", f"--container-image={site.image}", "true"]
        start = pool.submit(site.cluster.exec, "login", *argv, user="alice", timeout_s=120)
        time.sleep(3)
        site.cluster.exec("login", "scancel", "-u", "alice")
        said = start.result().stderr
        # What srun says depends on how far slurmstepd was: it takes no signals while pyxis imports.
        assert "CANCELLED" in said or "aborted before step completely launched" in said
    assert_nothing_left(site)
