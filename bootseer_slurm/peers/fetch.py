"""The way of one chunk to one node: a directory, its parents, and the store where these fail.

The node asks the directory (WANT), and then the parent that the directory names (GET), or reads the store.
Both answer at once, a parent with PENDING where it has to wait itself. A node that has not answered after
150 ms is missing, and so is a parent that is silent for 250 ms later on; after 800 ms where its machine is
known to be there, 400 ms on demand. The next WANT tells the directory.
After three parents, or 1 s in vain, the chunk comes from the store; after 0.5 s where somebody waits for it
(demand). Signs of life move neither end of the whole: after 10 s it is the store, after 3 s on demand, and
later where this node's own reads of the store are slow. A node whose read of the store takes that long says
so to those that wait for it (PENDING with TOO_DEEP).

Pure: time is a parameter, in seconds of a clock that only goes forward. Not thread-safe.
"""

from __future__ import annotations

import enum
from collections.abc import Set
from dataclasses import dataclass, field

from bootseer_slurm.peers.directory import Answer, First, Moved, Want
from bootseer_slurm.peers.groups import Chunk, Ring
from bootseer_slurm.peers.liveness import Liveness
from bootseer_slurm.peers.uploads import Get

FIRST_ANSWER_S = 0.15
SILENCE_S = 0.25
REACHED_S = 0.8
_DEMAND_REACHED_S = 0.4
_PARENTS = 3
_LOST_S = 1.0
_DEMAND_LOST_S = 0.5
# Where none of a large job's directory has started: it looks again, for a short while.
_RETRY_S = 0.025
_NO_DIRECTORY_S = 0.1
_MOST_ANSWERS = 16
_CHUNK_S = 10.0
_DEMAND_CHUNK_S = 3.0
_STORE_READS = 4  # of the mean length: many nodes that go to a slow store at once make it slower
# PENDING counts its way from the store. In a circle of nodes that wait for one another it grows on and on.
# So many, or more, say: wait elsewhere.
TOO_DEEP = 32
_NEW = 0.2  # the weight of a new figure in the mean


class Cause(enum.Enum):
    """Why a chunk is read from the store. FIRST is the plan; all others are peers that failed."""

    FIRST = "first"
    NO_DIRECTORY = "no directory"
    LOST_PARENTS = "lost parents"
    LOST_TIME = "lost time"
    WRONG_DIGEST = "wrong digest"
    CUT_OFF = "cut off"


class Loss(enum.Enum):
    """What a peer did instead of what it was asked."""

    REFUSED = enum.auto()  # also: closed the connection
    SILENT = enum.auto()
    BUSY = enum.auto()
    LACK = enum.auto()
    DEEP = enum.auto()  # it lives, and its own source does not get on
    WRONG_DIGEST = enum.auto()
    STORE = enum.auto()  # it is the store that failed


@dataclass(frozen=True, slots=True)
class AskDirectory:
    """Send this WANT to a node's directory of that level; the node may be this one."""

    to: int
    level: int
    want: Want


@dataclass(frozen=True, slots=True)
class AskParent:
    """Send this GET to a node. The same one again, with demand, puts it before others there."""

    to: int
    get: Get


@dataclass(frozen=True, slots=True)
class ReadStore:
    """Read this chunk from the store."""

    chunk: Chunk
    demand: bool
    cause: Cause


Step = AskDirectory | AskParent | ReadStore


class _Phase(enum.Enum):
    LOOKING = enum.auto()  # for a directory
    ASKING = enum.auto()
    GETTING = enum.auto()
    STORE = enum.auto()


@dataclass(slots=True)
class Viewpoint:
    """The node that fetches: its number, its rings, and what it knows of the others.

    serves: whether the directory may well send others to this node; the owner keeps it true to its uploads.
    store_read_s: how long this node's reads of a chunk from the store take; 0 before the first.
    """

    node: int
    rings: tuple[Ring, ...]
    liveness: Liveness = field(default_factory=Liveness)
    serves: bool = True
    store_read_s: float = 0.0

    def patience_s(self, *, demand: bool) -> float:
        """How long a chunk may take on its whole way by peers."""
        return max(_DEMAND_CHUNK_S if demand else _CHUNK_S, _STORE_READS * self.store_read_s)

    def was_read(self, took_s: float) -> None:
        """A chunk has come from the store."""
        mean_s = self.store_read_s
        self.store_read_s = mean_s + _NEW * (took_s - mean_s) if mean_s else took_s


@dataclass(slots=True)
class _Asked:
    """What is under way. sign_s: when it began, or the last sign of life.

    named: whether a directory named this owner, and not the ring. only: there is no other parent.
    """

    phase: _Phase
    peer: int
    sign_s: float
    named: bool = False
    only: bool = False
    has_answered: bool = False


