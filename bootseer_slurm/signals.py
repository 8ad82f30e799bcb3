"""Ending by a signal so that what was begun is cleaned up."""

from __future__ import annotations

import signal
from types import FrameType
from typing import NoReturn


def exit_on(*numbers: signal.Signals) -> None:
    """Have these signals raise SystemExit, with the status 128 + number that a shell would show."""
    for number in numbers:
        signal.signal(number, _exit)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)
