"""The demo: one job, started as it is today and with --bootseer, on a real cluster of three nodes.

Both starts are cold: no page cached, nothing in the agents' caches. Plain is what people do today: image,
environment and checkpoint are used from the shared folder, the image through squashfuse.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cluster.client import Cluster
from cluster.layout import REPO, ClusterError
from demo import inputs

BOOTSEER = str(REPO / ".venv" / "bin" / "bootseer")
STAGES = ("prolog", "launch", "image", "environment", "checkpoint", "program")
MARKS = ("image_loaded", "environment_loaded", "checkpoint_loaded", "training_started", "checksum")
START_TIMEOUT_S = 900.0
REPORT_TIMEOUT_S = 60.0

console = Console()


@dataclass(frozen=True)
class Start:
    """One start of the job: its report, and the checksum that every node printed."""

    job_id: int
    checksum: str
    report: dict[str, Any]

    @property
    def total_s(self) -> float:
        """From the hook in the prolog until training began, on the slowest node.

        Accounting has the allocation's start in whole seconds, and so its stage is not counted.
        """
        return max(float(start["total_s"] - start["stages"]["allocation"]) for start in self.report["starts"])

    def stage_s(self, stage: str) -> float:
        """The median node's time in a stage."""
        rows = [row for row in self.report["stages"] if row["stage"] == stage]
        return float(rows[0]["median_s"]) if rows else 0.0


def start(cluster: Cluster, title: str, *options: str) -> Start:
    """Submit the job on cold nodes, show how far it is, and give its report."""
    cluster.script("drop-caches", "--bootseer")
    folder = cluster.shared / inputs.FOLDER
    script = (folder / "job.sh").read_text()
    place = f"--chdir=/shared/{inputs.FOLDER}"
    job_id = cluster.sbatch(script, place, f"--output=/shared/{inputs.FOLDER}/%j.out", *options)
    watch(cluster, job_id, folder / f"{job_id}.out", title)
    state = cluster.wait(job_id)
    lines = (folder / f"{job_id}.out").read_text().splitlines()
    if state != "COMPLETED":
        raise ClusterError(f"job {job_id} ended as {state}:\n" + "\n".join(lines[-20:]))
    checksums = {line.split()[2] for line in lines if " checksum " in line}
    if len(checksums) != 1:
        raise ClusterError(f"the nodes of job {job_id} do not agree on the checksum: {checksums}")
    return Start(job_id, checksums.pop(), read_report(cluster, job_id))


def watch(cluster: Cluster, job_id: int, path: Path, title: str) -> None:
    """Show the marks that the job's tasks print, until all are there or the job has ended."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    deadline = time.monotonic() + START_TIMEOUT_S
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=len(cluster.nodes) * len(MARKS), now="")
        while time.monotonic() < deadline:
            words = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
            marks = [line[1] for line in words if len(line) > 2 and line[1] in MARKS]
            waiting = [mark for mark in MARKS if marks.count(mark) < len(cluster.nodes)]
            now = [f"until {mark}, {marks.count(mark)} of {len(cluster.nodes)} nodes" for mark in waiting[:1]]
            progress.update(task, completed=len(marks), now="".join(now))
            if not waiting or not cluster.exec("login", "squeue", "-hj", str(job_id)).stdout.strip():
                return
            time.sleep(0.2)
    raise ClusterError(f"job {job_id} did not start in {START_TIMEOUT_S:g} s; its output is {path}")


def read_report(cluster: Cluster, job_id: int) -> dict[str, Any]:
    """The job's report, once all nodes have written their events."""
    deadline = time.monotonic() + REPORT_TIMEOUT_S
    while True:
        done = cluster.exec("login", BOOTSEER, "report", "--format", "json", str(job_id), user="alice")
        if done.returncode == 0:
            report: dict[str, Any] = json.loads(done.stdout)
            if not report["silent_nodes"] and report["total"] and len(report["starts"]) == len(cluster.nodes):
                return report
        if time.monotonic() > deadline:
            raise ClusterError(f"no whole report of job {job_id}: {done.stdout}{done.stderr}")
        time.sleep(0.5)


def measure_link_bytes_per_s(cluster: Cluster) -> float:
    """What one node's link gives: the checkpoint read with dd, cold."""
    cluster.script("drop-caches")
    path = f"/shared/{inputs.FOLDER}/model.safetensors"
    done = cluster.exec("n1", "dd", f"if={path}", "of=/dev/null", "bs=4M", "count=64", timeout_s=300)
    bytes_text, seconds_text = done.stderr.splitlines()[-1].split(" bytes")[0], done.stderr.split(", ")[-2]
    return int(bytes_text) / float(seconds_text.split()[0])


