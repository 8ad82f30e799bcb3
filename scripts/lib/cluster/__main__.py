"""A real Slurm cluster on one machine: nodes are namespaces, shared storage is remote.

    scripts/cluster up --nodes 3 --link 1gbit
    scripts/cluster exec --user alice login sbatch --wrap hostname
    scripts/cluster down

See docs/cluster.md. Runs as root, with the standard library only.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from pathlib import Path

from scripts.lib.cluster import daemons, namespaces, network, packages, settings, storage
from scripts.lib.cluster.command import CommandLine, progress
from scripts.lib.cluster.ending import print_log_of, take_down
from scripts.lib.cluster.layout import CONTROLLER, REPO, STORE, ClusterError, Layout, State, live


def up(layout: Layout, options: argparse.Namespace) -> None:
    """Start the cluster, or say that it is up already."""
    state = State.load(layout)
    if state and state.up:
        if len(state.nodes) != options.nodes:
            raise ClusterError(f"a cluster of {len(state.nodes)} nodes is up: scripts/cluster down first")
        print(f"the cluster is up, with {len(state.nodes)} nodes")
        return
    for rate in (options.link, options.store_link):
        if rate != "off":
            network.rate_bits(rate)
    if state:
        progress("taking down what an earlier start left")
    take_down(layout)
    install_packages()
    layout.dir.mkdir(parents=True, mode=0o755)
    names = [f"n{number}" for number in range(1, options.nodes + 1)]
    state = State(layout, nodes=names, clocks=options.clocks, kept=options.kept)
    state.save()
    try:
        start(state, options)
    except BaseException as error:
        print_log_of(error)
        if options.keep:
            print("kept as it is (--keep): scripts/cluster status, logs, down", file=sys.stderr)
        else:
            progress("failed: taking down what was started")
            take_down(layout)
        raise


def install_packages(*_: object) -> None:
    """Install the Debian packages that are missing."""
    needed = packages.missing()
    if needed:
        progress(f"installing {' '.join(needed)}")
        packages.install(needed)


def start(state: State, options: argparse.Namespace) -> None:
    """Start everything, in the order of what needs what."""
    layout = state.layout
    if options.private_tmp:
        # A mount namespace can be bound in an older one only. By Linux 6.18 each CPU numbers namespaces for
        # itself, and the number is the age: on one CPU a job's namespace is younger than its node's.
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for name in ("log", "munge"):
        (layout.dir / name).mkdir()
    settings.write(layout, state.nodes, options.cpus, private_tmp=options.private_tmp)
    storage.prepare(layout)
    progress("settings written")
    daemons.make_machine(state, CONTROLLER)
    installation = daemons.install_database(state)
    network.connect_host(state)
    for machine, rate in [(STORE, options.store_link), *((node, options.link) for node in state.nodes)]:
        daemons.make_machine(state, machine)
        network.connect_machine(state, machine)
        network.set_link(state, machine, rate)
    links = f"links {options.link}, the store's {options.store_link}"
    progress(f"{len(state.nodes)} nodes on 10.{layout.subnet}.0.0/24, {links}")
    daemons.start_munged(state)
    storage.serve(state)
    for node in state.nodes:
        storage.mount(state, node)
    for node in state.nodes:
        storage.wait_mounted(state, node)
    progress("munged up, /shared mounted")
    daemons.start_database(state, installation)
    progress("mariadb up")
    daemons.start_slurmdbd(state)
    progress("slurmdbd up")
    daemons.start_slurmctld(state)
    progress("slurmctld up")
    if options.agent and daemons.agent_installed():
        for node in state.nodes:
            daemons.start_agent(state, node)
        progress("agents up")
    else:
        progress("no agents" + (f": {settings.COMMAND} has no agent" if options.agent else ""))
    for node in state.nodes:
        daemons.start_slurmd(state, node)
    daemons.wait_idle(state)
    plugin = "" if settings.PLUGIN.exists() else ", no plugin (spank/ is not built)"
    state.phase = "up"
    state.save()
    progress(f"nodes idle{plugin}")


def down(layout: Layout, options: argparse.Namespace) -> None:
    """Stop the cluster; fine when there is none."""
    there = layout.dir.exists()
    take_down(layout, keep_logs=options.keep_logs)
    if options.keep_logs and there:
        print(f"logs: {layout.dir / 'log'}")
    progress("down" if there else "no cluster is there")


def status(layout: Layout, _options: argparse.Namespace) -> None:
    """Show what runs, and what Slurm says of its nodes."""
    state = State.load(layout)
    if state is None:
        raise ClusterError("no cluster is up: scripts/cluster up --nodes 3")
    words = {"T": "stopped", "": "DEAD"}
    print(f"{'NODE':<6} {'NAME':<10} {'PID':>8} STATE")
    for node, name, process in state.started():
        print(f"{node:<6} {name:<10} {process.pid:>8} {words.get(process.state, 'running')}")
    links = " ".join(f"{node}={rate}" for node, rate in state.links.items())
    print(f"\n{'up' if state.up else 'NOT up'}; links: {links}")
    if state.up:
        print(namespaces.run(state.init(CONTROLLER), ["sinfo", "--Node", "--long"]), end="")


def execute(layout: Layout, options: argparse.Namespace) -> None:
    """Become a command in a node."""
    if not options.command:
        raise ClusterError("no command: scripts/cluster exec [--user NAME] NODE COMMAND...")
    pid = live(layout).init(options.node)
    home = Path("/shared/home", options.user) if options.user else Path("/root")
    env = {"PATH": f"{namespaces.PATH}:{REPO / '.venv/bin'}", "HOME": str(home)}
    if options.user:
        env |= {"USER": options.user, "LOGNAME": options.user, "SHELL": "/bin/bash"}
    argv = namespaces.entering(pid, options.command, user=options.user, cwd=str(home), env=env)
    os.execvp(argv[0], argv)


def env(layout: Layout, _options: argparse.Namespace) -> None:
    """Print shell lines that let the host's own shell talk to this cluster."""
    live(layout)
    print(f"export SLURM_CONF={shlex.quote(str(layout.slurm_conf))}")
    print(f"export BOOTSEER_CONFIG={shlex.quote(str(layout.bootseer_toml))}")
    print(f"export PATH={shlex.quote(str(REPO / '.venv/bin'))}:$PATH")


