"""What compressions make of bytes, and the options that mksquashfs has for them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.blob.compression import COMPRESSIONS, measure, mksquashfs_options

TEXT = b"".join(b"line %d of a module that is imported, %d\n" % (number, number**2) for number in range(4000))


def test_it_is_measured_on_the_samples() -> None:
    found = measure([TEXT] * 20)
    assert list(found) == list(COMPRESSIONS)
    assert found["zstd"].share < found["lz4"].share < 1
    assert all(0 <= each.unpack_s * len(TEXT) * 20 < 5 for each in found.values())


def test_what_cannot_be_compressed_counts_as_it_is() -> None:
    assert {each.share for each in measure([os.urandom(100_000)] * 4).values()} == {1.0}


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("quick", [False, True])
def test_mksquashfs_knows_the_options(tmp_path: Path, name: str, quick: bool) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    command = ["mksquashfs", str(tmp_path / "file"), str(tmp_path / "image"), "-quiet", "-no-progress"]
    subprocess.run([*command, *mksquashfs_options(name, quick=quick)], check=True)
    said = subprocess.run(["unsquashfs", "-s", str(tmp_path / "image")], capture_output=True, text=True, check=True)
    assert f"Compression {name}" in said.stdout
