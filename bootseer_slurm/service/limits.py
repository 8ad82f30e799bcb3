"""Limits to the connections that the agent serves at once.

Root's connections have room of their own; other users' are few for each user and bounded in all: no user can
keep the hook, the plugin or another user from being answered. Thread-safe.
"""

from __future__ import annotations

import threading
from collections import Counter

_ROOT_CONNECTIONS = 64
_USER_CONNECTIONS = 8  # of each user
_USERS_CONNECTIONS = 48  # of all users but root


class ConnectionLimits:
    """Counts connections, root's apart from other users'."""

    def __init__(self) -> None:
        self._root = threading.Semaphore(_ROOT_CONNECTIONS)
        self._users: Counter[int] = Counter()
        self._lock = threading.Lock()

    def take(self, uid: int) -> bool:
        """Count one connection: root waits until it may be, another user gets False when it may not."""
        if uid == 0:
            return self._root.acquire()
        with self._lock:
            if self._users[uid] >= _USER_CONNECTIONS or self._users.total() >= _USERS_CONNECTIONS:
                return False
            self._users[uid] += 1
            return True

    def give_back(self, uid: int) -> None:
        if uid == 0:
            self._root.release()
            return
        with self._lock:
            self._users[uid] -= 1
            if not self._users[uid]:
                del self._users[uid]
