"""A parser under test, and the rules that each input of it is held to.

An input is read, or refused by an error that the parser documents. It takes bounded time and memory. Where
there is a writer, what was read comes back from what it writes.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from bootseer_slurm.errors import BootseerError
from scripts.lib.fuzz.mutations import hostile

CPU_S = 10.0
MEMORY_BYTES = 512 * 2**20

Errors = tuple[type[Exception], ...]


class Broken(BaseException):
    """An input broke a rule. Past Exception, so that no parser takes it for an error of its own."""


@dataclass(frozen=True, slots=True)
class Target:
    """A parser. seeds: valid inputs. errors: that it documents. render: writes what `parse` gave.

    seal: puts right what nobody could guess, such as a digest at the end, so that an input comes further.
    """

    name: str
    seeds: Callable[[], Sequence[bytes]]
    parse: Callable[[bytes], Any]
    errors: Errors = (BootseerError,)
    render: Callable[[Any], bytes] | None = None
    seal: Callable[[bytes], bytes] | None = None

    def check(self, content: bytes) -> bool:
        """Whether the parser reads it. Raises Broken, or what the parser should not raise."""
        with _bounded():
            try:
                value = self.parse(content)
            except self.errors:
                return False
            if self.render is not None:
                again = self.parse(self.render(value))
                if again != value and repr(again) != repr(value):  # NaN is not NaN
                    raise Broken(f"{value!r:.300} comes back as {again!r:.300}")
        return True


@dataclass(slots=True)
class Found:
    """The least input that breaks a rule, and how."""

    content: bytes
    error: BaseException


@dataclass(slots=True)
class Run:
    """The inputs of some time. read: those that the parser took."""

    inputs: int = 0
    read: int = 0
    found: Found | None = None


def try_some(target: Target, count: int, *, seed: int | None = None) -> Run:
    """Try this many inputs, the valid ones first. seed: draws others; without it they are always the same."""
    run = Run()
    seeds = target.seeds()
    last = b""

    def look(content: bytes) -> None:
        nonlocal last
        last = target.seal(content) if target.seal is not None else content
        run.inputs += 1
        try:
            run.read += target.check(last)
        except Broken as error:
            raise AssertionError(
                str(error)
            ) from None  # hypothesis makes an input smaller for an Exception only

    # Target.check is a test's body: hypothesis calls it, and once more with the least input that fails.
    search: Callable[[], None] = settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=seed is None,
        report_multiple_bugs=False,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )(_seeded(given(hostile(seeds))(look), seed))
    logging.disable()
    try:
        for content in seeds:
            last = content
            if not target.check(content):
                raise Broken("a valid input is refused")
        search()
    except (Exception, Broken) as error:
        run.found = Found(last, error)
    finally:
        logging.disable(logging.NOTSET)
    return run


def _seeded(search: Callable[[], None], seed: int | None) -> Callable[[], None]:
    return search if seed is None else seeded(seed)(search)


@contextmanager
def _bounded() -> Iterator[None]:
    """Have what runs here broken off after CPU_S, and looked at for the memory that it took at most."""
    before = signal.signal(signal.SIGVTALRM, _too_long)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    begun_bytes = _status_bytes("VmRSS:")
    signal.setitimer(signal.ITIMER_VIRTUAL, CPU_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    if (more := _status_bytes("VmHWM:") - begun_bytes) > MEMORY_BYTES:
        raise Broken(f"takes {more >> 20} MiB of memory")


def _too_long(number: int, frame: FrameType | None) -> None:
    raise Broken(f"takes more than {CPU_S:g} s")


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) * 1024
    return 0
