"""Mounting an environment's snapshot for one job: the fastest way that this node has.

In this order: the kernel's driver, where an agent signed the snapshot; squashfuse as the job's user; files
unpacked on the node's disk. A snapshot of two layers, and one that is written to, lies in an overlay.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bootseer_slurm import mounts
from bootseer_slurm.artifacts.layer import Layer
from bootseer_slurm.cache.sources import OnFault
from bootseer_slurm.env.mounting import Overlay, Snapshot, Unpacked, squashfuse
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image.signing import Key


class View(NamedTuple):
    """A folder as a job sees it: the descriptor of a mount; the folder's device and inode."""

    fd: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class MountPlace:
    """Where a job's environments are mounted, and how.

    folder: for the mounts. disk: for files, where nothing can mount a snapshot. key: the site's.
    writable: with a layer over each that goes with the job. owner: of the environment.
    """

    folder: Path
    disk: Path
    uid: int
    gid: int
    key: Key
    writable: bool
    owner: int | None

    @property
    def is_own(self) -> bool:
        return self.uid == self.owner

    def name(self, told_by: str) -> str:
        """The name of a mount of what has this digest.

        Another's has the whole digest: a short one can be met, and what is mounted already is used again.
        """
        return told_by[:16] if self.is_own else told_by


@dataclass(slots=True)
class EnvironmentMount:
    """A mounted environment."""

    path: Path = Path()
    overlay: Overlay | None = None
    _unpacked: Unpacked | None = None
    _snapshots: list[Snapshot] = field(default_factory=list)

    @property
    def is_writable(self) -> bool:
        return self.overlay is not None and self.overlay.writable

    def clone(self) -> int:
        """A detached mount of it for one step; the caller closes the descriptor. Raises OSError."""
        return mounts.bind_clone(self.path, read_only=not self.is_writable)

    def close(self) -> None:
        """Take the mounts away; steps that still run keep theirs."""
        if self.overlay:
            self.overlay.close()
        if self._unpacked:
            self._unpacked.close()
        for snapshot in self._snapshots:
            snapshot.close()


def mount_environment(
    layers: Sequence[Layer], original: str, place: MountPlace, on_fault: OnFault
) -> EnvironmentMount:
    """Mount a snapshot, or use the mount that is there of it. original: the environment's path.

    Raises BootseerError.
    """
    mount = EnvironmentMount()
    try:
        with ThreadPoolExecutor(len(layers)) as pool:
            mounted = list(pool.map(lambda layer: _mount_layer(layer, place, mount, on_fault), layers))
        lower = [path for path in mounted if path is not None]
        # The name tells the environment, not the blobs: what a job sees stays, whatever is saved.
        told_by = os.fsencode(original if place.is_own else f"{original}\0{place.owner}")
        over = place.folder / f"{place.name(hashlib.sha256(told_by).hexdigest())}.layers"
        if len(lower) == len(layers) > 1 and not place.writable:
            try:
                mount.overlay = Overlay.mount(lower, over, uid=place.uid, gid=place.gid, writable=False)
            except BootseerError as error:
                on_fault("overlay_failed", error.message)
                lower = []
        if len(lower) < len(layers):
            # The files would be this user's own, and another one trusts the path.
            if not (place.is_own or place.uid == 0):
                raise BootseerError(f"{original}: another user's, and this node can mount no snapshot of it")
            images = [layer.handle.served_path for layer in layers]
            folder = place.disk / place.name(layers[0].description.id)
            mount._unpacked = Unpacked.unpack(images, folder, uid=place.uid, gid=place.gid)
            lower = [mount._unpacked.path]
        if place.writable:
            mount.overlay = Overlay.mount(lower, over, uid=place.uid, gid=place.gid, writable=True)
        mount.path = mount.overlay.path if mount.overlay else lower[0]
    except BaseException:
        mount.close()
        raise
    return mount


def _mount_layer(layer: Layer, place: MountPlace, mount: EnvironmentMount, on_fault: OnFault) -> Path | None:
    """Mount one layer; None: the node has no way. Raises BootseerError."""
    if layer.is_signed(place.key):
        try:
            return layer.mount_image()
        except BootseerError as error:
            on_fault("kernel_mount_failed", error.message)
    all_root = bool(layer.description.signature)
    if not squashfuse(place.uid, place.gid, all_root=all_root):
        return None
    snapshot = Snapshot.mount(
        layer.handle.served_path,
        place.folder / place.name(layer.description.id),
        uid=place.uid,
        gid=place.gid,
        all_root=all_root,
    )
    mount._snapshots.append(snapshot)
    layer.mounted = snapshot.path
    return layer.mounted
