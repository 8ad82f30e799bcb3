"""The manifest and the layout of blobs."""

from __future__ import annotations

import json

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.manifest import DIGEST_BYTES, Layout, Manifest, decode
from bootseer_slurm.errors import IntegrityError

KIB = 1024


@pytest.mark.parametrize("objects", [1, 2, 3, 7])
@pytest.mark.parametrize("size_bytes", [0, 1, 8 * KIB, 8 * KIB + 1, 100 * KIB - 1, 128 * KIB])
def test_every_byte_lies_in_exactly_one_place(size_bytes: int, objects: int) -> None:
    layout = Layout(size_bytes, block_bytes=4 * KIB, chunk_bytes=8 * KIB, objects=objects)
    ends = [0] * objects
    for offset in range(0, size_bytes, layout.chunk_bytes):
        extent = layout.extent(offset, min(layout.chunk_bytes, size_bytes - offset))
        assert extent.offset == ends[extent.object], "objects are written front to back without gaps"
        ends[extent.object] += extent.size_bytes
    assert ends == [layout.object_size(index) for index in range(objects)]
    assert sum(ends) == size_bytes


def manifest() -> Manifest:
    layout = Layout(3 * 4 * KIB - 5, block_bytes=4 * KIB, chunk_bytes=4 * KIB, objects=2)
    return Manifest("image", layout, bytes(range(3 * DIGEST_BYTES)))


def test_a_manifest_comes_back_as_it_was() -> None:
    original = manifest()
    again = decode(original.encode())
    assert again == original
    assert again.id == original.id
    assert again.digest(1) == bytes(range(DIGEST_BYTES, 2 * DIGEST_BYTES))
    assert again.layout.block_size(2) == 4 * KIB - 5


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"format": "tar"},
        {"kind": "virus"},
        {"size_bytes": -1},
        {"size_bytes": True},
        {"size_bytes": 10**18},
        {"block_bytes": 0},
        {"block_bytes": 3},
        {"chunk_bytes": 4 * KIB + 1},
        {"chunk_bytes": 2**40},
        {"objects": 0},
        {"objects": 10**6},
    ],
)
def test_a_hostile_manifest_is_refused(change: dict[str, object]) -> None:
    line, _, digests = manifest().encode().partition(b"\n")
    content = json.dumps({**json.loads(line), **change}).encode() + b"\n" + digests
    with pytest.raises(IntegrityError):
        decode(content)


@pytest.mark.parametrize(
    "content", [b"", b"\n", b"[]\n", b"{}\n", b"{", b"[" * 100_000 + b"\n", b"[" * 3000 + b"\n", b"\xff\n"]
)
def test_what_is_no_manifest_is_refused(content: bytes) -> None:
    with pytest.raises(IntegrityError):
        decode(content)


def test_a_header_that_does_not_end_is_not_parsed(mocker: MockerFixture) -> None:
    loads = mocker.spy(json, "loads")
    with pytest.raises(IntegrityError):
        decode(b'{"a": "' + b"x" * 10_000 + b'"}\n')
    assert not loads.called


def test_a_truncated_manifest_is_refused() -> None:
    with pytest.raises(IntegrityError):
        decode(manifest().encode()[:-1])
