"""Saving an environment: its folder as a squashfs blob in the store, byte-compiled, with its mtimes.

Where the store has a snapshot of it already, what changed since is saved as a layer over that (env/layer.py).
Runs as the environment's user. The original is left as it is.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol

from bootseer_slurm import scratch
from bootseer_slurm.blob.lease import make_once
from bootseer_slurm.blob.names import Base, Name, list_names, read_name, remove_name
from bootseer_slurm.blob.writer import BlobWriter, Original
from bootseer_slurm.env.archive import squash, write_tar
from bootseer_slurm.env.bytecode import compile_aside, compiled_aside, uncompiled
from bootseer_slurm.env.key import Key, fingerprint_of, key_of, parts_of, stored_name
from bootseer_slurm.env.layer import (
    FILES,
    FILES_LIMIT_BYTES,
    Layer,
    as_shown,
    decode_files,
    encode_files,
    layer_over,
    with_own_ctime,
)
from bootseer_slurm.env.tree import FileState, Tree, changed, is_unchanged, survey
from bootseer_slurm.errors import BootseerError, IntegrityError, NotFound
from bootseer_slurm.listener import SILENT, Listener, Stage
from bootseer_slurm.store import Store

_SCRATCH_HINT = "TMPDIR must name a folder with room for the environment"
_KEPT_INSTALLED = 16  # of an environment: for so many classes of jobs
_KEY_LIMIT_BYTES = 32 * 2**10  # of what is kept to tell what changed


class Packing(Protocol):
    """A packer that works instead of this process (image.signed_packing.AgentPacking)."""

    def pack_stream(self, write: Callable[[int], None], target: Path, *, kind: str) -> bool:
        """Make the squashfs `target` of a tar, which `write` writes to a descriptor; False: it does not."""

    def signature(self, blob: str) -> str:
        """The signature of what was packed, when this is its blob's id; "" without one."""


class Installed(NamedTuple):
    """Packages that a job's start installed over the snapshot that it saw, for the next of its class.

    over: the fingerprint of the environment as it lies. folder: the store's, of what was shown.
    """

    job_class: str
    over: str
    folder: str


class _Before(NamedTuple):
    """A snapshot to lie over: base, what it holds, and what is known of the folder, whatever shows that."""

    base: Base
    files: Tree
    known: Tree


def save(
    store: Store,
    folder: Path,
    *,
    image: str = "",
    installed: Installed | None = None,
    packing: Packing | None = None,
    listener: Listener = SILENT,
) -> tuple[Name, bool]:
    """Save the environment in `folder`; gives its name in the store, and whether it was saved now.

    image: the digest of the image that it is for, "" without one. installed: by a start that sees a snapshot
    there, with a layer to write to. packing: who else may pack it, so that the kernel may mount it.
    Of several processes in the cluster that save it at once, one does; what is in the store already is not
    saved again.
    Raises BootseerError when `folder` is no environment, cannot be read, changed meanwhile, or does not pack.
    """
    real = folder.resolve(strict=True)
    plain = stored_name(str(real), image)
    name = stored_name(str(real), image, installed.job_class) if installed else plain
    key = _key(real, image)
    fingerprint = installed.over if installed else fingerprint_of(key)

    def look() -> Name | None:
        record = _record(store, name)
        if record is None or record.fingerprint != fingerprint or record.key != _shortened(key):
            return None
        held = [store.list(each) for each in record.folders]  # FILES: one of an earlier version is made anew
        return record if all("manifest" in each and FILES in each for each in held) else None

    def make() -> Name:
        with scratch.folder("env", Path(tempfile.gettempdir()), hint=_SCRATCH_HINT) as work:
            before = _before(store, plain, name, installed)
            tree = survey(real)
            layer = before and layer_over(before.files, real, tree, known=before.known)
            file, written = _packed(real, work, layer or Layer(tree, []), packing, listener.stage)
            if _key(real, image) != key or not is_unchanged(tree, survey(real)):
                raise changed(folder)
            if before and layer and "manifest" not in store.list(before.base.folder):
                raise BootseerError(f"{folder}: the snapshot that it was to lie over was removed meanwhile")
            listener.stage("storing", file.stat().st_size)
            scratch.mark_finished(file)
            base = before.base if before and layer else None
            replaced = _record(store, name)
            shared = replaced is not None and replaced.shared
            writer = BlobWriter(store, beside={FILES: encode_files(written)}, progress=listener.progress)
            return writer.store_named(
                file,
                Original("environment", name, fingerprint, _shortened(key), base, shared),
                sign=packing.signature if packing else lambda blob: "",
            )

    def on_wait(holder: str) -> None:
        listener.stage(f"waiting for {holder}", None)

    return make_once(store, os.getuid(), name, look=look, make=make, on_wait=on_wait)


