"""One thing that a job starts from, on this node: looked up, ready to be shown.

Owns the descriptor of the original, and the blobs that stand for it. All reading is done by the job's fetch
process.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bootseer_slurm import mounts
from bootseer_slurm.agent.part import Content, Part, Place, original_source, stored_content
from bootseer_slurm.agent.request import Job, Wish
from bootseer_slurm.agent.saving import View
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.source import adopted_id, remote_id
from bootseer_slurm.blob.digest import DIGEST_BYTES, PREFERRED
from bootseer_slurm.blob.manifest import CHUNK_BYTES, MAX_BLOB_BYTES, Layout, block_bytes_of
from bootseer_slurm.cache.reader import OnFault
from bootseer_slurm.env.mounting import Overlay, Unpacked
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.events import BELOW_LAYER
from bootseer_slurm.fetch.process import FetchProcess, NoAnswer, Reply
from bootseer_slurm.image.signing import Key

# A step waits for the check that an original is still the same.
_SAME_TIMEOUT_S = 4.0
# On a full link the check is slow: an environment's asks for a hundred small files, one after the other. A
# step that was left with the original read all of it over that link: its start took twice as long. So what
# was looked up this recently counts as the same when there is no answer.
_RECENT_S = 60.0
_RECENT_TIMEOUT_S = 1.0
_FRESH_S = 5.0
_HUGE_BYTES = 64 * 2**30


@dataclass(frozen=True, slots=True)
class Bind:
    """A mount to be shown over the original: the plugin checks that it still is this file."""

    fd: int
    device: int
    inode: int
    path: str


@dataclass(frozen=True, slots=True)
class Use:
    """How an environment is used. image: where. job_class: of a job that may install to it."""

    image: str = ""
    job_class: str = ""


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
        place: Place | None = None,
        use: Use = Use(),
        allow: Callable[[int], None],
        on_fault: OnFault,
    ) -> None:
        """Look it up. Raises BootseerError.

        digest: of an image, what its tag means now. place: of a checkpoint, see Part. use: of an environment.
        allow: asked before so many bytes of digests are kept in memory; raises InputError when they are too
        many. on_fault: told of faults of the data path, see Reader.
        """
        self.wish = wish
        self.path: str | None = None
        self.parts: list[Part] = []  # the topmost first
        self._job = job
        self._process = process
        self._allow = allow
        self._on_fault = on_fault
        self._original: int | None = None
        self._unpacked: Unpacked | None = None
        self._overlay: Overlay | None = None
        self._mounted: Path | None = None  # of an environment
        named: dict[str, Any] = {"kind": wish.kind, "name": wish.name, "digest": digest}
        reply = process.call("resolve", **named, image=use.image, job_class=use.job_class)
        fields, fds = reply.fields, list(reply.fds)
        # As the user's process says
        self.fingerprint = str(fields.get("fingerprint", ""))
        self._looked_up_s = time.monotonic()
        self.warning: str | None = fields.get("warning")
        self.first: object = fields.get("first")
        self.image_digest = str(fields.get("image", ""))  # that an environment's snapshot is for
        try:
            if "path" in fields:
                self._original = fds.pop(0)
                self.path = self._shown_path(roots)
            contents = self._contents(reply, fds)
            for number, content in enumerate(contents):
                self.parts.append(
                    Part(
                        wish,
                        job,
                        content,
                        process,
                        shelf,
                        label=wish.name + (BELOW_LAYER if number else ""),
                        path=self.path or "",
                        fingerprint=self.fingerprint,
                        place=place,
                        layered=len(contents) > 1,
                        mtime_ns=0 if self._original is None else os.fstat(self._original).st_mtime_ns,
                        on_fault=on_fault,
                    )
                )
        except BaseException:
            self.close()
            raise
        finally:
            for fd in fds:
                os.close(fd)

    def _shown_path(self, roots: tuple[Path, ...]) -> str:
        """The original's path, as the kernel has it: what the fetch process says of it is not believed."""
        path = os.readlink(f"/proc/self/fd/{self._original}")
        if not any(Path(path).is_relative_to(root) and Path(path) != root for root in roots):
            listed = ", ".join(str(root) for root in roots)
            raise InputError(
                f"{self.wish.kind} {path}: not below {listed}, where this site allows it to be shown"
            )
        return path

    def _contents(self, reply: Reply, fds: list[int]) -> list[Content]:
        """The blobs that stand for it: of the store, else the original itself. Raises BootseerError."""
        fields, kind, name = reply.fields, self.wish.kind, self.wish.name
        if "blobs" in fields:
            found = [
                stored_content(self._process, blob, fd, allow=self._allow)
                for blob, fd in zip(fields["blobs"][:2], fds, strict=True)
            ]
            if "size_bytes" in fields and found[0].layout.size_bytes != fields["size_bytes"]:
                raise IntegrityError(f"{name}: the blob in the store has another size")
        elif "origin" in fields and self._original is not None:
            blob_id = adopted_id(self.path or "", os.fstat(self._original))
            found = [self._without_manifest(blob_id, int(fields["size_bytes"]))]
        elif "identity" in fields:  # a checkpoint of a URI, which has no path
            found = [self._without_manifest(remote_id(fields["identity"]), int(fields["size_bytes"]))]
        elif self.warning:
            raise StoreError(self.warning)
        elif kind == "environment":
            raise NotFound(f"environment {name}: no snapshot of it in the store (`bootseer env save`)")
        else:
            raise NotFound(f"{kind} {name}: not in the store")
        if not found:
            raise IntegrityError(f"{kind} {name}: the fetch process names no blob")
        if not all(0 < content.layout.size_bytes <= MAX_BLOB_BYTES for content in found):
            raise InputError(f"{kind} {name}: empty, or larger than a blob can be")
        if "origin" in fields and kind != "environment":
            found[0].sources.append(original_source(self._process, fields["origin"], found[0].layout))
        return found

    def _without_manifest(self, blob_id: str, size_bytes: int) -> Content:
        """A file that is used as it lies. A digest a block is kept in memory: a huge one has large blocks."""
        block_bytes = CHUNK_BYTES if size_bytes > _HUGE_BYTES else block_bytes_of(self.wish.kind)
        layout = Layout(size_bytes, block_bytes, digest=PREFERRED)
        self._allow(max(0, layout.blocks) * DIGEST_BYTES)
        return Content(blob_id, layout, None)

    def mount_snapshot(self, folder: Path, disk: Path, key: Key, *, writable: bool) -> None:
        """Mount an environment's snapshot, or take up the mount there: the fastest way that this node has.

        folder: for the job's mounts. disk: for its files, where nothing can mount them. key: the site's.
        writable: with a layer over it that goes with the job. Raises BootseerError.
        """
        job, name = self._job, self.parts[0].reader.blob.id[:16]
        images = [part.served_path for part in self.parts]
        with ThreadPoolExecutor(len(self.parts)) as pool:
            mounted = list(pool.map(lambda part: part.mount_snapshot(folder, key), self.parts))
        lower = [path for path in mounted if path is not None]
        if len(lower) == len(self.parts) > 1 and not writable:
            try:
                self._overlay = self._layered(folder, lower, writable=False)
            except BootseerError as error:
                self._on_fault("overlay_failed", error.message)
                lower = []
        if len(lower) < len(self.parts):
            self._unpacked = Unpacked.unpack(images, disk / name, uid=job.uid, gid=job.gid)
            lower = [self._unpacked.path]
        self._mounted = lower[0]
        if writable:
            self._overlay = self._layered(folder, lower, writable=True)

    def _layered(self, folder: Path, lower: list[Path], *, writable: bool) -> Overlay:
        """Its place tells the environment, not the blobs: what a job sees stays, whatever is saved."""
        place = folder / f"{hashlib.sha256(os.fsencode(self.path or '')).hexdigest()[:16]}.layers"
        return Overlay.mount(lower, place, uid=self._job.uid, gid=self._job.gid, writable=writable)

    def installed_view(self) -> View:
        """The snapshot with what was installed over it, read-only, and the original that it is shown at.

        Raises NotFound when it is closed, OSError when it cannot be made. The caller closes its descriptor.
        """
        overlay, original = self._overlay, self._original
        if overlay is None or original is None:
            raise NotFound(f"{self.wish.name}: the job is over")
        status = os.fstat(original)
        return View(mounts.bind_clone(overlay.path), status.st_dev, status.st_ino)

    @property
    def owner(self) -> int | None:
        """The user id that the original belongs to; None without one."""
        return None if self._original is None else os.fstat(self._original).st_uid

    @property
    def store_folder(self) -> str:
        """Where in the store what is shown lies; "" when it is closed."""
        return self.parts[0].folder if self.parts else ""

    @property
    def is_writable(self) -> bool:
        return self._overlay is not None and self._overlay.writable

    def served_path(self) -> Path:
        """Where the blob can be opened by its user, for targets that have no path of their own.

        Raises NotFound when it is closed.
        """
        if not self.parts:
            raise NotFound(f"{self.wish.name}: the job is over")
        return self.parts[0].served_path

    def bind(self, *, is_first: bool = False) -> Bind | None:
        """A fresh mount of the blob for one step; the caller closes its descriptor.

        is_first: nothing of the job ran before this step on any node: what was just looked up is the same.

        Of a checkpoint without a path of its own: over its FUSE file, once all of it is in the cache, whose
        file is read without a detour. None where there is nothing to be shown.
        Raises InputError when the original changed, NoAnswer when nobody says whether it did, BootseerError
        or OSError when the mount cannot be made.
        """
        if not self.parts:
            raise NotFound(f"{self.wish.name}: the job is over")
        if self.path is None or self._original is None:
            path, served = self.parts[0].path, self.served_path()
            if self.wish.kind != "checkpoint" or path == served:
                return None
            status = os.stat(served)
            return Bind(mounts.bind_clone(path), status.st_dev, status.st_ino, str(served))
        if not (is_first and time.monotonic() - self._looked_up_s < _FRESH_S):
            self._check_same()
        status = os.fstat(self._original)
        if self._overlay:
            fd = mounts.bind_clone(self._overlay.path, read_only=not self._overlay.writable)
        else:
            fd = mounts.bind_clone(self._mounted or self.parts[0].path)
        return Bind(fd, status.st_dev, status.st_ino, self.path)

    def _check_same(self) -> None:
        fields: dict[str, Any] = {"kind": self.wish.kind, "name": self.path, "fingerprint": self.fingerprint}
        is_recent = time.monotonic() - self._looked_up_s < _RECENT_S
        timeout_s = _RECENT_TIMEOUT_S if is_recent else _SAME_TIMEOUT_S
        try:
            is_same = self._process.call("same", timeout_s=timeout_s, **fields).fields.get("same")
        except NoAnswer:
            if not is_recent:
                raise
            return
        if not is_same:
            raise InputError(f"{self.path}: was changed after it was looked up")

    def close(self) -> None:
        """Let go of the blobs, the mounts and the original."""
        if self._overlay:
            self._overlay.close()
            self._overlay = None
        if self._unpacked:
            self._unpacked.close()
            self._unpacked = None
        while self.parts:
            self.parts.pop().close()
        if self._original is not None:
            os.close(self._original)
            self._original = None
