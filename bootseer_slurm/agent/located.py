"""The files of a checkpoint as the fetch process found them: its reply is the user's, and is not believed."""

from __future__ import annotations

from typing import Any, NamedTuple

from bootseer_slurm.agent.request import Wish, learned_wishes
from bootseer_slurm.errors import InputError

FILES = 48  # of one checkpoint: each is looked up and mounted for itself


class Located(NamedTuple):
    """place: of a checkpoint that is the named file itself, else "". message: why it was taken.

    files: else each file as a wish, and its place, by its path within the checkpoint.
    has_no_path: these have no path that they could be shown at.
    """

    place: str
    message: str
    files: dict[str, tuple[Wish, str]]
    has_no_path: bool


def parse_located(name: str, fields: dict[str, Any]) -> Located:
    """What a reply to "locate" says of a checkpoint of that name.

    Raises InputError, and KeyError, ValueError or TypeError for what is no such reply.
    """
    found = {str(file): (str(place), str(within)) for file, place, within in fields["files"][:FILES]}
    if list(found) == [name]:
        return Located(found[name][0], "", {}, False)
    message = str(fields.get("message", ""))[:1000]
    has_no_path = len(found) > 1 and any("://" in file for file in found)
    if fields.get("count", 0) > len(found):
        if has_no_path:
            raise InputError(f"checkpoint {name}: more than {FILES} files that have no path of their own")
        message += f"; {len(found)} of its files are brought"
    files = {
        within: (wish, place)
        for file, (place, within) in found.items()
        for wish, _ in learned_wishes([("checkpoint", file, None)])
    }
    return Located("", message, files, has_no_path)
