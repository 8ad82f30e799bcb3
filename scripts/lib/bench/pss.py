"""The memory that an agent's processes take, as PSS: what several share counts once."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import psutil

_EVERY_S = 0.1


@contextlib.contextmanager
def most_memory(supervisor_pid: int) -> Iterator[dict[str, int]]:
    """The most bytes that the agent's processes take meanwhile: "all", and of each kind (_sizes).

    supervisor_pid: of a child of this process, the one that starts the agent.
    """
    most: dict[str, int] = {}
    over = threading.Event()

    def look() -> None:
        while not over.wait(_EVERY_S):
            sizes = _sizes(supervisor_pid)
            sizes["all"] = sum(sizes.values())
            most.update({name: max(most.get(name, 0), size) for name, size in sizes.items()})

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        over.set()
        thread.join()


def _sizes(supervisor_pid: int) -> dict[str, int]:
    """The memory that they take now, in bytes; "userproc": all processes that the agent has started."""
    supervisor = psutil.Process(supervisor_pid)
    sizes = {"supervisor": 0, "agent": 0, "userproc": 0}
    for process in [supervisor, *supervisor.children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            below = {supervisor.pid: "agent", os.getpid(): "supervisor"}
            sizes[below.get(process.ppid(), "userproc")] += process.memory_full_info().pss
    return sizes
