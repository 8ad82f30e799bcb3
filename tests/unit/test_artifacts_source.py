"""A source whose process is another one opens its objects again: once, whoever reads."""

from __future__ import annotations

import itertools
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import cast

import pytest

from bootseer_slurm.artifacts.source import ObjectSource
from bootseer_slurm.blob.manifest import BLOCK_BYTES, Layout
from bootseer_slurm.errors import StoreError
from bootseer_slurm.userproc.client import UserProcess

_READERS = 8


class SilentStore:
    """A store that answers, with a failure, once it may."""

    def __init__(self) -> None:
        self.may_answer = threading.Event()
        self.asked = 0

    def open_again(self, _: UserProcess) -> int:
        self.asked += 1
        self.may_answer.wait(10)
        raise StoreError("no answer")

    def source(self, *processes: UserProcess) -> ObjectSource:
        """Read by one process, or by these, one after the other."""
        given = iter(processes) if processes else itertools.repeat(a_process())
        return ObjectSource("store", Layout(BLOCK_BYTES), lambda: next(given), self.open_again)


def a_process() -> UserProcess:
    return cast(UserProcess, object())


def read(source: ObjectSource) -> None:
    with source.read(0, 4096, demand=True, fixed=True):
        pass


def test_many_readers_share_the_failure_of_the_one_who_opens_it() -> None:
    store = SilentStore()
    source = store.source()
    with ThreadPoolExecutor(_READERS) as pool:
        reads = [pool.submit(read, source) for _ in range(_READERS)]
        while not store.asked:
            pass
        store.may_answer.set()
    assert [str(each.exception()) for each in reads] == ["no answer"] * _READERS
    assert store.asked == 1


def test_a_reader_does_not_wait_for_long_for_the_one_who_opens_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootseer_slurm.artifacts.source._OPEN_WAIT_S", 0.05)
    store = SilentStore()
    source = store.source()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(read, source)
        while not store.asked:
            pass
        with pytest.raises(StoreError, match="takes long"):
            read(source)
        store.may_answer.set()
    assert str(first.exception()) == "no answer"


def test_the_next_process_is_asked_at_once() -> None:
    store = SilentStore()
    store.may_answer.set()
    source = store.source(a_process(), a_process())
    for _ in range(2):
        with pytest.raises(StoreError):
            read(source)
    assert store.asked == 2


def test_what_failed_is_opened_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bootseer_slurm.artifacts.source._FAILED_FOR_S", 0.0)
    store = SilentStore()
    store.may_answer.set()
    source = store.source()
    for _ in range(2):
        with pytest.raises(StoreError):
            read(source)
    assert store.asked == 2
