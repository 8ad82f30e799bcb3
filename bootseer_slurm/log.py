"""Logging of the agent: one line a record, with fixed fields.

Fields are given as `extra={"job": 12, "dur_s": 0.4}` and appear as `job=12 dur_s=0.4` after the message.
Measurements are events (events.py), never scraped from here.
"""

from __future__ import annotations

import logging
import sys

FIELDS = ("job", "node", "phase", "bytes", "dur_s")


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        fields = " ".join(f"{name}={getattr(record, name)}" for name in FIELDS if hasattr(record, name))
        return f"{line} {fields}" if fields else line


def set_up(level: str) -> None:
    """Send all records of `level` ("debug", "info", "warning", "error") and above to stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
