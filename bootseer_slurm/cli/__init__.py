"""The command line. Owns what is shown and asked; every command's work is done by another room.

Rooms are imported inside the commands: `bootseer mark` runs in jobs and must not load pyarrow or the agent.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bootseer_slurm import config as configuration
from bootseer_slurm.cli import doctor, reports, settings
from bootseer_slurm.cli.cache import app as cache_app
from bootseer_slurm.cli.checkpoint import app as checkpoint_app
from bootseer_slurm.cli.debug import app as debug_app
from bootseer_slurm.cli.env import app as env_app
from bootseer_slurm.cli.image import app as image_app
from bootseer_slurm.cli.store import app as store_app
from bootseer_slurm.errors import InputError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
config_app = typer.Typer(no_args_is_help=True, help="The configuration of this machine.")
profile_app = typer.Typer(no_args_is_help=True, help="Profiles, the files given as --bootseer=PROFILE.toml.")
for name, group in (("config", config_app), ("env", env_app), ("image", image_app), ("profile", profile_app),
                    ("cache", cache_app), ("checkpoint", checkpoint_app), ("store", store_app),
                    ("debug", debug_app)):  # fmt: skip
    app.add_typer(group, name=name)
for command in (doctor.doctor, reports.collect, reports.overhead, reports.answer):
    app.command()(command)


@app.callback()
def _root(
    config: Annotated[
        Path | None, typer.Option(help="Configuration file, instead of /etc/bootseer/bootseer.toml.")
    ] = None,
) -> None:
    """Faster job starts on Slurm: prefetch in the prolog, and reports of what a start cost."""
    settings.name_config(config)


@app.command()
def agent() -> None:
    """Run the node agent (root; started by systemd)."""
    from bootseer_slurm import log
    from bootseer_slurm.service.agent import Agent
    from bootseer_slurm.service.handover import is_trial
    from bootseer_slurm.service.layouts import check_layouts
    from bootseer_slurm.service.supervisor import Supervisor

    config = settings.config()
    log.set_up(config.agent.log_level)
    if os.geteuid() != 0:
        raise InputError("the agent must run as root")
    if is_trial():
        check_layouts(config.agent.socket.parent)
        return
    status = Supervisor(config, lambda config, resources: Agent(config, resources).run()).run()
    raise typer.Exit(status)


@app.command()
def status() -> None:
    """Show the agent of this node and the jobs it knows, as JSON."""
    from bootseer_slurm.agentapi import client, protocol

    reply = client.request("status", socket_path=str(settings.config().agent.socket))
    print(json.dumps(json.loads(protocol.first(reply, "STATUS_JSON")), indent=2))


@app.command()
def mark(
    name: Annotated[str, typer.Argument(help="For instance training_started, which ends the start.")],
) -> None:
    """Tell where a job is. Never fails a job: exit status 0 also without an agent, with a line on stderr."""
    from bootseer_slurm.agentapi import client

    if not client.mark(name):
        print(
            f"bootseer: mark {name} was not taken: no agent, or no job that asked for Bootseer",
            file=sys.stderr,
        )


@app.command()
def report(
    job_id: Annotated[
        str, typer.Argument(help="As sacct shows it: 1234, 1234_5 of an array, 1234+1 of a het job.")
    ],
    format: Annotated[str, typer.Option(help="terminal, json, csv, parquet, html or perfetto.")] = "terminal",
    output: Annotated[Path | None, typer.Option(help="Write to this file; parquet needs one.")] = None,
    restart: Annotated[
        int | None, typer.Option(help="Restart count of a requeued job; the last without it.")
    ] = None,
) -> None:
    """Show what a job's start cost, stage by stage, joined with sacct."""
    from bootseer_slurm.report.render.formats import FORMATS
    from bootseer_slurm.report.render.terminal import to_terminal
    from bootseer_slurm.report.report import report

    if format not in ("terminal", *FORMATS):
        raise InputError(f"format {format!r} is not known", hint=f"terminal, {', '.join(FORMATS)}")
    if format == "parquet" and output is None:
        raise InputError("format parquet needs a file", hint="name it with --output")
    if format == "terminal" and output is not None:
        raise InputError("format terminal is for the screen", hint="choose another one with --format")
    result = report(job_id, settings.config(), restart=restart)
    if format == "terminal":
        to_terminal(result, Console())
    elif output is None:
        sys.stdout.buffer.write(FORMATS[format](result))
    else:
        try:
            output.write_bytes(FORMATS[format](result))
        except OSError as error:
            raise InputError(f"{output}: cannot be written: {error.strerror}") from error


@config_app.command("show")
def config_show() -> None:
    """Print every value and where it came from."""
    config = settings.config()
    for key, origin in config.origins.items():
        table, name = key.split(".")
        values = getattr(config, table)
        field = next(field for field in values.__slots__ if field in (name, f"{name}_s", f"{name}_bytes"))
        value = getattr(values, field)
        print(f"{table}.{field} = {configuration.shown(value)}  ({origin})")


@config_app.command("template")
def config_template() -> None:
    """Print a configuration file with every key and its default."""
    print(configuration.template(), end="")


@profile_app.command("check")
def profile_check(path: Path) -> None:
    """See whether a profile is usable: exit status 0, or 2 with one line."""
    from bootseer_slurm.job.request import parse_profile

    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    parse_profile(text)
