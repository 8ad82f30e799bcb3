"""One blob in the node's cache, in use: its blocks, its file, and the saving of their state. Thread-safe."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Iterable

from bootseer_slurm.blob.manifest import Layout, decode_unmanaged, encode_unmanaged, manifest_of
from bootseer_slurm.cache.blocks import Blocks
from bootseer_slurm.cache.bounds import Bounds
from bootseer_slurm.cache.datafile import DataFile, open_data
from bootseer_slurm.cache.disk import BlobFolder, keep_manifest, use, write_state
from bootseer_slurm.cache.live import make_live
from bootseer_slurm.errors import IntegrityError

_log = logging.getLogger(__name__)


class CachedBlob:
    """One blob on this node, while somebody uses it."""

    def __init__(
        self, folder: BlobFolder, layout: Layout, digests: bytes | None, *, gid: int, bounds: Bounds
    ) -> None:
        """Begin to use the folder, which is made where it is not there, until `let_go`.

        digests: the manifest's, or None for an unmanaged file: then a block's digest is what it was when the
        block was first read. Raises OSError, IntegrityError.
        """
        self.id, self.uid, self.gid = folder.id, folder.uid, gid
        self.folder = folder
        self.unmanaged = digests is None
        if digests is None:
            self.layout = layout = _known_layout(folder, layout)
            manifest = encode_unmanaged(layout)
        else:
            self.layout = layout
            manifest = manifest_of(folder.id, layout, digests).encode()
        self._saving = threading.Lock()
        with contextlib.ExitStack() as on_error:
            self._stop_using = weakref.finalize(self, os.close, use(folder.path))
            on_error.callback(self._stop_using)
            known = keep_manifest(folder, manifest)
            fd, states, seen = open_data(folder, layout, gid, unmanaged=self.unmanaged, known=known)
            self.file = DataFile(folder, fd, layout.size_bytes, bounds)
            on_error.callback(self.file.close)
            live = make_live(
                folder.live,
                layout,
                unmanaged=self.unmanaged,
                data=os.fstat(fd),
                states=states,
                digests=seen,
            )
            self.blocks = Blocks(
                layout, live.states, bytearray(digests or b"") if live.digests is None else live.digests
            )
            on_error.pop_all()
        folder.touch()

    @property
    def complete(self) -> bool:
        return self.blocks.has(0, self.layout.blocks - 1)

    @property
    def present_bytes(self) -> int:
        """Bytes of the blocks that are there and checked (the last block counted whole)."""
        return min(self.blocks.present * self.layout.block_bytes, self.layout.size_bytes)

    def drop_pages(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the bytes of these ranges (offset, bytes) on disk only, and not in the kernel's memory too."""
        if self._sync():
            self.file.drop_pages(ranges)

    def save(self) -> None:
        """Put the state on disk, so that what is here survives a reboot. Nothing happens after `let_go`."""
        with self._saving:
            if not self.blocks.unsaved or not self._stop_using.alive:
                return
            self.blocks.unsaved = False
            states = self.blocks.states[:]
            if not self._sync():
                return
            try:
                digests = bytes(self.blocks.digests[:]) if self.unmanaged else None
                write_state(self.folder.path, states, digests, os.fstat(self.file.fd))
            except OSError as error:
                self.blocks.unsaved = True
                _log.warning("%s: state cannot be saved: %s", self.folder.path, error)

    def _sync(self) -> bool:
        if self.file.sync():
            return True
        self.blocks.doubt()
        return False

    def let_go(self) -> None:
        """End the use of the folder, so that it can be removed."""
        with self._saving:
            self.folder.live.unlink(missing_ok=True)
            self._stop_using()


def _known_layout(folder: BlobFolder, layout: Layout) -> Layout:
    """An unmanaged file's layout, with the digest of an earlier use: the blocks of that stay valid."""
    with contextlib.suppress(OSError, IntegrityError):
        known = decode_unmanaged((folder.path / "manifest").read_bytes())
        if dataclasses.replace(layout, digest=known.digest) == known:
            return known
    return layout
