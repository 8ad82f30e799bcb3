"""scripts/demo as a person runs it, on a cluster of its own, with a smaller checkpoint."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cluster.client import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
STAGES = {"prolog", "launch", "image", "environment", "checkpoint", "program"}


def test_the_demo_starts_the_job_both_ways_and_leaves_nothing(spare_cluster: Cluster, tmp_path: Path) -> None:
    written = tmp_path / "demo.json"
    done = subprocess.run(
        [DEMO, "--json", written, "--checkpoint-mib", "128", "--link", "500mbit"],
        env=os.environ | {"BOOTSEER_CLUSTER_DIR": str(spare_cluster.state_dir)},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(written.read_text())
    assert result["baseline_s"] > 0 and result["bootseer_s"] > 0
    assert result["reduction"] == pytest.approx(1 - result["bootseer_s"] / result["baseline_s"])
    assert set(result["stages"]) == STAGES
    for stage in STAGES:
        assert set(result["stages"][stage]) == {"baseline_s", "bootseer_s"}
    assert "The weights are the same both times" in done.stdout
    assert not spare_cluster.up and not spare_cluster.shared.exists()
