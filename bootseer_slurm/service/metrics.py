"""The agent's figures for Prometheus: a text file for node_exporter's textfile collector.

Owns the names (docs/overhead.md) and the file, which is replaced whole every `_EVERY_S` seconds. The figures
are the open blobs', the cache's and the sessions'; nothing is counted here, and no user or job is named.
Counters begin at 0 with each agent. One thread.

The folder may belong to node_exporter's user, so the file is made new, never opened where one is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from bootseer_slurm.artifacts.open_blobs import OpenBlobs
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.service.sessions import Sessions

_log = logging.getLogger(__name__)

_EVERY_S = 15.0


class Metrics:
    """The figures of one agent, as a collector of prometheus_client."""

    def __init__(self, sessions: Sessions, blobs: OpenBlobs, cache: Cache) -> None:
        self._sessions = sessions
        self._blobs = blobs
        self._cache = cache
        self._start_s = time.time()
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def keep_written(self, path: Path, stop: threading.Event) -> None:
        """Write the file again and again until `stop` is set, and remove it then (a thread of its own)."""
        failed = ""
        while True:
            try:
                self.write(path)
                failed = ""
            except Exception as error:  # figures that stand still would say that all is well
                text = f"{type(error).__name__}: {error}"
                if text != failed:
                    is_ours = not isinstance(error, OSError | BootseerError)
                    _log.warning("metrics %s: cannot be written: %s", path, text, exc_info=is_ours)
                failed = text
            if stop.wait(_EVERY_S):
                break
        with contextlib.suppress(OSError):
            path.unlink()

    def write(self, path: Path) -> None:
        """Write the file once; anybody may read it. Raises OSError."""
        content = generate_latest(self._registry)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(content)
                os.fchmod(file.fileno(), 0o644)
            temporary.rename(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def collect(self) -> Iterator[Metric]:
        """All families, as they are now."""
        yield _gauge("agent_start_time_seconds", "When the agent started, since 1970.", self._start_s)
        yield from self._of_sessions()
        yield from self._of_reads()
        yield from self._of_cache()

    def _of_sessions(self) -> Iterator[Metric]:
        sessions = self._sessions.all()
        yield _gauge("sessions", "Jobs on this node that asked for Bootseer.", len(sessions))
        yield _counter("sessions_begun", "Jobs that did so.", self._sessions.begun)
        queue = GaugeMetricFamily(
            "bootseer_prefetch_queue",
            "What prefetches have yet to begin: runs of hot blocks, and files to be read whole.",
            labels=("queue",),
        )
        queued = [session.scheduler.queued() for session in sessions]
        queue.add_metric(("hot",), sum(hot for hot, _ in queued))
        queue.add_metric(("whole",), sum(whole for _, whole in queued))
        yield queue
        faults = CounterMetricFamily(
            "bootseer_faults", "What went wrong, and was told to jobs' reports.", labels=("name",)
        )
        for name, count in sorted(self._sessions.faults().items()):
            faults.add_metric((name,), count)
        yield faults

    def _of_reads(self) -> Iterator[Metric]:
        usage = self._blobs.usage()
        fetched = CounterMetricFamily(
            "bootseer_fetched_bytes",
            "Bytes that came from the store, the original files, and other nodes of a job.",
            labels=("source",),
        )
        fetched.add_metric(("store",), usage.store_bytes)
        fetched.add_metric(("origin",), usage.origin_bytes)
        fetched.add_metric(("peers",), usage.peer_bytes)
        yield fetched
        yield _counter("demand_bytes", "Of these, bytes that a read waited for.", usage.demand_bytes)
        yield _counter("pushed_bytes", "Bytes given to the kernel ahead of its reads.", usage.pushed_bytes)
        yield _counter("reads", "Reads that the kernel asked for.", usage.reads)
        yield _counter("reads_blocked", "Of these, reads that had to wait for blocks.", usage.reads_blocked)
        yield _counter("read_bytes", "Bytes of all reads.", usage.read_bytes)
        yield _counter("read_miss_bytes", "Bytes of reads that had to wait.", usage.miss_bytes)
        yield _counter("read_wait_seconds", "How long reads waited, added up.", usage.blocked_s)

    def _of_cache(self) -> Iterator[Metric]:
        state = self._cache.state()
        yield _gauge("cache_blobs", "Blobs in the cache.", state.blobs)
        yield _gauge("cache_used_bytes", "What the cache takes of its disk.", state.used_bytes)
        yield _gauge("cache_max_bytes", "What it may take: [cache] max.", state.max_bytes)
        yield _gauge("cache_disk_free_bytes", "What the cache's disk has left.", state.free_bytes)
        yield _gauge(
            "cache_min_free_bytes", "What it has to have left: [cache] min_free.", state.min_free_bytes
        )
        yield _counter("cache_evicted_blobs", "Blobs removed for others.", state.evicted_blobs)
        yield _counter("cache_evicted_bytes", "The disk that they took.", state.evicted_bytes)


def _gauge(name: str, meaning: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"bootseer_{name}", meaning, value)


def _counter(name: str, meaning: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"bootseer_{name}", meaning, value)
