"""The request of a job, as the prolog or the plugin hands it over.

Every value here was typed by the job's user and is read by root: all is checked, nothing is evaluated.
"""

from __future__ import annotations

import contextlib
import pwd
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import tomli

from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.ref import ArtifactRef, has_bad_characters, is_usable
from bootseer_slurm.errors import InputError
from bootseer_slurm.image.reference import parse
from bootseer_slurm.slurm.allocation import Job

_WANTED_LIMIT = 16
_GPU_LIMIT = 64
_SWITCHES = ("observe", "writable")
_PROFILE_KEYS = {"images": "image", "environments": "environment", "checkpoints": "checkpoint"}


@dataclass(frozen=True, slots=True)
class Request:
    """All that one job asks for. observe: only measure. writable: environments get a layer to write to.

    asked: by the job, and not by the site for all.
    """

    observe: bool
    wanted: tuple[ArtifactRef, ...] = ()
    writable: bool = False
    asked: bool = True


def parse_job(message: Message) -> Job:
    """The job of a prolog, attach or epilog message. Raises InputError."""
    uid = number(message, "UID")
    return Job(
        job_id=number(message, "JOB_ID"),
        restart=number(message, "RESTART", "0"),
        uid=uid,
        gid=number(message, "GID") if first(message, "GID") else _gid_of(uid),
        nodelist=first(message, "NODELIST"),
        node_count=number(message, "NODES", "0"),
        partition=first(message, "PARTITION")[:256],
        name=first(message, "JOB_NAME")[:256],
        account=first(message, "ACCOUNT")[:256],
        gpus=_gpus(first(message, "GPUS")),
    )


def _gid_of(uid: int) -> int:
    """The group of a user whose job does not name one: his number may be the group of others."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except (KeyError, OverflowError) as error:
        raise InputError(f"GID: missing, and this node knows no user {uid}") from error


def parse_request(message: Message) -> Request | None:
    """All that a job asks for; None when it did not ask for Bootseer. Raises InputError."""
    mode = first(message, "BOOTSEER")
    if not mode:
        return None
    wanted: list[ArtifactRef] = []
    writable = False
    profile = first(message, "PROFILE")
    if profile:
        request = parse_profile(profile)
        writable = request.writable
        mode = "observe" if request.observe else mode
        wanted += request.wanted
    for key, kind in (("IMAGE", "image"), ("ENV", "environment"), ("CHECKPOINT", "checkpoint")):
        value = first(message, key)
        if value:
            wanted.append(_ref(kind, key.lower(), value))
    image = first(message, "CONTAINER_IMAGE")
    if image and not any(ref.kind == "image" for ref in wanted):
        with contextlib.suppress(InputError):  # pyxis tells what is wrong with its own option
            wanted.append(image_ref(image))
    return Request(mode == "observe", tuple(dict.fromkeys(wanted))[:_WANTED_LIMIT], writable)


def _gpus(text: str) -> tuple[int, ...]:
    """The GPUs of "0,1,4-7"; none when the text is anything else."""
    if not re.fullmatch(r"[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?){0,63}", text, re.ASCII):
        return ()
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return tuple(found[:_GPU_LIMIT])


def _ref(kind: str, key: str, value: str) -> ArtifactRef:
    """The reference of an option or a profile. Raises InputError that names the key."""
    if kind == "image" and value.startswith(("docker://", "dir:/")):
        return image_ref(value)
    return _plain_ref(kind, key, value)


def _plain_ref(kind: str, key: str, value: str) -> ArtifactRef:
    if value.startswith("file:///"):
        value = unquote(value.removeprefix("file://"))  # a URI; where it is a path, it is used as one
    if has_bad_characters(value):
        raise InputError(f"{key}: too long, or holds a control character")
    if not is_usable(kind, value):
        raise InputError(f"{key}: {value[:80]!r} is neither an absolute path nor a URI")
    return ArtifactRef(kind, value)


def image_ref(text: str) -> ArtifactRef:
    """The reference of an image as people, pyxis and enroot name it: a path, a folder, or one of a registry.

    Raises InputError.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "docker":  # as it was put into the store
        return _plain_ref("image", "image", text)
    return ArtifactRef("image", parse(text).name)


def learned_refs(remembered: Iterable[Remembered]) -> list[tuple[ArtifactRef, int | None]]:
    """The references of a class's record and their owners, images first; unusable names are left out.

    remembered: said by a process that is the user's.
    """
    found: list[tuple[ArtifactRef, int | None]] = []
    for kind, name, owner in remembered:
        with contextlib.suppress(InputError):
            found.append((_ref(kind, kind, name), owner))
    return sorted(found, key=lambda each: each[0].kind != "image")  # environments ask for it


def parse_profile(text: str) -> Request:
    """A profile, the TOML file given as --bootseer=PROFILE.toml; see docs/users.md.

    Raises InputError that names every unknown key and every bad value.
    """
    try:
        content: dict[str, Any] = tomli.loads(text)
    except (ValueError, RecursionError) as error:  # of a number with 5000 digits, and of 5000 brackets
        raise InputError(f"profile: not valid TOML: {error}") from error
    problems: list[str] = []
    wanted: list[ArtifactRef] = []
    for key, value in content.items():
        if key in _SWITCHES and isinstance(value, bool):
            continue
        if key not in _PROFILE_KEYS:
            problems.append(f"{key}: {'must be true or false' if key in _SWITCHES else 'unknown key'}")
            continue
        names = [value] if isinstance(value, str) else value
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            problems.append(f"{key}: must be a path, or a list of paths")
            continue
        for name in names:
            try:
                wanted.append(_ref(_PROFILE_KEYS[key], key, name))
            except InputError as error:
                problems.append(error.message)
    if len(wanted) > _WANTED_LIMIT:
        problems.append(f"names {len(wanted)} things, at most {_WANTED_LIMIT} can be")
    if problems:
        hint = f"keys: {', '.join((*_PROFILE_KEYS, *_SWITCHES))}"
        raise InputError("profile: " + "; ".join(problems), hint=hint)
    return Request(content.get("observe") is True, tuple(wanted), content.get("writable") is True)


def number(message: Message, key: str, default: str = "") -> int:
    """A natural number of a message. Raises InputError."""
    text = first(message, key, default)
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        raise InputError(f"{key}: not a number: {text[:40]!r}")
    return int(text)
