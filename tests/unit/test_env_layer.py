"""What a layer must hold, told from lists of files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from bootseer_slurm.env.key import parts_of, stored_name
from bootseer_slurm.env.layer import Layer, as_shown, decode_files, encode_files, layer_over, with_own_ctime
from bootseer_slurm.env.tree import FileState, source_of, survey
from bootseer_slurm.errors import IntegrityError

OLD = 1_700_000_000


def make(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name.replace("__", ".")
        path.write_text(content)
        os.utime(path, (OLD, OLD))


def saved(root: Path) -> dict[str, FileState]:
    """The list of a snapshot of what lies in a folder now."""
    return {
        path: entry._replace(
            digest=hashlib.sha256((root / path).read_bytes()).digest() if entry.is_file else b""
        )
        for path, entry in survey(root).items()
    }


def test_nothing_changed(tmp_path: Path) -> None:
    make(tmp_path, a="one", b="two")
    base = saved(tmp_path)
    assert layer_over(base, tmp_path, survey(tmp_path), known=base) == Layer({}, [])
    assert layer_over(base, tmp_path, survey(tmp_path), known={}) == Layer({}, []), "by their bytes"


def test_other_bytes_of_the_same_size_and_time(tmp_path: Path) -> None:
    make(tmp_path, a="one", large="x" * 100)
    base = saved(tmp_path)
    make(tmp_path, a="two")
    layer = layer_over(base, tmp_path, survey(tmp_path), known=base)
    assert layer and list(layer.files) == ["a"] and layer.gone == []


def test_a_file_system_that_tells_the_mtime_as_time_of_change(tmp_path: Path) -> None:
    make(tmp_path, a="one", large="x" * 100)
    base = {path: entry._replace(ctime_ns=OLD * 10**9) for path, entry in saved(tmp_path).items()}
    make(tmp_path, a="two")
    tree = {path: entry._replace(ctime_ns=OLD * 10**9) for path, entry in survey(tmp_path).items()}
    layer = layer_over(base, tmp_path, tree, known=with_own_ctime(base))
    assert layer and list(layer.files) == ["a"]
    layer = layer_over(base, tmp_path, tree, known=as_shown(base, {}))
    assert layer and not layer.files, "of a squashfs it can be trusted"


def test_what_is_gone_is_whited_out_at_its_top(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    (tmp_path / "kept").mkdir()
    make(tmp_path, **{"x/y/a": "1", "x/y/b": "2", "kept/a": "3", "kept/b": "4" * 99})
    base = saved(tmp_path)
    for path in ("x/y/a", "x/y/b", "kept/a"):
        (tmp_path / path).unlink()
    (tmp_path / "x" / "y").rmdir()
    (tmp_path / "x").rmdir()
    layer = layer_over(base, tmp_path, survey(tmp_path), known=base)
    assert layer and sorted(layer.gone) == ["kept/a", "x"] and list(layer.files) == ["kept"]


def test_the_list_comes_back_as_it_was(tmp_path: Path) -> None:
    make(tmp_path, a="one")
    (tmp_path / "link").symlink_to(os.fsdecode(b"\xff target"))
    with open(os.fsencode(tmp_path) + b"/\xfe", "w"):
        pass
    base = saved(tmp_path)
    content = encode_files(base)
    assert decode_files(content) == base
    assert decode_files(encode_files({})) == {}
    for damaged in (b"", b"PAR1", content[:-1], content[:50] + b"\0" * 20 + content[70:]):
        with pytest.raises(IntegrityError):
            decode_files(damaged)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("a/__pycache__/b.cpython-311.pyc", "a/b.py"),
        ("__pycache__/b.cpython-311.opt-1.pyc", "b.py"),
        ("a/__pycache__/b.f-1.py311.nbi", None),
        ("a/b.pyc", None),
        ("a/__pycache__", None),
    ],
)
def test_byte_code_and_its_source(path: str, source: str | None) -> None:
    assert source_of(path) == source


@pytest.mark.parametrize("path", ["/home/a/venv", "/home/a/venv in use", "/a for b", "/x in\ny"])
@pytest.mark.parametrize(
    "image", ["", "sha256:" + "0" * 64, "123@456", "docker://host/name:tag", "/lustre/a.sqsh"]
)
@pytest.mark.parametrize("job_class", ["", "0" * 32])
def test_a_name_tells_its_parts(path: str, image: str, job_class: str) -> None:
    assert parts_of(stored_name(path, image, job_class)) == (path, image, job_class)
