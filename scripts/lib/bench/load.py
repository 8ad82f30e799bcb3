"""Many short jobs on one node: the agent's memory, threads, descriptors and /run stay flat, the hook fast."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import quantiles

import psutil

from scripts.lib.bench import prolog
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.hook_times import clear_hook_times, hook_times, stamp_hooks, unstamp_hooks
from scripts.lib.cluster.layout import ClusterError, Layout, live, poll

NODE = "n1"
JOBS, AT_ONCE = 200, 20
CPUS = AT_ONCE + 4
# The first wave fills what is filled once: caches of the interpreter, the threads and the process that wait.
FIRST_JOBS = 100
SCRIPT = "cat {IMAGE} {CHECKPOINT} {ENV}/pyvenv.cfg > /dev/null\nsleep 5".format(**prolog.WISHES)
ASKING = ["--bootseer", *(f"--bootseer-{key.lower()}={value}" for key, value in prolog.WISHES.items())]
HOOK_TARGET_S = 0.150
# Python gives memory back to the kernel in arenas of 1 MiB: a few of them are noise.
GROWTH_TARGET_BYTES = 8 << 20
RUN_TARGET_BYTES = 1 << 20
REST_S = 60.0


@dataclass(frozen=True)
class Sizes:
    """What the agent's service takes at one moment.

    memory_bytes: PSS of supervisor and agent; all_bytes: of their children too. run_bytes: used in /run.
    """

    memory_bytes: int
    all_bytes: int
    threads: int
    descriptors: int
    run_bytes: int

    def most(self, other: Sizes) -> Sizes:
        """The larger of each."""
        return Sizes(*(max(getattr(self, each.name), getattr(other, each.name)) for each in fields(self)))


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster of one node with CPUS cores."""
    prolog.make_inputs(cluster)
    with tempfile.TemporaryDirectory(prefix="bootseer-load-", dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        run_jobs(cluster, FIRST_JOBS, ASKING)
        before = at_rest(cluster)
        stamp_hooks(cluster, folder)
        try:
            run_jobs(cluster, JOBS, [])
            plain = hook_times(folder)
            clear_hook_times(folder)
            begun_s = time.monotonic()
            with most_sizes(cluster) as most:
                run_jobs(cluster, JOBS, ASKING)
            took_s = time.monotonic() - begun_s
        finally:
            unstamp_hooks(cluster)
        after = at_rest(cluster)
        times = hook_times(folder)
    how = f"{JOBS} jobs on one node, {AT_ONCE} at once, each with image, environment and checkpoint; "
    how += f"{JOBS / took_s:.1f} jobs/s; {FIRST_JOBS} jobs went before"
    return [*hook_rows(times, plain, how), *size_rows(before, after, most[0], how)]


def run_jobs(cluster: Cluster, count: int, options: list[str]) -> None:
    """Run an array of so many jobs, and wait for its end. Raises ClusterError when one did not complete."""
    array = [f"--array=1-{count}%{AT_ONCE}", "--output=/dev/null", "--mem-per-cpu=50"]
    job_id = cluster.sbatch(SCRIPT, *options, *array)
    state = cluster.wait(job_id, timeout_s=900)
    if state != "COMPLETED":
        raise ClusterError(f"not all jobs completed: {state}")


def at_rest(cluster: Cluster) -> Sizes:
    """The sizes when no job is on the node any more."""
    jobs = Path(f"/proc/{live(Layout(cluster.state_dir)).init(NODE)}/root/run/bootseer/jobs")
    if not poll(lambda: not any(jobs.iterdir()), REST_S):
        raise ClusterError(f"sessions are left on {NODE}: {[path.name for path in jobs.iterdir()]}")
    time.sleep(3)  # what ends a session ends its threads too
    return sizes(cluster)


def sizes(cluster: Cluster) -> Sizes:
    """The sizes now."""
    state = live(Layout(cluster.state_dir))
    supervisor_record = state.process(NODE, "agent")
    assert supervisor_record
    supervisor = psutil.Process(supervisor_record.pid)
    agent = supervisor.children()[0]
    children_bytes = 0
    for child in agent.children(recursive=True):
        try:
            children_bytes += child.memory_full_info().pss
        except psutil.Error:
            continue
    own_bytes = supervisor.memory_full_info().pss + agent.memory_full_info().pss
    disk = os.statvfs(f"/proc/{state.init(NODE)}/root/run")
    run_bytes = (disk.f_blocks - disk.f_bfree) * disk.f_frsize
    return Sizes(own_bytes, own_bytes + children_bytes, agent.num_threads(), agent.num_fds(), run_bytes)


@contextmanager
def most_sizes(cluster: Cluster) -> Iterator[list[Sizes]]:
    """The most of each size meanwhile, looked at once a second: the list's only element."""
    most = [sizes(cluster)]
    over = threading.Event()

    def look() -> None:
        while not over.wait(1):
            most[0] = most[0].most(sizes(cluster))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def hook_rows(times: dict[str, list[float]], plain: dict[str, list[float]], how: str) -> list[Row]:
    """The hook's 99th percentile, and that of jobs without --bootseer, whose hook is a shell that ends."""
    return [
        Row(
            f"hook, {kind}, 99th percentile of {len(seconds)}",
            quantiles(seconds, n=100)[-1],
            "s",
            HOOK_TARGET_S,
            quantiles(plain[kind], n=100)[-1],
            f"{how}; limit: the same of as many plain jobs, {AT_ONCE} at once, in the same run",
        )
        for kind, seconds in times.items()
    ]


def size_rows(before: Sizes, after: Sizes, most: Sizes, how: str) -> list[Row]:
    """How much each size has grown, at rest before against at rest afterwards; and the most meanwhile."""
    how += "; at rest before and afterwards; limit: the size before"
    growths = [
        ("memory", "memory_bytes", 1 << 20, "MiB", GROWTH_TARGET_BYTES),
        ("threads", "threads", 1, "", 0),
        ("descriptors", "descriptors", 1, "", 0),
        ("/run", "run_bytes", 1 << 20, "MiB", RUN_TARGET_BYTES),
    ]
    rows = []
    for name, key, scale, unit, target in growths:
        first, last = getattr(before, key), getattr(after, key)
        rows.append(Row(f"{name}, grown", (last - first) / scale, unit, target / scale, first / scale, how))
        rows.append(Row(f"{name}, at most", getattr(most, key) / scale, unit, None, first / scale, how))
    all_mib = most.all_bytes / (1 << 20)
    rows.append(
        Row("memory with users' processes, at most", all_mib, "MiB", None, before.all_bytes / (1 << 20), how)
    )
    return rows
