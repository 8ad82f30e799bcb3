"""Leases: one maker of a thing in the whole cluster, and another one when it dies.

A lease is an object of the store, users/<uid>/leases/<sha256 of the name>:

    {"count": 17, "host": "n3", "pid": 4711, "token": "<random>"}

It is made exclusively. Its holder writes a new count every few seconds, from a thread; whoever waits looks
at it and takes it over when it has not changed for STALE_S of the waiter's own monotonic clock: clocks of
nodes are never compared. A holder that was taken for dead, say after its node hung, sees another's token
and leaves the lease alone.

A holder that failed leaves it with "failed": why. Who waited for that does not try the same again, one after
the other; who comes later does.

Two may hold a lease for a moment, when both take over at once on a slow file system, or when a lost holder
finishes what it had begun. So a lease saves work and is no lock: what its holders publish must be harmless
when published twice, as the same bytes under the same name are.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import secrets
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import BootseerError, NotFound, StoreError
from bootseer_slurm.store import Store

REFRESH_S = 2.0
# NFS may show an object's content up to some seconds late; a dead holder costs its followers this much.
STALE_S = 20.0
# How often it is looked, less and less: with a thousand nodes waiting, each look is a thousand small reads.
_POLL_S, _POLL_MAX_S = 0.3, 2.0
# After taking over, wait until anybody else who does so now has written too: the last one has it.
_RIVALS_S = 1.0
_LIMIT_BYTES = 4096
_REASON = 500  # characters of it are kept


_Made = TypeVar("_Made")


class Lease:
    """The right to make one thing. Use: `acquire`, then a `with` block, which gives it back."""

    def __init__(
        self, store: Store, uid: int, name: str, *, refresh_s: float = REFRESH_S, stale_s: float = STALE_S
    ) -> None:
        self._store = store
        self._name = name
        self._path = f"{user_folder(uid)}/leases/{hashlib.sha256(os.fsencode(name)).hexdigest()}"
        self._refresh_s, self._stale_s = refresh_s, stale_s
        self._token = secrets.token_hex(16)
        self._count = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="bootseer-lease", daemon=True)

    def acquire(
        self,
        *,
        done: Callable[[], bool] = lambda: False,
        patience_s: float = 7200.0,
        on_wait: Callable[[str], None] = lambda holder: None,
    ) -> bool:
        """Wait for the lease: True with it, False as soon as `done` says that nothing is left to do.

        `done` is asked first, and whenever a holder has given it back. on_wait: told once who is waited for.
        Raises BootseerError after `patience_s` or when who was waited for failed, StoreError when the store
        fails.
        """
        deadline_s = time.monotonic() + patience_s
        pause_s = _POLL_S
        seen, since_s, told = b"", time.monotonic(), ""
        while True:
            if done():
                return False
            if self._store.create(self._path, self._content()):
                self._thread.start()
                return True
            while (content := self._read()) is not None:
                if failure := _field(content, "failed"):
                    if told == _field(content, "token"):
                        raise BootseerError(f"{self._name}: {_holder(content)} could not make it: {failure}")
                    if self._take_over():
                        return True
                    continue
                if content != seen:
                    seen, since_s = content, time.monotonic()
                elif time.monotonic() - since_s > self._stale_s:
                    if self._take_over():
                        return True
                    seen = b""
                if time.monotonic() > deadline_s:
                    raise BootseerError(f"{self._name}: still being made by {_holder(content)}")
                if not told:
                    on_wait(_holder(content))
                told = _field(content, "token") or told
                time.sleep(pause_s * random.uniform(0.5, 1.5))
                pause_s = min(pause_s * 1.5, _POLL_MAX_S)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        try:
            if self._is_mine() and isinstance(value, Exception):
                self._store.write(self._path, self._content(failed=str(value)[:_REASON] or repr(value)))
            elif self._is_mine():
                self._store.remove(self._path)
        except StoreError:
            pass  # it becomes stale

    def _take_over(self) -> bool:
        self._store.write(self._path, self._content())
        time.sleep(_RIVALS_S)
        if not self._is_mine():
            return False
        self._thread.start()
        return True

    def _refresh(self) -> None:
        while not self._over.wait(self._refresh_s):
            try:
                if not self._is_mine():
                    return
                self._count += 1
                self._store.write(self._path, self._content())
            except StoreError:
                continue  # a store that is away for a while keeps everybody waiting

    def _is_mine(self) -> bool:
        content = self._read()
        return content is not None and _field(content, "token") == self._token

    def _read(self) -> bytes | None:
        try:
            return self._store.read(self._path, limit_bytes=_LIMIT_BYTES)
        except NotFound:
            return None

    def _content(self, **more: str) -> bytes:
        content = {
            **more,
            "count": self._count,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "token": self._token,
        }
        return json.dumps(content, sort_keys=True).encode()


def make_once(
    store: Store,
    uid: int,
    name: str,
    *,
    look: Callable[[], _Made | None],
    make: Callable[[], _Made],
    on_wait: Callable[[str], None],
) -> tuple[_Made, bool]:
    """The thing called `name`, and whether this process made it: one in the cluster does, the others wait.

    look: finds it in the store, or None. on_wait: see Lease.acquire. Raises what that and `make` raise.
    """
    lease = Lease(store, uid, name)
    if lease.acquire(done=lambda: look() is not None, on_wait=on_wait):
        with lease:
            # It may have come between the last look and the lease. One who loses the lease now goes on: to
            # put the same thing into the store twice is harmless.
            found = look()
            return (found, False) if found is not None else (make(), True)
    found = look()
    if found is None:
        raise StoreError(f"{name}: was in the store a moment ago and is not there now")
    return found, False


def _field(content: bytes, key: str) -> str:
    """A value of a lease's content; "" when it was written half."""
    try:
        return str(json.loads(content)[key])
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""


def _holder(content: bytes) -> str:
    return f"process {_field(content, 'pid') or '?'} on {_field(content, 'host') or '?'}"
