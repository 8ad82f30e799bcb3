"""`bootseer image`: container images in the store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bootseer_slurm.cli.progress import store_with_progress

app = typer.Typer(no_args_is_help=True, help="Container images in the store.")


@app.command("push")
def image_push(source: Annotated[Path, typer.Argument(help="A squashfs file.", exists=True)]) -> None:
    """Put a squashfs image into the store; jobs that use it at this path are served from there."""
    from bootseer_slurm.image.squashfs import check_squashfs
    from bootseer_slurm.store import FileReader

    real = source.resolve(strict=True)
    reader = FileReader(real)
    try:
        check_squashfs(reader, str(real))
    finally:
        reader.close()
    store_with_progress(real, "image", objects=1, name=str(real))
