"""The worth of packing a blob again, and with which compression: the time and bytes that a start saves.

Pure functions. While a start works, the link brings what it touches next, so it takes as long as the longer
of both. Fewer bytes help where that is the link; where it is the work, bytes that are unpacked faster do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bootseer_slurm.blob.squashfs.compression import COMPRESSIONS, Measured

_WORTH = 0.9  # of what a start fetches now, or takes: what is left must be less, or the layout stays
_LEAST_SAVED_BYTES = 4 * 2**20
_LEAST_SAVED_S = 0.1


@dataclass(frozen=True, slots=True)
class Start:
    """The bytes of the blob that a start fetches, and their compression."""

    fetched_bytes: int
    compression: str


@dataclass(frozen=True, slots=True)
class Scene:
    """The facts that stay when the blob is packed anew.

    content_bytes: of the blob, that are unpacked. beside_bytes: that come over the link for other blobs.
    worked_s: from the first touch to the last, without waits for this blob, as it is now. Waits for other
    blobs count as work: then zstd and lz4 seem to take as long, and nothing changes.
    link_bytes_per_s: that the node gets. measured: the compressions that were; none where the link was not.
    """

    content_bytes: int
    beside_bytes: int
    worked_s: float
    link_bytes_per_s: float
    measured: Mapping[str, Measured]


def best(now: Start, new_bytes: int, scene: Scene) -> Start | None:
    """The start of the blob packed anew that is worth it; None where none is.

    new_bytes: that it fetches, compressed as now. With the compression with which it takes the least time,
    where all is known that decides; else, or where that saves too little time, with the one of now.
    """
    same = Start(new_bytes, now.compression if now.compression in COMPRESSIONS else COMPRESSIONS[0])
    starts = [same]
    if now.compression in scene.measured:
        all_bytes = new_bytes / scene.measured[now.compression].share
        found = [Start(round(all_bytes * each.share), name) for name, each in scene.measured.items()]
        starts = [min(found, key=lambda start: (_takes_s(start, now, scene), start.fetched_bytes)), same]
    return next((start for start in starts if is_worth_it(now, start, scene)), None)


def is_worth_it(now: Start, new: Start, scene: Scene) -> bool:
    """Whether the new start fetches noticeably less; with another compression, takes noticeably less time."""
    if now.compression == new.compression or not {now.compression, new.compression} <= scene.measured.keys():
        return _is_less(new.fetched_bytes, now.fetched_bytes, _LEAST_SAVED_BYTES)
    return _is_less(_takes_s(new, now, scene), _takes_s(now, now, scene), _LEAST_SAVED_S)


def _takes_s(start: Start, now: Start, scene: Scene) -> float:
    def unpack_s(compression: str) -> float:
        return scene.content_bytes * scene.measured[compression].unpack_s

    link_s = (start.fetched_bytes + scene.beside_bytes) / scene.link_bytes_per_s
    rest_s = max(0.0, scene.worked_s - unpack_s(now.compression))
    return max(link_s, rest_s + unpack_s(start.compression))


def _is_less(new: float, now: float, least: float) -> bool:
    return new <= _WORTH * now and now - new >= least
