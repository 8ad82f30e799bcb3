"""The records of figures over many starts. Times are counted in classes that are 2 % wide (CLASS_STEP)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

EDGES_S = (0, 5, 10, 20, 30, 60, 120, 300, 600, 1800, 3600, math.inf)
CLASS_STEP = math.log(1.02)
LEAST_S = 0.01  # class 0 begins here
DEVICE_SECONDS = ("gpu_s", "lost_gpu_s", "cpu_s", "lost_cpu_s")
SUMMED = ("starts", "measured", *DEVICE_SECONDS)


@dataclass(slots=True)
class Group:
    """Some starts: all, or those of one user, size, day … Only measured ones count beyond `starts`.

    classes: how many starts lie in each class of durations, by its number.
    """

    name: str
    starts: int = 0
    measured: int = 0
    gpu_s: float = 0.0
    lost_gpu_s: float = 0.0
    cpu_s: float = 0.0
    lost_cpu_s: float = 0.0
    classes: dict[int, int] = field(default_factory=dict)

    def percentile(self, share: float) -> float | None:
        """Seconds until training that this share of the measured starts did not exceed."""
        left = math.ceil(share * self.measured)
        for number in sorted(self.classes):
            left -= self.classes[number]
            if left <= 0:
                return _middle_s(number)
        return None

    def histogram(self) -> list[int]:
        """How many starts lie between each two of EDGES_S."""
        counts = [0] * (len(EDGES_S) - 1)
        for number, count in self.classes.items():
            at_s = _middle_s(number)
            counts[next(index for index, edge in enumerate(EDGES_S[1:]) if at_s < edge)] += count
        return counts

    def add(self, more: Group) -> None:
        """Count the starts of another group too."""
        for name in SUMMED:
            setattr(self, name, getattr(self, name) + getattr(more, name))
        for number, count in more.classes.items():
            self.classes[number] = self.classes.get(number, 0) + count


@dataclass(frozen=True, slots=True)
class Dear:
    """One start that cost much."""

    shown_id: str
    user: str
    nodes: int
    start_s: float
    lost_s: float


@dataclass(frozen=True, slots=True)
class Overhead:
    """The figures. device: "gpu", or "cpu" where no start had a GPU; whose seconds all sums are of."""

    since_ms: int
    by: str
    device: str
    trend_unit: str  # "day" or "week"
    total: Group
    groups: tuple[Group, ...]  # by `by`, the TOP that lost most
    group_count: int
    sizes: tuple[Group, ...]
    modes: tuple[Group, ...]
    trend: tuple[Group, ...]
    dearest: tuple[Dear, ...]

    def used_s(self, group: Group) -> float:
        """Device-seconds that the measured starts' jobs had."""
        return group.gpu_s if self.device == "gpu" else group.cpu_s

    def lost_s(self, group: Group) -> float:
        """Device-seconds that went by before training began."""
        return group.lost_gpu_s if self.device == "gpu" else group.lost_cpu_s

    def share(self, group: Group) -> float | None:
        """Lost of used; None where nothing was measured."""
        used_s = self.used_s(group)
        return self.lost_s(group) / used_s if used_s else None


def _middle_s(number: int) -> float:
    return LEAST_S * math.exp((number + 0.5) * CLASS_STEP)
