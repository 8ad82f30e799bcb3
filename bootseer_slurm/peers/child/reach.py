"""Which nodes say nothing and still are there: the kernel of their machine takes what this node says.

A machine that is off, or behind a firewall, acknowledges nothing. One whose cores are busy does, while the
peer process on it waits for its turn. So who is asked something and says nothing for a while is sent a PROBE,
which nobody answers but that kernel.
"""

from __future__ import annotations

from collections.abc import Iterable

from bootseer_slurm.peers.child.links import Link, Links
from bootseer_slurm.peers.messages import Probe
from bootseer_slurm.peers.wire import unacknowledged_bytes

_PROBE_S = 0.075


class Reach:
    """The nodes that were heard, and those that were sent PROBE since."""

    def __init__(self, links: Links) -> None:
        self._links = links
        self._heard_s: dict[int, float] = {}
        self._probed: dict[int, Link] = {}

    def heard(self, node: int, now_s: float) -> None:
        """A node has said something."""
        self._heard_s[node] = now_s
        self._probed.pop(node, None)

    def among(self, nodes: Iterable[int], now_s: float) -> set[int]:
        """Those of these nodes that are there as far as their kernels say.

        To be called every 50 ms; where this process is late, it may be the first call for a long while.
        """
        reached = set()
        for node in nodes:
            link = self._links.link(node)
            if link is None:
                if self._links.proving.reaches(node):
                    reached.add(node)
            elif self._probed.get(node) is link:
                if not link.connection.wants_to_write and not unacknowledged_bytes(link.socket):
                    reached.add(node)
            elif now_s - self._heard_s.get(node, 0.0) >= _PROBE_S:
                self._probed[node] = link
                self._links.send(node, Probe())
                reached.add(node)  # until its kernel has had time to answer
        return reached
