"""Images in the store: made once, found, shown, checked, removed; and what goes wrong on the way."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bootseer_slurm.blob.gc import GRACE_S, collect_garbage
from bootseer_slurm.blob.names import list_names, read_name, user_folder
from bootseer_slurm.errors import NotFound
from bootseer_slurm.image import library, registry
from bootseer_slurm.image.reference import Folder, parse
from tests.integration.images import FILES, UID, Scene, scene, server
from tests.integration.registry import lacking, running_registry

__all__ = ["scene", "server"]
pytestmark = [
    pytest.mark.registry,
    pytest.mark.skipif(bool(lacking()), reason=f"not installed: {', '.join(lacking())}"),
]


def test_an_image_is_converted_once_for_all_its_tags(scene: Scene) -> None:
    digest = scene.push("1")
    assert scene.push("also") == digest
    first = scene.ensure("1")
    assert first.name == scene.reference("1").name and first.fingerprint == digest
    assert scene.ensure("1") == first
    other = scene.ensure("also")
    assert (other.name, other.folder) == (scene.reference("also").name, first.folder)
    pinned = library.ensure(scene.store, scene.reference().pinned(digest))
    assert pinned.folder == first.folder
    assert scene.conversions() == 1 and len(scene.blobs()) == 1
    names, _ = list_names(scene.store, UID)
    assert {name.name for name in names} == {first.name, other.name, pinned.name}
    assert os.listdir(scene.scratch) == []
    assert scene.content(first, "usr/lib/x") == "y" * 300_000


def test_a_tag_that_moved_is_imported_anew(scene: Scene) -> None:
    scene.push("1")
    old = scene.ensure()
    digest = scene.push("1", {**FILES, "new": b"new"})
    new = scene.ensure()
    assert new.fingerprint == digest != old.fingerprint
    assert scene.content(new, "new") == "new"
    assert scene.conversions() == 2
    assert read_name(scene.store, UID, scene.reference().name) == new


def test_the_digest_of_a_caller_is_believed(scene: Scene) -> None:
    digest = scene.push()
    scene.ensure(digest=digest)
    assert not any(line.endswith(scene.reference().name) for line in scene.calls()), (
        "the tag was not asked for"
    )


def test_a_registry_that_is_down(scene: Scene, tmp_path: Path) -> None:
    warnings: list[str] = []
    listener = library.Listener(warn=warnings.append)
    with running_registry(tmp_path / "own") as own:
        scene.server, scene.repository = own, f"{own.host}/x"
        scene.push()
        stored = scene.ensure(listener=listener)
        assert warnings == []
    assert scene.ensure(listener=listener) == stored
    assert len(warnings) == 1 and "in the store is used" in warnings[0]
    with pytest.raises(registry.RegistryUnreachable, match=f"image {scene.reference('2').name}: skopeo: "):
        scene.ensure("2")
    pinned = scene.reference().pinned(stored.fingerprint)
    assert library.ensure(scene.store, pinned, listener=listener).folder == stored.folder
    assert len(warnings) == 1, "a digest needs no registry"


def test_what_the_registry_does_not_have(scene: Scene) -> None:
    scene.push()
    with pytest.raises(NotFound, match="no such image"):
        scene.ensure("missing")
    scene.ensure()
    assert scene.store.list(f"{user_folder(UID)}/leases") == []


def test_many_at_once_make_one_import(scene: Scene) -> None:
    scene.push()
    pushes = [
        subprocess.Popen(
            [sys.executable, "-m", "bootseer_slurm", "image", "push", scene.reference().name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    said = [process.communicate(timeout=60) for process in pushes]
    assert [process.returncode for process in pushes] == [0, 0, 0], said
    assert scene.conversions() == 1 and len(scene.blobs()) == 1
    assert sorted(output.split("  ")[-1] for output, _ in said) == ["in the store already\n"] * 2 + [
        "stored\n"
    ]


def test_an_importer_that_was_killed_is_taken_over(scene: Scene) -> None:
    scene.push()
    stages: list[str] = []
    with scene.hanging() as process:
        process.kill()
        process.wait()
        (left,) = os.listdir(scene.scratch)
        record = scene.ensure(listener=library.Listener(stage=lambda text, _: stages.append(text)))
        assert f"waiting for process {process.pid} on {os.uname().nodename}" in stages
        assert scene.conversions() == 2 and len(scene.blobs()) == 1
        assert scene.content(record, "usr/lib/x").startswith("y")
        assert os.listdir(scene.scratch) == [], f"{left} was removed by its successor"
        assert scene.store.list(f"{user_folder(UID)}/leases") == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_conversion_that_is_stopped_leaves_nothing(scene: Scene, number: signal.Signals) -> None:
    scene.push()
    with scene.hanging() as process:
        process.send_signal(number)
        process.communicate(timeout=20)
        assert process.returncode not in (0, None)
        assert os.listdir(scene.scratch) == [] and scene.blobs() == []
        assert scene.store.list(f"{user_folder(UID)}/leases") == []
        pid = int(next(line for line in scene.calls() if " copy " in line).split()[0])
        assert not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]


def make_tree(folder: Path) -> Path:
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/sh").write_bytes(b"x" * 1000)
    (folder / "link").symlink_to("bin")
    return folder


def test_a_folder_is_packed_once_until_it_changes(scene: Scene) -> None:
    tree = make_tree(scene.folder / "tree")
    source = parse(f"dir:{tree}")
    assert isinstance(source, Folder)
    first = library.ensure(scene.store, source)
    assert library.ensure(scene.store, source) == first
    assert first.name == f"dir:{tree}" and scene.content(first, "bin/sh") == "x" * 1000
    (tree / "bin/sh").write_bytes(b"z" * 1000)
    second = library.ensure(scene.store, source)
    assert scene.content(second, "bin/sh") == "z" * 1000
    with pytest.raises(NotFound, match="no such folder"):
        library.ensure(scene.store, Folder(f"{tree}/nothing"))


def test_verify_finds_the_damaged_blocks(scene: Scene) -> None:
    scene.push(files={**FILES, "noise": os.urandom(3 * 2**20)})
    record = scene.ensure()
    seen: list[int] = []
    layout = library.show(scene.store, UID, record.name).layout
    assert library.verify(scene.store, UID, record.name, progress=seen.append) == []
    assert sum(seen) == layout.size_bytes
    file = scene.store_folder / record.folder / "0"
    with file.open("r+b") as opened:
        opened.seek(2 * layout.block_bytes + 17)
        byte = opened.read(1)
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte[0] ^ 1]))
    assert library.verify(scene.store, UID, record.name) == [2]
    os.truncate(file, layout.block_bytes + 1)
    assert library.verify(scene.store, UID, record.name) == list(range(1, layout.blocks))
    file.unlink()
    assert library.verify(scene.store, UID, record.name) == list(range(layout.blocks))


def test_list_show_and_remove(scene: Scene) -> None:
    scene.push("1")
    scene.push("2")
    first, second = scene.ensure("1"), scene.ensure("2")
    names, damaged = library.list_images(scene.store, UID)
    assert [each.name for each in names] == sorted(
        [first.name, second.name, scene.reference().pinned(first.fingerprint).name]
    )
    assert damaged == []
    shown = library.show(scene.store, UID, first.name)
    assert shown.name == first and second.name in shown.also and first.name not in shown.also
    assert not library.remove(scene.store, UID, first.name), "the other tag keeps the blob"
    assert scene.blobs() != []
    assert library.remove(scene.store, UID, second.name)
    assert scene.blobs() == [] and library.list_images(scene.store, UID) == ([], [])
    for use in (library.show, library.remove, library.verify):
        with pytest.raises(NotFound, match="not in the store"):
            use(scene.store, UID, first.name)


def age(path: Path, seconds: float = GRACE_S + 10) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_gc_takes_what_nothing_needs(scene: Scene) -> None:
    scene.push()
    kept = scene.ensure()
    user = scene.store_folder / user_folder(UID)
    for name in ("young", "old"):
        (user / f"blobs/{name}").mkdir()
        (user / f"blobs/{name}/0").write_bytes(b"12345")
    age(user / "blobs/old/0")
    age(user / "blobs/old")
    half, fresh = user / "names/.x.json.0123456789ab", user / "names/.y.json.0123456789ab"
    for file in (half, fresh, user / "leases/dead"):
        file.write_bytes(b"123")
    age(half)
    age(user / "leases/dead")
    found = collect_garbage(scene.store, UID)
    folder = user_folder(UID)
    assert sorted(found.removed) == [
        f"{folder}/blobs/old", f"{folder}/leases/dead", f"{folder}/names/.x.json.0123456789ab"
    ]  # fmt: skip
    assert found.size_bytes == 11 and found.marked == [] and found.problems == []
    assert fresh.exists() and (user / "blobs/young").exists()
    assert library.verify(scene.store, UID, kept.name) == []


def test_gc_waits_a_day_with_blobs_that_lost_their_names(scene: Scene) -> None:
    scene.push()
    old = scene.ensure()
    for name in library.list_images(scene.store, UID)[0]:
        (scene.store_folder / user_folder(UID) / "names").joinpath(f"{_sha(name.name)}.json").unlink()
    assert collect_garbage(scene.store, UID).marked == [old.folder]
    assert collect_garbage(scene.store, UID).removed == []
    age(scene.store_folder / old.folder / "unused")
    broken = scene.store_folder / user_folder(UID) / "names/broken.json"
    broken.write_text("{")
    found = collect_garbage(scene.store, UID)
    assert found.removed == [] and len(found.problems) == 1, "a damaged record may be of this blob"
    broken.unlink()
    assert collect_garbage(scene.store, UID).removed == [old.folder]
    again = scene.ensure()
    assert again.folder != old.folder and collect_garbage(scene.store, UID).marked == []


def _sha(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def test_a_damaged_record_is_made_anew(scene: Scene) -> None:
    scene.push()
    record = scene.ensure()
    for file in (scene.store_folder / user_folder(UID) / "names").iterdir():
        file.write_text('{"version": 1}')
    names, damaged = library.list_images(scene.store, UID)
    assert names == [] and len(damaged) == 2
    assert scene.ensure().blob and scene.conversions() == 2
    assert scene.ensure().fingerprint == record.fingerprint


def command(*words: str, group: str = "image") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bootseer_slurm", group, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )


def test_the_commands(scene: Scene) -> None:
    scene.push(files={**FILES, "noise": os.urandom(2**20)})
    name = scene.reference().name
    short = name.removeprefix("docker://")
    assert command("push", short).returncode == 0
    listed = command("list").stdout
    assert name in listed and listed.splitlines()[0].split() == ["image", "blob", "fingerprint", "pushed"]
    shown = command("show", short).stdout
    assert f"{user_folder(UID)}/blobs/" in shown and "of 64 KiB in 1 objects" in shown
    assert command("verify", short).stdout.endswith("blocks are right\n")
    record = read_name(scene.store, UID, name)
    assert record is not None
    os.truncate(scene.store_folder / record.folder / "0", 10)
    damaged = command("verify", short)
    assert damaged.returncode == 6 and "blocks are damaged in the store: 0, 1" in damaged.stderr
    assert command("gc", group="store").stdout == "0 removed, 0 bytes\n"
    assert command("rm", short).stdout == f"{name}  removed\n"
    assert command("rm", short).returncode == 4
    hostile = command("push", "docker://a;b\n/x")
    assert hostile.returncode == 2 and len(hostile.stderr.splitlines()) == 1


def test_a_file_is_pushed_as_before(scene: Scene) -> None:
    image = scene.folder / "i.sqsh"
    pack = ["mksquashfs", str(make_tree(scene.folder / "t")), str(image), "-quiet", "-no-progress"]
    subprocess.run(pack, check=True, capture_output=True)
    done = command("push", str(image))
    assert done.returncode == 0 and done.stdout.startswith(f"{image}  "), done.stderr
    record = read_name(scene.store, UID, str(image))
    assert record is not None and record.kind == "image"
    folder = command("push", str(scene.folder / "t"))
    assert folder.returncode == 2 and f"dir:{scene.folder / 't'}" in folder.stderr
    missing = command("push", str(scene.folder / "nothing.sqsh"))
    assert missing.returncode == 2 and "No such file" in missing.stderr
