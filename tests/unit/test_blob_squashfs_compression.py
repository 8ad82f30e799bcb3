"""What compressions make of bytes."""

from __future__ import annotations

import os

from bootseer_slurm.blob.squashfs.compression import COMPRESSIONS, measure

TEXT = b"".join(b"line %d of a module that is imported, %d\n" % (number, number**2) for number in range(4000))


def test_it_is_measured_on_the_samples() -> None:
    found = measure([TEXT] * 20)
    assert list(found) == list(COMPRESSIONS)
    assert found["zstd"].share < found["lz4"].share < 1
    assert all(0 <= each.unpack_s * len(TEXT) * 20 < 5 for each in found.values())


def test_what_cannot_be_compressed_counts_as_it_is() -> None:
    assert {each.share for each in measure([os.urandom(100_000)] * 4).values()} == {1.0}
