"""Environments as their user sees them: their keys, and the snapshots that the store has for these."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

from bootseer_slurm.blob.names import Name, file_fingerprint, read_published
from bootseer_slurm.env.key import Key, differences, fingerprint_of, key_of, stored_name
from bootseer_slurm.errors import InputError
from bootseer_slurm.userproc.worker.handles import StoreOfUser
from bootseer_slurm.userproc.worker.original import reason


@dataclass(frozen=True, slots=True)
class Environment:
    """An environment as it lies now, and what was saved of it.

    record: of the image that it is used in, else of the node itself. installed: what a start of the job's
    class installed over it. image: the digest of that image, "" without one.
    """

    record: Name | None
    installed: Name | None
    fingerprint: str
    image: str


class Environments:
    """The environments that one job named. Thread-safe."""

    def __init__(self, store: StoreOfUser) -> None:
        self._store = store
        self._keys: dict[str, tuple[str, Key]] = {}  # of each environment: the job's image, and its key

    def look_up(self, path: str, image: str, job_class: str) -> Environment:
        """An environment's state. Raises InputError, StoreError."""
        digest = self._image_digest(image)
        record = self._record(stored_name(path, digest))
        if record is None and digest:
            digest, record = "", self._record(path)
        fingerprint = self._note_key(path, digest, record.key if record else None)
        installed = self._record(stored_name(path, digest, job_class)) if job_class else None
        if installed and installed.fingerprint != fingerprint:
            installed = None
        return Environment(record, installed, fingerprint, digest)

    def fingerprint_now(self, path: str) -> str:
        """The fingerprint of one that was looked up before. Raises InputError."""
        image, known = self._keys[path]
        return self._note_key(path, image, known)

    def changes(self, path: str, record: Name) -> str:
        """How it differs from what was saved, to be said behind that it does."""
        if path not in self._keys:
            return ""
        differing = differences(record.key, self._keys[path][1])
        return f": {', '.join(differing)}" if differing else ""

    def _record(self, name: str) -> Name | None:
        return read_published(self._store.open(), os.getuid(), name)

    def _image_digest(self, name: str) -> str:
        """The fingerprint of the image that an environment is used in; its name where the store has none."""
        if not name:
            return ""
        if name.startswith("/"):
            with contextlib.suppress(OSError):
                return file_fingerprint(os.stat(name))
        record = self._record(name)
        return record.fingerprint if record else name

    def _note_key(self, path: str, image: str, known: Key | None) -> str:
        """Look an environment over; gives its fingerprint. Raises InputError."""
        try:
            key = key_of(path, home=os.path.expanduser("~"), image=image, known=known)
        except OSError as error:
            raise InputError(f"environment {path}: {reason(error)}") from error
        self._keys[path] = image, key
        return fingerprint_of(key)
