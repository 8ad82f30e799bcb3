"""The fingerprint of an environment: whether a snapshot of it is still true.

Looked up in the prolog over a shared file system, so it must not touch 30,000 files. Every installer leaves
its marks in a few places: it replaces pyvenv.cfg, adds or replaces a *.dist-info folder, or changes a
top-level module or .pth file. Those are covered, by name, size and whole second of their last change.
What an installer does not touch is not covered: a source file edited in place below a package.
Byte code is left out, for a run must not make a snapshot of its own environment stale.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from bootseer_slurm.errors import InputError

_METADATA = (".dist-info", ".egg-info")


def package_folders(root: str) -> list[str]:
    """The folders of an environment that packages are installed in, relative to it.

    A venv or conda environment has lib/python*/site-packages, a `pip install --target` folder has itself.
    Raises InputError when it is none of these.
    """
    folders = sorted(str(path.relative_to(root)) for path in Path(root).glob("lib*/python*/site-packages"))
    if folders:
        return folders
    if any(name.endswith(_METADATA) for name in os.listdir(root)):
        return ["."]
    raise InputError(
        f"environment {root}: not a Python environment",
        hint="expected lib/python*/site-packages or packages with their *.dist-info in it",
    )


def tree_fingerprint(root: str) -> str:
    """The sha256, in hexadecimal, over what an installer changes.

    Raises InputError when `root` is no environment, OSError when it cannot be read.
    """
    if not Path(root).is_dir():
        raise InputError(f"environment {root}: not a directory")
    digest = hashlib.sha256()
    for folder in dict.fromkeys([".", "bin", *package_folders(root)]):
        for line in _entries(os.path.join(root, folder)):
            digest.update(os.fsencode(f"{folder}/{line}\n"))
    return digest.hexdigest()


def _entries(folder: str) -> Iterator[str]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        if entry.name == "__pycache__":
            continue
        status = entry.stat(follow_symlinks=False)
        kind = stat.S_IFMT(status.st_mode)
        if kind == stat.S_IFDIR and not entry.name.endswith(_METADATA):
            yield f"{entry.name} directory"
        elif kind == stat.S_IFLNK:
            yield f"{entry.name} link {os.readlink(entry.path)}"
        else:
            size_bytes = status.st_size if kind == stat.S_IFREG else 0
            yield f"{entry.name} {kind:o} {size_bytes} {int(status.st_mtime)}"
