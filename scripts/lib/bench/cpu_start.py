"""One start of `bench cpu` on a cold node, and whose CPU time it took."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import resource
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from scripts.lib.bench.cpu_account import account, below, growth
from scripts.lib.bench.cpu_arms import AS_ALICE, IMPORTER, Arm
from scripts.lib.bench.image_arms import HERE, NODE, ROOT, make_cold
from scripts.lib.bench.image_ours import BIN, RUNTIME
from scripts.lib.bench.told import events_of, hook_environ
from scripts.lib.cluster import namespaces
from scripts.lib.cluster.client import ALICE, HOOK, Cluster
from scripts.lib.cluster.layout import ClusterError, Layout, State, live, poll

PATIENCE_S = 120.0
COMMANDS, JOB = "commands", "the job, in the kernel"
CLIENT, AGENT, USER, SQUASHFUSE = "sshfs", "agent", "user's process", "squashfuse"
_TOUCHED_BYTES = 8 * 2**30
PREFETCHED = '"kind":"prefetch","name":"end"'


@dataclass(frozen=True)
class Start:
    """cpu_s: by group. read_bytes: that the job read. store_bytes: that the store server sent meanwhile."""

    cpu_s: dict[str, float]
    read_bytes: int
    files: int
    store_bytes: int
    sha256: str

    @property
    def total_s(self) -> float:
        """The node's CPU seconds for the bytes, without commands: a start needs these, whatever it reads."""
        return sum(used_s for name, used_s in self.cpu_s.items() if name != COMMANDS)


