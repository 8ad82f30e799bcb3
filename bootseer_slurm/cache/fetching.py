"""Fetching claimed blocks of a blob: from the first source whose bytes are right, into the cache's file.

Sources are tried in order: what an earlier boot left in the cache, other nodes of the job, the store, then
the original file, which has the same bytes. Bytes are shown only after their digest agreed. They are pushed
into the kernel's page cache only after their claim ended: the kernel waits for reads of the same pages, and
such a read may wait for the claim. Threads: any number may call at once.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, replace

from bootseer_slurm.cache.cache import MISSING, PRESENT, CachedBlob
from bootseer_slurm.cache.sources import NotHere, Source, Sources
from bootseer_slurm.errors import BootseerError, IntegrityError, StoreError

_log = logging.getLogger(__name__)

# Lets so many bytes be read over the link, now or when others have read; gives how many at once.
Admit = Callable[[int], contextlib.AbstractContextManager[int]]
# Gives bytes from an offset on to the kernel, before anybody asks it for them. Raises OSError.
Push = Callable[[int, memoryview], None]


@dataclass(slots=True)
class Usage:  # size: one counter for each figure of a report
    """The use that readers made of a blob, and where its bytes came from."""

    reads: int = 0
    reads_blocked: int = 0  # of these, how many had to wait
    read_bytes: int = 0
    miss_bytes: int = 0
    blocked_s: float = 0.0  # summed over reads that waited side by side
    first_ns: int = 0
    last_ns: int = 0
    store_bytes: int = 0
    origin_bytes: int = 0
    peer_bytes: int = 0
    demand_bytes: int = 0  # of all three, what a read waited for
    fetch_s: float = 0.0  # that reads of sources took, summed over those that ran side by side
    disk_s: float = 0.0  # and writes into the cache
    pushed_bytes: int = 0  # into the kernel's page cache: reads of these are not seen any more

    @property
    def fetched_bytes(self) -> int:
        """Bytes that came over the link."""
        return self.store_bytes + self.origin_bytes + self.peer_bytes

    def add(self, more: Usage, *, times: int = 1) -> None:
        """Count another use in, `times` over; -1 takes it out. Points in time stay."""
        for each in fields(Usage):
            if not each.name.endswith("_ns"):
                setattr(self, each.name, getattr(self, each.name) + times * getattr(more, each.name))


@dataclass(frozen=True, slots=True)
class Claim:
    """Blocks that this caller alone may fetch now. unchecked: the cache's file may hold them.

    asked: other nodes were asked, and wait for this one.
    """

    first: int
    count: int
    unchecked: bool = False
    asked: bool = False

    @property
    def end(self) -> int:
        """The block behind them."""
        return self.first + self.count


@dataclass(slots=True)
class _Ending:
    """A claim, and whether it has ended."""

    claim: Claim
    is_over: bool = False


class Claims:
    """Claims blocks of one blob. Thread-safe."""

    def __init__(self, blob: CachedBlob, sources: Sources) -> None:
        self._blob = blob
        self._sources = sources
        self._parked: list[Claim] = []
        self._lock = threading.Lock()

    def demand(self, block: int, last: int) -> Claim | None:
        """As `unit`, for a read that waits: also what the prefetch has claimed, and has not begun to read."""
        return self.unit(block, last) or self._take_parked(block)

    def park(self, claim: Claim) -> Claim:
        """Keep a claim whose blocks are to be read from the store, while it waits for its turn there."""
        claim = replace(claim, asked=True)
        with self._lock:
            self._parked.append(claim)
        return claim

    def take_back(self, claim: Claim) -> bool:
        """End `park`; False where a read that waits has taken the claim."""
        with self._lock:
            if claim not in self._parked:
                return False
            self._parked.remove(claim)
            return True

    def _take_parked(self, block: int) -> Claim | None:
        with self._lock:
            claim = next((each for each in self._parked if each.first <= block < each.end), None)
            if claim is not None:
                self._parked.remove(claim)
            return claim

    def unit(self, block: int, last: int) -> Claim | None:
        """The whole unit of a block, as nodes exchange it, where all of that is missing; else a run.

        None: others have the block, or fetch it.
        """
        if (unit := self._sources.unit_blocks) and not self._blob.file.full:
            begin = block // unit * unit
            end = min(begin + unit, self._blob.layout.blocks)
            if self._blob.blocks.claim_all(begin, end - 1):
                return Claim(begin, end - begin)
            last = min(last, end - 1)
        return self.run(block, last)

    def next_in_turn(self) -> int:
        """The next block that nobody has or fetches, in the order in which this node gets units; -1: none."""
        blocks, unit = self._blob.blocks, self._sources.unit_blocks
        first = blocks.next_missing()
        if first < 0 or not unit:
            return first
        turn = self._sources.turn
        window_blocks = turn.window * unit
        begin = first // window_blocks * window_blocks
        in_turn = blocks.next_missing(begin + turn.first * unit, begin + window_blocks)
        return in_turn if in_turn >= 0 else first

    def run(self, block: int, last: int, limit_bytes: int | None = None) -> Claim | None:
        """A block and those behind it up to `last`, within its chunk and `limit_bytes`; None as of `unit`."""
        layout = self._blob.layout
        per_chunk = layout.chunk_bytes // layout.block_bytes
        last = min((block // per_chunk + 1) * per_chunk - 1, last)
        if limit_bytes is not None:
            last = min(last, block + max(1, limit_bytes // layout.block_bytes) - 1)
        count, unchecked = self._blob.blocks.claim(block, last)
        return Claim(block, count, unchecked) if count else None


class _CacheFile:
    """The blob's own file, as an earlier boot left it (a Source)."""

    name = "cache"

    def __init__(self, blob: CachedBlob) -> None:
        self._blob = blob

    @contextlib.contextmanager
    def read(self, offset: int, size_bytes: int, *, demand: bool, fixed: bool) -> Iterator[memoryview]:
        try:
            content = self._blob.file.read(offset, size_bytes)
        except OSError as error:
            raise StoreError(f"the cache's file cannot be read: {error.strerror}") from error
        yield memoryview(content)


