"""`bootseer store`: the shared store, whatever lies in it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer
from rich.filesize import decimal

from bootseer_slurm.cli import settings
from bootseer_slurm.errors import InputError, StoreError
from bootseer_slurm.text import escaped

app = typer.Typer(no_args_is_help=True, help="The shared store.")


@app.command("init")
def store_init() -> None:
    """Make the folders of a file:// store (an admin, once)."""
    uri = settings.config().store.uri
    if not uri.startswith("file://"):
        raise InputError(f"{uri}: only a file:// store needs this")
    users = Path(uri.removeprefix("file://")) / "users"
    try:
        users.mkdir(parents=True, exist_ok=True)
        users.chmod(0o1777)
    except OSError as error:
        raise StoreError(f"{users}: cannot be made: {error.strerror}") from error
    print(f"{users} is ready")


@app.command("gc")
def store_gc() -> None:
    """Remove your blobs that have no name, what was left half-written, and traces after 30 days."""
    from bootseer_slurm.blob.gc import collect_garbage

    found = collect_garbage(settings.store(), os.getuid())
    for path in found.removed:
        print(f"removed {path}")
    for path in found.marked:
        print(f"without a name, goes after a day: {path}")
    print(f"{len(found.removed)} removed, {decimal(found.size_bytes)}")
    for problem in found.problems:
        print(f"bootseer: {escaped(problem)}", file=sys.stderr)
