"""The faults: each is begun at random on a random node, lasts for some seconds, and is mended.

A row of FAULTS is a context manager: what fails when it is entered is well again when it is left. It
raises ClusterError where the fault cannot be made just now: an agent that hangs cannot be killed.
"""

from __future__ import annotations

import random
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from scripts.lib.chaos.inputs import Inputs
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import STORE, ClusterError, Layout, live, poll
from scripts.lib.cluster.settings import USERS

DISK = "/var/lib/bootseer"
DISK_SIZE = "500M"
LONGEST_S = 6.0
PAUSE_S = (0.2, 2.0)


@dataclass
class Failing:
    """What a fault acts upon. busy: the nodes (or "store") that a fault has now, one at a time each."""

    cluster: Cluster
    inputs: Inputs
    chance: random.Random
    busy: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def one_of(self, places: list[str]) -> Iterator[str]:
        """A place that no other fault has, for the time of this one."""
        with self.lock:
            free = [place for place in places if place not in self.busy]
            if not free:
                raise ClusterError("each place has a fault already")
            place = self.chance.choice(free)
            self.busy.add(place)
        try:
            yield place
        finally:
            with self.lock:
                self.busy.discard(place)


@contextmanager
def agent_killed(failing: Failing) -> Iterator[None]:
    """An agent dies; its supervisor starts the next one."""
    with failing.one_of(failing.cluster.nodes) as node:
        failing.cluster.agent(node, "crash")
        yield


@contextmanager
def supervisor_killed(failing: Failing) -> Iterator[None]:
    """A supervisor dies, and its agent with it; the service manager starts the next one."""
    with failing.one_of(failing.cluster.nodes) as node:
        failing.cluster.agent(node, "crash-supervisor")
        yield


@contextmanager
def agent_hangs(failing: Failing) -> Iterator[None]:
    """An agent and its supervisor stop for a while."""
    with failing.one_of(failing.cluster.nodes) as node:
        failing.cluster.agent(node, "hang")
        try:
            yield
        finally:
            failing.cluster.agent(node, "start")


@contextmanager
def users_process_stopped(failing: Failing) -> Iterator[None]:
    """The processes that read for users stop, as a user can have it."""
    with failing.one_of(failing.cluster.nodes) as node:
        users = ",".join(map(str, USERS.values()))
        pattern = ["-u", users, "-f", "userproc"]
        if not poll(lambda: not failing.cluster.exec(node, "pkill", "-STOP", *pattern).returncode, LONGEST_S):
            raise ClusterError("no process reads for a user")
        try:
            yield
        finally:
            failing.cluster.exec(node, "pkill", "-CONT", *pattern)


@contextmanager
def peer_process_stopped(failing: Failing) -> Iterator[None]:
    """The processes by which nodes exchange blocks stop, or end, as a user can have it."""
    with failing.one_of(failing.cluster.nodes) as node:
        pattern = ["-u", ",".join(map(str, USERS.values())), "-f", "peers[.]child"]
        how = failing.chance.choice(["-STOP", "-KILL"])
        if not poll(lambda: not failing.cluster.exec(node, "pkill", how, *pattern).returncode, LONGEST_S):
            raise ClusterError("no process exchanges blocks")
        try:
            yield
        finally:
            failing.cluster.exec(node, "pkill", "-CONT", *pattern)


@contextmanager
def store_stalls(failing: Failing) -> Iterator[None]:
    """The store server answers nothing for a while."""
    with failing.one_of([STORE]):
        server = live(Layout(failing.cluster.state_dir)).process(STORE, "sftp")
        assert server
        server.signal(signal.SIGSTOP, group=True)
        try:
            yield
        finally:
            server.signal(signal.SIGCONT, group=True)


@contextmanager
def link_slow(failing: Failing) -> Iterator[None]:
    """The link of a node or of the store server is nearly dead."""
    with failing.one_of([*failing.cluster.nodes, STORE]) as machine:
        failing.cluster.script("link", machine, failing.chance.choice(["500kbit", "5mbit", "20mbit"]))
        try:
            yield
        finally:
            failing.cluster.script("link", machine, "off")


