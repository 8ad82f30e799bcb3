"""Quantities with their units, as people write and read them."""

from __future__ import annotations

import re

from bootseer_slurm.errors import InputError

_BYTES = {"": 1, "B": 1, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
          "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # fmt: skip
_MOST = 2.0**63
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def parse_bytes(text: str) -> int:
    """Bytes of a text such as "64MiB" or "20GB".

    Raises InputError when the text is no quantity of bytes.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _BYTES:
        raise InputError(f"{text!r} is not a quantity of bytes", hint='write it as "64MiB" or "20GB"')
    size_bytes = float(match[1]) * _BYTES[match[2].upper()]
    if size_bytes >= _MOST:
        raise InputError(f"{text[:40]!r} is more bytes than there can be")
    return int(size_bytes)


def parse_duration(text: str) -> float:
    """Seconds of a text such as "30s", "250ms" or "2h".

    Raises InputError when the text is no duration.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text)
    if not match or match[2] not in _SECONDS:
        raise InputError(f"{text!r} is not a duration", hint='write it as "30s", "250ms" or "2h"')
    duration_s = float(match[1]) * _SECONDS[match[2]]
    if duration_s >= _MOST:
        raise InputError(f"{text[:40]!r} is longer than anything lasts")
    return duration_s


def format_bytes(size_bytes: float) -> str:
    """Bytes as a person reads them, in binary units: "1.5 GiB"."""
    value = float(size_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return f"{value:.0f} {unit}" if unit == "B" or abs(value) >= 100 else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def format_duration(duration_s: float) -> str:
    """Seconds as a person reads them: "12 ms", "4.21 s", "3 min 20 s", "2 h 05 min"."""
    if duration_s < 0:
        return "-" + format_duration(-duration_s)
    if duration_s < 1:
        return f"{duration_s * 1000:.0f} ms"
    if duration_s < 60:
        return f"{duration_s:.2f} s" if duration_s < 10 else f"{duration_s:.1f} s"
    minutes, seconds = divmod(round(duration_s), 60)
    if minutes < 60:
        return f"{minutes} min {seconds:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"


def format_share(share: float) -> str:
    """A share of 1 as a person reads it: "21 %"."""
    return f"{100 * share:.0f} %"
