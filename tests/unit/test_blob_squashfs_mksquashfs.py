"""The options that mksquashfs gets."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bootseer_slurm.blob.squashfs.compression import COMPRESSIONS
from bootseer_slurm.blob.squashfs.mksquashfs import compression_options

TEXT = b"".join(b"line %d of a module that is imported, %d\n" % (number, number**2) for number in range(4000))


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("quick", [False, True])
def test_it_knows_the_options(tmp_path: Path, name: str, quick: bool) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    command = ["mksquashfs", str(tmp_path / "file"), str(tmp_path / "image"), "-quiet", "-no-progress"]
    subprocess.run([*command, *compression_options(name, quick=quick)], check=True)
    said = subprocess.run(
        ["unsquashfs", "-s", str(tmp_path / "image")], capture_output=True, text=True, check=True
    )
    assert f"Compression {name}" in said.stdout
