"""Who is told how long work goes on: an import, a save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

Stage = Callable[[str, int | None], None]
Progress = Callable[[int], None]
Warn = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Listener:
    """stage: told what is being done, and of how many bytes if known. progress: told the bytes done since.

    warn: told of what is not as it should be.
    """

    stage: Stage = lambda text, size_bytes: None
    progress: Progress = lambda count: None
    warn: Warn = lambda message: None


SILENT = Listener()
