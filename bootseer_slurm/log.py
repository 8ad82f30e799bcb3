"""Logging of the agent: one line a record, with fixed fields.

Fields are given as `extra={"job": 12, "dur_s": 0.4}` and appear as `job=12 dur_s=0.4` after the message.
Measurements are events (events.py), never scraped from here. Messages hold names that users chose: nothing in
one begins a line, which journald would take for a record of its own, with a level of its own ("<0>").
"""

from __future__ import annotations

import logging
import sys
from typing import Any

from bootseer_slurm.text import escaped

FIELDS = ("job", "node", "phase", "bytes", "dur_s")


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = [f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name)]
        return escaped(" ".join((super().formatMessage(record), *fields)))

    def formatException(self, ei: Any) -> str:
        return "\n".join(f"    {escaped(line)}" for line in super().formatException(ei).split("\n"))

    def formatStack(self, stack_info: str) -> str:
        return "\n".join(f"    {escaped(line)}" for line in super().formatStack(stack_info).split("\n"))


def set_up(level: str) -> None:
    """Send all records of `level` ("debug", "info", "warning", "error") and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
