"""Where the files of a squashfs lie, against what mksquashfs made; and images that are damaged."""

from __future__ import annotations

import os
import random
import subprocess
import zlib
from pathlib import Path

import pyarrow as pa
import pytest

from bootseer_slurm.blob.squashfs.files import Squashfs, read_files
from bootseer_slurm.blob.squashfs.superblock import read_superblock
from bootseer_slurm.errors import InputError
from bootseer_slurm.store import FileReader

BLOCK_BYTES = 131072


def make_tree(root: Path) -> dict[str, bytes]:
    """Files of all sorts; gives their contents by path."""
    chance = random.Random(1)
    contents = {
        "empty": b"",
        "small": b"text " * 50,
        "two blocks and a tail": chance.randbytes(300_000),
        "exact": chance.randbytes(BLOCK_BYTES),
        "zeros": bytes(500_000),
        "text": b"the same line\n" * 30_000,
        "deep/er/and/deeper/file": b"x",
        "ümlaut\n": b"odd name",
        **{f"many/f{number:04}": chance.randbytes(chance.randrange(3000)) for number in range(1500)},
    }
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    (root / "link").symlink_to("small")
    (root / "hard").hardlink_to(root / "small")
    os.mkfifo(root / "pipe")
    (root / "nothing").mkdir()
    return contents | {"hard": contents["small"]}


def pack(root: Path, target: Path, *options: str) -> Path:
    command = ["mksquashfs", str(root), str(target), "-noappend", "-quiet", "-no-progress", *options]
    subprocess.run(command, check=True)
    return target


def files_of(path: Path) -> Squashfs:
    reader = FileReader(path)
    try:
        return read_files(reader, "image")
    finally:
        reader.close()


def unpacked(content: bytes, size_bytes: int, codec: str) -> bytes:
    """A block as it was before it was compressed, if it was."""
    if len(content) == size_bytes:
        return content
    if codec == "gzip":
        return zlib.decompress(content)
    if codec == "zstd":
        return bytes(pa.CompressedInputStream(pa.BufferReader(content), "zstd").read(size_bytes))
    return bytes(pa.Codec("lz4_raw").decompress(content, decompressed_size=BLOCK_BYTES))[:size_bytes]


@pytest.mark.parametrize(
    "options",
    ["-comp lz4", "-comp zstd", "-comp gzip", "-comp zstd -noI", "-comp zstd -no-fragments -no-exports"],
)
def test_each_block_lies_where_the_tables_say(tmp_path: Path, options: str) -> None:
    contents = make_tree(tmp_path / "tree")
    image = pack(tmp_path / "tree", tmp_path / "image", *options.split())
    found = files_of(image)
    assert found.block_bytes == BLOCK_BYTES
    assert {path: file.size_bytes for path, file in found.files.items()} == {
        path: len(content) for path, content in contents.items()
    }
    raw, codec = image.read_bytes(), options.split()[1]
    for path, content in contents.items():
        blocks = found.files[path].blocks
        assert len(blocks) == -(-len(content) // BLOCK_BYTES)
        whole = len(content) // BLOCK_BYTES
        for number, (offset, size_bytes) in enumerate(blocks[:whole]):
            block = content[number * BLOCK_BYTES : (number + 1) * BLOCK_BYTES]
            stored = raw[offset : offset + size_bytes]
            assert (unpacked(stored, BLOCK_BYTES, codec) if size_bytes else bytes(BLOCK_BYTES)) == block
    shared = {
        found.files[f"many/f{number:04}"].blocks for number in range(1500) if contents[f"many/f{number:04}"]
    }
    assert len(shared) < 100 or "-no-fragments" in options, "small files share fragments"


def test_an_empty_image(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    assert files_of(pack(tmp_path / "tree", tmp_path / "image")).files == {}


def test_a_damaged_image_is_one_clear_error_or_other_files(tmp_path: Path) -> None:
    """It is its user's, who may write what he likes: nothing but an InputError may come of it."""
    make_tree(tmp_path / "tree")
    image = pack(tmp_path / "tree", tmp_path / "image", "-comp", "lz4", "-noI")
    raw, chance = image.read_bytes(), random.Random(7)
    reader = FileReader(image)
    start = read_superblock(reader, "image").tables_start
    reader.close()
    refused = 0
    for _ in range(300):
        content = bytearray(raw)
        for _ in range(chance.randrange(1, 5)):
            place = chance.choice([chance.randrange(4, 96), chance.randrange(start, len(raw))])
            content[place] = chance.randrange(256)
        if chance.random() < 0.2:
            del content[chance.randrange(96, len(content)) :]
        image.write_bytes(content)
        try:
            found = files_of(image)
        except InputError as error:
            refused += 1
            assert error.message.startswith("image image: ")
        else:
            assert all("/../" not in f"/{path}/" for path in found.files)
    assert refused > 50


def test_folders_that_share_a_listing_are_refused(tmp_path: Path) -> None:
    """A small image would otherwise name each of its files in each of its folders."""
    for number in range(60):
        (tmp_path / f"tree/empty{number}").mkdir(parents=True)
        (tmp_path / f"tree/full/{number}").parent.mkdir(exist_ok=True)
        (tmp_path / f"tree/full/{number}").touch()
    image = pack(tmp_path / "tree", tmp_path / "image", "-noI")
    assert len(files_of(image).files) == 60
    raw, reader = bytearray(image.read_bytes()), FileReader(image)
    head = read_superblock(reader, "image")
    reader.close()
    inodes = range(head.inodes + 2, head.inodes + 2 + 32 * head.inode_count, 32)  # all are of 32 bytes
    folders = [place for place in inodes if raw[place] == 1]
    listing = {
        place: (bytes(raw[place + 16 : place + 20]), bytes(raw[place + 24 : place + 28])) for place in folders
    }
    full = min((each for each in listing.values() if each[1][:2] != b"\3\0"), key=lambda each: each[1][:2])
    for place in folders:
        if listing[place][1][:2] == b"\3\0":
            raw[place + 16 : place + 20], raw[place + 24 : place + 28] = full
    image.write_bytes(raw)
    with pytest.raises(InputError, match="tables cannot be read"):
        files_of(image)
