"""Where a cluster keeps its state, which addresses it uses, what was started, and the lock on changes.

Layout of the state folder (BOOTSEER_CLUSTER_DIR, default /var/tmp/bootseer-cluster):

    state.json             what runs: processes by pid and start time, nodes, link rates
    etc/                   settings; etc/slurm and etc/bootseer are /etc/slurm and /etc/bootseer everywhere
    log/                   NAME.log of the controller's daemons, NODE.NAME.log of a node's
    shared/                what /shared shows
    munge/                 the munge socket, used by all nodes and by the host
    lib/                   what was compiled for this cluster
    ctl/ store/ n1/ ...    per machine: root/ (mount point); database/ of ctl, spool/ and bootseer/ of nodes

The lock is an abstract unix socket: it goes with its process, and leaves no file.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

DEFAULT_DIR = "/var/tmp/bootseer-cluster"
CONTROLLER = "ctl"
STORE = "store"
REPO = Path(__file__).resolve().parents[3]
# It stands in mount options, in settings, and in a socket's address of at most 107 bytes.
DIR_NAME = re.compile(r"/[A-Za-z0-9._/-]{1,79}")
# These look different inside a node.
PRIVATE_DIRS = ("/run", "/etc", "/proc", "/sys", "/dev", "/shared", "/var/lib", "/var/spool")


class ClusterError(Exception):
    """Something did not work; `log` names the log file that tells more."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Layout:
    """Paths and addresses, all derived from the state folder."""

    dir: Path

    @classmethod
    def from_environment(cls, name: str = "BOOTSEER_CLUSTER_DIR", default: str = DEFAULT_DIR) -> Layout:
        """The layout that this variable asks for; raises ClusterError when it cannot serve."""
        path = Path(os.path.realpath(os.environ.get(name, default)))
        if not DIR_NAME.fullmatch(str(path)):
            raise ClusterError(f"{name} must have at most 80 letters, digits and ._-/: {path}")
        if any(path.is_relative_to(hidden) for hidden in PRIVATE_DIRS):
            raise ClusterError(f"{name} cannot be below {', '.join(PRIVATE_DIRS)}: {path}")
        return cls(path)

    @property
    def subnet(self) -> int:
        """Second number of the 10.x.0.0/24 network: two clusters in two folders get two networks."""
        if str(self.dir) == DEFAULT_DIR:
            return 77
        return 80 + zlib.crc32(str(self.dir).encode()) % 160

    @property
    def host_link(self) -> str:
        """Name of the one network device that the cluster has on the host."""
        return f"bootseer{self.subnet}"

    @property
    def host_address(self) -> str:
        return f"10.{self.subnet}.0.254"

    def address(self, node: str) -> str:
        """Address of the controller (.1), of the store server (.2) or of node n<i> (.10+i)."""
        last = {CONTROLLER: 1, STORE: 2}.get(node) or 10 + int(node[1:])
        return f"10.{self.subnet}.0.{last}"

    @property
    def etc(self) -> Path:
        return self.dir / "etc"

    @property
    def slurm_conf(self) -> Path:
        return self.etc / "slurm" / "slurm.conf"

    @property
    def bootseer_toml(self) -> Path:
        return self.etc / "bootseer" / "bootseer.toml"

    @property
    def shared(self) -> Path:
        return self.dir / "shared"

    @property
    def munge_socket(self) -> Path:
        return self.dir / "munge" / "munge.socket.2"

    def log(self, node: str, name: str) -> Path:
        """Log file of a daemon."""
        return self.dir / "log" / (f"{name}.log" if node == CONTROLLER else f"{node}.{name}.log")


