"""A cluster of its own with real pyxis and enroot, and a registry that its nodes reach (containers.py)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib.cluster.settings import pyxis_library
from tests.pyxis.containers import PACKAGES, Site
from tests.slurm.conftest import no_cluster_because


def _lacking() -> str:
    """Why these tests cannot run here, or nothing."""
    if missing := [name for name in ("enroot", *PACKAGES) if shutil.which(name) is None]:
        return f"not installed: {', '.join(missing)}"
    if pyxis_library() is None:
        return "pyxis's plugin spank_pyxis.so is not installed"
    return no_cluster_because()


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Two nodes, alice's home, a registry with one image of hers."""
    if reason := _lacking():
        pytest.skip(reason)
    instance = Site(Path(f"/var/tmp/bootseer-pyxis-{os.getpid()}"), tmp_path_factory.mktemp("registry"))
    try:
        instance.start()
        yield instance
    finally:
        instance.stop()