@contextmanager
def disk_full(failing: Failing) -> Iterator[None]:
    """No block is free on the cache's disk."""
    with failing.one_of(failing.cluster.nodes) as node:
        fill = f"{DISK}/filled-by-somebody-else"
        failing.cluster.exec(node, "dd", "if=/dev/zero", f"of={fill}", "bs=1M")
        try:
            yield
        finally:
            failing.cluster.run(node, "rm", "-f", fill)


@contextmanager
def clock_jumps(failing: Failing) -> Iterator[None]:
    """An agent's clock jumps, and back."""
    with failing.one_of(failing.cluster.nodes) as node:
        offset_s = failing.chance.choice([-86400, -3600, -5, 5, 3600, 86400])
        failing.cluster.script("clock", node, "--", f"{offset_s:+d}")
        try:
            yield
        finally:
            failing.cluster.script("clock", node, "+0")


@contextmanager
def record_damaged(failing: Failing) -> Iterator[None]:
    """A record in the store (a name, a manifest, a trace, what a class started from) holds nonsense."""
    with failing.one_of(["records"]):
        yield from _damaged(
            failing, lambda path: path.parent.parent.name != "blobs" or path.name == "manifest"
        )


@contextmanager
def object_damaged(failing: Failing) -> Iterator[None]:
    """Some bytes of a blob in the store are wrong."""
    with failing.one_of(["objects"]):
        yield from _damaged(failing, _is_object)


def _is_object(path: Path) -> bool:
    return path.parent.parent.name == "blobs" and path.name.isdigit()


def _damaged(failing: Failing, chosen: Callable[[Path], bool]) -> Iterator[None]:
    paths = [path for path in failing.inputs.objects() if chosen(path) and path.stat().st_size > 0]
    if not paths:
        raise ClusterError("the store has none")
    path = failing.chance.choice(paths)
    with path.open("r+b") as file:
        right = file.read()
        at = failing.chance.randrange(len(right))
        wrong = failing.chance.randbytes(min(4096, len(right) - at))
        file.seek(at)
        file.write(wrong)
    try:
        yield
    finally:
        # Where it was written anew meanwhile, this is another inode's name: the old one is mended for nobody.
        with path.open("r+b") as file:
            if file.read() == right[:at] + wrong + right[at + len(wrong) :]:
                file.seek(at)
                file.write(right[at : at + len(wrong)])


@contextmanager
def checkpoint_replaced(failing: Failing) -> Iterator[None]:
    """A checkpoint is written anew while jobs start from it: no fault, but as unlucky."""
    with failing.one_of(["checkpoints"]):
        failing.inputs.replace_checkpoint(failing.chance.choice(list(USERS)), failing.chance)
        yield


FAULTS: dict[str, Callable[[Failing], AbstractContextManager[None]]] = {
    "agent killed": agent_killed,
    "supervisor killed": supervisor_killed,
    "agent hangs": agent_hangs,
    "user's process stopped": users_process_stopped,
    "peer process stopped": peer_process_stopped,
    "store stalls": store_stalls,
    "link slow": link_slow,
    "disk full": disk_full,
    "clock jumps": clock_jumps,
    "record damaged": record_damaged,
    "object damaged": object_damaged,
    "checkpoint replaced": checkpoint_replaced,
}


def give_own_disks(cluster: Cluster) -> None:
    """Give each node's cache a small file system of its own, which can be filled."""
    for node in cluster.nodes:
        image = cluster.state_dir / node / "disk"
        cluster.agent(node, "stop")
        cluster.run(node, "truncate", "-s", DISK_SIZE, str(image))
        cluster.run(node, "mkfs.ext4", "-q", "-F", str(image))
        cluster.run(node, "mount", "-o", "loop", str(image), DISK)
        cluster.agent(node, "start")


def fail_until_over(failing: Failing, over: threading.Event, counts: Counter[str]) -> None:
    """Make faults, one after the other, until `over` is set; the last one is mended then."""
    while not over.wait(failing.chance.uniform(*PAUSE_S)):
        name = failing.chance.choice(list(FAULTS))
        try:
            with FAULTS[name](failing):
                counts[name] += 1
                over.wait(failing.chance.uniform(0.2, LONGEST_S))
        except ClusterError:
            continue