class Fetch:
    """One chunk that a node gets. Each method gives what is to be done next, where that changes."""

    def __init__(self, chunk: Chunk, here: Viewpoint, now_s: float, *, demand: bool) -> None:
        self.chunk = chunk
        self.demand = demand
        self.level = 0  # of the directory that it asks
        self._here = here
        self._began_s = now_s
        self._until_s = now_s + here.patience_s(demand=demand)
        self._asked = _Asked(_Phase.LOOKING, -1, now_s)
        self._hops = 0
        self._answers = 0
        self._lost_s = 0.0
        self._busy: list[int] = []
        self._lost: list[int] = []

    @property
    def store_since_s(self) -> float | None:
        """Since when it is read from the store; None where it is not."""
        return self._asked.sign_s if self._asked.phase is _Phase.STORE else None

    def look(self, now_s: float) -> Step | None:
        """Ask the first node on the ring that may be there."""
        here = self._here
        if here.liveness.is_cut_off(now_s):
            return self._store(Cause.CUT_OFF, now_s)
        for node in here.rings[self.level].owners(self.chunk):
            if node == here.node or not here.liveness.is_absent(node, now_s):
                return self._ask(node, now_s)
        if self.demand or now_s - self._began_s >= _NO_DIRECTORY_S:
            return self._store(Cause.NO_DIRECTORY, now_s)
        self._asked = _Asked(_Phase.LOOKING, -1, now_s)
        return None

    def answered(self, owner: int, answer: Answer, now_s: float) -> Step | None:
        """A directory has answered. owner: the node that was asked."""
        if self._asked.phase is not _Phase.ASKING or self._asked.peer != owner:
            return None
        self._answers += 1
        if self._answers > _MOST_ANSWERS:
            return self._store(Cause.NO_DIRECTORY, now_s)
        if isinstance(answer, First):
            if self.level + 1 == len(self._here.rings):
                return self._store(Cause.FIRST, now_s)
            self.level += 1
            return self.look(now_s)
        if isinstance(answer, Moved):
            if not self._here.rings[self.level].is_before(answer.owner, owner, self.chunk):
                # No directory says so. Who does is left, as one that does not answer.
                self._here.liveness.silent(owner, now_s)
                return self.failed(owner, Loss.SILENT, now_s)
            return self._ask(answer.owner, now_s, named=True)
        self._asked = _Asked(_Phase.GETTING, answer.node, now_s, only=answer.only)
        if self._here.liveness.is_missing(answer.node, now_s):
            self._lost.append(answer.node)
            return self._next(now_s)
        return AskParent(answer.node, Get(self.chunk, self._here.node, self.demand, answer.only))

    def hurry(self, now_s: float) -> Step | None:
        """Somebody waits for it from now on."""
        self.demand = True
        self._until_s = min(self._until_s, now_s + self._here.patience_s(demand=True))
        if self._asked.phase is not _Phase.GETTING:
            return None
        return AskParent(self._asked.peer, Get(self.chunk, self._here.node, True, self._asked.only))

    def pending(self, parent: int, hops: int, now_s: float) -> Step | None:
        """A sign of life of the parent: bytes of the chunk, or PENDING. hops: its own; 0 reads the store."""
        asked = self._asked
        if asked.phase is not _Phase.GETTING or asked.peer != parent:
            return None
        if hops >= TOO_DEEP:
            return self.failed(parent, Loss.DEEP, now_s)
        asked.sign_s, asked.has_answered = now_s, True
        self._hops = hops + 1
        return None

    def hops(self, now_s: float) -> int | None:
        """What this node's own children hear with PENDING; None while its source does not move."""
        silent_s = now_s - self._asked.sign_s
        if self._asked.phase is _Phase.STORE:
            return 0 if silent_s <= self._here.patience_s(demand=False) else TOO_DEEP
        return self._hops if silent_s <= SILENCE_S else None

    def failed(self, peer: int, loss: Loss, now_s: float) -> Step | None:
        """A peer that was asked, directory or parent, did something else. `Liveness` knows that already."""
        asked = self._asked
        if asked.peer != peer or asked.phase not in (_Phase.ASKING, _Phase.GETTING):
            return None
        self._lost_s += now_s - asked.sign_s
        if loss is Loss.WRONG_DIGEST:
            return self._store(Cause.WRONG_DIGEST, now_s)
        if asked.phase is _Phase.GETTING:
            (self._busy if loss is Loss.BUSY and not asked.only else self._lost).append(peer)
        elif asked.named:
            # A directory knows it, so it has started: now it is gone.
            self._here.liveness.silent(peer, now_s)
        return self._next(now_s)

    def overdue(self, now_s: float, reached: Set[int] = frozenset()) -> Step | None:
        """What is to be done because time has passed.

        reached: silent nodes whose machines take what is said to them. They have busy cores perhaps, and get
        more time: a read of the store for each node that waits would cost more.
        """
        asked = self._asked
        waited_s = now_s - asked.sign_s
        if asked.phase is not _Phase.STORE and now_s >= self._until_s:
            return self._store(Cause.LOST_TIME, now_s)
        if asked.phase is _Phase.LOOKING and waited_s >= _RETRY_S:
            self._here.liveness.forget_refused()
            return self.look(now_s)
        patience_s = SILENCE_S if asked.has_answered else FIRST_ANSWER_S
        if asked.peer in reached:
            is_short = self.demand or not self._here.liveness.any_heard
            patience_s = _DEMAND_REACHED_S if is_short else REACHED_S
        if asked.phase in (_Phase.ASKING, _Phase.GETTING) and waited_s >= patience_s:
            self._here.liveness.silent(asked.peer, now_s)
            return self.failed(asked.peer, Loss.SILENT, now_s)
        return None

    def _next(self, now_s: float) -> Step | None:
        """After a failure: ask again, as long as that is worth it."""
        if len(self._busy) + len(self._lost) >= _PARENTS:
            return self._store(Cause.LOST_PARENTS, now_s)
        if self._lost_s >= (_DEMAND_LOST_S if self.demand else _LOST_S):
            return self._store(Cause.LOST_TIME, now_s)
        return self.look(now_s)

    def _ask(self, owner: int, now_s: float, *, named: bool = False) -> Step:
        here = self._here
        self._asked = _Asked(_Phase.ASKING, owner, now_s, named)
        busy, lost, missing = tuple(self._busy), tuple(self._lost), here.liveness.missing(now_s)
        return AskDirectory(owner, self.level, Want(self.chunk, here.node, here.serves, busy, lost, missing))

    def _store(self, cause: Cause, now_s: float) -> Step:
        self._asked = _Asked(_Phase.STORE, -1, now_s)
        self._hops = 0
        return ReadStore(self.chunk, self.demand, cause)
