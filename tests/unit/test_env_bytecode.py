"""Byte code made aside: by which Python, and that the agent runs none of a user's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bootseer_slurm.env import bytecode

OURS = f"python{sys.version_info.major}.{sys.version_info.minor}"


def environment(folder: Path, version: str = OURS) -> tuple[Path, Path]:
    """An environment whose Python leaves a marker, and the marker."""
    root, marker = folder / "venv", folder / "ran"
    packages = root / "lib" / version / "site-packages"
    (packages / "thing-1.dist-info").mkdir(parents=True)
    (packages / "thing.py").write_text("VALUE = 7\n")
    (packages / "evil.pth").write_text(f"import pathlib; pathlib.Path({str(marker)!r}).touch()\n")
    (root / "bin").mkdir()
    (root / "bin" / "python").write_text(f"#!/bin/sh\ntouch {marker}\n")
    (root / "bin" / "python").chmod(0o755)
    (root / "pyvenv.cfg").write_text("home = /usr/bin\n")
    return root, marker


def compiled(root: Path, version: str, aside: Path) -> list[str]:
    bytecode.compile_aside(root, [f"lib/{version}/site-packages/thing.py"], aside)
    return [path for path, _ in bytecode.compiled_aside(root, aside)]


def test_a_users_own_command_compiles_with_the_environments_python(tmp_path: Path) -> None:
    root, marker = environment(tmp_path)
    assert compiled(root, OURS, tmp_path / "aside") == [] and marker.exists()


def test_the_agents_runs_nothing_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bytecode.RUN_NOTHING, "1")
    root, marker = environment(tmp_path)
    (made,) = compiled(root, OURS, tmp_path / "aside")
    assert made.startswith(f"lib/{OURS}/site-packages/__pycache__/thing.") and not marker.exists()
    content = next(path for _, path in bytecode.compiled_aside(root, tmp_path / "aside"))
    code = f"import runpy; print(runpy.run_path({str(content)!r})['VALUE'])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"7\n"


def test_a_version_that_nobody_has_stays_uncompiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(bytecode.RUN_NOTHING, "1")
    root, marker = environment(tmp_path, "python2.0")
    assert compiled(root, "python2.0", tmp_path / "aside") == [] and not marker.exists()
