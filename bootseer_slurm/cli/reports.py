"""`bootseer collect`, `overhead` and `answer`: the cost of all starts of a cluster."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
from typing import Annotated

import typer
from rich.console import Console

from bootseer_slurm.cli import settings
from bootseer_slurm.errors import BootseerError, InputError
from bootseer_slurm.text import escaped
from bootseer_slurm.units import parse_duration


def collect() -> None:
    """Add finished starts to the records, and to AdminComment in accounting (root; a systemd timer).

    Goes on where the last call ended, also one that was killed.
    """
    from bootseer_slurm.report.collect import collect

    config = settings.config()
    result = collect(config.store.uri, config.records.path)
    print(
        f"starts added: {result.starts}, waiting for their jobs' end: {result.waiting}, "
        f"not believed: {result.refused}, AdminComment written: {result.comments}, "
        f"somebody else's left: {result.foreign_comments}"
    )
    for problem in result.problems:
        print(f"bootseer: {escaped(problem)}", file=sys.stderr)
    if result.problems:
        raise typer.Exit(BootseerError.exit_status)


def overhead(
    since: Annotated[str, typer.Option(help="How far back, for instance 12h, 7d or 90d.")] = "7d",
    by: Annotated[str, typer.Option(help="user, account, partition, size or image.")] = "user",
    format: Annotated[str, typer.Option(help="terminal or json.")] = "terminal",
) -> None:
    """Show what starts cost: all of them for operators, for others their own."""
    from bootseer_slurm.report.overhead import BY, overhead, visible_records
    from bootseer_slurm.report.render.overhead_table import to_json, to_terminal

    if by not in BY:
        raise InputError(f"--by {by!r} is not known", hint=", ".join(BY))
    if format not in ("terminal", "json"):
        raise InputError(f"format {format!r} is not known", hint="terminal or json")
    since_s = parse_duration(since)
    since_ms = max(0, int((time.time() - since_s) * 1000))
    records = visible_records(settings.config(), since_ms=since_ms)
    result = overhead(records, since_ms=since_ms, by=by, days=since_s / 86400)
    if format == "json":
        print(to_json(result))
    else:
        to_terminal(result, Console())


def answer() -> None:
    """Answer one request for records or events on the socket that is stdin (root; started by systemd)."""
    from bootseer_slurm.report.answer import answer

    try:
        link = socket.socket(fileno=sys.stdin.fileno())
        if link.family != socket.AF_UNIX:
            raise OSError("not a Unix socket")
    except OSError as error:
        raise InputError(f"stdin: {error}", hint="systemd starts this: bootseer-answer.socket") from error
    with contextlib.suppress(ConnectionError, TimeoutError):  # its client went away
        answer(link, settings.config())
