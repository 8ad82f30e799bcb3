"""scripts/demo --quick as a person runs it, on a cluster of its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from statistics import median

import pytest

from scripts.lib.cluster.client import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.timeout(900)]

DEMO = Path(__file__).parents[2] / "scripts" / "demo"
STAGES = {"prolog", "launch", "image", "environment", "checkpoint", "program"}
ARM = {"runs_s", "median_s", "stages", "store_bytes", "cpu_s", "cpu_busy", "link_busy", "jobs"}


def test_the_demo_starts_the_job_in_all_ways_and_leaves_nothing(
    spare_cluster: Cluster, tmp_path: Path
) -> None:
    written = tmp_path / "demo.json"
    done = subprocess.run(
        [DEMO, "--quick", "--all", "--json", written],
        env=os.environ | {"BOOTSEER_CLUSTER_DIR": str(spare_cluster.state_dir), "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=800,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(written.read_text())

    arms = result["arms"]
    assert list(arms) == ["plain", "first", "again", "spelled"]
    for arm in arms.values():
        assert set(arm) == ARM and set(arm["stages"]) == STAGES
        assert len(arm["runs_s"]) == len(arm["jobs"]) == 1 and arm["median_s"] == median(arm["runs_s"])
        assert 0 < max(arm["stages"].values()) <= sum(arm["stages"].values())
        assert 0 < arm["cpu_busy"] <= 1 and arm["cpu_s"] > 0
        link_busy = arm["store_bytes"] / (result["link_bytes_per_s"] * arm["median_s"])
        assert arm["link_busy"] == pytest.approx(link_busy)
        assert 0 < link_busy < 1.2, "the link's rate holds for all nodes together"
    one_copy_bytes = result["checkpoint_bytes"]
    assert result["nodes"] == 4
    assert all(arm["store_bytes"] > one_copy_bytes for arm in arms.values()), "a start was not cold"
    plain_bytes = arms["plain"]["store_bytes"]
    assert plain_bytes > 4 * one_copy_bytes, "each node reads the store"
    assert all(arms[name]["store_bytes"] < plain_bytes / 2 for name in ("first", "again", "spelled")), (
        "the nodes read about one copy together"
    )
    assert 26e6 < result["link_bytes_per_s"] < 40e6, "the store's link has 300 Mbit/s"
    for name in ("first", "again"):
        reduction = 1 - arms[name]["median_s"] / arms["plain"]["median_s"]
        assert result[f"reduction_{name}"] == pytest.approx(reduction)
    assert result["floor_bytes"] > one_copy_bytes
    floor_s = result["floor_bytes"] / result["link_bytes_per_s"] + result["local_s"]
    assert result["floor_s"] == pytest.approx(floor_s)

    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for title in (*arms, "floor"):
        assert sum(line.startswith(f"{title} ") and " s  " in line for line in lines) == 1
    assert "than plain" in done.stdout and "the floor of" in done.stdout
    assert not spare_cluster.up and not spare_cluster.shared.exists()
