"""Stores on a folder, and on a real S3 server."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import bootseer_slurm
from bootseer_slurm.checkpoint.striped import open_file
from bootseer_slurm.errors import StoreError
from bootseer_slurm.store import open_store
from tests.stores import check_clock, check_dcp, check_fsspec, check_objects, check_striped

SERVER = Path("/var/tmp/bootseer-versitygw-v1.8.0/versitygw")  # scripts/s3
s3_server = [pytest.mark.s3, pytest.mark.skipif(not SERVER.exists(), reason="needs scripts/s3")]


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """What follows the bucket's name in a URI of a server with one bucket, "bucket"."""
    folder = tmp_path_factory.mktemp("s3")
    (folder / "data" / "bucket").mkdir(parents=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environ = {"ROOT_ACCESS_KEY": "alice", "ROOT_SECRET_KEY": "alice-secret", "PATH": "/usr/bin:/bin"}
    command = [str(SERVER), "--port", f"127.0.0.1:{port}", "posix", str(folder / "data")]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
    patch = pytest.MonkeyPatch()
    patch.setenv("AWS_ACCESS_KEY_ID", "alice")
    patch.setenv("AWS_SECRET_ACCESS_KEY", "alice-secret")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        deadline_s = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert time.monotonic() < deadline_s and server.poll() is None, (folder / "log").read_text()
                time.sleep(0.05)
        yield f"?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
    finally:
        patch.undo()
        server.kill()
        server.wait()


def test_a_folder(tmp_path: Path) -> None:
    check_objects(f"file://{tmp_path}")
    check_striped(f"file://{tmp_path}/model.pt")
    check_fsspec(f"bootseer+file://{tmp_path}/fs")


class TestS3:
    pytestmark = s3_server

    def test_objects(self, s3: str) -> None:
        check_objects(f"s3://bucket/objects{s3}")

    def test_clock(self, s3: str) -> None:
        check_clock(f"s3://bucket/clock{s3}")

    def test_striped(self, s3: str) -> None:
        check_striped(f"s3://bucket/striped/model.pt{s3}")

    def test_fsspec(self, s3: str) -> None:
        check_fsspec(f"bootseer+s3://bucket/fs{s3}")

    def test_an_object_that_is_replaced_while_it_is_read(self, s3: str) -> None:
        uri = f"s3://bucket/replaced/model.pt{s3}"
        store = open_store(f"s3://bucket/replaced{s3}")
        store.write("model.pt", b"a" * 2**20)
        opened, identity, view = open_file(uri), store.identity("model.pt"), memoryview(bytearray(10))
        assert opened.objects[0].read_into(0, view) == 10 and view == b"a" * 10
        store.write("model.pt", b"b" * 2**20)  # within the same second, and of the same size
        assert store.identity("model.pt") != identity
        with pytest.raises(StoreError, match="was replaced"):
            opened.objects[0].read_into(2**19, view)
        opened.close()
        with bootseer_slurm.open(uri) as file:
            assert file.read(10) == b"b" * 10

    @pytest.mark.torch
    def test_dcp(self, s3: str) -> None:
        pytest.importorskip("torch", reason="needs scripts/torch")
        check_dcp(f"s3://bucket/dcp/step_1{s3}")

    def test_a_bucket_that_is_not_there(self, s3: str) -> None:
        with pytest.raises(StoreError, match="cannot be written"):
            open_store(f"s3://none{s3}").write("a", b"1")

    def test_a_server_that_does_not_answer(self, s3: str) -> None:
        with socket.socket() as closed:
            closed.bind(("127.0.0.1", 0))
            port = closed.getsockname()[1]
        uri = f"s3://bucket/a?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"
        with pytest.raises(StoreError, match="cannot be"):
            open_store(uri).read("a", limit_bytes=1)
