"""Loading a checkpoint that the node's agent has brought: its FUSE file, beside the same file elsewhere.

Needs no Slurm. A file of safetensors lies striped in a folder; a real agent (lib/node.py) prefetches it for a
job, and what its steps are given is read and loaded by processes of their own (checkpoint_job.py). All arms
are interleaved. A step that starts once all is there sees the cache's file over the FUSE file; one that
started before keeps the latter. "first": the kernel has no page of it, so that our server is asked for all,
while the pages of the cache's file are in memory; "again": the kernel has the pages of the first time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from bootseer_slurm.checkpoint.stripe import stripe_file
from scripts.lib.bench.pss import most_memory
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.layout import REPO, ClusterError, poll
from scripts.lib.host import output_of, run
from scripts.lib.node import Node

FOLDER = Path("/var/tmp/bootseer-bench-checkpoint-node")
PEERS = Path("/var/tmp/bootseer-bench-peers-checkpoint")
PEER_PACKAGES = ("runai-model-streamer==0.17.0", "fastsafetensors==0.5.0")
PACKAGES = (*PEER_PACKAGES, "humanize", "safetensors", "numpy", "typer")
JOB = Path(__file__).with_name("checkpoint_job.py")
REPEATS = 5
TENSORS = 128
SHAPE = (4096, 4096)  # of bfloat16: 32 MiB
TENSOR_BYTES = SHAPE[0] * SHAPE[1] * 2
OBJECTS = 8
USER = 54321
FIRST, AGAIN = "FUSE, first", "FUSE, again"
TMPFS, STEP, DISK = "tmpfs", "as a step sees it", "disk, cold"
BUDGET_MIB = 256  # docs/architecture.md


@dataclass(frozen=True)
class Arm:
    """what: what checkpoint_job.py does. place: of the file, and in what state."""

    what: str
    place: str


ARMS = (
    Arm("read", STEP),
    Arm("read", FIRST),
    Arm("read", AGAIN),
    Arm("safetensors", TMPFS),
    Arm("safetensors", STEP),
    Arm("safetensors", FIRST),
    Arm("safetensors", AGAIN),
    Arm("safetensors", DISK),
    Arm("runai", DISK),
    Arm("runai", FIRST),
    Arm("fastsafetensors", DISK),
    Arm("fastsafetensors", FIRST),
)


def run_node(step: Callable[[str], None]) -> list[Row]:
    """All rows. Raises ClusterError."""
    step("Run:ai Model Streamer and fastsafetensors from PyPI")
    python = _peers()
    FOLDER.mkdir()
    try:
        source = FOLDER / "model.safetensors"
        step("inputs")
        _make(source)
        stripe_file(source, f"file://{FOLDER}/striped.safetensors", objects=OBJECTS)
        with _tmpfs() as memory_folder:
            with _running_node() as node, most_memory(node.processes[0].pid) as most:
                step("prefetch")
                served, seen = _bring(node, f"file://{FOLDER}/striped.safetensors")
                shutil.copy(source, memory_folder)
                places = {FIRST: served, AGAIN: served, STEP: seen, DISK: source}
                places[TMPFS] = memory_folder / source.name
                times = _measure(python, source, places, step)
        return _rows(times, most)
    finally:
        shutil.rmtree(FOLDER, ignore_errors=True)


@contextlib.contextmanager
def _running_node() -> Iterator[Node]:
    node = Node(FOLDER)
    try:
        node.start()
        yield node
    finally:
        node.clear()


def _bring(node: Node, checkpoint: str) -> tuple[Path, Path]:
    """Have the checkpoint of a job prefetched whole; its FUSE file, and what a step sees in its place."""
    node.request("prolog", JOB_ID=1, UID=USER, BOOTSEER=1, CHECKPOINT=checkpoint)
    events = node.run / "events" / "1.0"
    end = '"kind":"prefetch","name":"end"'
    if not poll(lambda: events.exists() and end in events.read_text(), timeout_s=300):
        raise ClusterError(f"not prefetched: {node.log}")
    reply, (mount,) = node.request("attach", JOB_ID=1, UID=USER, STEP_ID=0)
    given = dict(value.split("=", 1) for key, value in reply if key == "SETENV")
    return Path(given["BOOTSEER_CHECKPOINT"]), Path(f"/proc/{os.getpid()}/fd/{mount}")


def _peers() -> Path:
    """A Python with torch and the peers, made once."""
    python = PEERS / "bin" / "python"
    torch = output_of(str(REPO / "scripts" / "torch"))
    if not (PEERS / "made").exists():
        run("/usr/bin/python3", "-m", "venv", "--clear", str(PEERS))
        pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps"]
        run(*pip, *PACKAGES)
        site = next((PEERS / "lib").glob("python*/site-packages"))
        (site / "torch.pth").write_text(torch)
        (PEERS / "made").touch()
    return python


def _make(source: Path) -> None:
    """A file of safetensors with random bytes; an old time, for a young one would be waited for."""
    header = {
        f"layer.{number}": {
            "dtype": "BF16",
            "shape": SHAPE,
            "data_offsets": [number * TENSOR_BYTES, (number + 1) * TENSOR_BYTES],
        }
        for number in range(TENSORS)
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with source.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _ in range(TENSORS):
            file.write(os.urandom(TENSOR_BYTES))
        os.fsync(file.fileno())
    os.utime(source, (1_700_000_000, 1_700_000_000))


@contextlib.contextmanager
def _tmpfs() -> Iterator[Path]:
    point = Path(tempfile.mkdtemp(prefix="bootseer-bench-"))
    run("mount", "-t", "tmpfs", "tmpfs", str(point))
    try:
        yield point
    finally:
        run("umount", str(point))
        point.rmdir()


def _measure(
    python: Path, source: Path, places: dict[str, Path], step: Callable[[str], None]
) -> dict[Arm, list[float]]:
    times: dict[Arm, list[float]] = {}
    for arm in ARMS:
        step(f"comparing: {arm.what}, {arm.place}")
        _time(python, arm, places, str(source))
    for number in range(REPEATS):
        for arm in ARMS:
            step(f"{arm.what}, {arm.place}, {number + 1} of {REPEATS}")
            times.setdefault(arm, []).append(_time(python, arm, places))
    return times


def _time(python: Path, arm: Arm, places: dict[str, Path], *source: str) -> float:
    """Seconds of one job. source: what its model is compared with."""
    command = [str(python), str(JOB), arm.what, str(places[arm.place]), *source]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdin is not None and job.stdout is not None
        if job.stdout.readline() == "ready\n":
            if arm.place in (FIRST, DISK):
                _forget(places[arm.place])
            if arm.place in (FIRST, STEP):
                _remember(places[STEP])
            job.stdin.write("go\n")
            job.stdin.flush()
            said = job.stdout.read()
            if job.wait() == 0:
                return float(said)
    raise ClusterError(f"{arm.what}, {arm.place}: the job failed")


def _forget(path: Path) -> None:
    """Have the kernel drop a file's pages. Raises ClusterError if it does not."""
    fd = os.open(path, os.O_RDONLY)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(fd)
    if int(output_of("fincore", "--noheadings", "--bytes", "--output", "RES", str(path))):
        raise ClusterError(f"{path}: its pages stay in memory")


