"""A session without an agent: real processes of its user and a real cache; no FUSE file system."""

from __future__ import annotations

import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from bootseer_slurm import config
from bootseer_slurm.artifacts.artifact import State
from bootseer_slurm.artifacts.open_blobs import OpenBlobs
from bootseer_slurm.artifacts.resolved import Original
from bootseer_slurm.blob.names import file_fingerprint
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.writer import BlobWriter
from bootseer_slurm.blob.writer import Original as OriginalRecord
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.fuse import Server
from bootseer_slurm.job.journal import Journal
from bootseer_slurm.job.request import Request
from bootseer_slurm.job.session import Session
from bootseer_slurm.mounts import Namespace
from bootseer_slurm.phase import Phase
from bootseer_slurm.shares import NodeShares, Share
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.store import FileStore
from bootseer_slurm.userproc.spare import Spares

OLD = 1_700_000_000


class Files:
    """The files that a FUSE server would show."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()

    def known(self, _name: str) -> bool:
        return False

    def add(self, name: str, _reader: object) -> Path:
        self.names.add(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        return path

    def remove(self, name: str) -> None:
        self.names.remove(name)


class Scene:
    """A node's folders, and the sessions on it."""

    def __init__(self, folder: Path, node: str = "n1", site: Path | None = None) -> None:
        """site: has the site's key and the store, for several nodes; without it, `folder` has."""
        self.folder = folder
        site = site or folder
        self.node = node
        settings = folder / "bootseer.toml"
        settings.write_text(
            f'[store]\nuri = "file://{site}/store"\n[image]\nsite_key = "{site}/site.key"\n'
            f'[cache]\npath = "{folder}/cache"\n[agent]\nmounts = "{folder}/run"\n[shadow]\nroots = ["{site}"]\n'
        )
        self.settings = config.load(settings)
        for path in (folder / "run", folder / "home", site / "store"):
            path.mkdir(exist_ok=True)
        self.files = Files(folder / "fuse")
        cache = Cache(folder / "cache", max_bytes=2**40, min_free_bytes=0, live=folder / "live")
        servers = {name: cast(Server, self.files) for name in ("blobs", "checkpoints")}
        self.blobs = OpenBlobs(cache, servers, folder / "images", Namespace.create())
        self.journal = Journal(folder / "home")
        self.spares = Spares(with_peers=False)
        self.sessions: list[Session] = []

    def session(self, job_id: int = 7, nodelist: str = "") -> Session:
        job = Job(job_id, 0, os.getuid(), os.getgid(), nodelist)
        made = Session(job, self.node, self.settings, self.blobs, self.journal, self.spares)
        self.sessions.append(made)
        return made

    def close(self) -> None:
        for session in self.sessions:
            session.end("the test is over")
        self.spares.close()

    def file(self, name: str = "model.bin", size_bytes: int = 3 * 2**20) -> Path:
        path = self.folder / name
        path.write_bytes(os.urandom(size_bytes))
        os.utime(path, (OLD, OLD))
        return path


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def asks(*paths: Path) -> Request:
    return Request(observe=False, wanted=tuple(ArtifactRef("checkpoint", str(path)) for path in paths))


def named(session: Session) -> list[tuple[str, str]]:
    return [(event.kind, event.name) for event in session.context.log.events()]


def test_a_job_begins_trains_and_ends(scene: Scene) -> None:
    model, session = scene.file(), scene.session()
    session.begin(asks(model), hook_start_ns=1)
    (artifact,) = session.artifacts.all()
    until(
        lambda: bool(session.artifacts.layers()) and session.artifacts.layers()[0].handle.reader.blob.complete
    )
    assert artifact.state is State.READY and artifact.resolved is not None
    assert artifact.resolved.layers[0].handle.blob.bind_path().read_bytes() == model.read_bytes()
    assert session.context.phase.now is Phase.STARTING
    session.mark("training_started", t_ns=2, step="0", task=0)
    until(lambda: session.context.phase.now is Phase.TRAINING)
    session.end("job ended")
    session.end("job ended twice")
    assert session.context.phase.now is Phase.ENDED and artifact.state is State.CLOSED
    assert scene.files.names == set() and not list((scene.folder / "home/events").iterdir())
    events = named(session)
    assert events[0] == ("hook", "begin") and events.count(("session", "end")) == 1
    assert ("access", "start") in events and ("access", "summary") in events
    stored = list((scene.folder / "store").rglob("n1.jsonl"))
    assert len(stored) == 1 and '"name":"end"' in stored[0].read_text()


def test_an_end_while_something_is_resolved_leaves_nothing(scene: Scene) -> None:
    session = scene.session()
    process = session._process()
    os.kill(process._channel._process.pid, signal.SIGSTOP)
    session.begin(asks(scene.file()), hook_start_ns=None)
    (artifact,) = session.artifacts.all()
    until(lambda: artifact.state is State.RESOLVING)
    begin_s = time.monotonic()
    threading.Timer(0.3, lambda: os.kill(process._channel._process.pid, signal.SIGCONT)).start()
    session.end("job ended")
    assert time.monotonic() - begin_s < 15
    assert artifact.state is State.CLOSED and artifact.looked_up.is_set() and artifact.begun.is_set()
    assert session.artifacts.layers() == [] and scene.files.names == set()


