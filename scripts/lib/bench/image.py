"""Starting a container from its image: everything that can be done today, beside Bootseer.

One run takes about twenty minutes on two cores, and longer the first time, when it makes its image.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import median

from bench import image_arms as arms
from bench import image_inputs
from bench.image_inputs import Inputs
from bench.rows import Row
from cluster.client import Cluster
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

REPEATS = 5
STOCK_REPEATS = 1
LINKS = ("1gbit", "10gbit")
DD_BYTES = 256 * 2**20
DELAY_S = 0.0005  # each way

Results = dict[str, list[arms.Result]]


def run(cluster: Cluster) -> list[Row]:
    """All rows, on a cluster that is up."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    rows: list[Row] = []
    with Progress(*columns) as progress:
        task = progress.add_task("inputs", total=None)

        def step(text: str) -> None:
            progress.update(task, description=text, advance=1)

        inputs = image_inputs.make(cluster, step)
        rows += local_rows(arms.rounds(cluster, inputs, arms.local(inputs), REPEATS, step))
        for link in LINKS:
            cluster.script("link", arms.NODE, link)
            rows += link_rows(cluster, inputs, link, lambda text, link=link: step(f"{link}: {text}"))
    cluster.script("link", arms.NODE, LINKS[0])
    return rows


def local_rows(results: Results) -> list[Row]:
    """What the mounts cost when the image lies on the node."""
    tree_s = seconds(results["ext4 tree"])
    how = f"imports in a container until the last is done, cold page cache, median of {REPEATS}, interleaved"
    return [
        Row(
            f"{name}, against an ext4 tree",
            seconds(each) / tree_s,
            "×",
            None,
            1.0,
            f"{how}; tree {tree_s:.2f} s",
        )
        for name, each in results.items()
        if name != "ext4 tree"
    ]


def link_rows(cluster: Cluster, inputs: Inputs, link: str, step: Callable[[str], None]) -> list[Row]:
    """One link: the rounds, and what follows from them."""
    kernel = [arm for arm in arms.local(inputs) if arm.name == "local, kernel"]
    results: Results = {}
    rates = []
    for number in range(REPEATS):
        step(f"dd, {number + 1} of {REPEATS}")
        rates.append(arms.measure_dd(cluster, inputs, DD_BYTES))
        merge(results, arms.rounds(cluster, inputs, [*kernel, *arms.remote(inputs)], 1, step))
        with arms.far_store(cluster, DELAY_S):
            merge(results, arms.rounds(cluster, inputs, arms.far(inputs), 1, step))
    with arms.registry(cluster, inputs) as address:
        merge(results, arms.rounds(cluster, inputs, [arms.stock(address)], STOCK_REPEATS, step))
    link_bytes_per_s = median(rates)
    how = f"{link}, cold page cache, {REPEATS} repeats ({STOCK_REPEATS} of stock), medians, interleaved; "
    how += f"dd {link_bytes_per_s / 1e6:.0f} MB/s; image {inputs.image_bytes / 1e6:.0f} MB"
    local_s = seconds(results["local, kernel"])
    return [
        Row(f"{link}: {name}", seconds(each), "s", None, local_s, how)
        for name, each in results.items()
        if name != "local, kernel"
    ]


def merge(results: Results, more: Results) -> None:
    """Add a round's results."""
    for name, each in more.items():
        results.setdefault(name, []).extend(each)


def seconds(results: list[arms.Result]) -> float:
    """The median start."""
    return median(result["total_s"] for result in results)
