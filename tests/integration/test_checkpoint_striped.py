"""Striped files: written, read in parallel, whole or not at all, and never with other bytes."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pytest_mock import MockerFixture

import bootseer_slurm
from bootseer_slurm.blob.manifest import CHUNK_BYTES, decode
from bootseer_slurm.checkpoint import striped
from bootseer_slurm.checkpoint.file import ParallelFile
from bootseer_slurm.checkpoint.stripe import stripe_file
from bootseer_slurm.checkpoint.writer import StripedWriter
from bootseer_slurm.errors import BootseerError, InputError, IntegrityError, NotFound, StoreError
from bootseer_slurm.store import FileStore

CONTENT = os.urandom(5 * CHUNK_BYTES) * 3 + b"the end"


def write(path: Path, content: bytes = CONTENT, objects: int = 4) -> None:
    with StripedWriter(str(path), objects=objects) as file:
        file.write(content)


def generation(path: Path) -> Path:
    return path / decode((path / "manifest").read_bytes()).generation


def damage(file: Path, offset: int) -> None:
    with file.open("r+b") as out:
        out.seek(offset)
        byte = out.read(1)
        out.seek(offset)
        out.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 9 * CHUNK_BYTES + 5])
def test_what_is_written_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "model"
    with bootseer_slurm.open(str(path), "wb") as file:
        for start in range(0, size, 1_000_003):
            assert (
                file.write(CONTENT[start : min(size, start + 1_000_003)])
                == min(size, start + 1_000_003) - start
            )
        assert file.tell() == size
    with bootseer_slurm.open(f"file://{path}") as file:
        assert file.read() == CONTENT[:size]
        assert file.read(1) == b""
    objects = sorted(each.name for each in generation(path).iterdir())
    assert objects == [str(number) for number in range(max(1, min(8, -(-size // CHUNK_BYTES))))]


def test_any_place_and_any_size(tmp_path: Path) -> None:
    write(tmp_path / "model")
    with ParallelFile(str(tmp_path / "model")) as file:
        for offset, count in (
            (0, 10),
            (CHUNK_BYTES - 5, 10),
            (3, 3 * CHUNK_BYTES),
            (len(CONTENT) - 3, 10),
            (10**12, 5),
        ):
            buffer = bytearray(count)
            done = file.read_at(offset, buffer)
            assert bytes(buffer[:done]) == CONTENT[offset : offset + count]
        assert file.seek(-7, os.SEEK_END) == len(CONTENT) - 7 and file.read() == b"the end"
        assert bytes(file.view(CHUNK_BYTES, 2 * CHUNK_BYTES)) == CONTENT[CHUNK_BYTES : 3 * CHUNK_BYTES]
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
        buffered = io.BufferedReader(file, 1000)
        file.seek(0)
        assert b"".join(iter(lambda: buffered.read(77_777), b"")) == CONTENT, "small reads that go forward"
        file.close()
        with pytest.raises(ValueError, match="closed"):
            file.read(1)


def test_many_ranges_are_read_at_once_and_a_chunk_once(tmp_path: Path, mocker: MockerFixture) -> None:
    path = tmp_path / "model"
    write(path)
    places = [
        (0, 10),
        (100, 4),
        (CHUNK_BYTES - 5, 10),
        (2 * CHUNK_BYTES, 2 * CHUNK_BYTES),
        (len(CONTENT) - 7, 7),
        (5, 0),
    ]
    buffers = [bytearray(count) for _, count in places]
    with ParallelFile(str(path)) as file:
        seen = mocker.spy(file._reader, "_read_once")
        file.read_ranges((offset, buffer) for (offset, _), buffer in zip(places, buffers, strict=True))
        assert [bytes(buffer) for buffer in buffers] == [
            CONTENT[offset : offset + count] for offset, count in places
        ]
        read = sorted((call.args[0], len(call.args[1])) for call in seen.call_args_list)
        assert [offset // CHUNK_BYTES for offset, _ in read] == [0, 1, 2, 3, 15]
        assert [size for _, size in read] == [CHUNK_BYTES, 256 * 1024, CHUNK_BYTES, CHUNK_BYTES, 7], (
            "whole blocks"
        )
        for offset in (-1, len(CONTENT) - 3):
            with pytest.raises(ValueError, match="has no bytes"):
                file.read_ranges([(offset, bytearray(4))])
        damage(generation(path) / "3", 100)
        with pytest.raises(IntegrityError, match="block 48"):
            file.read_ranges([(3 * CHUNK_BYTES + 5, bytearray(5)), (0, bytearray(5))])
    with pytest.raises(ValueError, match="closed"):
        file.read_ranges([])


def test_many_readers_at_once(tmp_path: Path) -> None:
    write(tmp_path / "model")
    wrong: list[int] = []
    with ParallelFile(str(tmp_path / "model")) as file:

        def read(number: int) -> None:
            for step in range(20):
                offset = (number * 7_654_321 + step * 3_333_333) % (len(CONTENT) - 100_000)
                if bytes(file.view(offset, 100_000)) != CONTENT[offset : offset + 100_000]:
                    wrong.append(offset)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read, range(8)))
    assert wrong == []


def test_an_existing_file_is_read_as_it_lies(tmp_path: Path) -> None:
    (tmp_path / "plain.pt").write_bytes(CONTENT)
    with bootseer_slurm.open(str(tmp_path / "plain.pt")) as file:
        assert file.read() == CONTENT
    with pytest.raises(NotFound):
        bootseer_slurm.open(str(tmp_path / "nothing"))
    with pytest.raises(StoreError):
        bootseer_slurm.open(str(tmp_path))
    with pytest.raises(ValueError, match="mode"):
        bootseer_slurm.open(str(tmp_path / "plain.pt"), "r+b")


def test_a_block_that_changed_is_never_given_out(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path)
    damage(generation(path) / "2", 100)
    with ParallelFile(str(path)) as file:
        assert file.read(2 * CHUNK_BYTES) == CONTENT[: 2 * CHUNK_BYTES], "what is not damaged is there"
        for read in (lambda: file.view(0), lambda: file.view(2 * CHUNK_BYTES + 50, 100)):
            with pytest.raises(IntegrityError, match="block 32 is not what was written"):
                read()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        (lambda folder: (folder / "1").unlink(), "stripe 1 is missing"),
        (lambda folder: os.truncate(folder / "1", 1000), "stripe 1 is of 1000 bytes"),
        (lambda folder: (folder / "0").rename(folder / "x") and (folder / "1").rename(folder / "0")
         and (folder / "x").rename(folder / "1"), "block 0 is not what was written"),
    ],
    ids=["missing", "truncated", "swapped"],
)  # fmt: skip
def test_a_stripe_that_is_not_right(tmp_path: Path, what: Callable[[Path], object], said: str) -> None:
    write(tmp_path / "model", CONTENT[: 8 * CHUNK_BYTES])
    what(generation(tmp_path / "model"))
    with pytest.raises(IntegrityError, match=said):
        with ParallelFile(str(tmp_path / "model")) as file:
            file.read()


def test_a_manifest_that_is_not_right(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, CONTENT)
    first = (path / "manifest").read_bytes()
    write(path, CONTENT[::-1])
    second = (path / "manifest").read_bytes()
    head, _, digests = first.partition(b"\n")
    (path / "manifest").write_bytes(second.partition(b"\n")[0] + b"\n" + digests)
    with pytest.raises(IntegrityError, match="is not what was written"):
        ParallelFile(str(path)).read()
    for damaged in (second[:-5], b"", b"{}\n", head.replace(b'"generation": "', b'"generation": "../')):
        (path / "manifest").write_bytes(damaged)
        with pytest.raises(IntegrityError):
            ParallelFile(str(path))
    write(path)
    assert ParallelFile(str(path)).read() == CONTENT, "it can be written again"


def test_the_one_before_stays_until_the_next(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path, b"one" * CHUNK_BYTES)
    reader = ParallelFile(str(path))
    write(path, b"two")
    with ParallelFile(str(path)) as file:
        assert file.read() == b"two"
    with ParallelFile.of(
        striped.Opened(reader._opened.layout, reader._opened.objects, reader._opened.manifest), "old"
    ) as old:
        assert old.read(10) == b"oneoneoneo", "somebody still reads it"
    write(path, b"three")
    assert len([each for each in path.iterdir() if each.is_dir()]) == 2
    begun = path / striped.new_generation()
    begun.mkdir()
    dead = path / f"{int(time.time() - 3 * 86400) * 10**9:016x}00000000"
    dead.mkdir()
    write(path, b"four")
    assert begun.exists() and not dead.exists(), "what may still be written stays a day"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_writer_that_dies_leaves_the_file_as_it_was(tmp_path: Path, how: signal.Signals) -> None:
    path = tmp_path / "model"
    write(path)
    code = f"""
