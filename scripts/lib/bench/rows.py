"""The rows that every benchmark gives: a metric, its value, target and limit, and how it was measured."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One measured figure.

    target: what it should be (None: none is set), below it or above it as `at_least` says.
    limit: the physical or peer figure of the same run. how: what was run.
    """

    metric: str
    value: float
    unit: str
    target: float | None
    limit: float | None
    how: str
    at_least: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without one."""
        if self.target is None:
            return None
        return self.value >= self.target if self.at_least else self.value <= self.target

    def to_json(self) -> dict[str, object]:
        return {
            "metric": self.metric,
            "value": self.value,
            "unit": self.unit,
            "target": self.target,
            "limit": self.limit,
            "met": self.met,
            "how": self.how,
        }
