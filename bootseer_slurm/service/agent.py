"""The node agent: one process as root on each node, which answers the operations of agentapi.

On disk, beside the socket: the journal of each job (job/journal.py), and the node tables of the FUSE mounts;
beside these mounts: env/ and images/, root's alone, where environments and images are mounted; environments
in a namespace that the host does not see. The mounts and the sockets themselves are the supervisor's
(supervisor.py), which starts this process again when it dies.
"""

from __future__ import annotations

import logging
import os
import signal
import threading

from bootseer_slurm.agentapi.operations import OPERATIONS
from bootseer_slurm.artifacts.open_blobs import OpenBlobs
from bootseer_slurm.cache.cache import Cache
from bootseer_slurm.cgroups import JobGroup, group_folders, service_folder
from bootseer_slurm.config import Config
from bootseer_slurm.env.unpacking import remove, unpacked_folder
from bootseer_slurm.errors import BootseerError
from bootseer_slurm.fuse import Server as FuseServer
from bootseer_slurm.image.packer import Packer
from bootseer_slurm.image.signing import read_key
from bootseer_slurm.job.journal import Journal
from bootseer_slurm.job.session import Session
from bootseer_slurm.service.answers import Answers, slow_operations
from bootseer_slurm.service.departures import watch
from bootseer_slurm.service.killed_tasks import end_waits_of_killed
from bootseer_slurm.service.layouts import write_layouts
from bootseer_slurm.service.lost_epilogs import LostEpilogs
from bootseer_slurm.service.sessions import Sessions
from bootseer_slurm.service.sockets.server import Server
from bootseer_slurm.service.supervisor import Resources
from bootseer_slurm.slurm.allocation import Job
from bootseer_slurm.userproc.spare import Spares

_log = logging.getLogger(__name__)

_METRICS_END_S = 1.0
_TEND_EVERY_S = 60.0  # others fill the cache's disk too
_SAVE_ROUNDS = 10  # what a crash of the node can cost of the cache, in rounds; syncing is slow


class Agent:
    """Serves this node until it is told to stop."""

    def __init__(self, config: Config, resources: Resources) -> None:
        """Open the cache. Raises BootseerError."""
        assert resources.private is not None
        self._config = config
        self._listeners = resources.listeners
        self._node = os.uname().nodename.split(".")[0]
        home = config.agent.socket.parent
        self._cache = Cache(
            config.cache.path,
            max_bytes=config.cache.max_bytes,
            min_free_bytes=config.cache.min_free_bytes,
            live=home / "cache",
        )
        self._fuse = {
            name: FuseServer(mount, home / f"{name}.nodes") for name, mount in resources.mounts.items()
        }
        self._blobs = OpenBlobs(self._cache, self._fuse, config.agent.mounts / "images", resources.private)
        self._packer = Packer(
            config.cache.path / ".packing",
            max_bytes=config.cache.max_bytes,
            min_free_bytes=config.cache.min_free_bytes,
        )
        self._journal = Journal(home)
        self._spares = Spares(
            with_peers=config.peers.mode == "auto" and bool(read_key(config.image.site_key))
        )
        observe_all = config.report.observe == "all"
        self._lost = LostEpilogs(home)
        self._sessions = Sessions(self._make_session, self._journal, self._lost, observe_all=observe_all)
        # Have the hook tell every job, or only those that asked.
        write_layouts(home)
        said = home / "observe-all"
        said.touch() if observe_all else said.unlink(missing_ok=True)
        self._stop = threading.Event()

    def _make_session(self, job: Job, node: str) -> Session:
        return Session(job, node or self._node, self._config, self._blobs, self._journal, self._spares)

    def run(self) -> None:
        """Serve until SIGTERM or SIGINT; then end the sessions. Raises BootseerError."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: self._stop.set())
        for reason in self._cache.check():
            _log.warning("cache: %s", reason)
        for server in self._fuse.values():
            server.start()
        self._sessions.restore()
        threading.Thread(target=self._close_unused, daemon=True).start()
        answers = Answers(self._config, self._node, self._sessions, self._blobs, self._packer)
        by_name = {op: getattr(answers, op) for op in OPERATIONS}
        Server(by_name, slow_operations(self._config), self._stop).start(self._listeners)
        watched = self._sessions, self._lost, self._packer, self._stop
        threading.Thread(target=watch, args=watched, daemon=True).start()
        threading.Thread(target=self._tend, daemon=True).start()
        threading.Thread(target=end_waits_of_killed, args=(self._blobs, self._stop), daemon=True).start()
        metrics = self._start_metrics()
        _log.info("agent serves %s", self._config.agent.socket, extra={"node": self._node})
        self._spares.prepare()
        self._stop.wait()
        self._spares.close()
        self._packer.close()
        self._sessions.end_all("agent stopped")
        self._blobs.close_idle(all_of_them=True)
        if metrics is not None:
            metrics.join(_METRICS_END_S)

    def _start_metrics(self) -> threading.Thread | None:
        """Have the figures written, where the site wants them."""
        path = self._config.agent.metrics
        if path is None:
            return None
        from bootseer_slurm.service.metrics import Metrics  # other agents need not load it

        metrics = Metrics(self._sessions, self._blobs, self._cache)
        thread = threading.Thread(target=metrics.keep_written, args=(path, self._stop), daemon=True)
        thread.start()
        return thread

    def _close_unused(self) -> None:
        """Let go of what an agent before this one had and no session uses (a thread of its own)."""
        self._sessions.wait_restored()
        self._blobs.close_unused()
        self._cache.forget_left()
        groups = group_folders(service_folder())
        unpacked = unpacked_folder(self._config.cache.path)
        trees = list(unpacked.iterdir()) if unpacked.exists() else []
        # Only now: what a job that begins meanwhile has made was not there to be listed, or it is told here.
        used = {session.context.job.folder_name for session in self._sessions.all(with_ending=True)}
        for folder in groups:
            if folder.name not in used:
                JobGroup(folder).end()
        for folder in trees:
            if folder.name not in used:
                remove(folder)

    def _tend(self) -> None:
        """Keep the cache within its bounds, and its state on disk (a thread of its own)."""
        rounds = 0
        while not self._stop.wait(_TEND_EVERY_S):
            rounds += 1
            try:
                self._blobs.close_idle()  # first: what was removed of the cache takes its room until then
                self._cache.make_room()
                if rounds % _SAVE_ROUNDS == 0:
                    self._cache.save()
            except (BootseerError, OSError) as error:  # the next round may do better
                _log.warning("cache: %s", error)
