"""Whose bytes a job is shown over which files: over another user's only that file's own, or what he or root published."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bootseer_slurm import mounts
from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.source import Opened, OriginalFile, Trust, stored_blob, unmanaged_id
from bootseer_slurm.blob.names import Name, file_fingerprint, user_folder, write_name
from bootseer_slurm.blob.published import is_published
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.writer import BlobWriter
from bootseer_slurm.errors import NotFound
from bootseer_slurm.identity import User
from bootseer_slurm.image.signing import Key, sign
from bootseer_slurm.job.session import Session
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.store import FileStore
from bootseer_slurm.userproc.memory_file import make_memory_file
from bootseer_slurm.userproc.protocol import StoredBlob
from tests.integration.node import ALICE, BOB
from tests.integration.test_job_session import OLD, Scene, asks, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be several users")
SIZE_BYTES = 300_000


class Site(Scene):
    """A node that several users have jobs on, and a store that they share."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        for name in ("store/users", "data"):
            (folder / name).mkdir()
            (folder / name).chmod(0o1777)
        self.store = FileStore(folder / "store")

    def session_of(self, uid: int, job_id: int = 7) -> Session:
        made = Session(Job(job_id, 0, uid, uid), "n1", self.settings, self.blobs, self.journal, self.spares)
        self.sessions.append(made)
        return made

    def original(self, owner: int, name: str = "module.so") -> Path:
        path = self.file(f"data/{name}", SIZE_BYTES)
        os.chown(path, owner, owner)
        path.chmod(0o644)
        return path

    def published(self, by: int, original: Path, content: bytes, **changes: Any) -> Name:
        """A blob of these bytes that stands for a file, made by a user with his own rights."""
        record = _as_user(by, lambda: self._write(original, content))
        if changes:
            path = next(self.part(by).glob("names/*.json"))
            path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return record

    def share(self, by: int, record: Name) -> None:
        _as_user(by, lambda: write_name(self.store, os.getuid(), replace(record, shared=True)))

    def _write(self, original: Path, content: bytes) -> Name:
        with tempfile.NamedTemporaryFile() as file:
            Path(file.name).write_bytes(content)
            os.utime(file.name, (OLD, OLD))
            blob, folder = BlobWriter(self.store).store_unnamed(Path(file.name), "checkpoint")
        record = Name("checkpoint", str(original), file_fingerprint(original.stat()), blob, folder, 1)
        write_name(self.store, os.getuid(), record)
        return record

    def part(self, uid: int) -> Path:
        return self.folder / "store" / user_folder(uid)

    def shown(self, session: Session, path: Path) -> bytes | None:
        """What a step of the job sees there once all of it has come; None: the original."""
        session.begin(asks(path), hook_start_ns=None)
        return self.seen(session)

    def seen(self, session: Session) -> bytes | None:
        """What a step of a job that has begun sees."""
        session.intake.wait_looked_up(10**9)
        until(lambda: all(each.handle.reader.blob.complete for each in session.artifacts.layers()))
        binds, _ = session.attach("0")
        seen = [Path(f"/proc/self/fd/{bind.fd}").read_bytes() for bind in binds]
        for bind in binds:
            os.close(bind.fd)
        assert len(seen) <= 1
        return seen[0] if seen else None


def _as_user(uid: int, work: Callable[[], Any]) -> Any:
    """The result of work in a child of this user's."""
    near, far = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.umask(0o077 if uid else 0o022)
            User(uid, uid, ()).become()
            os.write(far, pickle.dumps(work()))
        finally:
            os._exit(0)
    os.close(far)
    with open(near, "rb") as said:
        content = said.read()
    os.waitpid(child, 0)
    return pickle.loads(content)


@pytest.fixture
def site() -> Iterator[Site]:
    folder = Path(tempfile.mkdtemp(prefix="bootseer-site-"))
    folder.chmod(0o755)
    made = Site(folder)
    yield made
    made.close()
    shutil.rmtree(folder)


def refusals(session: Session) -> list[str]:
    return [str(event.message) for event in session.context.log.events() if event.name == "shadow_refused"]


def test_a_user_cannot_cover_a_file_of_roots(site: Site) -> None:
    """A module that sudo loads, a name record and a blob of the same size: from there the user was root."""
    module = site.original(0)
    site.published(BOB, module, os.urandom(SIZE_BYTES))
    session = site.session_of(BOB)
    assert site.shown(session, module) == module.read_bytes(), "it is read as it lies"
    (message,) = refusals(session)
    assert "belongs to user 0" in message