def forget_installed(store: Store, saved: Name) -> None:
    """Forget what starts installed over an environment that is not any more what was just saved.

    And all but the newest: jobs that are never called the same leave one each.
    """
    records = [
        record
        for record in list_names(store, os.getuid())[0]
        if parts_of(record.name)[:2] == parts_of(saved.name)[:2] and parts_of(record.name)[2]
    ]
    records.sort(key=lambda record: record.made_ns, reverse=True)
    for number, record in enumerate(records):
        if number >= _KEPT_INSTALLED or record.fingerprint != saved.fingerprint:
            remove_name(store, os.getuid(), record.name)


def _key(real: Path, image: str) -> Key:
    return key_of(str(real), home=os.path.expanduser("~"), image=image)


def _record(store: Store, name: str) -> Name | None:
    try:
        return read_name(store, os.getuid(), name)
    except IntegrityError:
        return None  # it is written anew


def _before(store: Store, plain: str, name: str, installed: Installed | None) -> _Before | None:
    """The snapshot in the store that a layer can lie over.

    Raises BootseerError when it is not any more the one that is shown.
    """
    for each in dict.fromkeys((name, plain)):
        record = _record(store, each)
        if record is None or (installed and record.folder != installed.folder):
            continue
        try:
            top, *below = (
                decode_files(store.read(f"{folder}/{FILES}", limit_bytes=FILES_LIMIT_BYTES))
                for folder in record.folders
            )
        except (NotFound, IntegrityError):
            continue
        base = record.base or Base(record.blob, record.folder, record.signature)
        files = below[0] if below else top
        return _Before(base, files, as_shown(files, top) if installed else with_own_ctime(files))
    if installed:
        raise BootseerError(f"{plain}: the snapshot that it was installed over was replaced meanwhile")
    return None


def _packed(
    real: Path,
    work: Path,
    content: Layer,
    packing: Packing | None,
    stage: Stage,
) -> tuple[Path, Tree]:
    """A squashfs file in the folder `work`, and the files in it."""
    aside = work / "compiled"
    if sources := uncompiled(real, content.files):
        stage("compiling", None)
        compile_aside(real, sources, aside)
    stage("packing", None)
    file = work / "snapshot.sqsh"
    written: dict[str, FileState] = {}

    def write(fd: int) -> None:
        with open(fd, "wb", closefd=False) as out:
            made = compiled_aside(real, aside)
            written.update(write_tar(out, real, content.files, made=made, gone=content.gone))

    if packing is not None and packing.pack_stream(write, file, kind="environment"):
        return file, written
    try:
        squash(write, file)
    except BootseerError as error:
        raise BootseerError(f"{real}: {error.message}", hint=_SCRATCH_HINT) from error
    return file, written


def _shortened(key: Key) -> Key:
    """A key that a name's record has room for: of the longest parts the first line only."""
    short = dict(key)
    for part in sorted(short, key=lambda part: -len(short[part])):
        if sum(map(len, short.values())) <= _KEY_LIMIT_BYTES:
            break
        short[part] = short[part].partition("\n")[0]
    return short
