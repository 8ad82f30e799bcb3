"""A blob's way: writer, store, a real user's process, cache, reader; and what goes wrong on it."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from blake3 import blake3
from pytest_mock import MockerFixture

from bootseer_slurm import identity
from bootseer_slurm.artifacts.handle import BlobHandle, OpenBlob
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.artifacts.source import (
    BlobDescription,
    ObjectSource,
    Opened,
    OriginalFile,
    original_source,
    store_source,
)
from bootseer_slurm.blob.manifest import BLOCK_BYTES, Manifest, decode
from bootseer_slurm.blob.names import file_fingerprint, read_name, user_folder
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.trace import Recorder
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.cache.cache import MISSING, UNCHECKED, Cache
from bootseer_slurm.cache.datafile import DataFile
from bootseer_slurm.cache.reader import Reader
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fuse import Mount, Server
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.prefetch.budget import MemoryBudget
from bootseer_slurm.prefetch.scheduler import Scheduler
from bootseer_slurm.store import FileStore
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.client import Found, start_user_process
from bootseer_slurm.userproc.protocol import Resolve

SIZE_BYTES = 9 * 2**20 + 12345


class Scene:
    """A file, its striped blob in a store, and a process of this user."""

    def __init__(self, folder: Path) -> None:
        self.store_folder = folder / "store"
        self.store_folder.mkdir()
        self.store = FileStore(self.store_folder)
        self.file = folder / "model.bin"
        self.content = os.urandom(SIZE_BYTES)
        self.file.write_bytes(self.content)
        os.utime(self.file, (1_700_000_000, 1_700_000_000))
        fingerprint = file_fingerprint(self.file.stat())
        original = Original("checkpoint", str(self.file), fingerprint)
        self.name = BlobWriter(self.store, objects=3).store_named(self.file, original)
        self.blob_folder = self.store_folder / self.name.folder
        self.start()
        self.cache = Cache(folder / "cache", max_bytes=2**40, min_free_bytes=0, live=folder / "live")
        self.faults: list[str] = []

    def start(self) -> None:
        user = identity.User(os.getuid(), os.getgid(), ())
        self.process = start_user_process(user, f"file://{self.store_folder}", streams=4, timeout_s=5)

    def resolve(self, kind: str = "checkpoint", name: str = "") -> Found:
        found = self.process.resolve(Resolve(kind, name or str(self.file)))
        assert isinstance(found, Found)
        return found

    def reader(self, *, origin: bool = True) -> Reader:
        found = self.resolve()
        manifest = self.manifest(found)
        blob = self.cache.acquire(manifest.id, manifest.layout, manifest.digests, os.getuid(), os.getgid())
        reader = Reader(blob, mtime_ns=0)
        handle = found.reply.original_handle
        assert handle is not None
        stored, layout = found.reply.blobs[0], manifest.layout
        opened = Opened(self.process, stored.handle)
        sources = [store_source(lambda: self.process, manifest.id, stored.folder, layout, opened)]
        if origin:
            file, opened = (
                OriginalFile("checkpoint", str(self.file), os.getuid()),
                Opened(self.process, handle),
            )
            sources.append(original_source(lambda: self.process, file, layout, opened))
        reader.sources.add(User(sources, self.faults))
        return reader

    def manifest(self, found: Found) -> Manifest:
        manifest = decode(os.pread(found.manifest_fds[0], 2**20, 0))
        found.close()
        return manifest


class User:
    """Who uses a blob (cache.sources.BlobUser), and which faults it was told of."""

    def __init__(self, sources: list[ObjectSource], faults: list[str]) -> None:
        self.sources = sources
        self.on_fault = lambda name, _message: faults.append(name)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.process.kill()


def prefetch(reader: Reader) -> None:
    while reader.prefetch_run()[1]:
        pass


def corrupt(path: Path, offset: int) -> None:
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)


def test_prefetch_brings_every_byte_once(scene: Scene) -> None:
    reader = scene.reader()
    threads = [threading.Thread(target=prefetch, args=(reader,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reader.blob.complete
    assert reader.blob.file.path.read_bytes() == scene.content
    assert reader.usage.store_bytes == SIZE_BYTES, "one fetch for each block, whoever asks"
    assert reader.usage.origin_bytes == 0 and scene.faults == []


def test_a_demand_read_brings_what_is_missing_of_it_at_once(scene: Scene, mocker: MockerFixture) -> None:
    reader = scene.reader()
    read = mocker.spy(scene.process, "read")
    reader.fetch(300_000, 2**20)
    assert [call.args[3] for call in read.call_args_list] == [5 * BLOCK_BYTES]
    assert reader.usage.miss_bytes == 2**20


def test_demand_reads_give_the_right_bytes(scene: Scene) -> None:
    reader = scene.reader()
    for offset, size in ((0, 1), (262143, 2), (5_000_000, 1_000_000), (SIZE_BYTES - 10, 100)):
        assert reader.ready(offset, size) is None
        assert bytes(reader.fetch(offset, size)) == scene.content[offset : offset + size]
    assert reader.ready(5_000_000, 1_000_000) == reader.blob.file.fd


def test_a_corrupt_stripe_is_never_shown(scene: Scene) -> None:
    corrupt(scene.blob_folder / "1", 77)
    reader = scene.reader()
    prefetch(reader)
    assert reader.blob.file.path.read_bytes() == scene.content
    assert scene.faults == ["corrupt_block"]
    assert 0 < reader.usage.origin_bytes < SIZE_BYTES


def test_wrong_bytes_that_are_mended_soon_are_waited_for(scene: Scene) -> None:
    stripe = scene.blob_folder / "0"
    right = stripe.read_bytes()
    corrupt(stripe, 5)
    reader = scene.reader(origin=False)
    mended = threading.Timer(1.5, stripe.write_bytes, [right])
    mended.start()
    assert bytes(reader.fetch(0, 100)) == scene.content[:100]
    mended.join()
    assert scene.faults == ["corrupt_block"]


def test_a_manifest_that_is_mended_soon_is_waited_for(scene: Scene) -> None:
    reader = scene.reader(origin=False)
    scene.process.kill()
    scene.start()
    manifest = scene.blob_folder / "manifest"
    right = manifest.read_bytes()
    corrupt(manifest, 200)
    mended = threading.Timer(1.5, manifest.write_bytes, [right])
    mended.start()
    assert bytes(reader.fetch(0, 100)) == scene.content[:100]
    mended.join()


def test_a_silent_store_is_waited_for_where_the_original_has_other_bytes(scene: Scene) -> None:
    """The store may come back, and it alone has the right bytes."""
    reader = scene.reader()
    store, original = reader.sources.all
    answers = iter([StoreError("the server hiccups"), IntegrityError("was changed")])

    def fail_once(source: ObjectSource) -> Any:
        read = source.read

        def failing(*args: Any, **kwargs: Any) -> Any:
            if error := next(answers, None):
                raise error
            return read(*args, **kwargs)

        return failing

    for source in (store, original):
        source.read = fail_once(source)  # type: ignore[attr-defined, method-assign]
    assert bytes(reader.fetch(0, 100)) == scene.content[:100]


def test_corrupt_everywhere_is_an_error_not_wrong_bytes(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bootseer_slurm.cache.reader._DAMAGE_PATIENCE_S", 0.5)
    corrupt(scene.blob_folder / "0", 5)
    reader = scene.reader(origin=False)
    with pytest.raises(OSError) as caught:
        reader.fetch(0, 100)
    assert caught.value.errno == 5
    assert "read_failed" in scene.faults
    assert bytes(reader.fetch(5_000_000, 10)) == scene.content[5_000_000:5_000_010], (
        "the rest is still served"
    )


@pytest.mark.parametrize("damage", ["missing", "truncated", "manifest", "digest", "record"])
def test_a_damaged_blob_gives_a_warning_and_the_original(scene: Scene, damage: str) -> None:
    if damage == "missing":
        (scene.blob_folder / "2").unlink()
    elif damage == "truncated":
        os.truncate(scene.blob_folder / "2", 100)
    elif damage == "manifest":
        corrupt(scene.blob_folder / "manifest", 200)
    elif damage == "digest":
        manifest = scene.blob_folder / "manifest"
        manifest.write_bytes(manifest.read_bytes().replace(b"blake3", b"blake9"))
    else:
        record = next((scene.store_folder / user_folder(os.getuid()) / "names").iterdir())
        record.write_text('{"version": 1}')
    found = scene.resolve()
    found.close()
    reply = found.reply
    assert not reply.blobs and reply.original_handle is not None
    assert reply.warning
    assert ("'blake9', which this version does not know" in reply.warning) == (damage == "digest")


def test_a_changed_original_is_not_the_blob(scene: Scene) -> None:
    with scene.file.open("ab") as file:
        file.write(b"more")
    found = scene.resolve()
    found.close()
    assert not found.reply.blobs
    assert "was changed" in found.reply.warning
    assert not scene.process.is_same(
        protocol.IsSame("checkpoint", str(scene.file), scene.name.fingerprint), timeout_s=5
    )


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("image", lambda path: None, "No such file"),
        ("image", lambda path: path.write_bytes(b"x" * 4096), "not a squashfs"),
        ("image", lambda path: path.write_bytes(b"hsqs"), "too short"),
        ("environment", lambda path: path.mkdir(), "not a Python environment"),
        ("environment", lambda path: path.write_text(""), "not a directory"),
        ("checkpoint", lambda path: os.mkfifo(path), "not a regular file"),
        ("image", lambda path: path.symlink_to(path), "symbolic links|Symlink loop"),
    ],
)
def test_what_cannot_be_used_is_said(
    scene: Scene, tmp_path: Path, kind: str, make: Callable[[Path], object], message: str
) -> None:
    path = tmp_path / "thing"
    make(path)
    with pytest.raises(BootseerError, match=message):
        scene.resolve(kind, str(path))


@pytest.mark.skipif(shutil.which("mksquashfs") is None, reason="no mksquashfs")
def test_a_truncated_image_is_said(scene: Scene, tmp_path: Path) -> None:
    image = tmp_path / "i.sqsh"
    os.system(f"mksquashfs {scene.store_folder} {image} -quiet -no-progress >/dev/null")
    os.truncate(image, image.stat().st_size // 2)
    with pytest.raises(InputError, match="truncated"):
        scene.resolve("image", str(image))


def test_a_full_disk_keeps_serving(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = scene.reader()
    monkeypatch.setattr(DataFile, "write", lambda file, offset, view: False)
    assert bytes(reader.fetch(262_000, 600_000)) == scene.content[262_000:862_000]
    assert scene.faults == ["cache_full"]
    assert not reader.blob.blocks.has(0, 0)


def test_the_process_killed_fails_reads_and_nothing_hangs(scene: Scene) -> None:
    reader = scene.reader()
    scene.process.kill()
    start = time.monotonic()
    with pytest.raises(StoreError):
        reader.prefetch_run()
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("lost", ["nothing", "blob"])
def test_the_next_process_opens_all_again(scene: Scene, lost: str) -> None:
    reader = scene.reader()
    reader.fetch(0, 100)
    scene.process.kill()
    scene.start()
    if lost == "blob":
        shutil.rmtree(scene.blob_folder)
    assert bytes(reader.fetch(5_000_000, 1_000_000)) == scene.content[5_000_000:6_000_000]
    assert bool(reader.usage.origin_bytes) == (lost == "blob")


@pytest.mark.fuse
def test_who_waits_for_a_store_that_is_silent_is_given_the_original(
    scene: Scene, tmp_path: Path, mocker: MockerFixture
) -> None:
    mocker.patch("bootseer_slurm.userproc.client._DEMAND_TIMEOUT_S", 0.5)
    stripe = scene.blob_folder / "0"
    mount = Mount.open(tmp_path / "hung")
    server = Server(mount, tmp_path / "nodes")
    hung = HungFile(stripe.stat().st_size)
    try:
        server.start()
        subprocess.run(["mount", "--bind", server.add("0/stripe", hung), stripe], check=True)
        reader = scene.reader()
        assert bytes(reader.fetch(0, 100)) == scene.content[:100]
        assert (
            reader.usage.origin_bytes and not reader.usage.store_bytes and scene.faults == ["source_failed"]
        )
        assert not scene.process.ended
    finally:
        hung.released.set()
        subprocess.run(["umount", "-l", stripe], check=True)
        mount.close()
        server.stop()


class HungFile:
    """A file that can be opened, and whose bytes do not come (fuse.File)."""

    uid, gid, mtime_ns, patience_s = os.getuid(), os.getgid(), 0, 900.0

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.released = threading.Event()

    def ready(self, offset: int, size: int) -> int | None:
        return None

    def fetch(self, offset: int, size: int) -> bytes:
        self.released.wait(60)
        raise OSError(5, "no bytes")


def test_a_read_waits_no_longer_than_its_file_allows(scene: Scene) -> None:
    reader = scene.reader()
    scene.process.kill()
    reader.patience_s = 1.0
    block = 5_000_000 // BLOCK_BYTES
    assert reader.blob.blocks.claim(block, block)[0] == 1, "somebody fetches it, and does not get it"
    for offset in (0, 5_000_000):
        with pytest.raises(OSError, match="Input/output"):
            reader.fetch(offset, 100)


def test_state_survives_a_restart(scene: Scene) -> None:
    reader = scene.reader()
    reader.fetch(0, 2**20)
    scene.cache.release(reader.blob)
    again = scene.reader()
    assert again.ready(0, 2**20) is not None
    assert os.pread(again.blob.file.fd, 2**20, 0) == scene.content[: 2**20]
    assert not again.blob.complete


def test_an_eviction_that_was_cut_off_leaves_no_wrong_bytes(scene: Scene) -> None:
    reader = scene.reader()
    prefetch(reader)
    scene.cache.release(reader.blob)
    reader.blob.file.path.unlink()
    again = scene.reader()
    assert again.blob.present_bytes == 0
    assert again.fetch(0, 100) == scene.content[:100]


def test_blocks_of_a_failed_read_are_prefetched_again(scene: Scene, mocker: MockerFixture) -> None:
    reader, failed = scene.reader(origin=False), []
    read = scene.process.read

    def fail_once(*args: Any, **kwargs: Any) -> Any:
        if not failed:
            failed.append(args)
            time.sleep(0.3)  # the other streams go on meanwhile
            raise StoreError("the server hiccups")
        return read(*args, **kwargs)

    mocker.patch.object(scene.process, "read", fail_once)
    log = EventLog(1, 0, "n1")
    faults: list[str] = []
    config = PrefetchConfig(streams=4)
    phase, user = JobPhase(), User([], faults)
    bringing = Scheduler(scene.process.link, config, MemoryBudget(), phase, log, user.on_fault)
    nobody: Any = None
    handle = BlobHandle(nobody, OpenBlob(reader, nobody, Path()), [], user.on_fault, warm=False)
    description = BlobDescription("model", reader.blob.layout, None)
    bringing.add(Layer(ArtifactRef("checkpoint", "/model"), description, handle, "/model", "key", "/model"))
    deadline = time.monotonic() + 10
    while '"name":"end"' not in log.to_jsonl() and time.monotonic() < deadline:
        time.sleep(0.01)
    phase.end()
    bringing.stop()
    bringing.join(5)
    assert reader.blob.complete and failed and not faults
    assert '"name":"stopped"' not in log.to_jsonl()


def unchecked(reader: Reader) -> None:
    """As after a reboot: the bytes are in the cache, and nobody compared them since."""
    reader.blob.blocks.states[:] = bytes([UNCHECKED]) * reader.blob.layout.blocks


def test_what_an_earlier_boot_left_is_compared_and_not_fetched(scene: Scene) -> None:
    reader = scene.reader()
    prefetch(reader)
    unchecked(reader)
    fetched_bytes = reader.usage.store_bytes
    assert reader.ready(0, 100) is None
    assert reader.fetch(300_000, 2**20) == scene.content[300_000 : 300_000 + 2**20]
    prefetch(reader)
    assert reader.blob.complete and scene.faults == []
    assert reader.usage.store_bytes == fetched_bytes


def test_what_changed_since_an_earlier_boot_is_fetched_again(scene: Scene) -> None:
    reader = scene.reader()
    prefetch(reader)
    unchecked(reader)
    os.pwrite(reader.blob.file.fd, b"wrong", 3 * BLOCK_BYTES)
    reader.blob.blocks.states[4] = MISSING
    assert reader.fetch(3 * BLOCK_BYTES, 2 * BLOCK_BYTES) == scene.content[3 * BLOCK_BYTES : 5 * BLOCK_BYTES]
    assert scene.faults == ["corrupt_block"]
    prefetch(reader)
    assert reader.blob.file.path.read_bytes() == scene.content


def test_reads_are_recorded_whether_they_wait_or_not(scene: Scene) -> None:
    reader = scene.reader()
    recorder = Recorder(reader.blob.layout.blocks, begin_s=time.monotonic())
    reader.add_recorder(recorder)
    for _ in range(2):
        if reader.ready(BLOCK_BYTES, BLOCK_BYTES + 1) is None:
            reader.fetch(BLOCK_BYTES, BLOCK_BYTES + 1)
    assert [block for block, _ in recorder.touches] == [1, 2]
    assert (reader.usage.reads, reader.usage.reads_blocked) == (2, 1)
    reader.remove_recorder(recorder)
    reader.ready(0, 1)
    assert recorder.count == 2


def test_pushed_bytes_are_right_and_were_readable_before(scene: Scene) -> None:
    reader, pushed = scene.reader(), {}

    def push(offset: int, view: memoryview) -> None:
        # The kernel waits here for a read of the same pages, which must not wait for us.
        assert reader.ready(offset, len(view)) is not None
        pushed[offset] = bytes(view)

    block = reader.prefetch_blocks(2, 5, 2 * BLOCK_BYTES, push=push)
    assert block == 4 and reader.usage.pushed_bytes == 2 * BLOCK_BYTES
    assert pushed == {2 * BLOCK_BYTES: scene.content[2 * BLOCK_BYTES : 4 * BLOCK_BYTES]}
    assert reader.prefetch_blocks(4, 5, 2**20) == 6
    assert len(pushed) == 1 and reader.usage.pushed_bytes == 2 * BLOCK_BYTES


def test_a_push_that_fails_costs_nothing(scene: Scene) -> None:
    reader = scene.reader()

    def push(_offset: int, _view: memoryview) -> None:
        raise OSError(2, "no such inode")

    reader.prefetch_blocks(0, 0, 2**20, push=push)
    assert reader.blob.blocks.has(0, 0) and reader.usage.pushed_bytes == 0 and scene.faults == []


def test_each_user_of_a_blob_is_told_of_a_fault_once(scene: Scene) -> None:
    reader, second = scene.reader(), []
    reader.sources.add(User([], second))
    for index in range(3):
        corrupt(scene.blob_folder / str(index), 0)
    reader.fetch(0, SIZE_BYTES)
    assert scene.faults == ["corrupt_block"] and second == ["corrupt_block"]


def test_a_file_changed_while_it_is_stored_is_refused(scene: Scene, tmp_path: Path) -> None:
    path = tmp_path / "growing"
    path.write_bytes(b"x" * 10_000_000)
    os.utime(path, (1_700_000_000, 1_700_000_000))

    def touch(_: int) -> None:
        os.utime(path)

    with pytest.raises(BootseerError, match="changed while"):
        BlobWriter(scene.store, progress=touch).store_named(path, Original("image", "n", "f"))
    assert read_name(scene.store, os.getuid(), "n") is None
    assert scene.store.list(f"{user_folder(os.getuid())}/blobs") == [scene.name.folder.split("/")[-1]]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_the_process_has_only_its_users_rights(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"x" * 5000)
    secret.chmod(0o600)
    for folder in (tmp_path, *tmp_path.parents):
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o011)
    process = start_user_process(
        identity.User(20001, 20001, ()), f"file://{tmp_path}", streams=1, timeout_s=5
    )
    try:
        with pytest.raises(StoreError, match="Permission denied"):
            process.resolve(Resolve("checkpoint", str(secret)))
        pid = process._channel._process.pid
        status = Path(f"/proc/{pid}/status").read_text()
        assert "Uid:\t20001\t20001\t20001\t20001" in status
        assert Path(f"/proc/{pid}/mem").stat().st_uid == 0, "not dumpable: its user cannot trace it"
    finally:
        process.kill()


def test_digests_are_of_the_blocks(scene: Scene) -> None:
    manifest = scene.manifest(scene.resolve())
    assert manifest.layout.digest == "blake3"
    assert manifest.digest(1) == blake3(scene.content[262144:524288]).digest()


def test_a_cache_that_takes_no_more_writes_serves_what_it_fetches(scene: Scene, tmp_path: Path) -> None:
    """As on a disk that failed: its file system is read-only from then on."""
    reader = scene.reader()
    fd = os.open(reader.blob.file.path, os.O_RDONLY)
    os.dup2(fd, reader.blob.file.fd)
    os.close(fd)
    assert bytes(reader.fetch(262_000, 600_000)) == scene.content[262_000:862_000]
    assert scene.faults == ["cache_full"] and reader.blob.file.full
