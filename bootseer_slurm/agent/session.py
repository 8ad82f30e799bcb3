"""One job on this node, from its prolog to its epilog.

Owns the job's fetch process, its targets, its prefetch and its events. Everything slow happens in
threads of the session's own: `begin` and `mark` return at once, `attach` waits `attach_wait_s` at most.
"""

from __future__ import annotations

import logging
import os
import pwd
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from bootseer_slurm.agent.prefetch import Prefetch
from bootseer_slurm.agent.request import Job, Request, Wish
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.target import Bind, Target
from bootseer_slurm.config import Config
from bootseer_slurm.errors import BootseerError, StoreError
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.process import FetchProcess, User

_log = logging.getLogger(__name__)

_PUBLISH_DELAY_S = 2.0  # the other tasks' marks come within it
_JOIN_S = 5.0  # for threads whose fetch process was killed
_PUBLISH_PATIENCE_S = 15.0  # a shared file system may show others' new folders seconds later


class Session:
    """A job that asked for Bootseer. Thread-safe."""

    def __init__(self, job: Job, node: str, config: Config, shelf: Shelf) -> None:
        self.job = job
        self.log = EventLog(job.job_id, job.restart, node)
        self._config = config
        self._shelf = shelf
        self._folder = config.agent.blobs.parent / "env" / f"{job.job_id}.{job.restart}"
        self._wishes: dict[Wish, threading.Event] = {}
        self._targets: list[Target] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._publish_lock = threading.Lock()
        self._over = threading.Event()
        self._process: FetchProcess | None = None
        self._user: User | None = None
        self._prefetch: Prefetch | None = None
        self._observe = False
        self._publishing = False
        self._attached: set[str] = set()

    def begin(self, request: Request, *, hook_start_ns: int | None) -> None:
        """Start to bring what the job wishes."""
        now_ns = time.time_ns()
        self._observe = request.observe
        if hook_start_ns:
            self.log.emit("hook", "begin", t_ns=hook_start_ns)
            self.log.emit("hook", "received", t_ns=now_ns)
        self.log.emit(
            "session",
            "begin",
            t_ns=now_ns,
            uid=self.job.uid,
            nodelist=self.job.nodelist or None,
            mode="observe" if request.observe else "prefetch",
            partition=self.job.partition or None,
            job_name=self.job.name or None,
        )
        self.add(request)

    def add(self, request: Request) -> None:
        """Bring these too; what was asked for already is not asked for twice."""
        if request.observe or self._observe:
            return
        for wish in request.wishes:
            with self._lock:
                if self._over.is_set() or wish in self._wishes:
                    continue
                self._wishes[wish] = threading.Event()
                thread = threading.Thread(
                    target=self._bring,
                    args=(wish, len(self._wishes)),
                    name=f"bring-{self.job.job_id}",
                    daemon=True,
                )
                self._threads.append(thread)
            thread.start()

    def attach(self, step: str) -> tuple[list[Bind], dict[str, str]]:
        """What a step shall see: mounts over its originals (the caller closes them), and its environment."""
        self.log.emit("step", "attach", step=step)
        deadline = time.monotonic() + self._config.prefetch.attach_wait_s
        for looked_up in list(self._wishes.values()):
            looked_up.wait(max(0.0, deadline - time.monotonic()))
        with self._lock:
            targets = list(self._targets)
        environ = {
            f"BOOTSEER_{target.wish.kind.upper()}": str(target.served_path())
            for target in targets
            if target.path is None
        }
        with_path = [target for target in targets if target.path is not None]
        with ThreadPoolExecutor(len(with_path) or 1) as pool:  # one that does not answer holds up no other
            binds = [bind for bind in pool.map(self._bind, with_path) if bind]
        for wish, looked_up in self._wishes.items():
            if not looked_up.is_set():
                self._shadow("skipped", wish, "the store had not answered when the step started")
        # An inner target is shown first: below an outer one it could no longer be told from the original.
        return sorted(binds, key=lambda bind: -len(bind.path)), environ

    def _bind(self, target: Target) -> Bind | None:
        try:
            bind = target.bind()
        except (BootseerError, OSError) as error:
            self._shadow("skipped", target.wish, str(error))
            return None
        self._shadow("shown", target.wish, None)
        return bind

    def mark(self, name: str, *, t_ns: int, step: str | None, task: int | None) -> None:
        """Record where the job is. Raises InputError when a value is not usable."""
        self.log.emit("mark", name, t_ns=t_ns, step=step, task=task)
        if name == "training_started":
            with self._lock:
                if self._publishing or self._over.is_set():
                    return
                self._publishing = True
            threading.Thread(target=self._publish_later, daemon=True).start()

    def stage(self, name: str, *, t_ns: int, step: str, task: int | None, detail: str | None) -> None:
        """Record what the plugin says of a step."""
        if name == "shadow_failed":
            self.log.emit("shadow", "failed", t_ns=t_ns, step=step, level="warning", message=detail)
        else:
            self.log.emit("step", name, t_ns=t_ns, step=step, task=task, message=detail)

    def end(self, reason: str) -> None:
        """The job is over on this node: write its events, let go of everything."""
        with self._lock:
            if self._over.is_set():
                return
            self._over.set()
            targets, self._targets = self._targets, []
        if self._prefetch:
            self._prefetch.stop()
        for target in targets:
            self._summarise(target)
        self.log.emit("hook", "epilog", message=reason)
        self.log.emit("session", "end")
        self._publish()
        if self._process:
            self._process.kill()
        if self._prefetch:
            self._prefetch.join(_JOIN_S)
        for thread in self._threads:
            thread.join(_JOIN_S)
        for target in targets:
            target.close()
        try:
            self._folder.rmdir()
        except OSError:
            pass
        self.log.close()

    def _fetcher(self) -> FetchProcess:
        """The job's fetch process, started when first needed."""
        user = self._user or _user(self.job)  # not under the lock: a directory service may be slow
        with self._lock:
            self._user = user
            if self._process is None:
                self._process = FetchProcess(
                    user,
                    self._config.store.uri,
                    streams=self._config.prefetch.streams,
                    timeout_s=self._config.store.timeout_s,
                )
            return self._process

    def _prefetcher(self) -> Prefetch:
        """The job's prefetch, made when first needed."""
        turns = self._fetcher().turns
        with self._lock:
            if self._prefetch is None:
                self._prefetch = Prefetch(
                    turns, self._config.prefetch.streams, log=self.log, on_fault=self._fault
                )
                if self._over.is_set():
                    self._prefetch.stop()
            return self._prefetch

    def _bring(self, wish: Wish, number: int) -> None:
        """Look one wish up, then have it prefetched (a thread of its own)."""
        try:
            target = self._look_up(wish, number)
        except (BootseerError, OSError) as error:
            self._fault(f"{wish.kind}_not_used", str(error))
        except Exception as error:  # the fetch process is the user's: its reply may lack anything
            _log.exception("%s %s", wish.kind, wish.name, extra={"job": self.job.job_id})
            self._fault(f"{wish.kind}_not_used", f"{wish.kind} {wish.name}: {type(error).__name__}")
        else:
            with self._lock:
                over = self._over.is_set()
                if not over:
                    self._targets.append(target)
            if over:
                target.close()
            else:
                self._prefetcher().add(target)
        finally:
            self._wishes[wish].set()

    def _look_up(self, wish: Wish, number: int) -> Target:
        target = Target(
            wish,
            self.job,
            self._fetcher(),
            self._shelf,
            roots=self._config.shadow.roots,
            on_fault=lambda name, message: self._fault(name, f"{wish.name}: {message}"),
        )
        try:
            if target.warning:
                self._fault("store_not_used", target.warning)
            if wish.kind == "environment":
                target.mount_snapshot(self._folder / str(number), self.job)
        except BaseException:
            target.close()
            raise
        return target

    def _summarise(self, target: Target) -> None:
        usage, before = target.reader.usage, target.before
        read_bytes = usage.read_bytes - before.read_bytes
        miss_bytes = usage.miss_bytes - before.miss_bytes
        self.log.emit(
            "access",
            "summary",
            target=target.wish.name,
            what=target.wish.kind,
            reads=usage.reads - before.reads,
            read_bytes=read_bytes,
            miss_bytes=miss_bytes,
            hit_bytes=max(0, read_bytes - miss_bytes),
            blocked_s=usage.blocked_s - before.blocked_s,
            first_ns=usage.first_ns,
            last_ns=usage.last_ns,
        )

    def _shadow(self, name: str, wish: Wish, message: str | None) -> None:
        level = "info" if name == "shown" else "warning"
        self.log.emit("shadow", name, target=wish.name, what=wish.kind, message=message, level=level)

    def _fault(self, name: str, message: str) -> None:
        _log.warning("%s: %s", name, message, extra={"job": self.job.job_id})
        self.log.emit("fault", name, level="warning", message=message)

    def _publish_later(self) -> None:
        if self._over.wait(_PUBLISH_DELAY_S):
            return  # the end writes them itself
        self._publish()
        with self._lock:
            self._publishing = False

    def _publish(self) -> None:
        """Write the events so far to the store, with the user's rights; the newest is written last."""
        with self._publish_lock:
            self._write_events()

    def _write_events(self) -> None:
        content = self.log.to_jsonl().encode()
        fd = os.memfd_create("bootseer-events", os.MFD_CLOEXEC)
        try:
            os.write(fd, content)
            path = Path("events") / f"{self.job.job_id}.{self.job.restart}" / f"{self.log.node}.jsonl"
            # All nodes of a job write at once; the rights of the folder that the first makes may come later.
            for attempt in Retrying(
                retry=retry_if_exception_type(StoreError),
                stop=stop_after_delay(_PUBLISH_PATIENCE_S),
                wait=wait_exponential(multiplier=0.2, max=2),
                reraise=True,
            ):
                with attempt:
                    self._fetcher().call("write", path=str(path), fds=(fd,))
        except BootseerError as error:
            _log.warning("events not written: %s", error, extra={"job": self.job.job_id})
        finally:
            os.close(fd)


def _user(job: Job) -> User:
    try:
        groups = os.getgrouplist(pwd.getpwuid(job.uid).pw_name, job.gid)
    except KeyError:
        groups = [job.gid]
    return User(job.uid, job.gid, tuple(groups))
