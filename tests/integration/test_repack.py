"""Snapshots and images that are packed again in the order in which starts touch them, on a real node."""

from __future__ import annotations

import os
import random
import shutil
import time
from pathlib import Path

import pytest

from bootseer_slurm.blob.squashfs.files import read_files
from bootseer_slurm.image.signing import make_key
from bootseer_slurm.store import FileReader
from tests.integration.node import ALICE, Node, node_of, wait_until
from tests.integration.test_env_snapshot import blobs, end, give_alice, make_venv, names, shown

pytestmark = [
    pytest.mark.fuse,
    pytest.mark.skipif(os.geteuid() != 0 or not Path("/dev/fuse").exists(), reason="needs root, /dev/fuse"),
    pytest.mark.skipif(not shutil.which("squashfuse"), reason="no squashfuse"),
]
FILES = 3000
FILE_BYTES = 20_000
HOT = range(7, FILES, 15)  # here and there, one in fifteen
SITE = "lib/python3.11/site-packages/thing"


def make(node: Node) -> Path:
    """alice's environment with many files, a large one of which a part is read, and a link."""
    root = make_venv(node)
    for number in range(FILES):
        (root / SITE / f"f{number:04}").write_bytes(random.Random(number).randbytes(FILE_BYTES))
    (root / SITE / "large").write_bytes(random.Random(-1).randbytes(8_000_000))
    (root / SITE / "hard").hardlink_to(root / SITE / "f0100")
    give_alice(root)
    return root


def read_hot(view: Path) -> bytes:
    """What a start reads, from the back to the front."""
    content = b"".join((view / SITE / f"f{number:04}").read_bytes() for number in reversed(HOT))
    with (view / SITE / "large").open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        file.seek(5_000_000)
        return content + file.read(200_000)


def start(node: Node, job: int, root: Path, *, until: str = "") -> tuple[bytes, list[dict[str, object]]]:
    """A start on a node that has nothing; gives what it read, and its events. until: an event, or a line of the log, to wait for."""
    wait_until(lambda: not list((node.run / "cache").iterdir()))
    shutil.rmtree(node.folder / "cache" / str(ALICE), ignore_errors=True)
    view = shown(node, job, root, JOB_NAME="train", ACCOUNT="a")
    assert view is not None
    content = read_hot(view)
    node.ask("mark", JOB_ID=job, NAME="training_started", TIME_NS=time.time_ns())
    told = node.run / "events" / f"{job}.0"
    if until.startswith("log: "):
        wait_until(lambda: until.removeprefix("log: ") in node.log, 60)
    elif until:
        wait_until(lambda: f'"name":"{until}"' in told.read_text(), 60)
    tree = {str(path.relative_to(view)): path.lstat().st_mode for path in view.rglob("*")}
    assert set(tree) >= {f"{SITE}/f{number:04}" for number in range(FILES)}
    return content, end(node, job, view)


def hot_bytes(events: list[dict[str, object]]) -> int:
    return sum(
        int(str(each["bytes"])) for each in events if (each["kind"], each["name"]) == ("prefetch", "hot")
    )


def fetched(events: list[dict[str, object]]) -> int:
    """What had been fetched when the start was over."""
    (access,) = (each for each in events if (each["kind"], each["name"]) == ("access", "start"))
    return int(str(access["store_bytes"]))


@pytest.mark.parametrize("signed", [False, True])
def test_the_next_start_fetches_little_more_than_it_reads(signed: bool) -> None:
    with node_of() as node:
        root = make(node)
        if signed:
            make_key(node.folder / "site.key")
        node.start()
        if signed:  # by the first start, in the background: the agent packs it
            node.ask("prolog", JOB_ID=9, UID=ALICE, BOOTSEER=1, ENV=root)
            node.ask("mark", JOB_ID=9, NAME="training_started", TIME_NS=time.time_ns())
            wait_until(lambda: '"name":"saved"' in (node.run / "events/9.0").read_text(), 60)
            end(node, 9)
        else:
            node.bootseer("env", "save", str(root))
        (before,) = names(node)
        assert bool(before["signature"]) is signed
        want, events = start(node, 1, root, until="packed")
        assert want == read_hot(root)
        (message,) = (str(each["message"]) for each in events if each["name"] == "packed")
        assert message.startswith("packed anew in the order of touch")
        (after,) = names(node)
        assert after["blob"] != before["blob"] and after["fingerprint"] == before["fingerprint"]
        assert bool(after["signature"]) is signed and after["key"] == before["key"]
        got, events = start(node, 2, root, until="log: lies as starts touch it")
        assert got == want
        read_bytes = len(HOT) * FILE_BYTES + 200_000
        assert read_bytes < hot_bytes(events) < 1.25 * read_bytes, "with the tables"
        assert fetched(events) <= hot_bytes(events) + 2**20, "the rest the kernel reads ahead"
        assert names(node) == [after], "it lies well now"
        assert "in the store already" in node.bootseer("env", "save", str(root))


