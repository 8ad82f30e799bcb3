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


@dataclass(frozen=True, slots=True)
class _Looked:
    """What was found of an environment: the image of the job, the store's record, and its key now."""

    image: str
    record: Name | None
    key: Key


class Environments:
    """The environments that one job named. Thread-safe."""

    def __init__(self, store: StoreOfUser) -> None:
        self._store = store
        self._keys: dict[str, _Looked] = {}

    def look_up(self, path: str, image: str, job_class: str, owner: int | None) -> Environment:
        """An environment's state. owner: the user that it belongs to. Raises InputError, StoreError."""
        digest = self._image_digest(image)
        record = self._record(stored_name(path, digest), owner)
        if record is None and digest:
            digest, record = "", self._record(path, owner)
        fingerprint = self._note_key(path, digest, record)
        is_own = owner in (None, os.getuid())  # nobody installs to another's
        installed = self._record(stored_name(path, digest, job_class)) if job_class and is_own else None
        if installed and installed.fingerprint != fingerprint:
            installed = None
        return Environment(record, installed, fingerprint, digest)

    def fingerprint_now(self, path: str, image: str) -> str:
        """The fingerprint of one that was looked up before, by this process or one before it.

        image: the digest of the image that it is used in, "" without one. Raises InputError, StoreError.
        """
        looked = self._keys.get(path)
        if looked is None or looked.image != image:
            try:
                owner = os.stat(path).st_uid
            except OSError as error:
                raise InputError(f"environment {path}: {reason(error)}") from error
            record = self._record(stored_name(path, image), owner)
        else:
            record = looked.record
        return self._note_key(path, image, record)

    def changes(self, path: str, record: Name) -> str:
        """How it differs from what was saved, to be said behind that it does."""
        if path not in self._keys:
            return ""
        differing = differences(record.key, self._keys[path].key)
        return f": {', '.join(differing)}" if differing else ""

    def _record(self, name: str, owner: int | None = None) -> Name | None:
        return read_published(self._store.open(), os.getuid(), name, owner=owner)

    def _image_digest(self, name: str) -> str:
        """The fingerprint of the image that an environment is used in; its name where the store has none."""
        if not name:
            return ""
        if name.startswith("/"):
            with contextlib.suppress(OSError):
                return file_fingerprint(os.stat(name))
        record = self._record(name)
        return record.fingerprint if record else name

    def _note_key(self, path: str, image: str, record: Name | None) -> str:
        """Look an environment over; gives its fingerprint. Raises InputError."""
        known = record.key if record else None
        try:
            key = key_of(path, home=os.path.expanduser("~"), image=image, known=known)
        except OSError as error:
            raise InputError(f"environment {path}: {reason(error)}") from error
        if record and known and record.publisher != os.getuid():
            # How this user's installers are set up says nothing of another's environment.
            key["installer"] = known.get("installer", "")
        self._keys[path] = _Looked(image, record, key)
        return fingerprint_of(key)
