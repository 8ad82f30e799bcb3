"""Job classes: starts that are alike, and what the last of them asked for.

A class is the jobs of one user with the same account and name. Its record in the store is

    users/<uid>/classes/<class>.json    {"version": 2, "made_ns": 1764000000000000000,
                                         "wishes": [["image", "/lustre/img/train.sqsh", 20001], …]}

so that a later start gets what this one asked for late, or only inside its script. The number is the owner of
the file or folder, null where it has none. The record is hostile until parsed: its user can write it. Records
of version 1 name no owners. Does no I/O.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from bootseer_slurm.blob.manifest import KINDS
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.blob.ref import is_usable
from bootseer_slurm.errors import IntegrityError

REMEMBERED_LIMIT = 16
# A reply of the user's process holds it, with up to three bytes for each of these.
RECORD_LIMIT_BYTES = 16 * 1024


class Remembered(NamedTuple):
    """One thing that a start asked for. name: a path or URI. owner: its user id, None where not known."""

    kind: str
    name: str
    owner: int | None = None


def job_class(uid: int, account: str, name: str) -> str:
    """The class of a job, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([uid, account, name]).encode()).hexdigest()[:32]


def class_path(uid: int, of_class: str) -> str:
    """Where in the store a class's record lies."""
    return f"{user_folder(uid)}/classes/{of_class}.json"


def encode_record(remembered: Iterable[Remembered]) -> bytes:
    """The record of a start that asked for these; what does not fit is left out."""
    kept: list[Remembered] = []
    content = b""
    for each in (*remembered, None):
        record = {"version": 2, "made_ns": time.time_ns(), "wishes": kept}
        longer = json.dumps(record, sort_keys=True).encode()
        if len(longer) > RECORD_LIMIT_BYTES:
            kept.pop()
        else:
            content = longer
        if each is not None and len(kept) < REMEMBERED_LIMIT:
            kept.append(each)
    return content


def decode_record(content: bytes) -> list[Remembered]:
    """The things that a record names; names that no request may have are left out.

    Raises IntegrityError when it is no record.
    """
    try:
        if len(content) > RECORD_LIMIT_BYTES:
            raise ValueError("it is too long")
        record: Any = json.loads(content)
        if record["version"] not in (1, 2) or type(record["made_ns"]) is not int:
            raise ValueError("it is not of this version")
        return usable(Remembered(*each) for each in record["wishes"][:REMEMBERED_LIMIT])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"record of a job class cannot be used: {error}") from error


def usable(remembered: Iterable[Remembered]) -> list[Remembered]:
    """Those that a request may ask for; the fields may be of any type."""
    return [each for each in remembered if _is_usable(each)]


def _is_usable(remembered: Remembered) -> bool:
    kind, name, owner = remembered
    if kind not in KINDS or not isinstance(name, str) or not is_usable(kind, name):
        return False
    if any(0xD800 <= ord(character) < 0xE000 for character in name):
        return False
    return owner is None or (type(owner) is int and 0 <= owner < 2**32)
