"""One read-only FUSE file system per node, on which every blob is an ordinary file."""

from __future__ import annotations

from bootseer_slurm.fuse.server import Server
from bootseer_slurm.fuse.tree import File

__all__ = ["File", "Server"]
