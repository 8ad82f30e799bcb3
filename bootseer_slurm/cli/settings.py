"""The needs of every command: the configuration that `--config` named, the store, and real paths."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from bootseer_slurm import config as configuration
from bootseer_slurm.errors import InputError

if TYPE_CHECKING:
    from bootseer_slurm.store import Store

_named: dict[str, Path | None] = {"path": None}


def name_config(path: Path | None) -> None:
    """Use this file instead of the usual one."""
    _named["path"] = path


def config() -> configuration.Config:
    """The configuration. Raises ConfigError."""
    return configuration.load(_named["path"])


def store() -> Store:
    """The site's store. Raises StoreError."""
    from bootseer_slurm.store import open_store

    return open_store(config().store.uri)


def real_path(path: Path) -> Path:
    """The absolute path, without symbolic links, of what a person named. Raises InputError."""
    try:
        return path.resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def check_own(path: Path) -> None:
    """See that this user may put it into the store: jobs are shown no other's blob there.

    Raises InputError.
    """
    owner = path.stat().st_uid
    if os.getuid() not in (0, owner):
        raise InputError(
            f"{path}: belongs to user {owner}", hint="its owner or root can put it into the store"
        )
