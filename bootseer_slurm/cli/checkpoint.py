"""`bootseer checkpoint`: striped files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.bar import Bar
from rich.console import Console
from rich.table import Table

from bootseer_slurm.cli.progress import progress_bars, store_with_progress
from bootseer_slurm.errors import InputError
from bootseer_slurm.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="Striped checkpoints, in the store or anywhere.")
_BAR_WIDTH = 40


@app.command()
def stripe(
    source: Annotated[Path, typer.Argument(help="A checkpoint file.", exists=True)],
    target: Annotated[
        str, typer.Argument(help="A URI or path, where it becomes a striped file; none: the store.")
    ] = "",
    stripes: Annotated[
        int | None,
        typer.Option(
            min=1, max=256, help="Objects to spread it over; none: 8, on HDFS one for each 128 MiB if more."
        ),
    ] = None,
) -> None:
    """Spread a checkpoint file over several objects: in the store, for jobs that use it, or in another place.

    The same command again goes on where one that was interrupted ended.
    """
    from bootseer_slurm.checkpoint.stripe import stripe_file
    from bootseer_slurm.checkpoint.striped import placement as find_placement
    from bootseer_slurm.checkpoint.writer import OBJECTS

    real = source.resolve(strict=True)
    if not real.is_file():
        raise InputError(f"{real}: not a file")
    if not target:
        store_with_progress(real, "checkpoint", objects=stripes or OBJECTS, name=str(real))
        return
    with progress_bars() as progress:
        task = progress.add_task(target, total=real.stat().st_size)
        manifest = stripe_file(
            real, target, objects=stripes, progress=lambda count: progress.advance(task, count)
        )
    print(f"{target}  {manifest.layout.objects} objects, {manifest.layout.size_bytes} bytes")
    if found := find_placement(target):
        print(_summary(found))


@app.command()
def placement(
    uri: Annotated[str, typer.Argument(help="A URI or path of a file, striped or not.")],
) -> None:
    """Show how many bytes of a file lie on which server of the store, where the store tells (HDFS)."""
    from bootseer_slurm.checkpoint.striped import placement as find_placement

    found = find_placement(uri)
    if not found:
        print(f"{uri}: its store does not tell where it lies")
        return
    total, fullest = sum(found.values()), max(found.values())
    table = Table("server", "bytes", "share", "", box=None, pad_edge=False, header_style="bold")
    for server, size_bytes in sorted(found.items(), key=lambda item: (-item[1], item[0])):
        bar = Bar(max(1, fullest), 0, size_bytes, width=_BAR_WIDTH)
        table.add_row(server, format_bytes(size_bytes), f"{size_bytes / max(1, total):.1%}", bar)
    Console().print(table)
    print(_summary(found))


def _summary(found: dict[str, int]) -> str:
    share = max(found.values()) / max(1, sum(found.values()))
    return f"on {len(found)} servers; the fullest has {share:.1%}, an even share is {1 / len(found):.1%}"
