"""Byte code for an environment that lacks it, made aside: the original stays as it is.

It is worth more than the mount: `import torch` takes 8.4 s without, 2.6 s with it.
"""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from bootseer_slurm.env.key import package_folders
from bootseer_slurm.env.tree import Tree, source_of

_TIMEOUT_S = 1800
_VERSION = re.compile(r"(?:^|/)python(\d+\.\d+)/")
# The variable that says: no program of the environment's is run. The agent sets it, for it would run in its
# service.
RUN_NOTHING = "BOOTSEER_RUN_NOTHING"


def uncompiled(root: Path, tree: Tree) -> list[str]:
    """The sources in the package folders of an environment that have no byte code."""
    compiled = {source_of(path) for path in tree}
    folders = tuple("" if folder == "." else f"{folder}/" for folder in package_folders(str(root)))
    return [
        path
        for path, state in tree.items()
        if path.endswith(".py") and path.startswith(folders) and path not in compiled and not state.is_folder
    ]


def interpreter(root: Path) -> list[str]:
    """The beginning of a command that compiles for this environment; empty where none may.

    Its own Python runs code of its owner, also on its way to the compiler. With RUN_NOTHING this project's or
    the system's of the same version does it, without the environment's packages.
    """
    if RUN_NOTHING not in os.environ:
        return [str(root / "bin" / "python")]
    version = next(
        (match[1] for folder in package_folders(str(root)) if (match := _VERSION.search(folder))), None
    )
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return [sys.executable, "-I", "-S"]
    system = Path(f"/usr/bin/python{version}")
    try:
        status = system.stat()
    except OSError:
        return []
    is_roots = status.st_uid == 0 and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return [str(system), "-I", "-S"] if is_roots else []


def compile_aside(root: Path, sources: Sequence[str], folder: Path) -> None:
    """Compile these into the new folder `folder`. Without an interpreter that can, they stay as they are."""
    command = interpreter(root)
    if not command:
        return
    listed = folder.with_name(f"{folder.name}.txt")
    # compileall reads one UTF-8 name a line, without the white space around it.
    paths = [path for path in sources if path.isprintable() and path == path.strip()]
    listed.write_text("".join(f"{root / path}\n" for path in paths), encoding="utf-8", errors="replace")
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    try:
        # Files that no Python can compile (templates, Python 2 tests) make it exit 1; the rest is compiled.
        subprocess.run(
            [*command, "-X", f"pycache_prefix={folder}", "-m", "compileall", "-q", "-i", str(listed)],
            capture_output=True,
            check=False,
            env=environ,
            timeout=_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return


def compiled_aside(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """The compiled files that the environment lacks: the path of each within it, and the file itself."""
    made = folder / root.relative_to("/")
    for below, _, files in os.walk(made):
        cache = os.path.join(os.path.relpath(below, made), "__pycache__")
        for name in sorted(files):
            path = os.path.normpath(os.path.join(cache, name))
            if not (root / path).exists():
                yield path, Path(below, name)
