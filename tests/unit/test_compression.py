"""Which compression is taken: fewer bytes on a slow link, fewer seconds of unpacking on a fast one."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob import compression
from bootseer_slurm.blob.compression import COMPRESSIONS, best_compression, mksquashfs_options

TEXT = b"".join(b"line %d of a module that is imported, %d\n" % (number, number**2) for number in range(4000))


def test_a_slow_link_gets_fewer_bytes_and_a_fast_one_less_work(mocker: MockerFixture) -> None:
    mocker.patch.object(compression, "_measured", lambda name, _: {"zstd": (100, 0.030), "lz4": (130, 0.010)}[name])
    assert best_compression([b"x" * 400], 1_000) == "zstd", "30 bytes more cost 30 ms, and 20 ms are saved"
    assert best_compression([b"x" * 400], 2_000) == "lz4"


def test_it_is_measured_on_the_samples() -> None:
    packed = {name: compression._measured(name, [TEXT] * 20) for name in COMPRESSIONS}
    assert packed["zstd"][0] < packed["lz4"][0] < 20 * len(TEXT)
    assert all(0 <= seconds < 5 for _, seconds in packed.values())
    assert best_compression([TEXT], 1) == "zstd"


def test_what_cannot_be_compressed_counts_as_it_is() -> None:
    assert best_compression([os.urandom(100_000)] * 4, 1e6) in COMPRESSIONS


@pytest.mark.parametrize("name", COMPRESSIONS)
@pytest.mark.parametrize("quick", [False, True])
def test_mksquashfs_knows_the_options(tmp_path: Path, name: str, quick: bool) -> None:
    (tmp_path / "file").write_bytes(TEXT)
    command = ["mksquashfs", str(tmp_path / "file"), str(tmp_path / "image"), "-quiet", "-no-progress"]
    subprocess.run([*command, *mksquashfs_options(name, quick=quick)], check=True)
    said = subprocess.run(["unsquashfs", "-s", str(tmp_path / "image")], capture_output=True, text=True, check=True)
    assert f"Compression {name}" in said.stdout
