"""Containers' images, from the importer to the files inside: a small driver does what pyxis and enroot do.

`bootseer-importer get`, squashfuse of the path as the job's user in a user namespace, everything in it read,
`release`. Each fault that a start can meet is made to happen, and no start gets a wrong byte.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from bootseer_slurm.blob.trace import decode
from bootseer_slurm.image.signing import make_key
from tests.integration.node import ALICE, BOB, Node, node_of, wait_until

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
    pytest.mark.skipif(shutil.which("squashfuse") is None, reason="no squashfuse"),
]
STAND_IN = Path(__file__).parents[2] / "libexec" / "squashfuse"
# As enroot does: a user and mount namespace, squashfuse in the background, a look whether it is mounted.
ENTER = """
set -e
squashfuse -f -o uid=0,gid=0 "$1" "$2" &
for _ in $(seq 400); do mountpoint -q "$2" && break; sleep 0.01; done
mountpoint -q "$2"
stat -f -c %T "$2"
for name in $3; do sha256sum < "$2/$name" | cut -c1-64; done
umount "$2" || umount -l "$2"
"""
FUSE, KERNEL = "fuseblk", "squashfs"  # as stat(1) calls them
FILES = 24
FILE_BYTES = 700_000


class Containers:
    """A node with an image of alice's in its store, and what starts containers from it."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.tree = node.folder / "data" / "tree"
        self.name = f"dir:{self.tree}"
        self.digests: dict[str, str] = {}
        self.tree.mkdir()
        for number in range(FILES):
            content = random.Random(number).randbytes(FILE_BYTES)
            (self.tree / f"f{number:02}").write_bytes(content)
            self.digests[f"f{number:02}"] = hashlib.sha256(content).hexdigest()
        for path in (self.tree, *self.tree.iterdir()):
            os.chown(path, ALICE, ALICE)
        self.tools = node.folder / "libexec"
        self.tools.mkdir()
        text = STAND_IN.read_text().replace("/run/bootseer", str(node.run))
        # A busy machine may take longer than enroot waits; then the real one would be used, rightly.
        (self.tools / "squashfuse").write_text(text.replace("\nDEADLINE_S = 0.2 ", "\nDEADLINE_S = 20 "))
        (self.tools / "squashfuse").chmod(0o755)
        self.jobs = 0

    def push(self) -> None:
        assert "stored" in self.node.bootseer("image", "push", self.name)

    def begin(self, uid: int = ALICE, **wishes: object) -> int:
        """A job's prolog; gives its number."""
        self.jobs += 1
        self.node.ask(
            "prolog", JOB_ID=self.jobs, UID=uid, BOOTSEER=1, JOB_NAME="train", ACCOUNT="a", **wishes
        )
        return self.jobs

    def environ(self, job: int, uid: int = ALICE) -> dict[str, str]:
        return {
            "PATH": f"{self.tools}:/usr/bin:/bin",
            "HOME": str(self.node.folder / "data"),
            "BOOTSEER_CONFIG": str(self.node.config),
            "BOOTSEER_AGENT_SOCKET": str(self.node.socket),
            "SLURM_JOB_ID": str(job),
            "SLURM_STEP_ID": "0",
            "SLURM_JOB_UID": str(uid),
            "PYXIS_RUNTIME_PATH": str(self.node.folder / "pyxis"),
            "TMPDIR": str(self.node.folder / "data"),
        }

    def importer(self, job: int, *words: str, uid: int = ALICE) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(Path(sys.executable).with_name("bootseer-importer")), *words],
            env=self.environ(job, uid),
            user=uid,
            group=uid,
            extra_groups=[],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def get(self, job: int) -> str:
        """The path that pyxis would be given."""
        done = self.importer(job, "get", f"docker://{self.name}")
        assert done.returncode == 0, done.stderr + self.node.log
        return done.stdout.strip()

    def enter(self, job: int, path: str, names: list[str], uid: int = ALICE) -> subprocess.Popen[str]:
        """A container that reads these files, in this order."""
        target = self.node.folder / "data" / f"root{job}.{uid}"
        target.mkdir(exist_ok=True)
        os.chown(target, uid, uid)
        command = ["unshare", "-Urm", "sh", "-c", ENTER, "sh", path, str(target), " ".join(names)]
        return subprocess.Popen(
            command,
            env=self.environ(job, uid),
            user=uid,
            group=uid,
            extra_groups=[],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, job: int, names: list[str]) -> str:
        """A whole start that reads the right bytes; gives the type of the file system it read from."""
        return self.finish(self.enter(job, self.get(job), names), names)

    def finish(self, container: subprocess.Popen[str], names: list[str]) -> str:
        output, errors = container.communicate(timeout=100)
        assert container.returncode == 0, errors + self.node.log
        kind, *digests = output.split()
        assert digests == [self.digests[name] for name in names]
        return kind

    def end(self, job: int) -> list[dict[str, object]]:
        """The job's epilog; gives its events."""
        assert self.importer(job, "release").returncode == 0
        assert self.importer(job, "release").returncode == 0
        self.node.ask("epilog", JOB_ID=job)
        return self.node.events(job)

    def rest(self) -> None:
        """Wait until no session uses the cache any more."""
        wait_until(lambda: not list((self.node.run / "cache").iterdir()))

    def cool(self) -> None:
        """Take the image from the node."""
        self.rest()
        shutil.rmtree(self.cached().parent)

    def blob(self) -> Path:
        """The image's bytes in the store."""
        (path,) = (self.node.folder / "store/users" / str(ALICE) / "blobs").glob("*/0")
        return path

    def cached(self) -> Path:
        """The image's bytes on the node."""
        (path,) = (self.node.folder / "cache" / str(ALICE)).glob("*/data")
        return path