def _remember(path: Path) -> None:
    """Have its pages in memory."""
    run("dd", f"if={path}", "of=/dev/null", "bs=4M", "status=none")


def _rows(times: dict[Arm, list[float]], most: dict[str, int]) -> list[Row]:
    size_bytes = TENSORS * TENSOR_BYTES
    seconds = {arm: median(each) for arm, each in times.items()}
    size = f"{size_bytes / 2**30:.0f} GiB"
    how = f"{size} of safetensors that the agent has brought; medians of {REPEATS} interleaved"
    cached = size_bytes / seconds[Arm("read", STEP)] / 1e6
    reads = how + "; one reader, 4 MiB each; its limit: the cache's file, all in the page cache"
    half = min(2500.0, cached / 2)
    rows = [
        Row("FUSE, warm cache: one reader", _rate(seconds, FIRST), "MB/s", half, cached, reads, True),
        Row("FUSE, the kernel has its pages: one reader", _rate(seconds, AGAIN), "MB/s", None, cached, reads),
    ]
    tmpfs_s = seconds[Arm("safetensors", TMPFS)]
    loads = how + f"; load_file, each tensor copied into a model; tmpfs: {tmpfs_s:.2f} s"
    for place in (STEP, FIRST, AGAIN):
        ratio = seconds[Arm("safetensors", place)] / tmpfs_s
        target = 1.2 if place != AGAIN else None
        rows.append(Row(f"safetensors, {place}: against tmpfs", ratio, "×", target, 1.0, loads))
    rows += [
        Row(f"{arm.what}, {arm.place}", seconds[arm], "s", None, tmpfs_s, loads)
        for arm in ARMS
        if arm.what != "read"
    ]
    how = f"PSS, every 0.1 s, while {size} are brought and then read by all arms"
    sizes = {name: size / 2**20 for name, size in most.items()}
    for name in ("all", "supervisor", "agent", "userproc"):
        label = f"memory of the agent: {name}"
        budget = BUDGET_MIB if name == "all" else None
        rows.append(Row(label, sizes[name], "MiB", budget, None, how))
    return rows


def _rate(seconds: dict[Arm, float], place: str) -> float:
    return TENSORS * TENSOR_BYTES / seconds[Arm("read", place)] / 1e6
