"""Whether packing a blob again is worth its while: what its next start saves.

Pure functions. A start fetches what it touches, and its own reads unpack that. So it saves by fewer bytes, or
by bytes that are unpacked faster where the link is fast.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bootseer_slurm.blob.compression import Measured

_WORTH = 0.9  # of what a start fetches now, or takes: what is left must be less, or the layout stays
_LEAST_SAVED_BYTES = 4 * 2**20
_LEAST_SAVED_S = 0.1


@dataclass(frozen=True, slots=True)
class Start:
    """What a start fetches of a blob, and how that is compressed."""

    fetched_bytes: int
    compression: str


def is_worth_it(
    now: Start,
    new: Start,
    *,
    content_bytes: int,
    measured: Mapping[str, Measured],
    link_bytes_per_s: float,
) -> bool:
    """Whether the new start fetches noticeably less than now; with another compression, takes less time.

    content_bytes: that both unpack. measured: by compression; where it lacks one, bytes count.
    """
    if now.compression == new.compression or not {now.compression, new.compression} <= measured.keys():
        return _is_less(new.fetched_bytes, now.fetched_bytes, _LEAST_SAVED_BYTES)

    def takes_s(start: Start) -> float:
        unpack_s = content_bytes * measured[start.compression].unpack_s
        return start.fetched_bytes / link_bytes_per_s + unpack_s

    return _is_less(takes_s(new), takes_s(now), _LEAST_SAVED_S)


def _is_less(new: float, now: float, least: float) -> bool:
    return new <= _WORTH * now and now - new >= least