NAMES = [f"f{number:02}" for number in (7, 3, 20, 11, 5)]


@pytest.fixture(scope="module", autouse=True)
def fuse_for_all() -> Iterator[None]:
    """Every user may open /dev/fuse, as udev has it everywhere; not so on a machine without udev."""
    mode = Path("/dev/fuse").stat().st_mode & 0o777
    Path("/dev/fuse").chmod(0o666)
    yield
    Path("/dev/fuse").chmod(mode)


@pytest.fixture
def containers() -> Iterator[Containers]:
    with node_of() as node:
        made = Containers(node)
        made.push()
        node.start()
        yield made


def one(events: list[dict[str, object]], kind: str, name: str) -> dict[str, object]:
    (event,) = (event for event in events if (event["kind"], event["name"]) == (kind, name))
    return event


def names_of(events: list[dict[str, object]], kind: str) -> set[object]:
    return {event["name"] for event in events if event["kind"] == kind}


def test_an_image_starts_and_its_blocks_are_prefetched_at_the_next_start(containers: Containers) -> None:
    first = containers.begin()
    assert containers.start(first, NAMES) == FUSE
    containers.node.ask("mark", JOB_ID=first, NAME="training_started", TIME_NS=time.time_ns())
    events = containers.end(first)
    assert "hot" not in names_of(events, "prefetch")
    traces = list((containers.node.folder / "store/users" / str(ALICE) / "traces").glob("*/*/*"))
    assert [path.name for path in traces] == [f"1.0.{os.uname().nodename.split('.')[0]}"]
    # The learned plan: nobody names the image before the container starts.
    containers.cool()
    second = containers.begin()
    hot = containers.node.run / "events" / f"{second}.0"
    wait_until(lambda: '"name":"hot"' in hot.read_text())
    containers.start(second, NAMES)
    events = containers.end(second)
    assert one(events, "plan", "learned")["target"] == containers.name
    blocks = int(str(one(events, "prefetch", "hot")["blocks"]))
    assert 5 * FILE_BYTES / 2**16 < blocks < 100, "five files of 24, and the tables"
    assert one(events, "access", "summary")["reads_blocked"] == 0
    fetched = [
        event for event in events if event["kind"] == "prefetch" and event["name"] in ("end", "stopped")
    ]
    assert int(str(fetched[0]["bytes"])) <= blocks * 2**16


