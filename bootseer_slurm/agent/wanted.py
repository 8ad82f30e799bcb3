"""What one job wants on this node: each thing once, and no more than one job may ask for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from bootseer_slurm.agent.request import Request, Wish
from bootseer_slurm.agent.saving import ToSave
from bootseer_slurm.agent.target import Target
from bootseer_slurm.blob.jobclass import Remembered
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.errors import InputError

_LOOK_UPS = 64  # of one job on one node: each costs the agent memory and a thread
_DIGESTS_LIMIT_BYTES = 256 * 2**20  # of one job: of blobs of 2 TB
_PLANNED_LIMIT_BLOCKS = 2**20  # of one job: 256 GiB, and some 250 bytes of memory each


@dataclass(slots=True)
class Sought:
    """One wish. by_job: asked for by the job itself, not only learned from its class.

    owner: of what was learned, whose it was at the last start, where that is known. whole: the wish for a
    folder that this is a file of. place: of a file of a checkpoint, what it is whatever step that is of.
    dropped: it was learned, and the job does not want it any more, or cannot use it.
    """

    by_job: bool
    owner: int | None = None
    whole: Sought | None = None
    place: str = ""
    files: dict[str, Wish] = field(default_factory=dict)  # of a checkpoint without paths, by name within it
    looked_up: threading.Event = field(default_factory=threading.Event)
    begun: threading.Event = field(default_factory=threading.Event)  # its prefetch, or it is not used
    target: Target | None = None
    dropped: bool = False

    @property
    def learned(self) -> bool:
        """Whether the job itself asked neither for it, nor for what it is a part of."""
        return not (self.by_job or (self.whole is not None and self.whole.by_job))

    def now_owned_by(self, owner: int | None) -> None:
        """Note whose it is now. Raises InputError when it was learned, and was another user's."""
        of_whole = self.whole or self
        if of_whole.learned and of_whole.owner is not None and owner not in (None, of_whole.owner):
            raise InputError(f"belongs to user {owner}, at the last start it was user {of_whole.owner}'s")
        of_whole.owner = owner


class Wanted:
    """The wishes of one job. Thread-safe."""

    def __init__(self) -> None:
        self._sought: dict[Wish, Sought] = {}
        self._look_ups = 0
        self._digest_bytes = 0
        self._planned_blocks = 0
        self._lock = threading.Lock()

    def has_new(self, request: Request) -> bool:
        """Whether a request has anything that was not asked for, and can still be."""
        with self._lock:
            if len(self._sought) >= _LOOK_UPS:
                return False
            return any(wish not in self._sought or not self._sought[wish].by_job for wish in request.wishes)

    def seek(
        self,
        wish: Wish,
        *,
        asked: bool = False,
        owner: int | None = None,
        whole: Sought | None = None,
        place: str = "",
    ) -> tuple[Sought, bool]:
        """What is known of a wish, and whether it is to be looked up: it is new, and there is room for it.

        owner, whole, place: see Sought.
        """
        with self._lock:
            sought = self._sought.get(wish)
            if sought is not None:
                sought.by_job = sought.by_job or asked
                sought.whole, sought.place = sought.whole or whole, sought.place or place
                return sought, False
            sought = Sought(asked, owner, whole, place)
            if len(self._sought) < _LOOK_UPS:
                self._sought[wish] = sought
                return sought, True
        sought.looked_up.set()
        sought.begun.set()
        return sought, False

    def remembered(self) -> list[Remembered]:
        """What the next start of the class learns: what this one asked for, or had learned and could use."""
        return [
            Remembered(wish.kind, wish.name, sought.owner)
            for wish, sought in self.all().items()
            if sought.whole is None and (sought.by_job or not sought.dropped)
        ]

    def drop(self, which: Callable[[Wish], bool]) -> list[Sought]:
        """Drop what was learned and the job itself did not ask for; gives it."""
        dropped = [
            sought
            for wish, sought in self.all().items()
            if sought.learned and not sought.dropped and which(wish)
        ]
        for sought in dropped:
            sought.dropped = True
        return dropped

    def can_come(self, wish: Wish, sought: Sought) -> bool:
        """Whether a wish is there, or may still be looked up."""
        with self._lock:
            return sought.target is not None or (
                self._look_ups < _LOOK_UPS and self._sought.get(wish) is sought
            )

    def count_look_up(self, wish: Wish) -> None:
        """One look-up more. Raises InputError when they are too many."""
        with self._lock:
            self._look_ups += 1
            if self._look_ups > _LOOK_UPS:
                raise InputError(f"{wish.kind} {wish.name}: this job asked for too much")

    def allow(self, size_bytes: int) -> None:
        """So many bytes of digests more. Raises InputError when they are too many."""
        with self._lock:
            self._digest_bytes += size_bytes
            if self._digest_bytes > _DIGESTS_LIMIT_BYTES:
                raise InputError("this job asked for too much: its blobs have too many blocks")

    def allow_plan(self, blocks: int) -> None:
        """A plan of so many blocks more. Raises InputError when they are too many."""
        with self._lock:
            if self._planned_blocks + blocks > _PLANNED_LIMIT_BLOCKS:
                raise InputError(f"the plans of this job would have more than {_PLANNED_LIMIT_BLOCKS} blocks")
            self._planned_blocks += blocks

    def all(self) -> dict[Wish, Sought]:
        """All wishes, learned ones too."""
        with self._lock:
            return dict(self._sought)

    def image_name(self) -> str:
        """The first image of the job's, "" when it has none."""
        return next((wish.name for wish in self.all() if wish.kind == "image"), "")

    def to_save(self, uid: int, job_class: str) -> list[ToSave]:
        """The environments without a snapshot, and this user's own that a start may have installed to."""
        image, own, found = self.image_name(), f"{user_folder(uid)}/", []
        for wish, sought in self.all().items():
            target = sought.target
            if wish.kind != "environment":
                continue
            if target is None:
                if not sought.dropped:
                    found.append(ToSave(wish.name, ["--image", image] if image else []))
            elif target.is_writable and target.path and target.store_folder.startswith(own):
                installed = [job_class, target.fingerprint, target.store_folder]
                options = ["--image-digest", target.image_digest] if target.image_digest else []
                found.append(ToSave(target.path, options, installed, target.installed_view))
        return found
