"""What a node reads of a checkpoint is brought first of the next one: the ranges that this rank's node read."""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.manifest import BLOCK_BYTES, Layout
from bootseer_slurm.blob.ref import ArtifactRef
from bootseer_slurm.blob.trace import Trace, decode
from bootseer_slurm.config import PrefetchConfig
from bootseer_slurm.job import recording as recordings
from bootseer_slurm.job.recording import Recording, TraceWriter
from bootseer_slurm.phase import JobPhase
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.userproc.protocol import KeepTrace
from tests.integration.node import ALICE, Node, node, node_of, wait_until
from tests.integration.test_service_recovery import attach

__all__ = ["node"]
pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
]
OLD = 1_700_000_000
BLOCKS = 160  # of each file: the kernel reads ahead, some blocks
SIZE = BLOCKS * BLOCK_BYTES
HALF = SIZE // 2
FILES = ("half.distcp", "whole.distcp", "other.distcp")


def make(node: Node, step: int) -> Path:
    folder = node.folder / "data" / "ckpt" / f"step_{step}"
    folder.mkdir(parents=True)
    for name in FILES:
        (folder / name).write_bytes(random.Random(f"{step}{name}").randbytes(SIZE))
    (folder / ".metadata").write_bytes(b"m" * 100)
    for path in folder.iterdir():
        os.utime(path, (OLD + step, OLD + step))
    return folder


def load(node: Node, job: int, folder: Path, *, rank: int = 0, mark: bool = True, extra: str = "") -> None:
    """A start that reads half of one file, all of another, and of the third what `extra` says."""
    mounts = begin(node, job, rank=rank)
    assert set(mounts) == {str(path) for path in folder.iterdir()}
    for name, size_bytes in (
        (".metadata", 100),
        ("half.distcp", HALF),
        ("whole.distcp", SIZE),
        (extra, SIZE),
    ):
        if name:
            fd = os.open(f"/proc/self/fd/{mounts[str(folder / name)]}", os.O_RDONLY)
            assert os.pread(fd, size_bytes, 0) == (folder / name).read_bytes()[:size_bytes]
            os.close(fd)
    end(node, job, mounts, mark=mark)


def begin(node: Node, job: int, *, rank: int = 0, job_name: str = "train") -> dict[str, int]:
    node.ask(
        "prolog", JOB_ID=job, UID=ALICE, BOOTSEER=1, CHECKPOINT=node.folder / "data" / "ckpt",
        JOB_NAME=job_name, NODELIST="n[1-2]", NODENAME=f"n{rank + 1}",
    )  # fmt: skip
    return attach(node, job)


def end(node: Node, job: int, mounts: dict[str, int], *, mark: bool = True) -> None:
    if mark:
        node.ask("mark", JOB_ID=job, NAME="training_started", TIME_NS=time.time_ns())
    for fd in mounts.values():
        os.close(fd)
    node.ask("epilog", JOB_ID=job)


def fetched(node: Node, job: int) -> dict[str, float]:
    """Blocks that the prefetch brought, by file, once it has ended."""

    def ends() -> dict[str, float]:
        return {
            str(event["target"]).rpartition("/")[2]: float(str(event["bytes"])) / BLOCK_BYTES
            for line in (node.run / "events" / f"{job}.0").read_text().splitlines()
            for event in [json.loads(line)]
            if event.get("kind") == "prefetch" and event["name"] == "end"
        }

    wait_until(lambda: len(ends()) == len(FILES) + 1)
    return ends()


def traces(node: Node) -> list[Trace]:
    folder = node.folder / f"store/users/{ALICE}/traces"
    return [decode(path.read_bytes()) for path in folder.glob("*/*/*")]


def test_the_next_checkpoint_brings_what_this_rank_read_of_the_last(node: Node) -> None:
    node.start()
    load(node, 1, make(node, 1))
    node.events(1)
    by_touches = sorted(len(trace.touches) for trace in traces(node))
    assert by_touches[0] == 0 and by_touches[1] == 1 and by_touches[3] == BLOCKS
    assert HALF // BLOCK_BYTES <= by_touches[2] < BLOCKS * 0.6, "and what the kernel read ahead"
    folder = make(node, 2)
    mounts = begin(node, 2)
    brought = fetched(node, 2)
    assert brought["other.distcp"] == 0, "this node read nothing of it"
    assert brought["whole.distcp"] == BLOCKS
    # Its end is brought too: where it is a zip, its directory is there.
    assert by_touches[2] <= brought["half.distcp"] <= by_touches[2] + 4
    fd = os.open(f"/proc/self/fd/{mounts[str(folder / 'other.distcp')]}", os.O_RDONLY)
    assert os.pread(fd, SIZE, 0) == (folder / "other.distcp").read_bytes(), (
        "what was not brought is read all the same"
    )
    os.close(fd)
    end(node, 2, mounts)
    pushed = {
        str(event["target"]): event["pushed_bytes"] for event in node.events(2) if event["name"] == "summary"
    }
    assert pushed[str(folder / "half.distcp")] > HALF // 2, "what is known to be read is given to the kernel"
    # Another rank's node reads other parts, and has no plan yet.
    make(node, 3)
    mounts = begin(node, 3, rank=1)
    assert fetched(node, 3) == dict.fromkeys(FILES, BLOCKS) | {".metadata": 100 / BLOCK_BYTES}
    end(node, 3, mounts)


def test_the_majority_of_the_last_starts_counts(node: Node) -> None:
    node.start()
    for job in (1, 2, 3):
        load(node, job, make(node, job), extra="other.distcp" if job > 1 else "")
        node.events(job)
    make(node, 4)
    mounts = begin(node, 4)
    assert fetched(node, 4)["other.distcp"] == BLOCKS
    end(node, 4, mounts)


