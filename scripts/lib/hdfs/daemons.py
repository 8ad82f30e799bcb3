"""The NameNode and the DataNodes: their jars, their settings, and how they are started and looked at.

Each runs in a machine of its own: a network, PID and mount namespace on a bridge (cluster/network.py), with
the host's files as they are. The NameNode is on the controller, DataNode i on n<i>.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from xml.sax.saxutils import escape

from scripts.lib.cluster import namespaces, packages
from scripts.lib.cluster.daemons import accepts, await_ready, start_daemon
from scripts.lib.cluster.layout import CONTROLLER, ClusterError, Layout, State, poll

POM = Path(__file__).with_name("pom.xml")
PACKAGES = ["iproute2"]
JAVA_PACKAGES = ["maven", "openjdk-17-jre-headless"]  # where neither is on PATH
RPC_PORT, HTTP_PORT, DATA_PORT = 8020, 9870, 9866
HEAP_MIB = 256
# Java 17 closes what Hadoop looks into.
OPENED = ("java.base/java.lang=ALL-UNNAMED", "java.base/java.nio=ALL-UNNAMED")
LOG4J = """log4j.rootLogger=WARN,console
log4j.appender.console=org.apache.log4j.ConsoleAppender
log4j.appender.console.target=System.err
log4j.appender.console.layout=org.apache.log4j.PatternLayout
log4j.appender.console.layout.ConversionPattern=%d{ISO8601} %p %c{2}: %m%n
"""
NAMENODE = "org.apache.hadoop.hdfs.server.namenode.NameNode"
DATANODE = "org.apache.hadoop.hdfs.server.datanode.DataNode"


def jars() -> Path:
    """The folder of Hadoop's jars for this pom.xml, kept between runs."""
    return Path(f"/var/tmp/bootseer-hadoop-{hashlib.sha256(POM.read_bytes()).hexdigest()[:12]}")


def install() -> None:
    """Install Java, and fetch the jars, where they are missing. Raises ClusterError."""
    has_java = shutil.which("java") and shutil.which("mvn")
    if needed := packages.missing([*PACKAGES, *([] if has_java else JAVA_PACKAGES)]):
        packages.install(needed)
    if jars().exists():
        return
    draft = jars().with_name(f"{jars().name}.{os.getpid()}")
    command = ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies"]
    command += [f"-DoutputDirectory={draft}", "-DincludeScope=runtime"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        shutil.rmtree(draft, ignore_errors=True)
        raise ClusterError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}")
    with contextlib.suppress(OSError):  # another one was faster
        draft.rename(jars())
    shutil.rmtree(draft, ignore_errors=True)


def make_machine(state: State, node: str) -> None:
    """Make the namespaces of the NameNode or of a DataNode; record its first process."""

    def prepare() -> None:
        namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_SLAVE)
        namespaces.mount("proc", "/proc", "proc")
        namespaces.mount(state.layout.etc / "hosts", "/etc/hosts", flags=namespaces.MS_BIND)

    log = state.layout.log(node, "init")
    namespaces.create(node, prepare, lambda process: state.add(node, "init", process), log)


