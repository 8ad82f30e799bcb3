"""Image references: what people write, and the one name that the store has for it.

    ubuntu:22.04                            docker://docker.io/library/ubuntu:22.04
    nvcr.io#nvidia/pytorch:24.01-py3        docker://nvcr.io/nvidia/pytorch:24.01-py3
    docker://me@reg.local:5000/team/x       docker://reg.local:5000/team/x:latest
    docker://x:1@sha256:<64 hex>            docker://docker.io/library/x@sha256:<64 hex>
    dir:/shared/rootfs                      dir:/shared/rootfs
    /shared/img/train.sqsh                  /shared/img/train.sqsh

Registry, repository and tag are told apart as enroot does (`enroot import`): without `#`, the first part is
a registry when it holds a "." or a ":". A digest wins over a tag. The user of `user@` logs in, and is no
part of the name. Text is hostile: the agent, which is root, reads it from jobs. Standard library only.
"""

from __future__ import annotations

import posixpath
import re
from dataclasses import dataclass, replace

from bootseer_slurm.errors import InputError

DOCKER = "docker://"
FOLDER = "dir:"
_LIMIT = 1024
_SHOWN = 80
_HUB = "docker.io"
_HUB_ALIASES = ("docker.io", "index.docker.io", "registry-1.docker.io")
_USER = re.compile(r"[A-Za-z0-9_.!~*'()%;:&=+$,@-]{1,255}")
_REGISTRY = re.compile(r"[a-z0-9]([a-z0-9.-]{0,253}[a-z0-9])?(:[0-9]{1,5})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry. Has a tag or a digest, never both; `user` may be empty."""

    registry: str
    repository: str
    tag: str
    digest: str
    user: str = ""

    @property
    def name(self) -> str:
        """Its name in the store; a host of one word keeps its "#", as in host#team/x."""
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        between = "/" if _names_registry(self.registry) else "#"
        return f"{DOCKER}{self.registry}{between}{self.repository}{end}"

    @property
    def enroot_uri(self) -> str:
        """The URI by which enroot knows the image."""
        end = f"@{self.digest}" if self.digest else f":{self.tag}"
        user = f"{self.user}@" if self.user else ""
        return f"{DOCKER}{user}{self.registry}#{self.repository}{end}"

    def pinned(self, digest: str) -> Reference:
        """The same repository's image of this digest. Raises InputError when it is none."""
        if not _DIGEST.fullmatch(digest):
            raise InputError(f"image {self.name}: {digest[:_SHOWN]!r} is not a sha256 digest")
        return replace(self, tag="", digest=digest)


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder that is a container's root file system."""

    path: str

    @property
    def name(self) -> str:
        """Its name in the store."""
        return f"{FOLDER}{self.path}"


@dataclass(frozen=True, slots=True)
class SquashfsFile:
    """A squashfs file, used where it lies."""

    path: str

    @property
    def name(self) -> str:
        """Its name in the store, as long as no symbolic link is in it."""
        return self.path


def parse(text: str) -> Reference | Folder | SquashfsFile:
    """The meaning of a person's image reference. Touches no file and no network.

    Raises InputError, always one line, that says what is wrong with it.
    """
    if len(text) > _LIMIT:
        raise InputError(f"image {text[:_SHOWN]!r}…: longer than {_LIMIT} characters")
    body = text.removeprefix(DOCKER)
    # pyxis puts docker:// before all that is no path.
    if body.startswith(FOLDER):
        return Folder(_absolute(body.removeprefix(FOLDER), text))
    if text.startswith(("/", ".")):
        return SquashfsFile(_absolute(text, text))
    if "://" in body:
        raise _unusable(text, "only docker://, dir:/path and paths are known")
    return _parse_registry(body, text)


def registry_reference(text: str) -> Reference:
    """As `parse`, of an image in a registry only. Raises InputError."""
    found = parse(text)
    if not isinstance(found, Reference):
        raise _unusable(text, "not an image of a registry")
    return found


def _parse_registry(body: str, text: str) -> Reference:
    rest, digest = body, ""
    before, at, after = body.rpartition("@")
    if at and after.startswith("sha256:"):
        if not _DIGEST.fullmatch(after):
            raise _unusable(text, "its digest is not sha256: and 64 hexadecimal digits")
        rest, digest = before, after
    user, at, rest = rest.rpartition("@")
    if at and not _USER.fullmatch(user):
        raise _unusable(text, "its user name cannot be used")
    registry, hash_sign, path = rest.partition("#")
    if not hash_sign:
        registry, slash, path = rest.partition("/")
        if not slash or not _names_registry(registry):
            registry, path = _HUB, rest
    repository, colon, tag = path.partition(":")
    registry = registry.lower()
    if not _REGISTRY.fullmatch(registry):
        raise _unusable(text, "its registry is not a host name, with or without a port")
    if registry in _HUB_ALIASES:
        registry = _HUB
        repository = repository if "/" in repository else f"library/{repository}"
    if len(repository) > 255 or not _REPOSITORY.fullmatch(repository):
        raise _unusable(text, "its repository may hold only a-z, 0-9 and . _ - / between them")
    if colon and not _TAG.fullmatch(tag):
        raise _unusable(text, "its tag may hold only letters, digits and . _ -")
    return Reference(registry, repository, "" if digest else tag or "latest", digest, user)


def _names_registry(first: str) -> bool:
    """Whether the part before the first "/" is a registry, and no user of Docker Hub."""
    return "." in first or ":" in first


def _absolute(path: str, text: str) -> str:
    if not path.startswith("/"):
        raise _unusable(text, "a path must be absolute")
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in path):
        raise _unusable(text, "a path may not hold control characters")
    return "/" + posixpath.normpath(path).lstrip("/")


def _unusable(text: str, reason: str) -> InputError:
    return InputError(f"image {text[:_SHOWN]!r}: {reason}")
