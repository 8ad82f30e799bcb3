"""The arms of `scripts/bench peers-engines`, and one run of one of them: all nodes get one file.

In a run the store and the nodes start with nothing but the file in the store's page cache. First one node
alone wants 256 KiB; then all processes of the nodes start anew, and all nodes want the whole file at once.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random

import psutil

from scripts.lib.bench import engines_certificates
from scripts.lib.bench.engines_engine import FIRST_BYTES, PATIENCE_S, Task
from scripts.lib.bench.engines_network import STORE, SWITCH, Network
from scripts.lib.bench.engines_torrent import info_hash, information, metainfo
from scripts.lib.cluster.layout import ClusterError

HTTP_PORT = 8080
_REPO = Path(__file__).resolve().parents[3]


@dataclass(frozen=True)
class Arm:
    """One way to the file. seed: how the store takes part in BitTorrent; web: it is a web seed of it.

    tls: peers prove by certificates of the job that they are its own. skew_s: between the first node that
    begins and the last one. slow: the rate of one node's link; then another one is killed in the middle, and
    both count no more.
    """

    name: str
    engine: str
    seed: str = ""
    web: bool = False
    tls: bool = False
    skew_s: float = 0.0
    slow: str = ""


ARMS = (
    Arm("store alone", "direct"),
    Arm("aria2, web seed", "aria2", web=True),
    Arm("aria2, seed", "aria2", seed="seed"),
    Arm("libtorrent, web seed", "libtorrent", web=True),
    Arm("libtorrent, seed", "libtorrent", seed="seed"),
    Arm("libtorrent, seed, TLS", "libtorrent", seed="seed", tls=True),
    Arm("libtorrent, super seed", "libtorrent", seed="super"),
)


@dataclass(frozen=True)
class Inputs:
    """The file that all get, its digest, and the programs that were found (engines.found)."""

    path: Path
    size_bytes: int
    sha256: str
    programs: dict[str, str]


@dataclass(frozen=True)
class Result:
    """One run. firsts_s: of each node, 256 KiB during the transfer. cpu_s: of the engine on all nodes.

    busy: of all cores of this machine. stranger_got: whether another user got bytes; None: was not tried.
    """

    first_quiet_s: float | None
    firsts_s: list[float]
    first_node_s: float
    last_node_s: float
    store_bytes: int
    cpu_s: float
    busy: float
    stranger_got: bool | None


class Program:
    """A process on a machine that is talked to by lines; `read` fails when it says nothing for PATIENCE_S."""

    def __init__(self, network: Network, machine: str, log: Path, *command: str) -> None:
        with log.open("ab") as errors:
            self.process = subprocess.Popen(
                [*network.enter(machine), *command],
                cwd=_REPO,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
        self.log = log

    def write(self, line: str) -> None:
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def read(self) -> str:
        """The next line. Raises ClusterError with the end of the log when there is none."""
        assert self.process.stdout
        timer = threading.Timer(PATIENCE_S + 10, self.process.kill)
        timer.start()
        line = self.process.stdout.readline()
        timer.cancel()
        if not line:
            raise ClusterError(f"a program has ended: {self.log.read_text()[-1500:]}", self.log)
        return line.strip()

    def ask(self, line: str) -> dict[str, object]:
        """The answer to a line."""
        self.write(line)
        return dict(json.loads(self.read()))

    def close(self) -> None:
        """End it: by the end of its input, else by force."""
        assert self.process.stdin and self.process.stdout
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.process.stdout.close()


@dataclass(frozen=True)
class _Run:
    """One run of an arm, as `run_arm` has it."""

    network: Network
    arm: Arm
    inputs: Inputs
    wait_s: float
    random: Random


def run_arm(network: Network, arm: Arm, inputs: Inputs, wait_s: float, random: Random) -> Result:
    """One run of an arm. wait_s: so long after the start each node wants 256 KiB of its own.

    Raises ClusterError when the engine fails, or when a node has other bytes than the store.
    """
    with tempfile.TemporaryDirectory(prefix="bs-eng-", dir="/var/tmp") as name:
        folder = Path(name)
        with _store(network, arm, inputs, folder) as task:
            # A super seed shows a node only the pieces that it chose itself.
            quiet_s = None if arm.seed == "super" else _quiet(network, task, folder, random)
            run = _Run(network, arm, inputs, wait_s, random)
            return replace(_all(run, task, folder), first_quiet_s=quiet_s)


def _quiet(network: Network, task: Task, folder: Path, random: Random) -> float | None:
    with _nodes(network, task, folder / "quiet", network.nodes[:1]) as programs:
        found = programs[0].ask(f"quiet {_offset(task, random)}")["first_s"]
        return found if isinstance(found, float) else None


def _all(run: _Run, task: Task, folder: Path) -> Result:
    network, slow = run.network, run.arm.slow
    with _nodes(network, task, folder / "all", network.nodes) as programs, _slow(network, slow):
        counted = programs[:-2] if slow else programs
        before_bytes = network.store_sent_bytes()
        psutil.cpu_percent()
        start_s = time.monotonic()
        for number, program in enumerate(programs):
            if number and run.arm.skew_s:
                time.sleep(run.arm.skew_s / (len(programs) - 1))
            program.write(f"all {_offset(task, run.random)} {run.wait_s}")
        if slow:
            time.sleep(2 * run.wait_s)
            programs[-1].process.kill()
        answers = [json.loads(program.read()) for program in counted]
        busy = psutil.cpu_percent() / 100
        sent = network.store_sent_bytes() - before_bytes
        done_s = [answer["done_at"] - start_s for answer in answers]
        cpu_s = sum(float(str(program.ask("cpu")["cpu_s"])) for program in counted)
        got = _stranger_got(network, task, run.inputs) if task.torrent else None
        for program in counted:
            if program.ask("check")["sha256"] != run.inputs.sha256:
                raise ClusterError(f"{task.engine}: a node has other bytes than the store")
        firsts_s = [answer["first_s"] for answer in answers]
        return Result(None, firsts_s, min(done_s), max(done_s), sent, cpu_s, busy, got)


@contextlib.contextmanager
def _slow(network: Network, rate: str) -> Iterator[None]:
    """The last node but one has a slow link, where there is a rate."""
    if rate:
        network.limit_node(network.nodes[-2], rate)
    try:
        yield
    finally:
        if rate:
            network.limit_node(network.nodes[-2], "")


def _stranger_got(network: Network, task: Task, inputs: Inputs) -> bool:
    """Whether nobody, on the switch, gets the file's first block from the first node."""
    program = [sys.executable, "-B", "-m", "scripts.lib.bench.engines_stranger"]
    node = network.address(network.nodes[0])
    done = subprocess.run(
        [*network.enter(SWITCH), *program, node, task.info_hash],
        cwd=_REPO,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    with inputs.path.open("rb") as file:
        return done.stdout.strip() == file.read(32).hex()


def _offset(task: Task, random: Random) -> int:
    return random.randrange(task.size_bytes // FIRST_BYTES) * FIRST_BYTES


@contextlib.contextmanager
def _store(network: Network, arm: Arm, inputs: Inputs, folder: Path) -> Iterator[Task]:
    """The store, with the file, the tracker, and where the arm has one a seed; gives the task of a node."""
    address = network.address(STORE)
    url = f"http://{address}:{HTTP_PORT}/{inputs.path.name}"
    task = Task(arm.engine, "", "", url, inputs.size_bytes, programs=inputs.programs)
    if arm.web or arm.seed:
        torrent = folder / "file.torrent"
        announce = f"http://{address}:{HTTP_PORT}/announce"
        info = information(inputs.path, engines_certificates.make(folder) if arm.tls else b"")
        torrent.write_bytes(metainfo(info, announce, url if arm.web else ""))
        certificates = str(folder) if arm.tls else ""
        task = replace(task, torrent=str(torrent), info_hash=info_hash(info), certificates=certificates)
    with contextlib.ExitStack() as stack:
        serve = [sys.executable, "-B", "-m", "scripts.lib.bench.engines_store", address, str(HTTP_PORT)]
        http = Program(network, STORE, folder / "store.log", *serve, str(inputs.path.parent))
        stack.callback(http.close)
        http.read()
        if arm.seed:
            seed = replace(task, mode=arm.seed, address=address, folder=str(inputs.path.parent))
            stack.callback(_started(network, STORE, seed, folder / "seed.log").close)
        yield task


@contextlib.contextmanager
def _nodes(network: Network, task: Task, folder: Path, nodes: tuple[str, ...]) -> Iterator[list[Program]]:
    """The task's engine on these nodes, ready, each with an empty folder."""
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        programs = []
        for node in nodes:
            place = folder / node
            place.mkdir(parents=True)
            others = [network.address(other) for other in (STORE, *nodes) if other != node]
            own = replace(task, address=network.address(node), folder=str(place), peers=others)
            programs.append(_started(network, node, own, folder / f"{node}.log"))
            stack.callback(programs[-1].close)
        yield programs


def _started(network: Network, machine: str, task: Task, log: Path) -> Program:
    python = task.programs.get("python with libtorrent", sys.executable)
    program = Program(
        network, machine, log, python, "-B", "-m", "scripts.lib.bench.engines_node", json.dumps(asdict(task))
    )
    try:
        program.read()
    except ClusterError:
        program.close()
        raise
    return program
