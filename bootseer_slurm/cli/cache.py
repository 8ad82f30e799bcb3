"""`bootseer cache`: this node's cache. Works on its files, beside a running agent or without one."""

from __future__ import annotations

import os
import pwd
import time
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cells import cell
from bootseer_slurm.cli.progress import progress_bars
from bootseer_slurm.errors import InputError, IntegrityError
from bootseer_slurm.units import format_bytes, format_duration, parse_bytes

app = typer.Typer(no_args_is_help=True, help="The cache of this node (root).")


@app.command("show")
def cache_show() -> None:
    """Show the blobs on this node, the longest unused first, and how much room is left."""
    from bootseer_slurm.cache.admin import entries

    root, live = _folders()
    found = entries(root, live)
    table = Table("user", "blob", "kind", box=None, header_style="bold")
    for title in ("size", "present", "last used"):
        table.add_column(title, justify="right")
    table.add_column("in use")
    for entry in found:
        share = f"{entry.present_bytes * 100 // entry.size_bytes} %" if entry.size_bytes else "-"
        table.add_row(
            _user(entry.uid),
            _short(entry.id),
            entry.kind if not entry.flaw else "damaged",
            format_bytes(entry.size_bytes),
            share,
            f"{format_duration(max(0.0, time.time() - entry.used_s))} ago" if entry.used_s else "-",
            "yes" if entry.in_use else "",
        )
    Console().print(table)
    limits = settings.config().cache
    disk = psutil.disk_usage(str(root))
    total_bytes = sum(entry.disk_bytes for entry in found)
    print(
        f"\nblobs: {len(found)}, which take {format_bytes(total_bytes)} of {format_bytes(limits.max_bytes)} "
        f"at most\ndisk: {format_bytes(disk.free)} free; {format_bytes(limits.min_free_bytes)} must stay"
    )


@app.command("gc")
def cache_gc(
    to: Annotated[
        str | None, typer.Option(help="Stop when the cache takes no more than this, for instance 50GiB.")
    ] = None,
) -> None:
    """Remove the blobs that no job uses, the longest unused first."""
    from bootseer_slurm.cache.admin import evict

    removed = evict(*_folders(), to_bytes=parse_bytes(to) if to else 0)
    for entry in removed:
        print(f"removed  {_user(entry.uid)}  {_short(entry.id)}  {format_bytes(entry.disk_bytes)}")
    print(f"blobs removed: {len(removed)}, {format_bytes(sum(entry.disk_bytes for entry in removed))}")


@app.command("verify")
def cache_verify() -> None:
    """Compare the digest of every block that is there; exit status 6 when one is wrong."""
    from bootseer_slurm.cache.admin import entries, verify

    root, live = _folders()
    with progress_bars() as progress:
        total = sum(entry.present_bytes for entry in entries(root, live))
        task = progress.add_task("verify", total=total)
        damage = verify(root, live, lambda size_bytes: progress.advance(task, size_bytes))
    if not damage:
        print("every block that is there is right")
        return
    table = Table("user", "blob", "what", "then", box=None, header_style="bold")
    for each in damage:
        then = "will be fetched again" if each.mended else "nothing was changed"
        table.add_row(_user(each.uid), _short(each.id), cell(each.message), then)
    Console().print(table)
    raise IntegrityError(
        f"cache {root}: {len(damage)} of its blobs damaged", hint="look at the disk; its log says more"
    )


def _folders() -> tuple[Path, Path]:
    """The cache's folder and that of its live state. Raises InputError."""
    config = settings.config()
    if os.geteuid() != 0:
        raise InputError("the cache is root's", hint="sudo bootseer cache …")
    if not config.cache.path.is_dir():
        raise InputError(f"{config.cache.path}: there is no cache", hint="see [cache] path")
    return config.cache.path, config.agent.socket.parent / "cache"


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _short(blob_id: str) -> str:
    prefix, dash, digest = blob_id.rpartition("-")
    return f"{prefix}{dash}{digest[:12]}"
