"""Core-seconds for each GB that a node delivers, by every path, beside the same reads without Bootseer.

A job reads all of a checkpoint, of an environment, or of an image, on a node that has nothing of it. What
counts is the CPU time of all on the node that takes part (cpu_start.py); of the job only what the kernel does
in its name. The store server is another machine, and does not count. Arms are interleaved, and their bytes
compared.
"""

from __future__ import annotations

import shutil
from statistics import median

from scripts.lib.bench import cpu_inputs
from scripts.lib.bench.cpu_arms import arms
from scripts.lib.bench.cpu_inputs import Inputs
from scripts.lib.bench.cpu_start import COMMANDS, ClusterNode, Start
from scripts.lib.bench.digest import processor
from scripts.lib.bench.image_arms import NODE
from scripts.lib.bench.image_ours import publish
from scripts.lib.bench.rows import Row
from scripts.lib.bench.spinner import spinner
from scripts.lib.cluster.client import ALICE, BOOTSEER, Cluster
from scripts.lib.cluster.layout import ClusterError

ROUNDS = 3
TARGET = 1.3
Starts = dict[tuple[str, bool], list[Start]]  # by path, and whether with Bootseer


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up."""
    with spinner("inputs") as step:
        cluster.script("link", NODE, "off")
        inputs = cpu_inputs.make(cluster, step)
        step("image and environment into the store")
        save(cluster, inputs)
        starts: Starts = {}
        for number in range(ROUNDS + 1):
            for arm in arms(inputs):
                step(f"{arm.name}, {number} of {ROUNDS}")
                start = ClusterNode(cluster).start(arm, learn=not number)
                starts.setdefault((arm.path, bool(arm.job)), []).append(start)
    for path in {path for path, _ in starts}:
        if len({start.sha256 for start in starts[path, False] + starts[path, True]}) != 1:
            raise ClusterError(f"{path}: arms read different bytes")
    # The first round is the one that was recorded.
    return rows_of({arm: each[1:] for arm, each in starts.items()})


def save(cluster: Cluster, inputs: Inputs) -> None:
    """Put alice's image into the store, signed by the site, and a snapshot of the environment."""
    shutil.rmtree(cluster.shared / f"bootseer/users/{ALICE}", ignore_errors=True)
    cluster.script("drop-caches", "--bootseer", "--shared")  # they were removed behind the node
    key = f"umask 077; [ -s /etc/bootseer/site.key ] || {BOOTSEER} image make-key"
    cluster.exec("login", "bash", "-c", key)
    cluster.agent(NODE, "stop")
    cluster.agent(NODE, "start")
    publish(cluster, inputs.image)
    saving = ["srun", "--bootseer", "--job-name=save", "--nodes=1", "--chdir=/tmp"]
    saving += [BOOTSEER, "env", "save", inputs.environment]
    cluster.run("login", *saving, user="alice", timeout_s=600)


def rows_of(starts: Starts) -> list[Row]:
    """For each path what it costs, beside plain."""
    rows: list[Row] = []
    for path in dict.fromkeys(path for path, _ in starts):
        plain, ours = starts[path, False], starts[path, True]
        plain_cost, our_cost = cost(plain), cost(ours)
        some = ours[0]
        how = f"{path}: {some.read_bytes / 1e9:.2f} GB in {some.files} files, cold; "
        how += f"plain {by_group(plain)}; with Bootseer {by_group(ours)}; "
        how += f"medians of {ROUNDS} interleaved; {processor()}"
        rows += [
            Row(f"core-s per GB, {path}, against plain", our_cost / plain_cost, "×", TARGET, 1.0, how),
            Row(f"core-s per GB, {path}", our_cost, "core-s/GB", None, plain_cost, how),
        ]
    return rows


def cost(starts: list[Start]) -> float:
    """Core-seconds for each GB that the job read."""
    return median(start.total_s / start.read_bytes for start in starts) * 1e9


def by_group(starts: list[Start]) -> str:
    """Each group's core-seconds for each GB, in words, and the store's bytes."""
    groups = {
        name: median(start.cpu_s[name] / start.read_bytes for start in starts) * 1e9
        for name in starts[0].cpu_s
        if name != COMMANDS
    }
    shares = ", ".join(f"{name} {used:.3f}" for name, used in groups.items() if used >= 0.0005)
    sent = median(start.store_bytes for start in starts) / 1e9
    commands = f"commands {median(start.cpu_s[COMMANDS] for start in starts):.2f} s"
    return f"{cost(starts):.3f} core-s/GB ({shares}; {sent:.2f} GB from the store; {commands})"
