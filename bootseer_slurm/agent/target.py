"""One thing that a job starts from, on this node: looked up, kept on the shelf, ready to be shown.

Owns the blob's sources and the descriptor of the original. All reading is done by the job's fetch process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootseer_slurm import mounts
from bootseer_slurm.agent.held import note_of
from bootseer_slurm.agent.protocol import Message
from bootseer_slurm.agent.request import Job, Wish
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.source import FetchSource, adopted_id, flat
from bootseer_slurm.blob import trace
from bootseer_slurm.blob.manifest import (
    BLOCK_BYTES,
    CHUNK_BYTES,
    DIGEST_BYTES,
    MANIFEST_LIMIT_BYTES,
    MAX_BLOB_BYTES,
    Layout,
    decode,
)
from bootseer_slurm.blob.reader import OnFault, Reader, Source, Usage
from bootseer_slurm.blob.trace import Plan, Recorder, decode_plan
from bootseer_slurm.env.attach import Layer, Snapshot, Unpacked, squashfuse
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.fetch.process import FetchProcess, Reply
from bootseer_slurm.image.trust import Key, is_signed

_SAME_TIMEOUT_S = 1.0  # a step waits for this
_HUGE_BYTES = 64 * 2**30
_PATH_LIMIT = 4096


@dataclass(frozen=True, slots=True)
class Bind:
    """A mount to be shown over the original: the plugin checks that it still is this file."""

    fd: int
    device: int
    inode: int
    path: str


class Target:
    """A wish that was looked up."""

    def __init__(
        self,
        wish: Wish,
        job: Job,
        process: FetchProcess,
        shelf: Shelf,
        *,
        roots: tuple[Path, ...],
        digest: str = "",
        image: str = "",
        allow: Callable[[int], None],
        on_fault: OnFault,
    ) -> None:
        """Look it up. Raises BootseerError.

        digest: of an image, what its tag means now. image: of an environment, the image that it is used in.
        allow: asked before so many bytes of digests are kept in memory; raises InputError when they are too
        many. on_fault: told of faults of the data path, see Reader.
        """
        self.wish = wish
        self.path: str | None = None
        self.warning: str | None = None
        self.plan = Plan()
        self.recorder: Recorder | None = None
        self._process = process
        self._shelf = shelf
        self._allow = allow
        self._on_fault = on_fault
        self._original: int | None = None
        self._sources: list[Source] = []
        self._snapshot: Snapshot | Unpacked | None = None
        self._layer: Layer | None = None
        self._mounted: Path | None = None  # of an environment
        self._store_folder = ""
        reply = process.call("resolve", kind=wish.kind, name=wish.name, digest=digest, image=image)
        fds = list(reply.fds)
        try:
            if "path" in reply.fields:
                self._original = fds.pop(0)
                self.path = self._shown_path(roots)
            self.reader, self.warm = self._take(reply, fds, job)
        except BaseException:
            self.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)
        self.first: object = reply.fields.get("first")  # as the user's process says
        self.cached_bytes = self.reader.blob.present_bytes
        self.before = _copy(self.reader.usage)

    def _shown_path(self, roots: tuple[Path, ...]) -> str:
        """The original's path, as the kernel has it: what the fetch process says of it is not believed."""
        path = os.readlink(f"/proc/self/fd/{self._original}")
        if not any(Path(path).is_relative_to(root) and Path(path) != root for root in roots):
            listed = ", ".join(str(root) for root in roots)
            raise InputError(
                f"{self.wish.kind} {path}: not below {listed}, where this site allows it to be shown"
            )
        return path

    def _take(self, reply: Reply, fds: list[int], job: Job) -> tuple[Reader, bool]:
        fields = reply.fields
        self.fingerprint = str(fields.get("fingerprint", ""))
        self.signature = str(fields.get("signature", ""))
        self.warning = fields.get("warning")
        if "blob" in fields:
            size_bytes = min(os.fstat(fds[0]).st_size, MANIFEST_LIMIT_BYTES)
            self._allow(size_bytes)
            content = os.pread(fds[0], size_bytes, 0)
            manifest = decode(content)
            blob_id, layout, digests = manifest.id, manifest.layout, manifest.digests
            if "size_bytes" in fields and layout.size_bytes != fields["size_bytes"]:
                raise IntegrityError(f"{self.wish.name}: the blob in the store has another size")
            self._sources.append(FetchSource("store", self._process, fields["blob"]["handle"], layout))
            self._store_folder = str(fields["blob"]["folder"])[:_PATH_LIMIT]
        elif "origin" in fields and self._original is not None:
            status = os.fstat(self._original)
            size_bytes = int(fields["size_bytes"])
            # A digest a block is kept in memory: a huge file has large blocks.
            huge = size_bytes > _HUGE_BYTES
            layout, digests = Layout(size_bytes, CHUNK_BYTES if huge else BLOCK_BYTES), None
            self._allow(max(0, layout.blocks) * DIGEST_BYTES)
            blob_id = adopted_id(self.path or "", status)
        elif self.warning:
            raise StoreError(self.warning)
        elif self.wish.kind == "environment":
            raise NotFound(
                f"environment {self.wish.name}: no snapshot of it in the store (`bootseer env save`)"
            )
        else:
            raise NotFound(f"{self.wish.kind} {self.wish.name}: not in the store")
        if not 0 < layout.size_bytes <= MAX_BLOB_BYTES:
            raise InputError(f"{self.wish.kind} {self.wish.name}: empty, or larger than a blob can be")
        if "origin" in fields and self.wish.kind != "environment":
            self._sources.append(FetchSource("origin", self._process, fields["origin"], flat(layout)))
        return self._shelf.take(
            blob_id,
            layout,
            digests,
            kind=self.wish.kind,
            uid=job.uid,
            gid=job.gid,
            mtime_ns=os.fstat(self._original).st_mtime_ns if self._original is not None else 0,
            sources=self._sources,
            on_fault=self._on_fault,
        )

    @property
    def note(self) -> Message:
        """What an agent after this one needs to hold the blob (held.py)."""
        blob = self.reader.blob
        return note_of(blob.id, self.wish.kind, path=self.path or "", folder=self._store_folder)

    @property
    def trace_key(self) -> str:
        """What its traces are kept under: the same on all nodes, unlike the id of an adopted file."""
        if not self.reader.blob.adopted:
            return self.reader.blob.id
        return "file-" + hashlib.sha256(f"{self.path}\0{self.fingerprint}".encode()).hexdigest()

    @property
    def partial(self) -> bool:
        """Whether reads may have been answered by the kernel, unseen by the recorder."""
        pushed = self.reader.usage.pushed_bytes > self.before.pushed_bytes
        return self.warm or pushed or self._shelf.bypassed(self.reader)

    def summary(self) -> dict[str, Any]:
        """What was read of it since it was looked up, as the event tells it."""
        usage, before = self.reader.usage, self.before
        read_bytes = usage.read_bytes - before.read_bytes
        miss_bytes = usage.miss_bytes - before.miss_bytes
        return {
            "target": self.wish.name,
            "what": self.wish.kind,
            "reads": usage.reads - before.reads,
            "reads_blocked": usage.reads_blocked - before.reads_blocked,
            "pushed_bytes": usage.pushed_bytes - before.pushed_bytes,
            "read_bytes": read_bytes,
            "miss_bytes": miss_bytes,
            "hit_bytes": max(0, read_bytes - miss_bytes),
            "blocked_s": usage.blocked_s - before.blocked_s,
            "first_ns": usage.first_ns,
            "last_ns": usage.last_ns,
        }

    def is_signed(self, key: Key) -> bool:
        """Whether the kernel may mount this image: an agent packed it for this user, or root for all."""
        blob = self.reader.blob
        return any(is_signed(key, uid, blob.id, self.signature) for uid in (blob.uid, 0))

    def take_plan(self, job_class: str) -> None:
        """Learn what earlier starts touched. Without a plan, what is read comes when it is read."""
        if self.wish.kind == "checkpoint":
            return
        layout = self.reader.blob.layout
        fields: dict[str, Any] = {"class": job_class, "blob": self.trace_key}
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
            self.plan = decode_plan(content, blocks=layout.blocks)
        except IntegrityError as error:
            self._on_fault("plan_not_used", error.message)
        finally:
            for fd in reply.fds:
                os.close(fd)

    def push(self) -> None:
        """Have what is prefetched of it given to the kernel."""
        self._shelf.push(self.reader)

    def mount_image(self) -> None:
        """Have the kernel mount this image, which must be signed. Raises BootseerError."""
        self._shelf.mount_image(self.reader)

    def mount_snapshot(self, folder: Path, disk: Path, job: Job, key: Key, *, writable: bool) -> None:
        """Mount an environment's snapshot, or take up the mount there: the fastest way that this node has.

        folder: for the job's mounts. disk: for its files, where nothing can mount them. key: the site's.
        writable: with a layer over it that goes with the job. Raises BootseerError.
        """
        place = folder / self.reader.blob.id[:16]
        self._mounted = self._mount_by_kernel(key)
        if self._mounted is None:
            served, all_root = self._shelf.served_path(self.reader), bool(self.signature)
            if squashfuse(job.uid, job.gid, all_root=all_root):
                self._snapshot = Snapshot(served, place, uid=job.uid, gid=job.gid, all_root=all_root)
            else:
                self._snapshot = Unpacked(served, disk / place.name, uid=job.uid, gid=job.gid)
            self._mounted = self._snapshot.path
        if writable:
            layer = place.with_name(f"{place.name}.rw")
            self._layer = Layer(self._mounted, layer, uid=job.uid, gid=job.gid)

    def _mount_by_kernel(self, key: Key) -> Path | None:
        """Where the kernel mounted it; None when it is not signed, or this node cannot."""
        if not self.is_signed(key):
            return None
        try:
            return self._shelf.mount_image(self.reader)
        except BootseerError as error:
            self._on_fault("kernel_mount_failed", error.message)
            return None

    def served_path(self) -> Path:
        """Where the blob can be opened by its user, for targets that have no path of their own."""
        return self._shelf.served_path(self.reader)

    def bind(self) -> Bind:
        """A fresh mount of the blob for one step; the caller closes its descriptor.

        Raises InputError when the original changed, BootseerError or OSError when it cannot be made.
        """
        if self.path is None or self._original is None:
            raise NotFound(f"{self.wish.name}: has no path to be shown at")
        fields: dict[str, Any] = {"kind": self.wish.kind, "name": self.path, "fingerprint": self.fingerprint}
        if not self._process.call("same", timeout_s=_SAME_TIMEOUT_S, **fields).fields.get("same"):
            raise InputError(f"{self.path}: was changed after it was looked up")
        status = os.fstat(self._original)
        if self._layer:
            fd = mounts.bind_clone(self._layer.path, read_only=False)
        else:
            fd = mounts.bind_clone(self._mounted or self._shelf.path(self.reader))
        return Bind(fd, status.st_dev, status.st_ino, self.path)

    def close(self) -> None:
        """Let go of the blob, the mount and the original."""
        if self._layer:
            self._layer.close()
            self._layer = None
        if self._snapshot:
            self._snapshot.close()
            self._snapshot = None
        if hasattr(self, "reader"):
            self._shelf.give_back(self.reader, self._sources, self._on_fault)
        if self._original is not None:
            os.close(self._original)
            self._original = None


def _copy(usage: Usage) -> Usage:
    return Usage(**{name: getattr(usage, name) for name in Usage.__slots__})
