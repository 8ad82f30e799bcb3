"""The key of an environment: what changes it, and what does not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from bootseer_slurm.env.key import Key, differences, fingerprint_of, key_of
from bootseer_slurm.errors import InputError

OLD = (1_700_000_000, 1_700_000_000)


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """A venv with a package, an editable install of a repository beside it, and requirements above it."""
    root = tmp_path / "project" / "venv"
    packages = root / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (root / "bin").mkdir()
    (root / "pyvenv.cfg").write_text("home = /usr/bin\nversion = 3.11.2\nprompt = x\n")
    (packages / "thing").mkdir()
    (packages / "thing" / "__init__.py").write_text("")
    (packages / "thing-1.0.dist-info").mkdir()
    (packages / "mine-0.1.dist-info").mkdir()
    source = tmp_path / "source"
    git(tmp_path, "init", "-q", str(source))
    (source / "mine.py").write_text("")
    git(source, "add", "-A")
    git(source, "commit", "-qm", "one")
    record = {"url": f"file://{source}", "dir_info": {"editable": True}}
    (packages / "mine-0.1.dist-info" / "direct_url.json").write_text(json.dumps(record))
    (packages / "repo-2.dist-info").mkdir()
    record = {"url": "https://example.org/repo.git", "vcs_info": {"vcs": "git", "commit_id": "abc123"}}
    (packages / "repo-2.dist-info" / "direct_url.json").write_text(json.dumps(record))
    (tmp_path / "project" / "requirements.txt").write_text("thing==1.0\n")
    (tmp_path / "home" / ".config" / "pip").mkdir(parents=True)
    for folder, _, files in os.walk(root):
        for path in (folder, *(os.path.join(folder, name) for name in files)):
            os.utime(path, OLD)
    return root


def git(folder: Path, *words: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


def key(venv: Path, image: str = "", known: Key | None = None) -> Key:
    return key_of(str(venv), home=str(venv.parents[1] / "home"), image=image, known=known)


def site(venv: Path) -> Path:
    return venv / "lib" / "python3.11" / "site-packages"


def test_each_part_is_told(venv: Path) -> None:
    parts = key(venv)
    assert parts["interpreter"] == "home = /usr/bin\nversion = 3.11.2"
    assert parts["packages"].splitlines()[1:] == ["mine-0.1", "repo-2", "thing-1.0"]
    assert parts["requirements"].startswith(f"{venv.parent}/requirements.txt ")
    mine, repo = parts["sources"].splitlines()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=venv.parents[1] / "source",
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    assert mine == f"mine-0.1 in {venv.parents[1] / 'source'} at {head}"
    assert repo == "repo-2 from https://example.org/repo.git at abc123"
    assert parts["system"] == f"{os.confstr('CS_GNU_LIBC_VERSION')}, Linux {os.uname().machine}"
    assert key(venv) == parts and key(venv, known=parts) == parts


def upgrade(venv: Path) -> None:
    (site(venv) / "thing-1.0.dist-info").rename(site(venv) / "thing-1.1.dist-info")


def reinstall(venv: Path) -> None:
    os.utime(site(venv) / "thing-1.0.dist-info", (1_700_000_009, 1_700_000_009))


def commit(venv: Path) -> None:
    git(venv.parents[1] / "source", "commit", "-q", "--allow-empty", "-m", "two")


CHANGES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a package's version": ("packages", upgrade),
    "a package again": ("packages", reinstall),
    "a module at the top": ("packages", lambda venv: (site(venv) / "six.py").write_text("x")),
    "a script": ("packages", lambda venv: (venv / "bin" / "tool").write_text("x")),
    "conda's record": ("packages", lambda venv: (venv / "conda-meta").mkdir() or (venv / "conda-meta" / "x-1.json").touch()),
    "the interpreter": ("interpreter", lambda venv: (venv / "pyvenv.cfg").write_text("home = /opt/bin\nversion = 3.12.1\n")),
    "requirements above": ("requirements", lambda venv: (venv.parent / "requirements.txt").write_text("thing==2\n")),
    "a lock file": ("requirements", lambda venv: (venv.parent / "uv.lock").write_text("x")),
    "an editable commit": ("sources", commit),
    "pip's configuration": ("installer", lambda venv: (venv.parents[1] / "home/.config/pip/pip.conf").write_text("[global]")),
}  # fmt: skip


@pytest.mark.parametrize("what", CHANGES)
def test_what_changes_it(venv: Path, what: str) -> None:
    part, change = CHANGES[what]
    before = key(venv)
    change(venv)
    after = key(venv, known=before)
    assert fingerprint_of(after) != fingerprint_of(before)
    assert part in differences(before, after)
    assert key(venv) == after, "and an earlier key hides nothing"


def test_what_does_not(venv: Path) -> None:
    before = key(venv)
    (site(venv) / "__pycache__").mkdir()
    (site(venv) / "thing" / "__pycache__").mkdir()
    (site(venv) / "thing" / "__init__.py").write_text("edited in place")
    (venv.parent / "train.py").write_text("x")
    assert key(venv) == before


def test_a_container_has_its_own_system(venv: Path) -> None:
    first, second = key(venv, image="sha256:1"), key(venv, image="sha256:2")
    assert len({fingerprint_of(each) for each in (first, second, key(venv))}) == 3
    assert list(differences(first, second)) == ["system"]


def test_differences_say_which_package(venv: Path) -> None:
    before = key(venv)
    upgrade(venv)
    lines = differences(before, key(venv))["packages"]
    assert "- thing-1.0" in lines and "+ thing-1.1" in lines


def test_git_as_it_lies(venv: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    expected = key(venv)["sources"]
    git(source, "pack-refs", "--all")
    assert key(venv)["sources"] == expected
    git(source, "checkout", "-q", "--detach")
    assert key(venv)["sources"] == expected
    (source / ".git" / "HEAD").write_text("ref: ../../../../etc/passwd\n")
    assert "at no commit" in key(venv)["sources"]


def test_other_shapes(tmp_path: Path) -> None:
    target = tmp_path / "packages"
    (target / "x-1.dist-info").mkdir(parents=True)
    assert key_of(str(target), home=str(tmp_path))["packages"].splitlines()[1:] == ["x-1"]
    (target / "x-1.dist-info" / "direct_url.json").write_text("[" * 100_000)
    assert key_of(str(target), home=str(tmp_path))["sources"] == ""
    conda = tmp_path / "conda"
    (conda / "lib" / "python3.12" / "site-packages").mkdir(parents=True)
    (conda / "conda-meta").mkdir()
    (conda / "conda-meta" / "python-3.12.4-h1.json").touch()
    assert key_of(str(conda), home=str(tmp_path))["interpreter"] == "python-3.12.4-h1.json"
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="not a Python environment"):
        key_of(str(tmp_path / "empty"), home="/")
    with pytest.raises(InputError, match="not a directory"):
        key_of(str(tmp_path / "none"), home="/")


@pytest.mark.parametrize("url", ["file://[", "file:///a%00b", "file:///\ud800"])
def test_odd_sources_are_no_fault(venv: Path, url: str) -> None:
    record = {"url": url, "dir_info": {"editable": True}}
    (site(venv) / "mine-0.1.dist-info" / "direct_url.json").write_text(json.dumps(record))
    (venv / ".git").write_bytes(b"gitdir: a\0b\n")
    assert "repo-2 from https://example.org/repo.git at abc123" in key(venv)["sources"]
    assert fingerprint_of(key(venv))
