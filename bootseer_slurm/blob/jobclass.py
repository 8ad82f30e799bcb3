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
import re
import time
from collections.abc import Iterable
from typing import Any, NamedTuple

from bootseer_slurm.blob.manifest import KINDS
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import IntegrityError

WISH_LIMIT = 16
# A reply of the fetch process holds it, with up to three bytes for each of these.
RECORD_LIMIT_BYTES = 16 * 1024
_NAME_LIMIT = 4096
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s]+")


class Remembered(NamedTuple):
    """What a start asked for. name: a path or URI. owner: whose it was, by user id; None: not known."""

    kind: str
    name: str
    owner: int | None = None


def job_class(uid: int, account: str, name: str) -> str:
    """The class of a job, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps([uid, account, name]).encode()).hexdigest()[:32]


def class_path(uid: int, of_class: str) -> str:
    """Where in the store a class's record lies."""
    return f"{user_folder(uid)}/classes/{of_class}.json"


def encode_wishes(wishes: Iterable[Remembered]) -> bytes:
    """The record of a start that asked for these; what does not fit is left out."""
    kept: list[Remembered] = []
    content = b""
    for wish in (*wishes, None):
        record = {"version": 2, "made_ns": time.time_ns(), "wishes": kept}
        longer = json.dumps(record, sort_keys=True).encode()
        if len(longer) > RECORD_LIMIT_BYTES:
            kept.pop()
        else:
            content = longer
        if wish is not None and len(kept) < WISH_LIMIT:
            kept.append(wish)
    return content


def decode_wishes(content: bytes) -> list[Remembered]:
    """What a record names; what no request may ask for is left out.

    Raises IntegrityError when it is no record.
    """
    try:
        if len(content) > RECORD_LIMIT_BYTES:
            raise ValueError("it is too long")
        record: Any = json.loads(content)
        if record["version"] not in (1, 2) or type(record["made_ns"]) is not int:
            raise ValueError("it is not of this version")
        wishes = [Remembered(*wish) for wish in record["wishes"][:WISH_LIMIT]]
        return [wish for wish in wishes if _is_wish(wish)]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise IntegrityError(f"record of a job class cannot be used: {error}") from error


def _is_wish(wish: Remembered) -> bool:
    """Whether a request may ask for this (agent/request.py)."""
    kind, name, owner = wish
    if kind not in KINDS or not isinstance(name, str) or len(name) > _NAME_LIMIT:
        return False
    if owner is not None and (type(owner) is not int or not 0 <= owner < 2**32):
        return False
    if any(ord(character) < 32 or 0xD800 <= ord(character) < 0xE000 for character in name):
        return False
    if kind == "image" and name.startswith("dir:/"):
        return True
    return name.startswith("/") or (kind != "environment" and bool(_URI.fullmatch(name)))
