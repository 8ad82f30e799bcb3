"""Mounting an environment's snapshot for one job: the fastest way that this node has.

In this order: the kernel's driver, where an agent signed the snapshot; squashfuse as the job's user; files
unpacked on the node's disk. A snapshot of two layers, and one that is written to, lies in an overlay.
Nothing is unpacked after a squashfuse that ended: its user can kill it, and would choose the disk.
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
from bootseer_slurm.cgroups import JobGroup
from bootseer_slurm.env.mounting import NoOverlay, Overlay, PrivateMount, Snapshot, squashfuse
from bootseer_slurm.env.unpacking import DiskBounds, Unpacked
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.identity import User
from bootseer_slurm.image.signing import Key


class View(NamedTuple):
    """A folder as a job sees it: the descriptor of a mount; the folder's device and inode."""

    fd: int
    device: int
    inode: int


@dataclass(frozen=True, slots=True)
class MountPlace:
    """Where a job's environments are mounted, and how.

    namespace, folder: for the mounts. disk, bounds: for files, where nothing can mount a snapshot.
    key: the site's. writable: with a layer over each that goes with the job. owner: of the environment.
    group: of the job, for programs that serve mounts.
    """

    namespace: mounts.Namespace
    folder: Path
    disk: Path
    bounds: DiskBounds
    user: User
    key: Key
    writable: bool
    owner: int | None
    group: JobGroup

    @property
    def is_own(self) -> bool:
        return self.user.uid == self.owner

    def name(self, told_by: str) -> str:
        """The name of a mount of what has this digest.

        Another's has the whole digest: a short one can be met, and what is mounted already is used again.
        """
        return told_by[:16] if self.is_own else told_by


@dataclass(slots=True)
class EnvironmentMount:
    """A mounted environment."""

    overlay: Overlay | None = None
    _unpacked: Unpacked | None = None
    _layers: list[PrivateMount] = field(default_factory=list)

    @property
    def is_writable(self) -> bool:
        return self.overlay is not None and self.overlay.writable

    def clone(self) -> int:
        """A detached mount of it for one step; the caller closes the descriptor. Raises OSError."""
        return (self.overlay or self._layers[0]).clone(read_only=not self.is_writable)

    def close(self) -> None:
        """Take the mounts away; steps that still run keep theirs."""
        if self.overlay:
            self.overlay.close()
        for layer in self._layers:
            layer.close()
        if self._unpacked:
            self._unpacked.close()


def mount_environment(
    layers: Sequence[Layer], original: str, place: MountPlace, on_fault: OnFault
) -> EnvironmentMount:
    """Mount a snapshot, or use the mount that is there of it. original: the environment's path.

    Raises BootseerError.
    """
    mount = EnvironmentMount()
    try:
        with ThreadPoolExecutor(len(layers)) as pool:
            made = [pool.submit(_mount_layer, layer, place, on_fault) for layer in layers]
        mounted = [each.result() for each in made if each.exception() is None]
        mount._layers = [each for each in mounted if each is not None]
        for each in made:
            each.result()  # raises what went wrong
        # The name tells the environment, not the blobs: what a job sees stays, whatever is saved.
        told_by = os.fsencode(original if place.is_own else f"{original}\0{place.owner}")
        over = place.folder / f"{place.name(hashlib.sha256(told_by).hexdigest())}.layers"
        is_unpacked = None in mounted
        if len(layers) > 1 and not is_unpacked and not place.writable:
            try:
                mount.overlay = Overlay.mount(mount._layers, over, place.user, writable=False)
            except NoOverlay as error:
                on_fault("overlay_failed", error.message)
                is_unpacked = True
        if is_unpacked:
            # The files would be this user's own, and another one trusts the path.
            if not (place.is_own or place.user.uid == 0):
                raise BootseerError(f"{original}: another user's, and this node can mount no snapshot of it")
            _unpack(layers, place, mount)
        if place.writable:
            mount.overlay = Overlay.mount(mount._layers, over, place.user, writable=True)
    except BaseException:
        mount.close()
        raise
    return mount


def _mount_layer(layer: Layer, place: MountPlace, on_fault: OnFault) -> PrivateMount | None:
    """Mount one layer; None: the node has no way. Raises BootseerError."""
    target = place.folder / place.name(layer.description.id)
    if layer.is_signed(place.key):
        try:
            layer.mount_image()
            return PrivateMount.attach(place.namespace, layer.clone_mounted(), target)
        except (BootseerError, OSError) as error:
            on_fault("kernel_mount_failed", str(error))
    all_root = bool(layer.description.signature)
    if not squashfuse(place.user.uid, place.user.gid, all_root=all_root):
        return None
    image = layer.handle.served_path
    snapshot = Snapshot.mount(place.namespace, image, target, place.user, all_root=all_root)
    if snapshot.pid:
        place.group.add(snapshot.pid)
    layer.mounted = snapshot.clone
    return snapshot


def _unpack(layers: Sequence[Layer], place: MountPlace, mount: EnvironmentMount) -> None:
    """Have the mount show files on the disk, and no layers. Raises BootseerError or OSError."""
    images = [layer.handle.served_path for layer in layers]
    name = place.name(layers[0].description.id)
    mount._unpacked = Unpacked.unpack(images, place.disk / name, place.user, place.bounds)
    for layer in mount._layers:
        layer.close()
    fd = mounts.bind_clone(mount._unpacked.path)
    mount._layers = [PrivateMount.attach(place.namespace, fd, place.folder / f"{name}.files")]
