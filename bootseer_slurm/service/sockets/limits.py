"""Limits to the connections that the agent serves at once, by the socket of all users.

Few for each user and bounded in all: no user can keep another from being answered. Root has a share too; the
hook and the plugin have a socket of their own. Who connects very often is served more slowly. Thread-safe.
"""

from __future__ import annotations

import threading
import time
from collections import Counter

_ROOT_CONNECTIONS = 16
_USER_CONNECTIONS = 8  # of each other user
_CONNECTIONS = 64  # of all
_CONNECTIONS_PER_S = 256  # of a user: tasks of a node that mark at the same time, a few times


class ConnectionLimits:
    """Counts connections by user."""

    def __init__(self) -> None:
        self._users: Counter[int] = Counter()
        self._second = 0
        self._this_second: Counter[int] = Counter()
        self._lock = threading.Lock()

    def take(self, uid: int) -> bool:
        """Count one connection; False when its user has too many, or all together."""
        own = _ROOT_CONNECTIONS if uid == 0 else _USER_CONNECTIONS
        others = _CONNECTIONS if uid == 0 else _CONNECTIONS - _ROOT_CONNECTIONS
        with self._lock:
            if self._users[uid] >= own or self._users.total() >= others:
                return False
            self._users[uid] += 1
            return True

    def connects_too_often(self, uid: int) -> bool:
        """Count a connection, served or not: whether its user has made very many in this second."""
        with self._lock:
            if (second := int(time.monotonic())) != self._second:
                self._second = second
                self._this_second.clear()
            self._this_second[uid] += 1
            return self._this_second[uid] > _CONNECTIONS_PER_S

    def give_back(self, uid: int) -> None:
        with self._lock:
            self._users[uid] -= 1
            if not self._users[uid]:
                del self._users[uid]
