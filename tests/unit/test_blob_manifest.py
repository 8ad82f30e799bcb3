"""The manifest and the layout of blobs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from pytest_mock import MockerFixture

from bootseer_slurm.blob.digest import BLAKE3, DIGEST_BYTES, SHA256
from bootseer_slurm.blob.manifest import (
    Layout,
    Manifest,
    decode,
    decode_unmanaged,
    encode_unmanaged,
    manifest_of,
)
from bootseer_slurm.errors import IntegrityError

KIB = 1024
# As written before manifests named their digest; and the id that names, traces and signatures have of it.
OLD = (
    b'{"block_bytes": 4096, "chunk_bytes": 4096, "format": "bootseer-blob", "kind": "image", "objects": 2, '
    b'"size_bytes": 12283, "version": 1}\n' + bytes(range(96))
)
OLD_ID = "0c3a52be747e8e3e56c65bf9e9d98e56ccc8768b9c971fe215ce3f8401d4f56e"
OLD_STRIPED = OLD.replace(
    b'"kind": "image"', b'"generation": "171717171717171717171717", "kind": "checkpoint"'
)
OLD_STRIPED_ID = "02b6ed9e59f3d83383f1963f5e9ef075540fe8a5047629f29ba46481ff69f289"
OLD_UNMANAGED = (
    b'{"block_bytes": 4096, "chunk_bytes": 4096, "format": "bootseer-file", "objects": 1, '
    b'"size_bytes": 12283, "version": 1}\n'
)


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


def manifest(digest: str = SHA256) -> Manifest:
    layout = Layout(3 * 4 * KIB - 5, block_bytes=4 * KIB, chunk_bytes=4 * KIB, objects=2, digest=digest)
    return Manifest("image", layout, bytes(range(3 * DIGEST_BYTES)))


@pytest.mark.parametrize("digest", [SHA256, BLAKE3])
def test_a_manifest_comes_back_as_it_was(digest: str) -> None:
    original = manifest(digest)
    again = decode(original.encode())
    assert again == original
    assert again.id == original.id
    assert again.digest(1) == bytes(range(DIGEST_BYTES, 2 * DIGEST_BYTES))
    assert again.layout.block_size(2) == 4 * KIB - 5
    assert manifest_of(original.id, original.layout, original.digests) == original


@pytest.mark.parametrize("content, blob_id", [(OLD, OLD_ID), (OLD_STRIPED, OLD_STRIPED_ID)])
def test_an_old_manifest_keeps_its_bytes_and_its_id(content: bytes, blob_id: str) -> None:
    old = decode(content)
    assert old.layout == Layout(3 * 4 * KIB - 5, 4 * KIB, 4 * KIB, 2, digest="sha256")
    assert old.encode() == content
    assert old.id == blob_id


def test_a_new_manifest_names_its_digest_and_old_versions_refuse_it() -> None:
    new = manifest(BLAKE3)
    line = json.loads(new.encode().partition(b"\n")[0])
    assert (line["digest"], line["version"]) == ("blake3", 2)
    assert new.id != OLD_ID


@pytest.mark.parametrize("digest", [SHA256, BLAKE3])
def test_what_is_kept_of_an_unmanaged_file_names_its_digest(digest: str) -> None:
    layout = Layout(3 * 4 * KIB - 5, 4 * KIB, 4 * KIB, digest=digest)
    assert decode_unmanaged(encode_unmanaged(layout)) == layout
    assert (encode_unmanaged(layout) == OLD_UNMANAGED) == (digest == SHA256)


def test_digests_are_of_blocks_in_their_order() -> None:
    content = bytes(range(251)) * 50
    for digest in (SHA256, BLAKE3):
        layout = replace(manifest(digest).layout, size_bytes=len(content))
        made = Manifest("image", layout, layout.digests_of(memoryview(content)))
        assert len(made.digests) == layout.blocks * DIGEST_BYTES
        for block in range(layout.blocks):
            part = content[block * layout.block_bytes :][: layout.block_bytes]
            assert made.agrees(block, part) and not made.agrees(block, part[:-1] + b"x")
            assert not made.agrees((block + 1) % layout.blocks, part)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"version": 2, "digest": "sha256"},
        {"version": 2, "digest": "md5"},
        {"version": 1, "digest": "blake3"},
        {"version": 3, "digest": "blake3"},
        {"version": 2, "digest": ["blake3"]},
        {"version": 2, "digest": None},
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
