"""The arms of `bench cpu`: each path by which a node gets its bytes, plain and with Bootseer.

An arm says what is done on a node that was made cold: commands, then a job, cpu_job.py, which reads all of
the path's files. Plain is what a job does today: it reads the same files from the shared storage.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field

from scripts.lib.bench.cpu_inputs import Inputs
from scripts.lib.bench.image_arms import HERE, ROOT
from scripts.lib.bench.image_ours import BIN, STAND_IN, URI
from scripts.lib.cluster.client import ALICE

PYTHON = str(BIN / "python")
IMPORTER = str(BIN / "bootseer-importer")
AS_ALICE = ("setpriv", "--reuid=alice", "--regid=alice", "--init-groups")
INTO_IMAGE = str(HERE / "image_enter.sh")
CACHE_FILE, FUSE_FILE = "checkpoint, by the cache's file", "checkpoint, by FUSE"
ENVIRONMENT, BY_KERNEL, BY_SQUASHFUSE = "environment", "image, by the kernel", "image, by squashfuse"

_job_ids = itertools.count(600_000 + int(time.time()) % 100_000 * 10)


@dataclass(frozen=True)
class Arm:
    """One way to read what a path has.

    reads: the path that the job reads. filesystem: the one that it must find there, "" for the node's disk.
    enter: what the job is started by. job: Bootseer's number of it, 0 for plain. wishes: what its prolog is
    told. brought: the job waits until all was prefetched. before, after: commands around it, as root. get:
    the URI that pyxis's importer is asked for first, whose answer is {image} in `enter`.
    """

    path: str
    reads: str
    filesystem: str
    enter: tuple[str, ...]
    job: int = 0
    wishes: dict[str, str] = field(default_factory=dict)
    brought: bool = False
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    get: str = ""

    @property
    def name(self) -> str:
        return f"{self.path}, {'with Bootseer' if self.job else 'plain'}"


def arms(inputs: Inputs) -> list[Arm]:
    """One round: of each path plain, then ours."""
    file, folder, image = inputs.checkpoint, inputs.environment, inputs.image
    shared = "fuse.sshfs"
    plain_file = [Arm(path, file, shared, AS_ALICE) for path in (CACHE_FILE, FUSE_FILE)]
    fuse_image = (INTO_IMAGE, "squashfuse", image, ROOT)
    mount = ("mount", "-t", "squashfs", "-o", "ro,loop", image, ROOT)
    return [
        plain_file[0],
        _attached(CACHE_FILE, file, "", brought=True, CHECKPOINT=file),
        plain_file[1],
        _attached(FUSE_FILE, file, "fuse.bootseer", CHECKPOINT=file),
        Arm(ENVIRONMENT, folder, shared, AS_ALICE),
        _attached(ENVIRONMENT, folder, "squashfs", ENV=folder),
        Arm(BY_KERNEL, ROOT, "squashfs", AS_ALICE, before=mount, after=("umount", ROOT)),
        Arm(
            BY_KERNEL, ROOT, "squashfs", (*AS_ALICE, INTO_IMAGE, STAND_IN, "{image}", ROOT),
            job=next(_job_ids), wishes={"CONTAINER_IMAGE": URI}, get=URI,
        ),
        Arm(BY_SQUASHFUSE, ROOT, "fuse.squashfuse", (*AS_ALICE, *fuse_image)),
        _attached(BY_SQUASHFUSE, image, "fuse.squashfuse", *fuse_image, reads=ROOT, IMAGE=image),
    ]  # fmt: skip


def _attached(
    path: str, target: str, filesystem: str, *then: str, reads: str = "", brought: bool = False, **wishes: str
) -> Arm:
    """A job that sees what the agent shows at `target`, as the plugin does it."""
    job = next(_job_ids)
    enter = (PYTHON, str(HERE / "env_enter.py"), "agent", str(job), target, str(ALICE), *then)
    return Arm(path, reads or target, filesystem, enter, job=job, wishes=wishes, brought=brought)
