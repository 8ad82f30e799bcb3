"""The table of all targets."""

from __future__ import annotations

from scripts.lib.fuzz import formats, messages, peers

TARGETS = (*formats.TARGETS, *messages.TARGETS, *peers.TARGETS)
