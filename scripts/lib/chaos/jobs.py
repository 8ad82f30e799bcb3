"""Random jobs: what each asks for, how it is disturbed, and what its tasks read."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib.chaos.inputs import NAMES, Inputs
from scripts.lib.cluster.client import BOOTSEER, Cluster
from scripts.lib.cluster.layout import ClusterError
from scripts.lib.cluster.settings import USERS

READER = Path(__file__).with_name("read_inputs.py")
OPTIONS = {"image": "--bootseer-image", "env": "--bootseer-env", "checkpoint": "--bootseer-checkpoint"}
IN_FLIGHT = 5
# What becomes of a job: it runs to its end, fails by itself, or is disturbed.
RUNS, FAILS, CANCELLED, REQUEUED = "runs", "fails", "cancelled", "requeued"
FATES = {RUNS: 12, FAILS: 1, CANCELLED: 2, REQUEUED: 2}
# Sooner, and slurmd refuses the job: its earlier credential was revoked in the same second.
REQUEUED_START = "StartTime=now+5seconds"
# Seconds before the step, and in it behind each MiB: faults shall meet starts at each of their stages.
DELAYS_S, PAUSES_S = (0, 0, 1, 4), (0, 0, 0.02, 0.1)
SCRIPT = """\
#!/bin/bash
sleep {delay_s}
LAUNCHED="$(date +%s.%N)" srun --quiet {srun} /usr/bin/python3 -IS {reader} {results} {pause_s} {inputs}
status=$?
{mark}
exit {status}
"""


@dataclass
class Job:
    """One job: what it asks for and what was seen of it. state: of accounting, "" while it is not over."""

    user: str
    nodes: int
    asked: str
    script: str
    options: list[str]
    fate: str
    id: int = 0
    state: str = ""


@dataclass(frozen=True)
class TaskResult:
    """What one task of a job read (read_inputs.py). begun: when its step was launched."""

    job_id: int
    node: str
    begun: float
    ended: float
    digests: dict[str, str]
    errors: dict[str, str]
    shadows: list[str]
    bytes: int


@dataclass
class Jobs:
    """The jobs of one run; `submit_until` runs in a thread of its own."""

    cluster: Cluster
    inputs: Inputs
    results: Path
    chance: random.Random
    all: list[Job] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    hastened: set[str] = field(default_factory=set)

    def submit_until_over(self) -> None:
        """Submit jobs, a few in flight, until `over` is set."""
        while not self.over.is_set():
            if len(self._queued()) < IN_FLIGHT:
                self.submit(self.draw())
            self.over.wait(self.chance.uniform(0.1, 1.0))

    def draw(self) -> Job:
        """A random job that is not submitted yet."""
        user = self.chance.choice(list(USERS))
        names = self.chance.sample(NAMES, self.chance.randint(1, len(NAMES)))
        forms = {
            "plain": [],
            "observe": ["--bootseer=observe"],
            "bare": ["--bootseer"],
            "options": ["--bootseer", *(f"{OPTIONS[each]}={self.inputs.path(user, each)}" for each in names)],
            "absent": ["--bootseer", f"--bootseer-image=/shared/home/{user}/chaos/absent.sqsh"],
        }
        asked = self.chance.choices(list(forms), weights=[1, 1, 4, 8, 1])[0]
        fate = self.chance.choices(list(FATES), weights=list(FATES.values()))[0]
        nodes = self.chance.randint(1, self.cluster.node_count)
        in_step = asked in ("bare", "options") and self.chance.random() < 0.2
        marks = self.chance.random() < 0.7
        script = SCRIPT.format(
            delay_s=self.chance.choice(DELAYS_S),
            pause_s=self.chance.choice(PAUSES_S),
            srun=" ".join(forms[asked]) if in_step else "",
            reader=READER,
            results=self.results,
            inputs=" ".join(f"{each}={self.inputs.path(user, each)}" for each in names),
            mark=f"{BOOTSEER} mark training_started 2> /dev/null" if marks else "",
            status="3" if fate == FAILS else "$status",
        )
        # Few names, so that starts of one class learn from one another.
        name = f"chaos-{'-'.join(sorted(names))}"
        options = [f"--nodes={nodes}", "--ntasks-per-node=1", f"--job-name={name}", "--output=/dev/null"]
        options += ["--time=10", "--mem-per-cpu=50"]
        return Job(user, nodes, asked, script, options + ([] if in_step else forms[asked]), fate)

    def submit(self, job: Job) -> None:
        """Submit it, and disturb it later as its fate says."""
        job.id = self.cluster.sbatch(job.script, *job.options, user=job.user)
        self.all.append(job)
        if job.fate in (CANCELLED, REQUEUED):
            threading.Timer(self.chance.uniform(0.2, 4.0), self._disturb, [job]).start()

    def _disturb(self, job: Job) -> None:
        verb = ["scancel"] if job.fate == CANCELLED else ["scontrol", "requeue"]
        self.cluster.exec("login", *verb, str(job.id))  # it may be over

    def _queued(self) -> list[str]:
        """The lines of squeue. A job that was requeued waits for two minutes in Slurm, and less here."""
        lines = self.cluster.run("login", "squeue", "--noheader", "--format=%A %T %r").splitlines()
        for job_id, _, reason in (line.split(None, 2) for line in lines):
            if reason == "BeginTime" and job_id not in self.hastened:
                self.hastened.add(job_id)
                self.cluster.exec("login", "scontrol", "update", f"JobId={job_id}", REQUEUED_START)
        return lines

    def wait_until_all_ended(self, timeout_s: float) -> list[str]:
        """Wait, and note each job's state; the lines of squeue that are left after that time."""
        deadline = time.monotonic() + timeout_s
        while (left := self._queued()) and time.monotonic() < deadline:
            time.sleep(0.5)
        if not left:
            for job in self.all:
                try:
                    job.state = self.cluster.wait(job.id, timeout_s=30)
                except ClusterError:
                    left.append(f"{job.id} has no end in accounting")
        return left

    def task_results(self) -> Iterator[TaskResult]:
        """What the tasks wrote."""
        for path in self.results.glob("*.json"):
            yield TaskResult(int(path.name.partition(".")[0]), **json.loads(path.read_text()))
