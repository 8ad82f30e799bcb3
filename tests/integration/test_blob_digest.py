"""Blobs of either digest on their whole way: store, agent, cache, FUSE; upgrades, and nodes that lack blake3."""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path

import pytest

from bootseer_slurm.blob.digest import BLAKE3, SHA256
from bootseer_slurm.blob.manifest import decode, decode_unmanaged
from bootseer_slurm.cache.admin import verify
from bootseer_slurm.checkpoint import writer
from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.stripe import stripe_file
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import IntegrityError
from tests.integration.node import ALICE, Node, digest_of, node, wait_until

__all__ = ["node"]
needs_fuse = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
SIZE_BYTES = 20 * 2**20 + 12345
# Alice's: puts a file into the store, as a version does whose digest this is.
_STORE = """
import sys
from pathlib import Path
from bootseer_slurm.blob import writer
from bootseer_slurm.blob.names import file_fingerprint
from bootseer_slurm.store import open_store
writer.PREFERRED = sys.argv[3]
file = Path(sys.argv[2])
fingerprint = file_fingerprint(file.stat())
original = writer.Original("checkpoint", str(file), fingerprint)
stored = writer.BlobWriter(open_store(sys.argv[1]), objects=3).store_named(file, original)
print(stored.folder)
"""


def make_file(node: Node) -> Path:
    """A file of alice's that is old enough to be used."""
    path = node.folder / "data" / "model.bin"
    path.write_bytes(random.Random(1).randbytes(SIZE_BYTES))
    os.chown(path, ALICE, ALICE)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def store(node: Node, path: Path, digest: str) -> Path:
    """The file's blob in the store."""
    folder = node.as_user(sys.executable, "-c", _STORE, f"file://{node.folder}/store", str(path), digest)
    return node.folder / "store" / folder.strip()


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))


