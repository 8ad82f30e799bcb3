"""Bare `--bootseer`: what the last start of a class named is brought and shown as if it had been named now.

Each fault is a job that starts as without Bootseer, with the right bytes.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.lib.cluster.client import BOOTSEER, Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(240)]

MODEL_BYTES = 8_000_000
OLD = 1_700_000_000
MARK = f"{BOOTSEER} mark training_started 2>/dev/null"


class Class:
    """The starts of one job class of alice's, each on one node, n1, that has nothing in its cache."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.cluster = cluster
        self.name = name
        self.home = f"/shared/home/alice/{name}"  # no two tests have a path in common

    def submit(self, script: str, *options: str) -> int:
        """Submit `script`, which says what it saw."""
        text = f"#!/bin/bash\n#SBATCH -w n1 -J {self.name} -o {self.home}/%j.out\n{script}\n"
        return self.cluster.sbatch(text, "--bootseer", *options)

    def output(self, job_id: int) -> list[str]:
        """The lines of a job that must have ended well."""
        state = self.cluster.wait(job_id, 100)
        output = self.path(f"{job_id}.out").read_text()
        assert state == "COMPLETED", output
        return output.splitlines()

    def run(self, script: str, *options: str) -> tuple[list[str], list[dict[str, object]]]:
        """Submit and wait; the lines, and the events of n1."""
        self.cluster.script("drop-caches", "--bootseer")
        job_id = self.submit(script, *options)
        return self.output(job_id), self.events(job_id)

    def path(self, name: str) -> Path:
        """A file of the class's folder, as this machine has it."""
        return self.cluster.shared / self.home.removeprefix("/shared/") / name

    def look(self, name: str) -> str:
        """A script that says what it reads at a path, and how many mounts it sees there."""
        path = f"{self.home}/{name}"
        seen = f'echo "$(sha256sum < {path} | cut -c1-64) $(grep -c " {path} " /proc/self/mountinfo)"'
        return f"sleep 1\nsrun bash -c '{seen}; {MARK}'"

    def events(self, job_id: int) -> list[dict[str, object]]:
        path = self.cluster.shared / f"bootseer/users/20001/events/{job_id}.0/n1.jsonl"
        deadline = time.monotonic() + 30
        while not (path.exists() and '"kind":"session","name":"end"' in path.read_text()):
            assert time.monotonic() < deadline, f"{path} is not complete"
            time.sleep(0.2)
        return [json.loads(line) for line in path.read_text().splitlines()]

    def alice(self, command: str) -> str:
        """What a shell command of alice's prints."""
        done = self.cluster.exec(
            "login", "bash", "-ec", f"cd {self.home}; {command}", user="alice", timeout_s=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def model(self, name: str = "model.bin") -> str:
        """Make a checkpoint that nobody changed lately; gives its digest."""
        make = (
            f"mkdir -p $(dirname {name}); head -c {MODEL_BYTES} /dev/urandom > {name}; touch -d @{OLD} {name}"
        )
        return self.alice(f"{make}; sha256sum < {name}").split()[0]


def fetched(events: list[dict[str, object]], what: str = "checkpoint") -> int:
    """Bytes that were brought of a kind, by prefetch and for readers."""
    rows = [event for event in events if event["kind"] == "access" and event["name"] == "summary"]
    sources = ("store_bytes", "origin_bytes", "peer_bytes")
    return sum(int(str(row[source])) for row in rows if row["what"] == what for source in sources)


def told(events: list[dict[str, object]], name: str) -> list[str]:
    """What the plan's events of a name say."""
    found = [event for event in events if (event["kind"], event["name"]) == ("plan", name)]
    return [str(event.get("message", event["target"])) for event in found]


def faults(events: list[dict[str, object]]) -> list[dict[str, object]]:
    return [event for event in events if event["kind"] == "fault"]


@pytest.fixture
def starts(cluster: Cluster, request: pytest.FixtureRequest) -> Iterator[Class]:
    """A class that no other test has, with a store and an empty folder."""
    assert cluster.exec("login", BOOTSEER, "store", "init").returncode == 0
    made = Class(cluster, f"t{hashlib.sha256(request.node.name.encode()).hexdigest()[:12]}")
    assert cluster.exec("login", "mkdir", made.home, user="alice").returncode == 0
    yield made
    cluster.exec("login", "rm", "-rf", made.home)
    cluster.agent("n1", "start")


def test_a_bare_start_is_shown_what_the_options_named(starts: Class) -> None:
    packages = "venv/lib/python3.11/site-packages"
    starts.alice(
        "python3 -m venv --without-pip venv; mkdir src; head -c 3000000 /dev/urandom > src/payload; "
        f"mkdir -p {packages}/toy-1.0.dist-info; echo 'Name: toy' > {packages}/toy-1.0.dist-info/METADATA; "
        "mksquashfs src img.sqsh -noappend -quiet -no-progress; "
        f"touch -d @{OLD} img.sqsh; {BOOTSEER} env save venv"
    )
    starts.model()
    script = f'sleep 1\nsrun bash -c \'cut -d" " -f5 /proc/self/mountinfo | grep ^{starts.home}/ | sort; '
    script += (
        f"cd {starts.home}; cat img.sqsh model.bin {packages}/toy-1.0.dist-info/METADATA | sha256sum; {MARK}'"
    )
    options = [f"--bootseer-{kind}={starts.home}/{name}" for kind, name in
               (("image", "img.sqsh"), ("env", "venv"), ("checkpoint", "model.bin"))]  # fmt: skip
    first, _ = starts.run(script, *options)
    spelled_out, with_options = starts.run(script, *options)
    bare, without = starts.run(script)
    third, _ = starts.run(script)
    assert first == spelled_out == bare == third
    assert first[:3] == [f"{starts.home}/img.sqsh", f"{starts.home}/model.bin", f"{starts.home}/venv"]
    for what in ("image", "environment", "checkpoint"):
        assert fetched(without, what) == fetched(with_options, what), what
    assert sorted(told(without, "learned")) == first[:3]
    assert faults(without) == []


def test_what_an_srun_line_named_is_shown_to_a_bare_one(starts: Class) -> None:
    digest = starts.model()
    named = starts.look("model.bin").replace("srun ", f"srun --bootseer-checkpoint={starts.home}/model.bin ")
    assert starts.run(named)[0] == [f"{digest} 1"]
    assert starts.run(starts.look("model.bin"))[0] == [f"{digest} 1"]


def test_a_learned_file_that_is_gone(starts: Class) -> None:
    starts.model()
    starts.run(starts.look("model.bin"), f"--bootseer-checkpoint={starts.home}/model.bin")
    starts.alice("rm model.bin")
    lines, events = starts.run(f"sleep 1\nsrun bash -c '[ -e {starts.home}/model.bin ] || echo gone; {MARK}'")
    assert lines == ["gone"]
    assert "No such file" in told(events, "not_used")[0] and faults(events) == []
    digest = starts.model()
    assert starts.run(starts.look("model.bin"))[0] == [f"{digest} 0"], "it is forgotten"


def test_a_learned_file_that_grew(starts: Class) -> None:
    starts.model()
    starts.alice(f"{BOOTSEER} checkpoint stripe model.bin")
    starts.run(starts.look("model.bin"), f"--bootseer-checkpoint={starts.home}/model.bin")
    digest = starts.alice("echo more >> model.bin; sha256sum < model.bin").split()[0]
    time.sleep(2.5)  # sshfs keeps what it knows of a file for a second or two
    lines, events = starts.run(starts.look("model.bin"))
    assert lines == [f"{digest} 1"], "it is read as it lies"
    assert "was changed" in str(faults(events)[0]["message"])


def test_a_learned_file_that_belongs_to_another_user_now(starts: Class) -> None:
    digest = starts.model()
    starts.run(starts.look("model.bin"), f"--bootseer-checkpoint={starts.home}/model.bin")
    starts.cluster.exec("login", "chown", "bob:", f"{starts.home}/model.bin")
    starts.cluster.exec("login", "chmod", "644", f"{starts.home}/model.bin")
    time.sleep(2.5)
    lines, events = starts.run(starts.look("model.bin"))
    assert lines == [f"{digest} 0"]
    assert "belongs to user 20002" in told(events, "not_used")[0]
    assert fetched(events) == 0


def test_a_learned_file_that_is_not_below_the_roots_any_more(starts: Class) -> None:
    digest = starts.model()
    starts.run(starts.look("model.bin"), f"--bootseer-checkpoint={starts.home}/model.bin")
    config = starts.cluster.state_dir / "etc/bootseer/bootseer.toml"
    text = config.read_text()
    config.write_text(text.replace('roots = ["/shared"]', 'roots = ["/shared/elsewhere"]'))
    try:
        lines, events = starts.run(starts.look("model.bin"))  # which starts the agents anew
    finally:
        config.write_text(text)
        starts.cluster.script("drop-caches", "--bootseer")
    assert lines == [f"{digest} 0"]
    assert "not below" in told(events, "not_used")[0] and fetched(events) == 0


def test_two_jobs_of_one_class_at_once(starts: Class) -> None:
    digest = starts.model()
    starts.run(starts.look("model.bin"), f"--bootseer-checkpoint={starts.home}/model.bin")
    starts.cluster.script("drop-caches", "--bootseer")
    jobs = [starts.submit(starts.look("model.bin"), "--mem=100") for _ in range(2)]
    for job in jobs:
        assert starts.output(job) == [f"{digest} 1"]
    assert sum(fetched(starts.events(job)) for job in jobs) <= 2 * MODEL_BYTES
    assert starts.run(starts.look("model.bin"))[0] == [f"{digest} 1"], "the class is still known"


def test_a_first_start_that_is_cancelled_half_way(starts: Class) -> None:
    digest = starts.model()
    job = starts.submit(
        f"touch {starts.home}/begun; sleep 60", f"--bootseer-checkpoint={starts.home}/model.bin"
    )
    deadline = time.monotonic() + 30
    while not starts.path("begun").exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    starts.cluster.exec("login", "scancel", str(job))
    starts.events(job)
    lines, events = starts.run(starts.look("model.bin"))
    assert lines == [f"{digest} 1"], "what it had not come to read is brought all the same"
    assert fetched(events) == MODEL_BYTES and faults(events) == []


def test_of_a_learned_checkpoint_the_newest_step_is_brought(starts: Class) -> None:
    starts.model("ckpt/step_1.bin")
    newest = "file=$(ls -v {home}/ckpt/step_*.bin | tail -1); sha256sum < $file | cut -c1-64; "
    newest += 'grep -c " $file " /proc/self/mountinfo || true; '
    script = f"sleep 1\nsrun bash -c '{newest.format(home=starts.home)} {MARK}'"
    starts.run(script, f"--bootseer-checkpoint={starts.home}/ckpt/step_1.bin")
    digest = starts.model("ckpt/step_2.bin")
    lines, events = starts.run(script)
    assert lines == [digest, "1"]
    assert "step_2.bin" in told(events, "located")[0] and fetched(events) == MODEL_BYTES
    starts.alice("rm ckpt/step_1.bin")
    digest = starts.model("ckpt/step_3.bin")
    assert starts.run(script)[0] == [digest, "1"], "the one that was named first is gone"


def test_what_the_last_start_did_not_read_is_not_brought_again(starts: Class) -> None:
    digest = starts.model()
    starts.cluster.script("link", "n1", "20mbit")  # a file that is all there is read unseen
    try:
        starts.run(f"srun bash -c '{MARK}'", f"--bootseer-checkpoint={starts.home}/model.bin")
        lines, events = starts.run("sleep 3")
        assert fetched(events) == 0
        assert "did not read it" in told(events, "unread")[0]
        lines, events = starts.run(starts.look("model.bin"))
        assert lines == [f"{digest} 1"], "it is shown, and comes when it is read"
        assert fetched(events) == MODEL_BYTES
    finally:
        starts.cluster.script("link", "n1", "1gbit")
    assert starts.run(starts.look("model.bin"))[0] == [f"{digest} 1"]
