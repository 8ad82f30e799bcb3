"""Named pieces of bytes through a pipe or a socket, between processes of different users.

A frame is a line of JSON, whose "bytes" says how much content follows it. The last one has "end", or "error"
where the writer failed; without it the stream was cut off. A reader believes no length without a limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

from bootseer_slurm.errors import BootseerError, StoreError

HEADER_LIMIT_BYTES = 64 * 1024
_MESSAGE_LIMIT = 500


class Frame(NamedTuple):
    """One piece: a header that says what it is, and its bytes."""

    header: dict[str, Any]
    content: bytes


def write_frame(file: BinaryIO, header: dict[str, Any], content: bytes | memoryview = b"") -> None:
    """Write one frame. Raises OSError."""
    file.write(json.dumps({**header, "bytes": len(content)}).encode() + b"\n")
    file.write(content)


def write_all(file: BinaryIO, produce: Callable[[], Iterator[Frame]]) -> None:
    """Write the frames of `produce`, and the end; an error of it goes to the reader. Raises OSError."""
    try:
        for frame in produce():
            write_frame(file, frame.header, frame.content)
            file.flush()  # a reader takes silence for a writer that hangs
        write_frame(file, {"end": 1})
    except BootseerError as error:
        text = error.message[:_MESSAGE_LIMIT]
        write_frame(file, {"error": text, "hint": error.hint, "class": type(error).__name__})
    file.flush()


def read_frames(file: BinaryIO, *, limit_bytes: int) -> Iterator[Frame]:
    """The frames until the end. limit_bytes: of each one's content.

    Raises the error that the writer had; StoreError when the stream is cut off or holds no frames.
    """
    while True:
        line = file.readline(HEADER_LIMIT_BYTES)
        try:
            header = json.loads(line) if line.endswith(b"\n") else None
            size_bytes = header["bytes"] if isinstance(header, dict) else -1
        except (ValueError, KeyError, RecursionError):
            size_bytes = -1
        if type(size_bytes) is not int or not 0 <= size_bytes <= limit_bytes:
            raise StoreError("the answer was cut off" if not line else "the answer cannot be read")
        assert header is not None
        if "error" in header:
            raise _error(header)
        if "end" in header:
            return
        content = file.read(size_bytes)
        if len(content) != size_bytes:
            raise StoreError("the answer was cut off")
        yield Frame(header, content)


def _error(header: dict[str, Any]) -> BootseerError:
    hint = header.get("hint")
    message, hint = _printable(header["error"]), _printable(hint) if hint else None
    return BootseerError.of_class(str(header.get("class")), message, hint=hint)


def _printable(value: object) -> str:
    return "".join(c if c.isprintable() else " " for c in str(value)[:_MESSAGE_LIMIT])
