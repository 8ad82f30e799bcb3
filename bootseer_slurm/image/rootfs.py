"""The files that `enroot start` reads in a root file system, made from an image's configuration.

    etc/environment   the image's variables, one NAME=value a line
    etc/rc            a shell script that gets the command as its arguments: goes to the working directory,
                      sources etc/rc.local, and execs the entry point with the command
    etc/rc.local      for the user to change; made empty
    etc/fstab         the image's volumes, as binds of the folder onto itself

(enroot's doc/image-format.md.) The tree is hostile: an image may hold `etc -> /home/someone`. So every step
goes by descriptors, follows no symbolic link, and puts a real file or folder where one is in the way, as
the layer does that enroot lays on top.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*=[^\n\0]*")
_VOLUME = re.compile(r"/[^\s\\$'\"]*")


def configure(rootfs: Path, config: dict[str, Any], provenance: str) -> None:
    """Write enroot's files into `rootfs` from an OCI image configuration.

    provenance: the reference that the image was made from. What the configuration has of the wrong kind, and
    variables of several lines, which the files cannot hold, are left out. Raises OSError.
    """
    found = config.get("config")
    image: dict[str, Any] = found if isinstance(found, dict) else {}
    workdir = image.get("WorkingDir")
    folder = workdir if isinstance(workdir, str) and workdir.startswith("/") else "/"
    with _opened(rootfs) as root:
        _make_folders(root, folder)
        with _opened_inside(root, "etc") as etc:
            _write(etc, "environment", _lines(_texts(image, "Env"), _VARIABLE))
            volumes = image.get("Volumes")
            paths = [path for path in volumes if isinstance(path, str)] if isinstance(volumes, dict) else []
            mounts = [
                f"${{ENROOT_ROOTFS}}{path} {path} none x-create=dir,bind,rw,nosuid,nodev"
                for path in sorted(paths)
                if _VOLUME.fullmatch(path)
            ]
            _write(etc, "fstab", "".join(f"{mount}\n" for mount in mounts))
            entry, command = _texts(image, "Entrypoint"), _texts(image, "Cmd")
            _write(etc, "rc", _rc(folder, entry, command, provenance))
            _write(etc, "rc.local", "# Sourced by /etc/rc when the container starts.\n")


def _rc(workdir: str, entry: list[str], command: list[str], provenance: str) -> str:
    quoted = shlex.quote(workdir)
    if not entry and not command:
        command = ["/bin/sh"]
    start = " ".join(["exec", *map(shlex.quote, entry)])
    return "\n".join(
        [
            f"# enroot-provenance: {provenance}",
            f"mkdir -p {quoted} 2> /dev/null",
            f"cd {quoted} || exit 1",
            "unset OLDPWD",
            "[ ! -s /etc/rc.local ] || . /etc/rc.local",
            f'[ $# -eq 0 ] || {start} "$@"',
            " ".join([start, *map(shlex.quote, command)]),
            "",
        ]
    )


def _texts(image: dict[str, Any], key: str) -> list[str]:
    values = image.get(key)
    return [value for value in values if isinstance(value, str)] if isinstance(values, list) else []


def _lines(texts: list[str], wanted: re.Pattern[str]) -> str:
    return "".join(f"{text}\n" for text in texts if wanted.fullmatch(text))


@contextlib.contextmanager
def _opened(path: Path | str, within: int | None = None) -> Iterator[int]:
    fd = os.open(path, _FOLDER, dir_fd=within)
    try:
        yield fd
    finally:
        os.close(fd)


@contextlib.contextmanager
def _opened_inside(root: int, name: str) -> Iterator[int]:
    """A folder directly in `root`, made when it is not there or no folder."""
    try:
        if not stat.S_ISDIR(os.lstat(name, dir_fd=root).st_mode):
            os.unlink(name, dir_fd=root)
            os.mkdir(name, 0o755, dir_fd=root)
    except FileNotFoundError:
        os.mkdir(name, 0o755, dir_fd=root)
    with _opened(name, root) as fd:
        yield fd


def _make_folders(root: int, path: str) -> None:
    """Make the folders of `path`; one behind a symbolic link or a file is left to /etc/rc."""
    with contextlib.ExitStack() as stack:
        here = root
        for name in path.split("/"):
            if name in ("", "."):
                continue
            if name == "..":
                return
            try:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(name, 0o755, dir_fd=here)
                here = stack.enter_context(_opened(name, here))
            except OSError:
                return


def _write(folder: int, name: str, content: str) -> None:
    """A new file in place of whatever has its name."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(os.lstat(name, dir_fd=folder).st_mode):
            shutil.rmtree(f"/proc/self/fd/{folder}/{name}")
        else:
            os.unlink(name, dir_fd=folder)
    fd = os.open(
        name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644, dir_fd=folder
    )
    with os.fdopen(fd, "w", encoding="utf-8", errors="surrogateescape") as file:
        os.fchmod(fd, 0o644)
        file.write(content)