def test_no_more_is_brought_of_a_learned_image_once_tasks_start_without_it() -> None:
    with node_of('[prefetch]\nhot_wait = "100ms"\n') as node:
        containers = Containers(node)
        containers.push()
        node.start("""
from bootseer_slurm.cache import reader
fast = reader.Reader.prefetch_blocks
def slow(*arguments, **options):
    time.sleep(0.5)
    return fast(*arguments, **options)
reader.Reader.prefetch_blocks = slow
""")
        first = containers.begin()
        containers.start(first, list(containers.digests))
        node.ask("mark", JOB_ID=first, NAME="training_started", TIME_NS=time.time_ns())
        containers.end(first)
        containers.cool()
        second = containers.begin()
        told = node.run / "events" / f"{second}.0"
        wait_until(lambda: '"kind":"prefetch","name":"begin"' in told.read_text())
        task = {"JOB_ID": second, "NAME": "task_start", "TIME_NS": time.time_ns(), "TASK": 0}
        node.ask("stage", STEP_ID="batch", **task)
        assert '"stopped"' not in told.read_text(), "a script may start a container later"
        node.ask("stage", STEP_ID=0, **task)
        assert '"stopped"' in told.read_text()
        time.sleep(2)
        assert containers.cached().stat().st_blocks * 512 < FILES * FILE_BYTES // 2
        containers.start(second, NAMES)  # of a later step: then it is brought after all
        assert names_of(containers.end(second), "prefetch") >= {"begin", "stopped"}
        third = containers.begin()
        wait_until(lambda: '"learned"' in (node.run / "events" / f"{third}.0").read_text())
        node.ask("stage", STEP_ID=0, **task | {"JOB_ID": third})
        node.ask("epilog", JOB_ID=third)
        node.events(third)
        fourth = containers.begin()
        time.sleep(2)
        node.ask("epilog", JOB_ID=fourth)
        assert "learned" not in names_of(node.events(fourth), "plan"), "the last start did not want it"


def test_the_kernel_mounts_what_an_agent_packed_and_nothing_else(containers: Containers) -> None:
    job = containers.begin()
    assert containers.start(job, NAMES) == FUSE, "a user packed it"
    containers.end(job)
    make_key(containers.node.folder / "site.key")
    containers.node.bootseer("image", "rm", containers.name)
    containers.node.crash()
    job = containers.begin()
    assert containers.start(job, NAMES) == KERNEL, containers.node.log
    events = containers.end(job)
    assert "kernel_mount_failed" not in names_of(events, "fault")
    # The signature is of this image and this user: on another's bytes it is worth nothing.
    record = next((containers.node.folder / "store/users" / str(ALICE) / "names").iterdir())
    text = record.read_text()
    assert '"signature": "' in text and '"signature": ""' not in text
    record.write_text(text.replace('"signature": "', '"signature": "0'))
    job = containers.begin()
    assert containers.start(job, NAMES) == FUSE
    containers.end(job)
    loops = subprocess.run(
        ["losetup", "-l", "-n", "-O", "BACK-FILE"], capture_output=True, text=True, check=True
    )
    assert str(containers.node.folder) not in loops.stdout


@pytest.mark.parametrize("trusted", [False, True])
def test_agents_killed_while_a_container_starts(trusted: bool) -> None:
    with node_of('[prefetch]\nhot_wait = "100ms"\n') as node:
        if trusted:
            make_key(node.folder / "site.key")
        containers = Containers(node)
        node.start()
        job = containers.begin()
        containers.start(job, NAMES)  # it is in the store
        containers.end(job)
        containers.cool()
        job = containers.begin()
        names = list(containers.digests)
        container = containers.enter(job, containers.get(job), names)
        for _ in range(4):
            time.sleep(0.15)
            node.crash()
        assert containers.finish(container, names) == (KERNEL if trusted else FUSE)
        assert "agent_restarted" in names_of(containers.end(job), "fault")


