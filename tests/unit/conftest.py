"""What tests of the report share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bootseer_slurm.report.startup.figures import Report

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts" / "lib"))


@pytest.fixture
def made_start() -> Callable[[int], Report]:
    """Gives the report of a start on so many nodes, as the bench makes it."""
    from bench.made_start import made_report

    return made_report
