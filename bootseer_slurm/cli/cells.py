"""The cells of tables: text of others, which rich would take for markup, and a terminal for commands."""

from __future__ import annotations

from rich.text import Text

from bootseer_slurm.text import escaped


def cell(text: str) -> Text:
    """The text as it is, line by line, without markup; what could steer a terminal is an escape."""
    return Text("\n".join(map(escaped, text.split("\n"))))
