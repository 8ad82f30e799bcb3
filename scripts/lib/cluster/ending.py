"""Ending what was started: all that a state folder has a record of."""

from __future__ import annotations

import shutil
import signal
import sys
from pathlib import Path

from . import network
from .layout import ClusterError, Layout, State


def print_log_of(error: BaseException) -> None:
    """The last lines of the log that an error names."""
    log = getattr(error, "log", None)
    if log and log.exists():
        lines = log.read_text(errors="replace").splitlines()[-20:]
        print(f"--- {log}", *lines, "---", sep="\n", file=sys.stderr)


def take_down(layout: Layout, *, keep_logs: bool = False) -> None:
    """Kill what was recorded, wait until it is gone, delete the state folder. Fine when there is none."""
    state = State.load(layout)
    if state:
        # The first process of a PID namespace takes all others with it.
        for _, _, process in state.started():
            process.signal(signal.SIGKILL)
        for node, name, process in state.started():
            if not process.wait(20):
                raise ClusterError(f"{node}/{name} (pid {process.pid}) does not die", layout.log(node, name))
        network.wait_gone(state)
    if not layout.dir.exists():
        return
    if state is None and any(entry.name != "log" for entry in layout.dir.iterdir()):
        raise ClusterError(f"{layout.dir} was made by something else: name another folder")
    below = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    below = [target for target in below if target.startswith(f"{layout.dir}/")]
    if below:
        raise ClusterError(f"something is mounted below the state folder: {' '.join(below)}")
    for entry in layout.dir.iterdir():
        if entry.is_dir() and not (keep_logs and entry.name == "log"):
            shutil.rmtree(entry)
    # Last: while there is a record, `down` can be called again.
    (layout.dir / "state.json").unlink(missing_ok=True)
    if not keep_logs:
        shutil.rmtree(layout.dir)
