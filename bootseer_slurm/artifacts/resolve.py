"""Resolving an artifact: asking the process of the job's user, checking what it says, opening the blobs.

**Whose bytes may be shown over an original.** Programs with more rights than the job's user trust a path by
its owner: sudo, setuid programs, PAM. So over an original go bytes of that file itself, or of a blob that its
owner or root published (blob/published.py). Over what is the user's own, go all that his process names.

Of a folder its own owner counts, whoever owns the entries: he can rename each away and put another in its
place, also where the sticky bit is set. He cannot do that to a mount, so a folder with one in it stays.
Set-user-ID bits in a blob have no effect, for mounts are nosuid. A layer that can be written to lies over an
environment of the user's own only. What has no original covers nothing: it is served below a folder of
root's, by a name that is there before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from bootseer_slurm import mounts
from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.artifacts.layer import Layer, trace_key
from bootseer_slurm.artifacts.open_blobs import OpenBlobs, Use
from bootseer_slurm.artifacts.resolved import Original, ResolvedArtifact
from bootseer_slurm.artifacts.source import (
    BlobDescription,
    Opened,
    OriginalFile,
    ProcessOfJob,
    Trust,
    original_source,
    remote_id,
    stored_blob,
    unmanaged_id,
)
from bootseer_slurm.blob.digest import DIGEST_BYTES, PREFERRED
from bootseer_slurm.blob.manifest import CHUNK_BYTES, MAX_BLOB_BYTES, Layout, block_bytes_of
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.cache.sources import OnFault
from bootseer_slurm.errors import InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.events import BELOW_LAYER
from bootseer_slurm.image.signing import Key
from bootseer_slurm.slurm.allocation import Rank
from bootseer_slurm.userproc.client import Found, UserProcess
from bootseer_slurm.userproc.protocol import CheckpointFolder, Resolve

_HUGE_BYTES = 64 * 2**30


class ShadowRefused(InputError):
    """What the store has may not be shown over this original, which is another user's."""


@dataclass(frozen=True, slots=True)
class Context:
    """The surroundings in which artifacts of one job are resolved.

    roots: below which originals may be shown. store_uri, key: of the site, which tell who published a blob.
    allow: asked before so many bytes of digests are kept in memory; raises InputError when they are too many.
    join: has the job's other nodes exchange a blob, whose kind it is given too.
    """

    process: ProcessOfJob
    blobs: OpenBlobs
    roots: tuple[Path, ...]
    uid: int
    gid: int
    rank: Rank
    store_uri: str
    key: Key
    allow: Callable[[int], None]
    join: Callable[[BlobHandle, str], None]


def resolve_artifact(
    request: Resolve, context: Context, on_fault: OnFault, *, role: str = ""
) -> ResolvedArtifact | CheckpointFolder:
    """Resolve an artifact, and open its blobs. A checkpoint may be a folder: then its files are named.

    role: of a file of a checkpoint, what it is whatever step that is of. on_fault: of cache.sources.BlobUser.
    Raises BootseerError.
    """
    process, asked_s = context.process(), time.monotonic()
    found = process.resolve(request)
    if isinstance(found, CheckpointFolder):
        if not request.nodes:
            raise IntegrityError(f"{request.kind} {request.name}: the user's process says it is a folder")
        return found
    ref = ArtifactRef(request.kind, request.name)
    opening = _Opening(ref, found, process, context, on_fault, role or found.reply.role)
    try:
        opening.open_all()
    except BaseException:
        opening.close()
        raise
    finally:
        found.close()
    return ResolvedArtifact(ref, context.process, found.reply, asked_s, opening.original, opening.layers)