import bootseer_slurm
file = bootseer_slurm.open({str(path)!r}, "wb")
while True:
    file.write(bytes(2**20))
    print(flush=True)
"""
    for written in (1, 5, 30):
        writer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert writer.stdout
        for _ in range(written):
            writer.stdout.readline()
        writer.send_signal(how)
        writer.wait(20)
        writer.stdout.close()
        with ParallelFile(str(path)) as file:
            assert file.read() == CONTENT


def test_a_block_that_ends_with_an_error(tmp_path: Path) -> None:
    path = tmp_path / "model"
    write(path)
    before = {str(each) for each in path.rglob("*")}
    with pytest.raises(RuntimeError, match="of the program"), StripedWriter(str(path)) as file:
        file.write(bytes(20 * CHUNK_BYTES))
        raise RuntimeError("of the program")
    assert {str(each) for each in path.rglob("*")} == before
    forgotten = StripedWriter(str(path))
    forgotten.write(bytes(10))
    del forgotten
    assert ParallelFile(str(path)).read() == CONTENT


def test_a_full_disk(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(small)], check=True)
    try:
        write(small / "model", CONTENT[:CHUNK_BYTES])
        with pytest.raises(BootseerError, match="No space left"), StripedWriter(str(small / "model")) as file:
            for _ in range(20):
                file.write(bytes(CHUNK_BYTES))
        with ParallelFile(str(small / "model")) as file:
            assert file.read() == CONTENT[:CHUNK_BYTES]
        assert len(list((small / "model").iterdir())) == 2
    finally:
        subprocess.run(["umount", str(small)], check=True)


class Stalling(FileStore):
    """A store whose first reads of each object fail."""

    def open(self, path: str, *, bulk: bool = False):  # type: ignore[no-untyped-def]
        reader = super().open(path, bulk=bulk)
        real, failures = reader.read_into, iter([StoreError("it does not answer"), StoreError("nor now")])

        def read_into(offset: int, view: memoryview) -> int:
            if (error := next(failures, None)) and "manifest" not in path:
                raise error
            return real(offset, view)

        reader.read_into = read_into  # type: ignore[method-assign]
        return reader


def test_reads_that_fail_are_tried_again(tmp_path: Path) -> None:
    write(tmp_path / "model", CONTENT[:CHUNK_BYTES])
    opened = striped.open_in(Stalling(tmp_path), "model")
    with ParallelFile.of(opened, "model") as file:
        assert file.read() == CONTENT[:CHUNK_BYTES]


def test_it_may_be_larger_than_what_is_kept(tmp_path: Path) -> None:
    content = CONTENT * 3
    write(tmp_path / "model", content, objects=16)
    with ParallelFile(str(tmp_path / "model"), streams=3) as file:
        seen = bytearray()
        while piece := file.read(1_500_000):
            seen += piece
            assert len(file._kept._chunks) <= 32
        assert seen == content


def stripe(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [
        str(Path(sys.executable).with_name("bootseer")),
        "checkpoint",
        "stripe",
        str(source),
        str(target),
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_an_interrupted_stripe_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "model.pt", tmp_path / "striped"
    source.write_bytes(CONTENT)
    os.utime(source, (1_700_000_000, 1_700_000_000))
    real, written = FileStore.writer, []

    def writer(store: FileStore, path: str):  # type: ignore[no-untyped-def]
        if "/" in path:
            written.append(path.rpartition("/")[2])
        if written.count("manifest") == 0 and written[-1] == "5" and len(written) < 10:
            raise StoreError("the store is away")
        return real(store, path)

    monkeypatch.setattr(FileStore, "writer", writer)
    with pytest.raises(StoreError, match="away"):
        stripe_file(source, str(target), objects=8)
    assert not (target / "manifest").exists() and (target / "unfinished").exists()
    first, written[:] = list(written), ["again"] * 10
    stripe_file(source, f"file://{target}", objects=8)
    assert "5" in written and "0" not in written and "0" in first, "what was there is not written again"
    with ParallelFile(str(target)) as file:
        assert file.read() == CONTENT
    assert not (target / "unfinished").exists()
    assert len([each for each in target.iterdir() if each.is_dir()]) == 1
    monkeypatch.undo()
    os.utime(source, (1_700_000_001, 1_700_000_001))
    stripe_file(source, str(target), objects=8)
    assert len([each for each in target.iterdir() if each.is_dir()]) == 2


def test_the_command(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(CONTENT)
    done = stripe(tmp_path / "model.pt", tmp_path / "striped")
    said, errors = done.communicate(timeout=60)
    assert done.returncode == 0 and "8 objects" in said, errors
    with ParallelFile(str(tmp_path / "striped")) as file:
        assert file.read() == CONTENT
    done = stripe(tmp_path / "model.pt", Path("/proc/nothing/here"))
    errors = done.communicate(timeout=60)[1]
    assert "bootseer: /proc/nothing: no such folder" in errors and done.returncode == 5


@pytest.mark.parametrize("name", ["with space", "100%", "a%20b", "a?b#c", "[x]*", "ü"])
def test_any_name(tmp_path: Path, name: str) -> None:
    write(tmp_path / name, b"content")
    assert (tmp_path / name / "manifest").exists()
    with ParallelFile(str(tmp_path / name)) as file:
        assert file.read() == b"content"
    with bootseer_slurm.open((tmp_path / name).as_uri()) as file:
        assert file.read() == b"content"


def test_what_is_no_name() -> None:
    for uri in ("", "relative/path", "/", "file:///", "s3://bucket"):
        with pytest.raises(InputError, match="neither an absolute path nor a URI"):
            bootseer_slurm.open(uri)


class Failing(FileStore):
    """A store that fails where a test says so: told the name of each call and its path."""

    def __init__(self, root: Path, fails: Callable[[str, str], bool]) -> None:
        super().__init__(root, plain=True)
        self._fails = fails

    def write(self, path: str, content: bytes) -> None:
        if self._fails("before write", path):
            raise StoreError("not written")
        super().write(path, content)
        if self._fails("after write", path):
            raise StoreError("the answer was lost")

    def remove(self, path: str) -> None:
        if self._fails("remove", path):
            raise StoreError("not removed")
        super().remove(path)


def new_file(tmp_path: Path, call: str, content: bytes) -> None:
    store = Failing(tmp_path, lambda name, path: name == call)
    with StripedWriter.in_store(store, "model") as file:
        file.write(content)


def test_old_generations_that_cannot_be_removed(tmp_path: Path) -> None:
    for content in (b"one", b"two", b"three"):
        new_file(tmp_path, "remove", content)
    with ParallelFile(str(tmp_path / "model")) as file:
        assert file.read() == b"three"
    new_file(tmp_path, "none", b"four")
    assert len([each for each in (tmp_path / "model").iterdir() if each.is_dir()]) == 2


def test_a_manifest_that_is_not_written_or_whose_answer_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "model", b"before")
    with pytest.raises(StoreError, match="not written"):
        new_file(tmp_path, "before write", b"after")
    assert ParallelFile(str(tmp_path / "model")).read() == b"before"
    with pytest.raises(StoreError, match="answer was lost"):
        new_file(tmp_path, "after write", b"after")
    assert ParallelFile(str(tmp_path / "model")).read() == b"after", "it counts, and is whole"


def test_a_writer_that_ends_after_two_others(tmp_path: Path) -> None:
    slow = StripedWriter(str(tmp_path / "model"))
    slow.write(CONTENT)
    for content in (b"one", b"two"):
        write(tmp_path / "model", content)
    with pytest.raises(StoreError):
        slow.close()
    assert ParallelFile(str(tmp_path / "model")).read() == b"two"


def test_a_forked_process_takes_nothing_away(tmp_path: Path) -> None:
    code = f"""
import os, sys, bootseer_slurm
file = bootseer_slurm.open({str(tmp_path / "model")!r}, "wb")
file.write(bytes(9 * 2**20))
if os.fork() == 0:
    sys.exit(0)
os.wait()
file.close()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert ParallelFile(str(tmp_path / "model")).size == 9 * 2**20


class Slow(FileStore):
    def open(self, path: str, *, bulk: bool = False):  # type: ignore[no-untyped-def]
        reader = super().open(path, bulk=bulk)
        real = reader.read_into

        def read_into(offset: int, view: memoryview) -> int:
            time.sleep(0.05)
            return real(offset, view)

        reader.read_into = read_into  # type: ignore[method-assign]
        return reader


def test_more_readers_than_chunks_are_kept(tmp_path: Path) -> None:
    content = CONTENT * 3
    write(tmp_path / "model", content)
    with ParallelFile.of(striped.open_in(Slow(tmp_path), "model"), "model", streams=4) as file:

        def read(number: int) -> None:
            offset = number * CHUNK_BYTES % (len(content) - 100)
            assert bytes(file.view(offset, 100)) == content[offset : offset + 100]

        with ThreadPoolExecutor(45) as pool:
            list(pool.map(read, range(45)))  # raises what any of them does
