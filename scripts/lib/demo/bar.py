"""A bar over the steps of a long measurement."""

from __future__ import annotations

from rich import progress
from rich.console import Console


def steps_bar(console: Console) -> progress.Progress:
    """A bar over the steps, and what is being done. Seldom drawn: the cores are for what is measured."""
    return progress.Progress(
        progress.SpinnerColumn(),
        progress.BarColumn(bar_width=20),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.description}"),
        console=console,
        refresh_per_second=2,
    )
