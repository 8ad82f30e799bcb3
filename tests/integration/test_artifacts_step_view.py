"""A folder named as checkpoint: the newest complete one in it is brought, each of its files at its own path."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.artifacts.artifact import Artifact
from bootseer_slurm.artifacts.checkpoint_folders import CheckpointFolders
from bootseer_slurm.artifacts.resolved import Bind
from bootseer_slurm.artifacts.step_view import StepView
from bootseer_slurm.artifacts.table import Artifacts
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.events import EventLog
from tests.integration.node import ALICE, Node, node, wait_until
from tests.integration.test_service_recovery import attach

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
OLD = time.time() - 3600


def make(folder: Path, *names: str, size_bytes: int = 300_000) -> dict[str, bytes]:
    made = {}
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made[str(path)] = os.urandom(size_bytes)
        path.write_bytes(made[str(path)])
        os.utime(path, (OLD, OLD))
    return made


def shown(node: Node, job: int, name: str, **wishes: object) -> dict[str, bytes]:
    """What a step of a new job sees, by path."""
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, **{"CHECKPOINT": name, **wishes})
    found = {}
    for path, fd in attach(node, job).items():
        found[path] = Path(f"/proc/self/fd/{fd}").read_bytes()
        os.close(fd)
    node.ask("epilog", JOB_ID=job)
    return found


def test_the_newest_of_a_folder(node: Node) -> None:
    root = node.folder / "data" / "ckpt"
    make(root, "step_10/a.safetensors", "step_10/b.safetensors")
    newest = make(root, "step_20/a.safetensors", "step_20/b.safetensors")
    node.start()
    assert shown(node, 1, str(root)) == newest
    (event,) = (event for event in node.events(1) if event["name"] == "located")
    assert event["target"] == str(root) and "step_20" in str(event["message"])
    later = make(root, "step_30/a.safetensors")
    (root / "step_30" / "b.safetensors.tmp").touch()
    assert shown(node, 2, str(root)) == newest, "30 is being written"
    (root / "step_30" / "b.safetensors.tmp").unlink()
    assert shown(node, 3, str(root)) == later
    assert shown(node, 4, f"{root}/step_1*") == {
        path: Path(path).read_bytes() for path in map(str, (root / "step_10").iterdir())
    }
    node.events(4)  # once it has ended
    records = [json.loads(path.read_text()) for path in (node.folder / "store").rglob("classes/*.json")]
    assert [wish[1] for record in records for wish in record["wishes"]] == [f"{root}/step_1*"], (
        "not the files"
    )


def test_none_in_it(node: Node) -> None:
    (node.folder / "data" / "empty").mkdir()
    node.start()
    assert shown(node, 1, str(node.folder / "data" / "empty")) == {}
    assert any("no complete checkpoint" in str(event.get("message")) for event in node.events(1))


def test_a_striped_file(node: Node) -> None:
    path = node.folder / "data" / "model.pt"
    content = os.urandom(20_000_000)
    with StripedWriter(str(path)) as file:
        file.write(content)
    node.start()
    node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=path)
    reply, fds = node.request("attach", JOB_ID=1, UID=ALICE, STEP_ID=0)
    for fd in fds:
        os.close(fd)
    given = Path(dict(value.split("=", 1) for key, value in reply if key == "SETENV")["BOOTSEER_CHECKPOINT"])
    assert given.read_bytes() == content
    kept = node.run / "events" / "1.0"
    wait_until(lambda: kept.exists() and '"kind":"prefetch","name":"end"' in kept.read_text())
    (shown,) = attach(node, 1).items()
    file = Path(f"/proc/self/fd/{shown[1]}")
    assert shown[0] == str(given), "now that it is whole, its cache file lies over it for the step"
    assert file.read_bytes() == content
    assert file.stat().st_dev == (node.folder / "cache").stat().st_dev != given.stat().st_dev
    with pytest.raises(OSError, match="Read-only"):
        os.utime(file)
    os.close(shown[1])
    node.ask("epilog", JOB_ID=1)
    assert not [event for event in node.events(1) if event["kind"] == "fault"]


def test_more_files_than_one_job_may_ask_for(node: Node) -> None:
    root = node.folder / "data" / "step_1"
    made = make(root, *(f"__{number}_0.distcp" for number in range(70)), ".metadata", size_bytes=5000)
    node.start()
    found = shown(node, 1, str(root))
    assert 40 < len(found) < 50 and found.items() <= made.items()
    assert any("48 of its files" in str(event.get("message")) for event in node.events(1))


def step(node: Node, job: int, name: object) -> str:
    """What a step of a new job is told of where its checkpoint is."""
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, CHECKPOINT=name)
    return told(node, job, 0)


def told(node: Node, job: int, number: int) -> str:
    """What one step of a job is told of where its checkpoint is; "" when it is not."""
    reply, fds = node.request("attach", JOB_ID=job, UID=ALICE, STEP_ID=number)
    for fd in fds:
        os.close(fd)
    return dict(value.split("=", 1) for key, value in reply if key == "SETENV").get("BOOTSEER_CHECKPOINT", "")


def stripe(folder: Path, *names: str, size_bytes: int) -> dict[str, bytes]:
    """Striped files of random bytes, and their content by path."""
    made = {str(folder / name): os.urandom(size_bytes) for name in names}
    for path, content in made.items():
        with StripedWriter(path) as file:
            file.write(content)
    return made


def test_striped_files_of_a_folder_have_their_names_in_one_folder(node: Node) -> None:
    root = node.folder / "data" / "ckpt"
    made = make(root, "step_9/.metadata", "step_9/sub/plain.bin")
    made |= stripe(root / "step_9", "__0_0.distcp", "__1_0.distcp", size_bytes=9_000_000)
    node.start()
    shown_at = Path(step(node, 1, root))
    found = {
        str(root / "step_9" / path.relative_to(shown_at)): path.read_bytes()
        for path in shown_at.rglob("*")
        if path.is_file()
    }
    assert found == made
    node.as_user("cmp", str(shown_at / "sub/plain.bin"), str(root / "step_9/sub/plain.bin"))
    assert not (shown_at.parent.stat().st_mode & 0o044), "others do not learn what the files are called"
    assert told(node, 1, 1) == str(shown_at)
    node.ask("epilog", JOB_ID=1)
    node.events(1)
    wait_until(lambda: not shown_at.parent.exists())


def test_a_folder_with_names_that_are_no_text_and_no_plain_uri(node: Node) -> None:
    root = node.folder / "data" / "epoch=1, 50%"
    made = make(root, "step_9/.metadata", os.fsdecode(b"step_9/\xff.bin"))
    made |= stripe(root / "step_9", "__0_0.distcp", "a b.distcp", size_bytes=1_000_000)
    node.start()
    shown_at = Path(step(node, 1, root))
    assert shown_at.is_absolute(), [event for event in node.events(1) if event["kind"] == "fault"]
    found = {str(root / "step_9" / path.name): path.read_bytes() for path in shown_at.iterdir()}
    assert found == made
    node.ask("epilog", JOB_ID=1)


def test_what_was_learned_is_shown_until_a_step_asks_for_something_else(node: Node) -> None:
    root = node.folder / "data" / "ckpt"
    made = make(root, "step_10/a.safetensors", "step_10/b.safetensors")
    node.start()
    assert shown(node, 1, str(root)) == made
    node.events(1)
    node.ask("prolog", JOB_ID=2, UID=ALICE, BOOTSEER=1)
    assert paths_shown(node, 2) == sorted(made)
    assert paths_shown(node, 2, CHECKPOINT=root) == sorted(made)
    other = make(root.parent, "other/step_1/c.safetensors")
    assert paths_shown(node, 2, CHECKPOINT=root.parent / "other") == sorted([*made, *other]), (
        "both were asked for"
    )
    node.ask("epilog", JOB_ID=2)
    node.events(2)
    node.ask("prolog", JOB_ID=3, UID=ALICE, BOOTSEER=1)
    assert paths_shown(node, 3) == sorted([*made, *other])
    third = make(root.parent, "third/step_1/d.safetensors")
    assert paths_shown(node, 3, CHECKPOINT=root.parent / "third") == sorted(third)
    node.ask("epilog", JOB_ID=3)


def paths_shown(node: Node, job: int, **wishes: object) -> list[str]:
    """What a step of the job is shown, which asks for this."""
    asked = {"BOOTSEER": 1, **wishes} if wishes else {}
    reply, fds = node.request("attach", JOB_ID=job, UID=ALICE, STEP_ID=1, **asked)
    for fd in fds:
        os.close(fd)
    return sorted(value.split(":", 3)[3] for key, value in reply if key == "BIND")


def test_a_folder_of_which_a_striped_file_is_broken_is_not_shown_in_part(node: Node) -> None:
    root = node.folder / "data" / "step_9"
    make(root, ".metadata")
    for name in ("a", "b"):
        with StripedWriter(str(root / name)) as file:
            file.write(os.urandom(1_000_000))
    (stripe,) = [path for path in (root / "b").rglob("0") if path.is_file()]
    stripe.unlink()
    node.start()
    assert step(node, 1, root) == ""
    node.ask("epilog", JOB_ID=1)
    assert any("stripe 0 is missing" in str(event.get("message")) for event in node.events(1))


@pytest.mark.parametrize(
    "name", ["../a", "/etc/passwd", "a/../../b", "", "x" * 300, "a\0b", "/".join("a" * 20), "\ud800"]
)
def test_a_name_that_leads_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError):
        CheckpointFolders(tmp_path / "job").show("c", {"good": tmp_path, name: tmp_path})
    assert list(tmp_path.rglob("*")) == []


def test_a_folder_that_cannot_be_made_is_not_left_half_made(tmp_path: Path) -> None:
    folders = CheckpointFolders(tmp_path / "job")
    for _ in range(2):
        with pytest.raises(OSError):
            folders.show("c", {"a": tmp_path / "none", "a/b": tmp_path / "none"})
    assert list((tmp_path / "job").iterdir()) == []
    assert (folders.show("c", {"a": tmp_path}) / "a").readlink() == tmp_path
    folders.close()
    with pytest.raises(NotFound):
        folders.show("d", {"a": tmp_path})
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_named_does_not_lose_the_mounts_of_the_rest(mocker: MockerFixture) -> None:
    """A job that ends while a step begins lets go of its blobs one after the other."""
    artifacts, bind = Artifacts(mocker.Mock(), 7), Bind(7, 1, 2, "/ckpt/a")

    class Gone:
        path, bind = "", staticmethod(lambda **_: None)

        @property
        def served_path(self) -> Path:
            raise KeyError("gone")

    for name, resolved in {
        "/ckpt/a": mocker.Mock(path="/ckpt/a", bind=lambda **_: bind),
        "hdfs://nn/b": Gone(),
        "s3://bucket/c": mocker.Mock(path="", bind=lambda **_: None, served_path=Path("/run/c")),
    }.items():
        resolved.ref = ArtifactRef("checkpoint", name)  # type: ignore[attr-defined]
        artifact, _ = artifacts.request(Artifact(resolved.ref, by_job=True))  # type: ignore[attr-defined]
        artifact.become_ready(resolved)  # type: ignore[arg-type]
    log = EventLog(1, 0, "n1")
    view = StepView(artifacts, mocker.Mock(), log)
    for _ in range(3):
        binds, variables = view.open("0")
        assert binds == [bind] and variables == {"BOOTSEER_CHECKPOINT": "/run/c"}
    told = [(event.name, event.target) for event in log.events()]
    assert told == [("shown", "/ckpt/a"), ("skipped", "hdfs://nn/b")], "once, however many steps there are"
