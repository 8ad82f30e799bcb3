"""Which nodes are near one another, as Slurm's topology.conf says (topology.conf(5)).

Only the leaves count: lines with `Nodes=`, of a SwitchName or a BlockName. Slurm has the same file on all
nodes of a cluster; slurmd keeps a copy where the site is configless. Pure but for the reading of that file.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from bootseer_slurm.errors import InputError
from bootseer_slurm.slurm.hostlist import expand

PLACES = (Path("/etc/slurm/topology.conf"), Path("/run/slurm/conf/topology.conf"))
_MOST_BYTES = 4 * 2**20
_LEAF = re.compile(r"^\s*(?:SwitchName|BlockName)=\S+\s.*?\bNodes=(\S+)", re.IGNORECASE | re.MULTILINE)


def near_nodes(names: Sequence[str], text: str) -> tuple[tuple[int, ...], ...]:
    """The numbers of these nodes, those under each switch together, in the order of the file.

    Nodes that the file does not name, or that stand in a line that cannot be read, come last, together.
    """
    numbers = {name: number for number, name in enumerate(names)}
    blocks = []
    for nodelist in _LEAF.findall(text.replace("\\\n", " ")):
        with contextlib.suppress(InputError):
            here = [numbers.pop(name) for name in expand(nodelist) if name in numbers]
            blocks.append(tuple(sorted(here)))
    blocks.append(tuple(numbers.values()))
    return tuple(block for block in blocks if block)


def read_topology(places: Sequence[Path] = PLACES) -> str:
    """The text of the first file that is there; "" without one, or where it is too large."""
    for path in places:
        with contextlib.suppress(OSError), path.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_MOST_BYTES + 1)
            return text if len(text) <= _MOST_BYTES else ""
    return ""