def test_the_store_is_lost_in_the_middle_and_comes_back(containers: Containers) -> None:
    blob = containers.blob()
    job = containers.begin()
    path = containers.get(job)
    away = blob.with_name("away")
    blob.rename(away)
    os.truncate(blob, 0) if blob.exists() else blob.touch()
    # The user's process has the file open: what is lost is what it reads.
    content = away.read_bytes()
    os.truncate(away, 300_000)
    names = list(containers.digests)
    container = containers.enter(job, path, names)
    time.sleep(2)
    alive = container.poll() is None
    away.write_bytes(content)
    away.rename(blob)
    kind = containers.finish(container, names)
    assert kind == FUSE
    events = containers.end(job)
    assert not alive or "source_failed" in names_of(events, "fault")


def test_a_corrupt_block_in_the_store_is_an_error_and_in_the_cache_is_fetched_again(
    containers: Containers,
) -> None:
    job = containers.begin()
    containers.start(job, list(containers.digests))
    containers.end(job)
    containers.rest()
    with containers.cached().open("r+b") as file:  # a node that was written to, or whose disk forgot
        file.seek(3_000_000)
        file.write(b"\0" * 100_000)
    job = containers.begin()
    containers.start(job, list(containers.digests))
    assert "corrupt_block" in names_of(containers.end(job), "fault")
    containers.cool()
    with containers.blob().open("r+b") as file:
        file.seek(3_000_000)
        file.write(b"\0" * 100_000)
    job = containers.begin()
    names = list(containers.digests)
    output, errors = containers.enter(job, containers.get(job), names).communicate(timeout=60)
    assert "Input/output error" in errors
    read = output.split()[1:]
    empty = hashlib.sha256(b"").hexdigest()
    wrong = [digest for digest in read if digest not in containers.digests.values() and digest != empty]
    assert wrong == [], "an error, never other bytes"
    assert {"corrupt_block", "read_failed"} <= names_of(containers.end(job), "fault")


def test_another_user_gets_nothing_of_it(containers: Containers) -> None:
    first = containers.begin()
    path = containers.get(first)
    second = containers.begin(uid=BOB)
    done = containers.importer(second, "get", f"docker://{containers.name}", uid=BOB)
    if done.returncode == 0:  # he may read the folder, and so make an image of his own of it
        assert done.stdout.strip() != path and f"/{BOB}/" in done.stdout
    refused = containers.enter(second, path, NAMES, uid=BOB).communicate(timeout=60)
    assert refused[0].strip() == ""
    done = containers.importer(first, "get", f"docker://{containers.name}", uid=BOB)
    assert path not in done.stdout, "nor in the name of another's job"


def test_a_full_cache_serves_what_it_cannot_keep() -> None:
    with node_of() as node:
        disk = node.folder / "cache"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], check=True)
        containers = Containers(node)
        containers.push()
        node.start()
        job = containers.begin()
        names = list(containers.digests)
        containers.start(job, names)
        assert "cache_full" in names_of(containers.end(job), "fault")