def test_hot_files_lie_in_front_in_the_order_of_touch() -> None:
    with node_of() as node:
        root = make(node)
        node.start()
        node.bootseer("env", "save", str(root))
        start(node, 1, root, until="packed")
        (record,) = names(node)
        image = node.folder / "store" / record["folder"] / "0"
        files = read_files(FileReader(image), "image").files
        hot = [files[f"{SITE}/f{number:04}"].blocks[0].offset for number in HOT]
        cold = [
            files[f"{SITE}/f{number:04}"].blocks[0].offset for number in range(FILES) if number not in HOT
        ]
        large = files[f"{SITE}/large"].blocks[:-1]  # without its tail, in a fragment
        behind = [offset for offset in hot if offset > min(large)[0]]
        assert len(behind) <= 6, "the last fragment is filled with cold files, and written then"
        assert max(large)[0] < min(cold)
        assert sum(hot[:10]) > sum(hot[-10:]), "read from the back to the front"


def test_a_job_that_ends_stops_it_and_leaves_nothing() -> None:
    with node_of() as node:
        root = make(node)
        node.start("""
from bootseer_slurm.job.background import work as background
run = background.Background.run
background.Background.run = lambda self, *a, **o: run(self, *a, **o | {"when_to_go_on": lambda: False})
""")
        node.bootseer("env", "save", str(root))
        before = names(node)
        _, events = start(node, 1, root)
        assert not any(each["kind"] == "snapshot" for each in events)
        assert names(node) == before and len(blobs(node)) == 1
        assert not list(Path("/var/tmp").glob(f"bootseer-repack-{ALICE}-*"))


def test_what_was_saved_meanwhile_keeps_its_place() -> None:
    with node_of() as node:
        root = make(node)
        node.start("""
import pathlib
from bootseer_slurm.job.background import work as background
run = background.Background.run
waiting = lambda: pathlib.Path("/run/bootseer-test-go").exists()
background.Background.run = lambda self, *a, **o: run(self, *a, **o | {"when_to_go_on": waiting})
""")
        go = Path("/run/bootseer-test-go")
        go.unlink(missing_ok=True)
        try:
            node.bootseer("env", "save", str(root))
            wait_until(lambda: not list((node.run / "cache").iterdir()))
            view = shown(node, 1, root, JOB_NAME="train", ACCOUNT="a")
            assert view is not None
            read_hot(view)
            node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
            time.sleep(4)
            (root / SITE / "new").write_bytes(b"x")
            (root / SITE).parent.joinpath("thing-1.0.dist-info").rename(
                (root / SITE).parent / "thing-1.1.dist-info"
            )
            give_alice(root)
            node.bootseer("env", "save", str(root))
            newest = names(node)
            go.touch()
            wait_until(lambda: "another one took its place" in node.log, 60)
            assert names(node) == newest
            end(node, 1, view)
        finally:
            go.unlink(missing_ok=True)


def test_where_little_would_be_saved_it_stays() -> None:
    with node_of() as node:
        root = make_venv(node)
        node.start()
        node.bootseer("env", "save", str(root))
        before = names(node)
        view = shown(node, 1, root)
        assert view is not None
        list(view.rglob("*"))
        node.ask("mark", JOB_ID=1, NAME="training_started", TIME_NS=time.time_ns())
        wait_until(lambda: "lies as starts touch it" in node.log, 60)
        assert not any(each["kind"] == "snapshot" for each in end(node, 1, view))
        assert names(node) == before
