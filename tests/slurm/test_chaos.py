"""scripts/chaos for a minute, as a person runs it, on a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from scripts.lib.chaos.faults import FAULTS
from scripts.lib.cluster.client import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

CHAOS = Path(__file__).parents[2] / "scripts" / "chaos"


def test_a_minute_of_bad_luck(spare_cluster: Cluster, tmp_path: Path) -> None:
    written = tmp_path / "chaos.json"
    done = subprocess.run(
        [CHAOS, "--minutes", "1", "--json", written],
        env=os.environ | {"BOOTSEER_CLUSTER_DIR": str(spare_cluster.state_dir), "COLUMNS": "100"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(written.read_text())
    assert result["wrong"] == [] and set(result["faults"]) == set(FAULTS)
    # On the slowest machine there are some of each: a run without jobs or faults would show nothing.
    assert result["jobs"] >= 10 and sum(result["faults"].values()) >= 5
    assert result["tasks_with_shadows"] > 0 and result["bytes_compared"] > 10**7
    assert result["prologs"] >= result["jobs"] / 2
    assert f"Seed {result['seed']}" in done.stdout, "the seed is told, to make the same day again"
    assert not spare_cluster.up and not spare_cluster.shared.exists()