class ClusterNode:
    """The one node of a cluster, and the processes on it."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.state: State = live(Layout(cluster.state_dir))
        self.init = self.state.init(NODE)
        self._commands_s = 0.0

    def groups(self, job: int) -> dict[str, Iterable[int]]:
        """The processes whose time counts. job: the one under which a job runs, 0 without one."""
        agents = below(self._pid("agent"))
        users = [each.pid for each in agents if _uid(each.pid) == ALICE]
        found = [each.pid for each in below(job) if _name(each.pid) == "squashfuse"] if job else []
        return {
            CLIENT: [self._pid("sshfs")],
            AGENT: [each.pid for each in agents if each.pid not in users],
            USER: users,
            SQUASHFUSE: found,
        }

    def _pid(self, name: str) -> int:
        process = self.state.process(NODE, name)
        if process is None or not process.alive:
            raise ClusterError(f"no {name} runs on {NODE}")
        return process.pid

    def run(self, *argv: str, alice: bool = False, env: Mapping[str, str] | None = None) -> str:
        """A command's output, as root or alice; its time is the commands'. Raises ClusterError."""
        rights = AS_ALICE if alice else ()
        words = [f"{name}={value}" for name, value in (env or {}).items()]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        output = namespaces.run(self.init, [*rights, "env", *words, *argv])
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._commands_s += after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return output

    def hook(self, arm: Arm, context: str) -> None:
        """As slurmd calls it."""
        if arm.job:
            environ = hook_environ(arm.job, f"bench-cpu {arm.path}", **arm.wishes)
            self.run(HOOK, env=environ | {"SLURM_SCRIPT_CONTEXT": context})

    def start(self, arm: Arm, *, learn: bool) -> Start:
        """One start. learn: it says that it trains, so that it is recorded. Raises ClusterError."""
        make_cold(self.cluster, empty=True)
        self.state = live(Layout(self.cluster.state_dir))
        self.run("bash", "-c", f"mkdir -p {ROOT} && chown {ALICE}:{ALICE} {ROOT}; {_WARM}")
        _read_on_the_server(self.cluster)
        _touch_memory()
        self._commands_s = 0.0
        before, sent_bytes = account(self.groups(0)), self.cluster.store_sent_bytes
        image = self._begin(arm)
        step = {"SLURM_JOB_ID": str(arm.job), "SLURM_STEP_ID": "0"}
        argv = [word.replace("{image}", image) for word in arm.enter]
        argv += ["/usr/bin/python3", str(HERE / "cpu_job.py"), arm.reads]
        command = namespaces.entering(self.init, argv, env=step if arm.job else {})
        pipe = subprocess.PIPE
        with subprocess.Popen(command, text=True, stdin=pipe, stdout=pipe, stderr=pipe) as job:
            told = _line(job)
            os.sync()  # what was written has its price too
            used_s = growth(before, account(self.groups(job.pid)))
            sent_bytes = self.cluster.store_sent_bytes - sent_bytes
            used_s |= {COMMANDS: self._commands_s, JOB: told["system_s"]}
            if learn and arm.job:
                self.run(str(BIN / "bootseer"), "mark", "training_started", alice=True, env=step)
            sha256 = json.loads(job.communicate("\n")[0] or '{"sha256": ""}')["sha256"]
        self._end(arm)
        if told["filesystem"] != arm.filesystem and (arm.filesystem or told["filesystem"].startswith("fuse")):
            raise ClusterError(f"{arm.name}: the job read from {told['filesystem']}, not {arm.filesystem}")
        return Start(used_s, told["bytes"], told["files"], sent_bytes, sha256)

    def _begin(self, arm: Arm) -> str:
        """Do the work before the job; gives the image's path where one is asked for."""
        self.hook(arm, "prolog_slurmd")
        if arm.before:
            self.run(*arm.before)
        if arm.brought:
            events = Path(f"/proc/{self.init}/root/run/bootseer/events/{arm.job}.0")
            if not poll(lambda: events.exists() and PREFETCHED in events.read_text(), PATIENCE_S):
                raise ClusterError(f"{arm.name}: not prefetched in {PATIENCE_S:g} s")
        return self._importer(arm, "get", arm.get).strip().rpartition("\n")[2] if arm.get else ""

    def _end(self, arm: Arm) -> None:
        if arm.after:
            self.run(*arm.after)
        if arm.get:
            self._importer(arm, "release")
        self.hook(arm, "epilog_slurmd")
        if arm.job:
            events_of(self.cluster, arm.job)

    def _importer(self, arm: Arm, *words: str) -> str:
        """As pyxis calls it."""
        env = {"SLURM_JOB_ID": str(arm.job), "SLURM_STEP_ID": "0", "SLURM_JOB_UID": str(ALICE)}
        return self.run(IMPORTER, *words, alice=True, env=env | {"PYXIS_RUNTIME_PATH": RUNTIME})


# What the commands need from the node's disk is read once, and not counted.
_WARM = "{ setpriv --version; squashfuse --help; mount --version; bootseer --help; unshare --version; } "
_WARM = _WARM.replace("bootseer", str(BIN / "bootseer")) + ">/dev/null 2>&1 || true"


def _read_on_the_server(cluster: Cluster) -> None:
    """Its disk is not what is measured."""
    places = [str(cluster.shared / place) for place in ("home/alice/bench-cpu", "bootseer")]
    subprocess.run(["grep", "-rqsa", "no such text in here", *places], check=False)


def _touch_memory() -> None:
    """Have free memory that was used a moment ago.

    A virtual machine may hand its free pages back to its host, and pays more for the first use of each than
    for a copy. This does not undo it all: pages go back within seconds.
    """
    size_bytes = min(_TOUCHED_BYTES, psutil.virtual_memory().available // 2)
    mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE).close()


def _line(job: subprocess.Popen[str]) -> dict[str, Any]:
    """The job's line when it has read all. Raises ClusterError."""
    assert job.stdout is not None and job.stderr is not None
    line = job.stdout.readline()
    if not line:
        raise ClusterError(f"the job failed: {job.stderr.read()[-2000:]}")
    told: dict[str, Any] = json.loads(line)
    return told


def _uid(pid: int) -> int:
    with contextlib.suppress(OSError):
        return os.stat(f"/proc/{pid}").st_uid
    return -1


def _name(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/comm").read_text().strip()
    return ""