def test_eviction_under_pressure_spares_what_a_job_reads() -> None:
    with node_of() as node:
        text = node.config.read_text()
        node.config.write_text(
            text.replace("[cache]\n", f'[cache]\nmax = "{FILES * FILE_BYTES * 3 // 2}B"\n')
        )
        containers = Containers(node)
        containers.push()
        node.start()
        job = containers.begin()
        path = containers.get(job)
        names = list(containers.digests)
        container = containers.enter(job, path, names)
        for number in range(3):  # others of this node want the room
            other = node.folder / "data" / f"model{number}"
            other.write_bytes(random.Random(number).randbytes(FILES * FILE_BYTES // 2))
            os.utime(other, (1_700_000_000, 1_700_000_000))
            rival = containers.begin(CHECKPOINT=other)
            time.sleep(0.3)
            node.ask("epilog", JOB_ID=rival)
        containers.finish(container, names)
        assert (node.folder / "cache" / str(ALICE) / Path(path).name / "data").exists()
        containers.end(job)


def test_a_node_that_rebooted_checks_what_it_had(containers: Containers) -> None:
    job = containers.begin()
    containers.start(job, NAMES)
    supervisor = containers.node.processes[-1]
    containers.node.crash()
    supervisor.send_signal(signal.SIGKILL)  # as the power goes
    supervisor.wait()
    for path in (containers.node.run / "cache").iterdir():
        path.unlink()
    with containers.cached().open("r+b") as file:  # what the disk did not get
        file.seek(2_000_000)
        file.write(b"\0" * 300_000)
    containers.node.clear()
    containers.node.start()
    job = containers.begin()
    containers.start(job, list(containers.digests))
    containers.end(job)


def test_many_tasks_ask_at_once_and_one_image_is_made() -> None:
    with node_of() as node:
        containers = Containers(node)
        node.start()
        job = containers.begin()
        paths: list[str] = []
        threads = [threading.Thread(target=lambda: paths.append(containers.get(job))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(paths) == 4 and len(set(paths)) == 1
        blobs = list((node.folder / "store/users" / str(ALICE) / "blobs").iterdir())
        assert len(blobs) == 1
        containers.finish(containers.enter(job, paths[0], NAMES), NAMES)


def test_an_image_whose_name_is_gone_when_the_agent_is_killed() -> None:
    with node_of('[prefetch]\nhot_wait = "100ms"\n') as node:
        containers = Containers(node)
        containers.push()
        node.start("""
from bootseer_slurm.cache import reader
reader.Reader.prefetch_run = lambda *_: (0, 0)
reader.Reader.prefetch_blocks = lambda self, first, last, *_, **__: last + 1
""")
        job = containers.begin()
        path = containers.get(job)
        shutil.rmtree(node.folder / "store/users" / str(ALICE) / "names")
        node.crash()
        names = list(containers.digests)
        containers.finish(containers.enter(job, path, names), names)
        assert one(containers.end(job), "fault", "agent_restarted")


@pytest.mark.parametrize("trusted", [False, True])
def test_mounting_an_image_in_the_prolog_is_no_start(trusted: bool) -> None:
    with node_of('[prefetch]\nstart_quiet = "1s"\n') as node:
        if trusted:
            make_key(node.folder / "site.key")
        containers = Containers(node)
        node.start()
        job = containers.begin()
        containers.start(job, [])  # it is in the store
        containers.end(job)
        shutil.rmtree(node.folder / "store/users" / str(ALICE) / "traces", ignore_errors=True)
        containers.cool()

        def traces() -> list[Path]:
            return list((node.folder / "store/users" / str(ALICE) / "traces").glob("*/*/*"))

        job = containers.begin(IMAGE=containers.name)
        time.sleep(3)
        assert containers.start(job, NAMES) == (KERNEL if trusted else FUSE)
        time.sleep(3)
        assert len(traces()) == 1
        containers.end(job)
        trace = decode(traces()[0].read_bytes())
        assert trace.ended == "quiet" and len(trace.touches) > 5 * FILE_BYTES // 2**18
        job = containers.begin(IMAGE=containers.name)
        time.sleep(2)
        containers.end(job)
        assert len(traces()) == 1, "nothing was started from it"


def test_a_job_that_did_not_ask_leaves_no_image(containers: Containers) -> None:
    """Its container starts as without Bootseer; here enroot is missing or fails."""
    shutil.rmtree(containers.node.folder / "store/users" / str(ALICE))
    done = containers.importer(99, "get", f"docker://{containers.name}")
    assert "job 99 did not ask for Bootseer" in done.stderr and "falling back" in done.stderr
    assert not (containers.node.folder / "store/users" / str(ALICE)).exists()
