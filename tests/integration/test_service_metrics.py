"""The agent's figures for Prometheus: of a real agent and its reads, and those that the dashboard asks for."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from bootseer_slurm.service.metrics import Metrics
from tests.integration.node import ALICE, Node, node_of, wait_until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
DASHBOARD = Path(__file__).parents[2] / "conf/grafana/bootseer.json"
_OFTEN = "from bootseer_slurm.service import metrics\nmetrics._EVERY_S = 0.05\n"


@pytest.fixture
def node() -> Iterator[Node]:
    with node_of() as made:
        made.config.write_text(
            made.config.read_text().replace("[agent]\n", f'[agent]\nmetrics = "{made.folder}/out/b.prom"\n')
        )
        (made.folder / "out").mkdir()
        yield made


def figures(node: Node) -> dict[tuple[str, ...], float]:
    """Each sample: its name and the values of its labels."""
    text = (node.folder / "out" / "b.prom").read_text()
    families = list(text_string_to_metric_families(text))
    assert all(family.documentation and family.type in ("counter", "gauge") for family in families)
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def checkpoint(node: Node, size_bytes: int) -> Path:
    path = node.folder / "data" / "model.pt"
    path.write_bytes(os.urandom(size_bytes))
    os.chown(path, ALICE, ALICE)
    os.utime(path, (1_800_000_000, 1_800_000_000))
    return path


def test_what_a_job_did_is_counted_and_stays_when_the_job_is_over(node: Node) -> None:
    node.start(_OFTEN)
    wait_until(lambda: (node.folder / "out" / "b.prom").exists())
    before = figures(node)
    assert before["bootseer_sessions",] == 0 and before["bootseer_cache_blobs",] == 0
    assert (
        before["bootseer_cache_max_bytes",] == 200 * 2**30
        and before["bootseer_cache_min_free_bytes",] == 2**20
    )
    path = checkpoint(node, 5_000_000)
    wish = {"SPANK_BOOTSEER": "1", "BOOTSEER": "1", "CHECKPOINT": str(path)}
    node.ask("prolog", JOB_ID=7, UID=ALICE, GID=ALICE, RESTART_COUNT=0, NODENAME="n1", NODELIST="n1", **wish)
    wait_until(lambda: figures(node)["bootseer_fetched_bytes_total", "origin"] == 5_000_000)
    during = figures(node)
    assert (during["bootseer_sessions",], during["bootseer_sessions_begun_total",]) == (1, 1)
    assert during["bootseer_demand_bytes_total",] == 0
    assert during["bootseer_cache_blobs",] == 1 and during["bootseer_cache_used_bytes",] >= 5_000_000
    node.ask("prolog", JOB_ID=8, UID=ALICE, GID=ALICE, RESTART_COUNT=0, NODENAME="n1", NODELIST="n1",
             BOOTSEER="1", CHECKPOINT=f"{node.folder}/data/none.pt")  # fmt: skip
    wait_until(lambda: ("bootseer_faults_total", "checkpoint_not_used") in figures(node))
    for job in (7, 8):
        node.ask("epilog", JOB_ID=job)
    wait_until(lambda: figures(node)["bootseer_sessions",] == 0)
    node.events(7)
    after = figures(node)
    assert after["bootseer_sessions_begun_total",] == 2
    fetched = [after["bootseer_fetched_bytes_total", source] for source in ("store", "origin", "peers")]
    assert fetched == [0, 5_000_000, 0]
    assert after["bootseer_faults_total", "checkpoint_not_used"] == 1


def test_the_file_is_everybodys_to_read_and_goes_with_the_agent(node: Node) -> None:
    path = node.folder / "out" / "b.prom"
    process = node.start(_OFTEN)
    wait_until(path.exists)
    assert path.stat().st_mode & 0o777 == 0o644
    assert node.as_user("head", "-c", "6", str(path)) == "# HELP"
    process.terminate()
    process.wait(20)
    wait_until(lambda: not list(path.parent.iterdir()))


def test_a_link_where_the_file_is_made_is_not_followed(tmp_path: Path) -> None:
    """The folder may be node_exporter's."""
    victim = tmp_path / "passwd"
    victim.write_text("root")
    for name in (f".b.prom.{os.getpid()}", "b.prom"):
        (tmp_path / name).symlink_to(victim)
    metrics = Metrics.__new__(Metrics)
    metrics._registry = CollectorRegistry()
    metrics.write(tmp_path / "b.prom")
    assert victim.read_text() == "root"
    assert [(path.name, path.is_symlink()) for path in sorted(tmp_path.iterdir())] == [
        ("b.prom", False),
        ("passwd", False),
    ]


def test_a_fault_of_ours_does_not_end_the_writing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    looks: list[int] = []

    class Fails:
        def collect(self) -> Iterator[object]:
            looks.append(1)
            stop.set() if len(looks) == 4 else None
            raise ZeroDivisionError("a bug")

    metrics = Metrics.__new__(Metrics)
    metrics._registry = CollectorRegistry()
    metrics._registry._collector_to_names[Fails()] = []  # type: ignore[index]
    stop.wait = lambda _: stop.is_set()  # type: ignore[assignment, method-assign]
    metrics.keep_written(tmp_path / "b.prom", stop)
    assert len(looks) == 4 and caplog.text.count("cannot be written") == 1


def test_a_folder_that_is_not_there_costs_a_line_in_the_log_and_nothing_else(node: Node) -> None:
    (node.folder / "out").rmdir()
    node.start(_OFTEN)
    wait_until(lambda: "metrics" in node.log)
    threading.Event().wait(0.5)
    assert node.log.count("cannot be written") == 1
    (node.folder / "out").mkdir()
    wait_until((node.folder / "out" / "b.prom").exists)


def test_the_dashboard_asks_for_figures_that_there_are_and_for_all_of_them(node: Node) -> None:
    node.start(_OFTEN)
    wait_until(lambda: (node.folder / "out" / "b.prom").exists())
    text = (node.folder / "out" / "b.prom").read_text()
    there = set(re.findall(r"^# TYPE (\S+)", text, re.M))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = set(
        re.findall(r"\b(bootseer_\w+)", json.dumps([panel["targets"] for panel in dashboard["panels"]]))
    )
    assert asked == there
    assert re.findall(r"bootseer_\w+", json.dumps(dashboard["templating"])) == ["bootseer_sessions"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
