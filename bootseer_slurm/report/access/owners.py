"""Users' event files as root reads them: each with the rights of its user (userproc/forked.py)."""

from __future__ import annotations

import pwd
from collections.abc import Iterator
from typing import Annotated

from msgspec import Meta, Struct

from bootseer_slurm.errors import StoreError
from bootseer_slurm.report.gather.stored import MAX_TEXT, StoredEvents, run_folders, user_folders
from bootseer_slurm.store import Store, folder_of, give_folder, users_of
from bootseer_slurm.userproc.forked import Limits, read_as_user

_RUN_LIMIT_BYTES = 128 << 20  # of one run's files, which its user wrote; in memory they are six times that

NODE_LIMIT = 255
# Strangers' folders are many at will, and each is looked at before anything is said: 400,000 take 80 s.
_ALL_USERS = Limits(silent_s=900.0)
_Number = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Piece = tuple[Struct, bytes]


class UserFolder(Struct, frozen=True):
    """A user who has a folder."""

    uid: _Number


class GivenFolder(Struct, frozen=True):
    """What was done with folders of users/ that others had made, in words."""

    said: str


class Run(Struct, frozen=True, tag=True):
    """A run that has events. changed_s: when its folder last changed, since 1970."""

    job: _Number
    restart: _Number
    changed_s: float = 0.0


class GoneRun(Struct, frozen=True, tag=True):
    """A run that had events."""

    job: _Number
    restart: _Number


class EventFile(Struct, frozen=True):
    """One node's file of a run; its content comes with it."""

    job: _Number
    restart: _Number
    node: Annotated[str, Meta(max_length=NODE_LIMIT)]


class OwnersEvents:
    """The EventStore for root: each user's files read with that user's rights."""

    def __init__(self, store_uri: str) -> None:
        self._uri = store_uri

    def users(self) -> list[int]:
        """The uids that have a folder of their own. Raises StoreError.

        Of folders the owner counts, where the store tells him: anybody can make 400,000 with others' uids.
        """
        root = folder_of(self._uri)

        def produce(store: Store) -> Iterator[_Piece]:
            if root is None:
                yield from ((UserFolder(uid), b"") for uid in user_folders(store))
            else:
                yield from ((UserFolder(uid), b"") for uid, owner in users_of(root) if uid == owner)

        return sorted(folder.uid for folder, _ in read_as_user(0, self._uri, produce, UserFolder, _ALL_USERS))

    def give_back(self) -> list[str]:
        """Give known users their folders that others have made; tells which. Raises StoreError."""
        root = folder_of(self._uri)
        if root is None:
            return []

        def produce(store: Store) -> Iterator[_Piece]:
            strange = 0
            for uid, owner in users_of(root):
                if uid == owner:
                    continue
                if (gid := _group_of(uid)) is None:
                    strange += 1
                    continue
                try:
                    give_folder(root, uid, gid)
                    yield GivenFolder(f"users/{uid} was made by user {owner}, and is its own user's now"), b""
                except StoreError as error:
                    yield GivenFolder(f"users/{uid} was made by user {owner}: {error.message}"), b""
            if strange:
                yield (
                    GivenFolder(f"{strange} folders of users/ are another user's than they say: not read"),
                    b"",
                )

        return [folder.said for folder, _ in read_as_user(0, self._uri, produce, GivenFolder, _ALL_USERS)]

    def restarts(self, uid: int, job: int) -> list[int]:
        """The restart counts under which this user's job has events."""

        def produce(store: Store) -> Iterator[_Piece]:
            yield from ((Run(job, each), b"") for each in StoredEvents(store).restarts(uid, job))

        return [run.restart for run, _ in read_as_user(uid, self._uri, produce, Run)]

    def event_files(self, uid: int, job: int, restart: int) -> Iterator[tuple[str, str]]:
        """(node, text of its file) for each node that sent events."""
        for file, text in self.files_of_runs(uid, [(job, restart)], Limits(content_bytes=MAX_TEXT)):
            yield file.node, text

    def files_of_runs(
        self, uid: int, runs: list[tuple[int, int]], limits: Limits
    ) -> Iterator[tuple[EventFile, str]]:
        """Each node's file of runs of one user, and its text, run by run."""

        def produce(store: Store) -> Iterator[_Piece]:
            for job, restart in runs:
                yield from event_pieces(store, uid, job, restart)

        for file, content in read_as_user(uid, self._uri, produce, EventFile, limits):
            yield file, content.decode("utf-8", errors="replace")

    def changed_runs(
        self, uid: int, known: dict[tuple[int, int], float], limits: Limits, *, most: int
    ) -> tuple[list[Run], list[GoneRun]]:
        """A user's runs whose folder changed since `known` says, the newest first; and those that are gone.

        known: when each folder had changed. most: how many are given.
        """

        def produce(store: Store) -> Iterator[_Piece]:
            there = list(run_folders(store, uid))
            new = [each for each in there if known.get(each[:2]) != each[2]]
            new.sort(key=lambda each: each[2], reverse=True)
            for job, restart, changed_s in new[:most]:
                yield Run(job, restart, changed_s), b""
            # Where there is none at all, the store may be away.
            for job, restart in known.keys() - {each[:2] for each in there} if there else ():
                yield GoneRun(job, restart), b""

        found = [run for run, _ in read_as_user(uid, self._uri, produce, Run | GoneRun, limits)]
        return [each for each in found if isinstance(each, Run)], [
            each for each in found if isinstance(each, GoneRun)
        ]


def _group_of(uid: int) -> int | None:
    """The group of a user whom this machine knows."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except (KeyError, OverflowError):
        return None


def event_pieces(store: Store, uid: int, job: int, restart: int) -> Iterator[tuple[EventFile, bytes]]:
    """Each node's file of one run; those beyond what a run may cost are not read."""
    left_bytes = _RUN_LIMIT_BYTES
    for node, text in StoredEvents(store).event_files(uid, job, restart):
        if len(node) > NODE_LIMIT:  # objects may have longer names than nodes
            continue
        content = text.encode("utf-8", "replace")[:MAX_TEXT]
        left_bytes -= len(content)
        if left_bytes < 0:
            return
        yield EventFile(job, restart, node), content