class Fetching:
    """Fetches blocks of one blob."""

    def __init__(self, blob: CachedBlob, sources: Sources, usage: Usage) -> None:
        self._blob = blob
        self._sources = sources
        self._usage = usage
        self._cache_file = _CacheFile(blob)
        self.claims = Claims(blob, sources)

    def bytes_of(self, first: int, end: int) -> int:
        """The size of blocks `first` to `end`, without the latter."""
        layout = self._blob.layout
        return min(end * layout.block_bytes, layout.size_bytes) - first * layout.block_bytes

    def fetch(
        self,
        claim: Claim,
        *,
        demand: bool,
        push: Push | None = None,
        unkept: dict[int, bytes] | None = None,
    ) -> None:
        """Fetch claimed blocks, and end the claim.

        demand: a read waits. push: is given the bytes too. unkept: gets those that the full disk has no room
        for. Raises BootseerError when no source has the right bytes, StoreError where one may have them yet.
        """
        peers = () if claim.asked else self._peers()
        sources = (*peers, *self._sources.all)
        with self._ended_if_failed(claim) as ending:
            failures = self._bring(sources, ending, demand=demand, push=push, unkept=unkept)
            if failures is not None:
                failures = failures or [StoreError("no source is left: its job is over")]
                raise next((each for each in failures if isinstance(each, StoreError)), failures[-1])

    def fetch_of_peers(self, claim: Claim, *, push: Push | None) -> bool:
        """Fetch claimed blocks without the store, and end the claim; False, and it stays, without them."""
        with self._ended_if_failed(claim) as ending:
            return self._bring(self._peers(), ending, demand=False, push=push, unkept=None) is None

    @contextlib.contextmanager
    def _ended_if_failed(self, claim: Claim) -> Iterator[_Ending]:
        ending = _Ending(claim)
        try:
            yield ending
        except BaseException:
            if not ending.is_over:
                self._settle(ending, kept=False)
            raise

    def _peers(self) -> list[Source]:
        exchange = self._sources.exchange  # which may be of no use a moment later
        return [exchange] if exchange else []

    def _bring(
        self,
        sources: Iterable[Source],
        ending: _Ending,
        *,
        demand: bool,
        push: Push | None,
        unkept: dict[int, bytes] | None,
    ) -> list[BootseerError] | None:
        """Bring claimed blocks of the first source that has them, and end the claim. Gives None.

        Else the claim stays; gives why the sources do not have them.
        """
        claim = ending.claim
        failures: list[BootseerError] = []
        for source in (*([self._cache_file] if claim.unchecked else ()), *sources):
            begin_s = time.monotonic()
            try:
                with self._checked(source, claim, demand=demand) as (offset, view):
                    fetched_s = time.monotonic()
                    kept = source is self._cache_file or self._blob.file.write(offset, view)
                    written_s = time.monotonic()
                    if not kept and unkept is not None:
                        self._put_aside(claim.first, view, unkept)
                    self._settle(ending, kept=kept)
                    if push and kept:
                        self._push(push, offset, view)
            except NotHere:
                continue
            except BootseerError as error:
                name = "corrupt_block" if isinstance(error, IntegrityError) else "source_failed"
                self._sources.tell(name, f"{source.name}: {error.message}")
                failures.append(error)
                continue
            if source is not self._cache_file:
                self._usage.fetch_s += fetched_s - begin_s
                self._usage.disk_s += written_s - fetched_s
                self._count(source, claim, demand=demand)
            if not kept:
                why = self._blob.file.why_full
                self._sources.tell("cache_full", f"{why}: blocks are served, not kept")
            return None
        return failures

    def _settle(self, ending: _Ending, *, kept: bool) -> None:
        """The claim ends. Who waits may ask other nodes at once, so what they cannot have is told before."""
        claim, exchanges = ending.claim, self._sources.exchanges
        try:
            if not kept:
                for exchange in exchanges:
                    exchange.lost(claim.first, claim.count)
        finally:
            ending.is_over = True
            self._blob.blocks.end_claim(claim.first, claim.count, PRESENT if kept else MISSING)
        if kept:
            for exchange in exchanges:
                exchange.kept(claim.first, claim.count)

    @contextlib.contextmanager
    def _checked(self, source: Source, claim: Claim, *, demand: bool) -> Iterator[tuple[int, memoryview]]:
        """The blocks' offset, and their bytes of a source. Raises NotHere, StoreError, IntegrityError."""
        offset = claim.first * self._blob.layout.block_bytes
        size_bytes = self.bytes_of(claim.first, claim.first + claim.count)
        # An unmanaged file's bytes agree with no promise: its user brings them, and is shown what he brought.
        # One who changes them meanwhile has a digest kept that is not theirs, and loses the block at a check.
        fixed = not self._blob.unmanaged
        with source.read(offset, size_bytes, demand=demand, fixed=fixed) as view:
            learn = self._blob.unmanaged and source is not self._cache_file
            self._blob.blocks.check(claim.first, claim.count, view, learn=learn)
            yield offset, view

    def _put_aside(self, first: int, view: memoryview, unkept: dict[int, bytes]) -> None:
        block_bytes = self._blob.layout.block_bytes
        for start in range(0, len(view), block_bytes):
            unkept[first + start // block_bytes] = bytes(view[start : start + block_bytes])

    def _push(self, push: Push, offset: int, view: memoryview) -> None:
        try:
            push(offset, view)
        except (OSError, BootseerError) as error:
            _log.debug("blob %s: not pushed: %s", self._blob.id[:12], error)
        else:
            self._usage.pushed_bytes += len(view)

    def _count(self, source: Source, claim: Claim, *, demand: bool) -> None:
        size_bytes = self.bytes_of(claim.first, claim.first + claim.count)
        if source.name == "store":
            self._usage.store_bytes += size_bytes
        elif source.name == "peers":
            self._usage.peer_bytes += size_bytes
        else:
            self._usage.origin_bytes += size_bytes
        if demand:
            self._usage.demand_bytes += size_bytes