def begin(node: Node, job: int, path: Path) -> Path:
    """Begin a job that starts from the file; gives its blob's file in the FUSE file system, which is whole."""
    node.ask("prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, CHECKPOINT=path)
    kept = node.run / "events" / f"{job}.0"
    wait_until(lambda: kept.exists() and '"kind":"prefetch","name":"end"' in kept.read_text())
    (served,) = (node.run / "checkpoints" / str(ALICE)).iterdir()
    return served


def end(node: Node, job: int) -> dict[str, object]:
    """End a job; gives what its prefetch says of itself, with the names of its faults."""
    node.ask("epilog", JOB_ID=job)
    events = node.events(job)
    (said,) = (event for event in events if (event["kind"], event["name"]) == ("prefetch", "end"))
    return said | {"faults": [event["name"] for event in events if event["kind"] == "fault"]}


def in_cache(node: Node) -> Path:
    (folder,) = (node.folder / "cache" / str(ALICE)).iterdir()
    return folder


class TestNode:
    """An agent and its jobs."""

    pytestmark = needs_fuse

    @pytest.mark.parametrize("digest", [SHA256, BLAKE3])
    def test_a_blob_of_each_digest_is_read_and_a_corrupt_block_found(self, node: Node, digest: str) -> None:
        model = make_file(node)
        stored = store(node, model, digest)
        assert decode((stored / "manifest").read_bytes()).layout.digest == digest
        flip(stored / "1", 300_000)
        node.start()
        served = begin(node, 1, model)
        assert served.name == decode((stored / "manifest").read_bytes()).id
        assert digest_of(served) == digest_of(model)
        said = end(node, 1)
        assert said["faults"] == ["corrupt_block"]
        assert (in_cache(node) / "manifest").read_bytes() == (stored / "manifest").read_bytes()
        assert verify(node.folder / "cache", node.run / "cache") == []

    @pytest.mark.parametrize("digest", [SHA256, BLAKE3])
    def test_an_agent_that_is_killed_goes_on_with_each_digest(self, node: Node, digest: str) -> None:
        model = make_file(node)
        store(node, model, digest)
        node.start()
        begin(node, 1, model)
        node.crash()
        (served,) = (node.run / "checkpoints" / str(ALICE)).iterdir()
        assert digest_of(served) == digest_of(model)
        node.ask("epilog", JOB_ID=1)
        assert {event["name"] for event in node.events(1) if event["kind"] == "fault"} == {"agent_restarted"}

    def test_an_upgrade_keeps_what_the_cache_has_of_a_file_that_is_used_where_it_lies(
        self, node: Node
    ) -> None:
        model, upgraded = make_file(node), node.folder / "upgraded"
        supervisor = node.start(f"""
import pathlib
from bootseer_slurm.artifacts import resolve
if not pathlib.Path({str(upgraded)!r}).exists():
    resolve.PREFERRED = "sha256"
""")
        begin(node, 1, model)
        upgraded.touch()
        pid = node.agent_pid
        supervisor.send_signal(signal.SIGHUP)
        node.wait_for_another(pid)
        (served,) = (node.run / "checkpoints" / str(ALICE)).iterdir()
        assert digest_of(served) == digest_of(model)
        node.ask("epilog", JOB_ID=1)
        node.events(1)
        assert decode_unmanaged((in_cache(node) / "manifest").read_bytes()).digest == SHA256

        assert digest_of(begin(node, 2, model)) == digest_of(model)
        said = end(node, 2)
        assert (said["bytes"], said["bytes_cached"], said["faults"]) == (0, SIZE_BYTES, [])
        assert verify(node.folder / "cache", node.run / "cache") == []

        os.utime(model, (1_700_000_001, 1_700_000_001))  # another file, to the cache
        before = in_cache(node)
        begin(node, 3, model)
        (after,) = set(before.parent.iterdir()) - {before}
        assert decode_unmanaged((after / "manifest").read_bytes()).digest == BLAKE3
        end(node, 3)
        assert verify(node.folder / "cache", node.run / "cache") == []

    def test_a_job_starts_plain_on_a_node_whose_agent_lacks_blake3(
        self, node: Node, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model = make_file(node)
        store(node, model, BLAKE3)
        (node.folder / "lacks").mkdir()
        (node.folder / "lacks" / "blake3.py").write_text("raise ImportError\n")
        monkeypatch.setenv("PYTHONPATH", str(node.folder / "lacks"))
        node.start()
        node.ask("prolog", JOB_ID=1, UID=ALICE, BOOTSEER=1, CHECKPOINT=model)
        reply, fds = node.request("attach", JOB_ID=1, UID=ALICE, STEP_ID=0)
        assert fds == [] and "BIND" not in dict(reply), "the step sees the original"
        node.ask("epilog", JOB_ID=1)
        (fault,) = (event for event in node.events(1) if event["kind"] == "fault")
        assert fault["name"] == "checkpoint_not_used"
        assert "this Python lacks the package blake3" in str(fault["message"])

        stored = store(node, model, SHA256)
        assert begin(node, 2, model).name == decode((stored / "manifest").read_bytes()).id
        assert end(node, 2)["faults"] == []


@pytest.mark.parametrize("digest", [SHA256, BLAKE3])
@pytest.mark.parametrize("how", ["stream", "file"])
def test_a_striped_file_of_each_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str, how: str
) -> None:
    content, path = random.Random(1).randbytes(SIZE_BYTES), tmp_path / "model"
    monkeypatch.setattr(writer, "PREFERRED", digest)
    monkeypatch.setattr("bootseer_slurm.checkpoint.stripe.PREFERRED", digest)
    if how == "stream":
        with StripedWriter(str(path), objects=3) as out:
            out.write(content)
    else:
        (tmp_path / "source").write_bytes(content)
        os.utime(tmp_path / "source", (1_700_000_000, 1_700_000_000))
        stripe_file(tmp_path / "source", str(path), objects=3)
    manifest = decode((path / "manifest").read_bytes())
    assert manifest.layout.digest == digest
    with ParallelFile(str(path)) as file:
        assert file.read() == content
    flip(path / manifest.generation / "2", 5)
    with ParallelFile(str(path)) as file, pytest.raises(IntegrityError, match="is not what was written"):
        file.read()
