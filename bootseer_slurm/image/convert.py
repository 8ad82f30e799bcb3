"""Making a squashfs of an image: `unpack` its layers to a folder, `pack` that folder.

Runs as the calling user and needs no root: owners are not kept, all files are root's in the squashfs, as
enroot wants them. With enroot installed, enroot does the whole; else skopeo fetches the image and umoci
unpacks it, and rootfs.py writes what enroot's import would have added.

On disk: a scratch folder (scratch.py) in $ENROOT_TEMP_PATH or $TMPDIR.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bootseer_slurm import scratch as scratches
from bootseer_slurm.blob.squashfs import mksquashfs
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.image import registry
from bootseer_slurm.image.reference import Folder, Reference
from bootseer_slurm.image.rootfs import configure
from bootseer_slurm.listener import SILENT, Listener, Progress
from bootseer_slurm.scratch import make_readable, mark_finished, remove_tree

_SCRATCH_HINT = "TMPDIR, or ENROOT_TEMP_PATH, must name a folder with room for three times the image"
_POLICIES = ("~/.config/containers/policy.json", "/etc/containers/policy.json")


def convert(source: Reference | Folder, scratch: Path, listener: Listener = SILENT) -> Path:
    """Make a squashfs of an image in the folder `scratch`; gives its path.

    source: of a registry, pinned to its digest.
    Raises what `registry.resolve` does, and BootseerError when the image cannot be unpacked or packed.
    """
    target = scratch / "image.sqsh"
    if isinstance(source, Folder):
        listener.stage("packing", None)
        pack(Path(source.path), target, progress=listener.progress)
    elif not _enroot_import(source, target, listener):
        rootfs = _unpack_layers(source, scratch, listener)
        listener.stage("packing", None)
        pack(rootfs, target, progress=listener.progress)
        remove_tree(rootfs)
    mark_finished(target)
    return target


def unpack(reference: Reference, scratch: Path, listener: Listener = SILENT) -> Path:
    """Make an image's root file system in `scratch`, as `enroot start` wants it; gives its path.

    reference: pinned to its digest. Raises what `convert` does.
    """
    plain = scratch / "plain.sqsh"
    if not _enroot_import(reference, plain, listener, compressed=False):
        return _unpack_layers(reference, scratch, listener)
    rootfs = scratch / "rootfs"
    command = ["unsquashfs", "-quiet", "-no-progress", "-no-xattrs", "-dest", str(rootfs), str(plain)]
    registry.run(command, reference.name)
    plain.unlink()
    make_readable(rootfs)
    return rootfs


def pack(rootfs: Path, target: Path, *, progress: Progress = SILENT.progress) -> None:
    """Make the squashfs `target` of a folder, without what is in its dev/. Raises BootseerError."""
    if not rootfs.is_dir():
        raise BootseerError(f"{rootfs}: no such folder")
    command = mksquashfs.from_rootfs(str(rootfs), str(target))
    registry.run(command, str(rootfs), watch=_growth(target, progress))


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A folder of this process for the time of a block. Raises BootseerError when none can be made.

    An error of the block gets a hint how full the disk is.
    """
    base = Path(os.environ.get("ENROOT_TEMP_PATH") or tempfile.gettempdir())
    with scratches.folder("image", base, hint=_SCRATCH_HINT) as path:
        try:
            yield path
        except BootseerError as error:
            # On a full disk umoci may remove what it wrote, and die with a message of something else.
            if error.hint is None:
                disk = os.statvfs(path)
                error.hint = f"{disk.f_bavail * disk.f_frsize // 2**20} MiB are free now; {_SCRATCH_HINT}"
            raise


def _enroot_import(
    reference: Reference, target: Path, listener: Listener, *, compressed: bool = True
) -> bool:
    """Let enroot make the squashfs; False where it is not installed, or failed and there is another way."""
    if not shutil.which("enroot"):
        return False
    listener.stage("importing with enroot", None)
    squash_options = mksquashfs.enroot_options(compressed=compressed)
    environ = registry.enroot_environ(reference) | {"ENROOT_SQUASH_OPTIONS": squash_options}
    command = ["enroot", "import", "--output", str(target), reference.enroot_uri]
    try:
        registry.run(command, reference.name, environ=environ, watch=_growth(target, listener.progress))
    except BootseerError:
        target.unlink(missing_ok=True)
        if not (shutil.which("skopeo") and shutil.which("umoci")):
            raise
        return False
    return True


def _unpack_layers(reference: Reference, scratch: Path, listener: Listener) -> Path:
    """The root file system of an image, by skopeo and umoci."""
    layout, rootfs = scratch / "layout", scratch / "rootfs"
    listener.stage("fetching", registry.download_bytes(reference))
    policy = (
        [] if any(os.path.exists(os.path.expanduser(path)) for path in _POLICIES) else ["--insecure-policy"]
    )
    with registry.skopeo_options(reference, "src-") as options:
        # umoci knows no layers that are compressed with zstd; those with gzip stay as they are.
        command = ["skopeo", *policy, "copy", "--quiet", "--dest-compress-format=gzip", *options]
        command += [registry.skopeo_name(reference), "oci:layout:image"]
        registry.run(command, reference.name, folder=scratch, watch=_growth(layout, listener.progress))
    listener.stage("unpacking", None)
    config = _image_config(layout, reference)
    command = ["umoci", "raw", "unpack", "--rootless", "--image", "layout:image", "rootfs"]
    registry.run(command, reference.name, folder=scratch)
    remove_tree(layout)
    make_readable(rootfs)
    try:
        configure(rootfs, config, reference.enroot_uri)
    except OSError as error:
        raise BootseerError(f"image {reference.name}: its etc cannot be written: {error}") from error
    return rootfs


def _image_config(layout: Path, reference: Reference) -> dict[str, Any]:
    """The image's configuration in an OCI layout that holds this image only."""
    try:
        manifest = json.loads((layout / "index.json").read_bytes())["manifests"][0]["digest"]
        config = json.loads(_blob(layout, json.loads(_blob(layout, manifest))["config"]["digest"]))
        if isinstance(config, dict):
            return config
        reason = "it is no JSON object"
    except (OSError, ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
    raise BootseerError(f"image {reference.name}: its configuration cannot be read: {reason}")


def _blob(layout: Path, digest: str) -> bytes:
    algorithm, _, value = digest.partition(":")
    if algorithm != "sha256" or not value.isalnum():
        raise ValueError(f"{digest[:80]!r} is no digest")
    return (layout / "blobs/sha256" / value).read_bytes()


def _growth(path: Path, progress: Progress) -> Callable[[], None]:
    """Tells `progress`, whenever called, by how much a file or folder has grown."""
    seen = 0

    def look() -> None:
        nonlocal seen
        size_bytes = _size_bytes(path)
        if size_bytes > seen:
            progress(size_bytes - seen)
            seen = size_bytes

    return look


def _size_bytes(path: Path) -> int:
    total = 0
    with contextlib.suppress(FileNotFoundError):
        status = path.stat()
        if not stat.S_ISDIR(status.st_mode):
            return status.st_size
        for folder, _, files in os.walk(path):
            for name in files:
                with contextlib.suppress(FileNotFoundError):
                    total += os.lstat(os.path.join(folder, name)).st_size
    return total
