"""`bootseer importer`: what pyxis calls as `bootseer-importer`, for people who want to see what it does."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, help="What pyxis calls to get a container's image.")


@app.command("get")
def importer_get(uri: Annotated[str, typer.Argument(help="For instance docker://ubuntu:22.04.")]) -> None:
    """Print the path of a squashfs of an image, for this job step."""
    from bootseer_slurm.image.importer import main

    main(["get", uri])


@app.command("release")
def importer_release() -> None:
    """Remove what `get` made for this job step."""
    from bootseer_slurm.image.importer import main

    main(["release"])