def write_settings(layout: Layout, nodes: list[str], replication: int) -> None:
    """Each machine's core-site.xml and hdfs-site.xml, and the hosts file of all."""
    layout.etc.mkdir()
    names = "".join(f"{layout.address(node)} {node}\n" for node in (CONTROLLER, *nodes))
    (layout.etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    for node in (CONTROLLER, *nodes):
        folder, data = layout.etc / node, layout.dir / node
        folder.mkdir()
        data.mkdir(mode=0o700)
        (folder / "log4j.properties").write_text(LOG4J)
        # Where Hadoop's release has its pages, which are in no jar: it wants the folders.
        for name in ("hdfs", "datanode"):
            (folder / "webapps" / name).mkdir(parents=True)
        _write_xml(folder / "core-site.xml", {"fs.defaultFS": uri(layout)})
        _write_xml(
            folder / "hdfs-site.xml",
            {
                "dfs.replication": str(replication),
                "dfs.namenode.name.dir": f"file://{data}/name",
                "dfs.namenode.rpc-bind-host": "0.0.0.0",
                "dfs.namenode.http-address": f"0.0.0.0:{HTTP_PORT}",
                "dfs.namenode.datanode.registration.ip-hostname-check": "false",
                # A killed DataNode is dead for the NameNode after some seconds, not after ten minutes.
                "dfs.heartbeat.interval": "1",
                "dfs.namenode.heartbeat.recheck-interval": "1000",
                "dfs.namenode.safemode.extension": "0",
                # All share this machine's cores: a DataNode's late heartbeat would make it look busy.
                "dfs.namenode.redundancy.considerLoad": "false",
                "dfs.datanode.data.dir": f"file://{data}/data",
                "dfs.datanode.hostname": layout.address(node),
                # Blocks are verified when they are read; nothing else shall read the disk.
                "dfs.datanode.scan.period.hours": "-1",
            },
        )


def _write_xml(path: Path, values: dict[str, str]) -> None:
    rows = [
        f"  <property><name>{name}</name><value>{escape(value)}</value></property>"
        for name, value in values.items()
    ]
    path.write_text("\n".join(["<configuration>", *rows, "</configuration>"]) + "\n")


def uri(layout: Layout) -> str:
    """How clients name the file system."""
    return f"hdfs://{layout.address(CONTROLLER)}:{RPC_PORT}"


def _java(layout: Layout, node: str, *arguments: str) -> list[str]:
    opened = [f"--add-opens={each}" for each in OPENED]
    path = f"{layout.etc / node}:{jars()}/*"
    # What its web server unpacks goes with the state.
    temporary = f"-Djava.io.tmpdir={layout.etc / node}"
    return ["java", f"-Xmx{HEAP_MIB}m", "-XX:+UseSerialGC", temporary, *opened, "-cp", path, *arguments]


def format_namenode(state: State) -> None:
    """Make an empty file system. Raises ClusterError."""
    command = _java(state.layout, CONTROLLER, NAMENODE, "-format", "-nonInteractive")
    namespaces.run(state.init(CONTROLLER), command, timeout_s=120)


def start_namenode(state: State) -> None:
    """Start it, and wait until it answers."""
    start_daemon(state, CONTROLLER, "namenode", _java(state.layout, CONTROLLER, NAMENODE))
    await_ready(state, CONTROLLER, "namenode", lambda: _live_nodes(state) is not None, timeout_s=60)


def start_datanode(state: State, node: str) -> None:
    """Start one; `wait_live` tells when it has registered."""
    start_daemon(state, node, "datanode", _java(state.layout, node, DATANODE))


def wait_live(state: State, count: int, timeout_s: float = 60) -> None:
    """Wait until so many DataNodes are live, and files can be written. Raises ClusterError.

    A DataNode that was killed is live for the NameNode for some seconds more, so each is asked too.
    """
    addresses = [(state.layout.address(node), DATA_PORT) for node in state.nodes]

    def is_live() -> bool:
        return all(map(accepts, addresses)) and _live_nodes(state) == count

    if not poll(is_live, timeout_s, interval_s=0.2):
        log = state.layout.log(state.nodes[0], "datanode")
        raise ClusterError(f"{_live_nodes(state)} of {count} DataNodes are live after {timeout_s:g} s", log)


def _live_nodes(state: State) -> int | None:
    """How many DataNodes the NameNode has; None when it does not answer, or is in safe mode."""
    base = f"http://{state.layout.address(CONTROLLER)}:{HTTP_PORT}/jmx?qry=Hadoop:service=NameNode,name="
    try:
        with urllib.request.urlopen(f"{base}FSNamesystemState", timeout=5) as reply:
            found = json.load(reply)["beans"][0]
        with urllib.request.urlopen(f"{base}NameNodeInfo", timeout=5) as reply:
            safe_mode = json.load(reply)["beans"][0]["Safemode"]
        return None if safe_mode and found["NumLiveDataNodes"] else int(found["NumLiveDataNodes"])
    except (OSError, ValueError, LookupError):
        return None
