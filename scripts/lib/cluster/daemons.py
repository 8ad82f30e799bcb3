"""Starts the daemons of the cluster and waits until each really answers.

On the controller munged, MariaDB, slurmdbd, slurmctld; on each node slurmd and the node agent. (sftp.py and
sshfs: see storage.) All run in the foreground below their machine's first process. munged serves all machines
through its socket in the state folder.
"""

from __future__ import annotations

import os
import pwd
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from . import namespaces
from .layout import CONTROLLER, REPO, STORE, ClusterError, Process, State, poll
from .settings import COMMAND, GROUP, USERS
from .storage import compile_library

SLURMDBD_PORT = 6819
AGENT_STOP_S = 15.0
OWN_FOLDERS = {CONTROLLER: ("database",), STORE: ()}
# Durability is of no use to a database that is deleted with its cluster.
MARIADB_OPTIONS = [
    "--skip-networking",
    "--skip-name-resolve",
    "--skip-log-bin",
    "--performance-schema=OFF",
    "--innodb-buffer-pool-size=64M",
    "--innodb-log-file-size=32M",
    "--innodb-lock-wait-timeout=900",
    "--innodb-flush-log-at-trx-commit=0",
    "--innodb-doublewrite=0",
]
DATABASE_SQL = (
    "CREATE DATABASE IF NOT EXISTS slurm_acct;\n"
    "CREATE USER IF NOT EXISTS slurm@localhost IDENTIFIED VIA unix_socket;\n"
    "GRANT ALL ON slurm_acct.* TO slurm@localhost;\n"
)


def make_machine(state: State, node: str) -> None:
    """Make a machine's namespaces and root file system; record its first process.

    The controller and the store server have the shared folder itself.
    """
    layout = state.layout
    home = layout.dir / node
    for name in ("root", "writes", *OWN_FOLDERS.get(node, ("spool", "bootseer"))):
        (home / name).mkdir(parents=True, exist_ok=True)

    def prepare() -> None:
        namespaces.build_root(home / "root", home / "writes", needed=[layout.dir, REPO])
        for name in ("passwd", "group", "shadow", "hosts"):
            Path("/etc", name).write_bytes((layout.etc / name).read_bytes())
        Path("/etc/hostname").write_text(f"{node}\n")
        namespaces.bind(layout.etc / "slurm", "/etc/slurm")
        namespaces.bind(layout.etc / "bootseer", "/etc/bootseer")
        namespaces.bind(layout.munge_socket.parent, "/run/munge")
        Path("/run/lock").mkdir(mode=0o1777)
        if node in OWN_FOLDERS:
            namespaces.bind(layout.shared, "/shared")
        if node == CONTROLLER:
            for folder, owner in (("mysqld", "mysql"), ("slurm", "slurm")):
                _give(Path("/run", folder), owner)
        elif node not in OWN_FOLDERS:
            namespaces.bind(home / "spool", "/var/spool/slurmd")
            namespaces.bind(home / "bootseer", "/var/lib/bootseer")
        # Last: a bind of a shared mount would share with it.
        namespaces.share_mounts()

    log = layout.log(node, "init")
    namespaces.create(node, prepare, lambda process: state.add(node, "init", process), log)


def _give(folder: Path, owner: str) -> None:
    folder.mkdir(exist_ok=True)
    account = pwd.getpwnam(owner)
    os.chown(folder, account.pw_uid, account.pw_gid)


def start_daemon(
    state: State,
    node: str,
    name: str,
    argv: list[str],
    user: str | None = None,
    env: dict[str, str] | None = None,
) -> None:
    """Start a program that stays in the foreground in a machine, and record it."""
    account = pwd.getpwnam(user) if user else None
    rights = (account.pw_uid, account.pw_gid) if account else None
    log = state.layout.log(node, name)
    state.add(node, name, namespaces.spawn(state.init(node), argv, log, uid_gid=rights, env=env))


def await_ready(state: State, node: str, name: str, ready: Callable[[], bool], timeout_s: float) -> None:
    """Wait until a daemon is ready; raises ClusterError when it ends or takes too long."""
    process = state.process(node, name)
    assert process
    done = poll(lambda: ready() or not process.alive, timeout_s)
    where = "" if node == CONTROLLER else f" on {node}"
    if not process.alive:
        raise ClusterError(f"{name}{where} ended", state.layout.log(node, name))
    if not done:
        raise ClusterError(f"{name}{where} was not ready after {timeout_s:g} s", state.layout.log(node, name))


