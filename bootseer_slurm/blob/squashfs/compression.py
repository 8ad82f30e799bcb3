"""How what we pack is compressed, and what each way makes of samples.

zstd makes fewer bytes, lz4 unpacks faster: repack/worth.py decides for each blob. Does no I/O.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa

from bootseer_slurm.blob.squashfs.mksquashfs import THOROUGH_LEVEL

_LZ4_LEVEL = 9  # -Xhc
COMPRESSIONS = ("zstd", "lz4")


class Measured(NamedTuple):
    """The cost of a compression. share: of the bytes that is left. unpack_s: of a core, for each byte."""

    share: float
    unpack_s: float


def measure(samples: Sequence[bytes]) -> dict[str, Measured]:
    """Each of COMPRESSIONS. samples: some blocks of files that starts touch; not empty."""
    size_bytes = sum(map(len, samples))
    found = {}
    for name in COMPRESSIONS:
        packed_bytes, unpack_s = _measured(name, samples)
        found[name] = Measured(min(1.0, packed_bytes / size_bytes), unpack_s / size_bytes)
    return found


def _measured(compression: str, samples: Sequence[bytes]) -> tuple[int, float]:
    """The bytes of the samples when they are packed, and the processor's seconds to unpack them."""
    if compression == "lz4":
        codec = pa.Codec("lz4_raw", compression_level=_LZ4_LEVEL)
    else:
        codec = pa.Codec(compression, compression_level=THOROUGH_LEVEL)
    packed = [codec.compress(sample, asbytes=True) for sample in samples]
    begin_s = time.process_time()
    for content, sample in zip(packed, samples, strict=True):
        codec.decompress(content, decompressed_size=len(sample))
    return sum(map(len, packed)), time.process_time() - begin_s