def logs(layout: Layout, options: argparse.Namespace) -> None:
    """Show the end of logs: of a node, of a daemon, or of all."""
    names = sorted((layout.dir / "log").glob("*.log"))
    if options.name:
        names = [path for path in names if options.name in path.name.split(".")]
    if not names:
        raise ClusterError(f"no log {options.name or ''} in {layout.dir / 'log'}")
    argv = ["tail", f"--lines={options.lines}", *(["-F"] if options.follow else []), *map(str, names)]
    os.execvp(argv[0], argv)


def link(layout: Layout, options: argparse.Namespace) -> None:
    """Change the rate of the store server's link, of a node's, or of all nodes'."""
    state = live(layout)
    for node in state.nodes if options.node == "all" else [options.node]:
        network.set_link(state, node, options.rate)


def drop_caches(layout: Layout, options: argparse.Namespace) -> None:
    """Make all nodes cold."""
    state = live(layout)
    if not options.bootseer and not options.shared:
        storage.drop_caches()
        return
    with_agent = [node for node in state.nodes if (agent := state.process(node, "agent")) and agent.alive]
    for node in with_agent:
        daemons.stop_agent(state, node)
    for node in state.nodes:
        if options.bootseer:
            storage.empty(layout.dir / node / "bootseer")
        if options.shared:
            storage.unmount(state, node)
            storage.mount(state, node)
    for node in state.nodes if options.shared else []:
        storage.wait_mounted(state, node)
    storage.drop_caches()
    for node in with_agent:
        daemons.start_agent(state, node)


