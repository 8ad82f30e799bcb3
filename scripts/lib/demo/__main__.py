"""The demo: one job, started as it is today and with --bootseer, on a real cluster of four nodes.

Its steps: a cluster (cluster/), the inputs (inputs.py), the arms (arms.py, starts.py), picture.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.layout import ClusterError
from scripts.lib.demo import arms, inputs, picture, records
from scripts.lib.demo.bar import steps_bar

NODES = 4
STORE_LINK = "300mbit"
ROUNDS, QUICK_ROUNDS = 2, 1

console = Console()


def run(cluster: Cluster, *, store_link: str, with_all: bool, quick: bool) -> dict[str, Any]:
    """The whole demo on a cluster that is up."""
    with steps_bar(console) as bar:
        task = bar.add_task("", total=inputs.STEPS)

        def step(text: str) -> None:
            bar.update(task, description=text, advance=bar.tasks[0].description != "")

        cluster.script("link", "store", "off")
        inputs.make(cluster, inputs.QUICK if quick else inputs.FULL, step)
        inputs.save(cluster, step)
        records.keep(cluster, arms.SAVED)
        bar.update(task, completed=inputs.STEPS, description="the inputs are there, and in the store")
    chosen = [arms.PLAIN, arms.FIRST, arms.AGAIN, *([arms.SPELLED] if with_all else [])]
    rounds = QUICK_ROUNDS if quick else ROUNDS
    with steps_bar(console) as bar:
        task = bar.add_task("", total=arms.count(chosen, rounds))
        measured = arms.measure(
            cluster,
            chosen,
            rounds=rounds,
            store_link=store_link,
            tell=lambda text: bar.update(task, description=text),
            done=lambda: bar.update(task, advance=1),
        )
    return arms.result(cluster, measured, store_link)


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster up, with all inputs.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Small inputs, one round: a try.")] = False,
    with_all: Annotated[bool, typer.Option("--all", help="Also: again, with the options.")] = False,
    store_link: Annotated[str, typer.Option(help="Rate of the store server's link.")] = STORE_LINK,
) -> None:
    """Start the same job plain and with --bootseer, and show the difference. Needs root."""
    cluster = Cluster.default(NODES)
    keep = keep or cluster.up
    try:
        with console.status(f"starting a cluster of {NODES} nodes"):
            cluster.script("up", "--nodes", str(NODES), "--link", "off", timeout_s=900)
            cluster.script("link", "store", store_link)
        content = run(cluster, store_link=store_link, with_all=with_all, quick=quick)
        if json_path:
            json_path.write_text(json.dumps(content, indent=2) + "\n")
        picture.show(content, console)
        if quick:
            console.print("Small inputs, one round: that shows that it works, not how fast.", style="dim")
    except ClusterError as error:
        console.print(f"scripts/demo: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    finally:
        if keep:
            console.print("The cluster is left up: scripts/cluster status, exec, down.")
        else:
            with console.status("taking the cluster down"):
                cluster.script("down")
    if not quick and min(content["reduction_first"], content["reduction_again"]) <= 0:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
