"""One blob that a target is made of, on this node: kept on the shelf, recorded, prefetched, mounted.

A target has one of these; an environment that was saved as a layer has two, the layer and what lies below it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bootseer_slurm.agent.journal import Found
from bootseer_slurm.agent.request import Job, Wish
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.source import FetchSource, flat
from bootseer_slurm.blob import trace
from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, Layout, decode
from bootseer_slurm.blob.trace import SETTLED_STARTS, Plan, Recorder, decode_plan
from bootseer_slurm.cache.reader import OnFault, Source, Usage
from bootseer_slurm.cache.waits import Waited
from bootseer_slurm.env.attach import Snapshot, squashfuse
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, StoreError
from bootseer_slurm.fetch.process import FetchProcess
from bootseer_slurm.image.trust import Key, is_signed

_PATH_LIMIT = 4096
_WHOLE = 0.9  # a checkpoint's file of which a start reads this share is brought whole, from front to end


@dataclass(frozen=True, slots=True)
class Content:
    """What a blob is, and where its bytes come from. folder: in the store, "" of an original."""

    id: str
    layout: Layout
    digests: bytes | None
    sources: list[Source] = field(default_factory=list)
    folder: str = ""
    signature: str = ""


class Place(NamedTuple):
    """What a file of a checkpoint is to this node, whatever step that is of.

    key: the same at the next start. shared: the job has other nodes, which may read other parts of it.
    """

    key: str
    shared: bool


class Part:
    """A blob in use. path and fingerprint: of the original. label: what events call it.

    place: of a checkpoint.
    """

    def __init__(
        self,
        wish: Wish,
        job: Job,
        content: Content,
        process: FetchProcess,
        shelf: Shelf,
        *,
        label: str,
        path: str,
        fingerprint: str,
        place: Place | None,
        layered: bool,
        mtime_ns: int,
        on_fault: OnFault,
    ) -> None:
        """Take it from the shelf until `close`. layered: it is one of two. Raises BootseerError."""
        self.wish = wish
        self.label = label
        self.folder = content.folder
        self.plan = Plan()
        self.is_settled = False  # the plan says all that a start touches
        self._is_watched = place is not None and place.shared
        self.recorder: Recorder | None = None
        self._job = job
        self._content = content
        self._process = process
        self._shelf = shelf
        self._path = path
        self._fingerprint = fingerprint
        self._place = place
        self._layered = layered
        self._on_fault = on_fault
        self._snapshot: Snapshot | None = None
        self.mounted: Path | None = None  # where, if it is an image
        self.reader, self.warm = shelf.take(
            content.id,
            content.layout,
            content.digests,
            kind=wish.kind,
            uid=job.uid,
            gid=job.gid,
            mtime_ns=mtime_ns,
            sources=content.sources,
            on_fault=on_fault,
        )
        self.cached_bytes = self.reader.blob.present_bytes
        self.before = _copy(self.reader.usage)
        self._waits_from = self.reader.waits.baseline()

    @property
    def found(self) -> Found:
        """What an agent after this one needs to hold the blob (held.py)."""
        path = "" if self.folder else self._path or self.wish.name  # a URI
        return Found(self.reader.blob.id, self.wish.kind, path, self.folder)

    @property
    def trace_key(self) -> str:
        """What its traces are kept under: the same on all nodes, unlike the id of an adopted file.

        Of checkpoints each start has a new one, and each node its own part of it.
        """
        if self._place:
            return "place-" + hashlib.sha256(self._place.key.encode(errors="replace")).hexdigest()
        if not self.reader.blob.unmanaged:
            return self.reader.blob.id
        return "file-" + hashlib.sha256(f"{self._path}\0{self._fingerprint}".encode()).hexdigest()

    @property
    def is_unread(self) -> bool:
        """Whether the last start was shown it and read nothing of it."""
        return self.plan.full_starts > 0 and not self.plan.blocks

    @property
    def partial(self) -> bool:
        """Whether reads may have been answered by the kernel, unseen by the recorder."""
        pushed = self.reader.usage.pushed_bytes > self.before.pushed_bytes
        return self.warm or pushed or self._shelf.bypassed(self.reader)

    @property
    def waited(self) -> Waited:
        """How long its reads have waited since it was looked up, those of the user's other jobs too."""
        return self.reader.waits.since(self._waits_from)

    @property
    def fetched_bytes(self) -> int:
        """What came of it over the link since it was looked up."""
        return self.reader.usage.fetched_bytes - self.before.fetched_bytes

    def summary(self, waited: Waited | None = None) -> dict[str, Any]:
        """What was read of it since it was looked up, as the event tells it.

        waited: how long reads waited, where that is not until now.
        """
        usage, before = self.reader.usage, self.before
        if waited is None:
            waited = self.waited
        read_bytes = usage.read_bytes - before.read_bytes
        miss_bytes = usage.miss_bytes - before.miss_bytes
        return {
            "target": self.label,
            "what": self.wish.kind,
            "reads": usage.reads - before.reads,
            "reads_blocked": usage.reads_blocked - before.reads_blocked,
            "pushed_bytes": usage.pushed_bytes - before.pushed_bytes,
            "read_bytes": read_bytes,
            "miss_bytes": miss_bytes,
            "hit_bytes": max(0, read_bytes - miss_bytes),
            "blocked_s": usage.blocked_s - before.blocked_s,
            "waited_s": waited.waited_s,
            "longest_wait_s": waited.longest_s,
            "cached_bytes": self.cached_bytes,
            "store_bytes": usage.store_bytes - before.store_bytes,
            "origin_bytes": usage.origin_bytes - before.origin_bytes,
            "fetch_s": usage.fetch_s - before.fetch_s,
            "disk_s": usage.disk_s - before.disk_s,
            "first_ns": usage.first_ns,
            "last_ns": usage.last_ns,
        }

    def is_signed(self, key: Key) -> bool:
        """Whether the kernel may mount it: an agent packed it for this user, or root for all."""
        blob = self.reader.blob
        return any(is_signed(key, uid, blob.id, self._content.signature) for uid in (blob.uid, 0))

    def take_plan(self, job_class: str, *, allow: Callable[[int], None]) -> None:
        """Learn what earlier starts touched. Without a plan, what is read comes when it is read.

        allow: asked before a plan of so many blocks is kept in memory; raises InputError when they are too
        many.
        """
        layout = self.reader.blob.layout
        # Another class may read less of a checkpoint, of which nothing but the plan is brought.
        any_class = self.wish.kind != "checkpoint"
        fields: dict[str, Any] = {"class": job_class, "blob": self.trace_key, "any_class": any_class}
        fields |= {"blocks": layout.blocks, "block_bytes": layout.block_bytes}
        try:
            reply = self._process.call("plan", **fields)
        except StoreError as error:
            self._on_fault("plan_not_used", error.message)
            return
        try:
            if "warning" in reply.fields:
                self._on_fault("trace_damaged", str(reply.fields["warning"]))
            content = os.pread(reply.fds[0], trace.LIMIT_BYTES, 0)
            self._use_plan(decode_plan(content, blocks=layout.blocks), allow)
        except (IntegrityError, InputError) as error:
            self._on_fault("plan_not_used", error.message)
        finally:
            for fd in reply.fds:
                os.close(fd)

    def _use_plan(self, plan: Plan, allow: Callable[[int], None]) -> None:
        if self.wish.kind != "checkpoint":
            self.is_settled = plan.full_starts >= SETTLED_STARTS
        elif not plan.full_starts:  # nothing but a plan is brought: it must know all
            return
        else:
            self.is_settled, self._is_watched = True, False
            if len(plan.blocks) >= _WHOLE * self.reader.blob.layout.blocks:
                return
        allow(len(plan.blocks))
        self.plan = plan

    def push(self) -> None:
        """Have what is prefetched of it given to the kernel."""
        self._shelf.push(self.reader)

    def mount_image(self) -> Path:
        """Have the kernel mount it, which must be signed; gives where. Raises BootseerError."""
        self.mounted = self._shelf.mount_image(self.reader)
        return self.mounted

    def mount_snapshot(self, folder: Path, key: Key) -> Path | None:
        """Mount it below `folder`, or take up the mount there: the fastest way that this node has.

        key: the site's. None: the node has no way. Raises BootseerError.
        """
        if self.is_signed(key):
            try:
                return self.mount_image()
            except BootseerError as error:
                self._on_fault("kernel_mount_failed", error.message)
        all_root, job = bool(self._content.signature), self._job
        if not squashfuse(job.uid, job.gid, all_root=all_root):
            return None
        place = folder / self.reader.blob.id[:16]
        self._snapshot = Snapshot(self.served_path, place, uid=job.uid, gid=job.gid, all_root=all_root)
        self.mounted = self._snapshot.path
        return self.mounted

    @property
    def served_path(self) -> Path:
        """Where the blob can be opened by its user."""
        return self._shelf.served_path(self.reader)

    @property
    def path(self) -> Path:
        """Where the blob can be bound from: its cache file once it is complete, before that the FUSE file.

        A checkpoint's stays the FUSE file until it is known what this node reads of it, which is seen there.
        """
        if self._is_watched:
            return self.served_path
        return self._shelf.path(self.reader)

    @property
    def is_packed_here(self) -> bool:
        """Whether it is a whole squashfs of ours, and not a file that must keep its bytes, or a layer."""
        return self.mounted is not None and not (self._layered or self.reader.blob.unmanaged)

    def close(self) -> None:
        """Let go of the blob and its mount."""
        self.mounted = None
        if self._snapshot:
            self._snapshot.close()
            self._snapshot = None
        self.reader.waits.forget(self._waits_from)
        self._shelf.give_back(self.reader, self._content.sources, self._on_fault)


def stored_content(
    process: FetchProcess, fields: dict[str, Any], manifest_fd: int, *, allow: Callable[[int], None]
) -> Content:
    """A blob of the store, as the fetch process says. Raises BootseerError. allow: see Target."""
    size_bytes = min(os.fstat(manifest_fd).st_size, MANIFEST_LIMIT_BYTES)
    allow(size_bytes)
    manifest = decode(os.pread(manifest_fd, size_bytes, 0))
    source = FetchSource("store", process, fields["handle"], manifest.layout)
    folder, signature = str(fields["folder"])[:_PATH_LIMIT], str(fields["signature"])
    return Content(manifest.id, manifest.layout, manifest.digests, [source], folder, signature)


def original_source(process: FetchProcess, handle: int, layout: Layout) -> FetchSource:
    """The file itself, which holds the blob's bytes one after the other."""
    return FetchSource("origin", process, handle, flat(layout))


def _copy(usage: Usage) -> Usage:
    return Usage(**{name: getattr(usage, name) for name in Usage.__slots__})