@pytest.mark.parametrize("how", ["hardlink_to", "symlink_to"])
def test_nor_by_another_name_of_it_that_is_his(site: Site, how: str) -> None:
    """The plugin mounts over the file that has this device and inode."""
    module = site.original(0)
    other = site.folder / "data" / "mine"
    getattr(other, how)(module)
    for name in (module, other):
        site.published(BOB, name, os.urandom(SIZE_BYTES))
    session = site.session_of(BOB)
    assert site.shown(session, other) == module.read_bytes() and len(refusals(session)) == 1


def test_nor_by_what_the_class_learned_or_after_a_restart(site: Site) -> None:
    module = site.original(ALICE)
    site.published(BOB, module, os.urandom(SIZE_BYTES))
    learned, recovered = site.session_of(BOB, 1), site.session_of(BOB, 2)
    learned.begin(asks(), hook_start_ns=None)
    learned.intake.request(Artifact(ArtifactRef("checkpoint", str(module)), by_job=False, owner=ALICE))
    assert site.seen(learned) == module.read_bytes() and len(refusals(learned)) == 1
    recovered.recover(asks(module), [layer.found for layer in learned.artifacts.layers()])
    assert site.seen(recovered) == module.read_bytes() and len(refusals(recovered)) == 1


@pytest.mark.parametrize("publisher", [ALICE, 0])
def test_a_colleague_sees_what_the_owner_or_root_published(site: Site, publisher: int) -> None:
    model, content = site.original(ALICE), os.urandom(SIZE_BYTES)
    record = site.published(publisher, model, content)
    if publisher:
        assert site.shown(site.session_of(BOB, 1), model) == model.read_bytes(), "he may not read the blob"
    site.share(publisher, record)
    session = site.session_of(BOB, 2)
    assert site.shown(session, model) == content and refusals(session) == []
    assert site.shown(site.session_of(ALICE, 3), model) == content
    assert site.shown(site.session_of(0, 4), model) == content


def test_what_the_owner_published_goes_before_what_the_user_did(site: Site) -> None:
    model, content = site.original(ALICE), os.urandom(SIZE_BYTES)
    site.published(BOB, model, os.urandom(SIZE_BYTES))
    site.share(ALICE, site.published(ALICE, model, content))
    session = site.session_of(BOB)
    assert site.shown(session, model) == content and refusals(session) == []


def test_a_user_takes_the_blobs_of_others_for_his_own_files_only(site: Site) -> None:
    """Root published something for all; over his own file a user may have whatever he likes."""
    model, content = site.original(BOB), os.urandom(SIZE_BYTES)
    site.published(0, model, content)
    assert site.shown(site.session_of(BOB), model) == content


def test_a_name_in_his_own_part_gives_another_publishers_blob_no_other_path(site: Site) -> None:
    """Root published one file; the user's record says that this is another of root's."""
    one, other = site.original(0, "one"), site.original(0, "other")
    record = site.published(0, one, os.urandom(SIZE_BYTES))
    site.published(BOB, other, os.urandom(SIZE_BYTES), blob=record.blob, folder=record.folder)
    assert site.shown(site.session_of(BOB, 1), other) in (None, other.read_bytes())
    mine = site.published(BOB, other, os.urandom(SIZE_BYTES))
    manifest = site.folder / "store" / mine.folder / "manifest"
    manifest.unlink()
    manifest.symlink_to(site.folder / "store" / record.folder / "manifest")
    path = next(path for path in site.part(BOB).glob("names/*.json") if mine.folder in path.read_text())
    path.write_text(json.dumps(json.loads(path.read_text()) | {"blob": record.blob}))
    assert site.shown(site.session_of(BOB, 2), other) in (None, other.read_bytes())


def test_a_squatted_part_of_the_store_is_nobodys(site: Site) -> None:
    model, hostile = site.original(ALICE), os.urandom(SIZE_BYTES)
    site.published(BOB, model, hostile)
    site.share(BOB, site.published(BOB, model, hostile))
    site.part(BOB).rename(site.part(ALICE))
    for path in site.part(ALICE).glob("names/*.json"):
        path.write_text(path.read_text().replace(user_folder(BOB), user_folder(ALICE)))
    assert site.shown(site.session_of(BOB), model) == model.read_bytes()


