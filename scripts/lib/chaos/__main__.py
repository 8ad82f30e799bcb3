"""The command line of scripts/chaos: a cluster, jobs and faults for some minutes, and the findings."""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import quantiles
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from scripts.lib.chaos import faults, findings
from scripts.lib.chaos.inputs import Inputs
from scripts.lib.chaos.jobs import Jobs
from scripts.lib.cluster.client import Cluster
from scripts.lib.cluster.hook_times import stamp_hooks
from scripts.lib.cluster.layout import ClusterError

NODES = 3
LANES = 2  # faults at the same time
JOBS_END_S = 240.0

console = Console()


def run(cluster: Cluster, minutes: float, seed: int, results: Path) -> dict[str, object]:
    """The whole day on a cluster that is up; the object that --json writes."""
    with console.status("making the inputs"):
        faults.give_own_disks(cluster)
        inputs = Inputs(cluster)
        inputs.make()
        stamp_hooks(cluster, results)
    begun = time.time()
    jobs = Jobs(cluster, inputs, results, random.Random(f"{seed} jobs"))
    counts: Counter[str] = Counter()
    failing = faults.Failing(cluster, inputs, random.Random(f"{seed} faults"))
    threads = [threading.Thread(target=jobs.submit_until_over, name="jobs")]
    threads += [
        threading.Thread(
            target=faults.fail_until_over, args=(failing, jobs.over, counts), name=f"faults {lane}"
        )
        for lane in range(LANES)
    ]
    for thread in threads:
        thread.start()
    try:
        _show_progress(minutes, jobs, counts, threads)
    finally:
        jobs.over.set()
        for thread in threads:
            thread.join()
    with console.status("waiting for the last jobs"):
        left = jobs.wait_until_all_ended(JOBS_END_S)
    with console.status("looking at everything"):
        found = findings.find(cluster, jobs, inputs, begun)
    found.wrong += [f"still there after {JOBS_END_S:g} s: {line}" for line in left]
    return {
        "seed": seed,
        "minutes": minutes,
        "jobs": len(jobs.all),
        "asked": dict(Counter(job.asked for job in jobs.all)),
        "fates": dict(Counter(job.fate for job in jobs.all)),
        "states": dict(found.states),
        "faults": {name: counts[name] for name in faults.FAULTS},
        "tasks": found.tasks,
        "tasks_with_shadows": found.shadowed,
        "bytes_compared": found.bytes,
        "reads_refused": found.refused,
        "prologs": len(found.prologs_s),
        "prolog_p99_s": quantiles(found.prologs_s, n=100)[-1] if len(found.prologs_s) > 1 else None,
        "prolog_most_s": max(found.prologs_s, default=None),
        "wrong": found.wrong,
    }


def _show_progress(minutes: float, jobs: Jobs, counts: Counter[str], threads: list[threading.Thread]) -> None:
    end = time.monotonic() + minutes * 60
    with Progress(console=console) as bar:
        task = bar.add_task("", total=minutes * 60)
        while (left := end - time.monotonic()) > 0 and all(thread.is_alive() for thread in threads):
            text = f"{len(jobs.all)} jobs, {counts.total()} faults"
            bar.update(task, completed=minutes * 60 - left, description=text)
            time.sleep(0.5)
    if not all(thread.is_alive() for thread in threads):
        raise ClusterError("jobs or faults could not be made any more")


def show(result: dict[str, object]) -> None:
    """The figures as a table, and below it all that was wrong."""
    table = Table(box=box.SIMPLE_HEAD, show_header=False)
    table.add_column("", style="bold")
    table.add_column("")
    for key in ("jobs", "asked", "fates", "states", "faults", "tasks", "tasks_with_shadows"):
        value = result[key]
        text = (
            ", ".join(f"{name} {count}" for name, count in value.items())
            if isinstance(value, dict)
            else str(value)
        )
        table.add_row(key.replace("_", " "), text)
    table.add_row("bytes compared", f"{result['bytes_compared']:,}")
    table.add_row("reads refused", str(result["reads_refused"]))
    if result["prolog_most_s"] is not None:
        times = f"99th percentile {result['prolog_p99_s']:.3f} s, longest {result['prolog_most_s']:.3f} s"
        table.add_row("prologs", f"{result['prologs']}, {times}")
    console.print(table)
    wrong = result["wrong"]
    assert isinstance(wrong, list)
    for line in wrong:
        console.print(f"wrong: {line}", style="red", markup=False)
    if not wrong:
        console.print(f"Nothing was wrong. Seed {result['seed']}.", style="green")


def main(
    minutes: Annotated[float, typer.Option(help="How long jobs are submitted and faults are made.")] = 5.0,
    seed: Annotated[
        int | None, typer.Option(help="Draws the same jobs and faults; their times differ.")
    ] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster up, to look at it.")] = False,
) -> None:
    """Run random jobs while everything fails at random. Exit status 1 when anything was wrong. Needs root."""
    cluster = Cluster.default(NODES)
    if cluster.up:
        console.print("scripts/chaos needs a cluster of its own: scripts/cluster down first", style="red")
        raise typer.Exit(2)
    results = Path(tempfile.mkdtemp(prefix="bootseer-chaos-", dir="/tmp"))
    results.chmod(0o1777)
    try:
        with console.status(f"starting a cluster of {NODES} nodes"):
            cluster.script("up", "--nodes", str(NODES), "--link", "off", "--clocks", "--kept", timeout_s=900)
        result = run(cluster, minutes, random.randrange(10**6) if seed is None else seed, results)
    except ClusterError as error:
        console.print(f"scripts/chaos: {error}", style="red", markup=False)
        raise typer.Exit(2) from None
    finally:
        if not keep:
            cluster.script("down")
            shutil.rmtree(results)
    show(result)
    if json_path:
        json_path.write_text(json.dumps(result, indent=2) + "\n")
    if result["wrong"]:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
