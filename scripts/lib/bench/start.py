"""The start of a whole job: as it is done today, and with --bootseer.

Its parts: `paper` (start_paper.py), `demo` (start_demo.py) and `warm` (start_warm.py). The first two can be
cut further, down to one cell: paper-1gbit, demo-4, demo-4-1gbit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

from rich.console import Console
from rich.progress import Progress

from scripts.lib.bench import start_demo, start_paper, start_warm
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import ClusterError, Layout, live
from scripts.lib.demo import arms, inputs, records
from scripts.lib.demo.bar import steps_bar
from scripts.lib.demo.starts import Tell

NODES = 4
NODE_COUNTS = (4, 2, 1)
LINKS = ("250mbit", "1gbit", "10gbit")
PARTS = (
    *("paper", *(f"paper-{link}" for link in LINKS)),
    *("demo", *(f"demo-{count}" for count in NODE_COUNTS)),
    *(f"demo-{count}-{link}" for count in NODE_COUNTS for link in LINKS),
    "warm",
)

console = Console()


@dataclass(frozen=True)
class Cell:
    """A part that is measured at once. measure: takes two functions, to tell of work and of a step done."""

    name: str
    steps: int
    measure: Callable[[Tell, Callable[[], None]], list[Row]]


def run(cluster: Cluster, only: str) -> list[Row]:
    """The rows of all parts, or of those whose names begin as `only`, on a cluster that is up."""
    if len(live(Layout(cluster.state_dir)).nodes) < NODES:
        raise ClusterError(f"the cluster has fewer than {NODES} nodes: scripts/cluster down")
    for machine in ("all", "store"):
        cluster.script("link", machine, "off")
    rows: list[Row] = []
    with steps_bar(console) as bar:
        making = bar.add_task("", total=inputs.STEPS)
        prepare(cluster, lambda text: bar.update(making, description=f"inputs: {text}", advance=1))
        bar.update(making, completed=inputs.STEPS, description="the inputs are there, and in the store")
        for cell in cells(cluster):
            if not only or cell.name == only or cell.name.startswith(f"{only}-"):
                rows += _measured(cluster, cell, bar)
    return rows


def _measured(cluster: Cluster, cell: Cell, bar: Progress) -> list[Row]:
    task = bar.add_task(cell.name, total=cell.steps)
    try:
        return cell.measure(
            lambda text: bar.update(task, description=f"{cell.name}, {text}"),
            lambda: bar.update(task, advance=1),
        )
    finally:
        cluster.script("link", "store", "off")
        bar.update(task, description=cell.name)


def prepare(cluster: Cluster, step: inputs.Step) -> None:
    """The inputs, on the shared storage and in the store, and the records of that set aside."""
    inputs.make(cluster, inputs.FULL, step)
    inputs.save(cluster, step)
    records.keep(cluster, arms.SAVED)


def cells(cluster: Cluster) -> list[Cell]:
    """All that can be measured, in order."""
    one = replace(cluster, node_count=1)
    found = [
        Cell(f"paper-{link}", start_paper.STEPS, partial(start_paper.measure, one, link)) for link in LINKS
    ]
    found.append(Cell("warm", start_warm.STEPS, partial(start_warm.measure, one)))
    for count in NODE_COUNTS:
        some = replace(cluster, node_count=count)
        for link in LINKS:
            measure = partial(start_demo.measure, some, link)
            found.append(Cell(f"demo-{count}-{link}", start_demo.STEPS, measure))
    return found
