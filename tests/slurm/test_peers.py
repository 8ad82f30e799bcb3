"""The nodes of a real job read about one copy from the store, and lose nothing where peers fail."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import pytest

from scripts.lib.cluster.client import ALICE, BOOTSEER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

HOME = "/shared/home/alice/peers"
SIZE_BYTES = 48_000_000
MAKE = f"""
set -e
mkdir -p {HOME}/src && cd {HOME}
head -c {SIZE_BYTES} /dev/urandom > model.bin
head -c 9000000 /dev/urandom > src/payload
mksquashfs src img.sqsh -noappend -quiet -no-progress >/dev/null
{BOOTSEER} image push img.sqsh
{BOOTSEER} checkpoint stripe model.bin --stripes 3
sha256sum img.sqsh model.bin | cut -c1-64
"""
JOB = textwrap.dedent(
    f"""\
    #!/bin/bash
    #SBATCH -N3 --ntasks-per-node=1 -o {HOME}/%j.out
    srun bash -c '
    # HERE
    sha256sum < {HOME}/img.sqsh | cut -c1-64
    sha256sum < {HOME}/model.bin | cut -c1-64
    {BOOTSEER} mark training_started 2>/dev/null'
    """
)
WISHES = ("--bootseer", f"--bootseer-image={HOME}/img.sqsh", f"--bootseer-checkpoint={HOME}/model.bin")
PROCESS = "[p]eers.child"  # not the command itself that looks for it


class Inputs:
    """alice's image and checkpoint, in the store of a site that has a key."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        assert cluster.exec("login", BOOTSEER, "store", "init").returncode == 0
        made = cluster.exec("login", "bash", "-c", MAKE, user="alice", timeout_s=120)
        assert made.returncode == 0, made.stderr
        self.digests = made.stdout.split()[-2:]
        self.jobs = 0

    def run(self, extra: str = "") -> int:
        """Run the job, which reads right bytes on each node. extra: what each task does before."""
        self.jobs += 1
        script = JOB.replace("# HERE", extra).replace("#SBATCH", f"#SBATCH -J peers{self.jobs}\n#SBATCH", 1)
        job_id = self.cluster.sbatch(script, *WISHES)
        state = self.cluster.wait(job_id, 150)
        output = (self.cluster.shared / "home/alice/peers" / f"{job_id}.out").read_text()
        assert state == "COMPLETED", output
        assert sorted(output.split()) == sorted(self.digests * 3), output
        return job_id

    def events(self, job_id: int) -> list[dict[str, Any]]:
        """All events of all nodes, once these have written them."""
        folder = self.cluster.shared / f"bootseer/users/{ALICE}/events/{job_id}.0"
        deadline = time.monotonic() + 30
        while True:
            lines = [line for path in folder.glob("*.jsonl") for line in path.read_text().splitlines()]
            events = [json.loads(line) for line in lines]
            if sum((each["kind"], each["name"]) == ("session", "end") for each in events) == 3:
                return events
            assert time.monotonic() < deadline, f"{folder} is not complete"
            time.sleep(0.2)


@pytest.fixture(scope="module")
def inputs(cluster: Cluster) -> Iterator[Inputs]:
    key = cluster.state_dir / "etc/bootseer/site.key"
    had_key = key.exists()
    if not had_key:
        cluster.run("login", BOOTSEER, "image", "make-key")
    yield Inputs(cluster)
    if not had_key:
        key.unlink()


def make_cold(cluster: Cluster) -> None:
    """Take the caches of all nodes away."""
    for node in cluster.nodes:
        cluster.agent(node, "stop")
        cluster.run(node, "rm", "-rf", "/var/lib/bootseer/cache")
        cluster.agent(node, "start")


@pytest.fixture(autouse=True)
def cold(cluster: Cluster) -> Iterator[None]:
    make_cold(cluster)
    yield
    for node in cluster.nodes:
        cluster.agent(node, "start")
        assert not cluster.exec(node, "pgrep", "-u", "alice", "-f", PROCESS).stdout, "a process is left"


def of_all(events: list[dict[str, Any]], kind: str, name: str, key: str) -> int:
    found = [each for each in events if (each["kind"], each["name"]) == (kind, name)]
    assert found
    return int(sum(each.get(key, 0) for each in found))


def test_the_nodes_of_a_job_read_about_one_copy(inputs: Inputs) -> None:
    events = inputs.events(inputs.run())
    store = of_all(events, "access", "summary", "store_bytes")
    peers = of_all(events, "access", "summary", "peer_bytes")
    whole = SIZE_BYTES + 9_000_000
    assert whole <= store <= 1.5 * whole
    assert peers >= 1.5 * whole
    assert not [each for each in events if each["kind"] == "fault"]


def test_a_user_who_stops_the_peer_processes_of_his_own_job_waits_for_the_store_only(inputs: Inputs) -> None:
    events = inputs.events(inputs.run(f"pkill -STOP -u alice -f {PROCESS}"))
    assert of_all(events, "access", "summary", "store_bytes") >= SIZE_BYTES


def test_a_user_cannot_trace_the_peer_process_of_his_own_job(inputs: Inputs, cluster: Cluster) -> None:
    trace = f"for pid in $(pgrep -u alice -f {PROCESS}); do cat /proc/$pid/environ /proc/$pid/maps 2>&1 | grep -q denied || exit 7; done"
    inputs.run(trace)


def test_an_agent_that_is_killed_brings_peers_back(inputs: Inputs, cluster: Cluster) -> None:
    script = JOB.replace("# HERE", "sleep 4").replace("#SBATCH", "#SBATCH -J peers-killed\n#SBATCH", 1)
    job_id = cluster.sbatch(script, *WISHES)
    deadline = time.monotonic() + 60
    while not cluster.exec(cluster.nodes[0], "pgrep", "-u", "alice", "-f", PROCESS).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    before = cluster.exec(cluster.nodes[0], "pgrep", "-u", "alice", "-f", PROCESS).stdout.split()
    cluster.agent(cluster.nodes[0], "crash")
    while True:
        now = cluster.exec(cluster.nodes[0], "pgrep", "-u", "alice", "-f", PROCESS).stdout.split()
        if now and set(now).isdisjoint(before):
            break
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
    assert cluster.wait(job_id, 120) == "COMPLETED"
    output = (cluster.shared / "home/alice/peers" / f"{job_id}.out").read_text()
    assert sorted(output.split()) == sorted(inputs.digests * 3), output
