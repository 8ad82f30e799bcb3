"""Where Slurm gives each job a mount namespace (job_container/tmpfs), its steps have their shadows there.

A cluster of its own, of one node; the agent is the stand-in of stand_in.py.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib.cluster.client import BOOTSEER, Cluster
from tests.slurm.conftest import no_cluster_because
from tests.slurm.stand_in import HOME, NODE, SOCKET, fake_agent, make, output, shown

pytestmark = pytest.mark.slurm

NAMESPACES = "grep -c ' - nsfs ' /proc/self/mountinfo"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """In the place of the session's: one node, with job_container/tmpfs."""
    if reason := no_cluster_because():
        pytest.skip(reason)
    instance = Cluster(Path(f"/var/tmp/bootseer-cluster-tmp-{os.getpid()}"), node_count=1)
    try:
        instance.script("up", "--nodes", "1", "--private-tmp", timeout_s=900)
        yield instance
    finally:
        instance.script("down")


def wait_idle(cluster: Cluster) -> None:
    """Nothing of a job may be left: Slurm has forgotten the namespace, and the node takes the next job."""
    deadline_s = time.monotonic() + 60
    while True:
        state = cluster.run("login", "sinfo", "-hNo", "%T").strip()
        held = cluster.exec(NODE, "sh", "-c", NAMESPACES).stdout.strip()
        if (state, held) == ("idle", "0"):
            return
        assert time.monotonic() < deadline_s, (state, held)
        time.sleep(0.2)


SCRIPT = """
echo of the job > /tmp/mine
echo batch: $(cat {target}) $BOOTSEER_GREETING
srun --ntasks=3 --overlap sh -c 'echo step: $(cat {target}) $BOOTSEER_GREETING, $(cat /tmp/mine)'
srun --ntasks=1 --no-bootseer sh -c 'echo refused: $(cat {target}), $(cat /tmp/mine)'
srun --ntasks=3 --overlap sh -c 'readlink /proc/self/ns/mnt; pwd' | sort -u
readlink /proc/self/ns/mnt
srun --ntasks=1 --no-bootseer readlink /proc/self/ns/mnt
"""


def test_shadow_in_the_namespace_of_the_job(cluster: Cluster, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    with fake_agent(cluster, "--bind", f"{blob}={target}", "--setenv", "BOOTSEER_GREETING=hello") as agent:
        text = output(cluster, SCRIPT.format(target=target), "--ntasks=3", f"--chdir={HOME}", "--bootseer")
        lines = text.splitlines()
        assert lines[:5] == ["batch: fast hello"] + ["step: fast hello, of the job"] * 3 + [
            "refused: slow, of the job"
        ]
        assert lines[5] == HOME  # Slurm's own way back to the job's folder
        # One namespace for the tasks of a step, and the job's own is left as it was.
        step, batch, job = lines[6:]
        assert len({step, batch, job}) == 3
        # One question for a step, however many tasks it has.
        assert [request["STEP_ID"] for request in agent.requests("attach", 3)] == ["batch", "0", "2"]
        assert not [stage for stage in agent.requests("stage", 7) if stage["NAME"] == "shadow_failed"]
    assert (folder / "target").read_text() == "slow"
    wait_idle(cluster)
    assert cluster.exec(NODE, "test", "-e", "/tmp/mine").returncode != 0


def test_srun_and_interactive_steps(cluster: Cluster, folder: Path) -> None:
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    with fake_agent(cluster, "--bind", f"{blob}={target}") as agent:
        done = cluster.exec("login", "srun", "-n2", "--bootseer", "cat", target, user="alice")
        assert (done.returncode, done.stdout) == (0, "fastfast"), done.stderr
        done = cluster.exec(
            "login", "salloc", "--bootseer", "srun", "--interactive", "cat", target, user="alice"
        )
        assert (done.returncode, done.stdout) == (0, "fast"), done.stderr
        assert [request["STEP_ID"] for request in agent.requests("attach", 2)] == ["0", "interactive"]
    wait_idle(cluster)


def test_what_only_the_job_sees_is_left_alone(cluster: Cluster, folder: Path) -> None:
    """The agent sees the node's /tmp, the job its own: a path there is another file, or none."""
    target, blob = make(folder / "target", "slow"), make(folder / "blob", "fast")
    in_tmp = f"/tmp/{folder.name}"
    cluster.run(NODE, "sh", "-c", f"echo of the node > {in_tmp}")
    try:
        with fake_agent(cluster, "--bind", f"{blob}={in_tmp}", "--bind", f"{blob}={target}") as agent:
            script = f"cat {in_tmp} {target}; echo of the job > {in_tmp}; srun cat {in_tmp} {target}"
            job_id = cluster.sbatch(script, "--output=out-%j", "--bootseer")
            cluster.wait(job_id)
            text = (cluster.shared / f"home/alice/out-{job_id}").read_text()
            assert text.endswith("fastof the job\nfast"), text
            failed = [each for each in agent.requests("stage", 4) if each["NAME"] == "shadow_failed"]
        assert [stage["DETAIL"] for stage in failed] == [
            f"{in_tmp}: opening the path: No such file or directory",
            f"{in_tmp}: another file is there than the agent saw",
        ]
    finally:
        cluster.exec(NODE, "rm", in_tmp)
        (cluster.shared / f"home/alice/out-{job_id}").unlink()
    wait_idle(cluster)


def test_a_hung_agent_and_none(cluster: Cluster) -> None:
    script = "echo here; srun --ntasks=2 --overcommit echo there"
    with fake_agent(cluster, "--hang"):
        assert output(cluster, script, "--bootseer") == "here\nthere\nthere\n"
    cluster.agent(NODE, "stop")
    assert cluster.exec(NODE, "test", "-e", SOCKET).returncode != 0
    assert output(cluster, script, "--bootseer") == "here\nthere\nthere\n"
    cluster.agent(NODE, "start")
    wait_idle(cluster)


def test_the_agent_serves_jobs_here_too(cluster: Cluster, folder: Path) -> None:
    """The real agent: a file at its own path, and one that has none by a variable."""
    content = "checkpoint " * 100_000
    path = make(folder / "step_1.pt", content)
    done = cluster.exec("login", BOOTSEER, "checkpoint", "stripe", path, f"file://{path}.s", user="alice")
    assert done.returncode == 0, done.stderr
    for checkpoint, read, mounts in [(path, path, "1"), (f"{path}.s", "$BOOTSEER_CHECKPOINT", "0")]:
        (folder / "job.sh").write_text(f"wc -c < {read}; grep -c {path} /proc/self/mountinfo; true\n")
        script = f"sh {shown(folder / 'job.sh')}; srun --ntasks=2 sh {shown(folder / 'job.sh')}"
        lines = output(cluster, script, "--ntasks=2", f"--bootseer-checkpoint={checkpoint}").split()
        assert sorted(lines) == sorted([str(len(content)), mounts] * 3)
    shutil.rmtree(folder / "step_1.pt.s")
    wait_idle(cluster)


def test_doctor_knows(cluster: Cluster) -> None:
    text = cluster.run(NODE, "env", "COLUMNS=300", BOOTSEER, "doctor")
    (line,) = [line for line in text.splitlines() if line.startswith("namespace of a job")]
    assert "yes" in line
    assert "job_container/tmpfs: each step is shown its files in a copy of it" in line
