"""One blob that an artifact is made of: planned, prefetched, mounted, bound.

An artifact has one; an environment that was saved over another snapshot has two, the topmost first.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bootseer_slurm import mounts
from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.artifacts.reattached import Found
from bootseer_slurm.artifacts.source import BlobDescription
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.trace import SETTLED_STARTS, Plan
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.errors import InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.image.signing import Key, is_signed
from bootseer_slurm.userproc.client import UserProcess
from bootseer_slurm.userproc.protocol import MakePlan

_WHOLE = 0.9  # a checkpoint's file of which a start reads this share is brought whole, from front to end


@dataclass(slots=True, eq=False)
class Layer:
    """A layer, from when its artifact is resolved until that is closed.

    label: what events call it. trace_key: what its traces are kept under. path: of the original, or URI.
    is_layered: it is one of two. is_watched: a checkpoint of which it is not known yet what this node reads.
    is_shown: a step can read it. is_settled: the plan says all that a start touches.
    mounted: gives a detached mount of it, if it is an image or an environment.
    """

    ref: ArtifactRef
    description: BlobDescription
    handle: BlobHandle
    label: str
    trace_key: str
    path: str
    is_layered: bool = False
    is_watched: bool = False
    is_shown: bool = False
    plan: Plan = field(default_factory=Plan)
    is_settled: bool = False
    mounted: Callable[[], int] | None = None

    @property
    def found(self) -> Found:
        """The record by which an agent after this one serves the blob again."""
        folder = self.description.folder
        return Found(self.description.id, self.ref.kind, "" if folder else self.path, folder)

    @property
    def is_unread(self) -> bool:
        """Whether the last start was shown it and read nothing of it."""
        return self.plan.full_starts > 0 and not self.plan.blocks

    @property
    def is_packed_here(self) -> bool:
        """Whether it is a whole squashfs of ours, and not a file that must keep its bytes, or a layer."""
        return self.mounted is not None and not (self.is_layered or self.handle.reader.blob.unmanaged)

    @property
    def bind_path(self) -> Path:
        """Where the blob can be bound from: its cache file once it is complete, before that the FUSE file.

        A checkpoint's stays the FUSE file until it is known what this node reads of it, which is seen there.
        """
        return self.handle.served_path if self.is_watched else self.handle.blob.bind_path()

    def is_signed(self, key: Key) -> bool:
        """Whether the kernel may mount it: an agent packed it for this user or its publisher, or root did."""
        uid, blob = self.handle.reader.uid, self.description
        users = {uid, 0} if blob.publisher is None else {uid, 0, blob.publisher}
        return any(is_signed(key, each, blob.id, blob.signature) for each in users)

    def mount_image(self) -> None:
        """Have the kernel mount it, which must be signed. Raises BootseerError."""
        self.mounted = functools.partial(mounts.bind_clone, self.handle.blob.mount_image())

    def clone_mounted(self) -> int:
        """A detached mount of it; the caller closes the descriptor. Raises NotFound, OSError."""
        mounted = self.mounted
        if mounted is None:
            raise NotFound(f"{self.label}: it is not mounted any more")
        return mounted()

    def close(self) -> None:
        """Let go of the blob."""
        self.mounted = None
        self.handle.close()


def trace_key(description: BlobDescription, *, role: str, path: str, fingerprint: str) -> str:
    """The key that a blob's traces are kept under: the same on all nodes, unlike the id of an unmanaged file.

    role: of a checkpoint's file, for which each start has a new one, and each node its own part of it.
    """
    if role:
        return "place-" + hashlib.sha256(role.encode(errors="replace")).hexdigest()
    if description.digests is not None:
        return description.id
    return "file-" + hashlib.sha256(f"{path}\0{fingerprint}".encode()).hexdigest()


def fetch_plan(layer: Layer, process: UserProcess, job_class: str, *, allow: Callable[[int], None]) -> None:
    """Learn what earlier starts touched of a layer. Without a plan, what is read comes when it is read.

    allow: asked before a plan of so many blocks is kept in memory; raises InputError when they are too many.
    """
    layout = layer.handle.reader.blob.layout
    # Another class may read less of a checkpoint, of which nothing but the plan is brought.
    any_class = layer.ref.kind != "checkpoint"
    request = MakePlan(job_class, layer.trace_key, layout.blocks, layout.block_bytes, any_class)
    try:
        plan, warning = process.make_plan(request)
        if warning:
            layer.handle.on_fault("trace_damaged", warning)
        _use_plan(layer, plan, allow)
    except (StoreError, IntegrityError, InputError) as error:
        layer.handle.on_fault("plan_not_used", error.message)


def _use_plan(layer: Layer, plan: Plan, allow: Callable[[int], None]) -> None:
    if layer.ref.kind != "checkpoint":
        layer.is_settled = plan.full_starts >= SETTLED_STARTS
    elif not plan.full_starts:  # nothing but a plan is brought: it must know all
        return
    else:
        layer.is_settled, layer.is_watched = True, False
        if len(plan.blocks) >= _WHOLE * layer.handle.reader.blob.layout.blocks:
            return
    allow(len(plan.blocks))
    layer.plan = plan


def summary(layer: Layer, waited: Waited | None = None) -> dict[str, Any]:
    """The reads of a layer since it was opened, as the event tells them.

    waited: how long reads waited, where that is not until now.
    """
    usage = layer.handle.usage
    if waited is None:
        waited = layer.handle.waited
    return {
        "target": layer.label,
        "what": layer.ref.kind,
        "reads": usage.reads,
        "reads_blocked": usage.reads_blocked,
        "pushed_bytes": usage.pushed_bytes,
        "read_bytes": usage.read_bytes,
        "miss_bytes": usage.miss_bytes,
        "hit_bytes": max(0, usage.read_bytes - usage.miss_bytes),
        "blocked_s": usage.blocked_s,
        "waited_s": waited.waited_s,
        "longest_wait_s": waited.longest_s,
        "cached_bytes": layer.handle.cached_bytes,
        "store_bytes": usage.store_bytes,
        "origin_bytes": usage.origin_bytes,
        "peer_bytes": usage.peer_bytes,
        "fetch_s": usage.fetch_s,
        "disk_s": usage.disk_s,
        "first_ns": usage.first_ns,
        "last_ns": usage.last_ns,
    }
