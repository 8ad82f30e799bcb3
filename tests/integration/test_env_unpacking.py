"""Unpacking onto the node's disk: within bounds, whatever a squashfs says and its user does."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.squashfs import mksquashfs
from bootseer_slurm.env.unpacking import DiskBounds, Unpacked, _Watch
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User
from tests.integration.node import ALICE, node_of
from tests.integration.test_service_recovery import attach, make_environment

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root"),
    pytest.mark.skipif(shutil.which("unsquashfs") is None, reason="needs squashfs-tools"),
]
USER = User(ALICE, ALICE, ())
ROOMY = DiskBounds(2**30, 0)


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bootseer-unpack-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def image_of(home: Path, tree: Path) -> Path:
    image = home / "image.sqsh"
    subprocess.run(mksquashfs.from_rootfs(str(tree), str(image)), check=True, capture_output=True)
    image.chmod(0o444)
    return image


def a_tree(home: Path) -> Path:
    tree = home / "source"
    (tree / "lib").mkdir(parents=True)
    (tree / "lib" / "file").write_text("content")
    return tree


def test_what_is_within_bounds_is_unpacked_and_goes(home: Path) -> None:
    unpacked = Unpacked.unpack([image_of(home, a_tree(home))], home / "job" / "blob", USER, ROOMY)
    assert (unpacked.path / "lib/file").read_text() == "content"
    unpacked.close()
    assert not (home / "job").exists()


def test_a_bomb_of_bytes(home: Path) -> None:
    """A few kilobytes that are a gigabyte."""
    tree = a_tree(home)
    with (tree / "zeros").open("wb") as file:
        file.truncate(2**30)
    image = image_of(home, tree)
    assert image.stat().st_size < 2**20
    with pytest.raises(BootseerError, match=r"not unpacked: \d+ bytes"):
        Unpacked.unpack([image], home / "job" / "blob", USER, DiskBounds(2**28, 0))
    assert not (home / "job").exists()


def test_what_would_fill_the_disk(home: Path) -> None:
    disk = os.statvfs(home)
    bounds = DiskBounds(2**50, disk.f_blocks * disk.f_frsize)
    with pytest.raises(BootseerError, match="not unpacked"):
        Unpacked.unpack([image_of(home, a_tree(home))], home / "job" / "blob", USER, bounds)
    assert not (home / "job").exists()


def test_a_bomb_of_files(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = a_tree(home)
    for number in range(100):
        (tree / str(number)).touch()
    image, free = image_of(home, tree), os.statvfs(home).f_favail
    if not free:
        pytest.skip("this file system has no bound of inodes")
    monkeypatch.setattr("bootseer_slurm.env.unpacking._INODE_SHARE", free // 50)
    with pytest.raises(BootseerError, match=r"not unpacked: 10\d files"):
        Unpacked.unpack([image], home / "job" / "blob", USER, ROOMY)


def test_a_program_that_writes_more_than_its_image_holds_is_killed(home: Path) -> None:
    """Its user can make it do what he likes."""
    tree = home / "tree"
    tree.mkdir()
    process = subprocess.Popen(
        ["sh", "-c", "while :; do head -c 1000000 /dev/zero >> x$((i+=1)); done"], cwd=tree
    )
    with _Watch(process, tree, DiskBounds(20 * 10**6, 0)) as watch:
        process.wait(60)
    assert process.returncode == -9 and watch.reason == "it is more than 20000000 bytes"


def test_what_was_written_within_one_look_is_seen_too(home: Path) -> None:
    tree = home / "tree"
    tree.mkdir()
    process = subprocess.Popen(["sh", "-c", "head -c 1000000 /dev/zero > x"], cwd=tree)
    with _Watch(process, tree, DiskBounds(1000, 0)) as watch:
        process.wait(60)
    assert watch.reason


def test_a_tree_that_is_deeper_than_a_path_can_be_goes_too(home: Path) -> None:
    unpacked = Unpacked.unpack([image_of(home, a_tree(home))], home / "job" / "blob", USER, ROOMY)
    deep = "d=$(printf 'x%.0s' $(seq 200)); for i in $(seq 1500); do mkdir $d && cd -P $d || exit 0; done"
    subprocess.run(["bash", "-c", deep], cwd=unpacked.path, check=True, capture_output=True)
    unpacked.close()
    assert not (home / "job").exists()


@pytest.mark.fuse
@pytest.mark.skipif(not Path("/dev/fuse").exists(), reason="needs /dev/fuse")
def test_a_job_whose_snapshot_is_too_large_for_the_cache_starts_plain() -> None:
    with node_of() as node:
        text = node.config.read_text()
        node.config.write_text(text.replace("[cache]\n", '[cache]\nmax = "1MiB"\n'))
        folder = make_environment(node)
        with (folder / "zeros").open("wb") as file:
            file.truncate(2**26)
        os.chown(folder / "zeros", ALICE, ALICE)
        node.bootseer("env", "save", str(folder))
        node.start(
            "from bootseer_slurm.artifacts import environment\nenvironment.squashfuse = lambda *_, **__: []\n"
        )
        node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, ENV=folder)
        assert attach(node, 1) == {}
        unpacked = node.folder / "cache" / ".unpacked"
        assert not unpacked.exists() or not list(unpacked.iterdir())
        node.ask("epilog", JOB_ID=1)
        (fault,) = (event for event in node.events(1) if event["kind"] == "fault")
        assert fault["name"] == "environment_not_used" and "snapshot is not unpacked" in str(fault["message"])
