"""`bootseer debug`: the work of this node's agent for a job, while it goes on."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from bootseer_slurm.cli import settings
from bootseer_slurm.cli.cells import cell
from bootseer_slurm.units import format_bytes

app = typer.Typer(no_args_is_help=True, help="The work of this node's agent for a job.")


@app.callback()
def _group() -> None:
    """The work of this node's agent for a job."""


@app.command("job")
def debug_job(
    job_id: Annotated[int, typer.Argument(help="A job of yours that runs on this node; root may name any.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print all of it, as JSON.")] = False,
) -> None:
    """Show a job's artifacts, how far each is, where its bytes come from, and what the prefetch has to do."""
    from bootseer_slurm.agentapi import client, protocol

    path = str(settings.config().agent.socket)
    reply = client.request("debug", [("JOB_ID", str(job_id))], socket_path=path)
    state = json.loads(protocol.first(reply, "DEBUG_JSON"))
    if as_json:
        print(json.dumps(state, indent=2))
        return
    Console().print(_table(state))
    queues = state["queues"]
    print(
        f"\njob {state['job']} on {state['node']}: {state['phase']}"
        f"{', only observed' if state['observed'] else ''}\n"
        f"prefetch: {queues['hot']} runs of hot blocks and {queues['whole']} whole blobs to go; "
        f"the link gives {format_bytes(state['link_bytes_per_s'])}/s"
    )


def _table(state: dict[str, Any]) -> Table:
    table = Table("artifact", "asked by", "state", box=None, header_style="bold")
    for title in ("size", "here", "fetched", "plan", "waited"):
        table.add_column(title, justify="right")
    table.add_column("sources")
    for artifact in state["artifacts"]:
        shown = "dropped" if artifact["dropped"] else artifact["state"]
        reason = f"{shown}: {artifact['reason']}" if artifact["reason"] else shown
        name = f"{artifact['kind']} {artifact['name']}"
        if not artifact["layers"]:
            table.add_row(cell(name), artifact["asked_by"], cell(reason))
        for layer in artifact["layers"]:
            blocks = layer["planned_blocks"]
            table.add_row(
                cell(name),
                artifact["asked_by"],
                cell(reason + (", mounted" if layer["mounted"] else "")),
                format_bytes(layer["size_bytes"]),
                f"{layer['present_bytes'] * 100 // max(1, layer['size_bytes'])} %",
                format_bytes(layer["fetched_bytes"]),
                "none" if blocks is None else f"{blocks} blocks",
                f"{layer['waited_s']:.1f} s",
                ", ".join(layer["sources"]) or "-",
            )
            name = "  below it"
    return table
