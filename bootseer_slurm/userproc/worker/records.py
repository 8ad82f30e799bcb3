"""Small objects of a user in the store: events, traces and plans, and what a job class asked for."""

from __future__ import annotations

import os

from bootseer_slurm.blob.jobclass import RECORD_LIMIT_BYTES, class_path, decode_record
from bootseer_slurm.blob.names import user_folder
from bootseer_slurm.blob.plans import Shape, keep_trace, plan_of
from bootseer_slurm.errors import NotFound
from bootseer_slurm.store import clock_offset
from bootseer_slurm.userproc import protocol
from bootseer_slurm.userproc.memory_file import make_memory_file
from bootseer_slurm.userproc.protocol import Reply
from bootseer_slurm.userproc.worker.handles import StoreOfUser

_WARNING_LIMIT = 4096


class Records:
    """Reads and writes them; each method is one operation of the protocol."""

    def __init__(self, store: StoreOfUser) -> None:
        self._store = store

    def write(self, request: protocol.Write, content: bytes) -> tuple[Reply, list[int]]:
        self._store.open().write(f"{user_folder(os.getuid())}/{request.path}", content)
        return Reply(), []

    def clock(self, request: protocol.AskClock, _: bytes) -> tuple[Reply, list[int]]:
        path = f"{user_folder(os.getuid())}/{request.path}"
        return protocol.Clock(*clock_offset(self._store.open(), path)), []

    def keep_trace(self, request: protocol.KeepTrace, content: bytes) -> tuple[Reply, list[int]]:
        keep_trace(self._store.open(), os.getuid(), request.job_class, request.blob, content)
        return Reply(), []

    def make_plan(self, request: protocol.MakePlan, _: bytes) -> tuple[Reply, list[int]]:
        plan, warning = plan_of(
            self._store.open(),
            os.getuid(),
            request.job_class,
            request.blob,
            Shape(request.blocks, request.block_bytes),
            any_class=request.any_class,
        )
        return protocol.Planned((warning or "")[:_WARNING_LIMIT]), [make_memory_file(plan.encode())]

    def recall(self, request: protocol.Recall, _: bytes) -> tuple[Reply, list[int]]:
        path = class_path(os.getuid(), request.job_class)
        try:
            content = self._store.open().read(path, limit_bytes=RECORD_LIMIT_BYTES)
        except NotFound:
            return protocol.Recalled(), []
        return protocol.Recalled(tuple(map(tuple, decode_record(content)))), []  # type: ignore[arg-type]

    def remember(self, request: protocol.Remember, content: bytes) -> tuple[Reply, list[int]]:
        self._store.open().write(class_path(os.getuid(), request.job_class), content)
        return Reply(), []
