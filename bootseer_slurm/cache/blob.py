"""One blob in the node's cache, in use: which of its blocks are there, who fetches which, and their bytes.

A block is MISSING, IN_FLIGHT (claimed by a thread of this process), PRESENT (written, and its digest agreed)
or UNCHECKED (on disk since before a reboot: it counts only after its digest was compared). The states lie in
memory that outlives this process (cache/live.py), and a block becomes PRESENT there only after its bytes were
written, so a successor of a killed process goes on where that one was. Thread-safe.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from mmap import mmap

from bootseer_slurm.blob.digest import DIGEST_BYTES
from bootseer_slurm.blob.manifest import Layout, decode_adopted, encode_adopted, manifest_of
from bootseer_slurm.cache.disk import Place, read_state, replace, use, write_state
from bootseer_slurm.cache.live import IN_FLIGHT, MISSING, PRESENT, UNCHECKED, make_live
from bootseer_slurm.errors import IntegrityError

_log = logging.getLogger(__name__)


class CachedBlob:
    """The blocks of one blob on this node.

    `digests` is the manifest's, or None for an adopted file: then a block's digest is what it was when the
    block was first read.
    """

    def __init__(
        self,
        place: Place,
        layout: Layout,
        digests: bytes | None,
        *,
        gid: int,
        has_room: Callable[[CachedBlob, int], bool],
        step_bytes: int,
    ) -> None:
        """has_room(blob, more_bytes): asked after each `step_bytes`. Raises OSError, IntegrityError."""
        self.id, self.uid, self.gid = place.id, place.uid, gid
        self.folder = place.folder
        self.path = place.folder / "data"
        self.pins = 0
        self.on_last: Callable[[], None] = lambda: None
        self.full = False  # the disk or the cache is: blocks are no longer kept
        self.adopted = digests is None
        self.changed = threading.Condition()
        self.layout = layout = self._as_kept(layout) if self.adopted else layout
        self._place = place
        self._has_room = has_room
        self._step_bytes = self._unasked_bytes = step_bytes
        self._saving = threading.Lock()
        self._writing = threading.Lock()  # the kernel takes one write of a file, and has others spin
        self._unsaved = True
        manifest = (
            encode_adopted(layout) if digests is None else manifest_of(place.id, layout, digests).encode()
        )
        with contextlib.ExitStack() as on_error:
            self._stop_using = weakref.finalize(self, os.close, use(place.folder))
            on_error.callback(self._stop_using)
            known = self._note_manifest(manifest)
            self.fd, states, seen = self._open_data(known=known)
            # Closed with the last reference, not before: a server thread may be about to read from it.
            on_error.callback(weakref.finalize(self, os.close, self.fd))
            status = os.fstat(self.fd)
            live = make_live(
                place.live, layout, adopted=self.adopted, data=status, states=states, digests=seen
            )
            self.states: mmap = live.states
            self.digests: mmap | bytearray = (
                bytearray(digests or b"") if live.digests is None else live.digests
            )
            on_error.pop_all()
        self.touch()

    def _as_kept(self, layout: Layout) -> Layout:
        """An adopted file's layout, with the digest of an earlier use: the blocks of that stay valid."""
        with contextlib.suppress(OSError, IntegrityError):
            kept = decode_adopted((self.folder / "manifest").read_bytes())
            if dataclasses.replace(layout, digest=kept.digest) == kept:
                return kept
        return layout

    def _note_manifest(self, manifest: bytes) -> bool:
        """Keep the manifest in the folder; gives whether it was there."""
        path = self.folder / "manifest"
        with contextlib.suppress(OSError):
            if path.read_bytes() == manifest:
                return True
        # First: digests that another manifest left would count as this one's, were the agent killed here.
        self._place.live.unlink(missing_ok=True)
        (self.folder / "blocks").unlink(missing_ok=True)
        replace(path, manifest)
        return False

    def _open_data(self, *, known: bool) -> tuple[int, bytes, bytes]:
        """Take over what is there, else begin anew; gives the file, the states, an adopted file's digests.

        Anew is in another file: a container may still have the old one.
        """
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError), contextlib.ExitStack() as on_error:
            fd = os.open(self.path, flags)
            on_error.callback(os.close, fd)
            os.fchown(fd, self.uid, self.gid)
            state = read_state(self._place, self.layout, adopted=self.adopted, data=os.fstat(fd))
            if known and state is not None:
                on_error.pop_all()
                return fd, *state
        new = self.path.with_suffix(".new")
        new.unlink(missing_ok=True)
        with contextlib.ExitStack() as on_error:
            fd = os.open(new, flags | os.O_CREAT | os.O_EXCL, 0o400)
            on_error.callback(os.close, fd)
            os.fchown(fd, self.uid, self.gid)
            os.ftruncate(fd, self.layout.size_bytes)
            new.rename(self.path)
            on_error.pop_all()
        blocks = self.layout.blocks
        return fd, bytes(blocks), bytes(blocks * DIGEST_BYTES if self.adopted else 0)

    @property
    def complete(self) -> bool:
        return self.has(0, self.layout.blocks - 1)

    @property
    def present_bytes(self) -> int:
        """Bytes of the blocks that are there and checked (the last block counted whole)."""
        return min(self.states[:].count(PRESENT) * self.layout.block_bytes, self.layout.size_bytes)

    def has(self, first: int, last: int) -> bool:
        """Whether blocks first to last are all present."""
        return self.states[first : last + 1].count(PRESENT) == last + 1 - first

    def next_missing(self) -> int:
        """The first block that nobody has or fetches, or that is unchecked; -1 when there is none."""
        missing = self.states.find(bytes([MISSING]))
        unchecked = self.states.find(bytes([UNCHECKED]))
        return max(missing, unchecked) if missing < 0 or unchecked < 0 else min(missing, unchecked)

    def claim(self, first: int, last: int) -> tuple[int, bool]:
        """Take blocks from `first` on, up to `last`, for fetching or, where they are unchecked, for checking.

        Gives how many (0: others were faster), and whether they are unchecked: all of them, or none.
        """
        with self.changed:
            state = self.states[first]
            if state not in (MISSING, UNCHECKED):
                return 0, False
            end = first
            while end <= last and self.states[end] == state:
                self.states[end] = IN_FLIGHT
                end += 1
            return end - first, state == UNCHECKED

    def wait(self, block: int, timeout_s: float) -> None:
        """Wait until whoever fetches a block has it, or gave up."""
        with self.changed:
            self.changed.wait_for(lambda: self.states[block] != IN_FLIGHT, timeout_s)

    def settle(self, first: int, count: int, state: int) -> None:
        """End a claim: the blocks are PRESENT, or MISSING again. Before PRESENT their bytes were written."""
        with self.changed:
            self.states[first : first + count] = bytes([state]) * count
            self._unsaved = True
            self.changed.notify_all()

    def write(self, offset: int, view: memoryview) -> bool:
        """Keep checked bytes; False when the disk or the cache has no room for them."""
        if self.full:
            return False
        try:
            self._unasked_bytes += len(view)
            if self._unasked_bytes >= self._step_bytes:
                self._unasked_bytes = 0
                if not self._has_room(self, len(view)):
                    self.full = True
                    return False
            done = 0
            with self._writing:
                while done < len(view):
                    done += os.pwrite(self.fd, view[done:], offset + done)
        except (
            OSError
        ) as error:  # full, or failed and now read-only: the bytes in hand are served all the same
            _log.warning("%s: blocks are no longer kept: %s", self.folder, error.strerror)
            self.full = True
            return False
        return True

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Bytes of blocks that are present, or claimed as unchecked."""
        return os.pread(self.fd, size_bytes, offset)

    def drop_pages(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Have the bytes of these ranges (offset, bytes) on disk only, and not in the kernel's memory too."""
        if self._sync():
            for offset, size_bytes in ranges:
                with contextlib.suppress(OSError):
                    os.posix_fadvise(self.fd, offset, size_bytes, os.POSIX_FADV_DONTNEED)

    def touch(self) -> None:
        """Note that the blob was used now."""
        with contextlib.suppress(OSError):
            os.utime(self.folder / "used")

    def save(self) -> None:
        """Put the state on disk, so that what is here survives a reboot."""
        with self._saving:
            if not self._unsaved or not self._stop_using.alive:
                return
            self._unsaved = False
            states = self.states[:]
            if not self._sync():
                return
            try:
                seen = self.digests[:] if self.adopted else None
                write_state(self.folder, states, None if seen is None else bytes(seen), os.fstat(self.fd))
            except OSError as error:
                self._unsaved = True
                _log.warning("%s: state cannot be saved: %s", self.folder, error)

    def _sync(self) -> bool:
        """Have on disk what was written.

        Where that fails the kernel may have lost it, and says so once: the digests are compared again, and no
        more blocks are kept.
        """
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            _log.warning("%s: data cannot be synced: %s", self.folder, error)
            self.full = True
            with self.changed:
                self.states[:] = self.states[:].replace(bytes([PRESENT]), bytes([UNCHECKED]))
            return False
        return True

    def let_go(self) -> None:
        """End the use of the folder, so that it can be removed. Nothing is saved after this."""
        with self._saving:
            self._place.live.unlink(missing_ok=True)
            self._stop_using()
