"""Text of others in lines of ours: names, paths and messages that anybody may have written."""

from __future__ import annotations


def escaped(text: str) -> str:
    """The text on one line. All that could end a line or steer a terminal is an escape, \\n or \\x1b.

    Line separators, direction marks and bytes that are no text are escaped too.
    """
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text
    )
