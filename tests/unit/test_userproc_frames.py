"""Frames between processes of different users: whole, cut off, too large, or no frames at all."""

from __future__ import annotations

import io
from collections.abc import Iterator

import pytest

from bootseer_slurm.errors import BootseerError, InputError, StoreError
from bootseer_slurm.userproc.frames import Frame, read_frames, write_all


def written(*frames: Frame, error: BootseerError | None = None) -> bytes:
    def produce() -> Iterator[Frame]:
        yield from frames
        if error:
            raise error

    file = io.BytesIO()
    write_all(file, produce)
    return file.getvalue()


def read(content: bytes) -> list[Frame]:
    return list(read_frames(io.BytesIO(content), limit_bytes=1000))


FRAMES = (Frame({"node": "n1"}, b"\n{}\n"), Frame({"node": "n2"}, b""))


def test_frames_come_as_they_were_written() -> None:
    found = read(written(*FRAMES))
    assert [(frame.header["node"], frame.content) for frame in found] == [("n1", b"\n{}\n"), ("n2", b"")]


def test_what_is_cut_off_anywhere_is_an_error() -> None:
    whole = written(*FRAMES)
    for end in range(len(whole)):
        with pytest.raises(StoreError):
            read(whole[:end])


def test_the_writers_error_comes_to_the_reader_in_one_line() -> None:
    content = written(FRAMES[0], error=InputError("not\x1b[1m\nyours", hint="ask"))
    with pytest.raises(InputError) as caught:
        read(content)
    assert (caught.value.message, caught.value.hint) == ("not [1m yours", "ask")


@pytest.mark.parametrize("line", [
    b"rubbish\n", b"[]\n", b'{"bytes": -1}\n', b'{"bytes": 1001}\n', b'{"bytes": "1"}\n', b'{"bytes": true}\n', b"{}\n",
    b'{"node": 1}\n', b"[" * 100_000, b'{"bytes": 1' + b"0" * 70_000,
])  # fmt: skip
def test_what_is_no_frame_is_an_error(line: bytes) -> None:
    with pytest.raises(StoreError):
        read(line)


def test_an_error_of_an_unknown_class_is_one_of_the_store() -> None:
    with pytest.raises(StoreError, match="boo"):
        read(b'{"error": "boo", "class": "SystemExit", "bytes": 0}\n')