@dataclass(slots=True)
class _Opening:
    """An artifact that is being opened."""

    ref: ArtifactRef
    found: Found
    process: UserProcess
    context: Context
    on_fault: OnFault
    role: str
    original: Original | None = None
    layers: list[Layer] = field(default_factory=list)

    def open_all(self) -> None:
        """Check the original, and open the blobs. Raises BootseerError."""
        fd = self.found.take_original()
        if fd is not None:
            self.original = Original(fd)
            self._check_place(self.original)
        descriptions = self._describe()
        for number, description in enumerate(descriptions):
            layer = self._open_layer(description, self.ref.name + (BELOW_LAYER if number else ""))
            layer.is_layered = len(descriptions) > 1
            self.layers.append(layer)

    def close(self) -> None:
        for layer in self.layers:
            layer.close()
        if self.original is not None:
            self.original.close()

    def _check_place(self, original: Original) -> None:
        """See that it may be covered where it lies. Raises InputError."""
        roots = self.context.roots
        if not original.is_below(roots):
            listed = ", ".join(map(str, roots))
            what = f"{self.ref.kind} {original.path}"
            raise InputError(f"{what}: not below {listed}, where this site allows it to be shown")
        inside = mounts.mounts_below(original.path) if self.ref.kind == "environment" else ()
        if any(str(mount.point) != original.path for mount in inside):
            raise InputError(f"{self.ref.kind} {original.path}: something else is mounted in it")

    def _open_layer(self, description: BlobDescription, label: str) -> Layer:
        context = self.context
        path = self.original.path if self.original else ""
        mtime_ns = self.original.status.st_mtime_ns if self.original else 0
        use = Use(self.ref.kind, context.uid, context.gid, mtime_ns)
        key = trace_key(
            description,
            role=f"{self.role}\0{context.rank.key}" if self.role else "",
            path=path,
            fingerprint=self.found.reply.fingerprint,
        )
        handle = context.blobs.open(description, use, self.on_fault)
        context.join(handle, self.ref.kind)
        is_watched = bool(self.role) and context.rank.nodes > 1
        return Layer(self.ref, description, handle, label, key, path or self.ref.name, is_watched=is_watched)

    def _describe(self) -> list[BlobDescription]:
        """The blobs that stand for it: of the store, else the original itself. Raises BootseerError."""
        reply, ref, process = self.found.reply, self.ref, self.context.process
        size_bytes, handle = reply.size_bytes or 0, reply.original_handle
        stored = descriptions = self._stored()
        if stored:
            if reply.size_bytes is not None and descriptions[0].layout.size_bytes != size_bytes:
                raise IntegrityError(f"{ref.name}: the blob in the store has another size")
        elif handle is not None and self.original is not None:
            blob_id = unmanaged_id(self.original.path, self.original.status, self.context.uid)
            descriptions = [self._describe_unmanaged(blob_id, size_bytes)]
        elif handle is not None and reply.identity:  # a checkpoint of a URI, which has no path
            descriptions = [self._describe_unmanaged(remote_id(reply.identity), size_bytes)]
        elif reply.warning:
            raise StoreError(reply.warning)
        elif ref.kind == "environment" and self._is_anothers:
            whose = f"environment {ref.name} {self._whose}"
            raise ShadowRefused(f"{whose}, who shares no snapshot of it (`bootseer env save --share`)")
        elif ref.kind == "environment":
            raise NotFound(f"environment {ref.name}: no snapshot of it in the store (`bootseer env save`)")
        else:
            raise NotFound(f"{ref.kind} {ref.name}: not in the store")
        if not all(0 < each.layout.size_bytes <= MAX_BLOB_BYTES for each in descriptions):
            raise InputError(f"{ref.kind} {ref.name}: empty, or larger than a blob can be")
        if handle is not None and ref.kind != "environment":
            path = self.original.path if self.original else ref.name
            original = OriginalFile(ref.kind, path, self.context.uid, "" if stored else descriptions[0].id)
            opened = Opened(self.process, handle)
            source = original_source(process, original, descriptions[0].layout, opened)
            descriptions[0].sources.append(source)
        return descriptions

    def _stored(self) -> list[BlobDescription]:
        """The store's blobs that stand for it; none of a file whose own bytes are to be used instead.

        Raises BootseerError.
        """
        context = self.context
        descriptions = [
            stored_blob(
                context.process,
                Opened(self.process, stored.handle),
                stored,
                fd,
                Trust(context.store_uri, context.key, context.allow),
            )
            for stored, fd in zip(self.found.reply.blobs, self.found.manifest_fds, strict=True)
        ]
        publishers = {each.publisher for each in descriptions}
        if self.original is None or not self._is_anothers or publishers <= {self.original.status.st_uid, 0}:
            return descriptions
        message = f"{self._whose}, and neither he nor root is known to have published what the store has"
        if self.found.reply.original_handle is None:
            raise ShadowRefused(f"{self.ref.kind} {self.ref.name} {message}")
        self.on_fault("shadow_refused", f"{message}: it is read as it lies")
        return []

    @property
    def _is_anothers(self) -> bool:
        return self.original is not None and self.original.status.st_uid != self.context.uid

    @property
    def _whose(self) -> str:
        owner = self.original.status.st_uid if self.original else None
        return f"belongs to user {owner}"

    def _describe_unmanaged(self, blob_id: str, size_bytes: int) -> BlobDescription:
        """A file that is used as it lies. A digest a block is kept in memory: a huge one has large blocks."""
        block_bytes = CHUNK_BYTES if size_bytes > _HUGE_BYTES else block_bytes_of(self.ref.kind)
        layout = Layout(size_bytes, block_bytes, digest=PREFERRED)
        self.context.allow(max(0, layout.blocks) * DIGEST_BYTES)
        return BlobDescription(blob_id, layout, None)