def test_a_start_that_did_not_come_to_its_end_says_nothing(node: Node) -> None:
    """Nothing but a plan is brought: one of a job that failed while it loaded would hold up the next."""
    node.start()
    load(node, 1, make(node, 1), mark=False)
    node.events(1)
    assert traces(node) == []


def test_a_plan_follows_the_step_and_not_the_folder(node: Node) -> None:
    node.start()
    folder = make(node, 1)
    load(node, 1, folder)
    node.events(1)
    (again,) = [folder.rename(folder.with_name("step_7"))]
    mounts = begin(node, 2)
    assert set(mounts) == {str(path) for path in again.iterdir()}
    assert fetched(node, 2)["other.distcp"] == 0
    end(node, 2, mounts)


def test_what_another_job_read_is_no_plan(node: Node) -> None:
    """One that evaluates a model reads less of it than the one that trains it."""
    node.start()
    load(node, 1, make(node, 1))
    node.events(1)
    make(node, 2)
    mounts = begin(node, 2, job_name="other")
    assert fetched(node, 2)["other.distcp"] == BLOCKS
    end(node, 2, mounts)


def test_what_was_learned_and_is_not_shown_is_not_passed_over(node: Node) -> None:
    """A step asks for something else this time: of what it was not shown that says nothing."""
    node.start()
    load(node, 1, make(node, 1))
    node.events(1)
    other = node.folder / "data" / "other.pt"
    other.write_bytes(b"x" * BLOCK_BYTES)
    os.utime(other, (OLD, OLD))
    node.ask("prolog", JOB_ID=2, UID=ALICE, BOOTSEER=1, JOB_NAME="train", NODELIST="n[1-2]", NODENAME="n1")
    fetched(node, 2)
    reply, fds = node.request("attach", JOB_ID=2, UID=ALICE, STEP_ID=0, BOOTSEER=1, CHECKPOINT=other)
    assert [value.split(":", 3)[3] for key, value in reply if key == "BIND"] == [str(other)]
    assert Path(f"/proc/self/fd/{fds[0]}").read_bytes() == other.read_bytes()
    end(node, 2, {str(other): fds[0]})
    node.events(2)
    assert [(trace.job, trace.touches) for trace in traces(node) if trace.job == 2] == [(2, ((0, 0),))]


def test_a_start_that_still_reads_at_the_cap_says_nothing() -> None:
    with node_of('[prefetch]\nstart_cap = "2s"\n') as node:
        node.start()
        folder = make(node, 1)
        mounts = begin(node, 1)
        fd = os.open(f"/proc/self/fd/{mounts[str(folder / 'half.distcp')]}", os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        for block in range(0, BLOCKS, 4):
            assert len(os.pread(fd, 100, block * BLOCK_BYTES)) == 100
            time.sleep(0.1)
        os.close(fd)
        end(node, 1, mounts)
        assert any(event["kind"] == "prefetch" for event in node.events(1))
        assert traces(node) == []


def recorded(
    mocker: MockerFixture, write: Callable[..., bool], on_over: Callable[[str], None] = print, **config: float
) -> tuple[Mock, Recording]:
    """A file of a checkpoint, and the recording that it is for."""
    layer = mocker.Mock(ref=ArtifactRef("checkpoint", "/c"), trace_key="place-1")
    layer.handle.is_seen, layer.handle.reader.blob.layout = True, Layout(BLOCK_BYTES)
    layer.handle.reader.waits = mocker.Mock(any_now=False, waited_s=lambda: 0.0)
    writer = TraceWriter(Job(1, 0, ALICE, ALICE), "n1", "c1", mocker.Mock(write=write))
    prefetch = PrefetchConfig(**config)  # type: ignore[arg-type]
    return layer, Recording(writer, prefetch, JobPhase(), on_over)


def touch(layer: Mock) -> None:
    """Read the first block, as its recorder is told."""
    (recorder,) = layer.handle.reader.add_recorder.call_args.args
    recorder.touch(0, 0)


def test_a_start_that_waits_for_the_store_is_not_quiet(mocker: MockerFixture) -> None:
    mocker.patch.object(recordings, "_LOOK_EVERY_S", 0.01)
    over = threading.Event()
    layer, recording = recorded(mocker, lambda *_, **__: True, lambda why: over.set(), start_quiet_s=0.1)
    layer.handle.reader.waits.any_now = True
    recording.step()
    recording.add(layer)
    touch(layer)
    assert not over.wait(0.5)
    layer.handle.reader.waits.any_now = False
    assert over.wait(10)
    recording.finish("quiet")


def test_a_job_that_ends_while_its_traces_are_written_waits_for_them(mocker: MockerFixture) -> None:
    """Behind the end the user's process is killed, which writes them."""
    writing, written = threading.Event(), threading.Event()

    def write(request: KeepTrace, content: bytes) -> bool:
        writing.set()
        return written.wait(10)

    layer, recording = recorded(mocker, write)
    recording.add(layer)
    recording.step()
    touch(layer)
    threads = [threading.Thread(target=recording.finish, args=(why,)) for why in ("mark", "end")]
    threads[0].start()
    assert writing.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    assert threads[1].is_alive()
    written.set()
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_what_a_step_was_shown_before_it_was_recorded_counts(mocker: MockerFixture) -> None:
    """A step may look at an artifact the moment that it is ready; its second layer is recorded later."""
    kept: list[KeepTrace] = []
    layer, recording = recorded(mocker, lambda request, _: kept.append(request) is None)
    layer.is_shown = False
    recording.step()
    recording.shown([layer])
    recording.add(layer)
    recording.finish("mark")
    assert [request.blob for request in kept] == ["place-1"], "a trace without touches: it was not read"
