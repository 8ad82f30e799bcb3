"""Names: which blob stands for which path, and whether it still does.

One small JSON object in the store for each path or URI, under the sha256 of that name:

    {"version": 1, "kind": "image", "name": "/lustre/img/train.sqsh", "fingerprint": "…",
     "blob": "<id>", "folder": "users/<uid>/blobs/<token>", "made_ns": 1764000000000000000, "signature": "",
     "key": {}}

A fingerprint says what the original was when the blob was made. It must mean the same on every node, so it
holds no device, no inode and no part of a second: SFTP, for one, has none of them. To make whole seconds
safe, no blob is made of what was changed less than RACY_S ago. Compare git's "racy" index entries.
An image of a registry (image/reference.py) has the registry's manifest digest as its fingerprint, an
environment the digest of its key (env/key.py), which is kept to tell what changed. Where the blob is a layer
(env/layer.py), "base" is the one that it lies over: {"blob": "<id>", "folder": "…", "signature": ""}.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from bootseer_slurm.errors import IntegrityError, NotFound, StoreError
from bootseer_slurm.store import Store

RACY_S = 2.0  # more than the whole second that a fingerprint can tell apart
_LIMIT_BYTES = 64 * 1024


@dataclass(frozen=True, slots=True)
class Base:
    """The blob that a layer lies over."""

    blob: str
    folder: str
    signature: str = ""


@dataclass(frozen=True, slots=True)
class Name:
    """The record that the store has of one path or URI.

    signature: says that the site made this blob itself, "" when it did not. Only the agent can tell whether
    it is a good one. shared: all users may read it.
    """

    kind: str
    name: str
    fingerprint: str
    blob: str
    folder: str
    made_ns: int
    signature: str = ""
    key: dict[str, str] = field(default_factory=dict)
    base: Base | None = None
    shared: bool = False

    @property
    def folders(self) -> tuple[str, ...]:
        """Where in the store its blobs lie."""
        return (self.folder,) if self.base is None else (self.folder, self.base.folder)

    @property
    def publisher(self) -> int | None:
        """The user in whose part of the store they lie."""
        return publisher_of(self.folder)


def user_folder(uid: int) -> str:
    """Where in the store everything of a user lies."""
    return f"users/{uid}"


def publisher_of(folder: str) -> int | None:
    """The user in whose part of the store this folder lies; None: it is in no user's."""
    parts = folder.split("/")
    is_users = len(parts) > 2 and parts[0] == "users" and re.fullmatch("[0-9]{1,10}", parts[1])
    return int(parts[1]) if is_users else None


def file_fingerprint(status: os.stat_result) -> str:
    """The fingerprint of a regular file."""
    return f"{status.st_size}@{int(status.st_mtime)}"


def wait_while_racy(status: os.stat_result) -> None:
    """Wait until a later change of this file would show in its fingerprint (2 s at most)."""
    age_s = time.time() - status.st_mtime
    if 0 <= age_s < RACY_S:
        time.sleep(RACY_S - age_s)


def write_name(store: Store, uid: int, name: Name) -> None:
    """Put a name into the store, in place of an older one for the same path. Raises StoreError."""
    record = {"version": 1, **asdict(name)}
    for key in ("base", "shared"):
        if not record[key]:
            del record[key]
    for folder in name.folders if name.shared else ():
        store.share(folder)
    store.write(_path(uid, name.name), json.dumps(record, sort_keys=True).encode())
    if name.shared:
        store.share(_path(uid, name.name))


def read_name(store: Store, uid: int, name: str) -> Name | None:
    """The record that the store has of a path or URI of this user, or None.

    Raises IntegrityError when the record is damaged, StoreError when the store cannot be read.
    """
    try:
        content = store.read(_path(uid, name), limit_bytes=_LIMIT_BYTES)
    except NotFound:
        return None
    record = _decode(content, uid, name)
    if record.name != name:
        raise IntegrityError(f"the store's record of {name} is damaged: it is of another name")
    return record


def read_published(store: Store, uid: int, name: str, *, owner: int | None = None) -> Name | None:
    """As `read_name`; where the user has no such name, what root published under it.

    owner: of the path that is named, where it has one. Of another user's path that user's own name is meant,
    then root's. This user's comes last: the agent does not show it there, but says so.
    """
    is_own = owner in (None, uid)
    for each in dict.fromkeys((uid, 0) if is_own else (owner or 0, 0, uid)):
        try:
            found = read_name(store, each, name)
        except (IntegrityError, StoreError):  # another's folder may be closed, or an impostor's
            if each == uid:
                raise
            continue
        if found is not None:
            return found
    return None


def list_names(store: Store, uid: int) -> tuple[list[Name], list[str]]:
    """All names of a user, sorted, and of each damaged record what is wrong with it. Raises StoreError."""
    names, damaged = [], []
    folder = f"{user_folder(uid)}/names"
    for file in store.list(folder):
        try:
            record = _decode(store.read(f"{folder}/{file}", limit_bytes=_LIMIT_BYTES), uid, file)
        except NotFound:
            continue
        except IntegrityError as error:
            damaged.append(error.message)
            continue
        if _path(uid, record.name) == f"{folder}/{file}":
            names.append(record)
        else:
            damaged.append(f"the store's record of {file} is damaged: it is of another name")
    return sorted(names, key=lambda each: (each.kind, each.name)), damaged


def remove_name(store: Store, uid: int, name: str) -> None:
    """Forget a name; its blob stays. Nothing happens when it is not there. Raises StoreError."""
    store.remove(_path(uid, name))


def _decode(content: bytes, uid: int, name: str) -> Name:
    """A record's content. Raises IntegrityError, which calls it `name`."""
    try:
        record: Any = json.loads(content)
        if record.pop("version") != 1 or not isinstance(record["made_ns"], int):
            raise ValueError("it is not of this version")
        texts = ("kind", "name", "fingerprint", "blob", "folder")
        if not all(isinstance(record[key], str) for key in texts):
            raise ValueError("a value is not text")
        if not isinstance(record.get("signature", ""), str):
            raise ValueError("its signature is not text")
        if not isinstance(record.get("shared", False), bool):
            raise ValueError("whether it is shared is not told")
        key = record.get("key", {})
        if not isinstance(key, dict) or not all(isinstance(part, str) for part in key.values()):
            raise ValueError("its key is not of texts")
        if record.get("base") is not None:
            record["base"] = Base(**record["base"])
            if not all(isinstance(value, str) for value in asdict(record["base"]).values()):
                raise ValueError("its base is not of texts")
        found = Name(**record)
        for text in (found.name, found.blob, *found.folders):
            os.fsencode(text)  # raises where it can be no path
        for folder in found.folders:
            if not folder.startswith(f"{user_folder(uid)}/blobs/") or ".." in folder.split("/"):
                raise ValueError("its folder is not one of this user's blobs")
        return found
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(f"the store's record of {name} is damaged: {error}") from error


def _path(uid: int, name: str) -> str:
    return f"{user_folder(uid)}/names/{hashlib.sha256(os.fsencode(name)).hexdigest()}.json"
