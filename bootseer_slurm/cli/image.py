"""`bootseer image`: container images in the store."""

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
from rich.progress import TaskID
from rich.table import Table

from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cells import cell
from bootseer_slurm.cli.progress import progress_bars, store_with_progress
from bootseer_slurm.errors import InputError, IntegrityError
from bootseer_slurm.signals import exit_on
from bootseer_slurm.text import escaped

if TYPE_CHECKING:
    from bootseer_slurm.image.signed_packing import Packing

app = typer.Typer(no_args_is_help=True, help="Container images in the store.")

_Image = Annotated[str, typer.Argument(help="As it was pushed, or its name in `bootseer image list`.")]


@app.command("push")
def image_push(
    source: Annotated[
        str, typer.Argument(help="docker://[USER@][REGISTRY#]IMAGE[:TAG], dir:/PATH, or a squashfs file.")
    ],
) -> None:
    """Put an image into the store; jobs that use it by this name or path are served from there."""
    if os.path.exists(source) or source.startswith(("/", ".")):
        _push_file(Path(source))
        return
    from bootseer_slurm.image.library import ensure
    from bootseer_slurm.image.reference import SquashfsFile, parse
    from bootseer_slurm.listener import Listener

    exit_on(signal.SIGTERM, signal.SIGHUP)
    found = parse(source)
    assert not isinstance(found, SquashfsFile)  # those begin with "/"
    warnings: list[str] = []
    stages: list[str] = []
    with progress_bars() as progress:
        tasks: list[TaskID] = []

        def stage(text: str, size_bytes: int | None) -> None:
            close()
            stages.append(text)
            tasks.append(progress.add_task(text, total=size_bytes))

        def advance(count: int) -> None:
            progress.advance(tasks[-1], count)

        def close() -> None:
            """Let the last stage's bar show what was done."""
            if tasks:
                done = progress.tasks[-1].completed
                progress.update(tasks[-1], total=done)

        listener = Listener(stage, advance, warnings.append)
        name = ensure(settings.store(), found, packing=_packing(), listener=listener)
        close()
    for warning in warnings:
        print(f"bootseer: {warning}", file=sys.stderr)
    what = "stored" if "storing" in stages else "in the store already"
    print(f"{name.name}  {name.blob[:16]}  {name.fingerprint}  {what}")


def _packing() -> Packing | None:
    """Root's images are signed, and packed by this process for that."""
    from bootseer_slurm.image.signed_packing import OwnPacking
    from bootseer_slurm.image.signing import read_key

    key = read_key(settings.config().image.site_key)
    return OwnPacking(key) if os.geteuid() == 0 and key else None


@app.command("make-key")
def image_make_key() -> None:
    """Make the site's key, once; then copy it to all nodes (root's alone, 0600)."""
    from bootseer_slurm.image.signing import make_key

    path = settings.config().image.site_key
    make_key(path)
    print(f"{path} is made: copy it to all nodes, root's alone (0600)")


def _push_file(source: Path) -> None:
    from bootseer_slurm.blob.squashfs.superblock import check_squashfs
    from bootseer_slurm.store import FileReader

    real = settings.real_path(source)
    if real.is_dir():
        raise InputError(f"{source}: is a folder", hint=f"bootseer image push dir:{real}")
    reader = FileReader(real)
    try:
        check_squashfs(reader, str(real))
    finally:
        reader.close()
    store_with_progress(real, "image", objects=1, name=str(real))


@app.command("list")
def image_list() -> None:
    """Show your images in the store."""
    from bootseer_slurm.image.library import list_images

    names, damaged = list_images(settings.store(), os.getuid())
    table = Table("image", "blob", "fingerprint", "pushed", "", box=None, pad_edge=False)
    table.columns[0].overflow = "fold"
    tagged = {name.folder for name in names if not name.name.endswith(f"@{name.fingerprint}")}
    for name in names:
        if name.folder in tagged and name.name.endswith(f"@{name.fingerprint}"):
            continue  # the digest's own name of what has a tag
        pushed = time.strftime("%Y-%m-%d %H:%M", time.localtime(name.made_ns / 1e9))
        table.add_row(
            cell(name.name), name.blob[:12], name.fingerprint[:19], pushed, "signed" if name.signature else ""
        )
    Console().print(table)
    _tell(damaged)


@app.command("show")
def image_show(image: _Image) -> None:
    """Show what the store has of an image."""
    from bootseer_slurm.image.library import show

    found = show(settings.store(), os.getuid(), _name(image))
    record, layout = found.name, found.layout
    rows = {
        "name": record.name,
        "also": "\n".join(found.also),
        "fingerprint": record.fingerprint,
        "blob": record.blob,
        "in the store": record.folder,
        "size": f"{decimal(layout.size_bytes)} ({layout.size_bytes} bytes)",
        "blocks": f"{layout.blocks} of {layout.block_bytes // 1024} KiB in {layout.objects} objects",
        "pushed": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.made_ns / 1e9)),
        "signed": "yes" if record.signature else "no",
    }
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for key, value in rows.items():
        if value:
            table.add_row(key, cell(value))
    Console().print(table)


@app.command("rm")
def image_rm(image: _Image) -> None:
    """Forget an image; its bytes go when no other name stands for them."""
    from bootseer_slurm.image.library import remove

    name = _name(image)
    gone = remove(settings.store(), os.getuid(), name)
    print(f"{name}  {'removed' if gone else 'forgotten; its blob has other names'}")


@app.command("verify")
def image_verify(image: _Image) -> None:
    """Read an image's blob from the store and compare every block with its digest."""
    from bootseer_slurm.image.library import show, verify

    store, name = settings.store(), _name(image)
    layout = show(store, os.getuid(), name).layout
    with progress_bars() as progress:
        task = progress.add_task(name, total=layout.size_bytes)
        damaged = verify(
            store, os.getuid(), name, progress=lambda count: progress.update(task, advance=count)
        )
    if damaged:
        shown = ", ".join(map(str, damaged[:20])) + (", …" if len(damaged) > 20 else "")
        raise IntegrityError(
            f"{name}: {len(damaged)} of {layout.blocks} blocks are damaged in the store: {shown}",
            hint=f"bootseer image rm {image}, and push it again",
        )
    print(f"{name}  all {layout.blocks} blocks are right")


def _name(image: str) -> str:
    """The name in the store of what a person wrote."""
    from bootseer_slurm.image.reference import parse

    if os.path.exists(image) or image.startswith(("/", ".")):
        return os.path.realpath(image)
    return parse(image).name


def _tell(problems: list[str]) -> None:
    for problem in problems:
        print(f"bootseer: {escaped(problem)}", file=sys.stderr)
