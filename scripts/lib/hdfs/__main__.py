"""A real HDFS on one machine: a NameNode and DataNodes of Apache Hadoop, each in a network of its own.

    scripts/hdfs up --datanodes 3 --link 800mbit
    scripts/hdfs uri
    scripts/hdfs down

See docs/cluster.md. Runs as root, with the standard library only.
"""

from __future__ import annotations

import argparse
import signal
import sys
from functools import partial

from scripts.lib.cluster import network
from scripts.lib.cluster.command import CommandLine, progress
from scripts.lib.cluster.ending import print_log_of, take_down
from scripts.lib.cluster.layout import CONTROLLER, ClusterError, Layout, State, live
from scripts.lib.hdfs import daemons

DEFAULT_DIR = "/var/tmp/bootseer-hdfs"


def up(layout: Layout, options: argparse.Namespace) -> None:
    """Start it, or say that it is up already."""
    state = State.load(layout)
    if state and state.up:
        if len(state.nodes) != options.datanodes:
            raise ClusterError(f"one with {len(state.nodes)} DataNodes is up: scripts/hdfs down first")
        print(f"it is up: {daemons.uri(layout)}")
        return
    if options.link != "off":
        network.rate_bits(options.link)
    take_down(layout)
    install()
    layout.dir.mkdir(parents=True, mode=0o755)
    state = State(layout, nodes=[f"n{number}" for number in range(1, options.datanodes + 1)])
    state.save()
    try:
        start(state, options)
    except BaseException as error:
        print_log_of(error)
        progress("failed: taking down what was started")
        take_down(layout)
        raise


def install(*_: object) -> None:
    """Install Java and fetch Hadoop, where they are missing."""
    if not daemons.jars().exists():
        progress("fetching Hadoop from Maven Central")
    daemons.install()


def start(state: State, options: argparse.Namespace) -> None:
    """Start everything, in the order of what needs what."""
    layout = state.layout
    (layout.dir / "log").mkdir()
    daemons.write_settings(layout, state.nodes, options.replication)
    daemons.make_machine(state, CONTROLLER)
    network.connect_host(state)
    for node in state.nodes:
        daemons.make_machine(state, node)
        network.connect_machine(state, node)
        network.set_link(state, node, options.link)
    progress(f"{len(state.nodes)} DataNodes' networks, links {options.link}")
    daemons.format_namenode(state)
    daemons.start_namenode(state)
    progress("NameNode up")
    for node in state.nodes:
        daemons.start_datanode(state, node)
    daemons.wait_live(state, len(state.nodes))
    state.phase = "up"
    state.save()
    progress(f"DataNodes live: {daemons.uri(layout)}")


def down(layout: Layout, options: argparse.Namespace) -> None:
    """Stop it and delete all it made; fine when there is none."""
    there = layout.dir.exists()
    take_down(layout, keep_logs=options.keep_logs)
    progress("down" if there else "no HDFS is there")


def show_uri(layout: Layout, _options: argparse.Namespace) -> None:
    """Print the URI of the file system that is up."""
    live(layout)
    print(daemons.uri(layout))


def link(layout: Layout, options: argparse.Namespace) -> None:
    """Change the rate of a DataNode's link."""
    state = live(layout)
    for node in state.nodes if options.node == "all" else [options.node]:
        network.set_link(state, node, options.rate)


def control(layout: Layout, options: argparse.Namespace) -> None:
    """Kill, hang or start a daemon, for tests of faults."""
    state = live(layout)
    node = CONTROLLER if options.node == "namenode" else options.node
    name = "namenode" if node == CONTROLLER else "datanode"
    state.init(node)
    process = state.process(node, name)
    alive = process is not None and process.alive
    if options.action == "start":
        if process and alive:
            process.signal(signal.SIGCONT)  # it may hang, or be well
        elif node == CONTROLLER:
            daemons.start_namenode(state)
        else:
            daemons.start_datanode(state, node)
        return
    if process is None or not alive:
        raise ClusterError(f"no {name} runs on {node}")
    process.signal(signal.SIGKILL if options.action == "kill" else signal.SIGSTOP)
    if options.action == "kill":
        process.wait(10)


def wait(layout: Layout, _options: argparse.Namespace) -> None:
    """Wait until all its DataNodes are live, and files can be read and written."""
    state = live(layout)
    daemons.wait_live(state, len(state.nodes))


def command_line() -> CommandLine:
    """All subcommands, with their options."""
    line = CommandLine("scripts/hdfs", __doc__.split("\n")[0])
    command = partial(line.add, locks=True)
    add = command("up", up, "install what is missing and start it")
    add.add_argument("--datanodes", type=int, default=3, choices=range(1, 33), metavar="N", help="default: 3")
    add.add_argument("--link", default="off", metavar="RATE", help="of each DataNode, or off; default: off")
    add.add_argument(
        "--replication", type=int, default=1, choices=range(1, 33), metavar="N", help="default: 1"
    )
    add = command("down", down, "stop it and delete all it made")
    add.add_argument("--keep-logs", action="store_true", help="leave the log files")
    command("install", install, "install what it needs, and start nothing")
    command("uri", show_uri, "print its URI")
    command("wait", wait, "wait until all DataNodes are live")
    add = command("link", link, "change the rate of a DataNode's link")
    add.add_argument("node", help="n1, n2, ... or all")
    add.add_argument("rate", help="100mbit, 1gbit, ... or off")
    add = command("control", control, "kill, hang or start a daemon, for tests of faults")
    add.add_argument("node", help="namenode, n1, n2, ...")
    add.add_argument("action", choices=["start", "kill", "hang"])
    return line


if __name__ == "__main__":
    sys.exit(command_line().run(partial(Layout.from_environment, "BOOTSEER_HDFS_DIR", DEFAULT_DIR)))