@dataclass(frozen=True)
class Process:
    """A process that cannot be mistaken for a later one with its number."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> Process | None:
        """The process that has this number now."""
        fields = _stat(pid)
        return cls(pid, int(fields[19])) if fields else None

    @property
    def state(self) -> str:
        """State letter of proc(5) ("S", "T", ...), or "" when it is gone (or a zombie)."""
        fields = _stat(self.pid)
        if fields is None or int(fields[19]) != self.start_ticks or fields[0] in "ZX":
            return ""
        return fields[0]

    @property
    def alive(self) -> bool:
        return self.state != ""

    def signal(self, number: int, *, group: bool = False) -> None:
        """Send a signal to this process (or to its process group, which it must lead), unless it is gone."""
        try:
            handle = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        try:
            # The handle was taken first, so what is alive now is what the signal will reach.
            if not self.alive:
                return
            if group and os.getpgid(self.pid) == self.pid:
                os.killpg(self.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
        except ProcessLookupError:
            pass
        finally:
            os.close(handle)

    def wait(self, timeout_s: float) -> bool:
        """True when it ended within that time."""
        return poll(lambda: not self.alive, timeout_s)


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the command's name, from "state" on."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def poll(ready: Callable[[], bool], timeout_s: float, interval_s: float = 0.05) -> bool:
    """Call ready() until it is true (True) or the time is over (False)."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(interval_s)
    return True


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@dataclass
class State:
    """The record of a cluster: `processes` maps "NODE/NAME" to (pid, start time in ticks).

    host_linked: the network device on the host was made. clocks: each agent has a clock of its own.
    kept: each has a service manager, which starts it again (keeper.py).
    """

    layout: Layout
    phase: str = "starting"
    nodes: list[str] = field(default_factory=list)
    links: dict[str, str] = field(default_factory=dict)
    processes: dict[str, tuple[int, int]] = field(default_factory=dict)
    host_linked: bool = False
    clocks: bool = False
    kept: bool = False

    @classmethod
    def load(cls, layout: Layout) -> State | None:
        """The recorded state; None when there is none. After a reboot its processes are forgotten."""
        try:
            record = json.loads((layout.dir / "state.json").read_text())
        except FileNotFoundError:
            return None
        if record.pop("boot_id") != _boot_id():
            record.update(phase="starting", processes={}, host_linked=False)
        return cls(layout, **record)

    def save(self) -> None:
        """Write the record with an atomic rename."""
        record = asdict(self) | {"boot_id": _boot_id()}
        del record["layout"]
        draft = self.layout.dir / "state.json.new"
        draft.write_text(json.dumps(record, indent=1))
        draft.replace(self.layout.dir / "state.json")

    def add(self, node: str, name: str, process: Process) -> None:
        """Record a process, on disk before it matters."""
        self.processes[f"{node}/{name}"] = (process.pid, process.start_ticks)
        self.save()

    def process(self, node: str, name: str) -> Process | None:
        """A recorded process, alive or not."""
        record = self.processes.get(f"{node}/{name}")
        return Process(*record) if record else None

    def clock(self, node: str) -> Path:
        """The file that holds how far a node's agent's clock is from the machine's (clock.c)."""
        return self.layout.dir / node / "clock"

    @property
    def machines(self) -> list[str]:
        """All machines that were made: the controller, the store server where there is one, the nodes."""
        return [node for node, name, _ in self.started() if name == "init"]

    def started(self) -> list[tuple[str, str, Process]]:
        """All recorded processes: node, name, process."""
        rows = []
        for key, record in self.processes.items():
            node, _, name = key.partition("/")
            rows.append((node, name, Process(*record)))
        return rows

    def init(self, node: str) -> int:
        """Host pid of a machine's first process; raises ClusterError when it is unknown or dead."""
        if node == "login":
            node = CONTROLLER
        process = self.process(node, "init")
        if process is None:
            raise ClusterError(f"no node {node}: there are login, {', '.join(self.machines)}")
        if not process.alive:
            raise ClusterError(
                f"node {node} is dead: scripts/cluster down, then up", self.layout.log(node, "init")
            )
        return process.pid

    @property
    def up(self) -> bool:
        """True when the start was finished and all machines still have their first process."""
        if self.phase != "up":
            return False
        return all(process.alive for _, name, process in self.started() if name == "init")


def live(layout: Layout) -> State:
    """The state of a cluster that is up; raises ClusterError when there is none."""
    state = State.load(layout)
    if state is None or not state.up:
        raise ClusterError("no cluster is up: scripts/cluster up --nodes 3")
    return state


@contextlib.contextmanager
def locked(layout: Layout) -> Iterator[None]:
    """Only one change of a cluster at a time; waits for the other one."""
    with socket.socket(socket.AF_UNIX) as lock:
        address = b"\0bootseer-cluster:" + os.fsencode(layout.dir)
        told = False
        while True:
            try:
                lock.bind(address)
                break
            except OSError:
                if not told:
                    print("another scripts/cluster is at work on it: waiting", flush=True)
                told = True
                time.sleep(0.2)
        yield