def summary(plain: Start, bootseer: Start) -> Table:
    """Both starts side by side."""
    table = Table(box=box.SIMPLE_HEAD, title="seconds until training began")
    for heading in ("stage", "plain", "--bootseer", "saved"):
        table.add_column(heading, justify="left" if heading == "stage" else "right")
    for stage in STAGES:
        before, after = plain.stage_s(stage), bootseer.stage_s(stage)
        table.add_row(stage, f"{before:.2f}", f"{after:.2f}", f"{before - after:.2f}")
    table.add_section()
    saved_s = plain.total_s - bootseer.total_s
    table.add_row(
        "whole start", f"{plain.total_s:.2f}", f"{bootseer.total_s:.2f}", f"{saved_s:.2f}", style="bold"
    )
    return table


def result(
    plain: Start, bootseer: Start, *, link: str, link_bytes_per_s: float, checkpoint_bytes: int
) -> dict[str, Any]:
    """What --json writes."""
    return {
        "baseline_s": plain.total_s,
        "bootseer_s": bootseer.total_s,
        "reduction": 1 - bootseer.total_s / plain.total_s,
        "stages": {
            stage: {"baseline_s": plain.stage_s(stage), "bootseer_s": bootseer.stage_s(stage)}
            for stage in STAGES
        },
        "checksum": plain.checksum,
        "nodes": len(plain.report["nodes"]),
        "link": link,
        "link_bytes_per_s": link_bytes_per_s,
        "checkpoint_on_link_s": checkpoint_bytes / link_bytes_per_s,
    }


def run(cluster: Cluster, link: str, checkpoint_mib: int) -> dict[str, Any]:
    """The whole demo on a cluster that is up."""
    cluster.script("link", "all", link)
    with console.status("") as status:
        inputs.make(
            cluster, checkpoint_mib=checkpoint_mib, step=lambda text: status.update(f"making the {text}")
        )
    console.rule("alice puts image, environment and checkpoint into the store, once")
    inputs.save(cluster)
    link_bytes_per_s = measure_link_bytes_per_s(cluster)
    console.rule("the job, as it starts today")
    plain = start(cluster, "plain", "--bootseer=observe")
    cluster.show("login", BOOTSEER, "report", str(plain.job_id), user="alice")
    console.rule("the same job with --bootseer")
    folder = f"/shared/{inputs.FOLDER}"
    wishes = (f"--bootseer-image={folder}/image.sqsh", f"--bootseer-env={folder}/venv",
              f"--bootseer-checkpoint={folder}/model.safetensors")  # fmt: skip
    bootseer = start(cluster, "--bootseer", "--bootseer", *wishes)
    cluster.show("login", BOOTSEER, "report", str(bootseer.job_id), user="alice")
    if plain.checksum != bootseer.checksum:
        raise ClusterError(f"the weights differ: {plain.checksum} plain, {bootseer.checksum} with --bootseer")
    checkpoint_bytes = (cluster.shared / inputs.FOLDER / "model.safetensors").stat().st_size
    content = result(
        plain, bootseer, link=link, link_bytes_per_s=link_bytes_per_s, checkpoint_bytes=checkpoint_bytes
    )
    console.rule("result")
    console.print(summary(plain, bootseer))
    style = "bold green" if content["reduction"] > 0 else "bold red"
    console.print(f"The start is {content['reduction']:.0%} shorter.", style=style)
    console.print(f"The weights are the same both times: sha256 {plain.checksum[:16]}…")
    console.print(
        f"Each node's link: {link}, {link_bytes_per_s / 1e6:.0f} MB/s by dd. The checkpoint alone takes "
        f"{content['checkpoint_on_link_s']:.1f} s on it: no cold start of this job is shorter."
    )
    return content


def main(
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the cluster up, with all inputs.")] = False,
    link: Annotated[str, typer.Option(help="Rate of each node's link.")] = "250mbit",
    checkpoint_mib: Annotated[int, typer.Option(min=64, help="Size of the checkpoint, MiB.")] = 1024,
) -> None:
    """Start the same job plain and with --bootseer, and show the difference. Needs root."""
    cluster = Cluster.default()
    keep = keep or cluster.up
    try:
        with console.status("starting a cluster of three nodes"):
            cluster.script("up", "--nodes", str(cluster.node_count), "--link", link, timeout_s=900)
        content = run(cluster, link, checkpoint_mib)
        if json_path:
            json_path.write_text(json.dumps(content, indent=2) + "\n")
    except ClusterError as error:
        console.print(f"scripts/demo: {error}", style="red", markup=False)
        raise typer.Exit(1) from None
    finally:
        if keep:
            console.print("The cluster is left up: scripts/cluster status, exec, down.")
        else:
            with console.status("taking the cluster down"):
                cluster.script("down")


if __name__ == "__main__":
    typer.run(main)
