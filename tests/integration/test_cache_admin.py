"""The cache as an admin sees it, and the commands, beside an agent and without one."""

from __future__ import annotations

import os
import time
from dataclasses import replace

import pytest
from click.testing import Result
from pytest_mock import MockerFixture
from typer.testing import CliRunner

from bootseer_slurm.blob.digest import BLAKE3, SHA256
from bootseer_slurm.cache.admin import evict, verify
from bootseer_slurm.cache.cache import PRESENT
from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cache import app
from bootseer_slurm.errors import InputError, IntegrityError
from tests.integration.cached import (
    BLOCK,
    BLOCKS,
    LAYOUT,
    Node,
    acquire,
    content,
    fill,
    flip,
    manifest,
    node,
    stored,
)

__all__ = ["node"]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the cache is root's")


def test_verify_and_gc_beside_what_is_in_use(node: Node) -> None:
    cache = node.cache()
    pinned = acquire(cache, 1, 0)
    fill(pinned, content(1))
    folder, gone = stored(cache, 2, used_s=2000), stored(cache, 3, used_s=1000)
    flip(folder / "data", 7 * BLOCK + 3)
    flip(pinned.file.path, 9)
    damage = {each.id: each for each in verify(node.root, node.live)}
    assert damage[folder.name].blocks == (7,) and damage[folder.name].mended
    assert damage[pinned.id].blocks == (0,) and not damage[pinned.id].mended
    assert pinned.complete, "what an agent uses is only reported"
    mended = acquire(cache, 2)
    assert mended.blocks.next_missing() == 7 and mended.blocks.states[:].count(PRESENT) == BLOCKS - 1
    cache.release(mended)
    os.utime(mended.folder.path / "used", (2000, 2000))

    removed = evict(node.root, node.live, 2 * (gone / "data").stat().st_blocks * 512)
    assert [each.id for each in removed] == [gone.name]
    assert [each.id for each in evict(node.root, node.live, 0)] == [folder.name]
    assert pinned.folder.path.exists()


@pytest.mark.parametrize("digest", [SHA256, BLAKE3])
@pytest.mark.parametrize("unmanaged", [False, True])
def test_verify_compares_the_digest_that_the_blob_has(node: Node, digest: str, unmanaged: bool) -> None:
    cache, layout = node.cache(), replace(LAYOUT, digest=digest)
    made = manifest(1, layout)
    if unmanaged:
        blob = cache.acquire("file-1", layout, None, 0, 0)
        blob.blocks.digests[:] = made.digests
    else:
        blob = cache.acquire(made.id, layout, made.digests, 0, 0)
    fill(blob, content(1))
    cache.release(blob)
    assert verify(node.root, node.live) == []
    flip(blob.file.path, 7 * BLOCK + 3)
    (damage,) = verify(node.root, node.live)
    assert damage.blocks == (7,) and damage.mended


def bootseer(node: Node, *words: str) -> Result:
    file = node.root.parent / "bootseer.toml"
    file.write_text(f'[cache]\npath = "{node.root}"\n[agent]\nsocket = "{node.live.parent}/agent.sock"\n')
    settings.name_config(file)
    try:
        return CliRunner().invoke(app, list(words))
    finally:
        settings.name_config(None)


def test_the_commands(node: Node) -> None:
    cache = node.cache()
    pinned = acquire(cache, 1, 0)
    fill(pinned, content(1), 0, BLOCKS // 2 - 1)
    folder = stored(cache, 2, used_s=time.time() - 3600)
    shown = bootseer(node, "show").output
    lines = {line.split()[1][:8]: line for line in shown.splitlines() if " image" in line}
    assert "root" in lines[pinned.id[:8]] and "50 %" in lines[pinned.id[:8]] and "yes" in lines[pinned.id[:8]]
    assert (
        "20001" in lines[folder.name[:8]]
        and "100 %" in lines[folder.name[:8]]
        and "1 h 00 min ago" in lines[folder.name[:8]]
    )
    assert (
        "yes" not in lines[folder.name[:8]]
        and "blobs: 2" in shown
        and "200.0 GiB" in shown.replace("200 GiB", "200.0 GiB")
    )
    result = bootseer(node, "verify")
    assert result.exit_code == 0 and "is right" in result.output
    flip(folder / "data", 0)
    result = bootseer(node, "verify")
    assert isinstance(result.exception, IntegrityError) and result.exception.exit_status == 6
    assert f"1 of {BLOCKS} blocks" in result.output and "will be fetched again" in result.output
    assert "removed: 0" in bootseer(node, "gc", "--to", "1GiB").output
    assert "removed: 1" in bootseer(node, "gc").output and not folder.exists() and pinned.folder.path.exists()
    (pinned.folder.path / "manifest").write_bytes(b"x")
    assert "damaged" in bootseer(node, "show").output


@pytest.mark.parametrize("command", ["show", "gc", "verify"])
def test_the_commands_are_roots(node: Node, command: str, mocker: MockerFixture) -> None:
    node.cache()
    mocker.patch("os.geteuid", return_value=1000)
    assert isinstance(bootseer(node, command).exception, InputError)


def test_verify_counts_checked_blocks_after_a_reboot(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    stored(node.cache(), 1)
    node.reboot(monkeypatch)
    read: list[int] = []
    assert verify(node.root, node.live, read.append) == [] and sum(read) == LAYOUT.size_bytes
    assert acquire(node.cache(), 1).complete