def test_two_jobs_of_one_user_share_a_blob_until_the_last_ends(scene: Scene) -> None:
    model, first, second = scene.file(), scene.session(1), scene.session(2)
    for session in (first, second):
        session.begin(asks(model), hook_start_ns=None)
        session.intake.wait_looked_up(time.monotonic() + 10)
    one, other = (session.artifacts.layers()[0].handle for session in (first, second))
    assert one is not other and one.reader is other.reader and len(scene.files.names) == 1
    first.end("job ended")
    assert len(scene.files.names) == 1 and other.reader.sources.all == tuple(other.sources)
    assert other.reader.fetch(0, 100) == model.read_bytes()[:100]
    second.end("job ended")
    assert scene.files.names == set()


def test_what_fails_is_told_once_and_the_rest_goes_on(scene: Scene) -> None:
    model, session = scene.file(), scene.session()
    gone = scene.folder / "gone.bin"
    session.begin(asks(gone, model), hook_start_ns=None)
    session.intake.wait_looked_up(time.monotonic() + 10)
    states = {artifact.ref.name: artifact.state for artifact in session.artifacts.all()}
    assert states == {str(gone): State.FAILED, str(model): State.READY}
    assert named(session).count(("fault", "checkpoint_not_used")) == 1


def test_a_folder_is_asked_for_once_and_its_files_one_by_one(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scene.folder / "ckpt" / "step_1"
    folder.mkdir(parents=True)
    for name in ("a.distcp", "b.distcp", ".metadata"):
        os.utime(scene.file(f"ckpt/step_1/{name}", 1000), (OLD, OLD))
    session = scene.session()
    asked: list[str] = []
    resolve = type(session._process()).resolve

    def note(process: Any, request: Any) -> Any:
        asked.append(request.name)
        return resolve(process, request)

    monkeypatch.setattr(type(session._process()), "resolve", note)
    session.begin(asks(folder.parent), hook_start_ns=None)
    session.intake.wait_looked_up(time.monotonic() + 10)
    files = sorted(map(str, folder.iterdir()))
    assert asked[0] == str(folder.parent) and sorted(asked[1:]) == files
    assert {layer.path for layer in session.artifacts.layers()} == set(files)
    asked.clear()
    session.intake.add(asks(folder / "a.distcp"))
    assert asked == [], "it is there already"
    other = scene.session(8)
    other.begin(asks(folder / "a.distcp"), hook_start_ns=None)
    other.intake.wait_looked_up(time.monotonic() + 10)
    assert asked == [str(folder / "a.distcp")], "one call, from the option to what can be shown"


def test_an_importer_is_answered_by_a_job_that_wants_images_only(scene: Scene) -> None:
    session, observed = scene.session(1), scene.session(2)
    session.begin(Request(observe=False), hook_start_ns=None)
    with pytest.raises(NotFound, match="not in the store"):
        session.image("docker://registry.example/app:1", "")
    assert [(each.ref.kind, each.state) for each in session.artifacts.all()] == [("image", State.FAILED)]
    observed.begin(Request(observe=True), hook_start_ns=None)
    with pytest.raises(InputError, match="only wants to be measured"):
        observed.image("docker://registry.example/app:1", "")


def test_an_original_with_a_path_that_the_kernel_cannot_say_leaves_no_descriptor(scene: Scene) -> None:
    folder, deep = os.open(scene.folder, os.O_PATH), "d" * 250
    for _ in range(20):  # beyond PATH_MAX, which only the way there by descriptors has not
        os.mkdir(deep, dir_fd=folder)
        inner = os.open(deep, os.O_PATH, dir_fd=folder)
        os.close(folder)
        folder = inner
    before = set(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError):
        Original(folder)
    assert len(before - set(os.listdir("/proc/self/fd"))) == 1, "it was closed"


def test_a_view_of_what_was_closed_still_knows_its_path(scene: Scene) -> None:
    """A job may end while one of its steps begins."""
    model, session = scene.file(), scene.session()
    session.begin(asks(model), hook_start_ns=None)
    session.intake.wait_looked_up(time.monotonic() + 10)
    (artifact,) = session.artifacts.all()
    session.end("job ended")
    assert artifact.resolved is not None and artifact.resolved.path == str(model)
    with pytest.raises(NotFound, match="the job is over"):
        artifact.resolved.bind()


def test_digests_of_a_users_sparse_files_leave_room_for_others(scene: Scene) -> None:
    """Each job was within its bound; the digests of files of 1 TiB that hold nothing filled /run all the same."""
    share_bytes = 12 * 2**20
    scene.blobs.shares = NodeShares(
        Share("memory for digests", 2 * share_bytes), Share("plans", 100), Share("artifacts", 100)
    )
    sessions = [scene.session(job_id) for job_id in range(1, 5)]
    for number, session in enumerate(sessions[:3]):
        path = scene.file(f"sparse{number}", 1)
        os.truncate(path, 2**40)
        os.utime(path, (OLD, OLD))
        session.begin(asks(path), hook_start_ns=None)
        session.intake.wait_looked_up(time.monotonic() + 10)
    kept = [len(session.artifacts.layers()) for session in sessions[:3]]
    assert kept == [1, 0, 0], "8 MiB each"
    assert sum(path.stat().st_blocks * 512 for path in (scene.folder / "live").iterdir()) < share_bytes
    (event,) = (event for event in sessions[1].context.log.events() if event.name == "checkpoint_not_used")
    assert "share of this node's memory for digests is used up" in str(event.message)
    binds, _ = sessions[1].attach("0")
    assert binds == [], "the original stays"
    sessions[0].end("job ended")
    sessions[3].begin(asks(scene.folder / "sparse1"), hook_start_ns=None)
    sessions[3].intake.wait_looked_up(time.monotonic() + 10)
    assert len(sessions[3].artifacts.layers()) == 1


NODES = ("127.0.0.1", "127.0.0.2")


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Scene]]:
    """The two nodes of a job, by addresses of this machine; the site has a key."""
    key = tmp_path / "site.key"
    key.write_bytes(os.urandom(32))
    key.chmod(0o600)
    with socket.socket() as free:
        free.bind((NODES[0], 0))
        monkeypatch.setenv("BOOTSEER_PEERS_PORTS", str(free.getsockname()[1]))
    scenes = []
    for node in NODES:
        (tmp_path / node).mkdir()
        scenes.append(Scene(tmp_path / node, node, tmp_path))
    yield scenes
    for scene in scenes:
        scene.close()


