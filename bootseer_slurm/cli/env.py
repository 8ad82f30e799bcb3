"""`bootseer env`: snapshots of Python environments in the store."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cells import cell
from bootseer_slurm.cli.progress import progress_bars
from bootseer_slurm.errors import InputError, NotFound
from bootseer_slurm.signals import exit_on
from bootseer_slurm.text import escaped

if TYPE_CHECKING:
    from bootseer_slurm.blob.names import Name
    from bootseer_slurm.env.snapshot import Installed, Packing

app = typer.Typer(no_args_is_help=True, help="Snapshots of Python environments.")

_Folder = Annotated[
    Path, typer.Argument(help="A venv, a conda environment, or a `pip install --target` folder.")
]
_Image = Annotated[
    str, typer.Option(help="The image that jobs use it in, as they name it; none: they use it on the node.")
]


@app.command("save")
def env_save(
    folder: _Folder,
    image: _Image = "",
    share: Annotated[
        bool, typer.Option("--share", help="Let all users read this snapshot, and those that replace it.")
    ] = False,
) -> None:
    """Save an environment; jobs that use it at this path are served from the snapshot.

    What changed since it was saved last becomes a layer over that snapshot.
    """
    from dataclasses import replace

    from bootseer_slurm.blob.names import write_name

    settings.check_own(_resolve(folder))
    record, saved = _save(folder, _digest(image))
    if share and not record.shared:
        write_name(settings.store(), os.getuid(), replace(record, shared=True))
    _tell_saved(record, saved)


@app.command("save-installed", hidden=True)
def env_save_installed(
    folder: _Folder, job_class: str, over: str, shown: str, image_digest: str = ""
) -> None:
    """Save what a job's start installed over a snapshot; for the agent, where the job sees both at FOLDER."""
    from bootseer_slurm.env.key import fingerprint_of, key_of
    from bootseer_slurm.env.snapshot import Installed

    key = key_of(str(_resolve(folder)), home=os.path.expanduser("~"), image=image_digest)
    if fingerprint_of(key) == over:
        print(f"{folder}: nothing was installed")
    else:
        _tell_saved(*_save(folder, image_digest, Installed(job_class, over, shown)))


def _tell_saved(record: Name, saved: bool) -> None:
    """Print the name of a saved snapshot. The one that it replaces is collected a day later."""
    from bootseer_slurm.blob.gc import collect_garbage
    from bootseer_slurm.env.snapshot import forget_installed

    if saved:
        forget_installed(settings.store(), record)
        collect_garbage(settings.store(), os.getuid())
    over = f"  over {record.base.blob[:16]}" if record.base else ""
    print(f"{record.name}  {record.blob[:16]}{over}  {'saved' if saved else 'in the store already'}")


def _save(folder: Path, image_digest: str, installed: Installed | None = None) -> tuple[Name, bool]:
    from bootseer_slurm.env.snapshot import save
    from bootseer_slurm.listener import Listener

    exit_on(signal.SIGTERM, signal.SIGHUP)
    real = _resolve(folder)
    with progress_bars() as progress:
        task = progress.add_task("looking", total=None)
        listener = Listener(
            stage=lambda text, size_bytes: progress.reset(task, description=text, total=size_bytes),
            progress=lambda count: progress.advance(task, count),
        )
        return save(
            settings.store(),
            real,
            image=image_digest,
            installed=installed,
            packing=_packing(),
            listener=listener,
        )


@app.command("key")
def env_key(folder: _Folder, image: _Image = "") -> None:
    """Show what a snapshot of an environment depends on: when a part changes, another one is made."""
    from bootseer_slurm.env.key import fingerprint_of, key_of

    key = key_of(str(_resolve(folder)), home=os.path.expanduser("~"), image=_digest(image))
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for part, text in key.items():
        lines = text.splitlines()
        if part == "packages":
            lines = [f"{len(lines) - 1} packages, {lines[0][:16]}", *_in_a_row(lines[1:])]
        table.add_row(part, cell("\n".join(lines) or "-"))
    table.add_row("key", fingerprint_of(key))
    Console().print(table)


@app.command("why")
def env_why(folder: _Folder, image: _Image = "") -> None:
    """Show which part of an environment's key changed since it was saved. Exit status 1 if one did."""
    from bootseer_slurm.blob.names import read_name
    from bootseer_slurm.env.key import differences, fingerprint_of, key_of, stored_name

    real, digest = _resolve(folder), _digest(image)
    record = read_name(settings.store(), os.getuid(), stored_name(str(real), digest))
    if record is None:
        raise NotFound(f"{real}: has no snapshot in the store", hint=f"bootseer env save {folder}")
    key = key_of(str(real), home=os.path.expanduser("~"), image=digest, known=record.key)
    if fingerprint_of(key) == record.fingerprint:
        print(f"{real}: nothing changed since {_when(record)}; the snapshot {record.blob[:12]} is used")
        return
    table = Table("changed", "- when it was saved, + now", box=None, pad_edge=False)
    table.columns[1].overflow = "fold"
    for part, lines in differences(record.key, key).items():
        table.add_row(part, cell("\n".join(lines)))
    Console().print(table)
    raise typer.Exit(1)