def install_database(state: State) -> subprocess.Popen[bytes]:
    """Begin to write MariaDB's system tables (a second or more of work that needs no other daemon)."""
    layout = state.layout
    folder = layout.dir / CONTROLLER / "database"
    _give(folder, "mysql")
    argv = ["mariadb-install-db", "--no-defaults", "--user=mysql", f"--datadir={folder}", "--skip-test-db"]
    with layout.log(CONTROLLER, "mariadb").open("wb") as log:
        command = namespaces.entering(state.init(CONTROLLER), argv)
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def start_munged(state: State) -> None:
    """Start munged. It runs as root, and so does not mind who owns the folders above its socket."""
    layout = state.layout
    key, pid_file = layout.etc / "munge.key", "/run/munged.pid"
    argv = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={layout.munge_socket}"]
    argv += [f"--pid-file={pid_file}", "--log-file=/run/munged.log", "--seed-file=/run/munged.seed"]
    start_daemon(state, CONTROLLER, "munged", argv)
    await_ready(state, CONTROLLER, "munged", lambda: accepts(str(layout.munge_socket)), timeout_s=15)


def start_database(state: State, installation: subprocess.Popen[bytes]) -> None:
    """Start MariaDB when its tables are there, with an account for slurmdbd."""
    layout = state.layout
    log = layout.log(CONTROLLER, "mariadb")
    if installation.wait(timeout=120) != 0:
        raise ClusterError("mariadb-install-db failed", log)
    script = layout.dir / CONTROLLER / "accounts.sql"
    script.write_text(DATABASE_SQL)
    argv = ["mariadbd", "--no-defaults", "--user=mysql", f"--datadir={layout.dir / CONTROLLER / 'database'}"]
    argv += ["--socket=/run/mysqld/mysqld.sock", "--pid-file=/run/mysqld/mysqld.pid", f"--init-file={script}"]
    start_daemon(state, CONTROLLER, "mariadb", argv + MARIADB_OPTIONS)
    socket_path = f"/proc/{state.init(CONTROLLER)}/root/run/mysqld/mysqld.sock"
    await_ready(state, CONTROLLER, "mariadb", lambda: accepts(socket_path), timeout_s=60)


def start_slurmdbd(state: State) -> None:
    """Start slurmdbd and enter the cluster, its account and its users."""
    layout, pid = state.layout, state.init(CONTROLLER)
    spool = layout.dir / CONTROLLER / "spool"
    _give(spool, "slurm")
    # It takes the configuration's folder from SLURM_CONF alone.
    env = {"SLURM_CONF": str(layout.slurm_conf)}
    start_daemon(state, CONTROLLER, "slurmdbd", ["slurmdbd", "-D"], "slurm", env)
    address = (layout.address(CONTROLLER), SLURMDBD_PORT)
    await_ready(state, CONTROLLER, "slurmdbd", lambda: accepts(address), timeout_s=60)
    namespaces.run(pid, ["sacctmgr", "-i", "add", "cluster", "bootseer"])
    namespaces.run(pid, ["sacctmgr", "-i", "add", "account", GROUP])
    namespaces.run(pid, ["sacctmgr", "-i", "add", "user", *USERS, "root", f"account={GROUP}"])


def start_slurmctld(state: State) -> None:
    """Start slurmctld."""
    pid = state.init(CONTROLLER)
    start_daemon(state, CONTROLLER, "slurmctld", ["slurmctld", "-D"], "slurm")
    await_ready(state, CONTROLLER, "slurmctld", lambda: _succeeds(pid, ["scontrol", "ping"]), timeout_s=30)


def start_slurmd(state: State, node: str) -> None:
    """Start a node's slurmd; `wait_idle` tells when it has registered."""
    start_daemon(state, node, "slurmd", ["slurmd", "-D", "-N", node])


def wait_idle(state: State, timeout_s: float = 30) -> None:
    """Wait until all nodes are idle; raises ClusterError with what sinfo says of them."""
    pid = state.init(CONTROLLER)
    output = ""

    def idle() -> bool:
        nonlocal output
        output = namespaces.run(pid, ["sinfo", "--noheader", "--Node", "--format=%N %T"])
        return {line.strip() for line in output.splitlines()} == {f"{node} idle" for node in state.nodes}

    if not poll(idle, timeout_s, interval_s=0.1):
        first = next((node for node in state.nodes if f"{node} idle" not in output), state.nodes[0])
        raise ClusterError(
            f"nodes are not idle after {timeout_s:g} s:\n{output}", state.layout.log(first, "slurmd")
        )