def test_a_file_that_gets_another_owner_is_not_covered(site: Site) -> None:
    model, content = site.original(BOB), os.urandom(SIZE_BYTES)
    site.published(BOB, model, content)
    session = site.session_of(BOB)
    assert site.shown(session, model) == content
    os.chown(model, 0, 0)
    assert site.seen(session) is None
    assert any("was given to another user" in str(event.message) for event in session.context.log.events())


def test_a_hostile_process_proves_nothing(site: Site, tmp_path: Path) -> None:
    """It hands over a descriptor for a manifest: of another place, of a file system of its own, or of no file."""
    model = site.original(ALICE)
    record = site.published(ALICE, model, b"a" * SIZE_BYTES)
    uri = f"file://{site.folder}/store"
    manifest = site.folder / "store" / record.folder / "manifest"

    def proves(path: Path, folder: str = record.folder, store: str = uri) -> bool:
        fd = os.open(path, os.O_RDONLY)
        try:
            return is_published(fd, folder, store)
        finally:
            os.close(fd)

    assert proves(manifest)
    assert not proves(manifest, user_folder(0) + record.folder.removeprefix(user_folder(ALICE)))
    assert not proves(manifest, store="hdfs://name:8020/store") and not proves(manifest, "/etc")
    elsewhere = tmp_path / record.folder / "manifest"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_bytes(manifest.read_bytes())
    os.chown(elsewhere, ALICE, ALICE)
    assert not proves(elsewhere)
    (site.folder / "link").symlink_to(site.folder / "store")
    assert proves(manifest, store=f"file://{site.folder}/link"), "the store's own path may have links"
    site.part(ALICE).chmod(0o777)
    assert not proves(manifest), "others may have put it there"
    site.part(ALICE).chmod(0o700)
    os.chown(manifest, BOB, BOB)
    assert not proves(manifest)
    os.chown(manifest, ALICE, ALICE)
    mounts.mount("tmpfs", manifest.parent, "tmpfs", 0)
    try:
        manifest.write_bytes(b"of a file system of another's")
        os.chown(manifest, ALICE, ALICE)
        assert not proves(manifest)
    finally:
        mounts.unmount(manifest.parent)


def test_where_the_store_has_no_files_the_sites_signature_tells(site: Site) -> None:
    """On HDFS and S3; and it is of that user's blob, not of any."""
    record = site.published(ALICE, site.original(ALICE), b"a" * SIZE_BYTES)
    content = (site.folder / "store" / record.folder / "manifest").read_bytes()
    key = Key(b"k" * 32)

    def publisher(signature: str, folder: str = record.folder) -> int | None:
        fd = make_memory_file(content)
        try:
            stored = StoredBlob(folder, 1, signature)
            process: Any = None
            trust = Trust("s3://bucket", key, lambda count: None)
            return stored_blob(lambda: process, Opened(process, stored.handle), stored, fd, trust).publisher
        finally:
            os.close(fd)

    assert publisher(sign(key, ALICE, record.blob)) == ALICE
    assert publisher("") is None and publisher(sign(key, BOB, record.blob)) is None
    assert publisher(sign(Key(b"x" * 32), ALICE, record.blob)) is None
    assert publisher(sign(key, ALICE, record.blob), "elsewhere/1/blobs/a") is None


def test_what_was_kept_of_anothers_file_before_owners_counted_is_not_believed(site: Site) -> None:
    """Its reader could reach into the process that read it. A job that has it mounted goes on, though."""
    module = site.original(0)
    status, path = module.stat(), str(module)
    assert unmanaged_id(path, status, BOB) != unmanaged_id(path, status, 0)
    session = site.session_of(BOB)
    assert site.shown(session, module) == module.read_bytes()
    (layer,) = session.artifacts.layers()
    assert layer.description.id == unmanaged_id(path, status, BOB)
    late = site.session_of(BOB, 8)
    for uid in (BOB, 0):
        found = OriginalFile("checkpoint", path, BOB, unmanaged_id(path, status, uid))
        assert found.open_again(late._process()) >= 0
    with pytest.raises(NotFound, match="was replaced"):
        replace(found, blob_id="file-" + "0" * 64).open_again(late._process())