@app.command("list")
def env_list() -> None:
    """Show your snapshots in the store."""
    from bootseer_slurm.env.key import parts_of

    table = Table("environment", "image", "blob", "packages", "saved", box=None, pad_edge=False)
    table.columns[0].overflow = table.columns[1].overflow = "fold"
    for record in _records():
        path, image, job_class = parts_of(record.name)
        packages = max(0, len(record.key.get("packages", "").splitlines()) - 1)
        table.add_row(
            cell(f"{path}\nand what jobs of class {job_class[:8]} install" if job_class else path),
            cell(image[:24] or "-"),
            record.blob[:12] + (f"\nover {record.base.blob[:12]}" if record.base else ""),
            str(packages or ""),
            _when(record),
        )
    Console().print(table)


@app.command("show")
def env_show(folder: _Folder, image: _Image = "") -> None:
    """Show what the store has of an environment."""
    from bootseer_slurm.blob.manifest import MANIFEST_LIMIT_BYTES, decode

    record = _record(folder, image)

    def size(folder: str) -> str:
        content = settings.store().read(f"{folder}/manifest", limit_bytes=MANIFEST_LIMIT_BYTES)
        size_bytes = decode(content).layout.size_bytes
        return f"{decimal(size_bytes)} ({size_bytes} bytes)"

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in {
        "name": record.name,
        "key": record.fingerprint,
        "blob": record.blob,
        "in the store": record.folder,
        "size": size(record.folder),
        **({"over": record.base.blob, "its size": size(record.base.folder)} if record.base else {}),
        "saved": _when(record),
    }.items():
        table.add_row(name, cell(value))
    Console().print(table)


@app.command("rm")
def env_rm(folder: _Folder, image: _Image = "") -> None:
    """Forget a snapshot, and what jobs installed over it; jobs then use the environment as it lies."""
    from bootseer_slurm.blob.names import remove_name
    from bootseer_slurm.env.key import parts_of

    store, wanted = settings.store(), _record(folder, image)
    records = _records()
    gone = [record for record in records if parts_of(record.name)[:2] == parts_of(wanted.name)[:2]]
    used = {each for record in records if record not in gone for each in record.folders}
    for record in gone:
        remove_name(store, os.getuid(), record.name)
        print(f"{record.name}  removed")
    for unused in {each for record in gone for each in record.folders} - used:
        store.remove(unused)


@app.command("gc")
def env_gc() -> None:
    """Remove snapshots of environments that are gone, and what broken saves left."""
    from bootseer_slurm.blob.gc import collect_garbage
    from bootseer_slurm.blob.names import remove_name
    from bootseer_slurm.env.key import parts_of

    store = settings.store()
    for record in _records():
        path = parts_of(record.name)[0]
        if not os.path.isdir(path) and os.path.isdir(os.path.dirname(path)):  # its file system is there
            remove_name(store, os.getuid(), record.name)
            print(f"forgotten: {path} is gone")
    found = collect_garbage(store, os.getuid())
    for path in found.removed:
        print(f"removed {path}")
    for path in found.marked:
        print(f"without a name, goes after a day: {path}")
    print(f"{len(found.removed)} removed, {decimal(found.size_bytes)}")


def _packing() -> Packing | None:
    """The agent of this node, in a job that asked for Bootseer: the kernel may mount what it packs."""
    from bootseer_slurm.image.signed_packing import AgentPacking

    job_id, settings_ = os.environ.get("SLURM_JOB_ID"), settings.config()
    if not job_id or settings_.image.kernel_mount == "off":
        return None
    return AgentPacking(settings_.agent.socket, job_id, warn=lambda message: None)


def _resolve(folder: Path) -> Path:
    real = settings.real_path(folder)
    if not real.is_dir():
        raise InputError(f"{folder}: not a directory")
    return real


def _digest(image: str) -> str:
    """The digest or fingerprint of an image, as a job's node finds it. Raises NotFound without one."""
    from bootseer_slurm.blob.names import file_fingerprint, read_published
    from bootseer_slurm.image.reference import parse

    if not image:
        return ""
    if image.startswith("/"):
        return file_fingerprint(os.stat(os.path.realpath(image)))
    record = read_published(settings.store(), os.getuid(), parse(image).name)
    if record is None:
        raise NotFound(f"image {image}: not in the store", hint=f"bootseer image push {image}")
    return record.fingerprint


def _record(folder: Path, image: str) -> Name:
    """The record of a folder, which may be gone itself. Raises NotFound."""
    from bootseer_slurm.blob.names import read_name
    from bootseer_slurm.env.key import stored_name

    name = stored_name(os.path.realpath(folder), _digest(image))
    record = read_name(settings.store(), os.getuid(), name)
    if record is None or record.kind != "environment":
        raise NotFound(f"{name}: has no snapshot in the store", hint="`bootseer env list` shows what has")
    return record


def _records() -> list[Name]:
    from bootseer_slurm.blob.names import list_names

    names, damaged = list_names(settings.store(), os.getuid())
    for problem in damaged:
        print(f"bootseer: {escaped(problem)}", file=sys.stderr)
    return [name for name in names if name.kind == "environment"]


def _in_a_row(names: list[str]) -> list[str]:
    return [", ".join(names)] if names else []


def _when(record: Name) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(record.made_ns / 1e9))
