"""The store of the simulated cluster: reads that share its rate evenly."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise
from typing import Generic, TypeVar

Token = TypeVar("Token")


class SharedStore(Generic[Token]):
    """Reads in progress. Each has the same part of a rate that depends on how many there are.

    Virtual time is the bytes that each read has got: so the reads end in a fixed order, and one that begins
    moves no other.
    """

    def __init__(self, rates: Sequence[tuple[int, float]]) -> None:
        """rates: (readers, bytes a second of all of them), by readers; linear in between."""
        self._rates = tuple(rates)
        self._reads: list[tuple[float, int, Token]] = []
        self._virtual_bytes = 0.0
        self._at_s = 0.0
        self._count = 0

    def begin(self, token: Token, size_bytes: int, now_s: float) -> None:
        """One more read. token: what `ended` gives."""
        self._advance(now_s)
        self._count += 1
        heapq.heappush(self._reads, (self._virtual_bytes + size_bytes, self._count, token))

    def ended(self, now_s: float) -> list[Token]:
        """The reads that have ended by now."""
        self._advance(now_s)
        tokens = []
        while self._reads and self._reads[0][0] <= self._virtual_bytes + 1:
            tokens.append(heapq.heappop(self._reads)[2])
        return tokens

    def next_end_s(self) -> float | None:
        """When the next read ends, if none begins before."""
        if not self._reads:
            return None
        left_bytes = max(0.0, self._reads[0][0] - self._virtual_bytes)
        return self._at_s + left_bytes * len(self._reads) / self._rate(len(self._reads))

    def _advance(self, now_s: float) -> None:
        if self._reads:
            readers = len(self._reads)
            self._virtual_bytes += (now_s - self._at_s) * self._rate(readers) / readers
        self._at_s = now_s

    def _rate(self, readers: int) -> float:
        if readers <= self._rates[0][0]:
            return self._rates[0][1]
        for (few, low), (many, high) in pairwise(self._rates):
            if readers <= many:
                return low + (high - low) * (readers - few) / (many - few)
        return self._rates[-1][1]
