"""The artifact that held the start up, in words. Pure functions.

The start took as long as on its slowest node. Nodes that wait for each other before they train are all as
slow: so nodes whose start was up to 1 % shorter count as well, and of them the one whose reads waited most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bootseer_slurm.events import BELOW_LAYER
from bootseer_slurm.report.startup.transfers import TOLERATED, Transfer
from bootseer_slurm.units import format_duration, format_share


@dataclass(frozen=True, slots=True)
class Verdict:
    """The artifact that held the start up; without a name, none that was brought did.

    share: of the node's start. at_most: reads of several blobs waited, perhaps at the same time.
    """

    node: str
    what: str | None
    names: tuple[str, ...]
    waited_s: float
    share: float
    at_most: bool = False

    @property
    def text(self) -> str:
        """The verdict in words, without a full stop."""
        waited = format_duration(self.waited_s)
        if not self.names:
            return f"nothing that was brought held it up: reads waited {waited} in all"
        artifact, it = " ".join(part for part in ("the", self.what, self.names[0]) if part), "it"
        if len(self.names) > 1:
            artifact, it = f"{artifact} and {len(self.names) - 1} more", "them"
        waited = f"up to {waited}" if self.at_most else waited
        share = format_share(self.share)
        return f"held up by {artifact}: {self.node} waited {waited} for {it} ({share} of its start)"


def find_verdict(transfers: Sequence[Transfer], starts_s: Mapping[str, float]) -> Verdict | None:
    """The verdict on a start; None when it is not known how long reads waited on the slowest nodes.

    starts_s: seconds of each node's start, where they are known.
    """
    slowest_s = max(starts_s.values(), default=0.0)
    slow = {node for node, start_s in starts_s.items() if start_s >= (1 - TOLERATED) * slowest_s}
    brought = [row for row in transfers if row.node in slow]
    by_kind: dict[tuple[str, str], list[Transfer]] = defaultdict(list)
    by_node: dict[str, list[Transfer]] = defaultdict(list)
    for row in brought:
        if row.waited_s is not None:
            by_kind[row.node, row.what].append(row)
            by_node[row.node].append(row)
    if not by_node:
        return None
    worst = max(by_kind.values(), key=_waited_s)
    if _share(worst) > TOLERATED:
        return _held_up(worst)
    if by_node.keys() != {row.node for row in brought}:
        return None  # a node that did not tell may have waited
    worst = max(by_node.values(), key=_waited_s)
    return Verdict(worst[0].node, None, (), _waited_s(worst), _share(worst))


def _held_up(rows: Sequence[Transfer]) -> Verdict:
    """These things of one kind held the start up on their node."""
    waited = sorted((row for row in rows if row.waited_s), key=lambda row: -(row.waited_s or 0.0))
    names = dict.fromkeys(row.target.removesuffix(BELOW_LAYER) for row in waited)
    node, what = rows[0].node, rows[0].what
    return Verdict(node, what, tuple(names), _waited_s(rows), _share(rows), at_most=len(waited) > 1)


def _waited_s(rows: Sequence[Transfer]) -> float:
    """How long reads of these things waited on one node, at most its whole start."""
    waited_s = sum(row.waited_s or 0.0 for row in rows)
    return min(waited_s, rows[0].start_s or 0.0)


def _share(rows: Sequence[Transfer]) -> float:
    return _waited_s(rows) / rows[0].start_s if rows[0].start_s else 0.0
