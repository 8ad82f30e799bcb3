"""The present step of a benchmark, on the terminal. Seldom drawn: the cores are for the measurement."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


@contextlib.contextmanager
def spinner(text: str) -> Iterator[Callable[[str], None]]:
    """Show `text` and the time it takes; gives the function that shows another text."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, refresh_per_second=1) as progress:
        task = progress.add_task(text, total=None)

        def step(text: str) -> None:
            progress.update(task, description=text)

        yield step
