"""How long tasks of this node had to wait for what they need: the kernel's pressure stall information."""

from __future__ import annotations

import contextlib
import re
import time
from pathlib import Path
from typing import Any

_FOLDER = Path("/proc/pressure")
_TOTAL = re.compile(r"^some .*total=([0-9]+)$", re.MULTILINE)


class Pressure:
    """Since it was made: in how much of the time some task of the node waited."""

    def __init__(self) -> None:
        self._begin_s = time.monotonic()
        self._before = _stalled_s()

    def since(self) -> tuple[float, dict[str, Any]]:
        """The seconds, and of these cpu_s, io_s and memory_s, where the kernel tells them."""
        now = _stalled_s()
        waited: dict[str, Any] = {
            f"{name}_s": now[name] - before for name, before in self._before.items() if name in now
        }
        return time.monotonic() - self._begin_s, waited


def _stalled_s() -> dict[str, float]:
    found = {}
    for name in ("cpu", "io", "memory"):
        with contextlib.suppress(OSError):
            if match := _TOTAL.search((_FOLDER / name).read_text()):
                found[name] = int(match[1]) / 1e6
    return found
