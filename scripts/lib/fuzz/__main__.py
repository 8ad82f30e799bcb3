"""The command line of scripts/fuzz: all targets in turn for some minutes, and what was found."""

from __future__ import annotations

import hashlib
import random
import time
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scripts.lib.fuzz.target import Broken, Run, Target, try_some
from scripts.lib.fuzz.targets import TARGETS

ROUND = 400  # inputs of a target before the next one has its turn

console = Console()


def run(targets: list[Target], minutes: float, chance: random.Random) -> dict[str, Run]:
    """Try each target in turn until the time is over. One of which something was found has no turn more."""
    runs = {target.name: Run() for target in targets}
    begun_s = time.monotonic()
    with Progress(console=console) as bar:
        task = bar.add_task("", total=minutes * 60)
        while time.monotonic() - begun_s < minutes * 60:
            left = [target for target in targets if runs[target.name].found is None]
            if not left:
                break
            for target in left:
                inputs = sum(each.inputs for each in runs.values())
                spent_s = time.monotonic() - begun_s
                bar.update(task, completed=spent_s, description=f"{inputs:,} inputs, {target.name}")
                one = try_some(target, ROUND, seed=chance.randrange(2**32))
                all_of_it = runs[target.name]
                all_of_it.inputs += one.inputs
                all_of_it.read += one.read
                all_of_it.found = one.found
    return runs


def show(runs: dict[str, Run], folder: Path) -> bool:
    """The table, and below it how each thing that was found can be tried again; False where there is none."""
    table = Table(box=box.SIMPLE_HEAD)
    for header in ("target", "inputs", "read", "found"):
        table.add_column(header, justify="right" if header in ("inputs", "read") else "left")
    for name, each in runs.items():
        what = f"{type(each.found.error).__name__}: {each.found.error}" if each.found else "nothing"
        table.add_row(name, f"{each.inputs:,}", f"{each.read:,}", what[:200].splitlines()[0])
    console.print(table, markup=False)
    found = {name: each.found for name, each in runs.items() if each.found is not None}
    for name, one in found.items():
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{name.replace(' ', '-')}-{hashlib.sha256(one.content).hexdigest()[:12]}"
        file.write_bytes(one.content)
        console.print(
            f"again: scripts/fuzz {name!r} --replay {file}", style="red", markup=False, soft_wrap=True
        )
    return bool(found)


def main(
    target: Annotated[str | None, typer.Argument(help="One target, by its name; without it all.")] = None,
    minutes: Annotated[float, typer.Option(help="How long inputs are tried.")] = 10.0,
    seed: Annotated[int | None, typer.Option(help="Draws the same inputs.")] = None,
    found: Annotated[Path, typer.Option(help="Where inputs that broke a rule are kept.")] = Path(
        "fuzz-found"
    ),
    replay: Annotated[Path | None, typer.Option(help="Try this one input, and show what happens.")] = None,
) -> None:
    """Try hostile inputs of every parser. Exit status 1 when one broke a rule."""
    targets = [each for each in TARGETS if target in (None, each.name)]
    if not targets or (replay is not None and target is None):
        names = ", ".join(repr(each.name) for each in TARGETS)
        console.print(f"scripts/fuzz: name one target: {names}", style="red", markup=False)
        raise typer.Exit(2)
    if replay is not None:
        try:
            was_read = targets[0].check(replay.read_bytes())
        except (Exception, Broken):
            console.print_exception()
            raise typer.Exit(1) from None
        console.print("the parser reads it" if was_read else "the parser refuses it, as it should")
        return
    drawn = random.randrange(10**6) if seed is None else seed
    if show(run(targets, minutes, random.Random(drawn)), found):
        raise typer.Exit(1)
    console.print(f"Nothing was found. Seed {drawn}.", style="green")


if __name__ == "__main__":
    typer.run(main)
