"""The peers of one job on this node: the other nodes of the job, which read about one copy from the store.

The peer process runs from the job's begin to its end. A blob joins when it is opened. Only blobs of the store
do: of a file that is used as it lies no node knows the digests before.
"""

from __future__ import annotations

import threading
import time

from bootseer_slurm.artifacts.handle import BlobHandle
from bootseer_slurm.cache.cache import CachedBlob
from bootseer_slurm.errors import InputError
from bootseer_slurm.identity import User
from bootseer_slurm.image.signing import Key
from bootseer_slurm.job.context import JobContext
from bootseer_slurm.peers.groups import GROUP_NODES
from bootseer_slurm.peers.key import job_key
from bootseer_slurm.peers.local import Order
from bootseer_slurm.peers.owner.addresses import addresses_of
from bootseer_slurm.peers.owner.process import PeerProcess
from bootseer_slurm.peers.owner.source import PeerSource, unit_bytes_of
from bootseer_slurm.peers.policy import STREAMS
from bootseer_slurm.slurm.topology import near_nodes, read_topology
from bootseer_slurm.userproc.spare import Spare

# Slots of the ring, beside those of the prefetch; one that is not used takes no memory. One user's reads that
# wait are fetched 16 at a time (fuse/fetchers.py).
_DEMANDS = 24
_BEGIN_S = 1.0  # a name server may be slow; then this start has no peers of its first blobs


def _blocks(nodes: list[str]) -> tuple[tuple[int, ...], ...]:
    """The nodes under each switch, where they are more than one group has."""
    return near_nodes(nodes, read_topology() if len(nodes) > GROUP_NODES else "")


class Peering:
    """The job among its nodes. Thread-safe."""

    def __init__(self, context: JobContext, spare: Spare, key: Key) -> None:
        """spare: of peer processes. key: the site's; without it there are no peers, as doctor tells."""
        self._context = context
        self._spare = spare
        self._key = key
        self._process: PeerProcess | None = None
        self._nodes: list[str] = []
        self._shared: dict[tuple[str, int], PeerSource] = {}
        self._begun: threading.Event | None = None
        self._wait_until_s = 0.0
        self._lock = threading.Lock()

    def begin(self) -> None:
        """Start the process, where this job has peers; returns at once."""
        with self._lock:
            if self._begun is not None:
                return
            begun = self._begun = threading.Event()
            self._wait_until_s = time.monotonic() + _BEGIN_S
        # Not one of the job's threads, whose end is waited for: a name server may take long.
        threading.Thread(target=self._begin, args=(begun,), name="peers-begin", daemon=True).start()

    def _begin(self, begun: threading.Event) -> None:
        try:
            self._start()
        except Exception as error:  # the job does without
            self._context.fault("peers_not_used", str(error) or type(error).__name__)
        finally:
            begun.set()

    def _nodes_of_job(self) -> list[str]:
        """All nodes of the job; none where the list cannot be used, which is told already."""
        try:
            return self._context.job.nodes(self._context.node)
        except InputError:
            return []

    def _start(self) -> None:
        job, config = self._context.job, self._context.config
        self._nodes = self._nodes_of_job()
        if config.peers.mode == "off" or not self._key or len(self._nodes) < 2:
            return
        own = self._nodes.index(self._context.node)
        addresses = addresses_of(self._nodes, config.peers.address, own)
        user = User.of(job.uid, job.gid)
        ports = config.peers.ports
        first = job.job_id % len(ports)
        order = Order(
            uid=job.uid,
            gid=job.gid,
            user_groups=user.groups,
            key=job_key(self._key.secret, job=job.job_id, restart=job.restart, uid=job.uid),
            node=own,
            addresses=addresses,
            ports=(*ports[first:], *ports[:first]),
            blocks=_blocks(self._nodes),
            upload_bytes_per_s=float(config.peers.upload_bytes),
            slots=STREAMS + _DEMANDS,
        )
        with self._lock:
            if self._context.phase.has_ended:
                return
            started = self._spare.take()
            self._context.group.add(started.process.pid)  # while it is root's
            try:
                self._process = PeerProcess(started.process, started.socket, order)
            except BaseException:
                started.end()
                raise

    def join(self, handle: BlobHandle, kind: str) -> None:
        """Have the other nodes get the blob from this one, and this one from them."""
        blob = handle.reader.blob
        if blob.unmanaged:
            return
        self.begin()
        assert self._begun
        self._begun.wait(max(0.0, self._wait_until_s - time.monotonic()))
        try:
            if source := self._source(blob, unit_bytes_of(kind)):
                handle.exchange(source)
        except Exception as error:  # the blob is the job's all the same
            self._context.fault("peers_not_used", str(error) or type(error).__name__)

    def _source(self, blob: CachedBlob, unit_bytes: int) -> PeerSource | None:
        """The blob among the job's nodes, which all its handles share; None without a process."""
        with self._lock:
            if self._process is None:
                return None
            key = blob.id, unit_bytes
            source = self._shared.get(key)
            if source is None or not source.share(blob):
                self._shared = {key: each for key, each in self._shared.items() if not each.is_closed}
                source = PeerSource(self._process, self._context.job.job_id, blob, unit_bytes)
                self._shared[key] = source
            return source

    def tell(self) -> None:
        """Write what the process did."""
        if (process := self._process) is None:
            return
        counted = process.counted
        self._context.log.emit(
            "peers",
            "summary",
            received_bytes=sum(counted.received.values()),
            sent_bytes=sum(counted.sent.values()),
            fallbacks=sum(counted.fallbacks.values()),
            slow=self._names(counted.slow),
            banned=self._names(counted.banned),
        )

    def end(self) -> None:
        """End the process."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.close()
            self._spare.prepare()

    def _names(self, nodes: tuple[int, ...]) -> str | None:
        """The nodes' names; the process is its user's, and may say any numbers."""
        return ",".join(self._nodes[node] for node in nodes if node < len(self._nodes)) or None
