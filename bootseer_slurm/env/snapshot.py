"""Saving an environment: its folder as a squashfs blob in the store, byte-compiled, with its mtimes.

Runs as the environment's user. Byte code is worth more than the mount (`import torch` 8.4 s without, 2.6 s
with it), so what is not compiled yet is compiled in a copy; the original is left as it is.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from bootseer_slurm.blob.names import Name
from bootseer_slurm.blob.writer import store_file
from bootseer_slurm.env.fingerprint import package_folders, tree_fingerprint
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.store import Store

# Of 1.3 GB of packages level 1 makes 414 MB in 5 s, 6 364 MB in 8 s, 9 360 MB in 11 s (2 cores). A snapshot
# is made once; at every start the link to the store is the scarcer good. The level costs readers nothing.
_MKSQUASHFS = (
    "-comp",
    "zstd",
    "-Xcompression-level",
    "6",
    "-noappend",
    "-quiet",
    "-no-progress",
    "-no-xattrs",
)
_COMPILE_TIMEOUT_S = 1800


def save(
    store: Store,
    folder: Path,
    *,
    stage: Callable[[str, int | None], None] = lambda text, size_bytes: None,
    progress: Callable[[int], None] = lambda count: None,
) -> tuple[Name, int]:
    """Save the environment in `folder`; gives its name in the store and the snapshot's bytes.

    stage: told what is being done, and of how many bytes if known. progress: told the bytes just stored.
    Raises BootseerError when `folder` is no environment, changed meanwhile, or mksquashfs fails.
    """
    real = folder.resolve(strict=True)
    before = tree_fingerprint(str(real))
    with tempfile.TemporaryDirectory(prefix="bootseer-env-") as scratch:
        source = real
        if _lacks_byte_code(real):
            stage("compiling", None)
            source = Path(scratch) / "tree"
            shutil.copytree(real, source, symlinks=True)
            _compile(source, real)
        stage("packing", None)
        image = Path(scratch) / "snapshot.sqsh"
        done = subprocess.run(
            ["mksquashfs", str(source), str(image), *_MKSQUASHFS], capture_output=True, text=True, check=False
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise BootseerError(f"{folder}: mksquashfs failed: {reason}")
        if tree_fingerprint(str(real)) != before:
            raise BootseerError(
                f"{folder}: was changed while it was saved", hint="save it again when it is complete"
            )
        size_bytes = image.stat().st_size
        stage("storing", size_bytes)
        os.utime(image, (0, 0))  # its own time says nothing, and a young file would be waited for
        name = store_file(
            store, image, kind="environment", name=str(real), fingerprint=before, progress=progress
        )
        return name, size_bytes


def _lacks_byte_code(root: Path) -> bool:
    """Whether any module of a package folder is not compiled."""
    for packages in package_folders(str(root)):
        for folder, _, files in os.walk(root / packages):
            sources = [name for name in files if name.endswith(".py")]
            if sources:
                cache = Path(folder) / "__pycache__"
                compiled = {name.split(".", 1)[0] for name in os.listdir(cache)} if cache.is_dir() else set()
                if any(name.split(".", 1)[0] not in compiled for name in sources):
                    return True
    return False


def _compile(tree: Path, original: Path) -> None:
    """Compile with the environment's own interpreter; one that does not run here leaves it as it is."""
    python = original / "bin" / "python"
    command = [str(python), "-m", "compileall", "-q", "-s", str(tree), "-p", str(original)]
    environ = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    folders = [str(tree / packages) for packages in package_folders(str(tree))]
    try:
        # Files that no Python can compile (templates, Python 2 tests) make it exit 1; the rest is compiled.
        subprocess.run(
            [*command, *folders], capture_output=True, check=False, env=environ, timeout=_COMPILE_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return
