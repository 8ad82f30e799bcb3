"""For all levels: the level a test is of, what this machine can do, and no silent skips in CI."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

LEVELS = ("unit", "hooks", "spank", "integration", "slurm", "hdfs", "pyxis")
# What CI's machine has: a test that needs one of these and is skipped there is a failure.
EXPECTED_IN_CI = ("browser", "fuse", "hdfs", "registry", "s3", "slurm")


def pytest_report_header() -> str:
    """Which capabilities were found."""
    found = {
        "root": os.geteuid() == 0,
        "fuse": Path("/dev/fuse").exists(),
        "slurm": shutil.which("slurmctld") is not None,
        "squashfuse": shutil.which("squashfuse") is not None,
        "registry": all(map(shutil.which, ("docker-registry", "skopeo", "umoci"))),
        "pyxis": shutil.which("enroot") is not None,
        "browser": shutil.which("chromium-headless-shell") is not None,
    }
    return "capabilities: " + " ".join(f"{name}={'yes' if there else 'no'}" for name, there in found.items())


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the quick levels first."""
    items.sort(key=lambda item: LEVELS.index(item.path.relative_to(Path(__file__).parent).parts[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    """In CI, turn the skip of an expected capability into a failure."""
    report = yield
    optional = item.get_closest_marker("pyxis") is not None  # enroot, which no package brings
    needs = [marker for marker in EXPECTED_IN_CI if item.get_closest_marker(marker) and not optional]
    if os.environ.get("CI") and needs and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped in CI, where {', '.join(needs)} is expected: {report.longrepr}"
    return report


@pytest.fixture(scope="session", autouse=True)
def project_within_reach() -> Iterator[None]:
    """Let the cluster's users run the project's command where its clone lies in a closed folder."""
    closed = [folder for folder in Path(__file__).resolve().parents if not folder.stat().st_mode & 0o001]
    modes = {folder: folder.stat().st_mode & 0o7777 for folder in closed} if os.geteuid() == 0 else {}
    for folder, mode in modes.items():
        folder.chmod(mode | 0o011)
    yield
    for folder, mode in modes.items():
        folder.chmod(mode)
