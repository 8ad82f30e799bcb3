"""What tests of the report share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bootseer_slurm.report.startup.figures import Report


@pytest.fixture
def made_start() -> Callable[[int], Report]:
    """Gives the report of a start on so many nodes, as the bench makes it."""
    from scripts.lib.bench.made_start import made_report

    return made_report