def agent_installed() -> bool:
    """True when the node agent is there to be started."""
    try:
        done = subprocess.run([str(COMMAND), "agent", "--help"], capture_output=True, check=False)
        return done.returncode == 0
    except OSError:
        return False


def start_agent(state: State, node: str) -> None:
    """Start a node's agent and wait for its socket; one that was stopped by `hang` is continued."""
    process = state.process(node, "agent")
    if process and process.alive:
        process.signal(signal.SIGCONT, group=True)
        return
    argv = [str(COMMAND), "--config", "/etc/bootseer/bootseer.toml", "agent"]
    if state.kept:
        argv = [sys.executable, "-ISB", str(Path(__file__).with_name("keeper.py")), *argv]
    start_daemon(state, node, "agent", argv, env=_own_clock(state, node) if state.clocks else None)
    socket_path = f"/proc/{state.init(node)}/root/run/bootseer/agent.sock"
    await_ready(state, node, "agent", lambda: accepts(socket_path), timeout_s=20)


def _own_clock(state: State, node: str) -> dict[str, str]:
    """The variables that give a node's agent a clock of its own (clock.c)."""
    if not state.clock(node).exists():
        state.clock(node).write_bytes(bytes(8))
    library = state.layout.dir / "lib" / "clock.so"
    if not library.exists():
        compile_library(Path(__file__).with_name("clock.c"), library)
    return {"LD_PRELOAD": str(library), "BOOTSEER_CLOCK": str(state.clock(node))}


def set_clock(state: State, node: str, offset_s: float) -> None:
    """Set the clock of a node's agent: 90 is 90 s ahead of the machine's, -90 behind it."""
    with state.clock(node).open("r+b") as file:  # in place: the agent has it mapped
        file.write(int(offset_s * 1e9).to_bytes(8, sys.byteorder, signed=True))


def stop_agent(state: State, node: str) -> None:
    """Ask a node's agent to end, and wait; raises ClusterError when it does not."""
    process = state.process(node, "agent")
    if process is None or not process.alive:
        return
    process.signal(signal.SIGCONT, group=True)
    process.signal(signal.SIGTERM)
    if not process.wait(AGENT_STOP_S):
        raise ClusterError(
            f"the agent on {node} did not end in {AGENT_STOP_S:g} s", state.layout.log(node, "agent")
        )


def signal_agent(state: State, node: str, number: int) -> None:
    """Send a signal to a node's agent and its process group; raises ClusterError when it does not run."""
    process = state.process(node, "agent")
    if process is None or not process.alive:
        raise ClusterError(f"no agent runs on {node}")
    process.signal(number, group=True)
    if number == signal.SIGKILL:
        process.wait(5)


def crash_agent(state: State, node: str) -> None:
    """Kill a node's agent proper, which its supervisor starts again; raises ClusterError when none runs."""
    _kill_child(_supervisor(state, node), node)


def crash_supervisor(state: State, node: str) -> None:
    """Kill a node's supervisor, which its keeper starts again; raises ClusterError when none runs."""
    if not state.kept:
        raise ClusterError("nothing would start the supervisor again: scripts/cluster up --kept")
    _supervisor(state, node)
    keeper = state.process(node, "agent")
    assert keeper
    _kill_child(keeper, node)


def _supervisor(state: State, node: str) -> Process:
    process = state.process(node, "agent")
    if process is None or not process.alive:
        raise ClusterError(f"no agent runs on {node}")
    return _child(process, node) if state.kept else process


def _child(process: Process, node: str) -> Process:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    child = Process.of(int(children[0])) if children else None
    if child is None:
        raise ClusterError(f"the agent on {node} is just being started")
    return child


def _kill_child(process: Process, node: str) -> None:
    child = _child(process, node)
    child.signal(signal.SIGKILL)
    child.wait(5)


def accepts(address: str | tuple[str, int]) -> bool:
    """True when something listens there."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as connection:
        connection.settimeout(2)
        try:
            connection.connect(address)
        except OSError:
            return False
        return True


def _succeeds(pid: int, argv: list[str]) -> bool:
    try:
        namespaces.run(pid, argv)
    except ClusterError:
        return False
    return True
