"""`bootseer collect` with a real slurmdbd: AdminComment as sacct shows it, and who sees whose starts."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bootseer_slurm.slurm import jobs
from scripts.lib.cluster.client import BOOTSEER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(300), pytest.mark.usefixtures("slurm_conf")]

PYTHON = str(Path(BOOTSEER).with_name("python"))
# A job that ends sooner is called "allocation" in sacct for a while.
JOB = (
    f"#!/bin/bash\n#SBATCH -o /dev/null\nsrun bash -c 'sleep 1; {BOOTSEER} mark training_started'\nsleep 6\n"
)
HET = "#!/bin/bash\n#SBATCH -n1 -o /dev/null\n#SBATCH hetjob\n#SBATCH -n1\nsrun bash -c 'sleep 1; {} mark training_started'\nsleep 6\n"
REQUEUE = (
    '#!/bin/bash\n#SBATCH -o /dev/null --requeue\n[ "$SLURM_RESTART_COUNT" = 1 ] || sleep 600\n' + JOB[12:]
)
# What systemd does with bootseer-answer.socket.
LISTEN = """
import os, socket, subprocess, sys
listener = socket.socket(socket.AF_UNIX)
listener.bind("/run/bootseer-answer.sock")
os.chmod("/run/bootseer-answer.sock", 0o666)
listener.listen()
print("listens", flush=True)
while True:
    link, _ = listener.accept()
    subprocess.run([sys.argv[1], "answer"], stdin=link)
    link.close()
