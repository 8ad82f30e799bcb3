"""Reports of real jobs: their stages against sacct's wall time, slow nodes by name, and jobs that did not ask."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.lib.cluster.client import BOOTSEER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300)]

HOME = "/shared/home/alice/report"
TRAINS_S = 2
MODEL_BYTES = 100_000_000
# Reads its checkpoint, says that it trains, and does so for a while.
JOB = textwrap.dedent(
    f"""\
    #!/bin/bash
    #SBATCH -N3 --ntasks-per-node=1 -o {HOME}/%j.out -J reported
    srun bash -c 'cat {HOME}/model.bin > /dev/null; {BOOTSEER} mark training_started 2>/dev/null; sleep {TRAINS_S}'
    """
)
WISH = ("--bootseer", f"--bootseer-checkpoint={HOME}/model.bin")


class Reports:
    """Jobs of alice's and their reports."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert cluster.exec("login", BOOTSEER, "store", "init").returncode == 0
        make = f"mkdir -p {HOME} && head -c {MODEL_BYTES} /dev/urandom > {HOME}/model.bin"
        assert cluster.exec("login", "bash", "-c", make, user="alice").returncode == 0

    def run(self, *args: str, script: str = JOB) -> int:
        job_id = self.cluster.sbatch(script, *args)
        assert self.cluster.wait(job_id, 150) == "COMPLETED"
        return job_id

    def told(self, job_id: int, nodes: int) -> None:
        """Wait until so many nodes have told their end: their epilogs do."""
        folder = self.cluster.shared / f"bootseer/users/20001/events/{job_id}.0"
        deadline = time.monotonic() + 30
        while (
            sum('"kind":"session","name":"end"' in path.read_text() for path in folder.glob("*.jsonl"))
            < nodes
        ):
            assert time.monotonic() < deadline, f"{folder} is not complete"
            time.sleep(0.2)

    def report(self, job_id: int | str, *args: str, user: str | None = "alice") -> str:
        done = self.cluster.exec("login", BOOTSEER, "report", str(job_id), *args, user=user)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def document(self, job_id: int | str) -> dict[str, Any]:
        return dict(json.loads(self.report(job_id, "--format", "json")))

    def elapsed_s(self, job_id: int | str) -> int:
        """The wall time, as sacct itself shows it."""
        done = self.cluster.exec("login", "sacct", "-nPX", "-j", str(job_id), "-o", "ElapsedRaw")
        return int(done.stdout.split()[0])

    def epilog_ns(self, job_id: int, node: str) -> int:
        """When the epilog ran on a node, by its own clock."""
        folder = self.cluster.shared / f"bootseer/users/20001/events/{job_id}.0"
        lines = map(json.loads, (folder / f"{node}.jsonl").read_text().splitlines())
        return int(next(line["t_ns"] for line in lines if (line["kind"], line["name"]) == ("hook", "epilog")))


@pytest.fixture(scope="module")
def reports(cluster: Cluster) -> Reports:
    return Reports(cluster)


