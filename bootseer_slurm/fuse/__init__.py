"""Read-only FUSE file systems, on which every blob is an ordinary file, and which outlive their server."""

from __future__ import annotations

from bootseer_slurm.fuse.mount import Mount
from bootseer_slurm.fuse.nodes import File
from bootseer_slurm.fuse.server import Server

__all__ = ["File", "Mount", "Server"]