"""


@pytest.fixture
def service(cluster: Cluster) -> Iterator[None]:
    """The socket on the login node."""
    process = cluster.start("login", PYTHON, "-c", LISTEN, BOOTSEER)
    assert process.stdout is not None and process.stdout.readline() == "listens\n"
    yield
    process.kill()
    process.wait()
    cluster.exec("login", "rm", "-f", "/run/bootseer-answer.sock")


def run(cluster: Cluster, *command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
    done = cluster.exec("login", BOOTSEER, *command, user=user, timeout_s=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def comments(cluster: Cluster) -> dict[tuple[str, str], str]:
    """AdminComment of each run: (the id as shown, its state)."""
    done = cluster.exec("login", "sacct", "-nPXD", "-S", "now-1hour", "-a", "-o", "JobID,State,AdminComment")
    rows = [line.split("|", 2) for line in done.stdout.splitlines()]
    return {(job, state): comment for job, state, comment in rows}


def set_comment(cluster: Cluster, job: str, text: str) -> None:
    done = cluster.exec(
        "login", "sacctmgr", "-i", "modify", "job", "where", f"jobid={job}", "set", f"AdminComment={text}"
    )
    assert done.returncode == 0, done.stdout + done.stderr


def collected(cluster: Cluster, numbers: list[int]) -> None:
    """Run collect until it has the starts of these jobs, which have to be over for a while."""
    folder = "/var/lib/bootseer/records/done.sqlite"
    code = (
        f"import sqlite3; print(*[r[0] for r in sqlite3.connect('{folder}').execute('SELECT job FROM done')])"
    )
    deadline_s = time.monotonic() + 100
    while True:
        run(cluster, "collect")
        done = {int(job) for job in cluster.exec("login", PYTHON, "-c", code).stdout.split()}
        if set(numbers) <= done:
            return
        assert time.monotonic() < deadline_s, f"{numbers} are not all in {sorted(done)}"
        time.sleep(3)


def test_comments_of_all_kinds_of_jobs_and_who_sees_them(cluster: Cluster, service: None) -> None:
    run(cluster, "store", "init")
    plain = cluster.sbatch(JOB, "--bootseer=observe", "-N2")
    foreign = cluster.sbatch(JOB, "--bootseer=observe")
    array = cluster.sbatch(JOB, "--bootseer=observe", "--array=1-2", user="bob")
    het = cluster.sbatch(HET.format(BOOTSEER), "--bootseer=observe")
    again = cluster.sbatch(REQUEUE, "--bootseer=observe")
    for job in (plain, foreign, array, het):
        cluster.wait(job, 120)
    set_comment(cluster, str(foreign), "seen by bob")
    assert cluster.exec("login", "scontrol", "requeue", str(again)).returncode == 0
    cluster.exec("login", "scontrol", "update", f"job={again}", "starttime=now+2")
    cluster.wait(again, 180)

    numbers = [record.job for job in (plain, foreign, array, again) for record in jobs.records(str(job))]
    collected(cluster, [*numbers, het])
    found = comments(cluster)
    ours = {
        job: text
        for (job, state), text in found.items()
        if text.startswith("bootseer: ") and state == "COMPLETED"
    }
    for job in (str(plain), f"{array}_1", f"{array}_2", f"{het}+0", str(again)):
        assert ours[job].startswith("bootseer: start ") and " cpu-min, " in ours[job], found
    assert found[str(foreign), "COMPLETED"] == "seen by bob"
    assert found[str(again), "REQUEUED"] == ""
    (record,) = jobs.records(str(plain))
    assert record.start_ns is not None and record.end_ns is not None
    assert f" of {(record.end_ns - record.start_ns) // 10**9}s," in ours[str(plain)]

    assert "starts added: 0" in run(cluster, "collect").stdout
    assert comments(cluster) == found

    def seen(user: str | None) -> dict[str, Any]:
        return dict(
            json.loads(run(cluster, "overhead", "--since", "1h", "--format", "json", user=user).stdout)
        )

    everything = seen(None)
    assert everything["total"]["starts"] >= 7 and everything["device"] == "cpu"
    assert {group["name"] for group in everything["groups"]} == {"alice", "bob"}
    assert {group["name"] for group in seen("bob")["groups"]} == {"bob"}
    refused = cluster.exec("login", BOOTSEER, "report", str(plain), user="bob")
    assert refused.returncode == 2 and "another user's" in refused.stderr
    assert (
        cluster.exec(
            "login", "sacctmgr", "-i", "modify", "user", "bob", "set", "adminlevel=Operator"
        ).returncode
        == 0
    )
    try:
        assert seen("bob")["total"]["starts"] == everything["total"]["starts"]
        shown = json.loads(run(cluster, "report", str(plain), "--format", "json", user="bob").stdout)
        assert shown["user"] == "alice" and shown["start_to_training_s"] > 0
    finally:
        cluster.exec("login", "sacctmgr", "-i", "modify", "user", "bob", "set", "adminlevel=None")


def test_many_jobs_in_one_call_are_the_same_rows_as_one_by_one(cluster: Cluster) -> None:
    array = cluster.sbatch("#!/bin/bash\nsleep 6\n", "--array=1-3")
    single = cluster.sbatch("#!/bin/bash\nsrun sleep 6\n", "-N2")
    for job in (array, single):
        cluster.wait(job)
    one_by_one = [*jobs.records(str(array)), *jobs.records(str(single))]
    together = jobs.records_of([record.job for record in one_by_one] + [4_000_000])
    assert sorted(
        (record for runs in together.values() for record in runs), key=lambda each: each.job
    ) == sorted(one_by_one, key=lambda each: each.job)
    set_comment(cluster, f"{array}_2", "a | b")
    second = next(record.job for record in one_by_one if record.shown_id == f"{array}_2")
    found = jobs.admin_comments([record.job for record in one_by_one])
    assert {job: text for job, text in found.items() if text} == {second: "a | b"}


def test_a_comment_is_of_the_part_that_was_named(cluster: Cluster) -> None:
    """By its bare number, the last task of an array would stand for them all."""
    array = cluster.sbatch("#!/bin/bash\nsleep 6\n", "--array=1-2")
    het = cluster.sbatch("#!/bin/bash\n#SBATCH -n1\n#SBATCH hetjob\n#SBATCH -n1\nsleep 6\n")
    for job in (array, het):
        cluster.wait(job)
    for part in (f"{array}_1", f"{array}_2", f"{het}+1", f"{het}+0"):
        earlier = {job: text for (job, _), text in comments(cluster).items()}
        set_comment(cluster, part, f"of {part}")
        later = {job: text for (job, _), text in comments(cluster).items()}
        assert {job for job in earlier if later[job] != earlier[job]} == {part}
