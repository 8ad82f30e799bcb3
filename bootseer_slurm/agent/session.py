"""One job on this node, from its prolog to its epilog.

Owns the job's fetch process, its targets, its prefetch, its traces and its events. Everything slow happens in
threads of the session's own: `begin` and `mark` return at once, `attach` waits `attach_wait_s` at most.

What is brought, for each kind of thing: what the options and pyxis ask for; else what this job class asked
for at its last start (blob/jobclass.py), which is shown as if it had been asked for now. An image of a
registry has no path to be shown at: of one that was learned no more is brought once tasks start without it.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable
from typing import Any

from bootseer_slurm.agent.background import Background
from bootseer_slurm.agent.fetcher import Fetcher
from bootseer_slurm.agent.held import Held
from bootseer_slurm.agent.hot import both_ends, first_ranges
from bootseer_slurm.agent.journal import Added, Found, Journal
from bootseer_slurm.agent.located import FILES, parse_located
from bootseer_slurm.agent.measure import Measure
from bootseer_slurm.agent.memory import Memory
from bootseer_slurm.agent.named import Named
from bootseer_slurm.agent.part import Part, Place
from bootseer_slurm.agent.prefetch import Prefetch
from bootseer_slurm.agent.publish import Publisher
from bootseer_slurm.agent.recording import Recording
from bootseer_slurm.agent.repacking import Repacking
from bootseer_slurm.agent.request import Job, Request, Wish, image_wish, learned_wishes
from bootseer_slurm.agent.saving import Saving
from bootseer_slurm.agent.shelf import Shelf
from bootseer_slurm.agent.shown import Shown
from bootseer_slurm.agent.target import Bind, Target, Use
from bootseer_slurm.agent.wanted import Sought, Wanted
from bootseer_slurm.blob.jobclass import Remembered, encode_wishes, job_class
from bootseer_slurm.config import Config
from bootseer_slurm.env.mounting import unmount_left, unpacked_folder
from bootseer_slurm.errors import BootseerError, InputError, NotFound
from bootseer_slurm.events import EventLog
from bootseer_slurm.fetch.spare import Spare
from bootseer_slurm.image.signing import Key, read_key

_log = logging.getLogger(__name__)

_PUBLISH_DELAY_S = 2.0  # the other tasks' marks come within it
_JOIN_S = 5.0  # for threads whose fetch process was killed
_LOOK_UP_LIMIT_S = 25.0  # for an importer, which waits for one name
_WHOLE_TRACE_EVERY = 8
_FIRST_STEPS = ("batch", "interactive")
_UNREAD = "not brought: the last start of this class was shown it and did not read it"


class Session:
    """A job that asked for Bootseer. Thread-safe."""

    def __init__(
        self, job: Job, node: str, config: Config, shelf: Shelf, journal: Journal, spare: Spare
    ) -> None:
        self.job = job
        self.log = EventLog(job.job_id, job.restart, node, path=journal.events_path(job.job_id, job.restart))
        self._config = config
        self._shelf = shelf
        self._journal = journal
        self._folder = config.agent.blobs.parent / "env" / f"{job.job_id}.{job.restart}"
        self._disk = unpacked_folder(config.cache.path) / f"{job.job_id}.{job.restart}"
        self._wanted = Wanted()
        self._targets: list[Target] = []
        self._held: list[Held] = []
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._recalled = threading.Event()  # it is known what was learned
        self._recalled.set()
        self._recalled_record: list[Remembered] | None = None
        self._fetcher = Fetcher(job.uid, job.gid, config, spare)
        self._memory = Memory()
        named = Named(config.agent.blobs.parent / "named" / f"{job.job_id}.{job.restart}")
        self._shown = Shown(self._wanted, named, self.log)
        self._prefetch: Prefetch | None = None
        self._observe = False
        self._by_site = False  # the job did not ask, and may still do so in a step
        self._writable = False
        self._ending_start = False
        self._step_seen = False
        no_key = Key(b"", "kernel_mount is off")
        self._key = no_key if config.image.kernel_mount == "off" else read_key(config.image.site_key)
        self._class = job_class(job.uid, job.account, job.name)
        self._rank = job.rank(node)
        self._publisher = Publisher(job, self._fetcher)
        self._background = Background(job, node, config)
        self._saving = Saving(self._background, self.log)
        self._repacking = Repacking(self._background, self.log, self._class)
        self._recording = Recording(
            job,
            node,
            self._class,
            config.prefetch,
            publisher=self._publisher,
            on_over=self._end_start,
        )
        self._measure = Measure(job, self.log, limit_s=config.prefetch.start_cap_s, parts=self._parts)

    def begin(self, request: Request, *, hook_start_ns: int | None) -> None:
        """Start to bring what the job wishes."""
        now_ns = time.time_ns()
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
        self._measure.begin()
        self._bring_all(request)

    def take_up(self, request: Request, found: list[Found]) -> None:
        """Go on where an agent was killed. found: what it had given the job."""
        self.log.emit("fault", "agent_restarted", level="warning", message="the agent was started again")
        self._recording.resume()
        for each in found:
            try:
                self._held.append(Held(each, self.job, self._shelf, self._fetcher, self._fault))
            except (BootseerError, OSError) as error:
                self._fault("blob_not_held", str(error))
        self._bring_all(request)

    def _bring_all(self, request: Request) -> None:
        self._observe, self._by_site = request.observe, not request.asked
        self.add(request)
        if not request.observe:
            self._begin_recall(request)

    def _begin_recall(self, request: Request) -> None:
        self._recalled.clear()
        if not self._start_thread(self._recall, {wish.kind for wish in request.wishes}):
            self._recalled.set()

    def wants(self, request: Request) -> bool:
        """Whether a request has anything new."""
        return self._wanted.has_new(request)

    def add(self, request: Request) -> None:
        """Bring these too; what was asked for already is not asked for twice."""
        if request.observe or (self._observe and not self._by_site):
            return
        if self._by_site:
            self._observe = self._by_site = False
            self.log.emit("session", "mode", mode="prefetch")
            self._begin_recall(request)
        self._writable = self._writable or request.writable
        known = self._wanted.all()
        other_kinds = {wish.kind for wish in request.wishes if wish not in known}
        for wish in sorted(request.wishes, key=lambda wish: wish.kind != "image"):  # environments ask for it
            self._seek(wish, asked=True)
        self._drop(lambda wish: wish.kind in other_kinds)  # this job does not ask for what the last one did

    def _seek(self, wish: Wish, **about: Any) -> Sought:
        """about: as of Wanted.seek."""
        sought, is_new = self._wanted.seek(wish, **about)
        if is_new and not self._start_thread(self._bring, wish, sought):
            sought.looked_up.set()
            sought.begun.set()
        return sought

    def _start_thread(self, work: object, *args: object) -> bool:
        """Do this in a thread of the session's own; False when the session is over."""
        with self._lock:
            if self._over.is_set():
                return False
            name = f"bring-{self.job.job_id}"
            thread = threading.Thread(target=work, args=args, name=name, daemon=True)  # type: ignore[arg-type]
            self._threads.append(thread)
        thread.start()
        return True

    def _recall(self, kinds: set[str]) -> None:
        """Bring what this class asked for at its last start, of kinds that are not asked for now."""
        try:
            of_class: dict[str, Any] = {"class": self._class}
            learned = learned_wishes(self._fetcher().call("recall", **of_class).fields.get("wishes"))
            self._recalled_record = [Remembered(wish.kind, wish.name, owner) for wish, owner in learned]
            for wish, owner in learned:
                if wish.kind not in kinds:
                    self.log.emit("plan", "learned", target=wish.name, what=wish.kind)
                    self._seek(wish, owner=owner)
        except BootseerError as error:
            _log.info("nothing recalled: %s", error, extra={"job": self.job.job_id})
        finally:
            self._recalled.set()

    def wait_looked_up(self, deadline_s: float) -> None:
        """Wait until the names are looked up, or time.monotonic() is `deadline_s`."""
        self._recalled.wait(max(0.0, deadline_s - time.monotonic()))
        while waiting := [each for each in self._wanted.all().values() if not each.looked_up.is_set()]:
            if not waiting[0].looked_up.wait(max(0.0, deadline_s - time.monotonic())):
                return

    def attach(self, step: str, memory_bytes: int = 0) -> tuple[list[Bind], dict[str, str]]:
        """What a step shall see: mounts over its originals (the caller closes them), and its environment.

        memory_bytes: that the job has on this node, 0 when that is not known.
        """
        if memory_bytes:
            self._memory.bound(memory_bytes)
        self.log.emit("step", "attach", step=step)
        self._recording.step()
        self.wait_looked_up(time.monotonic() + self._config.prefetch.attach_wait_s)
        # The batch step runs before all others. One that is not the first was seen on this node.
        shown = self._shown.to_step(is_first=step in _FIRST_STEPS and not self._step_seen)
        self._step_seen = True
        self._recording.shown(part for part in self._parts() if self._shown.is_readable(part.wish))
        self._measure.step(self._parts())
        return shown

    def image(self, name: str, digest: str) -> tuple[str, str]:
        """Where the job's user can open an image, once what its start needs is there, and its fingerprint.

        digest: what the registry says that its tag means now, or "". Waits `hot_wait_s` for the blocks.
        Raises NotFound when the store does not have the image, or has an older one under this tag.
        """
        self._measure.image_asked(name)
        wish = image_wish(name)
        if self._observe:
            raise InputError("this job only wants to be measured")
        asked = Request(observe=False, wishes=(wish,))
        is_new = self.wants(asked)
        sought = self._seek(wish, asked=True)
        if not self._wanted.can_come(wish, sought):
            raise InputError(f"image {wish.name}: this job asked for too much")
        if is_new:
            self._journal.add(self.job.job_id, Added(asked))
        self._recording.step()
        sought.begun.wait(_LOOK_UP_LIMIT_S)
        self._resume(sought)
        target = sought.target
        if target is None or (digest and target.fingerprint != digest):
            target = self._bring(wish, sought, digest)  # again: the importer may just have made it
        if target is None or (digest and target.fingerprint != digest):
            raise NotFound(f"image {wish.name}: not in the store, or an older one")
        self._recording.shown(target.parts)
        self._prefetcher().wait_hot(target.parts[0], self._config.prefetch.hot_wait_s)
        return str(target.served_path()), target.fingerprint

    def queued(self) -> tuple[int, int]:
        """What the prefetch has yet to begin, as Prefetch.queued."""
        return self._prefetch.queued() if self._prefetch else (0, 0)

    def mark(self, name: str, *, t_ns: int, step: str | None, task: int | None) -> None:
        """Record where the job is. Raises InputError when a value is not usable."""
        self.log.emit("mark", name, t_ns=t_ns, step=step, task=task)
        if name == "training_started":
            self._measure.trains()
            with self._lock:
                if self._ending_start or self._over.is_set():
                    return
                self._ending_start = True
            threading.Thread(target=self._end_start_later, daemon=True).start()

    def stage(self, name: str, *, t_ns: int, step: str, task: int | None, detail: str | None) -> None:
        """Record what the plugin says of a step."""
        if name == "task_start" and step.isdecimal():
            self._drop(lambda wish: wish.can_be_imported)  # its container, if any, is there
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
        self._background.stop()
        self._saving.stop()
        try:
            self._tell_end(targets, reason)
        except Exception:
            _log.exception("the session's end is not told", extra={"job": self.job.job_id})
        finally:
            self._let_go(targets)

    def _tell_end(self, targets: list[Target], reason: str) -> None:
        """Write what the next start and the report need."""
        self._measure.over(part for target in targets for part in target.parts)
        for part in (part for target in targets for part in target.parts):
            self.log.emit("access", "summary", **part.summary())
        for wish, sought in self._wanted.all().items():
            if sought.target is None and wish.can_be_imported and not sought.learned:
                self._fault("image_not_used", f"image {wish.name}: not in the store")
        self.log.emit("hook", "epilog", message=reason)
        self.log.emit("session", "end")
        self._recording.finish("mark" if self._ending_start else "end")
        self._recording.close()
        self._remember()
        self._publisher.write_events(self.log)

    def _let_go(self, targets: list[Target]) -> None:
        """End all that the session had."""
        self._fetcher.kill()
        if self._prefetch:
            self._prefetch.join(_JOIN_S)
        for thread in self._threads:
            thread.join(_JOIN_S)
        for close in [
            self._shown.close,
            *(each.close for each in targets),
            *(each.close for each in self._held),
        ]:
            try:
                close()
            except Exception:  # the others are let go all the same
                _log.exception("a blob is not let go", extra={"job": self.job.job_id})
        unmount_left(self._folder)
        shutil.rmtree(self._disk, ignore_errors=True)
        self.log.close()
        self._journal.forget(self.job.job_id, self.job.restart)

    def _end_start_later(self) -> None:
        if not self._over.wait(_PUBLISH_DELAY_S):  # else the end does all this
            self._end_start("mark")
            with self._lock:
                self._ending_start = False

    def _parts(self) -> list[Part]:
        """All blobs that are looked up by now."""
        with self._lock:
            return [part for target in self._targets for part in target.parts]

    def _end_start(self, why: str) -> None:
        """The job trains: what it touched until now was its start, and the rest can wait."""
        parts = self._parts()
        self._measure.over(parts, read_ns=self._recording.last_new_ns if why == "quiet" else 0)
        fetched_bytes = {part: part.fetched_bytes for part in parts}
        if self._prefetch:
            self._prefetch.start_over()
        self._recording.finish(why)
        self._publisher.write_events(self.log)
        self._saving.begin(self._wanted.to_save(self.job.uid, self._class), trains=why == "mark")
        if not self._observe and self._fetcher.started:
            rate = self._fetcher().turns.bytes_per_s
            whole_comes = self._config.prefetch.cold_rate_bytes > 0
            self._repacking.begin(fetched_bytes, link_bytes_per_s=rate, whole_comes=whole_comes)

    def _remember(self) -> None:
        """Tell the next start of this class what this one asked for, unless it knows."""
        remembered = self._wanted.remembered()
        if self._observe or not self._fetcher.started or remembered == self._recalled_record:
            return
        if remembered or self._recalled_record is not None:  # else the store may have something, and was away
            self._publisher.write("remember", encode_wishes(remembered), **{"class": self._class})

    def _drop(self, which: Callable[[Wish], bool]) -> None:
        """Bring and show no more of what was only learned."""
        for sought in self._wanted.drop(which):
            if self._prefetch and sought.target:
                for part in sought.target.parts:
                    self._prefetch.drop(part)

    def _resume(self, sought: Sought) -> None:
        """A container wants an image after all that was dropped."""
        if sought.dropped and sought.target:
            sought.dropped = False
            for part in sought.target.parts:
                self._add_to_prefetch(sought.target, part)

    def _prefetcher(self) -> Prefetch:
        """The job's prefetch, made when first needed."""
        turns = self._fetcher().turns
        with self._lock:
            if self._prefetch is None:
                self._prefetch = Prefetch(
                    turns, self._config.prefetch, self._memory, log=self.log, on_fault=self._fault
                )
                if self._over.is_set():
                    self._prefetch.stop()
            return self._prefetch

    def _bring(self, wish: Wish, sought: Sought, digest: str = "") -> Target | None:
        """Look one wish up, then have it prefetched; gives None when it cannot be used."""
        try:
            self._wanted.count_look_up(wish)
            if wish.kind == "checkpoint" and sought.whole is None and self._locate(wish, sought):
                return None
            place = Place(f"{sought.place}\0{self._rank.key}", self._rank.nodes > 1) if sought.place else None
            target = self._look_up(wish, sought, digest, place)
            with self._lock:
                over = self._over.is_set()
                if not over:
                    self._targets.append(target)
                    sought.target = target
            if over:
                target.close()
                return None
            for part in target.parts:
                self._journal.add(self.job.job_id, part.found)
            sought.looked_up.set()
            if not sought.dropped:
                self._begin_prefetch(target, sought)
            return target
        except (BootseerError, OSError) as error:
            sought.dropped = sought.learned and isinstance(error, InputError)
            if isinstance(error, NotFound) and (sought.learned or wish.can_be_imported):
                pass
            elif sought.learned:
                self.log.emit("plan", "not_used", target=wish.name, what=wish.kind, message=str(error))
            else:
                self._fault(f"{wish.kind}_not_used", str(error))
        except Exception as error:  # the fetch process is the user's: its reply may lack anything
            _log.exception("%s %s", wish.kind, wish.name, extra={"job": self.job.job_id})
            self._fault(f"{wish.kind}_not_used", f"{wish.kind} {wish.name}: {type(error).__name__}")
        finally:
            sought.looked_up.set()
            sought.begun.set()
        return None

    def _locate(self, wish: Wish, sought: Sought) -> bool:
        """See whether a checkpoint is a folder; then each file of the newest in it is a wish of its own."""
        rank = self._rank
        reply = self._fetcher().call(
            "locate",
            name=wish.name,
            newest=sought.learned,
            limit=FILES,
            rank=rank.number,
            nodes=rank.nodes,
        )
        located = parse_located(wish.name, reply.fields)
        if located.place:
            sought.place = located.place
            return False
        self.log.emit("plan", "located", target=wish.name, what=wish.kind, message=located.message or None)
        if located.has_no_path:  # at once: steps look at it
            sought.files = {within: file for within, (file, _) in located.files.items()}
        for file, place in located.files.values():
            self._seek(file, whole=sought, place=place)
        return True

    def _begin_prefetch(self, target: Target, sought: Sought) -> None:
        for part in target.parts:
            self._recording.add(part)
            part.take_plan(self._class, allow=self._wanted.allow_plan)
            if part.is_unread and sought.whole is None:
                self.log.emit("plan", "unread", target=part.label, what=part.wish.kind, message=_UNREAD)
            # Blocks that are pushed are read unseen: of every few starts, one is recorded whole.
            if part.is_settled and self.job.job_id % _WHOLE_TRACE_EVERY:
                part.push()
            self._add_to_prefetch(target, part)
            if target.wish.kind == "image" and part.is_signed(self._key):
                try:
                    part.mount_image()
                except BootseerError as error:
                    self._fault("kernel_mount_failed", error.message)
                self._recording.mounted(part)

    def _add_to_prefetch(self, target: Target, part: Part) -> None:
        kind, size_bytes = target.wish.kind, part.reader.size_bytes
        first = first_ranges(target.first, size_bytes) if kind == "image" else ()
        ends = both_ends(size_bytes) if kind == "checkpoint" else ()
        self._prefetcher().add(part, plan=part.plan, first=first, ends=ends)

    def _look_up(self, wish: Wish, sought: Sought, digest: str, place: Place | None) -> Target:
        target = Target(
            wish,
            self.job,
            self._fetcher(),
            self._shelf,
            roots=self._config.shadow.roots,
            digest=digest,
            place=place,
            use=self._use() if wish.kind == "environment" else Use(),
            allow=self._wanted.allow,
            on_fault=lambda name, message: self._fault(name, f"{wish.name}: {message}"),
        )
        try:
            sought.now_owned_by(target.owner)
            if target.warning:
                self._fault("store_not_used", target.warning)
            if wish.kind == "environment":
                target.mount_snapshot(self._folder, self._disk, self._key, writable=self._writable)
        except BaseException:
            target.close()
            raise
        return target

    def _use(self) -> Use:
        return Use(self._wanted.image_name(), self._class if self._writable else "")

    def _fault(self, name: str, message: str) -> None:
        _log.warning("%s: %s", name, message, extra={"job": self.job.job_id})
        self.log.emit("fault", name, level="warning", message=message)
