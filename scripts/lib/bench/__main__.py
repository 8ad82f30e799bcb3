"""Runs one benchmark on a cluster of its own, or on the one that is up, and shows its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from scripts.lib.bench import (
    checkpoint,
    cpu,
    digest,
    engines,
    env,
    image,
    load,
    peers,
    peers_sim,
    prolog,
    report,
    start,
)
from scripts.lib.bench.rows import Row
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import ClusterError

BENCHMARKS = {
    "cpu": cpu.run,
    "env": env.run,
    "image": image.run,
    "load": load.run,
    "prolog": prolog.run,
    "report": report.run,
}
WITHOUT_CLUSTER = {
    "checkpoint": checkpoint.run,
    "digest": digest.run,
    "peers": peers.run,
    "peers-engines": engines.run,
    "peers-sim": peers_sim.run,
}
IN_PARTS = {"start": start.run}
PARTS = {
    "checkpoint": ("disk", "node", "hdfs"),
    "peers": peers.PARTS,
    "peers-engines": engines.PARTS,
    "peers-sim": peers_sim.PARTS,
    "start": start.PARTS,
}
NAMES = [*BENCHMARKS, *IN_PARTS, *WITHOUT_CLUSTER]
# What a cluster that is started has; three, where nothing is said.
NODES = {"cpu": 1, "env": 1, "image": 1, "load": 1, "report": 1, "start": start.NODES}
CPUS = {"load": load.CPUS}

console = Console()


def show(rows: list[Row]) -> None:
    """The rows as a table."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("metric", "value", "target", "limit", "met"):
        table.add_column(heading, justify="left" if heading == "metric" else "right")
    for row in rows:
        target = "" if row.target is None else f"{'≥' if row.at_least else '≤'} {row.target:.4g}"
        met = {None: "", True: "yes", False: "no"}[row.met]
        style = "red" if row.met is False else ""
        limit = "" if row.limit is None else f"{row.limit:.4g}"
        table.add_row(row.metric, f"{row.value:.4g} {row.unit}", target, limit, met, style=style)
    console.print(table)
    for how in dict.fromkeys(row.how for row in rows):
        console.print(how, style="dim")


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(NAMES)}.")],
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    only: Annotated[
        str,
        typer.Option(
            help="Measure one part of it: of checkpoint disk, node or hdfs; of start paper, warm or demo, "
            "or one cell, paper-1gbit, demo-4-1gbit; of peers-engines one rate, 1gbit or 250mbit; "
            "of peers 4, 8 or 16 nodes; of peers-sim 3, 16, 100, 1000 or 10000 nodes."
        ),
    ] = "",
) -> None:
    """Measure, show a table, and write its rows. Exit status 0 when it could measure, targets met or not."""
    if name not in NAMES:
        raise typer.BadParameter(f"{name!r} is none of: {', '.join(NAMES)}")
    if only and only not in PARTS.get(name, ()):
        raise typer.BadParameter(f"{only!r} is no part of {name}: {', '.join(PARTS.get(name, ()))}")
    try:
        rows = WITHOUT_CLUSTER[name](only) if name in WITHOUT_CLUSTER else on_cluster(name, only)
    except ClusterError as error:
        console.print(f"scripts/bench: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    show(rows)
    if json_path:
        json_path.write_text(json.dumps([row.to_json() for row in rows], indent=2) + "\n")


def on_cluster(name: str, only: str) -> list[Row]:
    """The rows of a benchmark or of a part of it, on the cluster that is up or on one that is started."""
    node_count = NODES.get(name, 3)
    cluster = Cluster.default(node_count)
    was_up = cluster.up
    try:
        if not was_up:
            with console.status("starting a cluster"):
                cpus = ["--cpus", str(CPUS[name])] if name in CPUS else []
                cluster.script("up", "--nodes", str(node_count), *cpus, timeout_s=900)
        console.print(f"measuring: {name}")
        return IN_PARTS[name](cluster, only) if name in IN_PARTS else BENCHMARKS[name](cluster)
    finally:
        if not was_up:
            cluster.script("down")


if __name__ == "__main__":
    typer.run(main)
