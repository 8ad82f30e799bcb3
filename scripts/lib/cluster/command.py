"""The command lines of scripts/cluster and scripts/hdfs: their progress, subcommands and exit status."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable

from .layout import ClusterError, Layout, locked

_started_s = time.monotonic()


def progress(text: str) -> None:
    """Say what was reached, and when. Nobody listening is no reason to stop half-way."""
    with contextlib.suppress(BrokenPipeError):
        print(f"[{time.monotonic() - _started_s:5.1f} s] {text}", flush=True)


class CommandLine:
    """A command with subcommands, each a function of the layout and its options."""

    def __init__(self, name: str, text: str) -> None:
        """name: of the command, "scripts/cluster". text: what its help begins with."""
        self._name = name
        self._parser = argparse.ArgumentParser(prog=name, description=text)
        self._commands = self._parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        self,
        name: str,
        function: Callable[[Layout, argparse.Namespace], None],
        text: str,
        *,
        locks: bool = False,
    ) -> argparse.ArgumentParser:
        """Add a subcommand. locks: it waits while another such one is at work on the cluster."""
        added = self._commands.add_parser(name, help=text, description=text)
        added.set_defaults(function=function, locks=locks)
        return added

    def run(self, layout_of: Callable[[], Layout]) -> int:
        """Run what the arguments ask for, as root; the exit status: 1 when it failed, with the reason told.

        layout_of: gives the layout, or raises ClusterError.
        """
        options = self._parser.parse_args()
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            if os.geteuid() != 0:
                raise ClusterError("must run as root")
            layout = layout_of()
            with locked(layout) if options.locks else contextlib.nullcontext():
                options.function(layout, options)
        except ClusterError as error:
            print(f"{self._name}: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            return 130
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        return 0
