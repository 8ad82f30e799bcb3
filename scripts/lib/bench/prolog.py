"""The cost of the prolog: the hook, in each state of the agent, and --bootseer in a trivial job."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import ALICE, BOOTSEER, HOOK, Cluster
from scripts.lib.cluster.layout import ClusterError

HOOK_TARGET_S = 0.150
ADDED_TARGET_S = 0.200
ROUNDS = 41
JOB_ROUNDS = 21
TIMING = str(Path(__file__).with_name("timing.py"))
FILLER = str(Path(__file__).with_name("flood.py"))
FOLDER = "/shared/home/alice/bench"
MAKE_INPUTS = f"""
set -e
[ -e {FOLDER}/model.bin ] && exit
mkdir -p {FOLDER}/src && cd {FOLDER}
head -c 1000000 /dev/urandom > src/payload
mksquashfs src image.sqsh -noappend -quiet -no-progress > /dev/null
python3 -m venv --without-pip venv
mkdir -p "$(echo venv/lib/python3*)/site-packages/toy-1.0.dist-info"
{BOOTSEER} image push image.sqsh
{BOOTSEER} env save venv
head -c 1000000 /dev/urandom > model.new
mv model.new model.bin
{BOOTSEER} checkpoint stripe model.bin
"""
WISHES = {
    "IMAGE": f"{FOLDER}/image.sqsh",
    "ENV": f"{FOLDER}/venv",
    "CHECKPOINT": f"{FOLDER}/model.bin",
}


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up. Leaves the agents well."""
    make_inputs(cluster)
    return [*hook_rows(cluster), *job_rows(cluster)]


def make_inputs(cluster: Cluster) -> None:
    """A small image, environment and checkpoint of alice's, in the store."""
    cluster.exec("login", BOOTSEER, "store", "init")
    done = cluster.exec("login", "bash", "-c", MAKE_INPUTS, user="alice", timeout_s=120)
    if done.returncode != 0:
        raise ClusterError(f"the inputs cannot be made: {done.stderr}")


def hook_rows(cluster: Cluster) -> list[Row]:
    """The hook's own time on node n1, in each state of its agent."""
    limit_s = median(
        time_in(cluster, "n1", {"python": [{"argv": ["/usr/bin/python3", "-IS", "-c", ""]}]})["python"]
    )
    states = {
        "without --bootseer": (nothing, {}),
        "agent well": (nothing, WISHES),
        "agent absent": (absent, WISHES),
        "agent hung": (hung, WISHES),
        "agent hung, its backlog full": (backlog_full, WISHES),
        "agent flooded with requests": (flooded, WISHES),
        "agent flooded with connections": (flooded_with_connections, WISHES),
    }
    rows = []
    for number, (state, (prepare, wishes)) in enumerate(states.items()):
        with prepare(cluster):
            seconds = time_in(cluster, "n1", {state: hook_parts(wishes)}, first_round=900_000 + number * 1000)
        how = f"prolog.d/50-bootseer, median of {ROUNDS} runs on a node; limit: python3 -IS -c ''"
        rows.append(Row(f"hook, {state}", median(seconds[state]), "s", HOOK_TARGET_S, limit_s, how))
    return rows


def hook_parts(wishes: dict[str, str]) -> list[dict[str, object]]:
    """A prolog as slurmd calls it, which is timed, and the epilog of the same job."""
    env = {
        "SLURM_JOB_ID": "{round}",
        "SLURM_JOB_UID": str(ALICE),
        "SLURM_JOB_GID": str(ALICE),
        "SLURM_JOB_USER": "alice",
        "SLURM_NODELIST": "n1",
        "SLURMD_NODENAME": "n1",
        "SLURM_JOB_PARTITION": "main",
        "SLURM_JOB_RESTART_COUNT": "0",
    }
    asked = {"SPANK_BOOTSEER_MODE": "1"} if wishes else {}
    asked |= {f"SPANK_BOOTSEER_{key}": value for key, value in wishes.items()}
    return [
        {"argv": [HOOK], "env": env | asked | {"SLURM_SCRIPT_CONTEXT": "prolog_slurmd"}},
        {"argv": [HOOK], "env": env | {"SLURM_SCRIPT_CONTEXT": "epilog_slurmd"}, "timed": False},
    ]


