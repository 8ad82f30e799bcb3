"""The layouts of what an agent keeps for the next one: a version for each, which an upgrade compares.

    <run>/layouts    as JSON, by the agent that serves: {"ledger": 1, …}

Who changes a layout so that code before or after the change cannot read it counts its version up here. Such
code would find nothing of the jobs that run, or take something for what it is not.
"""

from __future__ import annotations

import json
from pathlib import Path

from bootseer_slurm.errors import BootseerError

LAYOUTS = {
    "ledger": 1,  # fuse/ledger.py: the kernel's requests that were taken
    "nodes": 1,  # fuse/nodes.py: the files of the FUSE mounts
    "blocks": 1,  # cache/live.py: the states of the cache's blocks
    "journal": 1,  # job/journal.py: the jobs
}


def write_layouts(run: Path) -> None:
    """Say which layouts this code writes. Raises OSError."""
    draft = run / "layouts.new"
    draft.write_text(json.dumps(LAYOUTS))
    draft.rename(run / "layouts")


def check_layouts(run: Path) -> None:
    """See that what is kept has the layouts of this code. Raises BootseerError."""
    try:
        kept = json.loads((run / "layouts").read_text())
    except (OSError, ValueError):
        kept = "unknown"
    if kept != LAYOUTS:
        raise BootseerError(
            f"the running agent keeps its jobs in layouts {kept}, and this code has {LAYOUTS}",
            hint="restart bootseer-agent when no job is on the node",
        )
