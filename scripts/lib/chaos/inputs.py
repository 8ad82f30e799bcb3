"""The inputs of the jobs: an image, an environment and a checkpoint of each user, in the store too.

A checkpoint may be replaced while jobs run. So each input has versions: a digest, and when it was there.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib.chaos.read_inputs import digest
from scripts.lib.cluster.client import BOOTSEER, Cluster
from scripts.lib.cluster.layout import ClusterError
from scripts.lib.cluster.settings import USERS

NAMES = ("image", "env", "checkpoint")
FILES = {"image": "image.sqsh", "env": "venv", "checkpoint": "model.bin"}
CHECKPOINT_BYTES = 16_000_000
# A node sees after two seconds what another machine did; time stamps have whole seconds (docs/cluster.md).
SEEN_LATE_S = 4.0
MAKE = """
set -e
mkdir -p chaos/src && cd chaos
for i in $(seq 60); do head -c $((RANDOM * 6)) /dev/urandom > src/file-$i; done
mksquashfs src image.sqsh -noappend -quiet -no-progress > /dev/null
python3 -m venv --without-pip venv
packages="$(echo venv/lib/python3*)/site-packages/toy"
mkdir -p "$packages" "$packages-1.0.dist-info"
for i in $(seq 80); do head -c $((RANDOM * 4)) /dev/urandom > "$packages/data-$i"; done
head -c {size} /dev/urandom > model.bin
{command} image push image.sqsh
{command} env save venv
""".replace("{size}", str(CHECKPOINT_BYTES)).replace("{command}", BOOTSEER)
STRIPE = f"cd chaos && {BOOTSEER} checkpoint stripe model.bin"


@dataclass
class Version:
    """What an input held, from when to when (seconds of time.time); until is infinite for the present one."""

    digest: str
    since: float
    until: float = float("inf")


@dataclass
class Inputs:
    """All inputs of all users. Thread-safe."""

    cluster: Cluster
    versions: dict[tuple[str, str], list[Version]] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def make(self) -> None:
        """Make all of them; bob's checkpoint is read as it lies, and alice's is striped."""
        self.cluster.run("login", BOOTSEER, "store", "init")
        self.cluster.run("login", BOOTSEER, "image", "make-key")  # so that nodes exchange blocks
        for user in USERS:
            self.cluster.run("login", "bash", "-c", MAKE, user=user, timeout_s=180)
            for name in NAMES:
                found, _ = digest(str(self._host_path(user, name)))
                self.versions[user, name] = [Version(found, time.time())]
        self.cluster.run("login", "bash", "-c", STRIPE, user="alice", timeout_s=60)

    def path(self, user: str, name: str) -> str:
        """Where jobs find it."""
        return f"/shared/home/{user}/chaos/{FILES[name]}"

    def replace_checkpoint(self, user: str, chance: random.Random) -> None:
        """Write another checkpoint of another size in its place, as training does."""
        path = self._host_path(user, "checkpoint")
        draft = path.with_name("model.new")
        draft.write_bytes(chance.randbytes(CHECKPOINT_BYTES + chance.randrange(1, 4_000_000)))
        os.chown(draft, USERS[user], USERS[user])
        new = Version(digest(str(draft))[0], time.time())
        draft.replace(path)
        with self.lock:
            versions = self.versions[user, "checkpoint"]
            versions[-1].until = time.time()
            versions.append(new)

    def right(self, user: str, name: str, found: str, begun: float, ended: float) -> bool:
        """Whether a task whose step ran from `begun` to `ended` may have read this digest."""
        with self.lock:
            return any(
                version.digest == found and version.since <= ended and begun <= version.until + SEEN_LATE_S
                for version in self.versions[user, name]
            )

    def replaced(self, user: str, name: str, begun: float, ended: float) -> bool:
        """Whether it was replaced meanwhile: a reader may then have seen parts of two files, or an error."""
        with self.lock:
            return any(begun - SEEN_LATE_S <= version.until <= ended for version in self.versions[user, name])

    def told(self, user: str, name: str, found: str, begun: float) -> str:
        """What a digest is that a task should not have read."""
        with self.lock:
            for version in self.versions[user, name]:
                if version.digest == found:
                    return f"the bytes until {begun - version.until:.1f} s before the step was launched"
        return "bytes that it never held"

    def objects(self) -> list[Path]:
        """The files in the store, as they lie on the server."""
        with contextlib.suppress(OSError):
            return [path for path in (self.cluster.shared / "bootseer").rglob("*") if path.is_file()]
        return []

    def _host_path(self, user: str, name: str) -> Path:
        path = self.cluster.shared / "home" / user / "chaos" / FILES[name]
        if not path.exists():
            raise ClusterError(f"{path} was not made")
        return path
