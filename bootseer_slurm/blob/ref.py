"""References: what a job starts from, as a person named it. Does no I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

NAME_LIMIT = 4096
_URI = re.compile(r"[a-z][a-z0-9+.-]*://[^\s]+")


@dataclass(frozen=True, slots=True)
class ArtifactRef:
    """One thing that a job starts from: its kind, and the path or URI as its user wrote it."""

    kind: str
    name: str

    @property
    def can_be_imported(self) -> bool:
        """Whether pyxis's importer makes what the store does not have."""
        return self.kind == "image" and not self.name.startswith("/")


def has_bad_characters(name: str) -> bool:
    """Whether a name is too long, or holds a control character."""
    return len(name) > NAME_LIMIT or any(ord(character) < 32 for character in name)


def is_usable(kind: str, name: str) -> bool:
    """Whether a job may start from something of this name; environments have paths only."""
    if has_bad_characters(name):
        return False
    if kind == "image" and name.startswith("dir:/"):  # a folder that an image is made from
        return True
    return name.startswith("/") or (kind != "environment" and _URI.fullmatch(name) is not None)