def store_checkpoint(folder: Path, size_bytes: int) -> Path:
    """A checkpoint that the user has put into the store."""
    path = folder / "model.bin"
    path.write_bytes(os.urandom(size_bytes))
    os.utime(path, (OLD, OLD))
    original = OriginalRecord("checkpoint", str(path), file_fingerprint(path.stat()))
    BlobWriter(FileStore(folder / "store"), objects=2).store_named(path, original)
    return path


def test_the_nodes_of_a_job_read_one_copy(job: list[Scene], tmp_path: Path) -> None:
    model = store_checkpoint(tmp_path, 20 * 2**20)
    sessions = [scene.session(nodelist=",".join(NODES)) for scene in job]
    for session in sessions:
        session.begin(asks(model), hook_start_ns=1)
    for session in sessions:
        until(lambda: bool(layers := session.artifacts.layers()) and layers[0].handle.reader.blob.complete)  # noqa: B023
        assert session.artifacts.layers()[0].handle.blob.bind_path().read_bytes() == model.read_bytes()
    usages = [session.artifacts.layers()[0].handle.usage for session in sessions]
    assert sum(usage.store_bytes for usage in usages) == 20 * 2**20
    assert sum(usage.peer_bytes for usage in usages) == 20 * 2**20
    time.sleep(1.1)  # the process tells its figures each second
    for session in sessions:
        session.end("job ended")
    summaries = [
        event
        for session in sessions
        for event in session.context.log.events()
        if (event.kind, event.name) == ("peers", "summary")
    ]
    assert sum(int(event.number("received_bytes")) for event in summaries) == 20 * 2**20
    assert all("banned" not in event.extra for event in summaries)


@pytest.mark.parametrize("why", ["off", "no key", "one node"])
def test_a_job_without_peers_reads_the_store(job: list[Scene], tmp_path: Path, why: str) -> None:
    model = store_checkpoint(tmp_path, 2**20)
    scene = job[0]
    if why == "off":
        off = dataclasses.replace(scene.settings.peers, mode="off")
        scene.settings = dataclasses.replace(scene.settings, peers=off)
    elif why == "no key":
        (tmp_path / "site.key").unlink()
    session = scene.session(nodelist=NODES[0] if why == "one node" else ",".join(NODES))
    session.begin(asks(model), hook_start_ns=1)
    until(lambda: bool(layers := session.artifacts.layers()) and layers[0].handle.reader.blob.complete)
    assert session.artifacts.layers()[0].handle.usage.peer_bytes == 0
    assert not session.artifacts.layers()[0].handle.reader.sources.exchanges
    assert not [event for event in session.context.log.events() if event.kind == "fault"]


def test_a_job_whose_nodes_have_no_address_says_so_and_reads_the_store(
    job: list[Scene], tmp_path: Path
) -> None:
    model = store_checkpoint(tmp_path, 2**20)
    session = job[0].session(nodelist=f"{NODES[0]},no-such-node.invalid")
    session.begin(asks(model), hook_start_ns=1)
    until(lambda: bool(layers := session.artifacts.layers()) and layers[0].handle.reader.blob.complete)
    faults = [event for event in session.context.log.events() if event.kind == "fault"]
    assert [event.name for event in faults] == ["peers_not_used"]
    assert "no-such-node.invalid" in (faults[0].message or "")
