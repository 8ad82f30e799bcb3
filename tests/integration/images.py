"""What tests of images share: a store, a repository in a registry, and tools that write down their work."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from bootseer_slurm.blob import lease
from bootseer_slurm.blob.lease import Lease
from bootseer_slurm.blob.names import Name, user_folder
from bootseer_slurm.image import library
from bootseer_slurm.image.reference import Reference, registry_reference
from bootseer_slurm.store import FileStore
from tests.integration.registry import Registry, running_registry

UID = os.getuid()
ENROOT = shutil.which("enroot")
SYSTEM_PATH = os.environ["PATH"]
FILES: dict[str, Any] = {"bin": None, "bin/sh": (b"#!/bin/true\n", 0o755), "usr/lib/x": b"y" * 300_000}
# Stands for skopeo: writes down its work, and hangs in it while it is told to.
SKOPEO = """#!/bin/sh
echo "$$ $*" >> "{log}"
for word; do
  if [ "$word" = copy ] && [ -e "{log}.hang" ]; then sleep 60; fi
done
exec "{real}" "$@"
"""


class Scene:
    """A store, and tools without enroot in a PATH of its own, so that skopeo and umoci do the work."""

    def __init__(self, folder: Path, server: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
        self.server, self.folder = server, folder
        self.store_folder = folder / "store"
        self.store_folder.mkdir()
        self.store = FileStore(self.store_folder)
        self.scratch = folder / "scratch"
        self.scratch.mkdir()
        self.log = folder / "skopeo.log"
        tools = folder / "tools"
        tools.mkdir()
        for tool in ("umoci", "mksquashfs", "unsquashfs", "sh", "sleep", "true"):
            (tools / tool).symlink_to(shutil.which(tool) or "")
        (tools / "skopeo").write_text(SKOPEO.format(log=self.log, real=shutil.which("skopeo")))
        (tools / "skopeo").chmod(0o755)
        monkeypatch.setenv("PATH", str(tools))
        monkeypatch.setenv("ENROOT_TEMP_PATH", str(self.scratch))
        monkeypatch.setenv("BOOTSEER_STORE_URI", f"file://{self.store_folder}")
        monkeypatch.setattr(lease, "Lease", partial(Lease, refresh_s=0.1, stale_s=1.0))
        self.repository = f"{server.host}/t{os.urandom(6).hex()}"

    def push(self, tag: str = "1", files: dict[str, Any] | None = None, **options: Any) -> str:
        return self.server.push(f"{self.repository.partition('/')[2]}:{tag}", files or FILES, **options)

    def reference(self, tag: str = "1") -> Reference:
        return registry_reference(f"docker://{self.repository}:{tag}")

    def ensure(self, tag: str = "1", **options: Any) -> Name:
        return library.ensure(self.store, self.reference(tag), **options)

    def conversions(self) -> int:
        return sum(" copy " in line for line in self.calls())

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def blobs(self) -> list[str]:
        return self.store.list(f"{user_folder(UID)}/blobs")

    def content(self, record: Name, path: str) -> str:
        """A file in the image of a record."""
        return subprocess.run(
            ["unsquashfs", "-cat", str(self.store_folder / record.folder / "0"), path],
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    @contextlib.contextmanager
    def hanging(self, *command: str) -> Iterator[subprocess.Popen[str]]:
        """A process that pushes the image, in the middle of its fetching."""
        hang = Path(f"{self.log}.hang")
        hang.touch()
        process = subprocess.Popen(
            [sys.executable, "-m", "bootseer_slurm", "image", "push", self.reference().name],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A shell starts what runs in the background with SIGINT ignored, and that is inherited.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            deadline = time.monotonic() + 20
            while not self.conversions() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert self.conversions() == 1
            hang.unlink()
            yield process
        finally:
            process.kill()
            process.communicate()
            for line in self.calls():
                with contextlib.suppress(ProcessLookupError):
                    if " copy " in line:
                        os.killpg(int(line.split()[0]), signal.SIGKILL)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Registry]:
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
def scene(tmp_path: Path, server: Registry, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, server, monkeypatch)
