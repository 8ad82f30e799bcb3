"""What a job asked for, as the prolog or the plugin hands it over.

Every value here was typed by the job's user and is read by root: all is checked, nothing is evaluated.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from urllib.parse import unquote

import tomli

from bootseer_slurm.agentapi.protocol import Message, first
from bootseer_slurm.errors import InputError
from bootseer_slurm.image.reference import parse
from bootseer_slurm.slurm.hostlist import expand

_VALUE_LIMIT = 4096
_TARGET_LIMIT = 16
_GPU_LIMIT = 64
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s]+")
_SWITCHES = ("observe", "writable")
_PROFILE_KEYS = {"images": "image", "environments": "environment", "checkpoints": "checkpoint"}


class Rank(NamedTuple):
    """A node of a job. key: the same for what reads the same; the node's name where its rank is not known."""

    key: str
    number: int = 0
    nodes: int = 1


@dataclass(frozen=True, slots=True)
class Job:
    """One start of one job on this node."""

    job_id: int
    restart: int
    uid: int
    gid: int
    nodelist: str = ""
    partition: str = ""
    name: str = ""
    account: str = ""
    gpus: tuple[int, ...] = ()  # of this node, as Slurm numbers them; (): not known

    def rank(self, node: str) -> Rank:
        """Which of the job's nodes this is."""
        try:
            nodes = expand(self.nodelist)
            index = nodes.index(node)
        except (InputError, ValueError):  # the prolog's message was lost, or the list is too long for it
            return Rank(node)
        return Rank(f"{index}/{len(nodes)}", index, len(nodes))


@dataclass(frozen=True, slots=True)
class Wish:
    """One thing a job starts from: its kind, and the path or URI as the user wrote it."""

    kind: str
    name: str

    @property
    def can_be_imported(self) -> bool:
        """Whether pyxis's importer makes what the store does not have."""
        return self.kind == "image" and not self.name.startswith("/")


@dataclass(frozen=True, slots=True)
class Request:
    """All that one job wishes. observe: only measure. writable: environments get a layer to write to.

    asked: by the job, and not by the site for all.
    """

    observe: bool
    wishes: tuple[Wish, ...] = field(default=())
    writable: bool = False
    asked: bool = True


def parse_job(message: Message) -> Job:
    """The job of a prolog, attach or epilog message. Raises InputError."""
    return Job(
        job_id=number(message, "JOB_ID"),
        restart=number(message, "RESTART", "0"),
        uid=number(message, "UID"),
        gid=number(message, "GID", first(message, "UID")),
        nodelist=first(message, "NODELIST")[:_VALUE_LIMIT],
        partition=first(message, "PARTITION")[:256],
        name=first(message, "JOB_NAME")[:256],
        account=first(message, "ACCOUNT")[:256],
        gpus=_gpus(first(message, "GPUS")),
    )


def parse_request(message: Message) -> Request | None:
    """What the job wishes; None when it did not ask for Bootseer. Raises InputError."""
    mode = first(message, "BOOTSEER")
    if not mode:
        return None
    wishes: list[Wish] = []
    writable = False
    profile = first(message, "PROFILE")
    if profile:
        request = parse_profile(profile)
        writable = request.writable
        mode = "observe" if request.observe else mode
        wishes += request.wishes
    for key, kind in (("IMAGE", "image"), ("ENV", "environment"), ("CHECKPOINT", "checkpoint")):
        value = first(message, key)
        if value:
            wishes.append(_wish(kind, key.lower(), value))
    image = first(message, "CONTAINER_IMAGE")
    if image and not any(wish.kind == "image" for wish in wishes):
        with contextlib.suppress(InputError):  # pyxis tells what is wrong with its own option
            wishes.append(image_wish(image))
    return Request(mode == "observe", tuple(dict.fromkeys(wishes))[:_TARGET_LIMIT], writable)


def _gpus(text: str) -> tuple[int, ...]:
    """The GPUs of "0,1,4-7"; none when the text is anything else."""
    if not re.fullmatch(r"[0-9]{1,3}(-[0-9]{1,3})?(,[0-9]{1,3}(-[0-9]{1,3})?){0,63}", text, re.ASCII):
        return ()
    found: list[int] = []
    for part in text.split(","):
        low, _, high = part.partition("-")
        found += range(int(low), int(high or low) + 1)
    return tuple(found[:_GPU_LIMIT])


def _wish(kind: str, key: str, value: str) -> Wish:
    """The wish of an option or a profile. Raises InputError that names the key."""
    if kind == "image" and value.startswith(("docker://", "dir:/")):
        return image_wish(value)
    return Wish(kind, _checked(key, value))


def image_wish(text: str) -> Wish:
    """The wish for an image as people, pyxis and enroot name it: a path, a folder, or one of a registry.

    Raises InputError.
    """
    scheme, separator, _ = text.partition("://")
    if separator and scheme != "docker":  # as it was put into the store
        return Wish("image", _checked("image", text))
    return Wish("image", parse(text).name)


def learned_wishes(value: object) -> list[tuple[Wish, int | None]]:
    """The wishes of a class's record and their owners, images first; what is not a wish is left out.

    value: what a process says that is the user's.
    """
    wishes: list[tuple[Wish, int | None]] = []
    for entry in value[:_TARGET_LIMIT] if isinstance(value, list) else []:
        with contextlib.suppress(InputError, ValueError, TypeError):
            kind, name, owner = entry
            if kind in _PROFILE_KEYS.values() and isinstance(name, str) and isinstance(owner, int | None):
                wishes.append((_wish(kind, "env" if kind == "environment" else kind, name), owner))
    return sorted(wishes, key=lambda each: each[0].kind != "image")  # environments ask for it


def parse_profile(text: str) -> Request:
    """A profile, the TOML file given as --bootseer=PROFILE.toml; see docs/users.md.

    Raises InputError that names every unknown key and every bad value.
    """
    try:
        content: dict[str, Any] = tomli.loads(text)
    except tomli.TOMLDecodeError as error:
        raise InputError(f"profile: not valid TOML: {error}") from error
    problems: list[str] = []
    wishes: list[Wish] = []
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
                wishes.append(_wish(_PROFILE_KEYS[key], key, name))
            except InputError as error:
                problems.append(error.message)
    if len(wishes) > _TARGET_LIMIT:
        problems.append(f"names {len(wishes)} things, at most {_TARGET_LIMIT} can be")
    if problems:
        hint = f"keys: {', '.join((*_PROFILE_KEYS, *_SWITCHES))}"
        raise InputError("profile: " + "; ".join(problems), hint=hint)
    return Request(content.get("observe") is True, tuple(wishes), content.get("writable") is True)


def number(message: Message, key: str, default: str = "") -> int:
    """A natural number of a message. Raises InputError."""
    text = first(message, key, default)
    if not re.fullmatch(r"[0-9]{1,19}", text, re.ASCII):
        raise InputError(f"{key}: not a number: {text[:40]!r}")
    return int(text)


def _checked(key: str, value: str) -> str:
    if value.startswith("file:///"):
        value = unquote(value.removeprefix("file://"))  # a URI; where it is a path, it is used as one
    if len(value) > _VALUE_LIMIT or any(ord(character) < 32 for character in value):
        raise InputError(f"{key}: too long, or holds a control character")
    if value.startswith("/") or (_URI.fullmatch(value) and key not in ("env", "environments")):
        return value
    raise InputError(f"{key}: {value[:80]!r} is neither an absolute path nor a URI")
