"""Progress bars of long work on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)

from bootseer_slurm.cli import settings


@contextmanager
def progress_bars() -> Iterator[Progress]:
    """Bars on stderr: what is done, bytes, rate and time."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(binary_units=True),
               TransferSpeedColumn(), TimeElapsedColumn())  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield progress


def store_with_progress(path: Path, kind: str, *, objects: int, name: str) -> None:
    """Put a file into the store under `name`, and print its blob's id."""
    from bootseer_slurm.blob.names import file_fingerprint
    from bootseer_slurm.blob.writer import BlobWriter, Original

    settings.check_own(path)
    with progress_bars() as progress:
        task = progress.add_task(name, total=path.stat().st_size)
        writer = BlobWriter(
            settings.store(), objects=objects, progress=lambda count: progress.advance(task, count)
        )
        record = writer.store_named(path, Original(kind, name, file_fingerprint(path.stat())))
    print(f"{name}  {record.blob[:16]}")
