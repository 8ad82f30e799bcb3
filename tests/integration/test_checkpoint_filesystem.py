"""Striped files through fsspec and pyarrow, as the libraries that write checkpoints use them."""

from __future__ import annotations

from pathlib import Path

import fsspec
import numpy
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.numpy

import bootseer_slurm
from bootseer_slurm.checkpoint.filesystem import StripedFileSystem, arrow_filesystem

TENSORS = {"a": numpy.arange(3_000_000, dtype=numpy.float32), "b": numpy.ones((17, 3), dtype=numpy.int8)}


def test_fsspec_finds_it(tmp_path: Path) -> None:
    url = f"bootseer+file://{tmp_path}/sub/model.bin"
    with fsspec.open(url, "wb") as file:
        file.write(b"x" * 10_000_000)
    assert (tmp_path / "sub" / "model.bin" / "manifest").exists()
    with fsspec.open(url) as file:
        assert file.read() == b"x" * 10_000_000
    fs, path = fsspec.core.url_to_fs(url)
    assert isinstance(fs, StripedFileSystem) and path == f"{tmp_path}/sub/model.bin"
    assert fs.unstrip_protocol(path) == url


def test_files_and_folders(tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(f"bootseer+file://{tmp_path}")
    (tmp_path / "plain").write_bytes(b"12345")
    fs.makedirs(f"{root}/step_1", exist_ok=True)
    for name, content in (("step_1/a", b"one"), ("step_1/b", b"two")):
        fs.pipe_file(f"{root}/{name}", content)
    assert sorted(fs.ls(root, detail=False)) == [f"{root}/plain", f"{root}/step_1"]
    assert {each["name"]: (each["type"], each["size"]) for each in fs.ls(f"{root}/step_1")} == {
        f"{root}/step_1/a": ("file", 3),
        f"{root}/step_1/b": ("file", 3),
    }
    assert fs.isdir(f"{root}/step_1") and fs.isfile(f"{root}/step_1/a") and fs.isfile(f"{root}/plain")
    assert sorted(fs.find(root)) == [f"{root}/plain", f"{root}/step_1/a", f"{root}/step_1/b"]
    assert fs.glob(f"{root}/step_*/a") == [f"{root}/step_1/a"]
    assert fs.cat_file(f"{root}/step_1/b") == b"two" and fs.cat_file(f"{root}/plain", 1, 3) == b"23"
    fs.mv(f"{root}/step_1/b", f"{root}/step_1/a")
    assert fs.cat_file(f"{root}/step_1/a") == b"two" and not fs.exists(f"{root}/step_1/b")
    fs.cp_file(f"{root}/plain", f"{root}/copy")
    assert fs.cat_file(f"{root}/copy") == b"12345"
    with pytest.raises(IsADirectoryError):
        fs.rm(f"{root}/step_1")
    fs.rm(f"{root}/step_1", recursive=True)
    assert not fs.exists(f"{root}/step_1")
    for missing in (
        lambda: fs.info(f"{root}/none"),
        lambda: fs.open(f"{root}/none"),
        lambda: fs.mv(f"{root}/none", root),
    ):
        with pytest.raises(FileNotFoundError):
            missing()
    with pytest.raises(ValueError, match="mode"):
        fs.open(f"{root}/plain", "ab")


def test_safetensors(tmp_path: Path) -> None:
    with fsspec.open(f"bootseer+file://{tmp_path}/model.safetensors", "wb") as file:
        file.write(safetensors.numpy.save(TENSORS))
    with bootseer_slurm.open(str(tmp_path / "model.safetensors")) as file:
        found = safetensors.numpy.load(file.read())
    assert all((found[name] == tensor).all() for name, tensor in TENSORS.items())


def test_pyarrow(tmp_path: Path) -> None:
    filesystem, path = arrow_filesystem(f"bootseer+file://{tmp_path}/table.parquet")
    table = pyarrow.table({"n": list(range(100_000)), "text": [str(number) for number in range(100_000)]})
    pyarrow.parquet.write_table(table, path, filesystem=filesystem)
    assert (tmp_path / "table.parquet" / "manifest").exists()
    assert pyarrow.parquet.read_table(path, filesystem=filesystem).equals(table)
    assert pyarrow.parquet.read_table(path, filesystem=filesystem, columns=["n"]).num_rows == 100_000


def test_names_behind_a_query_and_with_odd_characters(tmp_path: Path) -> None:
    """As torch's FsspecWriter makes them: it joins names to the URL."""
    base = f"bootseer+file://{tmp_path}/dir?option=a:1"
    fs, path = fsspec.core.url_to_fs(base)
    assert path == f"{tmp_path}/dir"
    names = ("__0_0.distcp", ".metadata", "x#1.pt")
    for name in names:
        fs.pipe_file(f"{base}/{name}", name.encode())
    assert [fs.cat_file(f"{tmp_path}/dir/{name}") for name in names] == [name.encode() for name in names]


def test_what_could_destroy_data(tmp_path: Path) -> None:
    fs, root = fsspec.core.url_to_fs(f"bootseer+file://{tmp_path}")
    fs.pipe_file(f"{root}/step.tmp/a", b"one")
    with pytest.raises(OSError, match="not empty"):
        fs.rmdir(f"{root}/step.tmp")
    fs.mv(f"{root}/step.tmp/a", f"{root}/step.tmp/a")
    assert fs.cat_file(f"{root}/step.tmp/a") == b"one"
    fs.mv(f"{root}/step.tmp", f"{root}/step")
    assert fs.cat_file(f"{root}/step/a") == b"one" and not fs.exists(f"{root}/step.tmp")
    with pytest.raises(NotImplementedError), fs.transaction:
        fs.open(f"{root}/b", "wb")
    assert not fs.exists(f"{root}/b")
