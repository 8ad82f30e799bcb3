"""The other nodes of a job as one node sees them: absent, missing, banned or slow.

A node that refuses has perhaps not started, and is tried again after 1 s. One that was heard and refuses now
is missing, and so is one that is silent. Each try of that one costs time: it is left alone for 10 s. A node
that sent wrong bytes is banned for the job. Where nobody was ever heard and two were silent, a firewall is in
between, and the node reads the store. So it does where some were heard, and now four are silent and nobody
was heard for 1 s; a silent node is tried again in its time.
Pure: time is a parameter, in seconds of a clock that only goes forward. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter, deque
from statistics import median

REFUSED_S = 1.0
SILENT_S = 10.0
_RUNS = 32
_LEAST_RUNS = 8
_SLOW = 2  # times the median
_STRIKES = 2
_TURN_S = 0.01  # less is a turn of a process, and no link is judged by that
_CUT_OFF_NODES = 2
_LEFT_NODES, _LEFT_S = 4, 1.0


class Pace:
    """How long chunks of other nodes take."""

    def __init__(self) -> None:
        self._runs: deque[float] = deque(maxlen=_RUNS)
        self._strikes: Counter[int] = Counter()

    def is_slow(self, node: int, dur_s: float) -> bool:
        """Count one chunk from this node; whether it took twice the median of 32, the second time in a row.

        dur_s: from its first byte to its last, as if it had 4 MiB.
        """
        slow = len(self._runs) >= _LEAST_RUNS and dur_s > max(_TURN_S, _SLOW * median(self._runs))
        self._runs.append(dur_s)
        self._strikes[node] = self._strikes[node] + 1 if slow else 0
        return self._strikes[node] >= _STRIKES


class Liveness:
    """The other nodes, as one node sees them. pace: how fast they are."""

    def __init__(self) -> None:
        self.banned: set[int] = set()
        self.pace = Pace()
        self._heard: set[int] = set()
        self._newly_missing: list[int] = []
        self._refused_until_s: dict[int, float] = {}
        self._silent_until_s: dict[int, float] = {}
        self._silent_since_s: dict[int, float] = {}  # of those that were silent since any was heard

    def heard(self, node: int) -> None:
        """It said something, whatever it was."""
        self._heard.add(node)
        self._silent_since_s.clear()
        self._refused_until_s.pop(node, None)
        self._silent_until_s.pop(node, None)

    def refused(self, node: int, now_s: float) -> None:
        """It refused a connection, or closed it."""
        if node in self._heard:
            self.silent(node, now_s)
        self._refused_until_s[node] = now_s + REFUSED_S

    def silent(self, node: int, now_s: float) -> None:
        """It did not answer in time."""
        if not self.is_missing(node, now_s):
            self._newly_missing.append(node)
        self._silent_until_s[node] = now_s + SILENT_S
        self._silent_since_s.setdefault(node, now_s)

    def ban(self, node: int) -> None:
        """It sent wrong bytes: it is missing for the job."""
        if node not in self.banned:
            self.banned.add(node)
            self._newly_missing.append(node)

    def forget_refused(self) -> None:
        """Try those again that refused: there is nobody else."""
        self._refused_until_s.clear()

    def is_absent(self, node: int, now_s: float) -> bool:
        """Whether it is not to be asked now, unless somebody says that it is there."""
        return self._refused_until_s.get(node, 0.0) > now_s or self.is_missing(node, now_s)

    def is_missing(self, node: int, now_s: float) -> bool:
        """Whether it is not to be asked now, whoever names it."""
        return self._silent_until_s.get(node, 0.0) > now_s or node in self.banned

    def missing(self, now_s: float) -> tuple[int, ...]:
        """All of them, for the directories: so that these name none of them."""
        silent = [node for node, until_s in self._silent_until_s.items() if until_s > now_s]
        return (*silent, *self.banned) if silent or self.banned else ()

    def newly_missing(self) -> list[int]:
        """Those that this has not given before."""
        nodes, self._newly_missing = self._newly_missing, []
        return nodes

    @property
    def any_heard(self) -> bool:
        """Whether any node was ever heard."""
        return bool(self._heard)

    def is_cut_off(self, now_s: float) -> bool:
        """Whether no node can be reached, as far as is known. The first that is heard ends it."""
        if not self._heard:
            return len(self._silent_until_s) >= _CUT_OFF_NODES
        since_s = [since_s for node, since_s in self._silent_since_s.items() if self.is_missing(node, now_s)]
        return len(since_s) >= _LEFT_NODES and now_s - min(since_s) >= _LEFT_S