@pytest.fixture(autouse=True)
def links_and_agents_well(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.script("link", "all", "1gbit")
    for node in cluster.nodes:
        cluster.agent(node, "start")


def assert_adds_up(reports: Reports, job_id: int, document: dict[str, Any], nodes: int = 3) -> None:
    """Stages and what came after them are sacct's wall time, and the node's own epilog agrees with that."""
    elapsed_s = reports.elapsed_s(job_id)
    assert len(document["starts"]) == nodes
    assert document["wall_s"] == elapsed_s
    for start in document["starts"]:
        assert sum(start["stages"].values()) + start["after_s"] == pytest.approx(elapsed_s, abs=1)
        ends_ns = [span["end_ns"] for span in start["spans"]]
        begins_ns = [span["begin_ns"] for span in start["spans"]]
        assert begins_ns == [start["begin_ns"], *ends_ns[:-1]], "one span begins where the one before ends"
        # Independent of accounting: from the hook's stamp to the epilog's.
        own_s = (reports.epilog_ns(job_id, start["node"]) - start["spans"][0]["end_ns"]) / 1e9
        assert own_s + start["stages"]["allocation"] == pytest.approx(elapsed_s, abs=1.5)
        assert start["after_s"] >= TRAINS_S - 1


def test_the_stages_of_a_plain_a_first_and_a_second_start_add_up_to_the_wall_time(reports: Reports) -> None:
    reports.cluster.script("drop-caches", "--bootseer")
    plain = reports.run("--bootseer=observe")
    first, second = reports.run(*WISH), reports.run(*WISH)
    documents = {}
    for job_id in (plain, first, second):
        reports.told(job_id, 3)
        documents[job_id] = reports.document(job_id)
        assert_adds_up(reports, job_id, documents[job_id])
        assert documents[job_id]["training_from"] == "mark"
        assert not documents[job_id]["unended_nodes"]
    assert [documents[job_id]["mode"] for job_id in (plain, first, second)] == [
        "observe",
        "prefetch",
        "prefetch",
    ]
    fetched = [
        sum(row["fetched_bytes"] for row in documents[job_id]["transfers"]) for job_id in (first, second)
    ]
    assert fetched == [3 * MODEL_BYTES, 0]
    assert all(row["store_bytes"] == 0 for row in documents[first]["transfers"]), (
        "they came from the original"
    )
    assert (documents[plain]["plain_s"], documents[plain]["plain_count"]) == (None, None)
    assert documents[second]["plain_count"] == 1
    assert documents[second]["plain_s"] == pytest.approx(documents[plain]["start_to_training_s"])
    # sshfs keeps whole seconds; all nodes have this machine's clock.
    for start in documents[second]["starts"]:
        assert abs(start["clock_offset_s"]) <= start["clock_error_s"] < 3


def test_a_node_with_a_slow_link_is_named(reports: Reports) -> None:
    reports.cluster.script("drop-caches", "--bootseer")
    reports.cluster.script("link", "n3", "80mbit")
    job_id = reports.run(*WISH)
    reports.told(job_id, 3)
    document = reports.document(job_id)
    (straggler,) = document["stragglers"]
    assert (straggler["node"], straggler["cause"]) == ("n3", "slow link"), straggler
    assert straggler["lost_s"] > 4
    verdict = document["verdict"]
    assert (verdict["node"], verdict["what"], verdict["names"]) == ("n3", "checkpoint", [f"{HOME}/model.bin"])
    assert verdict["waited_s"] > 4 and verdict["share"] > 0.3
    (slow,) = (row for row in document["transfers"] if row["node"] == "n3")
    assert slow["in_time"] is False
    assert slow["start_s"] >= slow["waited_s"] >= slow["longest_wait_s"] > 0
    assert_adds_up(reports, job_id, document)
    shown = " ".join(reports.report(job_id).split())
    assert "n3: slow link" in shown
    assert "held up by the checkpoint" in shown


def test_a_node_with_a_cold_cache_is_named(reports: Reports) -> None:
    reports.run(*WISH)
    reports.cluster.agent("n2", "stop")
    reports.cluster.exec("n2", "sh", "-c", "rm -rf /var/lib/bootseer/cache/*")
    reports.cluster.agent("n2", "start")
    reports.cluster.script("drop-caches")
    reports.cluster.script("link", "all", "200mbit")
    job_id = reports.run(*WISH)
    reports.told(job_id, 3)
    (straggler,) = reports.document(job_id)["stragglers"]
    assert (straggler["node"], straggler["cause"]) == ("n2", "cold cache"), straggler


def test_a_node_that_died_is_named_and_the_rest_is_right(reports: Reports) -> None:
    script = JOB.replace("sleep 2", f"sleep {TRAINS_S + 3}")
    job_id = reports.cluster.sbatch(script, *WISH)
    deadline = time.monotonic() + 60
    while str(job_id) not in reports.cluster.exec("n2", BOOTSEER, "status").stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    reports.cluster.agent("n2", "kill")
    assert reports.cluster.wait(job_id, 150) == "COMPLETED"
    reports.told(job_id, 2)
    document = reports.document(job_id)
    assert document["silent_nodes"] + document["unended_nodes"] == ["n2"]
    whole = [start for start in document["starts"] if start["node"] != "n2"]
    assert_adds_up(reports, job_id, document | {"starts": whole}, nodes=2)


def test_the_task_of_an_array_and_a_part_of_a_heterogeneous_job(reports: Reports) -> None:
    script = JOB.replace("-N3", "-N1")
    array = reports.cluster.sbatch(script, "--array=7", *WISH)
    assert reports.cluster.wait(array, 100) == "COMPLETED"
    reports.told(array, 1)
    document = reports.document(f"{array}_7")
    assert (document["job"], document["shown_id"]) == (array, f"{array}_7")
    assert_adds_up(reports, array, document, nodes=1)
    # One srun for both parts; each part has its own id, node and report.
    het = script.replace("#SBATCH -N1", f"#SBATCH -N1 {' '.join(WISH)}", 1).replace(
        "srun bash", "srun --het-group=0,1 bash"
    )
    het = het.replace("srun --het", f"#SBATCH hetjob\n#SBATCH -N1 -n1 {' '.join(WISH)}\nsrun --het", 1)
    job_id = reports.cluster.sbatch(het)
    assert reports.cluster.wait(job_id, 100) == "COMPLETED"
    for part in (0, 1):
        reports.told(job_id + part, 1)
        document = reports.document(f"{job_id}+{part}")
        assert document["job"] == job_id + part
        assert document["wall_s"] == reports.elapsed_s(f"{job_id}+{part}")
        (start,) = document["starts"]
        assert sum(start["stages"].values()) + start["after_s"] == pytest.approx(document["wall_s"], abs=1)


def test_each_run_of_a_requeued_job_adds_up_to_its_own_wall_time(reports: Reports) -> None:
    cluster = reports.cluster
    flag = cluster.shared / "home/alice/report/first"
    flag.unlink(missing_ok=True)
    script = JOB + f'[ "$SLURM_RESTART_COUNT" = 1 ] || {{ touch {HOME}/first; sleep 60; }}\n'
    job_id = cluster.sbatch(script, "--requeue", *WISH)
    deadline = time.monotonic() + 60
    while not flag.exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert cluster.exec("login", "scontrol", "requeue", str(job_id)).returncode == 0
    while cluster.exec("login", "squeue", "-hj", str(job_id), "-o", "%T").stdout.strip() == "RUNNING":
        time.sleep(0.2)
    cluster.exec("login", "scontrol", "update", f"JobId={job_id}", "StartTime=now+2")
    assert cluster.wait(job_id, 200) == "COMPLETED"
    reports.told(job_id, 3)
    folder = cluster.shared / f"bootseer/users/20001/events/{job_id}.1"
    while sum('"session","name":"end"' in path.read_text() for path in folder.glob("*.jsonl")) < 3:
        assert time.monotonic() < deadline + 200
        time.sleep(0.2)
    done = cluster.exec("login", "sacct", "-nPXD", "-j", str(job_id), "-o", "ElapsedRaw")
    for restart, elapsed in enumerate(done.stdout.split()):
        document = json.loads(reports.report(job_id, "--format", "json", "--restart", str(restart)))
        assert (document["restart"], document["restarts"]) == (restart, [0, 1])
        assert len(document["starts"]) == 3
        for start in document["starts"]:
            assert sum(start["stages"].values()) + start["after_s"] == pytest.approx(int(elapsed), abs=1)
            assert start["stages"]["allocation"] < 3, "from this run's own allocation on"


def test_where_the_site_observes_all_a_job_that_did_not_ask_has_a_report(reports: Reports) -> None:
    cluster = reports.cluster
    config = cluster.state_dir / "etc" / "bootseer" / "bootseer.toml"
    before = config.read_text()
    config.write_text(f'{before}\n[report]\nobserve = "all"\n')
    try:
        for action in ("stop", "start"):
            for node in cluster.nodes:
                cluster.agent(node, action)
        plain = reports.run()
        # A job that asks for more in a step still gets it.
        step = JOB.replace("srun bash", f"srun {' '.join(WISH)} bash")
        asked = reports.run(script=step)
    finally:
        config.write_text(before)
        for action in ("stop", "start"):
            for node in cluster.nodes:
                cluster.agent(node, action)
    reports.told(plain, 3)
    document = reports.document(plain)
    assert document["mode"] == "observe"
    assert set(document["starts"][0]["stages"]) == {"allocation", "prolog", "launch", "program"}
    assert_adds_up(reports, plain, document)
    reports.told(asked, 3)
    assert reports.document(asked)["mode"] == "prefetch"
    assert "checkpoint" in {row["what"] for row in reports.document(asked)["transfers"]}
    after = reports.run()
    assert not (cluster.shared / f"bootseer/users/20001/events/{after}.0").exists(), "asked for no more"


def test_every_format_is_written_to_its_file(reports: Reports) -> None:
    job_id = reports.run(*WISH)
    reports.told(job_id, 3)
    for name, begin in (
        ("json", b"{"),
        ("csv", b"job,"),
        ("parquet", b"PAR1"),
        ("html", b"<!DOCTYPE"),
        ("perfetto", b"{"),
    ):
        reports.report(job_id, "--format", name, "--output", f"{HOME}/out.{name}")
        content = (reports.cluster.shared / "home/alice/report" / f"out.{name}").read_bytes()
        assert content.startswith(begin)
