"""Originals, opened with their user's rights: files and environments as they lie."""

from __future__ import annotations

import os

from bootseer_slurm.blob.names import file_fingerprint
from bootseer_slurm.blob.squashfs.superblock import check_squashfs
from bootseer_slurm.env.key import package_folders
from bootseer_slurm.errors import InputError
from bootseer_slurm.store import FileReader


def fingerprint_now(kind: str, name: str) -> str:
    """The fingerprint of a file that a user named."""
    try:
        return file_fingerprint(os.stat(os.path.realpath(name, strict=True)))
    except (OSError, RuntimeError) as error:
        raise InputError(f"{kind} {name}: {reason(error)}") from error


def open_original(kind: str, name: str) -> tuple[str, int, str, FileReader | None]:
    """The real path of what a user named, a descriptor of it, and of a file its fingerprint and itself.

    All are of one inode: a name may be given to another file meanwhile, as `latest.pt` is, and the bytes of
    one must not be kept as those of the other.
    """
    try:
        path = os.path.realpath(name, strict=True)
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{kind} {name}: {reason(error)}") from error
    reader: FileReader | None = None
    try:
        if kind == "environment":
            status, fingerprint = os.stat(path), ""
            if not os.path.isdir(path):
                raise InputError(f"{kind} {path}: not a directory")
            if not os.access(path, os.R_OK | os.X_OK):
                raise InputError(f"{kind} {path}: Permission denied")
            package_folders(path)
        else:
            reader = FileReader(path, bulk=True)
            status = reader.status
            fingerprint = file_fingerprint(status)
        if not os.path.samestat(status, os.fstat(fd)):
            raise InputError(f"{kind} {path}: was replaced while it was looked up")
        if reader is not None and kind == "image":
            check_squashfs(reader, path)
    except BaseException:
        os.close(fd)
        if reader is not None:
            reader.close()
        raise
    return path, fd, fingerprint, reader


def reason(error: Exception) -> str | None:
    """Why something that a user named cannot be used."""
    return error.strerror if isinstance(error, OSError) else str(error)
