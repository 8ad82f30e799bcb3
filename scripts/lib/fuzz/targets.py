"""The table of all targets."""

from __future__ import annotations

from scripts.lib.fuzz import formats, messages

TARGETS = (*formats.TARGETS, *messages.TARGETS)
