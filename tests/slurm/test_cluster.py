"""scripts/cluster: what it promises to those who build on it, and that it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.lib.cluster.client import BOOTSEER
from scripts.lib.cluster.layout import poll

pytestmark = pytest.mark.slurm

SECONDS = 2.0
RECEIVE = """
import socket, sys, time
listener = socket.create_server(("", 9009))
print("ready", flush=True)
connection = listener.accept()[0]
connection.recv(1 << 20)
start, count = time.monotonic(), 0
while data := connection.recv(1 << 20):
    count += len(data)
print(count * 8 / (time.monotonic() - start))
"""
SEND = f"""
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 9009))
end, data = time.monotonic() + {SECONDS}, bytes(1 << 18)
while time.monotonic() < end:
    connection.sendall(data)
"""


def goodput_bits(cluster: Any, sender: str, receiver: str, address: str) -> float:
    """Bits per second of one TCP stream."""
    argv = [str(cluster_script()), "exec", receiver, "python3", "-c", RECEIVE]
    env = os.environ | {"BOOTSEER_CLUSTER_DIR": str(cluster.state_dir)}
    with subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stdout.readline() == "ready\n"
        done = cluster.exec(sender, "python3", "-c", SEND, address)
        assert done.returncode == 0, done.stderr
        return float(process.stdout.read())


def cluster_script() -> Path:
    return Path(__file__).resolve().parents[2] / "scripts" / "cluster"


def traces(state_dir: Path) -> dict[str, set[str]]:
    """Everything of the machine that a cluster could leave behind."""
    mounts = {line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    processes = set()
    for command in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            text = command.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(state_dir) in text or "cluster/init.py" in text:
            processes.add(f"{command.parent.name} {text}")
    return {
        "links": {path.name for path in Path("/sys/class/net").iterdir()},
        "mounts": {mount for mount in mounts if "bootseer-cluster" in mount or mount == "/shared"},
        "processes": processes,
        "files": {
            str(path)
            for name in ("/run", "/", "/etc", "/var/lib", "/var/spool")
            for path in Path(name).iterdir()
        }
        | {str(path) for path in state_dir.parent.glob(f"{state_dir.name}*")},
    }


def test_nodes_are_idle(cluster: Any) -> None:
    done = cluster.exec("login", "sinfo", "-hN", "-o", "%N %T")
    assert done.stdout.split("\n")[:3] == ["n1 idle", "n2 idle", "n3 idle"]


def test_up_again_is_harmless(cluster: Any) -> None:
    before = cluster.script("status").stdout
    assert "is up" in cluster.script("up", "--nodes", "3").stdout
    assert cluster.script("status").stdout.split("\n\n")[0] == before.split("\n\n")[0]


def test_job_of_three_nodes(cluster: Any) -> None:
    job_id = cluster.sbatch("srun hostname", "--nodes=3", "--job-name=three")
    assert cluster.wait(job_id) == "COMPLETED"
    output = cluster.shared / "home/alice" / f"slurm-{job_id}.out"
    assert sorted(output.read_text().split()) == cluster.nodes
    assert output.stat().st_uid == 20001
    row = cluster.exec(
        "login", "sacct", "-nPX", "-j", str(job_id), "-o", "User,Account,JobName,NNodes,ExitCode"
    ).stdout
    assert row == "alice|research|three|3|0:0\n"


def test_job_array(cluster: Any) -> None:
    job_id = cluster.sbatch('test "$SLURM_ARRAY_TASK_ID" != 5', "--array=1-6", "--output=/dev/null")
    assert cluster.wait(job_id) == "COMPLETED,FAILED"


def test_users_run_commands_on_nodes(cluster: Any) -> None:
    done = cluster.exec("n2", "srun", "--nodes=2", "--label", "id", "-un", user="bob")
    assert (done.returncode, sorted(done.stdout.splitlines())) == (0, ["0: bob", "1: bob"]), done.stderr
    assert cluster.exec("n1", "sh", "-c", "hostname; exit 7").returncode == 7


def test_shared_is_remote(cluster: Any) -> None:
    for node in cluster.nodes:
        done = cluster.exec(node, "stat", "--file-system", "--format=%T", "/shared")
        assert done.stdout == "fuseblk\n"
        assert " /shared fuse.sshfs " in cluster.exec(node, "cat", "/proc/mounts").stdout


def test_shared_belongs_to_its_users(cluster: Any) -> None:
    code = (
        "umask 027; mkdir -p d && echo a > d/f && echo b >> d/f && mv d/f d/g && umask 077 && echo s > secret"
    )
    assert cluster.exec("n1", "sh", "-c", code, user="alice").returncode == 0
    done = cluster.exec("n2", "stat", "--format=%n %u %g %a", "d", "d/g", "secret", user="alice")
    assert done.stdout == "d 20001 20001 750\nd/g 20001 20001 640\nsecret 20001 20001 600\n"
    home = cluster.shared / "home/alice"
    assert (home / "d/g").read_text() == "a\nb\n"
    seen = cluster.exec("n3", "stat", "--format=%Y", "/shared/home/alice/secret")
    assert int(seen.stdout) == int((home / "secret").stat().st_mtime)

    home.chmod(0o755)
    try:
        time.sleep(2)  # as long as a node may show the old mode
        done = cluster.exec("n2", "cat", "/shared/home/alice/secret", user="bob")
    finally:
        home.chmod(0o700)
    assert done.returncode != 0 and "Permission denied" in done.stderr


def test_group_folder(cluster: Any) -> None:
    assert (
        cluster.exec("n1", "sh", "-c", "umask 002; echo 1 > /shared/data/team", user="alice").returncode == 0
    )
    assert cluster.exec("n2", "sh", "-c", "echo 2 >> /shared/data/team", user="bob").returncode == 0
    assert (cluster.shared / "data/team").read_text() == "1\n2\n"
    assert (cluster.shared / "data/team").stat().st_gid == 20000


@pytest.mark.parametrize("rate", ["100mbit", "500mbit", "1gbit"])
def test_link_has_its_rate(cluster: Any, rate: str) -> None:
    bits = {"100mbit": 100e6, "500mbit": 500e6, "1gbit": 1e9}[rate]
    cluster.script("link", "n3", rate)
    try:
        down, up = goodput_bits(cluster, "login", "n3", "n3"), goodput_bits(cluster, "n3", "login", "ctl")
    finally:
        cluster.script("link", "n3", "1gbit")
    assert 0.93 * bits < down < bits
    assert 0.93 * bits < up < bits


def test_the_store_has_a_link_that_its_readers_share(cluster: Any) -> None:
    size_bytes = 10_000_000
    readers = ["n1", "n2"]
    for node in readers:
        (cluster.shared / "data" / node).write_bytes(os.urandom(size_bytes))

    def read_s() -> dict[str, float]:
        """Seconds that each needs, when both read at once."""
        cluster.script("drop-caches")
        for node in readers:
            (cluster.shared / "data" / node).read_bytes()  # the server's disk is not what is measured
        code = "import sys, time; t = time.monotonic(); open(sys.argv[1], 'rb').read(); print(time.monotonic() - t)"
        running = {
            node: cluster.start(node, "python3", "-c", code, f"/shared/data/{node}") for node in readers
        }
        return {node: float(process.communicate(timeout=60)[0]) for node, process in running.items()}

    try:
        for rate, bits in (("80mbit", 80e6), ("160mbit", 160e6)):  # live: nothing is started anew
            cluster.script("link", "store", rate)
            before_bytes = cluster.store_sent_bytes
            taken_s = read_s()
            sent_bytes = cluster.store_sent_bytes - before_bytes
            expected_s = 2 * size_bytes * 8 / bits
            assert 0.95 * expected_s < max(taken_s.values()) < 1.3 * expected_s, rate
            assert min(taken_s.values()) > 0.6 * expected_s, "one of them had more than its share"
            assert 2 * size_bytes < sent_bytes < 1.1 * 2 * size_bytes
        assert "store=160mbit" in cluster.script("status").stdout
        assert goodput_bits(cluster, "login", "n3", "n3") > 0.9e9, "only storage is limited"
        assert goodput_bits(cluster, "store", "n3", "n3") < 160e6
        assert goodput_bits(cluster, "n3", "store", "store") < 160e6
    finally:
        cluster.script("link", "store", "off")
    assert goodput_bits(cluster, "store", "n3", "n3") > 0.9e9


def test_drop_caches_makes_nodes_cold(cluster: Any) -> None:
    size_bytes = 20_000_000
    (cluster.shared / "data/cold").write_bytes(os.urandom(size_bytes))

    def received_bytes() -> int:
        # Not from /sys: a node sees the host's.
        for line in cluster.exec("n1", "cat", "/proc/net/dev").stdout.splitlines():
            if line.strip().startswith("eth0:"):
                return int(line.split(":")[1].split()[0])
        raise AssertionError("no eth0")

    cluster.exec("n1", "cksum", "/shared/data/cold")
    cluster.script("drop-caches")
    before = received_bytes()
    assert cluster.exec("n1", "cksum", "/shared/data/cold").stdout.split()[1] == str(size_bytes)
    assert received_bytes() - before > size_bytes


def test_drop_caches_can_mount_shared_anew(cluster: Any) -> None:
    """A node that knew a file which another machine removed can write it again."""
    write = "echo {} > /shared/data/new && mv /shared/data/new /shared/data/again"
    assert cluster.exec("n1", "sh", "-c", write.format("one")).returncode == 0
    (cluster.shared / "data/again").unlink()
    cluster.script("drop-caches", "--shared")
    assert cluster.exec("n1", "sh", "-c", write.format("two")).returncode == 0
    assert (cluster.shared / "data/again").read_text() == "two\n"
    for node in cluster.nodes:
        mounts = cluster.exec(node, "cat", "/proc/mounts").stdout
        assert mounts.count(" /shared ") == 1
        assert cluster.exec(node, "ls", "/shared").stdout.split() == ["bootseer", "data", "home"]
        status = cluster.script("status").stdout
        assert not any(line.startswith(node) and "DEAD" in line for line in status.splitlines())


def test_down_leaves_nothing(spare_cluster: Any) -> None:
    before = traces(spare_cluster.state_dir)
    spare_cluster.script("up", "--nodes", "1", "--no-agent")
    assert spare_cluster.exec("login", "srun", "hostname", user="bob").stdout == "n1\n"
    during = traces(spare_cluster.state_dir)
    assert len(during["links"] - before["links"]) == 1
    assert (during["mounts"], during["files"] - before["files"]) == (
        before["mounts"],
        {str(spare_cluster.state_dir)},
    )
    spare_cluster.script("down")
    assert traces(spare_cluster.state_dir) == before
    assert "no cluster" in spare_cluster.script("down").stdout


def test_an_agent_has_a_clock_of_its_own_and_a_node_as_many_cores_as_it_claims(spare_cluster: Any) -> None:
    day_s = 86400
    spare_cluster.script("up", "--nodes", "1", "--clocks", "--cpus", "24")
    spare_cluster.script("clock", "n1", "--", f"{-day_s}")
    spare_cluster.agent("n1", "crash")  # the next one tells when it was started

    def behind_s() -> float:
        status = json.loads(spare_cluster.run("n1", BOOTSEER, "status"))
        return time.time() - float(status["start_ns"]) / 1e9

    assert poll(lambda: day_s <= behind_s() < day_s + 60, timeout_s=30)
    assert abs(time.time() - float(spare_cluster.run("n1", "date", "+%s"))) < 5, "the node has the machine's"
    assert spare_cluster.run("login", "sinfo", "--noheader", "--format=%c") == "24\n"


def test_start_that_was_killed_is_taken_down(spare_cluster: Any) -> None:
    before = traces(spare_cluster.state_dir)
    env = os.environ | {"BOOTSEER_CLUSTER_DIR": str(spare_cluster.state_dir)}
    record = spare_cluster.state_dir / "state.json"
    for reached in ("ctl/init", "n1/sshfs", "ctl/slurmdbd"):
        argv = [str(cluster_script()), "up", "--nodes", "1", "--no-agent"]
        with subprocess.Popen(argv, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            while not (record.exists() and reached in record.read_text()):
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        spare_cluster.script("down")
        assert traces(spare_cluster.state_dir) == before, reached


def test_start_that_fails_says_why_and_is_taken_down(spare_cluster: Any) -> None:
    links = traces(spare_cluster.state_dir)["links"]
    spare_cluster.script("up", "--nodes", "1", "--no-agent", "--link", "off")
    (name,) = traces(spare_cluster.state_dir)["links"] - links
    spare_cluster.script("down")
    subprocess.run(["ip", "link", "add", name, "type", "bridge"], check=True)
    try:
        before = traces(spare_cluster.state_dir)
        done = spare_cluster.script("up", "--nodes", "1", "--no-agent", check=False)
        assert done.returncode == 1
        assert f"ip link add {name}" in done.stderr and "Traceback" not in done.stderr
        assert traces(spare_cluster.state_dir) == before
    finally:
        subprocess.run(["ip", "link", "del", name], check=True)