def job_rows(cluster: Cluster) -> list[Row]:
    """The time that --bootseer adds to `srun true`, against the same without it."""
    srun = ["srun", "--quiet", "-w", "n1"]
    options = [f"--bootseer-{key.lower()}={value}" for key, value in WISHES.items()]
    arms = {
        "plain": [{"argv": [*srun, "true"]}],
        "plain again": [{"argv": [*srun, "true"]}],
        "bare": [{"argv": [*srun, "--bootseer", "true"]}],
        "three": [{"argv": [*srun, "--bootseer", *options, "true"]}],
    }
    seconds = time_in(cluster, "login", arms, user="alice", rounds=JOB_ROUNDS)
    plain_s = median(seconds["plain"])
    noise_s = abs(median(seconds["plain again"]) - plain_s)
    how = f"srun true on one node, {JOB_ROUNDS} interleaved runs an arm, data on the node; "
    how += f"plain {plain_s:.3f} s; limit: a second plain arm against the first"
    return [
        Row(f"added by {name}", median(seconds[arm]) - plain_s, "s", ADDED_TARGET_S, noise_s, how)
        for arm, name in (("bare", "--bootseer"), ("three", "--bootseer with image, environment, checkpoint"))
    ]


def time_in(
    cluster: Cluster,
    node: str,
    commands: Mapping[str, Sequence[Mapping[str, object]]],
    *,
    user: str | None = None,
    rounds: int = ROUNDS,
    first_round: int = 1,
) -> dict[str, list[float]]:
    """Seconds of each run of each command (timing.py). Raises ClusterError when one fails."""
    plan = {"rounds": rounds, "pause_s": 0.1, "first_round": first_round, "commands": commands}
    done = cluster.exec(
        node, "/usr/bin/python3", TIMING, user=user, input_text=json.dumps(plan), timeout_s=600
    )
    if done.returncode != 0:
        raise ClusterError(f"cannot be timed: {done.stderr}")
    seconds: dict[str, list[float]] = json.loads(done.stdout)
    return seconds


@contextmanager
def nothing(cluster: Cluster) -> Iterator[None]:
    """The agent as it is: well."""
    yield


@contextmanager
def absent(cluster: Cluster) -> Iterator[None]:
    """No agent runs."""
    cluster.agent("n1", "stop")
    try:
        yield
    finally:
        cluster.agent("n1", "start")


@contextmanager
def hung(cluster: Cluster) -> Iterator[None]:
    """The agent's process is stopped; the kernel still takes connections for it."""
    cluster.agent("n1", "hang")
    try:
        yield
    finally:
        cluster.agent("n1", "start")


@contextmanager
def backlog_full(cluster: Cluster) -> Iterator[None]:
    """Stopped, and so many connections wait that the kernel takes no more."""
    with hung(cluster), flood(cluster, "hold"):
        yield


@contextmanager
def flooded(cluster: Cluster) -> Iterator[None]:
    """Well, with other clients asking all the time."""
    with flood(cluster, "ask"):
        yield


@contextmanager
def flooded_with_connections(cluster: Cluster) -> Iterator[None]:
    """Well, with a user who connects all the time."""
    with flood(cluster, "connect", user="alice"):
        yield


@contextmanager
def flood(cluster: Cluster, mode: str, *, user: str = "root") -> Iterator[None]:
    """flood.py runs on n1 until the block ends."""
    with cluster.start("n1", "runuser", "-u", user, "--", "/usr/bin/python3", FILLER, mode) as process:
        assert process.stdout
        if process.stdout.readline() != "ready\n":
            raise ClusterError("flood.py did not start")
        try:
            yield
        finally:
            assert process.stdin
            process.stdin.close()
            process.wait()