def agent(layout: Layout, options: argparse.Namespace) -> None:
    """Start, stop, kill, crash or hang the agent of a node."""
    state = live(layout)
    for node in state.nodes if options.node == "all" else [options.node]:
        state.init(node)
        if options.action == "start":
            daemons.start_agent(state, node)
        elif options.action == "stop":
            daemons.stop_agent(state, node)
        elif options.action == "crash":
            daemons.crash_agent(state, node)
        elif options.action == "crash-supervisor":
            daemons.crash_supervisor(state, node)
        else:
            daemons.signal_agent(state, node, signal.SIGKILL if options.action == "kill" else signal.SIGSTOP)


def clock(layout: Layout, options: argparse.Namespace) -> None:
    """Set the clock of a node's agent."""
    state = live(layout)
    if not state.clocks:
        raise ClusterError("the agents have the machine's clock: scripts/cluster up --clocks")
    state.init(options.node)
    try:
        daemons.set_clock(state, options.node, float(options.offset))
    except ValueError:
        raise ClusterError(f"not a number of seconds: {options.offset!r} (write +90 or -90)") from None


def command_line() -> CommandLine:
    """All subcommands, with their options."""
    line = CommandLine("scripts/cluster", __doc__.split("\n")[0])
    add = line.add("up", up, "install what is missing and start the cluster", locks=True)
    add.add_argument("--nodes", type=int, default=3, choices=range(1, 101), metavar="N", help="default: 3")
    add.add_argument(
        "--link", default="1gbit", metavar="RATE", help="rate of each node's link, or off; default: 1gbit"
    )
    add.add_argument(
        "--store-link",
        default="off",
        metavar="RATE",
        help="rate of the store server's link, which all nodes share; default: off",
    )
    add.add_argument(
        "--private-tmp", action="store_true", help="give each job its own /tmp, by job_container/tmpfs"
    )
    add.add_argument("--no-agent", dest="agent", action="store_false", help="start no node agents")
    add.add_argument(
        "--cpus", type=int, default=4, metavar="N", help="cores that each node claims; default: 4"
    )
    add.add_argument("--clocks", action="store_true", help="give each agent a clock of its own")
    add.add_argument(
        "--kept", action="store_true", help="start agents again whose supervisor is killed, as systemd does"
    )
    add.add_argument("--keep", action="store_true", help="when the start fails, leave what was started")
    add = line.add("down", down, "stop the cluster and delete all it made", locks=True)
    add.add_argument("--keep-logs", action="store_true", help="leave the log files")
    line.add("packages", install_packages, "install what a cluster needs, and start nothing", locks=True)
    line.add("status", status, "show what runs")
    line.add("env", env, "print export lines for a shell on the host")
    add = line.add("exec", execute, "run a command in a node, as root or as a user of the cluster")
    add.add_argument("--user", choices=list(settings.USERS))
    add.add_argument("node", help="login (the controller), store, n1, n2, ...")
    add.add_argument("command", nargs=argparse.REMAINDER)
    add = line.add("logs", logs, "show logs of a node or a daemon")
    add.add_argument("name", nargs="?", help="n1, slurmctld, agent, ...")
    add.add_argument("-f", "--follow", action="store_true")
    add.add_argument("-n", "--lines", type=int, default=40)
    add = line.add("link", link, "change the rate of a link", locks=True)
    add.add_argument("node", help="store, n1, n2, ... or all (the nodes)")
    add.add_argument("rate", help="100mbit, 1gbit, ... or off")
    add = line.add("drop-caches", drop_caches, "forget cached pages on every node", locks=True)
    add.add_argument("--bootseer", action="store_true", help="empty the agents' caches too (restarts them)")
    add.add_argument("--shared", action="store_true", help="mount /shared anew too (restarts the agents)")
    add = line.add("agent", agent, "control the agent of a node, for tests of faults", locks=True)
    add.add_argument("node", help="n1, n2, ... or all")
    add.add_argument("action", choices=["start", "stop", "kill", "crash", "crash-supervisor", "hang"])
    add = line.add("clock", clock, "set the clock of a node's agent (up --clocks)", locks=True)
    add.add_argument("node", help="n1, n2, ...")
    add.add_argument("offset", help="seconds from the machine's clock: +90, -90")
    return line


if __name__ == "__main__":
    sys.exit(command_line().run(Layout.from_environment))
